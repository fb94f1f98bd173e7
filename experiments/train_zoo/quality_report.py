"""What `experiments.train_zoo.quality` measures, as a report: figures, pictures, records."""

from __future__ import annotations

import json
import shutil

from experiments.store.files import require_writable, write_json
from experiments.train_zoo import model_cards
from experiments.train_zoo.natural_quality import judge_natural, measure_natural, samples_picture
from experiments.train_zoo.twin_quality import OUT, judge_twin, measure_twin
from models.registry import find_preset


def report_quality(model: str, overrides: list[str], data_folder: str | None, record: bool) -> None:
    """Measure a model, write the figures under `runs/quality` and print them.

    `record` writes them among those that ship, too.
    """
    path = OUT / model / "quality.json"
    require_writable(path, "runs")
    if find_preset(model).dataset == "tiny_imagenet":
        picture = samples_picture(model)
        result = measure_natural(model, overrides, data_folder)
        result["bars"] = judge_natural(result)
    else:
        picture = OUT / model / "samples.png"
        result = measure_twin(model, overrides, data_folder)
        result["bars"] = judge_twin(result)
    # before it is written, which may fail after all
    print(json.dumps(result, indent=1, allow_nan=False))
    write_json(path, result)
    if record:
        records = model_cards.ZOO / "records"
        model_cards.write_record(f"{model}-quality", result)
        shutil.copy(picture, records / f"{model}-{picture.name}")
        model_cards.write_cards()

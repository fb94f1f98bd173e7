"""What is measured of a sampled run besides its images: held-out likelihoods and costs.

    FOLDER/scores.json    {"of": what it is of, "metrics": {"nll", "kl"}, "cost": {...}, "digest"}

It is written as soon as the model is quantized, before its images, and is of the run, its held-out
tokens and their number: if one of them changes, it is measured again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.calibration import Quantization
from experiments.run.preparation import Run, load_model
from experiments.run.scoring import model_bytes, named_tokens, score_held_out
from experiments.store import files
from ptq.errors import say
from ptq.files import DamagedFile, read_sealed, value_digest
from ptq.pipeline import Track

SCORES = "scores.json"
UNQUANTIZED = {"calibration_s": None, "calibration_peak_mb": None}


def scores_key(run: Run, images: str) -> str:
    """What scores are of: the run of the images, its held-out tokens and their number."""
    held_out = run.held_out.digest if run.held_out else run.whole["data"].get("held_out")
    sequences = run.config.eval.sequences
    return value_digest({"run": images, "held_out": held_out, "sequences": sequences}, 16)


def read_scores(folder: Path, key: str | None = None) -> dict[str, Any] | None:
    """The scores in a folder, if there are some of this key; a damaged file is named."""
    path = folder / SCORES
    if not path.is_file():
        return None
    try:
        scores = read_sealed(path)
    except DamagedFile as error:
        say(f"made anew: {error}")
        return None
    return scores if key in (None, scores["of"]) else None


def write_scores(
    run: Run,
    key: str,
    folder: Path,
    quantization: Quantization | None,
    exported_bytes: int | None,
    track: Track,
) -> None:
    """Measure a run's model, and keep the scores in its folder.

    Args:
        quantization: what became of the model; None in full precision.
        exported_bytes: of its integers, if it runs in them.

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    cost: Mapping[str, float | None] = UNQUANTIZED if quantization is None else quantization.cost
    scores = {
        "of": key,
        "metrics": score_tokens(run, track),
        "cost": {
            **cost,
            "model_bytes": exported_bytes or model_bytes(run.generator.transformer, run.config),
        },
    }
    files.write_sealed(folder / SCORES, scores)


def score_tokens(run: Run, track: Track) -> dict[str, float]:
    """NLL and KL of held-out tokens; nothing where there are none."""
    if run.held_out is None and not run.preset.weights.shipped:
        return {}
    original = run.generator
    if run.config.method.quantized:
        original = load_model(run.config, run.device)  # the run's own has been changed in place
    named = named_tokens(run, track)
    return score_held_out(run.generator, original, run.config, run.device, named)

"""What several of these tests ask for: no W&B but their own, evaluations of made-up images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.evaluate import command
from tests.experiments.evaluate.evaluations import LAYERS, Case, Linear, pictures
from tests.experiments.images.test_image_sets import save_shards


@pytest.fixture(autouse=True)
def no_wandb_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_DATA_DIR",
        "WANDB_CACHE_DIR",
        "WANDB_DIR",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Linear:
    """Takes the place of Inception (and of Lite0)."""
    found = Linear()
    original = command.load_extractor
    monkeypatch.setattr(
        command,
        "load_extractor",
        lambda o: original(o) if o.extractor == "fashion" else (found, LAYERS),
    )
    return found


@pytest.fixture
def case(tmp_path: Path, net: Linear) -> Case:
    return Case(tmp_path)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of 30 images of 32 pixels, the second one close to the first, without the padding's
    two."""
    folder = tmp_path_factory.mktemp("grey")
    whole = pictures(32, size=32)
    save_shards(folder / "fp", whole, 30)
    save_shards(folder / "quantized", whole ^ np.uint8(8), 30)
    return folder / "quantized", folder / "fp"

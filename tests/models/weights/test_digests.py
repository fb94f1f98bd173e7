"""Digests of weights: remembered while a file is the same, and equal to those of loaded modules."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from models import registry
from models.weights import checkpoints, digests

HOUR = 3600.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock that digests read so many seconds ahead."""

    def advance(seconds: float) -> None:
        now = time.time() + seconds
        monkeypatch.setattr(digests.time, "time", lambda: now)

    return advance


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is hashed."""
    names: list[str] = []
    hash_file = digests.hashlib.file_digest

    def recorded(file, algorithm):
        names.append(Path(file.name).name)
        return hash_file(file, algorithm)

    monkeypatch.setattr(digests.hashlib, "file_digest", recorded)
    return names


def test_a_settled_file_is_hashed_once(
    tmp_path: Path, hashed: list[str], clock: Callable[[float], None]
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    clock(HOUR)
    first = digests.file_digest(path)
    assert digests.file_digest(path) == first
    assert hashed == ["weights"]


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    before = digests.file_digest(path)
    path.write_bytes(b"more weights")  # of the same size, perhaps at the same tick of the clock
    assert digests.file_digest(path) != before
    assert len(hashed) == 2


def test_a_change_shows_although_the_modification_time_is_set_back(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    times = path.stat()
    clock(HOUR)
    before = digests.file_digest(path)
    time.sleep(0.05)  # several ticks of the file system's clock
    path.write_bytes(b"more weights")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.file_digest(path) != before


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(models.CheckpointError, match="^weights: .*nothing cannot be read"):
        digests.file_digest(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["var_twin", "rar_twin", "par_twin", "mar_twin"])
def test_digests_of_a_preset_are_those_of_its_modules(name: str, dtype: torch.dtype) -> None:
    model = models.load(name)
    model.transformer.to(dtype)
    assert registry.weights_digests(name, dtype=dtype) == {
        part: digests.module_digest(getattr(model, part)) for part in registry.PARTS
    }


def test_digests_of_half_precision_files_are_those_of_what_is_loaded(
    tmp_path: Path,
) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in twin_state().items()}
    shuffled = dict(reversed(state.items()))  # the order of a file does not count
    torch.save({"model": shuffled}, tmp_path / "half.pt")
    loaded = models.load("rar_twin", weights=tmp_path / "half.pt")
    found = registry.weights_digests("rar_twin", weights=tmp_path / "half.pt")
    assert found["transformer"] == digests.module_digest(loaded.transformer)


def test_weights_of_another_model_have_no_digest() -> None:
    path = registry.ZOO / "rar_twin" / "transformer.safetensors"
    with pytest.raises(models.CheckpointError, match="they fit the transformer of rar_twin"):
        registry.weights_digests("par_twin", weights=path)


def test_unchanged_weights_are_not_read_again(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    clock(HOUR)
    found = registry.weights_digests("rar_twin")
    monkeypatch.setattr(
        checkpoints, "read_checkpoint", lambda path: pytest.fail(f"read {path} again")
    )
    assert registry.weights_digests("rar_twin") == found


def twin_state() -> dict[str, torch.Tensor]:
    return checkpoints.read_checkpoint(registry.ZOO / "rar_twin" / "transformer.safetensors")

"""What ships is compared with the table of digests beside it, and a new file puts its own there."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import registry
from models.weights import pins
from models.weights.checkpoints import CheckpointError


def test_every_file_of_the_zoo_that_is_read_stands_in_the_table() -> None:
    table = pins.read_table(registry.ZOO / pins.TABLE)
    for name in table:
        assert pins.require_pinned(registry.ZOO / name).is_file()
    tensors = {path.name for path in registry.ZOO.glob("*.safetensors")}
    records = {f"records/{path.name}" for path in (registry.ZOO / "records").glob("*.json")}
    twins = {f"{name}/transformer.safetensors" for name in ("mar_twin", "var_twin", "rar_twin")}
    assert tensors | records | twins <= table.keys()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A zoo of one pinned file in a folder of its own."""
    (tmp_path / pins.TABLE).touch()
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "a.safetensors").write_bytes(b"weights")
    pins.pin_file(tmp_path / "twin" / "a.safetensors")
    return tmp_path


def test_a_file_that_is_not_the_one_in_the_table_is_refused(zoo: Path) -> None:
    path = zoo / "twin" / "a.safetensors"
    assert pins.require_pinned(path) == path
    path.write_bytes(b"weightS")
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors is not the file that ships: .*expected"
    ):
        pins.require_pinned(path)
    pins.pin_file(path)  # as training does
    assert pins.require_pinned(path) == path


def test_a_file_without_a_line_is_refused_and_one_without_a_table_is_not(zoo: Path) -> None:
    (zoo / "b.safetensors").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"no line for b\.safetensors; training writes one"):
        pins.require_pinned(zoo / "b.safetensors")
    pins.pin_file(zoo / "b.safetensors")
    assert pins.require_pinned(zoo / "b.safetensors") == zoo / "b.safetensors"
    assert pins.require_pinned(zoo / "missing") == zoo / "missing"
    pins.pin_file(zoo.parent / "elsewhere")
    assert pins.find_table(zoo.parent / "elsewhere") is None


@pytest.mark.parametrize("line", ["abc  a.safetensors", f"{'0' * 64} a", "<html>"])
def test_a_damaged_table_is_named(zoo: Path, line: str) -> None:
    (zoo / pins.TABLE).write_text(f"{line}\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS is damaged"):
        pins.require_pinned(zoo / "twin" / "a.safetensors")

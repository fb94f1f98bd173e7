"""Files appear whole or not at all, and a failed writer leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.store import files
from ptq.files import read_json, value_digest, write_tensors
from ptq.spec import ConfigError


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_json(path, {"fid": 1})

    def write_half() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert path.read_text() == '{\n "fid": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writer_of_a_folder_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with files.replacing(tmp_path / "png") as temporary:
            temporary.mkdir()
            (temporary / "000000.png").touch()
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with files.replacing(path) as first, files.replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the block that ended last


def test_tensors_and_arrays_come_back(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    write_tensors({"a": tensor.T}, tmp_path / "deep" / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "deep" / "a.safetensors")["a"], tensor.T)
    files.save_arrays({"b": tensor.numpy()}, tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as stored:
        assert np.array_equal(stored["b"], tensor.numpy())


def test_a_value_has_one_digest_in_any_order_of_keys() -> None:
    assert value_digest({"a": 1, "b": [2]}) == value_digest({"b": [2], "a": 1})
    assert value_digest({"a": 1}) != value_digest({"a": 2})


NONFINITE = {
    "nan": ({"fid": float("nan")}, "fid"),
    "infinity": ({"metrics": {"kl": float("inf")}}, "metrics.kl"),
    "minus infinity": ({"a": [1.0, {"b": float("-inf")}]}, "a.b"),
    "numpy": ({"x": {"y": (np.float64("nan"),)}}, "x.y"),
}


@pytest.mark.parametrize("kind", NONFINITE)
def test_numbers_unknown_to_json_are_refused_and_nothing_is_written(
    tmp_path: Path, kind: str
) -> None:
    value, field = NONFINITE[kind]
    path = tmp_path / "result.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(ConfigError, match="only finite numbers are written") as caught:
        files.write_json(path, value)
    assert str(caught.value).startswith(f"{path}: {field}: is ")
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "[" * 100_000, "{", ""])
def test_what_is_not_strict_json_is_not_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"not JSON|too deep|Expecting"):
        read_json(tmp_path / "file.json")

"""Files prove what they hold: a digest of an object's fields, and one of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ptq import files
from ptq.files import DamagedFile

VALUE = {"a": 1.5, "b": [1, None, "x"], "c": {"d": True}}


def test_a_sealed_object_comes_back_and_its_order_does_not_matter(tmp_path: Path) -> None:
    sealed = files.seal_object(VALUE)
    assert files.seal_object(sealed) == sealed
    assert list(sealed)[-1] == files.DIGEST
    path = tmp_path / "a.json"
    for written in (sealed, dict(reversed(sealed.items()))):
        path.write_text(json.dumps(written))
        assert files.read_sealed(path) == VALUE


def renamed(sealed: dict[str, Any]) -> dict[str, Any]:
    digest = sealed.pop("digest")
    return {**sealed, "digesu": digest}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sealed: sealed | {"a": 1.6}, "its content has the digest"),
        (lambda sealed: sealed | {"e": 1}, "its content has the digest"),
        (lambda sealed: {**sealed, "digest": "0" * 16}, "expected 0000000000000000"),
        (lambda sealed: VALUE, "it has no digest"),
        (renamed, "it has no digest"),
        (lambda sealed: [sealed], "it has no digest"),
    ],
)
def test_what_is_not_what_its_digest_says_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(change(files.seal_object(VALUE))))
    with pytest.raises(DamagedFile) as caught:
        files.read_sealed(path)
    assert str(caught.value).startswith(f"{path}: is damaged")
    assert said in str(caught.value)


def test_an_object_without_a_digest_has_no_fault_a_renamed_digest_has() -> None:
    assert files.seal_fault(VALUE) == ""
    assert files.seal_fault(files.seal_object(VALUE)) == ""
    assert files.seal_fault(renamed(files.seal_object(VALUE))) == "its digest has another name"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("NaN", "NaN is not JSON"),
        ("[1, Infinity]", "Infinity is not JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_json_is_strict(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        files.read_json(path)
    with pytest.raises(DamagedFile, match="cannot be read"):
        files.read_sealed(path)


def test_tensors_come_back_with_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    whole = torch.arange(6.0).view(2, 3)
    files.write_tensors({"a": whole.T, "b": whole.half()}, path, {files.OWNER: "x", "n": "3"})
    tensors, texts = files.read_tensors(path, of="x")
    assert torch.equal(tensors["a"], whole.T)
    assert tensors["b"].dtype == torch.float16
    assert texts == {files.OWNER: "x", "n": "3"}
    with pytest.raises(DamagedFile, match="is of x, expected y"):
        files.read_tensors(path, of="y")


def test_changed_tensors_texts_and_types_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = {"a": torch.ones(2), "b": torch.zeros(2)}
    files.write_tensors(whole, path, {"n": "3"})
    content = path.read_bytes()
    digest = files.value_digest([files.digest_tensors(whole), {"n": "3"}], 16)
    assert digest.encode() in content
    changes = [
        ({"a": whole["b"], "b": whole["a"]}, "3"),
        ({"a": whole["a"].int(), "b": whole["b"]}, "3"),
        ({"a": whole["a"].view(1, 2), "b": whole["b"]}, "3"),
        (whole, "4"),
    ]
    for tensors, text in changes:
        save_file(tensors, path, {"n": text, files.DIGEST: digest})
        with pytest.raises(DamagedFile, match=f"expected {digest}"):
            files.read_tensors(path)
    save_file(whole, path, {"n": "3"})
    with pytest.raises(DamagedFile, match="it has no digest"):
        files.read_tensors(path)
    assert set(files.read_tensors(path, sealed=False)[0]) == {"a", "b"}  # as older files are

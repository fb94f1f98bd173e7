"""Files of every kind that users hold: official wrappers, wrong, damaged, hostile ones; the cache
of conversions."""

from __future__ import annotations

import argparse
import gzip
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.preset import Source
from models.weights import checkpoints, conversions, digests
from models.weights.checkpoints import CheckpointError, read_checkpoint

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
OTHER = {k: v - 1 for k, v in STATE.items()}
ARGS = argparse.Namespace(lr=1e-4, output_dir="out", betas=(0.9, 0.95))
OPTIMIZER = {
    "state": {0: {"exp_avg": torch.zeros(2)}},
    "param_groups": [{"lr": 1e-4, "params": [0]}],
}

pytestmark = pytest.mark.usefixtures("cache_folder")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)


WRAPPED = {
    "bare": STATE,
    "model": {"model": STATE, "optimizer": OPTIMIZER, "steps": 3, "args": ARGS},
    "state_dict": {
        "state_dict": STATE,
        "epoch": 1,
        "global_step": 5,
        "pytorch-lightning_version": "1.4.2",
    },
    "module": {"module": STATE},
    "model_ema": {
        "model": OTHER,
        "model_ema": STATE,
        "optimizer": OPTIMIZER,
        "epoch": 800,
        "scaler": {},
        "args": ARGS,
    },
    "prefix": {"module." + k: v for k, v in STATE.items()},
    "nested": {"model": {"state_dict": {"module._orig_mod." + k: v for k, v in STATE.items()}}},
    "parameters": {k: nn.Parameter(v) for k, v in STATE.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_every_wrapper_is_taken_off(tmp_path: Path, wrapper: str, legacy: bool) -> None:
    torch.save(WRAPPED[wrapper], tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    assert same(read_checkpoint(tmp_path / "file.pth"), STATE)


def test_dtypes_and_scalars_are_kept(tmp_path: Path) -> None:
    state = {
        "a": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(3),
        "h": torch.zeros(1, dtype=torch.float16),
    }
    torch.save({"state_dict": state}, tmp_path / "file.ckpt")
    assert same(read_checkpoint(conversions.convert_file(tmp_path / "file.ckpt")), state)


class Evil:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, ("touch harmed",)


class Evaluation:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return eval, ("open('harmed', 'w')",)


def hostile(content: object) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(content))


def saved(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def cut(content: object, share: float) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


def flipped(path: Path) -> None:
    torch.save(STATE, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(STATE["weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(raw)


UNREADABLE = {  # how the file is made, and what the message says
    "missing": (lambda path: None, "is missing, expected a file"),
    "folder": (lambda path: path.mkdir(), "is a directory, expected a file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read (an empty file)"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "cannot be read (a Git LFS pointer, not the file itself",
    ),
    "page": (
        lambda path: path.write_text("\n<!DOCTYPE html>\n<html><title>Sign in</title>"),
        "cannot be read (an HTML page",
    ),
    "xml": (lambda path: path.write_text('<?xml version="1.0"?><Error/>'), "(an HTML page"),
    "safetensors": (lambda path: save_file(STATE, path), "(a safetensors file, name it"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "(a gzip archive, unpack"),
    "image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 99), "(a PNG image)"),
    "array": (lambda path: np.save(path.open("wb"), np.ones(3)), "(a NumPy array (.npy))"),
    "json": (lambda path: path.write_text('{"error": "not found"}'), "(a JSON text)"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 9), "cannot be read"),
    "text": (
        lambda path: path.write_text("<html>503 Service Unavailable</html>"),
        "cannot be read",
    ),
    "pickled": (hostile([1, 2]), "cannot be read"),
    "truncated": (cut(STATE, 0.6), "cannot be read"),
    "beheaded": (cut(STATE, 0.02), "cannot be read"),
    "flipped bit": (flipped, "is damaged: the checksum of"),
    "list": (saved([torch.ones(1)]), "holds a list, expected tensors by name"),
    "nothing": (saved({}), "holds nothing, expected tensors by name"),
    "no tensors": (
        saved({"trainer": {"epoch": 3}}),
        "holds trainer: dict, expected tensors by name",
    ),
    "two models": (
        saved({"model": STATE, "ema": OTHER}),
        "beside its entry 'model' (ema), expected none; name one: PATH::model or ::ema",
    ),
    "loose tensor": (
        saved({"model": STATE, "logvar": torch.ones(1)}),
        "beside its entry 'model' (logvar)",
    ),
    "system call": (
        saved({"model": STATE, "args": Evil()}),
        "it asks for posix.system, allowed are tensors",
    ),
    "bare system call": (hostile(Evil()), "cannot be read"),
    "evaluation": (
        saved({"model": STATE, "args": Evaluation()}),
        "it asks for eval, allowed are tensors",
    ),
    "a trainer": (
        saved({"trainer": {"var_wo_ddp": STATE, "vae_local": OTHER}, "epoch": 3}),
        "name one: PATH::trainer.var_wo_ddp or ::trainer.vae_local",
    ),
    "a class": (saved({"model": STATE, "args": Path("x")}), "it asks for pathlib"),
}


TRAINER = {  # as VAR's trainer and others save
    "epoch": 3,
    "trainer": {"var_wo_ddp": STATE, "vae_local": OTHER, "var_opt": {"state": {}}},
    "args": {"depth": 16},
}
ENTRIES = {  # content, entry, expected
    "trainer": (TRAINER, "trainer.var_wo_ddp", STATE),
    "other model": (TRAINER, "trainer.vae_local", OTHER),
    "ema": ({"model": OTHER, "ema": STATE, "opt": OPTIMIZER}, "ema", STATE),
    "beside ema": ({"model": STATE, "ema": OTHER}, "model", STATE),
    "wrapped": (
        {"ema": {"state_dict": {"module." + k: v for k, v in STATE.items()}}},
        "ema",
        STATE,
    ),
    "dotted name": ({"a.b": STATE, "a": {"b": OTHER}}, "a.b", STATE),
    "no need": ({"model": STATE}, "model", STATE),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_of_a_training_scripts_file_is_read_by_its_name(tmp_path: Path, case: str) -> None:
    content, entry, expected = ENTRIES[case]
    torch.save(content, tmp_path / "file.pth")
    named = tmp_path / f"file.pth::{entry}"
    assert same(read_checkpoint(named), expected)
    assert digests.file_digest(named) == digests.file_digest(tmp_path / "file.pth")
    os.utime(tmp_path / "file.pth", (1e9, 1e9))
    for entry in ("a", "b"):
        path = tmp_path / f"file.pth::{entry}"
        assert digests.remember_digest(path, "kind", partial(str, entry)) == entry


@pytest.mark.parametrize("entry", ["trainer.var", "ema", "trainer.var_wo_ddp.weight.x", "", "."])
def test_a_missing_entry_is_refused_with_those_there_are(tmp_path: Path, entry: str) -> None:
    torch.save(TRAINER, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="has no entry .*, there are "):
        read_checkpoint(tmp_path / f"file.pth::{entry}")


def test_a_file_whose_name_holds_the_mark_is_itself(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a::b")
    assert same(read_checkpoint(tmp_path / "a::b"), STATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(dtype: torch.dtype, value: float) -> None:
    module = nn.BatchNorm1d(4)  # parameters, buffers, and an integer buffer
    for name in ("weight", "bias", "running_mean"):
        state = {key: entry.clone() for key, entry in module.state_dict().items()}
        state[name] = state[name].to(dtype)
        state[name][2] = value
        if name == "running_mean" and value == float("-inf"):  # masks hold it
            checkpoints.require_finite(module, state, "a.pth")
            continue
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load_into(module, state, "a.pth")
        expected = f"weights: a.pth holds NaN or infinity ({name}: 1 of 4), only finite"
        assert str(caught.value).startswith(expected)
    assert bool(module.weight.isfinite().all())


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = UNREADABLE[case]
    make(tmp_path / "file.pth")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "file.pth")
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert text.startswith(f"weights: {tmp_path / 'file.pth'} ")
    assert len(text) < 300 + len(str(tmp_path))
    assert not (tmp_path / "harmed").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_safetensors(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-4] if damage == "truncated" else b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"^weights: .* cannot be read \(.*\)$"):
        read_checkpoint(path)


def test_misfits_are_named_and_nothing_is_loaded() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    good = {k: torch.full_like(v, 7) for k, v in before.items()}
    bad = {
        **{k: v for k, v in good.items() if k != "0.bias"},
        "0.weight": torch.ones(2, 4),
        "1.num_batches_tracked": torch.tensor(1.5),
        **{f"more.{i}": torch.ones(1) for i in range(5)},
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_into(module, bad, "file")
    assert str(caught.value) == (
        "weights: file does not fit Sequential: 1 missing keys (0.bias); "
        "5 unexpected keys (more.0, more.1, more.2, ...); "
        "1 misshapen keys (0.weight (2, 4) instead of (2, 3)); "
        "1 mistyped keys (1.num_batches_tracked torch.float32 instead of torch.int64)"
    )
    assert same(module.state_dict(), before)
    checkpoints.load_into(module, good, "file")
    assert same(module.state_dict(), good)
    assert digests.module_digest(module) != digests.module_digest(nn.Linear(3, 2))


def test_the_first_use_converts_and_the_second_reads_the_conversion(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pth"
    torch.save({"model": STATE, "args": ARGS}, path)
    first = conversions.convert_file(path)
    assert first.is_relative_to(cache_folder)
    assert same(read_checkpoint(first), STATE)
    monkeypatch.setattr(
        conversions, "read_checkpoint", lambda path: pytest.fail("read the source again")
    )
    assert conversions.convert_file(path) == first
    # nothing else is left behind
    assert [p.name for p in cache_folder.rglob("*") if p.is_file()] == [first.name]


def test_a_damaged_conversion_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(STATE, path)
    first = conversions.convert_file(path)
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    with pytest.warns(UserWarning, match="is damaged, it is made anew"):
        assert conversions.find_conversion(digests.file_digest(path)) is None
    assert not first.exists()
    assert same(read_checkpoint(conversions.convert_file(path)), STATE)


@pytest.mark.parametrize("note", [b"", b"0123abcd\n", b"<html>", b"\xff" * 64])
def test_a_damaged_note_of_a_source_is_named_and_not_used(note: bytes) -> None:
    source = Source("a.pth", "someone/tiny")
    conversions.remember_source(source, "0" * 64)
    assert conversions.known_digest(source) == "0" * 64
    (path,) = conversions.cache_root().rglob("*.sha256")
    path.write_bytes(note)
    with pytest.warns(UserWarning, match="is damaged, it is made anew"):
        assert conversions.known_digest(source) is None


def test_a_changed_source_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(STATE, path)
    conversions.convert_file(path)
    stat = path.stat()
    torch.save(OTHER, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(read_checkpoint(conversions.convert_file(path)), OTHER)


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pth"
    torch.save(STATE, path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversions.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            conversions.convert_file(path)
    assert [p for p in cache_folder.rglob("*") if p.is_file()] == []
    assert same(read_checkpoint(conversions.convert_file(path)), STATE)


def test_an_unwritable_cache_is_no_obstacle(tmp_path: Path, cache_folder: Path) -> None:
    cache_folder.write_text("a file where the folder should be")
    torch.save(STATE, tmp_path / "file.pth")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert conversions.convert_file(tmp_path / "file.pth") == tmp_path / "file.pth"


def test_tensors_that_share_memory_convert(tmp_path: Path) -> None:
    table = torch.arange(4.0)
    torch.save(
        {"a": table, "b": table, "half": table[:2], "t": table.view(2, 2).t()},
        tmp_path / "file.pth",
    )
    state = read_checkpoint(conversions.convert_file(tmp_path / "file.pth"))
    assert same(state, {"a": table, "b": table, "half": table[:2], "t": table.view(2, 2).t()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_the_extremes_tell_what_isfinite_does(dtype: torch.dtype, value: float) -> None:
    clean = torch.randn(8, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    for place in range(clean.numel()):  # in every lane of a vector, and after the last one
        values = clean.clone()
        values.view(-1)[place] = value
        finite = values.isfinite()
        assert checkpoints.holds_numbers(values) == bool(finite.all())
        is_allowed = bool((finite | values.isneginf()).all())
        assert checkpoints.holds_numbers(values, is_mask=True) == is_allowed
    assert checkpoints.holds_numbers(clean[:0])

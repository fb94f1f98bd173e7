"""Fashion-MNIST's reader on made-up idx files, its command line, and the real files where they are
installed."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import __main__ as command
from experiments.data import fashion_mnist
from experiments.data.errors import DataError
from experiments.data.fashion_mnist import SPLITS, IdxFile, load_split
from ptq.types import ConfigError

N = {"train": 7, "test": 5}


def idx(values: np.ndarray, kind: int = 0x08) -> bytes:
    """An idx file's contents, by the format's description."""
    return (
        bytes((0, 0, kind, values.ndim))
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.tobytes()
    )


def made_up(split: str) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(N[split])
    images = generator.integers(0, 256, (N[split], 28, 28), dtype=np.uint8)
    return images, generator.integers(0, 10, N[split], dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny data set that passes for the published one, in a place where nothing else is found."""
    place = tmp_path / "tiny"
    known = {}
    place.mkdir()
    for split, files in SPLITS.items():
        contents = [idx(values) for values in made_up(split)]
        for file, content in zip(files, contents):
            (place / file.name).write_bytes(gzip.compress(content))
        known[split] = tuple(
            IdxFile(file.name, (N[split], *file.shape[1:]), hashlib.sha256(content).hexdigest())
            for file, content in zip(files, contents)
        )
    monkeypatch.setattr(fashion_mnist, "SPLITS", known)
    monkeypatch.setattr(fashion_mnist, "INSTALLED", Path("/nonexistent/fashion-mnist"))
    monkeypatch.delenv(fashion_mnist.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return place


def one_line(run: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(run.value)
    return str(run.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_padded_and_grey_in_three_channels(folder: Path, split: str) -> None:
    images, labels = load_split(split, folder)
    expected, classes = made_up(split)
    assert images.dtype == torch.uint8
    assert images.shape == (N[split], 3, 32, 32)
    assert labels.dtype == torch.int64
    assert labels.tolist() == classes.tolist()
    for channel in range(3):
        assert np.array_equal(images[:, channel, 2:30, 2:30].numpy(), expected)
    assert images.long().sum() == 3 * expected.astype(int).sum()  # nothing outside the frame
    assert images.untyped_storage().nbytes() == N[split] * 32 * 32  # one channel in memory


def test_order_of_places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "installed")
    (tmp_path / "installed").mkdir()
    assert fashion_mnist.find_folder() == tmp_path / "installed"
    (tmp_path / fashion_mnist.FETCHED).mkdir(parents=True)
    assert fashion_mnist.find_folder() == fashion_mnist.FETCHED
    monkeypatch.setenv(fashion_mnist.VARIABLE, str(folder))
    assert fashion_mnist.find_folder() == folder
    assert fashion_mnist.find_folder(tmp_path) == tmp_path


def test_a_named_folder_is_not_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / fashion_mnist.FETCHED).mkdir(parents=True)
    with pytest.raises(DataError, match="typo") as run:
        fashion_mnist.find_folder("typo")
    one_line(run)
    monkeypatch.setenv(fashion_mnist.VARIABLE, "typo-in-variable")
    with pytest.raises(DataError, match="typo-in-variable"):
        load_split("train")


def test_a_missing_data_set_says_where_it_was_sought_and_how_to_get_it(folder: Path) -> None:
    with pytest.raises(DataError) as run:
        load_split("train")
    for part in (
        str(fashion_mnist.FETCHED),
        str(fashion_mnist.INSTALLED),
        "experiments.data fetch",
        fashion_mnist.VARIABLE,
    ):
        assert part in one_line(run)


def test_unknown_split(folder: Path) -> None:
    with pytest.raises(ConfigError, match="split: 'val' is not one of train, test"):
        load_split("val", folder)


DAMAGE = {
    "truncated gzip": (lambda file: gzip.compress(file)[:-20], "truncated"),
    "not gzip": (lambda file: file, "cannot be read"),
    "flipped bits": (
        lambda file: gzip.compress(file)[:200] + bytes(50) + gzip.compress(file)[250:],
        "cannot be read",
    ),
    "wrong magic": (
        lambda file: gzip.compress(b"\0\0\x0d" + file[3:]),
        "magic number 0x00000d03, expected 0x00000803",
    ),
    "labels": (lambda file: gzip.compress(b"\0\0\x08\x01" + file[4:]), "magic number 0x00000801"),
    "empty": (lambda file: gzip.compress(b""), "magic number 0x,"),
    "short header": (lambda file: gzip.compress(file[:10]), "truncated"),
    "short contents": (
        lambda file: gzip.compress(file[:-1]),
        "holds 5487 values, expected 7 x 28 x 28 = 5488",
    ),
    "other size": (lambda file: gzip.compress(idx(np.zeros((7, 8, 8), np.uint8))), "(8, 8)"),
    "other count": (lambda file: gzip.compress(idx(np.zeros((6, 28, 28), np.uint8))), "6"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_in_one_line(
    folder: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    path = folder / SPLITS["train"][0].name
    damage, words = DAMAGE[kind]
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(DataError) as run:
        load_split("train", folder)
    assert words in one_line(run)
    assert command.main(["check", "--folder", str(folder)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert str(path) in error


def test_a_missing_file_and_a_bad_label(folder: Path) -> None:
    images, labels = (folder / file.name for file in SPLITS["test"])
    labels.write_bytes(gzip.compress(idx(np.full(5, 10, np.uint8))))
    with pytest.raises(DataError, match="label 10, expected 0 to 9"):
        load_split("test", folder)
    images.unlink()
    with pytest.raises(DataError, match=f"{images.name} is missing"):
        load_split("test", folder)


def test_check(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["check", f"folder={folder}"]) == 0
    assert "contents as published" in capsys.readouterr().out
    for file in SPLITS["train"]:  # other values in good order: only the digest tells
        values = fashion_mnist.read_idx(folder / file.name, len(file.shape))
        (folder / file.name).write_bytes(gzip.compress(idx(values // 2)))
    assert command.main(["check", "--folder", str(folder)]) == 1
    assert capsys.readouterr().err.count("differs from the published one") == 2


def test_check_without_data(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["check"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: data: no Fashion-MNIST in data/fashion-mnist, "
    )


@pytest.fixture
def apt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand-ins for apt-get and dpkg-deb that deliver the tiny data set; returns the commands as
    they are given."""
    commands: list[list[str]] = []

    def act(words: tuple[str, ...], cwd: Path, **_: object) -> subprocess.CompletedProcess:
        commands.append(list(words))
        if words[0] == "apt-get":
            (cwd / f"{fashion_mnist.PACKAGE}_0.0_all.deb").touch()
        else:
            target = cwd / words[-1] / "usr/share/datasets/fashion-mnist"
            target.mkdir(parents=True)
            for file in folder.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(fashion_mnist, "INSTALLED", Path("/usr/share/datasets/fashion-mnist"))
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: name)
    monkeypatch.setattr(fashion_mnist.subprocess, "run", act)
    return commands


def test_fetch(apt: list[list[str]], folder: Path) -> None:
    assert command.main(["fetch"]) == 0
    assert [command[0] for command in apt] == ["apt-get", "dpkg-deb"]
    assert load_split("train")[0].shape == (7, 3, 32, 32)
    # nothing left over
    assert [entry.name for entry in fashion_mnist.FETCHED.parent.iterdir()] == [
        fashion_mnist.FETCHED.name
    ]
    assert command.main(["fetch"]) == 0
    assert len(apt) == 2  # not downloaded again
    (fashion_mnist.FETCHED / SPLITS["test"][1].name).unlink()
    assert command.main(["fetch"]) == 0  # mended
    assert not fashion_mnist.check_files(fashion_mnist.FETCHED)


def test_fetch_leaves_other_files_alone(
    apt: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert command.main(["fetch", "--folder", "mine"]) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert not apt


def test_fetch_puts_nothing_unverified_in_place(
    apt: list, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / SPLITS["test"][0].name).write_bytes(b"garbage")
    assert command.main(["fetch"]) == 1
    assert "not usable" in capsys.readouterr().err
    assert list(fashion_mnist.FETCHED.parent.iterdir()) == []


def test_fetch_explains_a_failing_apt(
    apt: list,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    failed = subprocess.CompletedProcess((), 100, "", "Reading\nE: Unable to locate package")
    monkeypatch.setattr(fashion_mnist.subprocess, "run", lambda *a, **k: failed)
    assert command.main(["fetch"]) == 1
    error = capsys.readouterr().err
    assert "E: Unable to locate package" in error
    assert "apt-get update" in error
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: None)
    assert command.main(["fetch"]) == 1
    assert fashion_mnist.UPSTREAM in capsys.readouterr().err


@pytest.mark.skipif(
    fashion_mnist.VARIABLE not in os.environ
    and not fashion_mnist.FETCHED.is_dir()
    and not fashion_mnist.INSTALLED.is_dir(),
    reason="Fashion-MNIST is neither fetched nor installed nor named",
)
def test_the_real_files() -> None:
    installed = fashion_mnist.find_folder()
    assert fashion_mnist.check_files(installed) == []
    for split, per_class in (("train", 6000), ("test", 1000)):
        images, labels = load_split(split, installed)
        assert images.shape == (10 * per_class, 3, 32, 32)
        assert labels.bincount().tolist() == [per_class] * 10

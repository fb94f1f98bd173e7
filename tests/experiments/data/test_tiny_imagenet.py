"""Tiny-ImageNet's reader on a few made-up pictures: layouts, digests, damage, the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import __main__ as command
from experiments.data import tiny_imagenet
from experiments.data.errors import DataError
from experiments.data.tiny_imagenet import Published, load_split
from ptq.types import ConfigError
from tests.experiments.data.pictures import (
    WNIDS,
    by_class,
    encode_picture,
    official_files,
    write_folder,
    write_zip,
)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up zip that passes for the published one."""
    path = write_zip(official_files(), tmp_path / "tiny-imagenet-200.zip")
    known = {}
    for split in tiny_imagenet.SPLITS:
        images, labels = tiny_imagenet.decode_split(split, path)
        digest = tiny_imagenet.pixel_digest(images, labels)
        known[split] = Published(len(images), digest)
    monkeypatch.setattr(tiny_imagenet, "PUBLISHED", known)
    monkeypatch.delenv(tiny_imagenet.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return path


def test_the_classes_are_the_sorted_wnids_of_imagenet() -> None:
    assert len(WNIDS) == tiny_imagenet.CLASSES == 200
    assert sorted(WNIDS) == WNIDS
    numbers = tiny_imagenet.imagenet_classes()
    assert sorted(set(numbers)) == numbers  # ImageNet's are sorted by wnid, too
    assert (numbers[0], tiny_imagenet.class_names()[0]) == (1, "goldfish")


def test_pictures_come_by_class_and_number(archive: Path) -> None:
    images, labels = load_split("train", archive)
    assert (images.shape, images.dtype) == ((4, 3, 64, 64), torch.uint8)
    assert labels.tolist() == [0, 0, 1, 1]
    colours = np.random.default_rng(10).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(images[2].permute(1, 2, 0).numpy(), colours)
    assert torch.equal(images[1, 0], images[1, 2])  # a grey one
    images, labels = load_split("test", archive)
    assert images.shape == (3, 3, 64, 64)
    assert labels.tolist() == [0, 1, 0]


def test_numbers_are_no_words() -> None:
    names = ["val_10.JPEG", "val_9.JPEG", "n01_2.JPEG"]
    assert sorted(names, key=tiny_imagenet.file_number) == [names[2], names[1], names[0]]


def test_folders_and_other_layouts_hold_the_same_pictures(archive: Path, tmp_path: Path) -> None:
    files = official_files()
    folders = [write_folder(files, tmp_path / "a" / "tiny-imagenet-200")]
    folders += [tmp_path / "a", write_folder(by_class(files), tmp_path / "b")]
    for split in tiny_imagenet.SPLITS:
        expected, classes = load_split(split, archive)
        for folder in folders:
            images, labels = load_split(split, folder)
            assert torch.equal(images, expected)
            assert torch.equal(labels, classes)
    assert tiny_imagenet.check_files(folders[2]) == []


def test_fetch_verifies_and_decodes(
    archive: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["fetch", "set=tiny_imagenet", f"source={archive}"]) == 0
    assert "pixels as published" in capsys.readouterr().out
    expected = load_split("train", archive)
    archive.unlink()
    images, labels = load_split("train")
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])
    assert command.main(["fetch", "set=tiny_imagenet"]) == 0  # found there
    assert command.main(["check", "set=tiny_imagenet"]) == 0
    path = tiny_imagenet.decoded_file("test", tiny_imagenet.FETCHED)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert command.main(["check", "set=tiny_imagenet"]) == 1
    assert "fetch again" in capsys.readouterr().err
    monkeypatch.setenv(tiny_imagenet.VARIABLE, "typo")
    with pytest.raises(DataError, match="no Tiny-ImageNet-200 in typo; run"):
        load_split("train")


def test_fetch_refuses_another_data_set(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = official_files()
    files[f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"] = encode_picture(7)
    other = write_zip(files, tmp_path / "other.zip")
    assert command.main(["fetch", "set=tiny_imagenet", f"source={other}"]) == 1
    error = capsys.readouterr().err
    assert "train images" in error
    assert "differ from the published ones" in error
    assert not tiny_imagenet.decoded_file("train", tiny_imagenet.FETCHED).exists()
    fewer = write_zip(official_files(test=2), tmp_path / "fewer.zip")
    assert command.main(["check", "set=tiny_imagenet", f"folder={fewer}"]) == 1
    assert "holds 2 test images, expected 3" in capsys.readouterr().err
    assert command.main(["fetch", "set=tiny_imagenet"]) == 1
    assert "source: missing" in capsys.readouterr().err
    assert command.main(["fetch", f"source={archive}"]) == 1
    assert "source: Fashion-MNIST" in capsys.readouterr().err


FIRST = f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"
DAMAGE = {
    "no classes": ({"wnids.txt": None}, "holds no wnids.txt"),
    "other classes": ({"wnids.txt": b"n00000000\n"}, "wnids.txt of"),
    "no image": ({FIRST: b"text"}, "is no image"),
    "cut image": ({FIRST: encode_picture(0)[:900]}, "is no image"),
    "no annotation": ({"val/val_annotations.txt": b"val_0.JPEG\tn01443537\n"}, "no known class"),
    "cut annotation": ({"val/val_annotations.txt": b"val_0.JPEG\n"}, "is damaged"),
    "unknown class": ({"train/n00000000/images/n00000000_0.JPEG": b""}, "n00000000"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    changes, words = DAMAGE[kind]
    files = official_files()
    for name, content in changes.items():
        files.pop(name, None)
        if content is not None:
            files[name] = content
    place = write_zip(files, tmp_path / "bad.zip")
    split = "test" if "annotation" in kind else "train"
    with pytest.raises(DataError) as run:
        load_split(split, place)
    assert words in str(run.value)
    assert "\n" not in str(run.value)


def test_what_is_no_zip_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be read as a zip"):
        load_split("train", tmp_path / "text.zip")
    with pytest.raises(DataError, match="no Tiny-ImageNet-200 in"):
        load_split("train", tmp_path / "missing.zip")
    with pytest.raises(ConfigError, match="split: 'val' is not one of train, test"):
        load_split("val", tmp_path)
    cut = write_zip(official_files(), tmp_path / "cut.zip")
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(DataError, match="cannot be read as a zip"):
        load_split("train", cut)


def test_images_of_another_size_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_zip(official_files(), tmp_path / "a.zip")
    monkeypatch.setattr(tiny_imagenet, "SIZE", 32)
    with pytest.raises(DataError, match=r"is \(64, 64, 3\), expected \(32, 32, 3\)"):
        load_split("train", place)

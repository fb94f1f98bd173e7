"""Tiny-ImageNet-200 (Stanford's CS231n): 100,000 + 10,000 colour images of 64x64 in 200 equal
classes of ImageNet.

The images are for research, under ImageNet's terms, and are not downloaded here: a user gives
`tiny-imagenet-200.zip`, or a folder of its files. They are recognised by their decoded pixels, so
copies that lie in other folders, or are stored as PNG, pass too. What is read:

    wnids.txt                                the classes; needed
    train/<wnid>/images/<wnid>_<i>.JPEG      or any image files below train/<wnid>
    val/images/val_<i>.JPEG                  with val/val_annotations.txt,
                                             or any image files below val/<wnid>

The official test images have no labels: here `test` is the validation set. Class c is the c-th of
the sorted wnids, as everywhere where folders are classes (`tiny_imagenet_classes.csv` has their
names, and their numbers among the 1,000 classes of ImageNet).

`fetch` decodes them once into two files of safetensors, from which training reads in seconds.
Pixels are those of libjpeg-turbo, which Pillow's wheels use; another decoder may differ by a level,
and is then told so. The digests were taken from a public copy (github.com/seshuad/IMagenet at
153dbc16), whose 110,000 files all decode; the official zip itself was not at hand.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from experiments.data.errors import DataError
from ptq.files import DamagedFile, read_tensors, write_tensors
from ptq.spec import require

if typing.TYPE_CHECKING:
    from torch import Tensor

TITLE = "Tiny-ImageNet-200"
CONTENTS = "100,000 training and 10,000 validation images, pixels as published"
VARIABLE = "AR_PTQ_TINY_IMAGENET"
FETCHED = Path("data/tiny-imagenet-200")
FOLDER = "tiny-imagenet-200"  # of the official zip
UPSTREAM = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SIZE = 64
CLASSES = 200
CLASS_TABLE = Path(__file__).with_name("tiny_imagenet_classes.csv")
SPLITS = {"train": "train", "test": "val"}  # folders of the official zip
SUFFIXES = (".jpeg", ".jpg", ".png")
WORKERS = min(16, os.cpu_count() or 1)  # threads that decode


@dataclass(frozen=True)
class Published:
    """What is known of a split: its number of images, and the digest of their pixels and labels."""

    images: int
    sha256: str


PUBLISHED = {
    "train": Published(100_000, "f2f4997a260d512cea8dad0c14b5d80f5d3d7c5ac12098f76fcab419ada55e35"),
    "test": Published(10_000, "4e00cb0a599a41dd3b1e3b8434509e771f6ce5423bf43f47bedb9168b30a2754"),
}


@cache
def class_table() -> list[dict[str, str]]:
    """The classes in order: `wnid`, `imagenet_class` and `name` of each."""
    with CLASS_TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def class_names() -> list[str]:
    """The names of the 200 classes."""
    return [entry["name"] for entry in class_table()]


def imagenet_classes() -> list[int]:
    """The numbers of the 200 classes among those of ImageNet."""
    return [int(entry["imagenet_class"]) for entry in class_table()]


# --- files, in a zip or a folder


class Files:
    """The files of a zip or a folder, by their paths below `wnids.txt`.

    Raises:
        DataError: there is no such place, the zip is damaged, or no `wnids.txt` is in it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.archive: zipfile.ZipFile | None = None
        names: list[str] = []
        if place.is_dir():
            for path in place.rglob("*"):
                names.append(path.relative_to(place).as_posix())
        elif place.is_file():
            names = self.open_archive()
        else:
            raise DataError(f"data: {place} is missing")
        tops = [name for name in names if PurePosixPath(name).name == "wnids.txt"]
        if not tops:
            raise DataError(f"data: {place} holds no wnids.txt, it is no Tiny-ImageNet-200")
        self.top = min(tops, key=len).removesuffix("wnids.txt")
        self.names: list[str] = []
        for name in names:
            if name.startswith(self.top):
                self.names.append(name.removeprefix(self.top))

    def open_archive(self) -> list[str]:
        """Open the zip; returns the names of its entries."""
        try:
            self.archive = zipfile.ZipFile(self.place)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"data: {self.place} cannot be read as a zip ({error})") from error
        return self.archive.namelist()

    def read(self, name: str) -> bytes:
        """The contents of a file.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            if self.archive is None:
                return (self.place / self.top / name).read_bytes()
            return self.archive.read(self.top + name)
        except (KeyError, FileNotFoundError):
            raise DataError(f"data: {name} is missing in {self.place}") from None
        except Exception as error:  # damaged bytes make the reader fail in any way
            raise DataError(f"data: {name} of {self.place} cannot be read ({error})") from error

    def read_lines(self, name: str) -> list[str]:
        """The lines of a text file that hold something."""
        lines = self.read(name).decode(errors="replace").splitlines()
        return list(filter(str.strip, lines))


def find_folder(place: str | Path | None = None) -> Path:
    """The zip or folder of the data set: `place` if given, else $AR_PTQ_TINY_IMAGENET if set, else
    where `fetch` puts it.

    Raises:
        DataError: there is nothing; says how to get it.
    """
    named = place or os.environ.get(VARIABLE)
    chosen = Path(named).expanduser() if named else FETCHED
    if chosen.exists():
        return chosen
    raise DataError(
        f"data: no Tiny-ImageNet-200 in {chosen}; run 'python -m experiments.data fetch"
        f" set=tiny_imagenet source=tiny-imagenet-200.zip', or name its zip or folder in {VARIABLE}"
        " or on the command line"
    )


# --- what is where


@dataclass(frozen=True)
class Picture:
    """An image file and its class."""

    name: str
    label: int


def list_pictures(files: Files, split: str) -> list[Picture]:
    """The image files of a split: by class and number, or by number alone for `test`.

    Raises:
        DataError: there are none, or one is of no known class.
    """
    folder = SPLITS[split]
    labels: dict[str, int] = {}
    for number, entry in enumerate(class_table()):
        labels[entry["wnid"]] = number
    if sorted(files.read_lines("wnids.txt")) != sorted(labels):
        raise DataError(f"data: wnids.txt of {files.place} is not that of Tiny-ImageNet-200")
    annotated = read_annotations(files) if split == "test" else {}
    pictures = []
    for name in files.names:
        path = PurePosixPath(name)
        if path.parts[0] != folder or path.suffix.lower() not in SUFFIXES:
            continue
        wnid = annotated.get(path.name, path.parts[1])
        if wnid not in labels:
            raise DataError(f"data: {name} of {files.place} is of no known class ({wnid})")
        pictures.append(Picture(name, labels[wnid]))
    if not pictures:
        raise DataError(f"data: {files.place} holds no images below {folder}")
    if split == "train":
        return sorted(pictures, key=lambda picture: (picture.label, file_number(picture.name)))
    return sorted(pictures, key=lambda picture: file_number(picture.name))


def read_annotations(files: Files) -> dict[str, str]:
    """The wnid of every validation file; nothing where the files lie in folders of classes."""
    name = "val/val_annotations.txt"
    if name not in files.names:
        return {}
    wnids = {}
    for line in files.read_lines(name):
        fields = line.split("\t")
        if len(fields) < 2:
            raise DataError(f"data: {name} of {files.place} is damaged, {line[:60]!r} is no line")
        wnids[fields[0]] = fields[1]
    return wnids


def file_number(name: str) -> tuple[int, str]:
    """The last number in a file's name, then its name: the order of the official files."""
    path = PurePosixPath(name)
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else 0, path.name)


# --- pixels


def decode_image(content: bytes, source: str) -> np.ndarray:
    """The pixels (64, 64, 3) of an image file; grey ones are made colour.

    Raises:
        DataError: it is no image, or of another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # as above
        raise DataError(f"data: {source} is no image ({error})") from error
    if pixels.shape != (SIZE, SIZE, 3):
        raise DataError(f"data: {source} is {pixels.shape}, expected ({SIZE}, {SIZE}, 3)")
    return pixels


def decode_split(split: str, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 64, 64, 3) and labels int64 (N,) of a split, from a zip or a folder.

    Raises:
        DataError: a file is missing, damaged or of another data set.
    """
    files = Files(place)
    pictures = list_pictures(files, split)
    images = np.empty((len(pictures), SIZE, SIZE, 3), np.uint8)
    labels = np.empty(len(pictures), np.int64)

    def decode_into(number: int) -> None:
        picture = pictures[number]
        content = files.read(picture.name)
        images[number] = decode_image(content, f"{picture.name} of {place}")
        labels[number] = picture.label

    with ThreadPoolExecutor(WORKERS) as pool:
        # a list: an error in a thread is raised here
        list(pool.map(decode_into, range(len(pictures)), chunksize=100))
    return images, labels


def pixel_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """sha256 of the decoded pixels (N, 64, 64, 3) and the labels (N,) in their order."""
    sha = hashlib.sha256(np.ascontiguousarray(images))
    sha.update(labels.astype("<i8").tobytes())
    return sha.hexdigest()


def find_problem(split: str, images: np.ndarray, labels: np.ndarray, place: Path) -> str | None:
    """How a split differs from the published one, in one line; None if it does not."""
    published = PUBLISHED[split]
    if len(images) != published.images:
        return f"data: {place} holds {len(images)} {split} images, expected {published.images}"
    found = pixel_digest(images, labels)
    if found != published.sha256:
        return (
            f"data: {split} images of {place} differ from the published ones, or are decoded by"
            f" another library than libjpeg-turbo (sha256 of pixels {found}, expected"
            f" {published.sha256})"
        )
    return None


# --- the decoded files


def decoded_file(split: str, folder: Path) -> Path:
    """Where `fetch` puts a split."""
    return folder / f"{split}.safetensors"


def read_arrays(split: str, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 64, 64, 3) and labels int64 (N,) of a split, however they are stored.

    Raises:
        DataError: they are missing or damaged.
    """
    path = decoded_file(split, place)
    if not path.is_file():
        return decode_split(split, place)
    try:
        tensors, _ = read_tensors(path)
    except DamagedFile as error:
        raise DataError(f"data: {error}; remove it and fetch again") from error
    return tensors["images"].numpy(), tensors["labels"].numpy()


def check_files(place: Path) -> list[str]:
    """One line for every split that is missing, damaged or another than the published one."""
    problems = []
    for split in SPLITS:
        try:
            problem = find_problem(split, *read_arrays(split, place), place)
        except DataError as error:
            problem = str(error)
        if problem is not None:
            problems.append(problem)
    return problems


def fetch_files(source: str | None, folder: Path) -> None:
    """Decode the images of a zip or a folder into `folder`, once their pixels are verified.

    Raises:
        DataError: no source is named, or it is not the published data set.
    """
    if all(decoded_file(split, folder).is_file() for split in SPLITS):
        print(f"already there: {folder}")
        return
    if source is None:
        raise DataError(
            f"source: missing, give the path of tiny-imagenet-200.zip ({UPSTREAM}) or its folder"
        )
    import torch

    for split in SPLITS:
        place = Path(source).expanduser()
        print(f"decoding the {split} images of {place} ...", flush=True)
        images, labels = decode_split(split, place)
        problem = find_problem(split, images, labels, place)
        if problem is not None:
            raise DataError(problem)
        tensors = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}
        write_tensors(tensors, decoded_file(split, folder))


def load_split(split: str, folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and labels int64 (N,) of the "train" or "test" split.

    Args:
        folder: a folder that `fetch` wrote, the official zip, or a folder of its files.

    Raises:
        DataError: the data set is missing or damaged.
    """
    require("split", split, tuple(SPLITS))
    images, labels = read_arrays(split, find_folder(folder))
    import torch  # a zip is found, checked and refused without

    # copied: networks are slower on images whose channels lie together
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return channels_first, torch.from_numpy(labels)

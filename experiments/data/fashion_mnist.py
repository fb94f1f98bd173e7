"""Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey images of 28x28 in ten equal classes,
zero-padded to 32x32.

Only training and rebuilding reference statistics need the images. They are read from four gzipped
files in the idx format (two zero bytes, type, number of dimensions, big-endian sizes, values).
Debian compresses them anew, so the files are identified by the sha256 of their contents: upstream's
and Debian's both pass. Nothing is installed.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.data.errors import DataError
from ptq.files import replacing
from ptq.spec import require

if typing.TYPE_CHECKING:
    from torch import Tensor

TITLE = "Fashion-MNIST"
CONTENTS = "60,000 training and 10,000 test images, contents as published"
VARIABLE = "AR_PTQ_DATA"
FETCHED = Path("data/fashion-mnist")
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
PACKAGE = "dataset-fashion-mnist"
UPSTREAM = "https://github.com/zalandoresearch/fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIZE = 28
PADDING = 2
_UINT8 = 0x08  # idx type code


@dataclass(frozen=True)
class IdxFile:
    """One file: its name, shape, and the sha256 of its decompressed contents."""

    name: str
    shape: tuple[int, ...]
    sha256: str


SPLITS = {  # images, labels
    "train": (
        IdxFile(
            "train-images-idx3-ubyte.gz",
            (60000, SIZE, SIZE),
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        IdxFile(
            "train-labels-idx1-ubyte.gz",
            (60000,),
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
    ),
    "test": (
        IdxFile(
            "t10k-images-idx3-ubyte.gz",
            (10000, SIZE, SIZE),
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte.gz",
            (10000,),
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}


def list_files() -> list[IdxFile]:
    """The files of the data set."""
    return [*SPLITS["train"], *SPLITS["test"]]


def find_folder(folder: str | Path | None = None) -> Path:
    """The folder of the data set: `folder` if given, else $AR_PTQ_DATA if set, else the first
    default that exists.

    A folder that the user names is never passed over in silence for a default one.

    Raises:
        DataError: there is no such folder; says where it was looked for and how to get it.
    """
    # a variable that is empty counts as unset
    named = folder or os.environ.get(VARIABLE)
    places = [Path(named)] if named else [FETCHED, INSTALLED]
    for place in places:
        if place.is_dir():
            return place
    searched = ", ".join(map(str, places))
    raise DataError(
        f"data: no Fashion-MNIST in {searched}; run 'python -m experiments.data fetch', or name"
        f" the folder of its four .gz files in {VARIABLE} or on the command line"
    )


def decompress_file(path: Path) -> bytes:
    """The contents of a .gz file.

    Raises:
        DataError: the file is missing, truncated or not gzip.
    """
    try:
        return gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"data: {path} is missing") from None
    except EOFError:
        raise DataError(f"data: {path} is truncated (the gzip stream ends early)") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"data: {path} cannot be read ({error})") from error


def parse_idx(content: bytes, dimensions: int, source: str) -> np.ndarray:
    """The uint8 array of an idx file's contents, read-only.

    Raises:
        DataError: the magic number is not that of uint8 values in so many dimensions, or the length
            does not fit.
    """
    expected = bytes((0, 0, _UINT8, dimensions))
    header = 4 + 4 * dimensions  # magic number, and a uint32 for every size
    if content[:4] != expected:
        magic = content[:4].hex()
        raise DataError(
            f"data: {source} has the magic number 0x{magic}, expected 0x{expected.hex()}"
        )
    if len(content) < header:
        raise DataError(
            f"data: {source} is truncated (its header has {len(content)} bytes, expected {header})"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    values = np.frombuffer(content, np.uint8, offset=header)  # (size,), a view of the bytes
    # Python's integers: the sizes in a damaged header may overflow int64
    size = int(np.prod(shape, dtype=object))
    if len(values) != size:
        product = " x ".join(map(str, shape))
        raise DataError(f"data: {source} holds {len(values)} values, expected {product} = {size}")
    return values.reshape(shape)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of a gzipped idx file (see `decompress_file` and `parse_idx`)."""
    return parse_idx(decompress_file(path), dimensions, str(path))


def load_split(split: str, folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of the "train" or "test" split.

    The three channels are one grey channel expanded, not copied (61 instead of 184 MB for
    training): index, convert or move the images freely, but `clone` them before writing into them.

    Raises:
        DataError: the data set is missing (see `find_folder`) or damaged.
    """
    require("split", split, tuple(SPLITS))
    place = find_folder(folder)
    # (N, H, W) and (N,), uint8
    images, labels = (read_idx(place / file.name, len(file.shape)) for file in SPLITS[split])
    if images.shape[1:] != (SIZE, SIZE):
        raise DataError(
            f"data: images of {place} are {images.shape[1:]}, expected ({SIZE}, {SIZE})"
        )
    if len(images) != len(labels):
        raise DataError(f"data: {place} has {len(images)} {split} images but {len(labels)} labels")
    if labels.size and labels.max() >= len(CLASSES):
        raise DataError(
            f"data: {place} has the {split} label {labels.max()}, expected 0 to {len(CLASSES) - 1}"
        )
    padded = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))  # (N, 32, 32)
    import torch  # a folder is found, checked and fetched without

    # `np.pad` and `astype` copy: what was read is read-only, of which PyTorch would warn
    return torch.from_numpy(padded)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(
        labels.astype(np.int64)
    )


def find_problem(folder: Path, file: IdxFile) -> str | None:
    """What is wrong with one file, in one line; None if it is the published one."""
    try:
        content = decompress_file(folder / file.name)
        shape = parse_idx(content, len(file.shape), str(folder / file.name)).shape
    except DataError as error:
        return str(error)
    if shape != file.shape:
        return f"data: {folder / file.name} has the shape {shape}, expected {file.shape}"
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        return (
            f"data: {folder / file.name} differs from the published one"
            f" (sha256 {found}, expected {file.sha256})"
        )
    return None


def check_files(folder: Path) -> list[str]:
    """One line for every file of the data set that is missing, damaged or another than the
    published one."""
    problems = []
    for file in list_files():
        problem = find_problem(folder, file)
        if problem is not None:
            problems.append(problem)
    return problems


def _command(*words: str, cwd: Path, hint: str) -> None:
    """Run a command; a failure becomes one line with its last complaint and a hint."""
    if shutil.which(words[0]) is None:
        raise DataError(
            f"data: no {words[0]} on this machine; get the four .gz files from {UPSTREAM}"
            f" into {FETCHED}"
        )
    done = subprocess.run(
        words,
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"LC_ALL": "C"},  # complaints in English, as all else that is printed
        check=False,
    )
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"data: {' '.join(words[:2])} failed ({complaint}){hint}")


def fetch_package(folder: Path = FETCHED) -> None:
    """Download Debian's package and unpack it into `folder`, which appears only once its contents
    are verified.

    Nothing is installed and no root is needed, but apt's package lists must be there (`apt-get
    update`, as root).

    Raises:
        DataError: the tools or the network are missing, or what came is not the published data set.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the folder, on the same file system: files are renamed, not copied
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        place = Path(name)
        _command(
            "apt-get",
            "download",
            PACKAGE,
            cwd=place,
            hint="; it needs 'apt-get update' (as root) beforehand",
        )
        # the name goes on with the package's version
        packages = list(place.glob(f"{PACKAGE}_*.deb"))
        if len(packages) != 1:
            raise DataError(
                f"data: apt-get download {PACKAGE} left {len(packages)} packages, expected 1"
            )
        _command("dpkg-deb", "-x", packages[0].name, "unpacked", cwd=place, hint="")
        unpacked = place / "unpacked" / INSTALLED.relative_to("/")
        problems = check_files(unpacked)
        if problems:
            raise DataError(f"data: the downloaded package is not usable: {problems[0]}")
        with replacing(folder) as complete:
            unpacked.rename(complete)
            # no folder is renamed onto one that holds files
            shutil.rmtree(folder, ignore_errors=True)


def fetch_files(folder: Path) -> None:
    """Get the data set into `folder`, unless it is there already.

    Raises:
        DataError: the folder is a file or holds others, or as `fetch_package` says.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data: {folder} is a file, expected a folder")
    if folder.is_dir() and not check_files(folder):
        print(f"already there: {folder}")
        return
    if folder.is_dir():
        # the whole folder is replaced: files of the user's own must not go with it
        names = {entry.name for entry in folder.iterdir()}
        foreign = names - {file.name for file in list_files()}
        if foreign:
            raise DataError(
                f"data: {folder} holds other files ({min(foreign)}); give a new or empty folder"
            )
    print(f"getting Debian's {PACKAGE} (31 MB) with apt-get download ...", flush=True)
    fetch_package(folder)

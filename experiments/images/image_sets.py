"""Sets of images on disk, read and written a few at a time: 50,000 never sit in memory.

    | what                           | order                                                       |
    | folder of PNG files            | by name, numbers in it by value: 2.png, 10.png              |
    | npz with `arr_0` (N, S, S, 3)  | as stored; a zip entry is read as a stream, packed or not   |
    | folder of `experiments.sample` | image i of the run; `manifest.json` says how many there are |

All images are uint8, square, RGB and of one size.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from experiments.images import shards
from experiments.images.shards import StorageError
from models.weights.file_kinds import describe_foreign
from ptq.files import describe_damage, read_json, replacing, seal_fault
from ptq.types import ConfigError

ARRAY = "arr_0.npy"  # entry of an npz, named by `np.savez`
MANIFEST = "manifest.json"


class Images(Protocol):
    """A set of n images of `size` x `size` pixels; `field` is the option that named it."""

    field: str
    path: Path
    n: int
    size: int

    def chunks(self, length: int) -> Iterator[np.ndarray]:
        """uint8 arrays (B, 3, S, S) of `length` consecutive images, the last one shorter."""


@dataclass(frozen=True)
class NpzImages:
    field: str
    path: Path
    n: int
    size: int

    @classmethod
    def open(cls, field: str, path: Path) -> NpzImages:
        """Raises: ConfigError: not an npz, no `arr_0`, or an array that is not uint8 (N, S, S,
        3)."""
        try:
            with zipfile.ZipFile(path) as archive:
                if ARRAY not in archive.namelist():
                    names = ", ".join(archive.namelist())
                    raise ConfigError(f"{field}: {path} has no array arr_0, it holds {names}")
                with archive.open(ARRAY) as file:
                    shape, fortran, dtype = _header(file)
        except Exception as error:  # damaged bytes make the reader fail in any way
            if isinstance(error, ConfigError):  # our own, which is a ValueError
                raise
            reason = describe_foreign(path, "zip") or describe_damage(error)
            raise ConfigError(f"{field}: {path} cannot be read as npz ({reason})") from error
        described = f"{field}: arr_0 of {path} is {dtype} {shape}, expected uint8 (N, S, S, 3)"
        if dtype != np.uint8:
            raise ConfigError(described)
        if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
            raise ConfigError(f"{described}: its channels come first")
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or fortran:
            raise ConfigError(described + (" in C order" if fortran else ""))
        return cls(field, path, shape[0], shape[1])

    def chunks(self, length: int) -> Iterator[np.ndarray]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(ARRAY) as file:
                _header(file)
                for start in range(0, self.n, length):
                    # (B, S, S, 3)
                    part = np.empty(
                        (min(length, self.n - start), self.size, self.size, 3), np.uint8
                    )
                    _fill(file, part)
                    yield np.ascontiguousarray(part.transpose(0, 3, 1, 2))  # (B, 3, S, S)
                file.read(1)  # at its end the entry's checksum is compared
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise ConfigError(
                f"{self.field}: {self.path} is damaged ({describe_damage(error)})"
            ) from error


def _header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _fill(file: zipfile.ZipExtFile, array: np.ndarray) -> None:
    """Read as many bytes as the array has."""
    view = memoryview(array).cast("B")
    # a packed entry gives fewer bytes at a time than are asked for
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise EOFError("it ends early")
        filled += count


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names by the values of the numbers in them: `2.png` before `10.png`.

    Names that differ in leading zeros alone keep their plain order.
    """
    parts: list[str | int] = []
    for part in re.split(r"([0-9]+)", name):  # texts and digits by turns
        parts.append(int(part) if part.isdecimal() else part)
    return parts, name


def image_numbers(names: Iterable[str]) -> list[int] | None:
    """The number in every file's name; None if a name holds none or several, or two hold the
    same."""
    numbers: list[int] = []
    for name in names:
        digits = re.findall(r"[0-9]+", Path(name).stem)
        if len(digits) != 1:
            return None
        numbers.append(int(digits[0]))
    return numbers if len(set(numbers)) == len(numbers) else None


@dataclass(frozen=True)
class PngImages:
    field: str
    path: Path
    n: int
    size: int
    names: tuple[str, ...]

    @classmethod
    def open(cls, field: str, path: Path) -> PngImages:
        """Raises: ConfigError: the folder holds no PNG files, or JPEG files, or the first image is
        not square RGB."""
        pngs = []
        lossy = []  # JPEG changes pixels, and so every figure
        for entry in path.iterdir():
            suffix = entry.suffix.lower()
            if suffix == ".png":
                pngs.append(entry.name)
            elif suffix in (".jpg", ".jpeg"):
                lossy.append(entry.name)
        names = sorted(pngs, key=natural_order)
        if lossy or not names:
            held = f"holds {lossy[0]}" if lossy else "holds no PNG files"
            raise ConfigError(
                f"{field}: {path} {held}, expected PNG files or shards of experiments.sample"
            )
        # size 0 lets the first image have any
        found = cls(field, path, len(names), 0, tuple(names))
        size = found.read(names[0]).shape[0]
        return cls(field, path, len(names), size, tuple(names))

    def read(self, name: str) -> np.ndarray:
        """One image (S, S, 3)."""
        try:
            with Image.open(self.path / name) as image:
                if image.format != "PNG":
                    raise ConfigError(
                        f"{self.field}: {self.path / name} is a {image.format} file, expected PNG"
                    )
                mode = image.mode
                width, height = image.size
                if mode != "RGB" or width != height or (self.size and width != self.size):
                    side = self.size or "S"
                    raise ConfigError(
                        f"{self.field}: {self.path / name} is {mode} of {width} x {height} pixels,"
                        f" expected RGB of {side} x {side}"
                    )
                return np.asarray(image)
        except ConfigError:
            raise
        except Exception as error:  # damaged bytes make Pillow fail in any way
            reason = describe_foreign(self.path / name, "PNG") or describe_damage(error)
            raise ConfigError(
                f"{self.field}: {self.path / name} cannot be read ({reason})"
            ) from error

    def chunks(self, length: int) -> Iterator[np.ndarray]:
        for start in range(0, self.n, length):
            # (B, S, S, 3)
            part = np.stack([self.read(name) for name in self.names[start : start + length]])
            yield np.ascontiguousarray(part.transpose(0, 3, 1, 2))  # (B, 3, S, S)


@dataclass(frozen=True)
class ShardImages:
    """Images of `experiments.sample`; `manifest` is what its file says of the run."""

    field: str
    path: Path
    n: int
    size: int
    manifest: dict

    @classmethod
    def open(cls, field: str, path: Path) -> ShardImages:
        """Raises: ConfigError: the manifest is damaged, or shards are missing or of another run."""
        manifest = read_manifest(path)
        run = manifest["run"]
        count = -(-manifest["images"] // manifest["microbatch"])  # rounded up
        missing = []
        for number in range(count):
            if not shards.is_finished(path / "shards", number, run):
                missing.append(number)
        if missing:
            raise ConfigError(
                f"{field}: {path} lacks {len(missing)} of {count} micro-batches"
                f" ({shards.shard_path(path / 'shards', missing[0]).name} is missing or damaged);"
                " the same experiments.sample command makes them"
            )
        first = shards.read_shard(path / "shards", 0, run).images
        return cls(field, path, manifest["images"], first.shape[-1], manifest)

    def shards(self) -> Iterator[shards.Shard]:
        """All micro-batches in order, without the padding of the last one."""
        left = self.n  # cuts the padding off the last micro-batch
        for number in range(-(-self.n // self.manifest["microbatch"])):
            shard = shards.read_shard(self.path / "shards", number, self.manifest["run"])
            tokens = None if shard.tokens is None else shard.tokens[:left]
            yield shards.Shard(shard.images[:left], tokens)
            left -= len(shard.images)

    def chunks(self, length: int) -> Iterator[np.ndarray]:
        return regroup_rows((shard.images for shard in self.shards()), length)

    def tokens(self) -> np.ndarray | None:
        """Token ids (N, T), or None for models whose tokens are vectors."""
        parts = [shard.tokens for shard in self.shards()]
        return None if parts[0] is None else np.concatenate(parts)


def regroup_rows(parts: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same rows in arrays of `length` rows, the last one shorter."""
    held: list[np.ndarray] = []
    rows = 0
    for part in parts:
        held.append(part)
        rows += len(part)
        while rows >= length:
            joined = np.concatenate(held)
            yield joined[:length]
            held = [joined[length:]]
            rows = rows - length
    if rows:
        yield np.concatenate(held)


def read_manifest(folder: Path) -> dict:
    """What `experiments.sample` wrote about the run whose shards lie in `folder`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = read_json(folder / MANIFEST)
        required = {"run", "images", "microbatch", "classes", "cell", "seed"}
        if not isinstance(found, dict) or not required <= set(found):
            raise ValueError("fields are missing")
        if fault := seal_fault(found):  # manifests of earlier versions have no digest
            raise ValueError(fault)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"samples: {folder / MANIFEST} cannot be read ({describe_damage(error)});"
            " the command that made the images writes it again once it is deleted"
        ) from error
    return found


def open_images(field: str, path: Path) -> NpzImages | PngImages | ShardImages:
    """The set of images at a path, named by the option `field`.

    Raises:
        ConfigError: there is none, or its images are not uint8 RGB squares.
    """
    if (path / MANIFEST).is_file():
        return ShardImages.open(field, path)
    if path.is_dir():
        return PngImages.open(field, path)
    if not path.is_file():
        raise ConfigError(f"{field}: {path} is missing, expected an npz file or a folder")
    return NpzImages.open(field, path)


def holds_images(path: Path, expected: Images, length: int = 250) -> bool:
    """Whether an npz or a folder of PNG files holds the same images; a damaged one does not."""
    try:
        found = open_images("samples", path)
        if (found.n, found.size) != (expected.n, expected.size):
            return False
        pairs = zip(found.chunks(length), expected.chunks(length), strict=True)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    except ConfigError:
        return False


def require_known_pairs(ours: Images, theirs: Images) -> None:
    """Make sure that image i of one set is the pair of image i of the other.

    So it is if both have an order of their own (npz, shards), if PNG files of both have the same
    names or the same numbers, or if PNG files that face an order are numbered without a gap.

    Raises:
        ConfigError: it is not known.
    """
    named = [images for images in (ours, theirs) if isinstance(images, PngImages)]
    if not named:
        return
    if len(named) == 2:
        if Counter(ours.names) == Counter(theirs.names):
            return
        numbers = image_numbers(ours.names)
        if numbers is not None and numbers == image_numbers(theirs.names):
            return
        lone = sorted(set(theirs.names) ^ set(ours.names), key=natural_order)[0]
        raise ConfigError(
            f"{theirs.field}: names of {theirs.path} are not those of {ours.path} ({lone} is in one"
            " of them), so pairs are unknown; expected the same names or numbers"
        )
    (images,) = named
    numbers = image_numbers(images.names)
    if numbers is None or numbers not in (
        list(range(images.n)),
        list(range(1, images.n + 1)),
    ):
        raise ConfigError(
            f"{images.field}: names of {images.path} do not count from 0 or 1 without a gap, so"
            f" their order is unknown beside {(theirs if images is ours else ours).path}"
        )


def write_npz(chunks: Iterable[np.ndarray], n: int, size: int, path: Path) -> None:
    """Write n uint8 images, in chunks (B, 3, S, S), as `arr_0` (n, S, S, 3) of an npz.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
    try:
        with (
            replacing(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open(ARRAY, "w", force_zip64=True) as file,  # 50,000 of 256 pixels: 9 GiB
        ):
            # by hand: the array is never in memory as a whole
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.transpose(0, 2, 3, 1).tobytes())  # (B, S, S, 3)
    except OSError as error:
        raise StorageError(
            f"samples: {path} cannot be written ({describe_damage(error)})"
        ) from error


def write_pngs(chunks: Iterable[np.ndarray], folder: Path) -> None:
    """Write uint8 images, in chunks (B, 3, S, S), as 000000.png, 000001.png, ...

    `folder` appears complete and replaces another.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    number = 0
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            for chunk in chunks:
                for image in chunk.transpose(0, 2, 3, 1):  # (S, S, 3)
                    pixels = np.ascontiguousarray(image)
                    Image.fromarray(pixels).save(temporary / f"{number:06d}.png")
                    number += 1
            # no folder is renamed onto one that holds files
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"samples: {folder} cannot be written ({describe_damage(error)})"
        ) from error

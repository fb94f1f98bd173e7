"""Held-out images of released models: the tokens of ImageNet's validation images.

Twins ship their held-out tokens. For a released model the user names a folder, `heldout=FOLDER`,
in one of two forms:

    FOLDER/n01440764/ILSVRC2012_val_00000293.JPEG ...
        A sub-folder per class, named by its wnid, as many as the model has classes (some may be
        empty). Classes are numbered in the order of the wnids, as all four families number them.
    FOLDER/ILSVRC2012_val_00000001.JPEG ...
        The images as they are published, with ILSVRC2012_validation_ground_truth.txt and meta.mat
        of the development kit beside them: the former numbers classes in another order, which the
        latter explains.

Files end in .jpeg, .jpg or .png, in either case. Of n images the first of every class come first,
then the second ones, each in the order of names, so every class has its share.

An image is cut to the square that the family's authors show their tokenizer (`PREPROCESSING`), and
the preset's own tokenizer encodes it. Tokens are kept in `RUNS/cache/heldout-*.safetensors`, by the
contents of the images, their classes, the tokenizer and the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from experiments.identity.parts import version_of
from models.preset import Preset
from models.registry import Generator
from models.weights import digests
from ptq.errors import say
from ptq.files import OWNER, DamagedFile, read_tensors, value_digest, write_tensors
from ptq.sites import Track
from ptq.types import ConfigError

SUFFIXES = (".jpeg", ".jpg", ".png")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
ENCODED_TOGETHER = 16  # images of a pass of the tokenizer
ENLARGED = 1.125  # of VAR: the short side before its middle is cut out


@dataclass(frozen=True)
class HeldOut:
    """Chosen images: files and class of each, in order, and what identifies them all."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    digest: str


@cache
def choose_images(folder: Path, classes: int, n: int) -> HeldOut:
    """The first n images of a folder, class by class in turn.

    Raises:
        ConfigError: the folder is of neither form, or holds fewer images.
    """
    if not folder.is_dir():
        raise ConfigError(f"heldout: {folder} is no folder, expected one of validation images")
    is_flat = (folder / GROUND_TRUTH).is_file()
    order = take_turns(list_flat(folder, classes) if is_flat else list_by_class(folder, classes))
    if len(order) < n:
        raise ConfigError(f"eval.sequences: {n} is more than the {len(order)} images in {folder}")
    paths, labels = zip(*order[:n])
    contents = [digests.file_digest(path, "heldout") for path in paths]
    return HeldOut(paths, labels, value_digest([contents, list(labels)], 16))


def list_by_class(folder: Path, classes: int) -> list[tuple[Path, int]]:
    """The images in sub-folders, each with its class.

    Raises:
        ConfigError: there are not as many sub-folders as classes.
    """
    wnids = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(wnids) != classes:
        raise ConfigError(
            f"heldout: {folder} has {len(wnids)} sub-folders, expected one for each of {classes} "
            f"classes, or {GROUND_TRUTH} beside the images"
        )
    named = []
    for label, wnid in enumerate(wnids):
        named += [(path, label) for path in list_images(folder / wnid)]
    return named


def list_flat(folder: Path, classes: int) -> list[tuple[Path, int]]:
    """The images of a flat folder, each with its class by the official files.

    Raises:
        ConfigError: the files are missing, or are of another number of images or classes.
    """
    numbers = (folder / GROUND_TRUTH).read_text().split()
    paths = list_images(folder)
    if len(paths) != len(numbers):
        raise ConfigError(
            f"heldout: {folder} holds {len(paths)} images, but {GROUND_TRUTH} is of {len(numbers)}"
        )
    wnids = read_wnids(folder / META)
    if len(wnids) != classes or not set(numbers) <= wnids.keys():
        raise ConfigError(
            f"heldout: {folder / META} has {len(wnids)} classes, expected {classes}, all of "
            f"{GROUND_TRUTH} among them"
        )
    order = {wnid: label for label, wnid in enumerate(sorted(wnids.values()))}
    return [(path, order[wnids[number]]) for path, number in zip(paths, numbers)]


def read_wnids(path: Path) -> dict[str, str]:
    """The wnid of every class's official number, by meta.mat of the development kit.

    Raises:
        ConfigError: it is missing or another file.
    """
    from scipy.io import loadmat  # late: a flat folder alone needs it

    wnids = {}
    try:
        for entry in loadmat(path, squeeze_me=True)["synsets"]:
            if entry["num_children"] == 0:  # the others are groups of classes
                wnids[str(entry["ILSVRC2012_ID"])] = str(entry["WNID"])
    except Exception as error:  # another file makes the reader fail in any way
        raise ConfigError(
            f"heldout: {path} cannot be read, expected that of the development kit ({error})"
        ) from error
    return wnids


def list_images(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def take_turns(named: Iterable[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """Images with classes, the first of every class first, then the second ones."""
    seen: dict[int, int] = {}
    ranked = []
    for path, label in named:
        rank = seen.get(label, 0)
        seen[label] = rank + 1
        ranked.append((rank, label, path))
    return [(path, label) for _, label, path in sorted(ranked)]


# --- pixels


def crop_adm(image: Image.Image, size: int) -> Image.Image:
    """The middle square as ADM cuts it, and RAR, PAR, MAR and LlamaGen after it: halved by boxes
    while twice too large, then the short side bicubically to the size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    return cut_middle(image.resize(shape, Image.Resampling.BICUBIC), size)


def crop_var(image: Image.Image, size: int) -> Image.Image:
    """The middle square as VAR cuts it: the short side by Lanczos to 1.125 times the size."""
    scale = round(ENLARGED * size) / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    return cut_middle(image.resize(shape, Image.Resampling.LANCZOS), size)


def cut_middle(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle."""
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


Crop = Callable[[Image.Image, int], Image.Image]
PREPROCESSING: dict[str, Crop] = {"var": crop_var}  # of families; others as ADM


def read_image(path: Path, preset: Preset) -> Tensor:
    """The square of an image (3, S, S) in [0, 1].

    Raises:
        ConfigError: the file is no image.
    """
    crop = PREPROCESSING.get(preset.family, crop_adm)
    try:
        with Image.open(path) as image:
            square = crop(image.convert("RGB"), preset.image_size)
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"heldout: {path} is no image ({error})") from error
    pixels = torch.from_numpy(np.array(square))  # (S, S, 3)
    return pixels.permute(2, 0, 1).float() / 255


# --- tokens


def encode_held_out(
    generator: Generator, held_out: HeldOut, tokenizer: str, runs: Path, track: Track
) -> dict[str, Tensor]:
    """Tokens of the chosen images, from the cache if they are there.

    Args:
        tokenizer: digest of its weights.

    Returns:
        "tokens": ids (n, L) or latents (n, L, D), and "labels" (n,), on the CPU.

    Raises:
        ConfigError: a file is no image.
    """
    preset = generator.preset
    determining = {
        "images": held_out.digest,
        "tokenizer": tokenizer,
        "size": preset.image_size,
        "family": preset.family,
        "version": version_of(f"family.{preset.family}"),
        "device": generator.device.type,
    }
    path = runs / "cache" / f"heldout-{value_digest(determining, 16)}.safetensors"
    if path.is_file():
        try:
            return read_tensors(path, of=path.stem)[0]
        except DamagedFile as error:
            say(f"made anew: {error}")
    parts = []
    starts = range(0, len(held_out.paths), ENCODED_TOGETHER)
    for first in track(starts, "held-out images"):
        images = [
            read_image(file, preset) for file in held_out.paths[first : first + ENCODED_TOGETHER]
        ]
        batch = torch.stack(images).to(generator.device)  # (B, 3, S, S)
        parts.append(generator.encode(batch).cpu())
    stored = {"tokens": torch.cat(parts), "labels": torch.tensor(held_out.labels)}
    write_tensors(stored, path, {OWNER: path.stem})
    return stored

"""A made-up Tiny-ImageNet-200 of a few pictures, in the layout of the official zip."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data import tiny_imagenet

WNIDS = [entry["wnid"] for entry in tiny_imagenet.class_table()]


def encode_picture(seed: int, kind: str = "PNG", grey: bool = False) -> bytes:
    """A picture of 64 x 64 random pixels."""
    shape = (64, 64) if grey else (64, 64, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def official_files(train: int = 2, test: int = 3, classes: int = 2) -> dict[str, bytes]:
    """Contents by name: `train` pictures of each of the first classes, `test` validation ones."""
    files = {
        # not sorted, as in the official file
        "wnids.txt": "\n".join(reversed(WNIDS)).encode(),
        "words.txt": b"n01443537\tgoldfish\n",
        "test/images/test_0.JPEG": encode_picture(9),
    }
    for label in range(classes):
        wnid = WNIDS[label]
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"0"
        for number in range(train):
            # the official files are JPEG; their suffix decides nothing
            picture = encode_picture(10 * label + number, grey=number == 1)
            files[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = picture
    lines = []
    for number in range(test):
        files[f"val/images/val_{number}.JPEG"] = encode_picture(100 + number)
        lines.append(f"val_{number}.JPEG\t{WNIDS[number % classes]}\t0\t0\t9\t9\n")
    files["val/val_annotations.txt"] = "".join(lines).encode()
    return files


def write_folder(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path


def by_class(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same pictures with the validation set in folders of classes, and no annotations."""
    labels = {}
    for line in files["val/val_annotations.txt"].decode().splitlines():
        name, wnid, *_ = line.split("\t")
        labels[name] = wnid
    moved: dict[str, bytes] = {}
    for name, content in files.items():
        picture = Path(name).name
        if name.startswith("val/images"):
            moved[f"val/{labels[picture]}/{picture}"] = content
        elif not name.startswith("val/"):
            moved[name] = content
    return moved

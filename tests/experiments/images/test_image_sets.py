"""Image sets on disk: read and written in small pieces, and refused in one line where they are not
usable."""

from __future__ import annotations

import errno
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from experiments.images import shards
from experiments.images.image_sets import (
    PngImages,
    open_images,
    regroup_rows,
    require_known_pairs,
    write_npz,
    write_pngs,
)
from experiments.images.shards import Shard, StorageError
from ptq.types import ConfigError
from tests.reference import made_up_ints

RUN = "0123abcd"


def pictures(n: int, size: int = 8) -> np.ndarray:
    """Made-up uint8 images (n, 3, size, size)."""
    return made_up_ints("pictures", (n, 3, size, size), 256).byte().numpy()


def parts(whole: np.ndarray, size: int = 3) -> Iterator[np.ndarray]:
    return (whole[i : i + size] for i in range(0, len(whole), size))


def joined(path: Path, length: int = 4) -> np.ndarray:
    return np.concatenate(list(open_images("samples", path).chunks(length)))


def save_shards(
    folder: Path, whole: np.ndarray, n: int, microbatch: int = 4, run: str = RUN
) -> None:
    """A finished folder of `experiments.sample`: whole micro-batches, of which the first n images
    count."""
    (folder / "shards").mkdir(parents=True)
    for number, part in enumerate(parts(whole, microbatch)):
        tokens = np.arange(len(part) * 5).reshape(-1, 5) + 100 * number
        shards.write_shard(folder / "shards", number, Shard(part, tokens), run)
    manifest = {
        "run": run,
        "images": n,
        "microbatch": microbatch,
        "classes": 10,
        "cell": {},
        "seed": 0,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy(tmp_path: Path, save: Callable) -> None:
    whole = pictures(11)
    save(tmp_path / "a.npz", labels=np.arange(11), arr_0=whole.transpose(0, 2, 3, 1))
    found = open_images("samples", tmp_path / "a.npz")
    assert (found.n, found.size) == (11, 8)
    assert [len(part) for part in found.chunks(4)] == [4, 4, 3]
    assert np.array_equal(joined(tmp_path / "a.npz"), whole)


def test_npz_that_we_write(tmp_path: Path) -> None:
    whole = pictures(11)
    path = tmp_path / "a.npz"
    write_npz(parts(whole), 11, 8, path)
    assert np.array_equal(np.load(path)["arr_0"], whole.transpose(0, 2, 3, 1))
    assert np.array_equal(joined(path), whole)
    before = path.read_bytes()
    write_npz(parts(whole, 5), 11, 8, path)
    assert path.read_bytes() == before  # neither time nor pieces leave a trace
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_pngs_in_the_order_of_their_names(tmp_path: Path) -> None:
    whole = pictures(12)
    folder = tmp_path / "png"
    write_pngs(parts(pictures(3)), folder)
    write_pngs(parts(whole), folder)  # replaces
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(12)]
    assert np.array_equal(joined(folder), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["png"]


NAMES = {  # as a folder may list them, and in order
    "bare numbers": (["0.png", "1.png", "10.png", "11.png", "2.png"], [0, 1, 4, 2, 3]),
    "after a word": (["img10.png", "img9.png", "img2.png"], [2, 1, 0]),
    "two numbers": (["c10_2.png", "c2_10.png", "c2_9.png"], [2, 1, 0]),
    "zeros ahead": (["000010.png", "000002.png", "000001.png"], [2, 1, 0]),
    "no numbers": (["b.png", "a.png", "c.png"], [1, 0, 2]),
    "text and numbers": (["10.png", "a.png", "2.png"], [2, 0, 1]),
}


@pytest.mark.parametrize("kind", NAMES)
def test_numbers_in_names_are_ordered_by_their_value(tmp_path: Path, kind: str) -> None:
    names, order = NAMES[kind]
    whole = pictures(len(names))
    for name, image in zip(names, whole):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name)
    assert np.array_equal(joined(tmp_path), whole[order])


def numbered(folder: Path, names: list[str]) -> PngImages:
    folder.mkdir()
    for name in names:
        save_png(folder / name)
    return PngImages.open(folder.name, folder)


PAIRS = {  # names of two folders, and whether it is known which images belong together
    "same": (["a.png", "b.png"], ["a.png", "b.png"], True),
    "zeros ahead": (["0.png", "1.png", "10.png"], ["000000.png", "000001.png", "000010.png"], True),
    "other words": (["ours_3.png", "ours_5.png"], ["fp-0003.png", "fp-0005.png"], True),
    "other numbers": (["0.png", "1.png"], ["1.png", "2.png"], False),
    "other names": (["a.png", "b.png"], ["a.png", "c.png"], False),
    "numbers against names": (["0.png", "1.png"], ["a.png", "b.png"], False),
    "two numbers": (["1_2.png", "1_3.png"], ["1_2.png", "1_4.png"], False),
    "one number twice": (["01.png", "1.png"], ["a1.png", "b1.png"], False),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_folders_are_compared_if_their_names_say_what_belongs_together(
    tmp_path: Path, kind: str
) -> None:
    ours, theirs, known = PAIRS[kind]
    samples = numbered(tmp_path / "samples", ours)
    fp = numbered(tmp_path / "fp", theirs)
    if known:
        require_known_pairs(samples, fp)
    else:
        with pytest.raises(ConfigError, match="^fp: names of .* are not those of") as caught:
            require_known_pairs(samples, fp)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["0.png", "1.png", "2.png"], True),
        (["img01.png", "img02.png", "img03.png"], True),
        (["0.png", "1.png", "3.png"], False),
        (["2.png", "3.png", "4.png"], False),
        (["a.png", "b.png", "c.png"], False),
    ],
)
def test_a_folder_beside_an_npz_is_numbered_without_a_gap(
    tmp_path: Path, names: list[str], known: bool
) -> None:
    folder = numbered(tmp_path / "samples", names)
    write_npz(parts(pictures(3)), 3, 8, tmp_path / "fp.npz")
    array = open_images("fp", tmp_path / "fp.npz")
    require_known_pairs(array, array)
    for pair in ((folder, array), (array, folder)):
        if known:
            require_known_pairs(*pair)
        else:
            with pytest.raises(ConfigError, match="^samples: names of .* do not count"):
                require_known_pairs(*pair)


def test_shards_without_the_padding(tmp_path: Path) -> None:
    whole = pictures(12)
    save_shards(tmp_path / "run", whole, n=10)
    found = open_images("samples", tmp_path / "run")
    assert (found.n, found.size) == (10, 8)
    assert np.array_equal(joined(tmp_path / "run", 7), whole[:10])
    assert found.tokens().shape == (10, 5)
    assert found.tokens()[9].tolist() == [205, 206, 207, 208, 209]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 100])
def test_regrouping_keeps_rows_and_order(length: int) -> None:
    found = list(regroup_rows(iter(np.split(np.arange(20), [2, 3, 11, 12])), length))
    assert np.array_equal(np.concatenate(found), np.arange(20))
    assert {len(part) for part in found[:-1]} <= {length}


@pytest.mark.parametrize("kind", ["npz", "packed", "shards"])
def test_memory_is_that_of_a_few_chunks(tmp_path: Path, kind: str) -> None:
    # 7.4 MB in all
    n = 600
    size = 64
    whole = np.tile(pictures(6, size), (n // 6, 1, 1, 1))
    if kind == "shards":
        save_shards(tmp_path / "run", whole, n, microbatch=20)
        path = tmp_path / "run"
    else:
        path = tmp_path / "a.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(
            path, arr_0=whole.transpose(0, 2, 3, 1)
        )
    del whole
    tracemalloc.start()
    try:
        found = open_images("samples", path)
        assert sum(len(part) for part in found.chunks(20)) == n
        write_npz(found.chunks(20), n, size, tmp_path / "b.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 20 * 3 * size * size


# --- bad input


def array(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def truncated(path: Path) -> None:
    np.savez(path, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:900])


nhwc = pictures(4).transpose(0, 2, 3, 1)
BAD_NPZ = {
    "missing": (lambda path: None, "is missing, expected an npz file or a folder"),
    "not an npz": (
        lambda path: path.write_bytes(b"PNG"),
        "cannot be read as npz (File is not a zip file)",
    ),
    "truncated": (truncated, "cannot be read as npz (File is not a zip file)"),
    "no arr_0": (array(images=nhwc), "has no array arr_0, it holds images.npy"),
    "channels first": (
        array(arr_0=pictures(4)),
        "uint8 (4, 3, 8, 8), expected uint8 (N, S, S, 3): its channels",
    ),
    "floats": (array(arr_0=nhwc / 255), "is float64 (4, 8, 8, 3), expected uint8"),
    "nan": (
        array(arr_0=np.full((4, 8, 8, 3), np.nan, np.float32)),
        "is float32 (4, 8, 8, 3), expected uint8",
    ),
    "not square": (array(arr_0=nhwc[:, :6]), "is uint8 (4, 6, 8, 3), expected uint8 (N, S, S, 3)"),
    "one image": (array(arr_0=nhwc[0]), "is uint8 (8, 8, 3), expected uint8 (N, S, S, 3)"),
    "transposed": (array(arr_0=np.asfortranarray(nhwc)), "expected uint8 (N, S, S, 3) in C order"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_bad_npz_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, said = BAD_NPZ[kind]
    make(tmp_path / "a.npz")
    with pytest.raises(ConfigError) as caught:
        open_images("samples", tmp_path / "a.npz")
    assert str(caught.value).startswith("samples: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_inside_an_npz_is_noticed_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(parts(pictures(40, 32)), 40, 32, path)
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged .Bad CRC-32"):
        joined(path)


def save_png(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> None:
    Image.new(mode, size).save(path)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4321\n"


def save_with_text(path: Path) -> None:
    """A whole PNG with a compressed text of 2 MiB, which Pillow refuses with a ValueError."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a" * 2**21, zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=texts)


def save_bomb(path: Path) -> None:
    """A PNG whose header names more pixels than Pillow decodes."""
    save_png(path)
    raw = bytearray(path.read_bytes())
    raw[16:24] = struct.pack(">II", 60_000, 60_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    path.write_bytes(raw)


def save_cut(path: Path) -> None:
    Image.fromarray(pictures(1, 64)[0].transpose(1, 2, 0)).save(path)
    Image.open(path).crop((0, 0, 8, 8)).save(path)
    path.write_bytes(path.read_bytes()[:-40])


BAD_PNG = {
    "empty": (lambda folder: None, "holds no PNG files"),
    "jpeg": (lambda folder: save_png(folder / "c.jpg"), "holds c.jpg, expected PNG files"),
    "mode": (
        lambda folder: save_png(folder / "c.png", "RGBA"),
        "c.png is RGBA of 8 x 8 pixels, expected RGB of 8 x 8",
    ),
    "grey": (
        lambda folder: save_png(folder / "a.png", "L"),
        "a.png is L of 8 x 8 pixels, expected RGB of S x S",
    ),
    "size": (
        lambda folder: save_png(folder / "c.png", size=(9, 9)),
        "c.png is RGB of 9 x 9 pixels, expected RGB of 8",
    ),
    "shape": (
        lambda folder: save_png(folder / "a.png", size=(8, 9)),
        "a.png is RGB of 8 x 9 pixels",
    ),
    "damaged": (lambda folder: (folder / "c.png").write_bytes(b"\x89PNG"), "c.png cannot be read"),
    "long text": (lambda folder: save_with_text(folder / "c.png"), "c.png cannot be read (Decompr"),
    "bomb": (lambda folder: save_bomb(folder / "c.png"), "c.png cannot be read (Image size"),
    "cut": (lambda folder: save_cut(folder / "c.png"), "c.png cannot be read"),
    "jpeg inside": (
        lambda folder: Image.new("RGB", (8, 8)).save(folder / "c.png", "JPEG"),
        "c.png is a JPEG file, expected PNG",
    ),
    "gif inside": (
        lambda folder: Image.new("RGB", (8, 8)).save(folder / "c.png", "GIF"),
        "c.png is a GIF file, expected PNG",
    ),
    "pointer": (
        lambda folder: (folder / "c.png").write_text(LFS_POINTER),
        "c.png cannot be read (a Git LFS pointer",
    ),
    "page": (
        lambda folder: (folder / "c.png").write_text("<!DOCTYPE html><title>404</title>"),
        "c.png cannot be read (an HTML page",
    ),
    "nothing": (lambda folder: (folder / "c.png").touch(), "c.png cannot be read (an empty file)"),
    "folder": (lambda folder: (folder / "c.png").mkdir(), "c.png cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("kind", BAD_PNG)
def test_bad_png_folders_are_refused(tmp_path: Path, kind: str) -> None:
    make, said = BAD_PNG[kind]
    if kind != "empty":
        save_png(tmp_path / "b.png")
    make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        joined(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_with_missing_foreign_or_moved_shards_are_refused(tmp_path: Path) -> None:
    for name, run in (("one", RUN), ("other", "ffff0000")):
        save_shards(tmp_path / name, pictures(12), 10, run=run)
    one, other = (shards.shard_path(tmp_path / name / "shards", 1) for name in ("one", "other"))
    good = one.read_bytes()
    one.unlink()
    with pytest.raises(ConfigError, match="lacks 1 of 3 micro-batches"):
        open_images("samples", tmp_path / "one")
    one.write_bytes(other.read_bytes())
    with pytest.raises(
        ConfigError, match="is micro-batch 1 of the run 'ffff0000', expected 1 of '0123abcd'"
    ):
        open_images("samples", tmp_path / "one")
    one.write_bytes(shards.shard_path(tmp_path / "one" / "shards", 2).read_bytes())
    with pytest.raises(ConfigError, match="is micro-batch 2 of the run '0123abcd', expected 1"):
        open_images("samples", tmp_path / "one")
    one.write_bytes(good[: len(good) // 2])
    with pytest.raises(ConfigError, match="lacks 1 of 3 micro-batches"):
        open_images("samples", tmp_path / "one")
    (tmp_path / "one" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"manifest.json cannot be read .fields are missing"):
        open_images("samples", tmp_path / "one")


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, kind: str) -> None:
    def full() -> Iterator[np.ndarray]:
        yield pictures(3)
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a"
    write = {"npz": lambda: write_npz(full(), 9, 8, path), "png": lambda: write_pngs(full(), path)}
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\)"):
        write[kind]()
    assert not list(tmp_path.iterdir())


def test_a_shard_that_cannot_be_written_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.write_shard(tmp_path, 0, Shard(pictures(2)), RUN)

    def full(file: object, array: np.ndarray, **options: object) -> None:
        file.write(b"half of it")
        raise OSError("4096 requested and 10 written")  # as NumPy says it

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(
        StorageError, match=r"00001.npz cannot be written \(4096 requested and 10 written\)"
    ):
        shards.write_shard(tmp_path, 1, Shard(pictures(2)), RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["00000.npz"]
    assert np.array_equal(shards.read_shard(tmp_path, 0, RUN).images, pictures(2))

"""Released files that a user has: recognised by content, added, found by name, moved, removed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models import __main__ as cli
from models import registry, user_files
from models.preset import Source
from models.weights import added, conversions, digests
from models.weights.checkpoints import CheckpointError
from tests.official import save_official
from tests.reference import fill

pytestmark = pytest.mark.usefixtures("offline", "small_presets")

TOKENIZER = Source("maskgit-vqgan-imagenet-f16-256.bin", "fun-research/TiTok")
SMALL = {
    "rar_b": "rar_twin",
    "llamagen_b_256": "par_twin",
    "llamagen_b_384": "par_twin",  # of the same shapes
}


@pytest.fixture
def small_presets() -> Iterator[None]:
    """Twins in the place of a few released models, which are all that there are."""
    all_presets = dict(registry.PRESETS)
    for name in user_files.released_names():
        released = registry.PRESETS.pop(name)
        if name in SMALL:
            twin = all_presets[SMALL[name]]
            registry.PRESETS[name] = replace(
                twin,
                name=name,
                weights=released.weights,
                tokenizer_weights=released.tokenizer_weights,
            )
    registry.released_modules.cache_clear()
    yield
    registry.PRESETS.clear()
    registry.PRESETS.update(all_presets)  # in their order, which lists have
    registry.released_modules.cache_clear()


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """A folder with RAR-B's two files, as a user has them: of any name, in any folder."""
    folder = tmp_path / "downloads"
    (folder / "rar").mkdir(parents=True)
    model = models.build("rar_b")
    for part in registry.PARTS:
        save_official("rar_b", part, fill(getattr(model, part), salt=part), folder / "rar")
    (folder / "rar" / "rar_b.bin").rename(folder / "mine.pt")
    return folder


def run(capsys: pytest.CaptureFixture, *argv: object) -> str:
    cli.main([str(word) for word in argv])
    return capsys.readouterr().out


def refused(*argv: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in argv])
    assert str(ended.value).count("\n") == 0
    return str(ended.value)


def test_added_files_are_found_by_the_name_of_their_model(
    downloads: Path, capsys: pytest.CaptureFixture
) -> None:
    (downloads / "other.pth").write_bytes(b"no weights")
    (downloads / "notes.txt").write_text("not looked at")
    out = run(capsys, "add", downloads)
    assert f"added: {downloads}/mine.pt: transformer of rar_b (by keys and shapes)" in out
    assert f"{TOKENIZER.file}: tokenizer of rar_b (by keys and shapes)" in out
    assert f"passed over: {downloads}/other.pth cannot be read (" in out
    assert "notes.txt" not in out
    model = models.load("rar_b")
    expected = fill(models.build("rar_b").transformer, salt="transformer")
    assert digests.module_digest(model.transformer) == digests.module_digest(expected)
    listing = run(capsys, "list")
    row = next(line for line in listing.splitlines() if line.startswith("rar_b "))
    assert row.split()[-2:] == ["added", "added"]
    assert str(downloads / "mine.pt") in listing
    assert f"added: {downloads}/mine.pt" in run(capsys, "info", "rar_b")


def test_recognising_reads_no_values(downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "models.weights.checkpoints.zipfile.ZipFile", lambda *_: pytest.fail("reads all of it")
    )
    addition = user_files.add_files([downloads])
    assert {source.file for source in addition.files} == {"rar_b.bin", TOKENIZER.file}


def test_safetensors_and_entries_of_a_file_are_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = fill(models.build("rar_b").transformer).half().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    assert "transformer of rar_b" in run(capsys, "add", tmp_path / "a.safetensors")
    torch.save({"ema": {"net": state}, "net": {"x": torch.zeros(1)}}, tmp_path / "b.pt")
    assert refused("add", tmp_path / "b.pt").startswith("error: weights: nothing to add in ")
    run(capsys, "add", f"{tmp_path}/b.pt::ema.net")
    entry = added.find_entry(models.PRESETS["rar_b"].weights)
    assert str(entry.path) == f"{tmp_path}/b.pt::ema.net"
    source = models.PRESETS["rar_b"].weights
    assert registry.state_of(source).keys() == state.keys()


def test_what_content_does_not_tell_apart_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(fill(models.build("llamagen_b_256").transformer).state_dict(), tmp_path / "x.pt")
    line = refused("add", tmp_path)
    assert line == (
        f"error: weights: {tmp_path}/x.pt fits llamagen_b_256 and llamagen_b_384; say which: "
        f"python -m models add {tmp_path}/x.pt --name llamagen_b_256"
    )
    assert not added.read_entries()
    run(capsys, "add", tmp_path / "x.pt", "--name", "llamagen_b_384")
    assert list(added.read_entries()) == ["FoundationVision/LlamaGen/c2i_B_384.pt"]
    (tmp_path / "x.pt").rename(tmp_path / "c2i_B_256.pt")  # the official name says it, too
    assert "transformer of llamagen_b_256 (" in run(capsys, "add", tmp_path / "c2i_B_256.pt")
    assert "its tensors fit rar_b" not in capsys.readouterr().out
    assert refused("add", tmp_path, "--name", "rar_b").startswith("error: weights: nothing to add")
    assert "ships" in refused("add", tmp_path, "--name", "rar_twin")
    assert "is not one of" in refused("add", tmp_path, "--name", "rar_c")


def test_of_several_files_the_official_one_counts(
    downloads: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(downloads / "mine.pt", downloads / "copy.pt")
    assert "copy.pt: transformer of rar_b" in run(capsys, "add", downloads)  # the same content
    state = fill(models.build("rar_b").transformer, salt="other").state_dict()
    torch.save(state, downloads / "other.pt")
    line = refused("add", downloads)
    assert "copy.pt and " in line
    assert "fit rar_b; say which: python -m models add FILE --name rar_b" in line
    (downloads / "other.pt").rename(downloads / "rar_b.bin")
    assert "rar_b.bin: transformer of rar_b (by keys" in run(capsys, "add", downloads)
    pinned = replace(
        models.PRESETS["rar_b"],
        weights=Source(
            "rar_b.bin", "yucornetto/RAR", sha256=digests.file_digest(downloads / "mine.pt")
        ),
    )
    registry.PRESETS["rar_b"] = pinned
    registry.released_modules.cache_clear()
    assert "copy.pt: transformer of rar_b (the pinned file, by its hash)" in run(
        capsys, "add", downloads
    )


def test_a_file_that_was_moved_or_changed_is_named_in_a_line(
    downloads: Path, capsys: pytest.CaptureFixture, cache_folder: Path
) -> None:
    run(capsys, "add", downloads)
    moved = downloads.with_name("moved")
    downloads.rename(moved)
    with pytest.raises(CheckpointError, match=r"mine.pt, added as rar_b.bin, is there no more; "):
        models.load("rar_b")
    assert "moved: add it again" in run(capsys, "list")
    assert "moved: " in run(capsys, "info", "rar_b")
    run(capsys, "add", moved)
    loaded = models.load("rar_b")
    shutil.rmtree(moved)  # either copy may be deleted: the conversion has the same content
    again = models.load("rar_b")
    assert digests.module_digest(loaded.transformer) == digests.module_digest(again.transformer)
    state = fill(models.build("rar_b").transformer, salt="changed").state_dict()
    moved.mkdir()
    torch.save(state, moved / "mine.pt")
    with pytest.raises(CheckpointError, match=r"mine.pt has changed since it was added as rar_b"):
        models.load("rar_b")


def test_removing_forgets_and_keeps_files(downloads: Path, capsys: pytest.CaptureFixture) -> None:
    assert refused("remove", "rar_b") == "error: model: nothing was added for rar_b"
    run(capsys, "add", downloads)
    assert run(capsys, "remove", "rar_b").splitlines() == [
        "forgotten: rar_b.bin",
        "forgotten: maskgit-vqgan-imagenet-f16-256.bin",
    ]
    assert not added.read_entries()
    assert (downloads / "mine.pt").is_file()


def test_a_tokenizer_stays_while_another_added_model_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {}
    for name in ("llamagen_b_256", "llamagen_b_384"):
        for source in user_files.released_sources(name):
            files[source] = added.AddedFile(tmp_path / source.file, "0" * 64)
    added.add_entries(files)
    assert run(capsys, "remove", "llamagen_b_256") == "forgotten: c2i_B_256.pt\n"
    assert "forgotten: vq_ds16_c2i.pt" in run(capsys, "remove", "llamagen_b_384")


def test_a_folder_of_the_environment_needs_no_adding(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="python -m models add FOLDER"):
        models.load("rar_b")
    monkeypatch.setenv("AR_PTQ_WEIGHTS", str(downloads))
    assert models.load("rar_b").preset.name == "rar_b"
    assert not added.read_entries()
    row = next(line for line in run(capsys, "list").splitlines() if line.startswith("rar_b "))
    assert row.split()[-2:] == ["AR_PTQ_WEIGHTS", "AR_PTQ_WEIGHTS"]
    state = fill(models.build("rar_b").transformer, salt="other").state_dict()
    torch.save(state, downloads / "other.pt")
    with pytest.raises(CheckpointError, match="may be rar_b.bin; python -m models add FILE --name"):
        models.load("rar_b")
    run(capsys, "add", downloads / "other.pt")
    assert registry.locate_weights(models.PRESETS["rar_b"].weights) == downloads / "other.pt"
    monkeypatch.setenv("AR_PTQ_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="^AR_PTQ_WEIGHTS: .*nowhere is missing"):
        models.load("rar_b")
    fault = f"AR_PTQ_WEIGHTS: {tmp_path}/nowhere is missing, expected a folder or a file"
    for command in (["list"], ["info", "rar_b"]):  # which go on without it
        capsys.readouterr()
        cli.main(command)
        assert capsys.readouterr().err == f"ignored: {fault}\n"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", '{"files": {}}', '{"files": {}, "digest": "0"}']
)
def test_a_damaged_list_of_files_is_named(text: str, cache_folder: Path) -> None:
    cache_folder.mkdir()
    added.entries_file().write_text(text)
    with pytest.raises(CheckpointError, match=r"added-1.json is damaged; remove it and add"):
        added.read_entries()


def test_a_list_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, downloads: Path
) -> None:
    monkeypatch.setattr(added, "cache_root", lambda: conversions.NO_CACHE)
    assert added.read_entries() == {}
    assert "cannot be written" in refused("add", downloads)


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    sources = [Source(f"{number}.bin", "some/where") for number in range(8)]

    def add_one(source: Source) -> None:
        added.add_entries({source: added.AddedFile(tmp_path / source.file, "0" * 64)})

    threads = [threading.Thread(target=add_one, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added.read_entries()) == len(sources)


def test_places_that_hold_nothing_are_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("add", "") == "error: place: '' is empty, expected a folder or a file"
    line = refused("add", tmp_path, "--name", "rar_b")
    assert line == (
        f"error: weights: nothing to add in {tmp_path}, expected weights of rar_b in a file that "
        "ends in .safetensors, .pt, .pth, .bin, .ckpt"
    )

    def refuse_access(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr("os.scandir", refuse_access)  # whoever runs the tests may read all
    line = refused("add", tmp_path)
    assert line == f"error: weights: {tmp_path} cannot be read (Permission denied)"


def test_a_link_that_leads_nowhere_is_passed_over(
    downloads: Path, capsys: pytest.CaptureFixture
) -> None:
    (downloads / "gone.pt").symlink_to(downloads / "nothing.pt")
    out = run(capsys, "add", downloads)
    assert f"passed over: {downloads}/gone.pt cannot be read (No such file or directory)" in out
    assert "transformer of rar_b" in out

"""The way of a user with the official files, at full size: made-up weights under the official
names, in the official wrappers, are checked, loaded, converted and loaded again. The smallest
preset of each family; gigabytes on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from models import __main__ as cli
from models import registry
from models.weights import conversions, digests
from tests.official import save_official
from tests.reference import fill


@pytest.fixture
def folder(tmp_path: Path, cache_folder: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var_d16", "rar_b", "par_xl_4x", "mar_b"])
def test_official_files_load_by_name(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = models.build(name)
    paths = {}
    made_digests = {}
    for part in registry.PARTS:
        module = fill(getattr(made, part), salt=name)
        paths[part] = save_official(name, part, module, folder)
        made_digests[part] = digests.module_digest(module)
    del made, module
    files = ["--weights", str(paths["transformer"]), "--tokenizer", str(paths["tokenizer"])]
    cli.main(["check", name, *files])
    assert capsys.readouterr().out.count("keys and shapes agree") == 2
    for _ in range(2):  # the second time from the conversions
        loaded = models.load(name, paths["transformer"], paths["tokenizer"])
        assert {
            part: digests.module_digest(getattr(loaded, part)) for part in registry.PARTS
        } == made_digests
        del loaded
        monkeypatch.setattr(
            conversions, "read_checkpoint", lambda path: pytest.fail("read the official file again")
        )

"""The revision that results state."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments.store import provenance


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a file of code and a published result, both committed."""
    code = tmp_path / "experiments" / "store" / "provenance.py"
    published = tmp_path / "experiments" / "results" / "rar" / "a.jsonl"
    for path in (code, published):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(code))
    monkeypatch.delenv("AR_PTQ_REVISION", raising=False)
    return tmp_path


def test_changed_code_is_said_and_published_results_are_no_code(repository: Path) -> None:
    clean = provenance.code_revision()
    assert clean is not None
    assert len(clean) == 12
    (repository / "new.py").write_text("1")
    (repository / "experiments" / "results" / "rar" / "a.jsonl").write_text("2")
    assert provenance.code_revision() == clean
    (repository / "experiments" / "store" / "provenance.py").write_text("2")
    assert provenance.code_revision() == f"{clean}+"


def test_the_environment_names_the_revision_of_code_without_a_repository(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AR_PTQ_REVISION", "release-1")
    assert provenance.code_revision() == "release-1"
    monkeypatch.delenv("AR_PTQ_REVISION")
    monkeypatch.setattr(provenance, "__file__", str(repository.parent / "elsewhere.py"))
    assert provenance.code_revision() is None

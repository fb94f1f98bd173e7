"""No damaged file is used in silence, and none ends in a traceback: a fuzz test with a fixed seed.

What is expected stands in a table of its own. A file whose bytes still mean what they did, to
libraries that are not the project's, may be used; every other one is named in one line, and
refused, ignored, or made anew.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from ptq.errors import describe_fault
from tests.experiments.corruptions.artefacts import ARTEFACTS, Artefact
from tests.experiments.corruptions.damage import CORRUPTIONS, means_the_same, restore

SEED = 19
REFUSED = "refused"  # an error of one line
IGNORED = "ignored"  # a line, and nothing is used
ANEW = "made anew"  # a line, and what is used is what the whole file held
HARMLESS = "harmless"  # no line, and what is used is what the whole file held

# what has to come of a file that means something else
EXPECTED = {
    "pool": ANEW,
    "features of evaluate": ANEW,
    "conversion": ANEW,
    "added files": REFUSED,
    "trials": IGNORED,
    "trained blocks": IGNORED,
    "held-out tokens": REFUSED,
    "shipped weights": REFUSED,
    "table of what ships": REFUSED,
    "record": REFUSED,
    "reference": REFUSED,
    "checkpoint": REFUSED,
    "metrics.json": IGNORED,
    "identity of a run": ANEW,  # the result beside it states the same
    "samples of a run": IGNORED,
    "samples in a picture": IGNORED,
    "features of a run": IGNORED,
    "grid of a run": IGNORED,
    "committed results": IGNORED,
    "results of a table": IGNORED,
    "evaluation": REFUSED,
    "layers.json": IGNORED,
    "shard": REFUSED,
    "manifest": REFUSED,
    "npz of sample": ANEW,
    "PNG of sample": ANEW,
    "npz of a user": REFUSED,
    "PNG of a user": REFUSED,
    "statistics of a user": REFUSED,
    "weights of a user": REFUSED,
    "jobs": REFUSED,
    "outcome of a job": IGNORED,
    "export": REFUSED,
    "tensors of an export": REFUSED,
}
# files that belong to nobody until a user names them, or that are read right after they are written
OWNERLESS = {
    "added files",
    "evaluation",
    "identity of a run",  # a folder with another run's is that run's
    "layers.json",
    "results of a table",
    "npz of a user",
    "PNG of a user",
    "statistics of a user",
    "weights of a user",
}
# without floating-point numbers in their last bytes, or any
WITHOUT_NAN = {
    "added files",
    "checkpoint",
    "conversion",
    "grid of a run",
    "held-out tokens",
    "identity of a run",
    "jobs",
    "npz of a user",
    "npz of sample",
    "PNG of a user",
    "PNG of sample",
    "samples in a picture",
    "samples of a run",
    "shard",
    "table of what ships",
    "weights of a user",
}


def outcome_of(
    artefact: Artefact, path: Path, whole: Any, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """What came of reading a file, and the lines that said so."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = artefact.read(path)
        except Exception as error:
            line = describe_fault(error)
            return ("traceback", repr(error)) if line is None else (REFUSED, line)
    printed = capsys.readouterr()
    said = printed.out + printed.err + "".join(f"{each.message}\n" for each in warned)
    if found is None:
        return (IGNORED if said else "lost in silence"), said.strip()
    if repr(found) != repr(whole):
        return "another value", said.strip()
    return (ANEW if said else HARMLESS), said.strip()


def is_applied(kind: str, corruption: str) -> bool:
    if corruption in ("other", "halves") and kind in OWNERLESS:
        return False
    return corruption != "nan" or kind not in WITHOUT_NAN


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "0"))


def test_the_table_names_every_kind_of_file() -> None:
    assert EXPECTED.keys() == ARTEFACTS.keys()
    cases = sum(is_applied(kind, corruption) for kind in EXPECTED for corruption in CORRUPTIONS)
    assert cases >= 200


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_damaged_file_is_named_and_never_used_in_silence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact = ARTEFACTS[kind]
    path = artefact.make(tmp_path / "0", 0)
    content = path.read_bytes()
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "1"))
    other = artefact.make(tmp_path / "1", 1).read_bytes()
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "0"))
    whole = artefact.read(path)
    assert outcome_of(artefact, path, whole, capsys) == (HARMLESS, "")
    for corruption, corrupt in CORRUPTIONS.items():
        if not is_applied(kind, corruption):
            continue
        draw = random.Random(f"{SEED} {kind} {corruption}")
        changed = corrupt(content, other, draw)
        restore(path, changed)
        outcome, said = outcome_of(artefact, path, whole, capsys)
        case = f"{kind}, {corruption}: {outcome}: {said}"
        if outcome == HARMLESS:
            assert means_the_same(content, changed, artefact.meaning), case
        else:
            assert outcome == EXPECTED[kind], case
            assert "\n" not in said, case
            assert path.name in said or path.parent.name in said, case
        restore(path, content)

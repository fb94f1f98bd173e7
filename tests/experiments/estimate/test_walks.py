"""The block of commands that were run once: estimates beside what they took."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.estimate import walks
from experiments.store.files import write_sealed
from ptq.files import DamagedFile

WALK = {
    "what": "a table",
    "cells": 15,
    "device": "NVIDIA H200",
    "estimated_s": [100.0, 50.0, 200.0],
    "took_s": 80.4,
    "revision": "abc",
}


def test_estimates_stand_beside_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walks, "RECORD", tmp_path / "walks.json")
    unpriced = WALK | {"estimated_s": None}
    write_sealed(walks.RECORD, {"walks": [WALK, unpriced]})
    first, second = walks.walks_block().splitlines()[2:]
    assert first == "| a table | 15 | NVIDIA H200 | 100 (50 to 200) | 80 | 0.80 | `abc` |"
    assert second == "| a table | 15 | NVIDIA H200 | – | 80 | – | `abc` |"
    walks.RECORD.write_text(walks.RECORD.read_text().replace("80.4", "20.4"))
    with pytest.raises(DamagedFile, match="its content has the digest"):
        walks.walks_block()

"""The costs in REPRODUCE.md: every table of released models stands there, and the block is
rewritten alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.estimate import __main__ as estimate
from experiments.estimate import report
from experiments.estimate.cells import Quantity
from experiments.estimate.report import TableCost
from experiments.registry.tables import load_tables

PAGE = Path(estimate.__file__).parents[1] / "REPRODUCE.md"
COST = TableCost("rar", "rar_b", 15, Quantity.exactly(7200.0), None, Quantity.exactly(2e9))


def test_every_table_of_released_models_has_a_line_for_each() -> None:
    block = PAGE.read_text().partition(estimate.BEGIN)[2].partition(estimate.END)[0]
    shown = [line.split(" | ")[:2] for line in block.strip().splitlines()[2:]]
    expected = []
    for table in load_tables().values():
        if table.what == "run":
            for model in table.models.get("paper", ()):
                expected.append([f"| {table.title}", f"`{model}`"])
    assert shown == expected, f"run: {estimate.BEGIN.strip('<!-> ').partition(' ')[2]}"


def test_a_block_is_rewritten_and_the_rest_of_the_page_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(report, "paper_costs", lambda *_, **__: [COST])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{estimate.BEGIN}\nold\n{estimate.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["estimate", f"page={page}"])
    estimate.main()
    text = page.read_text()
    assert text.startswith(f"before\n{estimate.BEGIN}\n\n| Table |")
    assert "| `rar_b` | 15 | 2 | – | 2 | done |" in text
    assert text.endswith(f"\n\n{estimate.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["estimate"])
    estimate.main()
    assert capsys.readouterr().out.startswith("| Table |")
    page.write_text("no block")
    monkeypatch.setattr(sys, "argv", ["estimate", f"page={page}"])
    with pytest.raises(SystemExit, match="^error: page: it has no lines"):
        estimate.main()
    assert page.read_text() == "no block"

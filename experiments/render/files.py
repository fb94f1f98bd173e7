"""The files of one table, from results alone: CSV, Markdown, LaTeX and pictures.

table.csv   quality, one line per figure     table.md, table.tex   quality, one line per row
costs.csv   seconds, MiB and bytes per run   costs.md              their means
gate.md     of released models, whether full precision is as published, so that quantized rows count
plot.png    the picture that the registry asks for
samples.png images of one seed, row beside row, where the runs' samples are at hand
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.evaluate.fp_gate import Verdict, judge_results, verdict_table
from experiments.registry.labels import COST_HEADINGS
from experiments.registry.tables import Table
from experiments.render.formats import (
    costs_csv,
    format_csv,
    format_latex,
    format_markdown,
    quality_csv,
)
from experiments.render.sheet import Result, Sheet, build_sheet, names_among
from experiments.render.text import arrange_costs, arrange_sheet, with_revisions
from experiments.store.files import write_text


def table_files(
    table: Table,
    results: Sequence[Result],
    folder: Path,
    scale: str,
    runs: Path,
    picks: Sequence[str] = (),
) -> str:
    """Write all files of a table and return its Markdown, with the columns that it asks for.

    Args:
        results: with their place in the table; failures among them.
        runs: where the samples of runs are looked for.
        picks: overrides that pick a part of the table, which then has no other lines.

    Raises:
        ConfigError: the results do not make one table (`build_sheet`).
    """
    sheet = build_sheet(table, scale, results, picks)
    write_sheet(sheet, folder, runs)
    return print_sheet(sheet)


def print_sheet(sheet: Sheet) -> str:
    """The table as Markdown, and results that are of none of its cells."""
    quality = arrange_sheet(sheet, shown_columns(sheet))
    table = format_markdown(with_revisions(quality, sheet))
    parts = [table]
    for stray in sheet.strays:
        parts.append(f"Ignored: {stray}.")
    if judge_sheet(sheet):
        parts.append(describe_gate(sheet))
    return "\n\n".join(parts)


def judge_sheet(sheet: Sheet) -> dict[str, Verdict]:
    """Whether quantized rows of released models count, by model; none of other tables."""
    if sheet.scale != "paper" or sheet.table.what != "run":
        return {}
    measured: list[Result] = []
    for line in sheet.lines:
        measured += line.results
    return judge_results(measured)


def describe_gate(sheet: Sheet) -> str:
    """The verdicts on a sheet's models as Markdown."""
    title = "Whether quantized rows count (experiments.evaluate.fp_gate)"
    return f"{title}\n\n{verdict_table(judge_sheet(sheet))}"


def shown_columns(sheet: Sheet) -> list[str] | None:
    """Columns of the registry that any line has, costs included; None if it asks for none."""
    if sheet.table.columns is None or sheet.table.what != "run":
        return None
    costs = [name for name in sheet.table.columns if name in COST_HEADINGS]
    # of natural images, quality has names of its own
    return [*sheet.metrics(), *names_among(costs, sheet.known)]


def write_sheet(sheet: Sheet, folder: Path, runs: Path) -> None:
    """Write the files of a sheet."""
    # drawing is not needed to print a table
    from experiments.render.pictures import draw_plot, draw_samples

    title = sheet.table.title
    quality = with_revisions(arrange_sheet(sheet), sheet)
    write_text(folder / "table.md", f"{title}\n\n{format_markdown(quality)}\n")
    write_text(folder / "table.tex", format_latex(quality, title))
    if sheet.table.what == "speed":
        # the table itself is about times, and has no quality to show
        write_text(folder / "costs.csv", format_csv(quality.cells))
    else:
        write_text(folder / "table.csv", quality_csv(sheet))
        write_text(folder / "costs.csv", costs_csv(sheet))
    if judge_sheet(sheet):
        write_text(folder / "gate.md", f"{describe_gate(sheet)}\n")
    if sheet.table.what == "run":
        costs = format_markdown(arrange_costs(sheet))
        write_text(folder / "costs.md", f"{title}: cost\n\n{costs}\n")
    # with nothing to draw, both remove what stands there from before
    draw_plot(sheet, folder / "plot.png")
    draw_samples(sheet, folder / "samples.png", runs)

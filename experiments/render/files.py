"""The files of one table: figures as CSV, tables as Markdown and LaTeX, pictures; written from
results alone.

    table.csv   quality, one line per figure          table.md, table.tex   quality, one line per row
    costs.csv   seconds, MiB and bytes per run        costs.md              their means
    plot.png    the picture that the registry asks for
    samples.png images of one seed, row beside row, where the runs' samples are at hand
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.registry.tables import Table
from experiments.render import text
from experiments.render.sheet import Result, Sheet, build
from experiments.store.files import write_text


def table_files(
    table: Table,
    results: Sequence[Result],
    folder: Path,
    scale: str,
    runs: Path,
    picks: Sequence[str] = (),
) -> str:
    """Write all files of a table and return its Markdown, costs included where its columns ask for
    them.

    Args:
        results: with their place in the table; failures among them. runs: where the samples of runs
            are looked for.
        picks: overrides that pick a part of the table, which then has no other lines.

    Raises:
        ConfigError: the results do not make one table (`sheet.build`).
    """
    sheet = build(table, scale, results, picks)
    write(sheet, folder, runs)
    return printed(sheet)


def printed(sheet: Sheet) -> str:
    """The table as Markdown with the columns that the registry asks for, and results that are of
    none of its cells."""
    table = text.markdown(text.arranged(sheet, shown_columns(sheet)))
    return "\n\n".join((table, *(f"Ignored: {stray}." for stray in sheet.strays)))


def shown_columns(sheet: Sheet) -> list[str] | None:
    """Columns of the registry that any line has, costs included; None if it asks for none."""
    if sheet.table.columns is None or sheet.table.what != "run":
        return None
    return [c for c in sheet.table.columns if any(line.values(c) for line in sheet.lines)]


def write(sheet: Sheet, folder: Path, runs: Path) -> None:
    """Write the files of a sheet."""
    from experiments.render.pictures import (
        image_panels,
        plot,  # drawing is not needed to print a table
    )

    title = sheet.table.title
    quality = text.arranged(sheet)
    if not table_of_times(sheet):
        write_text(folder / "table.csv", text.quality_csv(sheet))
    write_text(folder / "table.md", f"{title}\n\n{text.markdown(quality)}\n")
    write_text(folder / "table.tex", text.latex(quality, title))
    write_text(
        folder / "costs.csv",
        text.csv_of(quality) if table_of_times(sheet) else text.costs_csv(sheet),
    )
    if sheet.table.what == "run":
        write_text(folder / "costs.md", f"{title}: cost\n\n{text.markdown(text.costs(sheet))}\n")
    plot(sheet, folder / "plot.png")
    image_panels(sheet, folder / "samples.png", runs)


def table_of_times(sheet: Sheet) -> bool:
    """Whether the table itself is about times, and has no quality to show."""
    return sheet.table.what == "speed"

"""The generated blocks of the project's pages, from committed results alone.

A block stands between a marker and `<!-- end -->`. Markers:

    <!-- results:NAME -->   the table NAME of the registry, and where it was measured
    <!-- figure:NAME -->    its picture, written to experiments/results/figures/NAME.png
    <!-- claims -->         the paper's statements with what the twins show
    <!-- registry -->       all tables: what they reproduce, and the minutes that their committed results took

The first takes settings: `<!-- results:main model=rar_twin quant=w6a6 columns=kl,nll -->` shows
these lines and columns only; several values stand with commas. `length=256 variant=bf16,int8` picks
speeds. The model cards, a page of their own, are generated as a whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from experiments.registry import tables
from experiments.registry.labels import COST_HEADINGS, METRIC_HEADINGS
from experiments.render import files
from experiments.render.formats import format_markdown
from experiments.render.numbers import NOTHING
from experiments.render.sheet import Result, Sheet, build_sheet
from experiments.render.text import TextTable, arrange_sheet
from experiments.store import results
from experiments.store.files import write_text
from experiments.train_zoo import cards
from ptq.spec import ConfigError, require

ROOT = Path(__file__).parents[2]
# committed pictures
FIGURES = results.ROOT / "figures"
SAMPLES = results.ROOT / "samples"
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md", results.ROOT / "README.md")
BLOCK = re.compile(
    r"(?P<open><!-- (?P<kind>results|figure|claims|registry)(?::(?P<name>\S+))?(?P<settings>(?: \S+=\S+)*) -->\n)"
    r".*?(?P<close>\n?<!-- end -->)",
    re.DOTALL,
)


def committed(name: str, scale: str = "twin") -> tuple[Sheet, list[str]]:
    """The sheet of a table from its committed results, and a line for every file that does not
    count.

    Raises:
        ConfigError: there is no such table, or its results do not make one.
    """
    table = tables.find_table(name)
    found, ignored = results.committed_results(results.table_label(name, scale))
    return build_sheet(table, scale, found), ignored


def measured_on(sheet: Sheet) -> str:
    """Seeds, sizes, device and versions of the results, as a sentence; empty where there are
    none."""
    origins = [r["provenance"] for line in sheet.done for r in line.results]
    if not origins:
        return ""
    counts = [len(line.results) for line in sheet.done]
    least = min(counts)
    most = max(counts)
    sizes = {(o.get("images"), o.get("sequences")) for o in origins}
    images, sequences = sizes.pop() if len(sizes) == 1 else (None, None)
    versions = [o["versions"] for o in origins if "versions" in o]
    where = "; ".join(sorted({f"{v['device']}, torch {v['torch']}" for v in versions}))
    parts = [
        f"{least} to {most} seeds" if least < most else f"{most} seed{'s' if most > 1 else ''}"
    ]
    if sheet.table.what == "run" and images:
        held_out = f" and {sequences:,} held-out sequences" if sequences else ""
        parts.append(f"{images:,} images{held_out} per run")
    return "; ".join(filter(None, (", ".join(parts), where))) + "."


def selectors(sheet: Sheet) -> str:
    """Which calibration and scope all quantized rows share, as a sentence; empty where they
    differ."""
    if sheet.table.what != "run":
        return ""
    quantized = [r["cell"] for line in sheet.done if line.quant is not None for r in line.results]
    used = {(cell.get("calib"), cell.get("scope")) for cell in quantized}
    if len(used) != 1:
        return ""
    selector, scope = used.pop()
    return f"All quantized rows: `calib={selector}`, `scope={scope}`. "


def chosen(sheet: Sheet, settings: dict[str, str]) -> tuple[Sheet, list[str] | None]:
    """The lines and columns that a marker asks for.

    Raises:
        ConfigError: it asks for what is not there.
    """
    columns = settings.pop("columns", None)
    if sheet.table.what == "speed":
        for key in settings.keys() & {"length", "variant"}:
            sheet = picked(sheet, key, settings.pop(key).split(","))
    sheet = sheet.restricted({key: values.split(",") for key, values in settings.items()})
    if columns is None:
        return sheet, files.shown_columns(sheet)
    for column in columns.split(","):
        require(
            "columns",
            column,
            (*METRIC_HEADINGS, *COST_HEADINGS)
            if sheet.table.what == "run"
            else tuple(sheet.metrics()),
        )
    return sheet, columns.split(",")


def picked(sheet: Sheet, key: str, values: list[str]) -> Sheet:
    """A sheet of speeds with those measurements alone whose `key` is among the values.

    Raises:
        ConfigError: there is none with one of the values.
    """
    known = dict.fromkeys(
        str(x[key]) for line in sheet.done for r in line.results for x in r["detail"]["lines"]
    )
    for value in values:
        require(key, value, tuple(known))

    def kept(result: Result) -> Result:
        lines = [x for x in result["detail"]["lines"] if str(x[key]) in values]
        return {**result, "detail": {**result["detail"], "lines": lines}}

    return replace(
        sheet, lines=tuple(replace(x, results=tuple(map(kept, x.results))) for x in sheet.lines)
    )


def table_block(name: str, settings: dict[str, str]) -> str:
    """A table of committed results, and where it was measured."""
    sheet, columns = chosen(committed(name)[0], settings)
    if not sheet.done:
        return f"Not run: no result of this version is committed under `experiments/results/{name}` yet."
    table = format_markdown(arrange_sheet(sheet, columns))
    return f"{table}\n\n{selectors(sheet)}{measured_on(sheet)} Raw results: `experiments/results/{name}`."


def picture_of(name: str) -> Path:
    return FIGURES / f"{name}.png"


def figure_block(name: str, page: Path) -> str:
    """A link to the picture of a table; a sentence where nothing is measured yet."""
    sheet, _ = committed(name)
    if not sheet.done:
        return f"Not drawn: no result of this version is committed under `experiments/results/{name}` yet."
    return f"![{sheet.table.title}]({os.path.relpath(picture_of(name), page.parent)})"


def minutes(found: Iterable[Result]) -> str:
    """Minutes of a device that results took, a cell's seconds by the number of workers that shared
    the device, and how many of the results recorded it if not all did."""
    costs = [r["cost"] for r in found]
    known = [
        c["cell_s"] / c["workers"] / 60
        for c in costs
        if c.get("cell_s") is not None and c.get("workers")
    ]
    if not known:
        return NOTHING
    return f"{sum(known):.1f}" + (
        f" ({len(known)} of {len(costs)})" if len(known) < len(costs) else ""
    )


def registry_block() -> str:
    """All tables of the registry: what they reproduce, what they cost, and what is known of it from
    their committed results; "all" counts those that tables share once."""
    head = ["Name", "What", "Reproduces", "Cost", "Results", "Device [min]"]
    lines: list[list[str]] = []
    every: dict[str, Result] = {}
    for table in tables.load_tables().values():
        found = results.committed_results(table.name)[0]
        for result in found:
            key = result["provenance"]["hash"]
            if "workers" in result["cost"] or key not in every:
                every[key] = result
        reproduces = table.reproduces or NOTHING
        lines.append(
            [table.name, table.title, reproduces, table.cost, str(len(found)), minutes(found)]
        )
    lines.append(["all", *[NOTHING] * 3, str(len(every)), minutes(every.values())])
    return format_markdown(TextTable(pd.DataFrame(lines, columns=head), code=frozenset({0})))


def contents(match: re.Match[str], page: Path) -> str:
    """What belongs inside a block."""
    kind = match["kind"]
    name = match["name"]
    settings = dict(s.split("=", 1) for s in match["settings"].split())
    if settings and kind != "results":
        raise ConfigError(
            f"{page.name}: {kind} takes no settings, but has {match['settings'].strip()}"
        )
    if kind in ("results", "figure"):
        try:
            return table_block(name, settings) if kind == "results" else figure_block(name, page)
        except ConfigError as error:
            raise ConfigError(f"{page.name}: {kind}:{name}: {error}") from error
    if kind == "registry":
        return registry_block()
    from experiments.render import claims

    return claims.markdown()


def rewritten(page: Path) -> str:
    """The text of a page with all blocks current.

    Raises:
        ConfigError: a marker names what is not there, or lacks its end.
    """
    old = page.read_text()
    markers = len(re.findall(r"<!-- (?:results|figure|claims|registry)\b", old))
    ends = len(BLOCK.findall(old))
    if markers != ends:
        raise ConfigError(
            f"{page.name}: {markers} markers of generated blocks, but {ends} whole blocks"
        )
    return BLOCK.sub(lambda m: f"{m['open']}{contents(m, page)}\n<!-- end -->", old)


def pictures(page: Path) -> Iterator[tuple[Sheet, Path]]:
    """The sheets whose pictures a page shows, with the places of these."""
    for match in BLOCK.finditer(page.read_text()):
        if match["kind"] == "figure":
            sheet, _ = committed(match["name"])
            if sheet.done:
                yield sheet, picture_of(match["name"])


def grids() -> Iterator[tuple[Sheet, Path]]:
    """The sheets whose sample grid belongs in the repository, with its place: of tables that
    compare with the paper."""
    for table in tables.load_tables().values():
        for scale in table.models if table.paper else ():
            sheet, _ = committed(table.name, scale)
            if sheet.done:
                yield sheet, SAMPLES / f"{results.table_label(table.name, scale)}.png"


def whole_pages() -> dict[Path, str]:
    """Pages that are generated from the first line to the last, and what they should hold."""
    return {cards.CARD: cards.card()}


def stale() -> list[str]:
    """A line for every page or picture that is not current."""
    from experiments.render.pictures import is_current, plot_source, samples_source

    wanted = {page: rewritten(page) for page in PAGES} | whole_pages()
    found = [
        f"{page.relative_to(ROOT)}: its generated text is not current"
        for page, text_ in wanted.items()
        if page.read_text() != text_
    ]
    found += [
        f"{path.relative_to(ROOT)}: the picture is not of the committed results"
        for page in PAGES
        for sheet, path in pictures(page)
        if not is_current(path, plot_source(sheet))
    ]
    kept = {path: sheet for sheet, path in grids()}
    found += [
        f"{path.relative_to(ROOT)}: the grid is missing or of other runs, runs=FOLDER says where images lie"
        for path, sheet in kept.items()
        if not is_current(path, samples_source(sheet))
    ]
    return found + [
        f"{path.relative_to(ROOT)}: the grid is of no table that has results to compare"
        for path in sorted(SAMPLES.glob("*.png"))
        if path not in kept
    ]


def update() -> None:
    """Rewrite all blocks and generated pages, and draw the blocks' pictures."""
    from experiments.render.pictures import draw_plot

    for page, new in ({page: rewritten(page) for page in PAGES} | whole_pages()).items():
        if new != page.read_text():
            write_text(page, new)
    for page in PAGES:
        for sheet, path in pictures(page):
            draw_plot(sheet, path)

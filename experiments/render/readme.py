"""The generated blocks of the project's pages, from committed results alone.

A block stands between a marker and `<!-- end -->`. Markers:

    <!-- results:NAME -->   the table NAME of the registry, and where it was measured;
                            NAME-natural is that table on the models of natural images
    <!-- figure:NAME -->    its picture, written to experiments/results/figures/NAME.png
    <!-- samples:NAME -->   images of its runs, kept as experiments/results/samples/NAME.png
    <!-- claims -->         the paper's statements with what the twins show
    <!-- registry -->       all tables: what they reproduce, and the minutes that their results took
    <!-- compare:NAME -->   one metric of the table NAME: a line a method, a column a model
    <!-- overview -->       what came out, in five pictures and five sentences
    <!-- official:NAME -->  figures or origin of the comparison with the official code
    <!-- published -->      figures that authors of rival methods publish
    <!-- groups:NAME -->    the table NAME of sensitivities: KL of the largest groups alone
    <!-- walks -->          commands on released shapes that were run once: estimated and taken

Some take settings: `<!-- results:main model=rar_twin quant=w6a6 columns=kl,nll -->` shows these
lines and columns only; several values stand with commas, in quotes where they have spaces.
`length=256 variant=bf16,int8` or `batch=100` picks speeds, and `extras=true` of `compare` says what
methods need beyond static rounding. `<!-- figure:NAME plot=ranking quant=w6a6 -->` draws another
picture than the table's own, of these lines. A figure inside a sentence is
`<!-- quote:NAME -->...<!-- end -->`, of those in `quotes.py`. The model cards, a page of their own,
are generated as a whole.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from experiments.estimate.walks import walks_block
from experiments.identity.results import committed_results
from experiments.registry import tables
from experiments.registry.labels import (
    COST_HEADINGS,
    METRIC_HEADINGS,
    describe_seeds,
    describe_sizes,
)
from experiments.render import claims, files
from experiments.render.comparisons import arrange_groups, compare_models, published_block
from experiments.render.formats import format_markdown
from experiments.render.numbers import NOTHING
from experiments.render.official import official_block
from experiments.render.overview import Highlight, name_picture, overview_block, picture_of
from experiments.render.quotes import LoadSheet, quote_figure
from experiments.render.sheet import Line, Result, Sheet, build_sheet, name_models
from experiments.render.text import (
    TextTable,
    arrange_sheet,
    describe_picture,
    describe_revisions,
    describe_samples,
    report_of,
)
from experiments.store import results
from experiments.store.files import write_text
from experiments.train_zoo import model_cards
from ptq.spec import ConfigError, require

ROOT = Path(__file__).parents[2]
FIGURES = results.ROOT / "figures"  # committed, as are the samples
SAMPLES = results.ROOT / "samples"
PAGES = (
    ROOT / "README.md",
    ROOT / "experiments" / "README.md",
    ROOT / "experiments" / "OFFICIAL.md",
    ROOT / "experiments" / "REPRODUCE.md",
    ROOT / "ptq" / "int8" / "README.md",
    ROOT / "ptq" / "staq" / "README.md",
    results.ROOT / "README.md",
    results.ROOT / "FINDINGS.md",
    results.ROOT / "FORMATS.md",
    results.ROOT / "METHODS.md",
    results.ROOT / "NATURAL.md",
    results.ROOT / "PAPER.md",
    results.ROOT / "SPEED.md",
)
KINDS = (
    "results",
    "figure",
    "samples",
    "claims",
    "registry",
    "compare",
    "official",
    "overview",
    "published",
    "groups",
    "walks",
)
WITH_SETTINGS = ("results", "figure", "compare", "groups")
BLOCK = re.compile(
    rf"(?P<open><!-- (?P<kind>{'|'.join(KINDS)})(?::(?P<name>\S+))?"
    r"(?P<settings>(?: \w+=(?:\"[^\"\n]*\"|\S+))*) -->\n)"
    r".*?(?P<close>\n?<!-- end -->)",
    re.DOTALL,
)
QUOTE = re.compile(r"(?P<open><!-- quote:(?P<name>\S+) -->)[^\n]*?(?P<close><!-- end -->)")
# Markdown takes a line that begins with a comment as HTML, and shows its links as they are written
BEGINS_LINE = re.compile(r"^\s*(?:[-*] |\d+\. )?<!-- quote:(\S+)", re.MULTILINE)
MARKER = re.compile(rf"<!-- (?:{'|'.join(KINDS)}|quote)\b")


def committed_sheet(name: str, scale: str = "twin") -> tuple[Sheet, list[str]]:
    """The sheet of a table from its committed results, and a line for every ignored file.

    Raises:
        ConfigError: there is no such table, or its results do not make one.
    """
    table = tables.find_table(name)
    committed, ignored = committed_results(results.table_label(name, scale))
    return build_sheet(table, scale, committed), ignored


class Sheets:
    """The sheets of tables, each read once: a page quotes a table many times."""

    def __init__(self) -> None:
        self._sheets: dict[str, Sheet] = {}

    def __call__(self, name: str) -> Sheet:
        if name not in self._sheets:
            self._sheets[name] = committed_sheet(*tables.split_label(name))[0]
        return self._sheets[name]


# --- sentences below a table


def measured_on(sheet: Sheet) -> str:
    """Seeds, sizes, device, versions and revisions of the results, as a sentence; empty if there
    are none."""
    if not sheet.done:
        return ""
    found: list[Result] = []
    for line in sheet.done:
        found += line.results
    devices = set()
    for result in found:
        origin = result["provenance"]
        if "versions" in origin:
            versions = origin["versions"]
            devices.add(f"{versions['device']}, torch {versions['torch']}")
    sentence = describe_seeds(seed_counts(sheet))
    if sheet.table.what == "run":
        sizes = describe_sizes(found)
        sentence += f", {sizes}" if sizes else ""
    if devices:
        sentence += "; " + "; ".join(sorted(devices))
    return f"{sentence}; {describe_revisions(sheet)}."


def seed_counts(sheet: Sheet) -> list[int]:
    """How many seeds each line has that was measured."""
    return [len(line.results) for line in sheet.done]


def describe_selectors(sheet: Sheet) -> str:
    """Which calibration and scope all quantized rows share, as a sentence; empty if they differ."""
    if sheet.table.what != "run":
        return ""
    used = set()
    for line in sheet.done:
        if line.quant is None:
            continue  # full precision has neither
        for result in line.results:
            used.add((result["cell"].get("calib"), result["cell"].get("scope")))
    if len(used) != 1:
        return ""
    selector, scope = used.pop()
    return f"All quantized rows: `calib={selector}`, `scope={scope}`. "


# --- blocks


def select_part(sheet: Sheet, settings: dict[str, str]) -> tuple[Sheet, list[str] | None]:
    """The lines and columns that a marker asks for.

    Raises:
        ConfigError: it asks for what is not there.
    """
    picks = {key: values.split(",") for key, values in settings.items()}
    columns = picks.pop("columns", None)
    if sheet.table.what == "speed":
        for key in picks.keys() & {"length", "batch", "variant"}:  # a set of its own: picks shrinks
            sheet = select_speeds(sheet, key, picks.pop(key))
    sheet = sheet.restricted(picks)
    if columns is None:
        return sheet, files.shown_columns(sheet)
    is_run = sheet.table.what == "run"
    allowed = (*METRIC_HEADINGS, *COST_HEADINGS) if is_run else tuple(sheet.metrics())
    for column in columns:
        require("columns", column, allowed)
    return sheet, columns


def select_speeds(sheet: Sheet, key: str, values: list[str]) -> Sheet:
    """A sheet of speeds with those measurements alone whose `key` is among the values.

    Raises:
        ConfigError: there is none with one of the values.
    """
    known: dict[str, None] = {}  # in the order of the reports
    for line in sheet.done:
        for entry in report_of(line)["lines"]:
            known[str(entry[key])] = None
    for value in values:
        require(key, value, tuple(known))
    lines = [select_entries(line, key, values) for line in sheet.lines]
    return replace(sheet, lines=tuple(lines))


def select_entries(line: Line, key: str, values: list[str]) -> Line:
    """A line whose reports have those entries alone whose `key` is among the values."""
    selected = []
    for result in line.results:
        detail = result["detail"]
        entries = [entry for entry in detail["lines"] if str(entry[key]) in values]
        selected.append({**result, "detail": {**detail, "lines": entries}})
    return replace(line, results=tuple(selected))


def table_block(name: str, settings: dict[str, str], sheets: LoadSheet | None = None) -> str:
    """A table of committed results, and where it was measured."""
    sheet, columns = select_part((sheets or Sheets())(name), settings)
    if not sheet.done:
        return describe_absence("Not run", name)
    shown, absence = leave_out_untried(sheet)
    table = format_markdown(arrange_sheet(shown, columns))
    return f"{table}\n\n{absence}{describe_origin(sheet, name)}"


def leave_out_untried(sheet: Sheet) -> tuple[Sheet, str]:
    """A table of runs without the rows that nobody ran of models that have others, and a sentence
    that counts these by their bits."""
    measured_models = name_models(sheet.done)
    shown = []
    left_out: dict[str, int] = {}
    for line in sheet.lines:
        if sheet.table.what == "run" and not line.tried and line.model in measured_models:
            left_out[line.bits] = left_out.get(line.bits, 0) + 1
        else:
            shown.append(line)
    if not left_out:
        return sheet, ""
    counts = []
    for bits, count in left_out.items():
        counts.append(f"{count} at {bits}")
    sentence = f"Rows that are not run yet: {', '.join(counts)}. "
    return replace(sheet, lines=tuple(shown)), sentence


def compare_block(name: str, settings: dict[str, str], sheets: LoadSheet) -> str:
    """One metric of a table's methods on its models: means, and how many seeds they are of."""
    metric = settings.pop("metric", "kl")
    require("metric", metric, tuple(METRIC_HEADINGS))
    extras = settings.pop("extras", "false")
    require("extras", extras, ("false", "true"))
    sheet, _ = select_part(sheets(name), settings)
    if not sheet.done:
        return describe_absence("Not run", name)
    table = format_markdown(compare_models(sheet, metric, with_extras=extras == "true"))
    counts = seed_counts(sheet)
    seeds = describe_seeds(counts)
    if min(counts) < sheet.seeds:
        seeds += f", in brackets where there are fewer than {sheet.seeds}"
    origin = f"Raw results, each with its origin: `experiments/results/{name}`."
    return f"{table}\n\n{describe_selectors(sheet)}{seeds}. {origin}"


def groups_block(name: str, settings: dict[str, str], sheets: LoadSheet) -> str:
    """Where the loss of quantized models comes from, and where it was measured."""
    require("groups", name, ("sensitivity", "sensitivity-natural"))
    sheet, _ = select_part(sheets(name), settings)
    if not sheet.done:
        return describe_absence("Not run", name)
    table = format_markdown(arrange_groups(sheet))
    return f"{table}\n\n{describe_origin(sheet, name).strip()}"


def describe_absence(state: str, name: str) -> str:
    """Why a table or picture is not there, as a sentence."""
    return (
        f"{state}: no result of this version is committed under `experiments/results/{name}` yet."
    )


def describe_origin(sheet: Sheet, name: str) -> str:
    """How and where the results of a sheet were measured, and where they are."""
    origin = f"{describe_selectors(sheet)}{measured_on(sheet)}"
    return f"{origin} Raw results: `experiments/results/{name}`."


def select_picture(sheet: Sheet, settings: Mapping[str, str]) -> tuple[Sheet, Path]:
    """What the picture of a table shows, and the place of its committed file.

    `plot=` draws another one than the table's own; other settings pick lines. All are in the
    file's name.

    Raises:
        ConfigError: a setting is not allowed.
    """
    picks = dict(settings)
    plot = picks.pop("plot", sheet.table.plot)
    shown = select_part(sheet, picks)[0] if picks else sheet
    shown = replace(shown, table=replace(sheet.table, plot=plot))
    return shown, FIGURES / f"{name_picture(sheet.name, settings)}.png"


def figure_block(name: str, settings: dict[str, str], page: Path, sheets: LoadSheet) -> str:
    """A link to the picture of a table; a sentence where nothing is measured yet."""
    sheet, path = select_picture(sheets(name), settings)
    return link_picture(sheet, describe_picture(sheet), path, page)


def samples_block(name: str, page: Path, sheets: LoadSheet) -> str:
    """A link to the images of a table's runs; a sentence where nothing is measured yet."""
    sheet = sheets(name)
    return link_picture(sheet, describe_samples(sheet), SAMPLES / f"{name}.png", page)


def link_picture(sheet: Sheet, words: str, path: Path, page: Path) -> str:
    """A link from a page to a picture of a table; `words` say what it shows."""
    if not sheet.done:
        return describe_absence("Not drawn", sheet.name)
    return f"![{words}]({os.path.relpath(path, page.parent)})"


def device_minutes(committed: Iterable[Result]) -> str:
    """Minutes of a device that results took, and how many recorded it if not all did.

    Workers that share a device count a cell's seconds in equal parts.
    """
    minutes = []
    total = 0
    for result in committed:
        total += 1
        cost = result["cost"]
        if cost.get("cell_s") is not None and cost.get("workers"):
            minutes.append(cost["cell_s"] / cost["workers"] / 60)
    if not minutes:
        return NOTHING
    partly = f" ({len(minutes)} of {total})" if len(minutes) < total else ""
    return f"{sum(minutes):.1f}{partly}"


def registry_block() -> str:
    """All tables of the registry: what they reproduce, what they cost, and their results.

    The line "all" counts results that tables share once.
    """
    lines: list[list[str]] = []
    distinct: dict[str, Result] = {}  # by hash of the run
    for table in tables.load_tables().values():
        committed = committed_results(table.name)[0]
        for result in committed:
            key = result["provenance"]["hash"]
            # of two copies the one that says what it cost
            if "workers" in result["cost"] or key not in distinct:
                distinct[key] = result
        reproduces = table.reproduces or NOTHING
        counts = [str(len(committed)), device_minutes(committed)]
        lines.append([table.name, table.title, reproduces, table.cost, *counts])
    totals = [str(len(distinct)), device_minutes(distinct.values())]
    lines.append(["all", NOTHING, NOTHING, NOTHING, *totals])
    heads = ["Name", "What", "Reproduces", "Cost", "Results", "Device [min]"]
    return format_markdown(TextTable(pd.DataFrame(lines, columns=heads), code=frozenset({0})))


def find_highlight(highlight: Highlight) -> Path:
    """Where the committed picture of a highlight is."""
    return picture_of(highlight, FIGURES, SAMPLES)


def parse_settings(text: str) -> dict[str, str]:
    """The settings of a marker; values may stand in quotes."""
    return dict(setting.split("=", 1) for setting in shlex.split(text))


def block_contents(match: re.Match[str], page: Path, sheets: LoadSheet) -> str:
    """What belongs inside a block."""
    kind = match["kind"]
    name = match["name"]
    settings = parse_settings(match["settings"])
    if settings and kind not in WITH_SETTINGS:
        given = match["settings"].strip()
        raise ConfigError(f"{page.name}: {kind} takes no settings, but has {given}")
    writers: dict[str, Callable[[], str]] = {
        "results": lambda: table_block(name, settings, sheets),
        "compare": lambda: compare_block(name, settings, sheets),
        "groups": lambda: groups_block(name, settings, sheets),
        "figure": lambda: figure_block(name, settings, page, sheets),
        "samples": lambda: samples_block(name, page, sheets),
        "official": lambda: official_block(name),
        "overview": lambda: overview_block(page, sheets, find_highlight),
        "registry": registry_block,
        "walks": walks_block,
        "published": published_block,
        "claims": claims.format_claims,
    }
    try:
        return writers[kind]()
    except ConfigError as error:
        raise ConfigError(f"{page.name}: {kind}:{name}: {error}") from error


# --- pages


def rewrite_page(page: Path, sheets: LoadSheet | None = None) -> str:
    """The text of a page with all blocks and quoted figures current.

    Raises:
        ConfigError: a marker names what is not there, or lacks its end.
    """
    text = page.read_text()
    load_sheet = sheets or Sheets()
    # a block without its end reaches to that of the next one, and hides its marker
    markers = len(MARKER.findall(text))
    blocks = len(BLOCK.findall(text)) + len(QUOTE.findall(text))
    if markers != blocks:
        raise ConfigError(
            f"{page.name}: {markers} markers of generated blocks, but {blocks} whole blocks"
        )
    misplaced = BEGINS_LINE.search(text)
    if misplaced:
        raise ConfigError(
            f"{page.name}: quote:{misplaced[1]} begins a line, which Markdown shows as HTML; "
            "a word has to stand before it"
        )

    def rewrite_block(match: re.Match[str]) -> str:
        return f"{match['open']}{block_contents(match, page, load_sheet)}\n<!-- end -->"

    def rewrite_quote(match: re.Match[str]) -> str:
        try:
            return f"{match['open']}{quote_figure(match['name'], load_sheet)}<!-- end -->"
        except ConfigError as error:
            raise ConfigError(f"{page.name}: {error}") from error

    return QUOTE.sub(rewrite_quote, BLOCK.sub(rewrite_block, text))


def whole_pages() -> dict[Path, str]:
    """Pages that are generated from the first line to the last, and what they should hold."""
    return {model_cards.CARD: model_cards.compose_cards()}


def current_pages() -> dict[Path, str]:
    """What every page should hold."""
    sheets = Sheets()
    return {page: rewrite_page(page, sheets) for page in PAGES} | whole_pages()


def page_pictures(page: Path, sheets: LoadSheet) -> Iterator[tuple[Sheet, Path]]:
    """The sheets whose pictures a page shows, with the places of these."""
    for match in BLOCK.finditer(page.read_text()):
        if match["kind"] == "figure":
            sheet = sheets(match["name"])
            shown, path = select_picture(sheet, parse_settings(match["settings"]))
            if shown.done:
                yield shown, path


def sample_grids() -> Iterator[tuple[Sheet, Path]]:
    """The sheets of tables that compare with the paper, and galleries, with the place of their
    committed picture of samples."""
    for table in tables.load_tables().values():
        for scale in filter(table.keeps_samples, table.models):
            sheet, _ = committed_sheet(table.name, scale)
            if sheet.done:
                yield sheet, SAMPLES / f"{results.table_label(table.name, scale)}.png"


def find_stale() -> list[str]:
    """A line for every page or picture that is not current."""
    lines = []
    for path, fault in (*stale_pages(), *stale_plots(), *stale_samples()):
        lines.append(f"{path.relative_to(ROOT)}: {fault}")
    return lines


def stale_pages() -> Iterator[tuple[Path, str]]:
    """Pages whose text is not current, with what is wrong."""
    for page, text in current_pages().items():
        if page.read_text() != text:
            yield page, "its generated text is not current"


def stale_plots() -> Iterator[tuple[Path, str]]:
    """Plots on pages that are not current, with what is wrong."""
    # late: the text of pages needs no matplotlib
    from experiments.render.pictures import is_current, plot_source

    sheets = Sheets()
    for page in PAGES:
        for sheet, path in page_pictures(page, sheets):
            if not is_current(path, plot_source(sheet)):
                yield path, "the picture is not of the committed results"


def stale_samples() -> Iterator[tuple[Path, str]]:
    """Committed sample grids that are not current, with what is wrong."""
    from experiments.render.pictures import is_current, samples_source

    wanted = set()
    for sheet, path in sample_grids():
        wanted.add(path)
        if not is_current(path, samples_source(sheet)):
            yield path, "the grid is missing or of other runs, runs=FOLDER says where images lie"
    for path in sorted(SAMPLES.glob("*.png")):
        if path not in wanted:
            yield path, "the grid is of no table that has results to compare"


def update_pages() -> None:
    """Rewrite all blocks and generated pages, and draw the blocks' pictures."""
    from experiments.render.pictures import draw_plot

    for page, text in current_pages().items():
        if text != page.read_text():  # a current file keeps its time stamp
            write_text(page, text)
    sheets = Sheets()
    for page in PAGES:
        for sheet, path in page_pictures(page, sheets):
            draw_plot(sheet, path)

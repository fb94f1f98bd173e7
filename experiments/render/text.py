"""Sheets as tables of text: which lines and columns a table has, and what stands in its cells."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from experiments.registry.labels import method_label, method_place
from experiments.registry.paper import paper_speed
from experiments.render.numbers import (
    NOTHING,
    SPENT_HEADINGS,
    find_heading,
    format_column,
    format_mean,
    format_setting,
    format_single,
)
from experiments.render.sheet import Line, Sheet, name_models, names_among

REVISION_LETTERS = 8  # of a revision, in notes
Report = Mapping[str, Any]  # what `experiments.speed` writes of a model
# how many times as fast an entry is as BF16: of the revision before (`baseline=`), and beside it
SPEED_UPS = ["× BF16 before", "× BF16"]
PAPER_VARIANTS = {  # modes in the paper's table of speeds: our variant
    "FP": "fp32",
    "INT8 PTQ4ARVG": "int8_stwq",
    "INT8 QuaRot": "int8_quarot",
    "INT8 SmoothQuant per-tensor": "int8",
    "INT8 SmoothQuant dynamic token-wise": "int8_dynamic",
    "INT8 SmoothQuant+STWQ": "int8_stwq",
}


@dataclass(frozen=True)
class TextTable:
    """A table ready to be written.

    Attributes:
        cells: text; the columns are called as their heads.
        groups: first line of every model but the first, where a rule may stand.
        code: numbers of the columns that are code.
        note: what is said below.
        tags: model, bits and row of every line, by which a page may filter; empty if lines are not
            of these.
    """

    cells: pd.DataFrame
    groups: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    note: str = ""
    tags: tuple[tuple[str, str, str], ...] = ()


def arrange_sheet(sheet: Sheet, columns: Sequence[str] | None = None) -> TextTable:
    """The table that suits what was measured; see `arrange_runs` for `columns`."""
    if sheet.table.what == "run":
        return arrange_runs(sheet, columns)
    if sheet.table.what == "recipes":
        return arrange_settings(sheet)
    if sheet.table.what == "speed":
        return arrange_speed(sheet)
    return arrange_quantities(sheet)


def describe_revisions(sheet: Sheet) -> str:
    """Of which revisions of the code the results are, most of them first; empty without results."""
    counts: Counter[str] = Counter()
    for line in sheet.done:
        for result in line.results:
            counts[name_revision(result["provenance"])] += 1
    if not counts:
        return ""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    if len(names) == 1:
        return f"revision {names[0]}"
    counted = []
    for name in names:
        counted.append(f"{name} ({counts[name]})")
    return f"revisions {', '.join(counted)}"


def name_revision(provenance: Mapping[str, Any]) -> str:
    """The revision that a result is of, short, and what is wrong with it."""
    revision = provenance.get("revision")
    if not revision:
        return "unknown"
    name = revision[:REVISION_LETTERS]
    return f"{name} with uncommitted changes" if revision.endswith("+") else name


def with_revisions(table: TextTable, sheet: Sheet) -> TextTable:
    """The table with the revisions of its results in its note."""
    revisions = describe_revisions(sheet)
    if not revisions:
        return table
    sentence = f"Results of {revisions}."
    return replace(table, note=f"{table.note} {sentence}".strip())


def describe_picture(sheet: Sheet) -> str:
    """What a picture of a table shows, for who cannot see it: its title, and what is best."""
    models = name_models(sheet.done)
    metric = sheet.headline()
    if sheet.table.what != "run" or metric is None:
        return f"{sheet.table.title}; {', '.join(models)}"
    heading, digits = find_heading(metric)
    lines = describe_lines(sheet).join(sheet.over_seeds(metric).astype(float))
    lines = lines.dropna(subset="mean").sort_values("mean", kind="stable")
    best = []
    for model in models:
        members = lines[lines["model"] == model]
        if not members.empty:
            first = members.iloc[0]
            figure = format_mean(first["mean"], math.nan, digits)
            best.append(f"{model} {first['label']} ({first['bits']}) {figure}")
    return f"{sheet.table.title}. Lowest {heading}: {'; '.join(best)}"


def describe_samples(sheet: Sheet) -> str:
    """What a picture of samples shows, for who cannot see it."""
    models = name_models(sheet.done)
    rows = list(dict.fromkeys(line.row for line in sheet.done))
    if not sheet.table.gallery:
        models = models[:1]
    return f"{sheet.table.title}. Images of {', '.join(models)} by {', '.join(rows)}"


# --- runs: one line per row of the table


def arrange_runs(
    sheet: Sheet, columns: Sequence[str] | None = None, with_paper: bool = True
) -> TextTable:
    """One line per row: model, bits, method, the paper's figures, ours, and what is not measured.

    Models of the twins' scale of which nothing was run are named in the note and take no lines.

    Args:
        columns: metrics and costs to show; None stands for all quality metrics that are there.
    """
    untried = untried_models(sheet) if sheet.scale == "twin" else []
    lines = describe_lines(sheet)
    lines = lines[~lines["model"].isin(untried)]
    several_models = lines["model"].nunique() > 1

    cells = pd.DataFrame(index=lines.index)  # one row per line that is shown
    if several_models:
        cells["Model"] = lines["model"]
    if lines["bits"].nunique() > 1:
        cells["Bits"] = lines["bits"]
    cells["Method"] = lines["label"]
    if with_paper:
        add_paper_columns(cells, sheet)
    for name in sheet.metrics() if columns is None else columns:
        heading, digits = find_heading(name)
        cells[heading] = format_column(sheet.over_seeds(name).loc[lines.index], digits)
    if (lines["state"] != "measured").any():
        cells["State"] = lines["state"]

    is_first = lines["model"] != lines["model"].shift()
    groups = np.flatnonzero(is_first)[1:].tolist()  # no rule above the first model
    code = {0} if several_models else set()
    note = f"{sheet.describe_hidden()} {describe_gaps(sheet, untried)}".strip()
    frame = cells.reset_index(drop=True).astype(str)
    tags = tuple(lines[["model", "bits", "row"]].itertuples(index=False, name=None))
    return TextTable(frame, frozenset(groups), frozenset(code), note, tags)


def describe_lines(sheet: Sheet) -> pd.DataFrame:
    """`Sheet.places` with columns of text that tell lines apart.

    `settings` has bits and values of the grid; `label` the row, with the latter if they differ.
    """
    axes = sheet.axes()
    texts = []
    for line in sheet.lines:
        settings = ", ".join([line.bits, *format_point(line, axes)])
        texts.append([line.bits, settings, label_line(line, axes)])
    return sheet.places.join(pd.DataFrame(texts, columns=["bits", "settings", "label"]))


def add_paper_columns(cells: pd.DataFrame, sheet: Sheet) -> None:
    """Add the paper's figures; what stands for a twin in the paper has another name."""
    metrics = sheet.paper_metrics()
    if metrics and sheet.scale == "twin":
        models = sheet.paper_figures["paper_model"].groupby("line").first()  # index: line
        cells["Paper's model"] = models.reindex(cells.index).fillna(NOTHING)
    for metric in metrics:
        heading = f"Paper: {find_heading(metric)[0]}"
        # NaN where the paper has no figure of the line
        figures = sheet.paper_figures["paper"].xs(metric, level="metric").reindex(cells.index)
        cells[heading] = [format_single(figure, 2) for figure in figures]


def arrange_costs(sheet: Sheet) -> TextTable:
    """Times, memory and bytes of every row: mean over seeds."""
    costs = names_among(SPENT_HEADINGS, sheet.known)
    return arrange_runs(sheet, costs, with_paper=False)


def untried_models(sheet: Sheet) -> list[str]:
    """Models of which nothing was run."""
    is_untried = sheet.places["state"] == "not run"
    untried = is_untried.groupby(sheet.places["model"], sort=False).all()  # index: model
    return list(untried.index[untried])


def label_line(line: Line, axes: Sequence[str]) -> str:
    """The row's name, with the settings in which the lines of the table differ."""
    settings = format_point(line, axes)
    return f"{line.row} ({', '.join(settings)})" if settings else line.row


def format_point(line: Line, axes: Sequence[str]) -> list[str]:
    """The values of a line on the axes, as `calib=dgc` and `n=8`."""
    settings = []
    for key in axes:
        if key in line.point:
            name = key.rpartition(".")[2]
            settings.append(f"{name}={line.point[key]}")
    return settings


def describe_gaps(sheet: Sheet, untried: Sequence[str]) -> str:
    """A note on what was not run, and on cells that failed."""
    sentences = []
    if untried:
        sentences.append(f"Not run: {', '.join(dict.fromkeys(untried))}.")
    axes = sheet.axes()
    for line in sheet.lines:
        bits = [line.bits] if line.quant else []
        name = " ".join((line.model, *bits, label_line(line, axes)))
        for failure in line.failures:
            sentences.append(f"Failed: {name}: {failure['error']}.")
    return " ".join(dict.fromkeys(sentences))  # seeds fail alike


def untried_lines(sheet: Sheet) -> list[str]:
    """Models of which nothing was run, and such rows of other models."""
    models = untried_models(sheet)
    names = []
    for line in sheet.lines:
        if not line.tried:
            names.append(line.model if line.model in models else f"{line.model} {line.row}")
    return names


# --- measurements of analyses: one line per quantity


def arrange_quantities(sheet: Sheet) -> TextTable:
    """One line per quantity, one column per model (and row, where there are several)."""
    several_rows = sheet.results["row"].nunique() > 1
    heads: dict[int, str] = {}  # by number of the line
    for number, line in enumerate(sheet.lines):
        if line.results:
            heads[number] = f"{line.model}, {line.row}" if several_rows else line.model
    numbers = list(heads)
    cells = []
    for name in sheet.metrics():
        stem, _, part = name.rpartition(".")  # of <kind>.<name>.<part>
        if part == "real":  # three figures belong together
            approximations = format_approximations(sheet, stem, numbers)
            cells.append([f"{stem}: exact / approximate (bias)", *approximations])
        elif part not in ("approx", "bias"):
            figures = sheet.over_seeds(name).loc[numbers]  # columns: mean, std, seeds
            cells.append([name, *format_column(figures, find_heading(name)[1])])
    frame = pd.DataFrame(cells, columns=["Quantity", *heads.values()], dtype=str)
    return TextTable(frame, note=describe_gaps(sheet, untried_lines(sheet)))


def format_approximations(sheet: Sheet, stem: str, numbers: Sequence[int]) -> list[str]:
    """An exact figure, what approximates it, and the relative difference, of some lines."""
    exact = sheet.over_seeds(f"{stem}.real")["mean"]
    approximate = sheet.over_seeds(f"{stem}.approx")["mean"]
    bias = sheet.over_seeds(f"{stem}.bias")["mean"]
    texts = []
    for number in numbers:
        figures = [exact[number], approximate[number], bias[number]]
        known = not pd.isna(figures).any()
        texts.append("{:.4g} / {:.4g} ({:.1%})".format(*figures) if known else NOTHING)
    return texts


def arrange_settings(sheet: Sheet) -> TextTable:
    """What recipes say of themselves (`what: recipes`): a line per row, a column per setting."""
    heads: dict[str, None] = {"Method": None}  # in the order in which lines name them
    cells = {}
    for line in sheet.done:
        settings = line.results[0]["detail"]["settings"]
        if not settings:
            continue  # full precision has none
        label = label_line(line, sheet.axes())
        texts = {key: format_setting(value) for key, value in settings.items()}
        cells[label] = {"Method": label, **texts}
        heads.update(dict.fromkeys(settings))
    frame = pd.DataFrame(list(cells.values()), columns=list(heads)).fillna(NOTHING)
    return TextTable(frame, note=describe_gaps(sheet, untried_lines(sheet)))


# --- reports of `experiments.speed`: several lines per model


def arrange_speed(sheet: Sheet) -> TextTable:
    """Reports in the layout of what they measure."""
    layouts = {
        "blocks": arrange_passes,
        "calibrate": arrange_calibrations,
        "generate": arrange_generations,
    }
    note = describe_gaps(sheet, untried_lines(sheet))
    if not sheet.done:
        return TextTable(pd.DataFrame(), note=note)
    what = report_of(sheet.done[0])["what"]
    return layouts[what](sheet.done, note)


def report_of(line: Line) -> Report:
    """What a line's measurement wrote: one report, whatever the seeds."""
    return line.results[0]["detail"]


def first_entries(lines: Sequence[Line]) -> frozenset[int]:
    """Where the entries of every model but the first begin, counted over all reports."""
    sizes = [len(report_of(line)["lines"]) for line in lines]
    return frozenset(itertools.accumulate(sizes[:-1]))


def arrange_calibrations(lines: Sequence[Line], note: str) -> TextTable:
    """Reports of `what=calibrate`: seconds and memory by model and method.

    Methods have the order of other tables. The state has a column if not all is measured.
    """
    heads = ["Model", "Method", "Calibration [s]", "Peak [MiB]", "Scaled from", "State"]
    cells = []
    for line in lines:
        report = report_of(line)
        for entry in sorted(report["lines"], key=entry_place):
            name = method_label(entry["method"])
            cells.append([line.model, name, *format_calibration(entry, report["blocks"])])
    frame = pd.DataFrame(cells, columns=heads, dtype=str)
    if (frame["State"] == "measured").all():
        frame = frame.drop(columns="State")
    groups = first_entries(lines)
    return TextTable(frame, groups, frozenset({0}), note)


def entry_place(entry: Mapping[str, Any]) -> int:
    """The place of an entry's method in tables."""
    return method_place(entry["method"])


def format_calibration(entry: Mapping[str, Any], blocks: int) -> list[str]:
    """Seconds, MiB, trained blocks and state of a method; of one that failed or was refused why."""
    for key, state in (("error", "failed"), ("refused", "refused")):
        if key in entry:
            return [NOTHING, NOTHING, NOTHING, f"{state}: {entry[key]}"]
    trained = entry["blocks_trained"]
    return [
        format_single(entry["calibration_s"], 1),
        format_single(entry["calibration_peak_mb"], 0),
        NOTHING if trained is None else f"{trained} of {blocks} blocks",
        "measured",
    ]


def arrange_generations(lines: Sequence[Line], note: str) -> TextTable:
    """Reports of `what=generate`: seconds a batch and memory by model, images and variant."""
    heads = [
        "Model",
        "Images",
        "Variant",
        "Time [s]",
        "Images/s",
        *SPEED_UPS,
        "Peak [MiB]",
        "Model [MiB]",
    ]
    cells = []
    for line in lines:
        report = report_of(line)
        for entry in report["lines"]:
            images = images_of(entry, report)
            cells.append(
                [
                    line.model,
                    str(images),
                    entry["variant"],
                    format_single(entry["seconds"], 3),
                    format_single(entry["images_per_s"], 1),
                    *format_speed_ups(entry, same_size(report, images, images_of), "seconds"),
                    format_single(entry["peak_mb"], 0),
                    format_single(entry["model_mb"], 0),
                ]
            )
    groups = first_entries(lines)
    frame = drop_unmeasured(pd.DataFrame(cells, columns=heads, dtype=str))
    return TextTable(frame, groups, frozenset({0, 2}), note)


def images_of(entry: Mapping[str, Any], report: Report) -> int:
    """Images at a time of an entry of `what=generate`."""
    return entry.get("batch", report["rows"])


def length_of(entry: Mapping[str, Any], report: Report) -> int:
    """Tokens of a row of an entry of `what=blocks`."""
    return entry["length"]


def same_size(
    report: Report, size: int, size_of: Callable[[Mapping[str, Any], Report], int]
) -> dict[str, Mapping[str, Any]]:
    """The entries of one size by variant."""
    entries = {}
    for entry in report["lines"]:
        if size_of(entry, report) == size:
            entries[entry["variant"]] = entry
    return entries


def format_speed_ups(
    entry: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], key: str
) -> list[str]:
    """How many times as fast as BF16 of a former revision, and as BF16 of this one, an entry is.

    Args:
        variants: the entries of the same size by variant. key: of the time.
    """
    bf16 = variants.get("bf16")
    now = None if bf16 is None else bf16[key] / entry[key]
    return [format_single(entry.get("speedup"), 2), format_single(now, 2)]


def drop_unmeasured(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without the columns of speed-ups that no entry has."""
    missing = [head for head in SPEED_UPS if (frame[head] == NOTHING).all()]
    return frame.drop(columns=missing)


def arrange_passes(lines: Sequence[Line], note: str) -> TextTable:
    """Reports of `what=blocks`: time and memory of a pass, by model, length and variant."""
    heads = [
        "Model",
        "Tokens",
        "Variant",
        "Paper: latency [ms]",
        "Paper: peak [MB]",
        "Latency [ms]",
        "Speed-up over FP32",
        *SPEED_UPS,
        "Peak [MiB]",
    ]
    cells = []
    for line in lines:
        report = report_of(line)
        for entry in compare_passes(line).to_dict("records"):
            variants = same_size(report, entry["length"], length_of)
            cells.append(
                [
                    line.model,
                    str(entry["length"]),
                    entry["variant"],
                    format_single(entry["latency_ms"], 0),
                    format_single(entry["peak_memory_MB"], 0),
                    format_single(entry["median_ms"], 2),
                    format_single(entry["over_fp32"], 2),
                    *format_speed_ups(variants[entry["variant"]], variants, "median_ms"),
                    format_single(entry["peak_mb"], 0),
                ]
            )
    note = f"The paper's figures are of an RTX 3090. {note}".strip()
    groups = first_entries(lines)
    frame = drop_unmeasured(pd.DataFrame(cells, columns=heads, dtype=str))
    return TextTable(frame, groups, frozenset({0, 2}), note)


def compare_passes(line: Line) -> pd.DataFrame:
    """The passes of a model, with FP32's at the same length and the paper's of the variant."""
    columns = ["length", "variant", "median_ms", "peak_mb"]
    # one row per length and variant
    passes = pd.DataFrame(report_of(line)["lines"], columns=columns)
    # index: length
    full = passes[passes["variant"] == "fp32"].set_index("length")["median_ms"]
    passes["over_fp32"] = passes["length"].map(full) / passes["median_ms"]

    paper = paper_speed()
    paper = paper[paper["model"] == line.counterpart].rename(columns={"seq_len": "length"})
    paper["variant"] = paper["mode"].map(PAPER_VARIANTS)
    # two modes of the paper are one variant here: the later line counts
    paper = paper.drop_duplicates(["length", "variant"], keep="last")
    figures = paper[["length", "variant", "latency_ms", "peak_memory_MB"]]
    # left: variants that the paper lacks stay, without its figures
    return passes.merge(figures, on=["length", "variant"], how="left")

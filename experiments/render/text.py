"""Sheets as tables of text: which lines and columns a table has, and what stands in its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.registry.labels import METHOD_LABELS
from experiments.registry.paper import paper_speed
from experiments.render.numbers import (
    NOTHING,
    SPENT_HEADINGS,
    find_heading,
    format_column,
    format_setting,
    format_single,
)
from experiments.render.sheet import Line, Sheet

Report = Mapping[str, Any]  # what `experiments.speed` writes of a model
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
    """

    cells: pd.DataFrame
    groups: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    note: str = ""


def arrange_sheet(sheet: Sheet, columns: Sequence[str] | None = None) -> TextTable:
    """The table that suits what was measured; see `arrange_runs` for `columns`."""
    if sheet.table.what == "run":
        return arrange_runs(sheet, columns)
    if sheet.table.what == "recipes":
        return arrange_settings(sheet)
    if sheet.table.what == "speed":
        return arrange_speed(sheet)
    return arrange_quantities(sheet)


# --- runs: one line per row of the table


def arrange_runs(
    sheet: Sheet, columns: Sequence[str] | None = None, with_paper: bool = True
) -> TextTable:
    """One line per row: model, bits, method, the paper's figures, ours, and the state where not all
    is measured.

    Models of the twins' scale of which nothing was run are named in the note and take no lines.

    Args:
        columns: metrics and costs to show; None stands for all quality metrics that are there.
    """
    untried = untried_models(sheet) if sheet.scale == "twin" else []
    numbers = [n for n, line in enumerate(sheet.lines) if line.model not in untried]
    lines = [sheet.lines[number] for number in numbers]
    several_models = len({line.model for line in lines}) > 1

    cells: dict[str, list[str]] = {}
    if several_models:
        cells["Model"] = [line.model for line in lines]
    if len({line.quant for line in lines}) > 1:
        cells["Bits"] = [line.bits for line in lines]
    axes = sheet.axes()
    cells["Method"] = [label_line(line, axes) for line in lines]
    if with_paper:
        cells |= paper_columns(sheet, lines)
    for name in sheet.metrics() if columns is None else columns:
        heading, digits = find_heading(name)
        cells[heading] = format_column(sheet.over_seeds(name).loc[numbers], digits)
    states = [line.state(sheet.seeds) for line in lines]
    if set(states) - {"measured"}:
        cells["State"] = states

    models = [line.model for line in lines]
    groups = [n for n in range(1, len(lines)) if models[n] != models[n - 1]]
    code = {0} if several_models else set()
    note = describe_gaps(sheet, untried)
    return TextTable(pd.DataFrame(cells, dtype=str), frozenset(groups), frozenset(code), note)


def arrange_costs(sheet: Sheet) -> TextTable:
    """Times, memory and bytes of every row: mean over seeds."""
    costs = [name for name in SPENT_HEADINGS if name in sheet.known]
    return arrange_runs(sheet, costs, with_paper=False)


def untried_models(sheet: Sheet) -> list[str]:
    """Models of which nothing was run."""
    tried = {line.model for line in sheet.lines if line.tried}
    return [model for model in sheet.models if model not in tried]


def paper_columns(sheet: Sheet, lines: Sequence[Line]) -> dict[str, list[str]]:
    """The columns of the paper's figures; what stands for a twin in the paper has another name."""
    columns = {}
    metrics = sheet.paper_metrics()
    if metrics and sheet.scale == "twin":
        names = [line.counterpart if line.paper else NOTHING for line in lines]
        columns["Paper's model"] = names
    for metric in metrics:
        heading = f"Paper: {find_heading(metric)[0]}"
        columns[heading] = [format_single(line.paper.get(metric), 2) for line in lines]
    return columns


def label_line(line: Line, axes: Sequence[str]) -> str:
    """The row's name, with the settings in which the lines of the table differ."""
    settings = format_point(line, axes)
    return f"{line.row} ({', '.join(settings)})" if settings else line.row


def format_point(line: Line, axes: Sequence[str]) -> list[str]:
    """The values of a line on the axes, as `calib=dgc` and `n=8`."""
    return [f"{key.rpartition('.')[2]}={line.point[key]}" for key in axes if key in line.point]


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
    for model in sheet.models:
        if model in models:
            names.append(model)
            continue
        rows = [line.row for line in sheet.lines if line.model == model and not line.tried]
        names += [f"{model} {row}" for row in rows]
    return names


# --- measurements of analyses: one line per quantity


def arrange_quantities(sheet: Sheet) -> TextTable:
    """One line per quantity, one column per model (and row, where there are several)."""
    numbers = [number for number, line in enumerate(sheet.lines) if line.results]
    lines = [sheet.lines[number] for number in numbers]
    heads = [line.model for line in lines]
    if len({line.row for line in lines}) > 1:
        heads = [f"{line.model}, {line.row}" for line in lines]
    cells = []
    for name in sheet.metrics():
        stem, _, part = name.rpartition(".")
        if part == "real":  # three figures belong together
            approximations = format_approximations(sheet, stem)
            shown = [approximations[number] for number in numbers]
            cells.append([f"{stem}: exact / approximate (bias)", *shown])
        elif part not in ("approx", "bias"):
            figures = sheet.over_seeds(name).loc[numbers]
            cells.append([name, *format_column(figures, find_heading(name)[1])])
    frame = pd.DataFrame(cells, columns=["Quantity", *heads], dtype=str)
    return TextTable(frame, note=describe_gaps(sheet, untried_lines(sheet)))


def format_approximations(sheet: Sheet, stem: str) -> list[str]:
    """An exact figure, what approximates it, and the relative difference, of every line."""
    means = [sheet.over_seeds(f"{stem}.{part}")["mean"] for part in ("real", "approx", "bias")]
    shown = []
    for real, approximate, bias in zip(*means):
        if pd.isna([real, approximate, bias]).any():
            shown.append(NOTHING)
        else:
            shown.append(f"{real:.4g} / {approximate:.4g} ({bias:.1%})")
    return shown


def arrange_settings(sheet: Sheet) -> TextTable:
    """What recipes say of themselves (`what: recipes`): one line per row, one column per
    setting."""
    by_label = {}
    for line in sheet.done:
        settings = line.results[0]["detail"]["settings"]
        if settings:  # full precision has none
            by_label[label_line(line, sheet.axes())] = settings
    keys = list(dict.fromkeys(key for settings in by_label.values() for key in settings))
    cells = []
    for label, settings in by_label.items():
        cells.append([label, *(format_setting(settings.get(key, NOTHING)) for key in keys)])
    frame = pd.DataFrame(cells, columns=["Method", *keys], dtype=str)
    return TextTable(frame, note=describe_gaps(sheet, untried_lines(sheet)))


# --- reports of `experiments.speed`: several lines per model


def arrange_speed(sheet: Sheet) -> TextTable:
    """Reports in the layout of what they measure."""
    arrange = {"blocks": arrange_passes, "calibrate": arrange_calibrations}
    arrange["generate"] = arrange_generations
    note = describe_gaps(sheet, untried_lines(sheet))
    if not sheet.done:
        return TextTable(pd.DataFrame(), note=note)
    return arrange[report_of(sheet.done[0])["what"]](sheet.done, note)


def report_of(line: Line) -> Report:
    """What a line's measurement wrote: one report, whatever the seeds."""
    return line.results[0]["detail"]


def first_lines(sizes: Sequence[int]) -> frozenset[int]:
    """Where the groups of lines of these sizes begin, but for the first."""
    starts = [sum(sizes[:number]) for number in range(1, len(sizes))]
    return frozenset(starts)


def arrange_calibrations(lines: Sequence[Line], note: str) -> TextTable:
    """Reports of `what=calibrate`: seconds and memory by model and method, these in the order of
    other tables, and the state where not all is measured."""
    heads = ["Model", "Method", "Calibration [s]", "Peak [MiB]", "Scaled from", "State"]
    places = {name: place for place, name in enumerate(METHOD_LABELS)}
    cells = []
    for line in lines:
        report = report_of(line)
        entries = sorted(report["lines"], key=lambda x: places.get(x["method"], len(places)))
        for entry in entries:
            name = METHOD_LABELS.get(entry["method"], entry["method"])
            cells.append([line.model, name, *format_calibration(entry, report["blocks"])])
    frame = pd.DataFrame(cells, columns=heads, dtype=str)
    if (frame["State"] == "measured").all():
        frame = frame.drop(columns="State")
    groups = first_lines([len(report_of(line)["lines"]) for line in lines])
    return TextTable(frame, groups, frozenset({0}), note)


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
    """Reports of `what=generate`: seconds a batch and memory by model and variant."""
    heads = ["Model", "Variant", "Time [s]", "Images/s", "Peak [MiB]", "Model [MiB]"]
    cells = []
    for line in lines:
        for entry in report_of(line)["lines"]:
            time = format_single(entry["seconds"], 3)
            rate = format_single(entry["images_per_s"], 1)
            peak = format_single(entry["peak_mb"], 0)
            size = format_single(entry["model_mb"], 0)
            cells.append([line.model, entry["variant"], time, rate, peak, size])
    groups = first_lines([len(report_of(line)["lines"]) for line in lines])
    frame = pd.DataFrame(cells, columns=heads, dtype=str)
    return TextTable(frame, groups, frozenset({0, 1}), note)


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
        "Peak [MiB]",
    ]
    cells = []
    for line in lines:
        for entry in compare_passes(line).to_dict("records"):
            cells.append(
                [
                    line.model,
                    str(entry["length"]),
                    entry["variant"],
                    format_single(entry["latency_ms"], 0),
                    format_single(entry["peak_memory_MB"], 0),
                    format_single(entry["median_ms"], 2),
                    format_single(entry["speedup"], 2),
                    format_single(entry["peak_mb"], 0),
                ]
            )
    note = f"The paper's figures are of an RTX 3090. {note}".strip()
    groups = first_lines([len(report_of(line)["lines"]) for line in lines])
    frame = pd.DataFrame(cells, columns=heads, dtype=str)
    return TextTable(frame, groups, frozenset({0, 2}), note)


def compare_passes(line: Line) -> pd.DataFrame:
    """The passes of a model, with FP32's at the same length and the paper's of the variant."""
    columns = ["length", "variant", "median_ms", "peak_mb"]
    passes = pd.DataFrame(report_of(line)["lines"], columns=columns)
    full = passes[passes["variant"] == "fp32"].set_index("length")["median_ms"]
    passes["speedup"] = passes["length"].map(full) / passes["median_ms"]

    paper = paper_speed()
    paper = paper[paper["model"] == line.counterpart].rename(columns={"seq_len": "length"})
    paper["variant"] = paper["mode"].map(PAPER_VARIANTS)
    # two modes of the paper are one variant here: the later line counts
    paper = paper.drop_duplicates(["length", "variant"], keep="last")
    figures = paper[["length", "variant", "latency_ms", "peak_memory_MB"]]
    return passes.merge(figures, on=["length", "variant"], how="left")

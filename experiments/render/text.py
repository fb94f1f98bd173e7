"""Sheets as text: CSV with one line per figure, and Markdown, LaTeX and HTML with one line per row
of the table."""

from __future__ import annotations

import csv
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.registry.labels import COST_HEADINGS, METHOD_LABELS, METRIC_HEADINGS
from experiments.registry.paper import paper_speed
from experiments.render.sheet import Line, Sheet, spread

NOTHING = "–"
PAPER_VARIANTS = {  # modes in the paper's table of speeds: our variant
    "FP": "fp32",
    "INT8 PTQ4ARVG": "int8_stwq",
    "INT8 QuaRot": "int8_quarot",
    "INT8 SmoothQuant per-tensor": "int8",
    "INT8 SmoothQuant dynamic token-wise": "int8_dynamic",
    "INT8 SmoothQuant+STWQ": "int8_stwq",
}
SPENT = {  # cost: (heading, digits)
    **COST_HEADINGS,
    "sampling_s": ("Sampling [s]", 1),
    "cell_s": ("Whole cell [s]", 1),
    "workers": ("Workers on the device", 0),
    "model_bytes": ("Bytes at rest", 0),
}
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    ">": r"$>$",
    "<": r"$<$",
}


@dataclass(frozen=True)
class Layout:
    """A table ready to be written: column heads, lines of cells, and which cells are code.

    Attributes:
        groups: first line of every model but the first, where a rule may stand. note: what is said
            below.
    """

    head: list[str]
    lines: list[list[str]]
    groups: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    note: str = ""


def number(values: Sequence[float], digits: int | None) -> str:
    """Mean, with the standard deviation over seeds if there are several; `digits` None stands for
    four significant.

    A mean of which three or more digits would leave less than two is written with an exponent,
    which the deviation has in common with it.
    """
    if not values:
        return NOTHING
    mean = statistics.fmean(values)
    deviation = spread(values)
    if digits is not None and digits > 2 and 0 < abs(mean) < 10 * 10**-digits:
        exponent = math.floor(math.log10(abs(mean)))
        mean, deviation = (None if v is None else v / 10**exponent for v in (mean, deviation))
        return (
            f"{mean:.1f}e{exponent}"
            if deviation is None
            else f"({mean:.1f} ± {deviation:.1f})e{exponent}"
        )
    form = ".4g" if digits is None else f".{digits}f"
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def heading(name: str) -> tuple[str, int | None]:
    """How a metric or cost is called in a table, and its digits."""
    return (METRIC_HEADINGS | SPENT).get(name, (name, None))


def label(line: Line, axes: Sequence[str]) -> str:
    """The row's name, with the settings in which the lines of the table differ."""
    settings = [f"{k.rpartition('.')[2]}={line.point[k]}" for k in axes if k in line.point]
    return line.row + (f" ({', '.join(settings)})" if settings else "")


def layout(sheet: Sheet, columns: Sequence[str] | None = None, with_paper: bool = True) -> Layout:
    """One line per row: model, bits, method, the paper's figures, ours, and the state where not all
    is measured.

    Models of the twins' scale of which nothing was run are named in the note and take no lines.

    Args:
        columns: metrics and costs to show; None stands for all quality metrics that are there.
    """
    names = list(columns) if columns is not None else sheet.metrics()
    paper = sheet.paper_metrics() if with_paper else []
    empty = [
        m
        for m in sheet.models
        if sheet.scale == "twin"
        and all(not line.results and not line.failures for line in sheet.lines if line.model == m)
    ]
    lines = [line for line in sheet.lines if line.model not in empty]
    states = [line.state(sheet.seeds) for line in lines]
    several = len({line.model for line in lines}) > 1
    axes = sheet.axes()
    bits = len({line.quant for line in lines}) > 1
    # what stands for the twin in the paper has another name
    named = sheet.scale == "twin" and bool(paper)
    incomplete = any(state != "measured" for state in states)
    head = [
        *(["Model"] if several else []),
        *(["Bits"] if bits else []),
        "Method",
        *(["Paper's model"] if named else []),
        *(f"Paper: {heading(m)[0]}" for m in paper),
        *(heading(m)[0] for m in names),
        *(["State"] if incomplete else []),
    ]
    cells = [
        [
            *([line.model] if several else []),
            *([line.bits] if bits else []),
            label(line, axes),
            *([line.counterpart if line.paper else NOTHING] if named else []),
            *(number([line.paper[m]] if m in line.paper else [], 2) for m in paper),
            *(number(line.values(m), heading(m)[1]) for m in names),
            *([state] if incomplete else []),
        ]
        for line, state in zip(lines, states)
    ]
    groups = frozenset(i for i in range(1, len(lines)) if lines[i].model != lines[i - 1].model)
    return Layout(head, cells, groups, frozenset({0} if several else ()), lacking(empty, sheet))


def lacking(empty: Sequence[str], sheet: Sheet) -> str:
    """A note on models of which nothing was run, and on cells that failed."""
    said = [f"Not run: {', '.join(dict.fromkeys(empty))}."] if empty else []
    axes = sheet.axes()
    for line in sheet.lines:
        name = " ".join((line.model, *([line.bits] if line.quant else []), label(line, axes)))
        said += [f"Failed: {name}: {failed['error']}." for failed in line.failures]
    return " ".join(dict.fromkeys(said))  # seeds fail alike


def quantities(sheet: Sheet) -> Layout:
    """A measurement of an analysis: one line per quantity, one column per model (and row, where
    there are several)."""
    lines = [line for line in sheet.lines if line.results]
    rows = len({line.row for line in lines}) > 1
    head = ["Quantity", *(f"{line.model}, {line.row}" if rows else line.model for line in lines)]
    cells = []
    for name in sheet.metrics():
        stem, _, part = name.rpartition(".")
        if part == "real":  # three figures belong together
            cells.append(
                [
                    f"{stem}: exact / approximate (bias)",
                    *(approximation(line, stem) for line in lines),
                ]
            )
        elif part not in ("approx", "bias"):
            cells.append([name, *(number(line.values(name), heading(name)[1]) for line in lines)])
    return Layout(head, cells, note=lacking(not_run(sheet), sheet))


def not_run(sheet: Sheet) -> list[str]:
    """Models of which no line has a result or a failure, and such lines of other models."""
    found = []
    for model in sheet.models:
        lines = [line for line in sheet.lines if line.model == model]
        rows = [line.row for line in lines if not line.results and not line.failures]
        found += [model] if len(rows) == len(lines) else [f"{model} {row}" for row in rows]
    return found


def approximation(line: Line, stem: str) -> str:
    """An exact figure, what approximates it, and the relative difference: means over seeds."""
    found = [line.values(f"{stem}.{part}") for part in ("real", "approx", "bias")]
    if not all(found):
        return NOTHING
    real, approx, bias = map(statistics.fmean, found)
    return f"{real:.4g} / {approx:.4g} ({bias:.1%})"


def settings(sheet: Sheet) -> Layout:
    """What recipes say of themselves (`what: recipes`): one line per row, one column per
    setting."""
    found = {
        label(line, sheet.axes()): line.results[0]["detail"]["settings"] for line in sheet.done
    }
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    # FP32 has none
    cells = [[row, *(words(v.get(k, NOTHING)) for k in keys)] for row, v in found.items() if v]
    return Layout(["Method", *keys], cells, note=lacking(not_run(sheet), sheet))


def words(value: object) -> str:
    """A setting as text: lists and mappings without their punctuation, yes and no."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items())
    return (
        ", ".join(map(words, value)) or "none" if isinstance(value, (list, tuple)) else str(value)
    )


def timing(sheet: Sheet) -> Layout:
    """Reports of `experiments.speed`, in the layout of what they measure."""
    layouts = {"blocks": passes, "calibrate": calibrations, "generate": generations}
    kinds = {line.results[0]["detail"]["what"] for line in sheet.done}
    note = lacking(not_run(sheet), sheet)
    return layouts[kinds.pop()](sheet.done, note) if kinds else Layout([], [], note=note)


def calibrations(lines: Sequence[Line], note: str) -> Layout:
    """Reports of `what=calibrate`: seconds and memory by model and method, these in the order of
    other tables, and the state where not all is measured."""
    incomplete = any(
        "calibration_s" not in x for line in lines for x in line.results[0]["detail"]["lines"]
    )
    head = [
        "Model",
        "Method",
        "Calibration [s]",
        "Peak [MiB]",
        "Scaled from",
        *(["State"] if incomplete else []),
    ]
    cells = []
    groups = []
    places = {name: place for place, name in enumerate(METHOD_LABELS)}
    for line in lines:
        report = line.results[0]["detail"]
        groups.append(len(cells))
        for found in sorted(report["lines"], key=lambda x: places.get(x["method"], len(places))):
            name = METHOD_LABELS.get(found["method"], found["method"])
            cells.append([line.model, name, *calibration(found, report["blocks"])][: len(head)])
    return Layout(head, cells, frozenset(groups[1:]), frozenset({0}), note)


def calibration(found: Mapping[str, Any], blocks: int) -> list[str]:
    """Seconds, MiB, trained blocks and state of a method; of one that failed or was refused why."""
    for key, state in (("error", "failed"), ("refused", "refused")):
        if key in found:
            return [NOTHING, NOTHING, NOTHING, f"{state}: {found[key]}"]
    trained = found["blocks_trained"]
    return [
        f"{found['calibration_s']:.1f}",
        f"{found['calibration_peak_mb']:.0f}",
        NOTHING if trained is None else f"{trained} of {blocks} blocks",
        "measured",
    ]


def generations(lines: Sequence[Line], note: str) -> Layout:
    """Reports of `what=generate`: seconds a batch and memory by model and variant."""
    head = ["Model", "Variant", "Time [s]", "Images/s", "Peak [MiB]", "Model [MiB]"]
    cells = []
    groups = []
    for line in lines:
        groups.append(len(cells))
        for found in line.results[0]["detail"]["lines"]:
            peak = NOTHING if found["peak_mb"] is None else f"{found['peak_mb']:.0f}"
            cells.append(
                [
                    line.model,
                    found["variant"],
                    f"{found['seconds']:.3f}",
                    f"{found['images_per_s']:.1f}",
                    peak,
                    f"{found['model_mb']:.0f}",
                ]
            )
    return Layout(head, cells, frozenset(groups[1:]), frozenset({0, 1}), note)


def passes(lines: Sequence[Line], note: str) -> Layout:
    """Reports of `what=blocks`: time and memory of a pass, by model, length and variant."""
    speeds = paper_speed()
    paper = {}
    for speed in speeds.astype(object).where(speeds.notna(), None).to_dict("records"):
        paper[speed["model"], speed["seq_len"], PAPER_VARIANTS.get(speed["mode"])] = speed
    head = [
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
    groups = []
    for line in lines:
        report = line.results[0]["detail"]
        full = {x["length"]: x["median_ms"] for x in report["lines"] if x["variant"] == "fp32"}
        groups.append(len(cells))
        for found in report["lines"]:
            theirs = paper.get((line.counterpart, found["length"], found["variant"]), {})
            ratio = full[found["length"]] / found["median_ms"] if found["length"] in full else None
            cells.append(
                [
                    line.model,
                    str(found["length"]),
                    found["variant"],
                    *(
                        number([theirs[k]] if theirs.get(k) else [], 0)
                        for k in ("latency_ms", "peak_memory_MB")
                    ),
                    f"{found['median_ms']:.2f}",
                    NOTHING if ratio is None else f"{ratio:.2f}",
                    number([found["peak_mb"]] if found.get("peak_mb") is not None else [], 0),
                ]
            )
    note = f"The paper's figures are of an RTX 3090. {note}".strip()
    return Layout(head, cells, frozenset(groups[1:]), frozenset({0, 2}), note)


def arranged(sheet: Sheet, columns: Sequence[str] | None = None) -> Layout:
    """The layout that suits what the table measures; see `layout` for `columns`."""
    if sheet.table.what == "run":
        return layout(sheet, columns)
    if sheet.table.what == "recipes":
        return settings(sheet)
    if sheet.table.what == "speed":
        return timing(sheet)
    return quantities(sheet)


def costs(sheet: Sheet) -> Layout:
    """Times, memory and bytes of every row: mean over seeds."""
    names = [c for c in SPENT if any(line.values(c) for line in sheet.done)]
    return layout(sheet, names, with_paper=False)


def markdown(table: Layout) -> str:
    """A Markdown table with its note; a sentence where there are no lines."""
    if not table.lines:
        return table.note or "Not run."
    rows = [
        table.head,
        ["---"] * len(table.head),
        *(
            [f"`{c}`" if i in table.code else c.replace("|", r"\|") for i, c in enumerate(line)]
            for line in table.lines
        ),
    ]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{text}\n\n{table.note}" if table.note else text


def latex(table: Layout, caption: str) -> str:
    """A LaTeX table (package booktabs)."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(ch, ch) for ch in cell) for cell in cells) + r" \\"

    body = [
        r"\midrule" + "\n" + row(line) if i in table.groups else row(line)
        for i, line in enumerate(table.lines)
    ]
    caption = "".join(
        LATEX.get(ch, ch) for ch in " ".join(filter(None, (caption + ".", table.note)))
    )
    return (
        "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                r"\begin{tabular}{" + "l" * len(table.head) + "}",
                r"\toprule",
                row(table.head),
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                rf"\caption{{{caption}}}",
                r"\end{table}",
            ]
        )
        + "\n"
    )


def page_table(table: Layout) -> str:
    """An HTML table with its note."""
    if not table.lines:
        return f"<p>{html.escape(table.note or 'Not run.')}</p>"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    lines = []
    for i, line in enumerate(table.lines):
        state = {"failed": "failed", "not run": "absent", "refused": "absent"}.get(
            line[-1].partition(":")[0], ""
        )
        marks = " ".join(filter(None, (state, "group" if i in table.groups else "")))
        lines.append(
            f'<tr class="{marks}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
            + "</tr>"
        )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>{note}'


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue()


def _place(sheet: Sheet, line: Line, axes: Sequence[str]) -> list[object]:
    return [
        sheet.table.name,
        sheet.scale,
        line.model,
        line.row,
        *(line.point.get(axis, "") for axis in axes),
    ]


def csv_of(table: Layout) -> str:
    """The cells of a table as they are shown."""
    return _csv(table.head, table.lines)


def quality_csv(sheet: Sheet) -> str:
    """One line per figure: table, scale, model, row, grid, metric, the paper's (and its model's
    name), ours and state.

    No times: the same results give the same bytes.
    """
    axes = list(dict.fromkeys(k for line in sheet.lines for k in line.point))
    names = list(
        dict.fromkeys((*(sheet.metrics() or sheet.table.columns or ()), *sheet.paper_metrics()))
    )
    rows = [
        [
            *_place(sheet, line, axes),
            name,
            line.counterpart if name in line.paper else "",
            line.paper.get(name, ""),
            statistics.fmean(values) if values else "",
            "" if spread(values) is None else spread(values),
            len(values),
            line.state(sheet.seeds),
        ]
        for line in sheet.lines
        for name in names
        if name not in COST_HEADINGS
        for values in [line.values(name)]
    ]
    head = [
        "table",
        "scale",
        "model",
        "row",
        *axes,
        "metric",
        "paper_model",
        "paper",
        "mean",
        "std",
        "seeds",
        "state",
    ]
    return _csv(head, rows)


def costs_csv(sheet: Sheet) -> str:
    """One line per measured cell and seed: seconds, MiB and bytes."""
    axes = list(dict.fromkeys(k for line in sheet.lines for k in line.point))
    names = [c for c in SPENT if any(c in r["cost"] for line in sheet.lines for r in line.results)]
    rows = [
        [*_place(sheet, line, axes), result["seed"], *(result["cost"].get(name) for name in names)]
        for line in sheet.lines
        for result in line.results
    ]
    return _csv(["table", "scale", "model", "row", *axes, "seed", *names], rows)

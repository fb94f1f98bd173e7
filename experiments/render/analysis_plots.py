"""Pictures of measurements that are no runs: outliers, position invariance, perturbed scales,
approximations, speed.

What each result holds is said in `experiments/analyses/measurement.py` and
`experiments/speed/__main__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.analyses.figures import draw_channels, draw_tokens
from experiments.plotting.style import BLUE, PALETTE, RED, SKY, panels, panels_for
from experiments.registry.labels import METHOD_LABELS
from experiments.render.plots import ACROSS, few_ticks
from experiments.render.sheet import Line, Sheet

NAMES = {
    "none": "no scaling",
    "smoothquant": "SmoothQuant",
    "gps": "GPS",
    "gps_cross": "GPS with cross terms",
    "smoothquant_gps": "GPS after SmoothQuant",
    "error_w": "E_W",
    "error_x": "E_x",
    "error_x_rounded": "E_x, rounded W",
    "total": "E_W + E_x",
    "delta_x": "rounding error of x after scaling (Eq. 10)",
    "delta_w": "that of W",
    "scale_order": "s_i > s_j (Fig. 3)",
    "range_order": "R_i/s_i > R_j/s_j (Fig. 3)",
    "rows_close": "rows within 5 % (Fig. 8)",
}


def draw(sheet: Sheet) -> Figure | None:
    """The picture of a table whose `what` is no run; None where nothing is measured or it has no
    picture."""
    drawers: dict[str, Callable[[list[Line]], Figure | None]] = {
        "outliers": outliers,
        "invariance": invariance,
        "perturbation": perturbation,
        "cross_terms": cross_terms,
        "approximation": approximation,
        "ordering": ordering,
        "speed": speed,
    }
    drawer = drawers.get(sheet.table.what)
    return drawer(sheet.done) if drawer and sheet.done else None


def detail(line: Line) -> Mapping[str, Any]:
    return line.results[0]["detail"]


def outliers(lines: list[Line]) -> Figure:
    """Figure 1: RMS of channels, left, and ranges of token positions, right; a line of axes per
    model."""
    figure, axes = panels(len(lines), 2, (9, 2.2 * len(lines) + 0.3))
    for (left, right), line in zip(axes, lines):
        channels = detail(line)["channels"]
        tokens = detail(line)["tokens"]
        draw_channels(left, channels["rms"], f"{line.model}: {channels['site']}")
        title = f"{line.model}: {tokens['site']}"
        draw_tokens(
            right, tokens["positions"], tokens["ranges"], tokens["sinks"], "mean range of x", title
        )
    return figure


def invariance(lines: list[Line]) -> Figure:
    """Figures 4, 11 and 12: range per token position, a line per class; where the lines coincide,
    position is all."""
    kinds = list(dict.fromkeys(kind for line in lines for kind in detail(line)))
    figure, axes = panels(len(lines), len(kinds), (3.1 * len(kinds), 2.1 * len(lines) + 0.3))
    for row, line in zip(axes, lines):
        for axis, kind in zip(row, kinds):
            if kind not in detail(line):
                axis.axis("off")
                continue
            seen = detail(line)[kind]
            for ranges in seen["ranges"]:
                axis.plot(seen["positions"], ranges, color=BLUE, alpha=0.35, linewidth=0.9)
            share = line.results[0]["metrics"].get(f"{kind}.position_share")
            said = "" if share is None else f", position {share:.0%}"
            axis.set_title(f"{line.model}: {kind}{said}", fontsize=9)
            axis.set_yscale("log")
            few_ticks(axis.yaxis)
            axis.set(xlabel="token position", ylabel="range of x")
    return figure


def perturbation(lines: list[Line]) -> Figure:
    """Figure 5: the loss of models with perturbed scales, and of the one with the scales of GPS."""
    figure, axes = panels(1, len(lines), (4.4 * len(lines), 3.0))
    for axis, line in zip(axes.flat, lines):
        trials = [kl for r in line.results for kl in r["detail"]["kl"]]
        percent = line.results[0]["detail"]["spread"]
        axis.hist(trials, bins=25, color=SKY, label=f"scales perturbed by up to {percent:.0%}")
        for n, value in enumerate(line.values("kl")):
            many = " (a line per seed)" if len(line.values("kl")) > 1 else ""
            axis.axvline(value, color=RED, linewidth=1.2, label=None if n else f"GPS{many}")
        axis.set(xlabel="KL to full precision [nats/token]", ylabel="trials", title=line.model)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.35)
        axis.locator_params(axis="x", nbins=5)
        axis.legend(loc="upper right")
    return figure


def grouped(
    lines: list[Line], names: Sequence[str], value: Callable[[Line, str, str], float | None], y: str
) -> Figure:
    """Vertical bars, an axis per model: a group per kind of site, a colour per name."""
    figure, axes = panels_for(len(lines), ACROSS, (4.7, 3.0))
    for axis, line in zip(axes, lines):
        kinds = list(dict.fromkeys(m.split(".")[0] for m in line.results[0]["metrics"] if "." in m))
        for n, name in enumerate(names):
            places = np.arange(len(kinds)) + (n - (len(names) - 1) / 2) * 0.8 / len(names)
            heights = [value(line, kind, name) or 0.0 for kind in kinds]
            axis.bar(
                places,
                heights,
                0.8 / len(names),
                color=PALETTE[n % len(PALETTE)],
                label=NAMES.get(name, name),
            )
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set(title=line.model, ylabel=y)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)))
    return figure


def mean_metric(line: Line, name: str) -> float | None:
    values = line.values(name)
    return sum(values) / len(values) if values else None


def cross_terms(lines: list[Line]) -> Figure:
    """Figure 10: output error of layers by scaling; GPS with its cross terms and after SmoothQuant
    too."""
    names = ("none", "smoothquant", "gps", "gps_cross", "smoothquant_gps")
    return grouped(
        lines, names, lambda line, kind, n: mean_metric(line, f"{kind}.{n}"), "mean |output error|"
    )


def approximation(lines: list[Line]) -> Figure:
    """Table 8: relative bias of every quantity that the derivation approximates, without sign; one
    of zero has no bar."""
    names = list(
        dict.fromkeys(
            m.split(".")[1] for x in lines for m in x.results[0]["metrics"] if m.endswith(".bias")
        )
    )

    def percent(line: Line, kind: str, name: str) -> float | None:
        bias = mean_metric(line, f"{kind}.{name}.bias")
        return None if bias is None else 100 * abs(bias)

    figure = grouped(lines, names, percent, "bias of the approximation [%]")
    for axis in figure.axes:
        if any(bar.get_height() > 0 for bar in axis.patches):
            axis.set_yscale("log")
            few_ticks(axis.yaxis)
    return figure


def times(report: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """The times in a report of `experiments.speed` by variant or method, and their unit and
    circumstances."""
    found = report["lines"]
    if report["what"] == "calibrate":
        done = {
            METHOD_LABELS.get(x["method"], x["method"]): x["calibration_s"]
            for x in found
            if "calibration_s" in x
        }
        return done, f"calibration with {report['rows']} rows [s]"
    if report["what"] == "generate":
        return {x["variant"]: x["seconds"] for x in found}, f"{report['rows']} images [s]"
    longest = max(x["length"] for x in found)
    return (
        {x["variant"]: x["median_ms"] for x in found if x["length"] == longest},
        f"pass of {report['rows']} rows, {longest} tokens [ms]",
    )


def speed(lines: list[Line]) -> Figure:
    """Figure 7: time of a pass through all blocks at the longest sequence by variant, BF16's as a
    line; the same of generation and calibration."""
    reports = [times(detail(line)) for line in lines]
    tallest = max(len(found) for found, _ in reports)
    figure, axes = panels_for(len(lines), ACROSS, (4.6, 0.6 + 0.22 * tallest))
    for axis, line, (found, what) in zip(axes, lines, reports):
        colours = [BLUE if name.startswith("int8") else SKY for name in found]
        if "bf16" in found:
            axis.axvline(found["bf16"], color=RED, linewidth=1.0, linestyle="--", zorder=0)
        bars = axis.barh(list(found), list(found.values()), color=colours)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.bar_label(
            bars, [f"{t:.3g}" for t in found.values()], fontsize=8, padding=3, bbox=paper
        )
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(found.values()) / 3, max(found.values()) * 2.5)
        few_ticks(axis.xaxis)
        axis.set(xlabel=what, title=line.model)
    return figure


def ordering(lines: list[Line]) -> Figure:
    """Figures 3 and 8: which share of channels and rows behaves as the derivation says."""
    names = ("scale_order", "range_order", "rows_close")

    def percent(line: Line, kind: str, name: str) -> float | None:
        share = mean_metric(line, f"{kind}.{name}")
        return None if share is None else 100 * share

    return grouped(lines, names, percent, "share [%]")

"""Pictures of measurements that are no runs, from outliers to speed.

What each result holds is said in `experiments/analyses/measurement.py` and
`experiments/speed/__main__.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.analyses.figures import draw_channels, draw_tokens
from experiments.plotting.style import BLUE, PALETTE, RED, SKY, make_panels, panels_for
from experiments.registry.labels import method_label
from experiments.render.comparisons import losses_of_kinds
from experiments.render.plots import ACROSS, few_ticks
from experiments.render.sheet import Line, Sheet
from experiments.render.text import images_of, report_of

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


def draw_analysis(sheet: Sheet) -> Figure | None:
    """The picture of a table of measurements; None where nothing is measured or it has none."""
    drawers: dict[str, Callable[[list[Line]], Figure]] = {
        "outliers": draw_outliers,
        "invariance": draw_invariance,
        "perturbation": draw_perturbation,
        "cross_terms": draw_cross_terms,
        "approximation": draw_approximation,
        "ordering": draw_ordering,
        "sensitivity": draw_sensitivity,
        "speed": draw_speed,
    }
    if sheet.table.what not in drawers or not sheet.done:
        return None
    return drawers[sheet.table.what](sheet.done)


def draw_outliers(lines: list[Line]) -> Figure:
    """Figure 1: RMS of channels, left, and ranges of token positions, right, by model."""
    figure, axes = make_panels(len(lines), 2, (9, 2.2 * len(lines) + 0.3))  # axes: (lines, 2)
    for (left, right), line in zip(axes, lines):
        channels = report_of(line)["channels"]  # site, and rms (C,)
        draw_channels(left, channels["rms"], f"{line.model}: {channels['site']}")
        tokens = report_of(line)["tokens"]
        curve = (tokens["positions"], tokens["ranges"], tokens["sinks"])  # (P,), (P,), a number
        draw_tokens(right, *curve, "mean range of x", f"{line.model}: {tokens['site']}")
    return figure


def draw_invariance(lines: list[Line]) -> Figure:
    """Figures 4, 11 and 12: range per token position, a line per class.

    Where the lines coincide, position is all.
    """
    kinds: dict[str, None] = {}  # of sites, in the order in which models name them
    for line in lines:
        kinds.update(dict.fromkeys(report_of(line)))
    # one row of axes per model, one column per kind of site
    figure, axes = make_panels(len(lines), len(kinds), (3.1 * len(kinds), 2.1 * len(lines) + 0.3))
    for row, line in zip(axes, lines):
        for axis, kind in zip(row, kinds):
            if kind in report_of(line):
                draw_classes(axis, line, kind)
            else:
                axis.axis("off")  # not every model has every kind of site
    return figure


def draw_classes(axis: Axes, line: Line, kind: str) -> None:
    """Ranges of one kind of site over token positions, a line per class."""
    measured = report_of(line)[kind]
    for ranges in measured["ranges"]:  # (P,) of one class each
        axis.plot(measured["positions"], ranges, color=BLUE, alpha=0.35, linewidth=0.9)
    share = line.results[0]["metrics"].get(f"{kind}.position_share")
    explained = "" if share is None else f", position {share:.0%}"
    axis.set_title(f"{line.model}: {kind}{explained}", fontsize=9)
    axis.set_yscale("log")
    few_ticks(axis.yaxis)
    axis.set(xlabel="token position", ylabel="range of x")


def draw_perturbation(lines: list[Line]) -> Figure:
    """Figure 5: the loss of models with perturbed scales, and of the one with the scales of GPS."""
    figure, axes = make_panels(1, len(lines), (4.4 * len(lines), 3.0))
    for axis, line in zip(axes.flat, lines):
        trials: list[float] = []
        for result in line.results:  # trials of all seeds are one histogram
            trials += result["detail"]["kl"]
        percent = report_of(line)["spread"]
        axis.hist(trials, bins=25, color=SKY, label=f"scales perturbed by up to {percent:.0%}")
        losses = line.values("kl")
        name = "GPS (a line per seed)" if len(losses) > 1 else "GPS"
        for number, loss in enumerate(losses):
            label = None if number else name  # one entry of the legend for all
            axis.axvline(loss, color=RED, linewidth=1.2, label=label)
        axis.set(xlabel="KL to full precision [nats/token]", ylabel="trials", title=line.model)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.35)  # room for the legend
        axis.locator_params(axis="x", nbins=5)
        axis.legend(loc="upper right")
    return figure


def draw_kinds(
    lines: list[Line], names: Sequence[str], value: Callable[[Line, str, str], float | None], y: str
) -> Figure:
    """Vertical bars, an axis per model: a group per kind of site, a colour per name."""
    figure, axes = panels_for(len(lines), ACROSS, (4.7, 3.0))
    width = 0.8 / len(names)
    for axis, line in zip(axes, lines):
        kinds = kinds_of_sites(line)
        for number, name in enumerate(names):
            # bars of a group stand side by side around its place
            places = np.arange(len(kinds)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
            heights = [value(line, kind, name) or 0.0 for kind in kinds]  # (kinds,)
            colour = PALETTE[number % len(PALETTE)]
            axis.bar(places, heights, width, color=colour, label=NAMES.get(name, name))
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set(title=line.model, ylabel=y)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()  # all axes have the same
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)))
    return figure


def kinds_of_sites(line: Line) -> list[str]:
    """The kinds of sites that metrics like `qkv.gps` are of."""
    kinds: dict[str, None] = {}
    for metric in line.results[0]["metrics"]:
        kind, dot, _ = metric.partition(".")
        if dot:
            kinds[kind] = None
    return list(kinds)


def mean_metric(line: Line, name: str) -> float | None:
    """The mean of a metric over seeds; None where there is none."""
    values = line.values(name)
    return sum(values) / len(values) if values else None


def percent_metric(line: Line, kind: str, name: str) -> float | None:
    """A share, in per cent."""
    share = mean_metric(line, f"{kind}.{name}")
    return None if share is None else 100 * share


def percent_bias(line: Line, kind: str, name: str) -> float | None:
    """A bias without its sign, in per cent."""
    bias = mean_metric(line, f"{kind}.{name}.bias")
    return None if bias is None else 100 * abs(bias)


def draw_cross_terms(lines: list[Line]) -> Figure:
    """Figure 10: output error of layers by scaling, with two variants of GPS."""
    names = ("none", "smoothquant", "gps", "gps_cross", "smoothquant_gps")

    def error(line: Line, kind: str, name: str) -> float | None:
        return mean_metric(line, f"{kind}.{name}")

    return draw_kinds(lines, names, error, "mean |output error|")


def draw_approximation(lines: list[Line]) -> Figure:
    """Table 8: relative bias, without sign, of every quantity that the derivation approximates."""
    names: dict[str, None] = {}
    for line in lines:
        for metric in line.results[0]["metrics"]:
            if metric.endswith(".bias"):
                names[metric.split(".")[1]] = None  # of <kind>.<name>.bias
    figure = draw_kinds(lines, list(names), percent_bias, "bias of the approximation [%]")
    for axis in figure.axes:
        # a bias of zero has no bar, and without any bar there is no logarithmic axis
        if any(bar.get_height() > 0 for bar in axis.patches):
            axis.set_yscale("log")
            few_ticks(axis.yaxis)
    return figure


def draw_ordering(lines: list[Line]) -> Figure:
    """Figures 3 and 8: which share of channels and rows behaves as the derivation says."""
    names = ("scale_order", "range_order", "rows_close")
    return draw_kinds(lines, names, percent_metric, "share [%]")


def draw_sensitivity(lines: list[Line]) -> Figure:
    """Heat maps of the loss with one group of quantizers alone: an axis per model and width.

    A group per row and a method per column; the colour is the KL, on a scale for all of an axis.
    """
    panels: dict[str, list[Line]] = {}
    for line in lines:
        panels.setdefault(f"{line.model}, {line.bits}", []).append(line)
    figure, axes = panels_for(len(panels), ACROSS, (4.7, 4.2))
    for axis, (title, members) in zip(axes, panels.items()):
        groups = list(losses_of_kinds(members[0]))
        divergences = np.empty((len(groups), len(members)))  # (groups, methods)
        for column, line in enumerate(members):
            losses = losses_of_kinds(line)
            divergences[:, column] = [losses[group] for group in groups]
        heat_map(axis, divergences)
        axis.set_xticks(
            range(len(members)), [line.row for line in members], rotation=20, ha="right"
        )
        axis.set_yticks(range(len(groups)), groups)
        axis.set_title(f"{title}: KL of one group alone")
    return figure


def heat_map(axis: Axes, values: np.ndarray) -> None:
    """Values (rows, columns) as colours, with the numbers on them."""
    axis.imshow(np.sqrt(values), cmap="Blues", aspect="auto")  # the root keeps small ones apart
    brightest = values.max()
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > brightest / 3 else "black"
        text = f"{value:.1e}"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


@dataclass(frozen=True)
class Times:
    """The times in a report of `experiments.speed`.

    Attributes:
        times: by variant or method. unit: what they are of.
        before: that of BF16 of a former revision; None if none was measured.
        speed_ups: how many times as fast as that one a variant is, each by the time beside it.
    """

    times: dict[str, float]
    unit: str
    before: float | None = None
    speed_ups: dict[str, float] = field(default_factory=dict)

    def label(self, name: str) -> str:
        """The time of a variant, and how many times as fast as BF16 it is: of before, and of now,
        where these were timed."""
        time = self.times[name]
        ratios = []
        if name in self.speed_ups:
            ratios.append(f"{self.speed_ups[name]:.2f}×")
        if "bf16" in self.times:
            ratios.append(f"{self.times['bf16'] / time:.2f}×")
        return f"{time:.3g} ({', '.join(ratios)})" if ratios else f"{time:.3g}"


def read_times(report: Mapping[str, Any]) -> Times:
    """The times in a report of `experiments.speed`, of the largest work that it did."""
    entries = report["lines"]
    times = {}
    if report["what"] == "calibrate":
        for entry in entries:
            if "calibration_s" in entry:  # else it failed or was refused
                name = method_label(entry["method"])
                times[name] = entry["calibration_s"]
        return Times(times, f"calibration with {report['rows']} rows [s]")
    if report["what"] == "generate":
        unit = f"{report['rows']} images [s]"
        key = "seconds"
        entries = [entry for entry in entries if images_of(entry, report) == report["rows"]]
    else:
        longest = max(entry["length"] for entry in entries)
        unit = f"pass of {report['rows']} rows, {longest} tokens [ms]"
        key = "median_ms"
        entries = [entry for entry in entries if entry["length"] == longest]
    before = []
    speed_ups = {}
    for entry in entries:
        name = entry["variant"]
        times[name] = entry[key]
        if "baseline" in entry:
            before.append(entry["baseline"])
            speed_ups[name] = entry["speedup"]
    return Times(times, unit, median_or_none(before), speed_ups)


def median_or_none(values: list[float]) -> float | None:
    """The median; None if there are no values."""
    return statistics.median(values) if values else None


def draw_speed(lines: list[Line]) -> Figure:
    """Figure 7: time of a pass through all blocks at the longest sequence, by variant.

    That of BF16 is a line across, dotted that of a former revision; a label tells how many times as
    fast as both a variant is. Times of generation and calibration are drawn alike.
    """
    reports = [read_times(report_of(line)) for line in lines]
    tallest = max(len(report.times) for report in reports)
    figure, axes = panels_for(len(lines), ACROSS, (4.6, 0.6 + 0.22 * tallest))
    for axis, line, report in zip(axes, lines, reports):
        times = report.times
        if report.before is not None:
            axis.axvline(report.before, color=RED, linewidth=1.0, linestyle=":", zorder=0)
        if "bf16" in times:
            axis.axvline(times["bf16"], color=RED, linewidth=1.0, linestyle="--", zorder=0)
        colours = []
        labels = []
        for name in times:
            colours.append(BLUE if name.startswith("int8") else SKY)
            labels.append(report.label(name))
        bars = axis.barh(list(times), list(times.values()), color=colours)
        # the line of BF16 must not cross out a label
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.bar_label(bars, labels, fontsize=8, padding=3, bbox=paper)
        axis.invert_yaxis()  # the first variant on top
        axis.set_xscale("log")
        # labels stand to the right of the bars
        room = 2.5 if report.before is None else 8
        axis.set_xlim(min(times.values()) / 3, max(times.values()) * room)
        few_ticks(axis.xaxis)
        axis.set(xlabel=report.unit, title=line.model)
    return figure

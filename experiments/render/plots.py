"""Pictures of tables of runs: bars, a ranking, the ablation, curves over calibration sizes, quality
by size.

One axis per model. Error bars are one standard deviation over seeds. Losses are drawn on a
logarithmic axis, where methods differ by factors; full precision, whose loss is zero, is left out
there. Drawers take the lines of one model as `plotted_lines` makes them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.plotting.style import BLACK, BLUE, ORANGE, PALETTE, SKY, panels_for
from experiments.render.sheet import FULL_BITS, Sheet
from experiments.render.text import describe_lines

AXES = {  # labels of axes, with units
    "kl": "KL to full precision [nats/token]",
    "nll": "NLL [nats/token]",
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "fid2fp": "FID to full precision",
    "precision": "precision",
    "recall": "recall",
    "agreement": "agreement",
}
LOSSES = ("kl", "fid2fp")  # zero for full precision
MARKERS = "osD^vPX*"
ACROSS = 2  # axes side by side
LINE = 10.0  # points from one line of small text to the next
# factor between sizes of models that differ in their parameters of quantization alone
SAME_SIZE = 1.02
MARKED = {"STAQ": BLUE, "PTQ4ARVG": ORANGE}  # how rows begin that stand out: ours, the paper's
OTHERS = "#B8B8B8"
Drawer = Callable[[Axes, Sheet, pd.DataFrame, str], None]


def draw_runs(sheet: Sheet) -> Figure | None:
    """The picture that the table asks for; None where there is nothing measured to draw."""
    metric = sheet.headline()
    drawers: dict[str, Drawer] = {
        "bars": draw_bars,
        "ranking": draw_ranking,
        "ablation": draw_bars,
        "curve": draw_curve,
        "pareto": draw_pareto,
    }
    if metric is None or sheet.table.plot not in drawers:
        return None
    return draw_models(sheet, metric, drawers[sheet.table.plot])


def draw_models(sheet: Sheet, metric: str, drawer: Drawer) -> Figure | None:
    """One axis per model that has lines to draw, two side by side, one legend for all."""
    lines = plotted_lines(sheet, metric)
    models = measured_lines(lines)["model"].unique()
    if not len(models):
        return None
    lines = lines[lines["model"].isin(models)]
    across = min(ACROSS, len(models))
    width = 4.6 if across > 1 else 6.4
    height = 3.6
    if drawer is draw_bars:
        height = bars_height(sheet, lines)
    elif drawer is draw_ranking:
        height = 0.9 + 0.17 * measured_lines(lines)["model"].value_counts().max()
    figure, axes = panels_for(len(models), across, (width, height))
    entries: dict[str, Artist] = {}  # of the legend
    for axis, model in zip(axes, models):
        drawer(axis, sheet, lines[lines["model"] == model], metric)
        axis.set_title(model)
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    title = sheet.table.title
    if drawer is draw_ranking and lines["bits"].nunique() == 1:
        title = f"{title}: {lines['bits'].iloc[0]}"
    figure.suptitle(textwrap.fill(title, 58 * across), fontsize=11)
    if len(entries) > 1:
        columns = min(5, len(entries))
        place = "outside lower center"
        figure.legend(entries.values(), entries.keys(), loc=place, ncols=columns)
    return figure


def plotted_lines(sheet: Sheet, metric: str) -> pd.DataFrame:
    """The lines that a picture of a metric is about, measured or not, one a row.

    Columns: those of `describe_lines`; `mib`, the size of the model at rest; mean, std (0 of one
    seed) and seeds of the metric.
    """
    # one row per line of the sheet, which is its index
    lines = describe_lines(sheet).join(sheet.over_seeds(metric).astype(float))
    sizes = [line.model_bytes or math.nan for line in sheet.lines]
    lines["mib"] = np.array(sizes) / 2**20
    lines["std"] = lines["std"].fillna(0.0)  # one seed has no deviation
    # the loss of full precision is zero by definition
    return lines[lines["bits"] != FULL_BITS] if metric in LOSSES else lines


def measured_lines(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines that have a figure of the metric."""
    return lines.dropna(subset="mean")


def bars_height(sheet: Sheet, lines: pd.DataFrame) -> float:
    """Inches that the bars of one model take."""
    rows = lines.groupby("model")["row"].nunique().max()  # of the model that has the most
    deepest = 1  # an ablation has one bar a row
    if sheet.table.plot != "ablation":
        deepest = measured_lines(lines).groupby("model")["settings"].nunique().max()
    return 1.2 + rows * (0.14 + 0.16 * deepest)


# --- bars


def draw_bars(axis: Axes, sheet: Sheet, lines: pd.DataFrame, metric: str) -> None:
    """Horizontal bars, grouped by row, one colour per bit width and other settings.

    An ablation marks the rows of the paper instead. A row without any figure says that it failed or
    was not run.
    """
    ablation = sheet.table.plot == "ablation"
    measured = measured_lines(lines)
    series = split_by_origin(sheet, measured) if ablation else split_by(measured, "settings")
    colours = (BLUE, SKY) if ablation else PALETTE
    height = 0.8 if ablation else 0.8 / len(series)
    rows = list(lines["row"].unique())
    for number, (name, members) in enumerate(series.items()):
        # bars of a row stand side by side around its place
        offset = 0.0 if ablation else (number - (len(series) - 1) / 2) * height
        axis.barh(
            members["row"].map(rows.index) + offset,
            members["mean"],
            height,
            xerr=members["std"],
            label=name,
            color=colours[number % len(colours)],
            error_kw={"linewidth": 1, "capsize": 2},
        )
    least = measured["mean"].min()
    if metric in LOSSES and least > 0:
        axis.set_xscale("log")
        axis.set_xlim(left=0.5 * least)  # a logarithmic axis has no zero for bars to start at
        few_ticks(axis.xaxis)
    mark_gaps(axis, lines, rows)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # downwards, and with room for rows that have no bar
    axis.set_xlabel(AXES.get(metric, metric))
    axis.grid(axis="x", alpha=0.3)


def mark_gaps(axis: Axes, lines: pd.DataFrame, rows: list[str]) -> None:
    """Say of rows that have no bar whether they failed or were not run."""
    measured = set(measured_lines(lines)["row"])
    failed = set(lines.loc[lines["state"] == "failed", "row"])
    for place, row in enumerate(rows):
        if row in measured:
            continue
        axis.text(
            0.01,
            place,
            "failed" if row in failed else "not run",
            transform=axis.get_yaxis_transform(),  # x in shares of the axis, y in rows
            va="center",
            fontsize=9,
            color="gray",
        )


def few_ticks(axis: Axis) -> None:
    """Plain numbers at powers of ten of a logarithmic axis.

    A short axis has them at 1, 2 and 5 times these, one too short for two of them at even steps.
    """
    low, high = axis.get_view_interval()
    if high / low > 50:
        locator = LogLocator(subs=(1.0,))
    elif high / low > 5:
        locator = LogLocator(subs=(1.0, 2.0, 5.0))
    else:
        locator = MaxNLocator(3, steps=[1, 2, 5, 10])
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def split_by(lines: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """Lines by their value of a column, in the order of the lines."""
    return dict(list(lines.groupby(column, sort=False)))


def split_by_origin(sheet: Sheet, lines: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Lines by whether the paper's table has their row."""
    is_extra = lines["row"].isin(sheet.table.extra)
    series = {}
    if not is_extra.all():
        series["in the paper's table"] = lines[~is_extra]
    if is_extra.any():
        series["not in the paper's"] = lines[is_extra]
    return series


# --- a ranking


def draw_ranking(axis: Axes, sheet: Sheet, lines: pd.DataFrame, metric: str) -> None:
    """One bar a row, the best on top; our method and the paper's stand out."""
    measured = measured_lines(lines).sort_values("mean", kind="stable")
    places = np.arange(len(measured))
    names = measured["label"].map(marked_name)
    for name in (*MARKED, ""):
        members = (names == name).to_numpy()
        axis.barh(
            places[members],
            measured["mean"][members],
            0.75,
            xerr=measured["std"][members],
            label=name or "other methods",
            color=MARKED.get(name, OTHERS),
            error_kw={"linewidth": 0.8},
        )
    axis.set_yticks(places, measured["label"], fontsize=7.5)
    for text, name in zip(axis.get_yticklabels(), names):
        text.set_fontweight("bold" if name else "normal")
    axis.set_ylim(len(measured) - 0.5, -0.5)
    least = measured["mean"].min()
    if metric in LOSSES and least > 0:
        axis.set_xscale("log")
        axis.set_xlim(left=0.5 * least)
        few_ticks(axis.xaxis)
    axis.set_xlabel(AXES.get(metric, metric))
    axis.grid(axis="x", alpha=0.3)


def marked_name(label: str) -> str:
    """Which of the marked methods a row is of; empty if of none."""
    for name in MARKED:
        if label.startswith(name):
            return name
    return ""


# --- a curve


def draw_curve(axis: Axes, sheet: Sheet, lines: pd.DataFrame, metric: str) -> None:
    """The metric over the numeric axis of the grid, one line per value of the others."""
    measured = measured_lines(lines)
    numeric = numeric_axis(sheet, measured)
    if numeric is None:
        return draw_bars(axis, sheet, lines, metric)
    others = [key for key in sheet.axes() if key != numeric]
    names = measured["row"]
    if others:
        names = measured[others].astype(str).agg(", ".join, axis="columns")
    series = split_by(measured.assign(series=names), "series")
    for number, (name, members) in enumerate(series.items()):
        # the curve connects ascending sizes, whatever the grid's order
        members = members.sort_values(numeric, kind="stable")
        shift = 1.02 ** (number - len(series) / 2)  # error bars side by side
        axis.errorbar(
            members[numeric].astype(float) * shift,
            members["mean"],
            members["std"],
            label=name,
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            color=PALETTE[number % len(PALETTE)],
        )
    ticks = sorted(measured[numeric].unique())
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    axis.set_xlabel("calibration rows" if numeric == "calib.n" else numeric)
    axis.set_ylabel(AXES.get(metric, metric))
    axis.grid(axis="y", alpha=0.3)


def numeric_axis(sheet: Sheet, lines: pd.DataFrame) -> str | None:
    """The first key of the grid of which all lines have a number."""
    for key in sheet.axes():
        if all(isinstance(value, (int, float)) for value in lines[key]):
            return key
    return None


# --- quality against size


def pareto_front(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines that no other beats or equals in both `mib` and `mean`, by ascending `mib`."""
    ordered = lines.sort_values(["mib", "mean"])  # of equal sizes the best first
    best_of_smaller = ordered["mean"].cummin().shift(fill_value=math.inf)  # of all lines before
    return ordered[ordered["mean"] < best_of_smaller]


def best_of_sizes(front: pd.DataFrame) -> pd.DataFrame:
    """Of lines of the front whose sizes are about the same the last, which is the best."""
    following = front["mib"].shift(-1, fill_value=math.inf)  # size of the next line
    return front[following > SAME_SIZE * front["mib"]]


def draw_pareto(axis: Axes, sheet: Sheet, lines: pd.DataFrame, metric: str) -> None:
    """The metric, of which less is better, against MiB at rest, one marker per bit width.

    The line is the Pareto front: for every size the least that a model of at most that size has. Of
    points of the front whose sizes differ by less than `SAME_SIZE` the best is named.
    """
    sized = measured_lines(lines).dropna(subset="mib")
    scatter_lines(axis, sized)
    front = pareto_front(sized)
    if not front.empty:
        style = {"color": BLACK, "linewidth": 0.8, "zorder": 0}
        # post: what a model reaches holds up to the size of the next
        axis.step(front["mib"], front["mean"], where="post", label="Pareto front", **style)
        note_full_size(axis, sheet, front["model"].iloc[0])
    if metric in LOSSES:
        axis.set_yscale("log")
        few_ticks(axis.yaxis)
    low, high = axis.get_xlim()
    axis.set_xlim(left=low - 0.4 * (high - low))  # room for names
    axis.margins(y=0.15)
    name_lines(axis, best_of_sizes(front))
    axis.set(xlabel="model at rest [MiB]", ylabel=AXES.get(metric, metric))
    axis.grid(alpha=0.3)


def scatter_lines(axis: Axes, lines: pd.DataFrame) -> None:
    """Draw a point a line, one marker per bit width."""
    for number, (bits, members) in enumerate(split_by(lines, "bits").items()):
        axis.scatter(
            members["mib"],
            members["mean"],
            s=28,
            marker=MARKERS[number],
            color=PALETTE[number],
            label=bits,
            alpha=0.8,
            linewidths=0,
        )


def name_lines(axis: Axes, front: pd.DataFrame) -> None:
    """Name points of a falling front, left below each, where no point is.

    Names that would touch move further down.
    """
    axis.autoscale_view()  # else the transform below is that of other limits
    scale = 72 / axis.figure.dpi  # points per pixel
    previous = math.inf  # height of the name before
    # the front falls, so this goes from the highest name down
    for text, *point in front[["label", "mib", "mean"]].itertuples(index=False):
        height = axis.transData.transform(point)[1] * scale  # in points
        down = max(0.0, height - (previous - LINE))
        previous = height - down
        arrow = {"arrowstyle": "-", "linewidth": 0.4, "color": BLACK, "shrinkB": 3}
        axis.annotate(
            text,
            point,
            fontsize=8,
            textcoords="offset points",
            xytext=(-3, -3 - down),
            ha="right",
            va="top",
            arrowprops=arrow if down > LINE / 2 else None,  # only a name that moved far points back
        )


def note_full_size(axis: Axes, sheet: Sheet, model: str) -> None:
    """Say in a corner how large the model is in full precision."""
    for line in sheet.done:
        if line.model == model and line.quant is None and line.model_bytes:
            text = f"FP32: {line.model_bytes / 2**20:.1f} MiB"
            style = {"ha": "right", "va": "top", "fontsize": 9}
            axis.text(0.99, 0.99, text, transform=axis.transAxes, **style)
            break  # full precision stands in one line

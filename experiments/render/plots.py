"""Pictures of tables of runs: grouped bars, the ablation, curves over calibration sizes, quality
against size.

One axis per model. Error bars are one standard deviation over seeds. Losses are drawn on a
logarithmic axis, where methods differ by factors; full precision, whose loss is zero, is left out
there.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.plotting.style import BLACK, BLUE, PALETTE, SKY, panels_for
from experiments.render.numbers import deviation_over_seeds, mean_over_seeds
from experiments.render.sheet import Line, Sheet
from experiments.render.text import format_point, label_line

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
Drawer = Callable[[Axes, Sheet, list[Line], str], None]
Point = tuple[float, float]


def draw_runs(sheet: Sheet) -> Figure | None:
    """The picture that the table asks for; None where there is nothing measured to draw."""
    metric = sheet.headline()
    drawers: dict[str, Drawer] = {
        "bars": draw_bars,
        "ablation": draw_bars,
        "curve": draw_curve,
        "pareto": draw_pareto,
    }
    if metric is None or sheet.table.plot not in drawers:
        return None
    return draw_models(sheet, metric, drawers[sheet.table.plot])


def draw_models(sheet: Sheet, metric: str, drawer: Drawer) -> Figure | None:
    """One axis per model that has lines to draw, two side by side, one legend for all."""
    groups: dict[str, list[Line]] = {}
    for line in measured_lines(sheet, metric):
        groups.setdefault(line.model, []).append(line)
    if not groups:
        return None
    across = min(ACROSS, len(groups))
    width = 4.6 if across > 1 else 6.4
    height = bars_height(sheet, groups, metric) if drawer is draw_bars else 3.6
    figure, axes = panels_for(len(groups), across, (width, height))
    entries: dict[str, Artist] = {}  # of the legend
    for axis, (model, lines) in zip(axes, groups.items()):
        drawer(axis, sheet, lines, metric)
        axis.set_title(model)
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    figure.suptitle(textwrap.fill(sheet.table.title, 58 * across), fontsize=11)
    if len(entries) > 1:
        columns = min(5, len(entries))
        place = "outside lower center"
        figure.legend(entries.values(), entries.keys(), loc=place, ncols=columns)
    return figure


def bars_height(sheet: Sheet, groups: Mapping[str, list[Line]], metric: str) -> float:
    """Inches that the bars of one model take."""
    rows = max(len(rows_of_model(sheet, model, metric)) for model in groups)
    deepest = 1  # an ablation has one bar a row
    if sheet.table.plot != "ablation":
        deepest = max(len(series_by_settings(sheet, lines)) for lines in groups.values())
    return 1.2 + rows * (0.14 + 0.16 * deepest)


def shown_lines(sheet: Sheet, metric: str) -> list[Line]:
    """The lines that a picture of a metric is about, measured or not."""
    return [line for line in sheet.lines if line.quant is not None or metric not in LOSSES]


def measured_lines(sheet: Sheet, metric: str) -> list[Line]:
    """The lines that a picture of a metric shows."""
    return [line for line in shown_lines(sheet, metric) if line.values(metric)]


def rows_of_model(sheet: Sheet, model: str, metric: str) -> list[str]:
    """The rows of a model, those that were not run included."""
    rows = [line.row for line in shown_lines(sheet, metric) if line.model == model]
    return list(dict.fromkeys(rows))


def mean_of(line: Line, metric: str) -> float:
    """The mean over seeds."""
    return mean_over_seeds(line.values(metric))


def error_of(line: Line, metric: str) -> float:
    """The standard deviation over seeds; zero of a single one."""
    deviation = deviation_over_seeds(line.values(metric))
    return 0.0 if math.isnan(deviation) else deviation


# --- bars


def draw_bars(axis: Axes, sheet: Sheet, lines: list[Line], metric: str) -> None:
    """Horizontal bars, grouped by row, one colour per bit width; an ablation marks the paper's rows
    instead.

    A row without any figure says that it failed or was not run.
    """
    ablation = sheet.table.plot == "ablation"
    series = series_by_origin(sheet, lines) if ablation else series_by_settings(sheet, lines)
    colours = (BLUE, SKY) if ablation else PALETTE
    height = 0.8 if ablation else 0.8 / len(series)
    rows = rows_of_model(sheet, lines[0].model, metric)
    for number, (name, members) in enumerate(series.items()):
        offset = 0.0 if ablation else (number - (len(series) - 1) / 2) * height
        axis.barh(
            [rows.index(line.row) + offset for line in members],
            [mean_of(line, metric) for line in members],
            height,
            xerr=[error_of(line, metric) for line in members],
            label=name,
            color=colours[number % len(colours)],
            error_kw={"linewidth": 1, "capsize": 2},
        )
    least = min(mean_of(line, metric) for line in lines)
    if metric in LOSSES and least > 0:
        axis.set_xscale("log")
        axis.set_xlim(left=0.5 * least)
        few_ticks(axis.xaxis)
    mark_gaps(axis, sheet, lines, rows)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # downwards, and with room for rows that have no bar
    axis.set_xlabel(AXES.get(metric, metric))
    axis.grid(axis="x", alpha=0.3)


def mark_gaps(axis: Axes, sheet: Sheet, lines: list[Line], rows: list[str]) -> None:
    """Say of rows that have no bar whether they failed or were not run."""
    model = lines[0].model
    measured = {line.row for line in lines}
    failed = {line.row for line in sheet.lines if line.model == model and line.failures}
    for place, row in enumerate(rows):
        if row in measured:
            continue
        axis.text(
            0.01,
            place,
            "failed" if row in failed else "not run",
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color="gray",
        )


def few_ticks(axis: Axis) -> None:
    """Plain numbers at powers of ten of a logarithmic axis; at 1, 2, 5 times these where it is
    short, and at even steps where it is too short for two of them."""
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


def series_by_settings(sheet: Sheet, lines: list[Line]) -> dict[str, list[Line]]:
    """Lines by what tells those of one row apart: bit width and the grid's other values."""
    series: dict[str, list[Line]] = {}
    axes = sheet.axes()
    for line in lines:
        name = ", ".join([line.bits, *format_point(line, axes)])
        series.setdefault(name, []).append(line)
    return series


def series_by_origin(sheet: Sheet, lines: list[Line]) -> dict[str, list[Line]]:
    """Lines by whether the paper's table has their row."""
    extra = sheet.table.extra
    series = {
        "in the paper's table": [line for line in lines if line.row not in extra],
        "not in the paper's": [line for line in lines if line.row in extra],
    }
    return {name: members for name, members in series.items() if members}


# --- a curve


def draw_curve(axis: Axes, sheet: Sheet, lines: list[Line], metric: str) -> None:
    """The metric over the numeric axis of the grid (calibration size), one line per value of the
    others."""
    numeric = numeric_axis(sheet, lines)
    if numeric is None:
        return draw_bars(axis, sheet, lines, metric)
    others = [key for key in sheet.axes() if key != numeric]
    series: dict[str, list[Line]] = {}
    for line in lines:
        name = ", ".join(str(line.point[key]) for key in others)
        series.setdefault(name or line.row, []).append(line)
    for number, (name, members) in enumerate(series.items()):
        members.sort(key=lambda line: line.point[numeric])
        shift = 1.02 ** (number - len(series) / 2)  # error bars side by side
        axis.errorbar(
            [line.point[numeric] * shift for line in members],
            [mean_of(line, metric) for line in members],
            [error_of(line, metric) for line in members],
            label=name,
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            color=PALETTE[number % len(PALETTE)],
        )
    ticks = sorted({line.point[numeric] for line in lines})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("calibration rows" if numeric == "calib.n" else numeric)
    axis.set_ylabel(AXES.get(metric, metric))
    axis.grid(axis="y", alpha=0.3)


def numeric_axis(sheet: Sheet, lines: list[Line]) -> str | None:
    """The first key of the grid of which all lines have a number."""
    for key in sheet.axes():
        if all(isinstance(line.point.get(key), (int, float)) for line in lines):
            return key
    return None


# --- quality against size


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other point beats or equals in both coordinates, by ascending
    first coordinate."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


def name_points(axis: Axes, names: Sequence[tuple[str, Point]]) -> None:
    """Name points of a falling front, left below each, where no point is; names that would touch
    move further down."""
    axis.autoscale_view()
    scale = 72 / axis.figure.dpi
    previous = math.inf  # height of the name before
    for text, point in names:
        height = axis.transData.transform(point)[1] * scale
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
            arrowprops=arrow if down > LINE / 2 else None,
        )


def draw_pareto(axis: Axes, sheet: Sheet, lines: list[Line], metric: str) -> None:
    """The metric, of which less is better, against bytes of the model at rest, one marker per bit
    width.

    The line is the Pareto front: for every size the least that a model of at most that size has. Of
    points of the front whose sizes differ by less than `SAME_SIZE` the best is named.
    """
    lines = [line for line in lines if line.model_bytes]
    points = [(line.model_bytes / 2**20, mean_of(line, metric)) for line in lines]
    scatter_points(axis, lines, points)
    front = pareto_front(points)
    if front:
        sizes = [points[place][0] for place in front]
        losses = [points[place][1] for place in front]
        style = {"color": BLACK, "linewidth": 0.8, "zorder": 0}
        axis.step(sizes, losses, where="post", label="Pareto front", **style)
    note_full_size(axis, sheet, lines)
    if metric in LOSSES:
        axis.set_yscale("log")
        few_ticks(axis.yaxis)
    low, high = axis.get_xlim()
    axis.set_xlim(left=low - 0.4 * (high - low))  # room for names
    axis.margins(y=0.15)
    names = []
    for place in best_of_sizes(front, points):
        names.append((label_line(lines[place], sheet.axes()), points[place]))
    name_points(axis, names)
    axis.set(xlabel="model at rest [MiB]", ylabel=AXES.get(metric, metric))
    axis.grid(alpha=0.3)


def scatter_points(axis: Axes, lines: list[Line], points: Sequence[Point]) -> None:
    """Draw points, one marker per bit width."""
    widths = dict.fromkeys(line.bits for line in lines)
    for number, bits in enumerate(widths):
        members = [point for point, line in zip(points, lines) if line.bits == bits]
        axis.scatter(
            [size for size, _ in members],
            [loss for _, loss in members],
            s=28,
            marker=MARKERS[number],
            color=PALETTE[number],
            label=bits,
            alpha=0.8,
            linewidths=0,
        )


def best_of_sizes(front: list[int], points: Sequence[Point]) -> list[int]:
    """Of places of the front whose sizes are about the same the last, which is the best."""
    best = []
    for place, following in zip(front, [*front[1:], None]):
        if following is None or points[following][0] > SAME_SIZE * points[place][0]:
            best.append(place)
    return best


def note_full_size(axis: Axes, sheet: Sheet, lines: list[Line]) -> None:
    """Say in a corner how large the model is in full precision."""
    models = {line.model for line in lines}  # one, or none
    sizes = [x.model_bytes for x in sheet.done if x.model in models and x.quant is None]
    if sizes and sizes[0]:
        text = f"FP32: {sizes[0] / 2**20:.1f} MiB"
        axis.text(0.99, 0.99, text, transform=axis.transAxes, ha="right", va="top", fontsize=9)

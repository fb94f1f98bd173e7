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


def draw(sheet: Sheet) -> Figure | None:
    """The picture that the table asks for; None where there is nothing measured to draw."""
    metric = sheet.headline()
    if metric is None or sheet.table.plot is None:
        return None
    drawers: dict[str, Callable[[Axes, Sheet, list[Line], str], None]] = {
        "bars": bars,
        "ablation": bars,
        "curve": curve,
        "pareto": pareto,
    }
    drawer = drawers.get(sheet.table.plot)
    return None if drawer is None else per_model(sheet, metric, drawer)


def per_model(
    sheet: Sheet, metric: str, drawer: Callable[[Axes, Sheet, list[Line], str], None]
) -> Figure | None:
    """One axis per model that has lines to draw, two side by side, one legend for all."""
    groups = {m: [x for x in drawn(sheet, metric) if x.model == m] for m in sheet.models}
    groups = {m: lines for m, lines in groups.items() if lines}
    if not groups:
        return None
    across = min(ACROSS, len(groups))
    high = bars_high(sheet, groups, metric) if drawer is bars else 3.6
    figure, axes = panels_for(len(groups), across, (4.6 if across > 1 else 6.4, high))
    named: dict[str, Artist] = {}
    for axis, (model, lines) in zip(axes, groups.items()):
        drawer(axis, sheet, lines, metric)
        axis.set_title(model)
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles))
    figure.suptitle(textwrap.fill(sheet.table.title, 58 * across), fontsize=11)
    if len(named) > 1:
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=min(5, len(named))
        )
    return figure


def bars_high(sheet: Sheet, groups: Mapping[str, Sequence[Line]], metric: str) -> float:
    """Inches that the bars of one model take."""
    rows = max(len(rows_of(sheet, model, metric)) for model in groups)
    deep = (
        1
        if sheet.table.plot == "ablation"
        else max(len(_series(sheet, x, False)) for x in groups.values())
    )
    return 1.2 + rows * (0.14 + 0.16 * deep)


def asked(sheet: Sheet, metric: str) -> list[Line]:
    """The lines that a picture of a metric is about, measured or not."""
    return [line for line in sheet.lines if line.quant is not None or metric not in LOSSES]


def drawn(sheet: Sheet, metric: str) -> list[Line]:
    """The lines that a picture of a metric shows."""
    return [line for line in asked(sheet, metric) if line.values(metric)]


def rows_of(sheet: Sheet, model: str, metric: str) -> list[str]:
    """The rows of a model, those that were not run included."""
    return list(dict.fromkeys(line.row for line in asked(sheet, metric) if line.model == model))


def mean_of(line: Line, metric: str) -> float:
    """The mean over seeds."""
    return mean_over_seeds(line.values(metric))


def error_of(line: Line, metric: str) -> float:
    """The standard deviation over seeds; zero of a single one."""
    deviation = deviation_over_seeds(line.values(metric))
    return 0.0 if math.isnan(deviation) else deviation


def bars(axis: Axes, sheet: Sheet, lines: list[Line], metric: str) -> None:
    """Horizontal bars, grouped by row, one colour per bit width; an ablation marks the paper's rows
    instead.

    A row without any figure says that it failed or was not run.
    """
    ablation = sheet.table.plot == "ablation"
    series = _series(sheet, lines, ablation)
    rows = rows_of(sheet, lines[0].model, metric)
    log = metric in LOSSES and min(mean_of(line, metric) for line in lines) > 0
    height = 0.8 if ablation else 0.8 / len(series)
    for n, (name, chosen) in enumerate(series.items()):
        offset = 0.0 if ablation else (n - (len(series) - 1) / 2) * height
        places = [rows.index(line.row) + offset for line in chosen]
        means, errors = ([of(line, metric) for line in chosen] for of in (mean_of, error_of))
        colour = (BLUE, SKY)[n % 2] if ablation else PALETTE[n % len(PALETTE)]
        axis.barh(
            places,
            means,
            height,
            xerr=errors,
            label=name,
            color=colour,
            error_kw={"linewidth": 1, "capsize": 2},
        )
    if log:
        axis.set_xscale("log")
        axis.set_xlim(left=0.5 * min(mean_of(line, metric) for line in lines))
        few_ticks(axis.xaxis)
    for place, row in enumerate(rows):
        if row not in {line.row for line in lines}:
            failed = any(
                line.failures
                for line in sheet.lines
                if (line.model, line.row) == (lines[0].model, row)
            )
            axis.text(
                0.01,
                place,
                "failed" if failed else "not run",
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=9,
                color="gray",
            )
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # downwards, and with room for rows that have no bar
    axis.set_xlabel(AXES.get(metric, metric))
    axis.grid(axis="x", alpha=0.3)


def few_ticks(axis: Axis) -> None:
    """Plain numbers at powers of ten of a logarithmic axis; at 1, 2, 5 times these where it is
    short, and at even steps where it is too short for two of them."""
    low, high = axis.get_view_interval()
    decades = LogLocator(subs=(1.0,) if high / low > 50 else (1.0, 2.0, 5.0))
    axis.set_major_locator(decades if high / low > 5 else MaxNLocator(3, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _series(sheet: Sheet, lines: list[Line], ablation: bool) -> dict[str, list[Line]]:
    if not ablation:
        found: dict[str, list[Line]] = {}
        for line in lines:
            found.setdefault(label_of_series(line, sheet.axes()), []).append(line)
        return found
    named = {"in the paper's table": [], "not in the paper's": []}
    for line in lines:
        named[
            "not in the paper's" if line.row in sheet.table.extra else "in the paper's table"
        ].append(line)
    return {name: chosen for name, chosen in named.items() if chosen}


def label_of_series(line: Line, axes: Sequence[str]) -> str:
    """What tells the bars of one row apart: bit width and the grid's other values."""
    return ", ".join([line.bits, *format_point(line, axes)])


def curve(axis: Axes, sheet: Sheet, lines: list[Line], metric: str) -> None:
    """The metric over the numeric axis of the grid (calibration size), one line per value of the
    others."""
    numeric = next(
        (k for k in sheet.axes() if all(isinstance(x.point.get(k), (int, float)) for x in lines)),
        None,
    )
    if numeric is None:
        return bars(axis, sheet, lines, metric)
    others = [k for k in sheet.axes() if k != numeric]
    series: dict[str, list[Line]] = {}
    for line in lines:
        series.setdefault(", ".join(str(line.point[k]) for k in others) or line.row, []).append(
            line
        )
    for n, (name, chosen) in enumerate(series.items()):
        chosen = sorted(chosen, key=lambda line: line.point[numeric])
        # error bars side by side
        shifted = [line.point[numeric] * 1.02 ** (n - len(series) / 2) for line in chosen]
        means, errors = ([of(line, metric) for line in chosen] for of in (mean_of, error_of))
        marker = MARKERS[n % len(MARKERS)]
        colour = PALETTE[n % len(PALETTE)]
        axis.errorbar(shifted, means, errors, label=name, marker=marker, capsize=3, color=colour)
    ticks = sorted({line.point[numeric] for line in lines})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set(
        xlabel="calibration rows" if numeric == "calib.n" else numeric,
        ylabel=AXES.get(metric, metric),
    )
    axis.grid(axis="y", alpha=0.3)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats or equals in both coordinates, by ascending
    first coordinate."""
    kept: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: points[i]):
        if not kept or points[place][1] < points[kept[-1]][1]:
            kept.append(place)
    return kept


def name_below(axis: Axes, names: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Name points of a falling front, left below each, where no point is; names that would touch
    move further down."""
    axis.autoscale_view()
    scale = 72 / axis.figure.dpi
    last = math.inf
    for text, point in names:
        height = axis.transData.transform(point)[1] * scale
        down = max(0.0, height - (last - LINE))
        last = height - down
        axis.annotate(
            text,
            point,
            fontsize=8,
            textcoords="offset points",
            xytext=(-3, -3 - down),
            ha="right",
            va="top",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": BLACK, "shrinkB": 3}
            if down > LINE / 2
            else None,
        )


def pareto(axis: Axes, sheet: Sheet, lines: list[Line], metric: str) -> None:
    """The metric, of which less is better, against bytes of the model at rest, one marker per bit
    width.

    The line is the Pareto front: for every size the least that a model of at most that size has. Of
    points of the front whose sizes differ by less than `SAME_SIZE` the best is named.
    """
    lines = [line for line in lines if line.model_bytes]
    points = [(line.model_bytes / 2**20, mean_of(line, metric)) for line in lines]
    for n, bits in enumerate(dict.fromkeys(line.bits for line in lines)):
        chosen = [point for point, line in zip(points, lines) if line.bits == bits]
        axis.scatter(
            *zip(*chosen),
            s=28,
            marker=MARKERS[n],
            color=PALETTE[n],
            label=bits,
            alpha=0.8,
            linewidths=0,
        )
    best = front(points)
    if best:
        sizes, losses = zip(*(points[place] for place in best))
        axis.step(
            sizes, losses, where="post", label="Pareto front", color=BLACK, linewidth=0.8, zorder=0
        )
    named = [
        place
        for place, following in zip(best, [*best[1:], None])
        if following is None or points[following][0] > SAME_SIZE * points[place][0]
    ]
    full = next(
        (
            x.model_bytes
            for x in sheet.done
            if lines and x.model == lines[0].model and x.quant is None
        ),
        None,
    )
    if full:
        said = f"FP32: {full / 2**20:.1f} MiB"
        axis.text(0.99, 0.99, said, transform=axis.transAxes, ha="right", va="top", fontsize=9)
    if metric in LOSSES:
        axis.set_yscale("log")
        few_ticks(axis.yaxis)
    low, high = axis.get_xlim()
    axis.set_xlim(left=low - 0.4 * (high - low))  # room for names
    axis.margins(y=0.15)
    name_below(axis, [(label_line(lines[place], sheet.axes()), points[place]) for place in named])
    axis.set(xlabel="model at rest [MiB]", ylabel=AXES.get(metric, metric))
    axis.grid(alpha=0.3)

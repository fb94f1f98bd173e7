"""Methods in the report as elements of the page: bars, and loss against size.

Every bar and point carries its model, bits and method as `data-` attributes, by which the script of
the page filters, and its name, which shows where a pointer rests on it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from experiments.plotting.style import BLUE, ORANGE
from experiments.render.formats import format_tags
from experiments.render.numbers import find_heading, format_mean
from experiments.render.plots import (
    OTHERS,
    marked_name,
    measured_lines,
    pareto_front,
    plotted_lines,
    split_by,
)
from experiments.render.sheet import Sheet

FIRST_BITS = "W6A6"  # of the bars that are not folded away
COLOURS = {"STAQ": BLUE, "PTQ4ARVG": ORANGE, "": OTHERS}
WIDTH = 560  # of a chart, in units of its own that the page scales
HEIGHT = 360
LEFT = 62  # room for numbers and words
BOTTOM = 44
TOP = 14
RIGHT = 14
RADIUS = 5.0  # of a mark
SQUARE = ((-1, -1), (1, -1), (1, 1), (-1, 1))
DIAMOND = ((0, -1), (1, 0), (0, 1), (-1, 0))


# --- bars


def format_bars(sheet: Sheet, metric: str) -> str:
    """Bars of all methods, one panel per model: those of `FIRST_BITS`, others folded away."""
    lines = measured_lines(plotted_lines(sheet, metric))
    parts = []
    for bits, of_bits in sorted_bits(lines):
        panels = []
        for model, members in split_by(of_bits, "model").items():
            panels.append(bars_panel(model, bits, members, metric))
        grid = f'<div class="grid">{"".join(panels)}</div>'
        if bits != FIRST_BITS:
            grid = f"<details><summary>{bits}</summary>{grid}</details>"
        parts.append(grid)
    return "".join(parts)


def sorted_bits(lines: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The lines by bit width, those that are shown at once first."""
    groups = split_by(lines, "bits")
    for bits in sorted(groups, key=lambda name: (name != FIRST_BITS, list(groups).index(name))):
        yield bits, groups[bits]


def bars_panel(model: str, bits: str, lines: pd.DataFrame, metric: str) -> str:
    """A bar a method, the best on top; lengths are logarithmic."""
    ordered = lines.sort_values("mean", kind="stable")
    least = ordered["mean"].min()
    span = math.log(ordered["mean"].max() / least) or 1.0
    digits = find_heading(metric)[1]
    rows = []
    for label, row, mean in ordered[["label", "row", "mean"]].itertuples(index=False):
        length = 8 + 92 * math.log(mean / least) / span  # in per cent; the best has a bar too
        name = marked_name(label)
        kind = f"bar {name.lower()}".strip()
        bar = f'<div class="{kind}" style="width:{length:.1f}%"></div>'
        cells = f"<th>{html.escape(label)}</th><td>{bar}</td>"
        figure = format_mean(mean, math.nan, digits)
        marked = ' class="marked"' if name else ""
        tags = format_tags(model, bits, row)
        rows.append(f"<tr{marked} {tags}>{cells}<td>{figure}</td></tr>")
    table = f'<table class="bars">{"".join(rows)}</table>'
    tags = f'data-panel="{html.escape(model)}"'
    return f"<section {tags}><h3>{html.escape(model)}, {bits}</h3>{table}</section>"


# --- loss against size


def format_pareto(sheet: Sheet, metric: str) -> str:
    """Loss against size, one chart per model."""
    lines = measured_lines(plotted_lines(sheet, metric)).dropna(subset="mib")
    lines = lines[lines["mean"] > 0]  # which a logarithmic axis can show
    panels = []
    for model, members in split_by(lines, "model").items():
        chart = pareto_chart(model, members, metric)
        panels.append(
            f'<section data-panel="{html.escape(model)}"><h3>{html.escape(model)}</h3>'
            f'{chart}<p class="picked">Rest on a point, or tap it, to see its name.</p></section>'
        )
    return f'<div class="grid">{"".join(panels)}</div>'


def pareto_chart(model: str, lines: pd.DataFrame, metric: str) -> str:
    """One chart: a mark a method, its shape by bits, and the front as a line."""
    sizes = linear_scale(lines["mib"].min(), lines["mib"].max(), LEFT, WIDTH - RIGHT)
    losses = logarithmic_scale(lines["mean"].min(), lines["mean"].max(), HEIGHT - BOTTOM, TOP)
    heading, digits = find_heading(metric)
    parts = [axes_of(sizes, losses, heading)]
    parts.append(front_line(pareto_front(lines), sizes, losses))
    # what stands out is drawn last, above the others
    names = lines["label"].map(marked_name)
    for name in ("", "PTQ4ARVG", "STAQ"):
        members = lines[names == name]
        columns = ["label", "row", "bits", "mib", "mean"]
        for label, row, bits, mib, mean in members[columns].itertuples(index=False):
            figure = format_mean(mean, math.nan, digits)
            title = f"{label}, {bits}: {heading} {figure}, {mib:.2f} MiB"
            mark = draw_mark(bits, sizes.place(mib), losses.place(mean), COLOURS[name], title)
            parts.append(f"<g {format_tags(model, bits, row)}>{mark}</g>")
    words = f"{heading} against size of {len(lines)} quantized versions of {model}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(words)}">'
        f"{''.join(parts)}</svg>"
    )


@dataclass(frozen=True)
class Scale:
    """Values to places on a chart.

    Attributes:
        ends: the values at both ends. places: where these are. ticks: values that are written.
    """

    ends: tuple[float, float]
    places: tuple[float, float]
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value is."""
        low, high, own = (*self.ends, value)
        if self.logarithmic:
            low, high, own = (math.log(number) for number in (low, high, own))
        start, end = self.places
        return start + (own - low) / (high - low) * (end - start)


def linear_scale(least: float, largest: float, start: float, end: float) -> Scale:
    """A scale over values with room at both ends, and a tick at every whole number."""
    room = 0.06 * (largest - least) or 1.0
    ends = (least - room, largest + room)
    ticks = range(math.ceil(ends[0]), math.floor(ends[1]) + 1)
    return Scale(ends, (start, end), tuple(map(float, ticks)))


def logarithmic_scale(least: float, largest: float, start: float, end: float) -> Scale:
    """A logarithmic scale with room at both ends, and a tick at every power of ten."""
    ends = (least / 1.6, largest * 1.6)
    powers = range(math.ceil(math.log10(ends[0])), math.floor(math.log10(ends[1])) + 1)
    ticks = tuple(10.0**power for power in powers)
    return Scale(ends, (start, end), ticks, logarithmic=True)


def axes_of(sizes: Scale, losses: Scale, heading: str) -> str:
    """Lines and words of both axes."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in losses.ticks:
        height = losses.place(tick)
        parts.append(f'<path class="rule" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"></path>')
        parts.append(place_words(LEFT - 6, height + 4, f"{tick:g}", "end"))
    for tick in sizes.ticks:
        parts.append(place_words(sizes.place(tick), bottom + 18, f"{tick:g}", "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"></path>')
    parts.append(place_words((LEFT + WIDTH) / 2, HEIGHT - 6, "model at rest [MiB]", "middle"))
    parts.append(place_words(LEFT + 6, TOP + 8, heading, "start"))
    return "".join(parts)


def place_words(x: float, y: float, words: str, anchor: str) -> str:
    """Words at a place; `anchor` says which end of them."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}>{html.escape(words)}</text>"


def front_line(front: pd.DataFrame, sizes: Scale, losses: Scale) -> str:
    """The least loss that a model of at most that size has, as steps."""
    steps = []
    for mib, mean in front[["mib", "mean"]].itertuples(index=False):
        place = f"{sizes.place(mib):.1f}"
        steps.append(f"H{place}" if steps else f"M{place} {losses.place(mean):.1f}")
        steps.append(f"V{losses.place(mean):.1f}")
    return f'<path class="front" d="{"".join(steps)}"></path>'


def draw_mark(bits: str, x: float, y: float, colour: str, title: str) -> str:
    """A point with its name: a circle of W8A8, a square of W6A6, a diamond of others."""
    inside = f"<title>{html.escape(title)}</title>"
    if bits == "W8A8":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}">{inside}</circle>'
    reach = 0.9 * RADIUS if bits == "W6A6" else 1.3 * RADIUS
    corners = SQUARE if bits == "W6A6" else DIAMOND
    points = " ".join(f"{x + reach * dx:.1f},{y + reach * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}">{inside}</polygon>'

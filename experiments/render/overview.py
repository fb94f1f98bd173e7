"""What came out, in five pictures and five sentences: the opening of the report and of the results'
page.

Figures in sentences stand as `{name}`, of those in `quotes.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.render.quotes import LoadSheet, quote_figure
from experiments.render.sheet import Sheet
from experiments.render.text import describe_picture, describe_samples

FIGURE_NAME = re.compile(r"\{([\w-]+)\}")


@dataclass(frozen=True)
class Highlight:
    """A picture with what it shows.

    Attributes:
        heading: the sentence that stays, if nothing else does.
        words: what a reader needs to see it in the picture.
        table: of the registry, whose picture it is.
        settings: of the block `figure` that draws it; None stands for the table's samples.
        page: where more of it stands, beside the page of results.
    """

    heading: str
    words: str
    table: str
    settings: Mapping[str, str] | None
    page: str


HIGHLIGHTS = (
    Highlight(
        heading="At six bits the method decides whether there is an image.",
        words="The same seeds, in full precision and quantized. A token that is drawn otherwise "
        "leads to another image of the class, so a method is judged by how good its images are, "
        "and by KL, not by whether they are equal.",
        table="gallery",
        settings=None,
        page="METHODS.md",
    ),
    Highlight(
        heading="STAQ, our own, leaves {staq-share} of PTQ4ARVG's KL.",
        words="It is as static as PTQ4ARVG and as free of training. Ahead of it are methods that "
        "need more: SVDQuant, with a part of the weights in 16 bits, and on some models QuaRot, "
        "which rotates, and OmniQuant, which trains. All three find ranges at run time.",
        table="methods",
        settings={"plot": "ranking", "quant": "w6a6"},
        page="METHODS.md",
    ),
    Highlight(
        heading="With four-bit weights STAQ leaves the least for its bytes.",
        words="With eight bits QuaRot and SVDQuant are on the front too. A point is a method at a "
        "bit width; the line is the least KL that a model of at most that size has.",
        table="methods",
        settings={},
        page="METHODS.md",
    ),
    Highlight(
        heading="The loss sits in few places.",
        words="PTQ4ARVG loses most by attention weights on VAR and by fc2's inputs on PAR and "
        "MAR; of STAQ no single group makes up most of the loss. A cell is the KL if its group "
        "alone is rounded.",
        table="sensitivity",
        settings={"quant": "w6a6"},
        page="METHODS.md",
    ),
    Highlight(
        heading="Integers make generation {int8-times} times as fast as BF16.",
        words="RAR-B with all products, attention and KV cache in INT8 takes {int8-memory} of the "
        "memory. The dashed line is BF16, the dotted one BF16 of an earlier revision.",
        table="generate",
        settings={},
        page="SPEED.md",
    ),
)


def fill_figures(words: str, load_sheet: LoadSheet) -> str:
    """A sentence with its figures."""
    return FIGURE_NAME.sub(lambda match: quote_figure(match[1], load_sheet), words)


def describe_highlight(highlight: Highlight, sheet: Sheet) -> str:
    """What its picture shows, for who cannot see it."""
    if highlight.settings is None:
        return describe_samples(sheet)
    picks = {key: [value] for key, value in highlight.settings.items() if key != "plot"}
    return describe_picture(sheet.restricted(picks))


def name_picture(table: str, settings: Mapping[str, str]) -> str:
    """The name of a table's picture: with all settings that it is drawn by."""
    return "-".join((table, *settings.values()))


def picture_of(highlight: Highlight, figures: Path, samples: Path) -> Path:
    """Where the committed picture of a highlight is."""
    if highlight.settings is None:
        return samples / f"{highlight.table}.png"
    return figures / f"{name_picture(highlight.table, highlight.settings)}.png"


def overview_block(page: Path, load_sheet: LoadSheet, find: Callable[[Highlight], Path]) -> str:
    """The highlights as Markdown; `find` says where the picture of one is."""
    parts = []
    for number, highlight in enumerate(HIGHLIGHTS, start=1):
        sheet = load_sheet(highlight.table)
        if not sheet.done:
            continue
        heading = fill_figures(highlight.heading, load_sheet)
        words = fill_figures(highlight.words, load_sheet)
        parts.append(f"**{number}. {heading}** {words} ([more]({highlight.page}))")
        picture = os.path.relpath(find(highlight), page.parent)
        parts.append(f"![{describe_highlight(highlight, sheet)}]({picture})")
    return "\n\n".join(parts)

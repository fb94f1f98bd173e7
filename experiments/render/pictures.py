"""Which picture a table has, and whether a picture on disk is of the figures at hand.

A PNG carries a digest of the figures that it was made of. So one in the repository can be checked on any machine,
whatever fonts and versions there make of the pixels.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from experiments.figures import save_figure
from experiments.provenance import digest
from experiments.render import measured, plots, text
from experiments.render.sheet import Sheet


def source(sheet: Sheet) -> str:
    """Digest of the figures that a picture of the sheet is made of."""
    sizes = [line.model_bytes for line in sheet.lines]
    details = [r.get("detail") for line in sheet.lines for r in line.results]
    return digest([text.quality_csv(sheet), sizes, details], 16)


def plot(sheet: Sheet, path: Path) -> bool:
    """Draw the table's picture; says whether it has one. Without one, what stands there is removed."""
    figure = (plots if sheet.table.what == "run" else measured).draw(sheet)
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    save_figure(figure, path, source(sheet))
    return True


def current(sheet: Sheet, path: Path) -> bool:
    """Whether the picture is there and of these figures."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Source") == source(sheet)
    except (OSError, UnidentifiedImageError):
        return False

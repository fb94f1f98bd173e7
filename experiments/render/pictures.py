"""The pictures of a table, a plot and a grid of samples, and whether those on disk are current.

A PNG carries a digest of what it was made of. So one in the repository can be checked on any
machine, whatever fonts and versions there make of the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.identity.places import stated_digest
from experiments.plotting.grids import image_gallery, image_grid
from experiments.plotting.style import save_figure
from experiments.render.analysis_plots import draw_analysis
from experiments.render.formats import quality_csv
from experiments.render.plots import draw_runs
from experiments.render.sheet import Sheet
from experiments.render.text import label_line
from experiments.store.files import read_arrays
from experiments.store.folders import find_damage
from experiments.store.results import RESULT, ResultError, read_result
from ptq.errors import say
from ptq.files import DamagedFile, value_digest

IMAGES = 30  # of a row
OWN_TITLE = "STAQ (ours)"
ROW_TITLES = {"FP32": "full precision", "STAQ": OWN_TITLE}  # of galleries


def plot_source(sheet: Sheet) -> str:
    """Digest of the figures that a picture of the sheet is made of."""
    sizes = []  # of models at rest, which quality.csv does not have
    details = []
    for line in sheet.lines:
        sizes.append(line.model_bytes)
        for result in line.results:
            details.append(result.get("detail"))
    return value_digest([quality_csv(sheet), sizes, details], 16)


def draw_plot(sheet: Sheet, path: Path) -> bool:
    """Draw the table's picture; says whether it has one, else removes what stands there."""
    is_run = sheet.table.what == "run"
    figure = draw_runs(sheet) if is_run else draw_analysis(sheet)
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    save_figure(figure, path, plot_source(sheet), palette="own")
    return True


def compared_runs(sheet: Sheet) -> dict[str, str]:
    """The runs whose images stand side by side, hashes by title.

    Full precision and every row of the first model at its lowest bit width. All have the first
    seed, so that the same place shows the same random numbers.
    """
    if sheet.table.what != "run" or not sheet.done:
        return {}
    first = sheet.done[0]
    seed = first.results[0]["seed"]
    lines = [line for line in sheet.done if line.model == first.model]
    lowest = lines[-1].quant  # bit widths stand in descending order, after full precision
    hashes = {}
    for line in lines:
        if line.quant not in (None, lowest):
            continue
        for result in line.results:
            if result["seed"] == seed:
                hashes[label_line(line, sheet.axes())] = result["provenance"]["hash"]
    return hashes


def gallery_runs(sheet: Sheet) -> dict[tuple[str, str], str]:
    """The runs of a gallery, all of the first seed: hashes by model and row."""
    hashes = {}
    for line in sheet.done:
        hashes[line.model, line.row] = line.results[0]["provenance"]["hash"]
    return hashes


def samples_source(sheet: Sheet) -> str:
    """Digest of the runs whose images a whole picture of samples of the sheet shows."""
    if sheet.table.gallery:
        return value_digest(list(gallery_runs(sheet).items()), 16)
    return value_digest(compared_runs(sheet), 16)


def draw_samples(sheet: Sheet, path: Path, runs: Path) -> None:
    """Draw images of the compared runs whose samples lie under `runs`.

    Samples that are damaged are named and left out. A picture that has them all carries
    `samples_source`. Without any, nothing is written, and what stood there is removed.
    """
    gallery = sheet.table.gallery
    wanted = gallery_runs(sheet) if gallery else compared_runs(sheet)
    identities = stated_identities(sheet)
    panels = {}  # images (N, 3, S, S)
    for title, key in wanted.items():
        images = read_samples(runs, key, identities.get(key))
        if images is not None:
            panels[title] = images
    if not panels:
        path.unlink(missing_ok=True)
        return
    whole = samples_source(sheet) if len(panels) == len(wanted) else None
    if gallery:
        image_gallery(name_panels(panels), path, marked=OWN_TITLE, source=whole)
    else:
        image_grid(panels, path, rows=3, source=whole)


def name_panels(
    panels: Mapping[tuple[str, str], np.ndarray],
) -> dict[tuple[str, str], np.ndarray]:
    """The panels of a gallery under names for who sees it first."""
    named = {}
    for (model, row), images in panels.items():
        family, _, kind = model.partition("_")
        method = ROW_TITLES.get(row, row)
        named[f"{family.upper()} {kind}".strip(), method] = images
    return named


def stated_identities(sheet: Sheet) -> dict[str, str | None]:
    """The digests of the whole identities of a sheet's results, by hash."""
    identities = {}
    for line in sheet.done:
        for result in line.results:
            origin = result["provenance"]
            identities[origin["hash"]] = origin.get("identity_digest")
    return identities


def read_samples(runs: Path, key: str, identity: str | None = None) -> np.ndarray | None:
    """The first images (N, 3, S, S) of the run with this hash and, if it is given, of this whole
    identity; None if they are not there, or damaged, which is said."""
    for archive in sorted(runs.glob(f"*-{key}/samples.npz")):
        # runs of other defaults or devices lie side by side
        if identity and stated_digest(archive.parent) not in (None, identity):
            continue
        try:
            require_own(archive)
            images = read_arrays(archive, "arr_0")["arr_0"][:IMAGES]  # (N, S, S, 3)
        except (DamagedFile, ResultError) as error:
            say(f"ignored: {error}")
            continue
        return images.transpose(0, 3, 1, 2)  # (N, 3, S, S)
    return None


def require_own(archive: Path) -> None:
    """Make sure that a run's samples are those that its result names, if it names any.

    Raises:
        DamagedFile: they are not. ResultError: the result is damaged.
    """
    result_file = archive.with_name(RESULT)
    if not result_file.is_file():
        return
    described = read_result(result_file).get("files", {})
    own = {name: entry for name, entry in described.items() if name == archive.name}
    damage = find_damage(archive.parent, own, contents=True)
    if damage:
        raise DamagedFile(damage)


def is_current(path: Path, made_of: str) -> bool:
    """Whether the picture is there and carries this digest."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Source") == made_of
    except (OSError, UnidentifiedImageError):
        return False

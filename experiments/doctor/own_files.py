"""Checks of files: weights, what judges images, data sets."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.data.sets import SETS
from experiments.doctor.findings import MISSING, OK, PART, Finding
from experiments.evaluate import held_out
from experiments.evaluate.extractors import inception
from experiments.evaluate.options import OFFICIAL_INCEPTION
from experiments.evaluate.references import STATISTICS, array_names
from experiments.registry.tables import load_tables
from models import registry
from models.weights import pins
from models.weights.checkpoints import CheckpointError
from ptq.errors import error_line
from ptq.spec import ConfigError

ADM_BATCH = "VIRTUAL_imagenet256_labeled.npz"  # of guided-diffusion: 256 pixels
ADM_HOME = "github.com/openai/guided-diffusion"
IMAGENET_CLASSES = 1000
MOST_SHOWN = 3  # files of a list, before the line says how many more
FIDELITY_HOME = "github.com/toshas/torch-fidelity"


def check_files(
    reference: str | None, inception_weights: str | None, heldout: str | None
) -> list[Finding]:
    """All checks of this file, in the order in which they are shown."""
    findings = [check_shipped()]
    findings += check_weights_folder()
    findings += map(check_weights, paper_models())
    findings.append(check_inception(inception_weights))
    findings.append(check_reference(reference))
    findings.append(check_held_out(heldout))
    findings += map(check_data, SETS)
    return findings


def check_shipped() -> Finding:
    """The files of models/zoo, each compared with its digest."""
    table = registry.ZOO / pins.TABLE
    faults = []
    names = list(pins.read_table(table))
    for name in names:
        path = registry.ZOO / name
        try:
            pins.require_pinned(path)
        except CheckpointError:
            faults.append(f"{name} is another")
            continue
        if not path.is_file():
            faults.append(f"{name} is missing")
    if faults:
        more = f"; and {len(faults) - MOST_SHOWN} more" if len(faults) > MOST_SHOWN else ""
        return Finding("models/zoo", MISSING, "; ".join(faults[:MOST_SHOWN]) + more)
    return Finding("models/zoo", OK, f"{len(names)} files, each as its digest says")


def check_weights_folder() -> list[Finding]:
    """The folder that a variable names, if there is such a variable."""
    folder = os.environ.get(registry.WEIGHTS_FOLDER)
    if not folder:
        return []
    fault = registry.folder_fault()
    if fault is not None:
        reason = fault.removeprefix(f"{registry.WEIGHTS_FOLDER}: ")
        return [Finding(registry.WEIGHTS_FOLDER, MISSING, reason)]
    return [Finding(registry.WEIGHTS_FOLDER, OK, folder)]


def paper_models() -> dict[str, list[str]]:
    """The released models of the paper's tables, by family."""
    families: dict[str, list[str]] = {}
    for table in load_tables().values():
        for name in table.models.get("paper", ()):
            models = families.setdefault(registry.find_preset(name).family, [])
            if name not in models:
                models.append(name)
    return families


def weights_name(family: str) -> str:
    """What the finding on a family's weights is called."""
    return f"weights of {family}"


def check_weights(family: str) -> Finding:
    """Which released models of a family are here, with their tokenizers."""
    names = paper_models()[family]
    here = []
    lacking = []
    for name in names:
        try:
            is_here = registry.has_weights(name)
        except CheckpointError as error:  # the notes of added files are damaged
            return Finding(weights_name(family), MISSING, error_line(error))
        (here if is_here else lacking).append(name)
    if not lacking:
        return Finding(weights_name(family), OK, ", ".join(here))
    advice = f"not here: {', '.join(lacking)}; python -m models add FOLDER, or fetch"
    if here:
        return Finding(weights_name(family), PART, f"{', '.join(here)}; {advice}")
    return Finding(weights_name(family), MISSING, advice)


def check_inception(path: str | None) -> Finding:
    """Whether Inception's weights load, and are the official ones."""
    try:
        extractor = inception.load_inception(path)
    except CheckpointError:
        what = "give inception=PATH of" if path is None else f"{path} does not load as"
        text = f"{what} {inception.FILE}, a release of {FIDELITY_HOME}"
        return Finding("Inception", MISSING, text)
    if extractor.digest != OFFICIAL_INCEPTION:
        text = f"not the official weights, but {extractor.digest}: figures do not compare"
        return Finding("Inception", PART, text)
    return Finding("Inception", OK, f"the official weights, {extractor.digest}")


def check_reference(path: str | None) -> Finding:
    """Whether a reference batch holds what ADM's does; its values are not read."""
    if path is None:
        return Finding("reference", MISSING, f"give reference=PATH of {ADM_BATCH}, from {ADM_HOME}")
    try:
        arrays = array_names(Path(path))
    except (OSError, ValueError) as error:
        return Finding("reference", MISSING, error_line(error))
    wanted = ["arr_0"]
    for pair in STATISTICS.values():
        wanted += pair
    lacking = [name for name in wanted if name not in arrays]
    if lacking:
        return Finding("reference", PART, f"{path} holds no {', '.join(lacking)}")
    return Finding("reference", OK, f"{path}: statistics and images")


def check_held_out(folder: str | None) -> Finding:
    """Whether validation images are there, each with its class; none is decoded."""
    name = "validation images"
    if folder is None:
        return Finding(name, MISSING, "give heldout=FOLDER of ImageNet's; else KL and NLL are null")
    place = Path(folder).expanduser()
    try:
        is_flat = (place / held_out.GROUND_TRUTH).is_file()
        list_images = held_out.list_flat if is_flat else held_out.list_by_class
        count = len(list_images(place, IMAGENET_CLASSES))
    except (OSError, ConfigError) as error:
        return Finding(name, MISSING, error_line(error))
    return Finding(name, OK if count else MISSING, f"{count} in {folder}")


def check_data(name: str) -> Finding:
    """Where a data set lies; `experiments.data check` compares its files."""
    data_set = SETS[name]
    try:
        return Finding(data_set.TITLE, OK, str(data_set.find_folder()))
    except ValueError:
        advice = "not here; python -m experiments.data --help says how to get it"
        return Finding(data_set.TITLE, MISSING, advice)

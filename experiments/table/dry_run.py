"""What a request will take: its cells, what of them is done, and an estimate of the rest.

Nothing is run, fetched, converted or written.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments.config.compose import configure
from experiments.config.schema import RunConfig
from experiments.estimate.cells import ELSEWHERE, CellCost, Estimator, Quantity, Target
from experiments.estimate.costs import read_costs
from experiments.evaluate.references import MANIFOLD_IMAGES
from experiments.identity.results import committed_results, stored_result
from experiments.images.image_sets import open_images
from experiments.registry.tables import find_table, full_precision_overrides, override_key
from experiments.run.dry_run import (
    NOTHING,
    PricedCell,
    State,
    count_images,
    find_target,
    has_weights,
    price_cell,
    print_price,
    run_state,
)
from experiments.speed.result import OF_MODEL
from experiments.table.engine import Engine
from experiments.table.local import worker_devices
from experiments.table.paper_scale import Judging, Place
from experiments.table.request import Request, runs_of
from experiments.table.tables import CellJob, list_jobs
from models import registry
from models.weights.checkpoints import CheckpointError
from ptq.spec import ConfigError

TWICE = 2.0  # by which factor a measurement that is no run may be off


def print_request(request: Request) -> None:
    """Print the price of every table of a request.

    Raises:
        ConfigError: an engine's GPUs are not here.
    """
    estimators: dict[Target, Estimator] = {}
    seen: set[str] = set()  # cells of two tables may be one job, which is done once
    for name in request.cells:
        cells = [entry for entry in list_jobs(request) if entry.table.name == name]
        if not cells:
            print(f"{name}: no cell has all the values that are picked")
            continue
        target = request_target(request, config_of_cell(cells[0]))
        if target not in estimators:
            costs = read_costs(runs_of(request), target.device, request.names)
            estimators[target] = Estimator(costs, target, reference_images(request))
        estimator = estimators[target]
        priced = []
        for entry in with_references(cells):
            priced.append(price_entry(estimator, entry, seen))
        print(f"\n{find_table(name).title}\n")
        print_price(priced, target, target.device == "cpu" or torch.cuda.is_available())


def config_of_cell(entry: CellJob) -> RunConfig:
    """The config of a cell; of a benchmark, that of its model alone."""
    overrides = list(entry.cell.overrides)
    if entry.job.what == "speed":
        overrides = [text for text in overrides if override_key(text) in OF_MODEL]
    return configure(overrides)


def reference_images(request: Request) -> int:
    """Images of the reference that judges released models; of one that is not here, those of
    ADM's."""
    if request.judging is None or request.judging.get("extractor") == "fashion":
        return 0  # whose reference holds features
    path = request.judging.get("reference")
    if path is None or not Path(path).exists():
        return MANIFOLD_IMAGES
    try:
        return open_images("reference", Path(path)).n
    except ConfigError:  # statistics alone
        return 0


def with_references(cells: Sequence[CellJob]) -> list[CellJob]:
    """The cells, and before them the full-precision ones that quantized ones are compared with
    where a part of a table leaves these out: they are made first."""
    known: set[tuple[object, int]] = set()  # model and seed
    for entry in cells:
        if entry.table.full_precision(entry.cell.row):
            known.add((entry.cell.point.get("model"), entry.cell.seed))
    complete: list[CellJob] = []
    for entry in cells:
        key = (entry.cell.point.get("model"), entry.cell.seed)
        if entry.job.what == "run" and key not in known:
            known.add(key)
            complete.append(reference_of(entry))
        complete.append(entry)
    return complete


def reference_of(entry: CellJob) -> CellJob:
    """The full-precision cell that a quantized one is compared with."""
    model = entry.cell.point.get("model")
    cell = replace(
        entry.cell,
        row="full precision",
        point={} if model is None else {"model": model},
        overrides=full_precision_overrides(entry.cell.overrides),
    )
    return replace(entry, cell=cell, job=replace(entry.job, overrides=cell.overrides))


def request_target(request: Request, config: RunConfig) -> Target:
    """Where the cells of a request are to run."""
    engine = request.engine
    released = not registry.find_preset(config.model.name).weights.shipped
    target = find_target(config, released, max(engine.gpus, 1))
    if engine.name == "inproc":
        return replace(target, gpus=1) if request.judging is None else target
    if target.device == "cpu":
        return share_cores(target, engine)
    if request.judging is None:
        target = replace(target, gpus=1)  # a twin's images are one process's
    if engine.name == "slurm" or not torch.cuda.is_available():
        return replace(target, workers=engine.jobs)
    workers = len(worker_devices(engine))
    return replace(target, workers=workers, sharing=engine.jobs)


def share_cores(target: Target, engine: Engine) -> Target:
    """Workers without a GPU, each with its share of the cores."""
    threads = engine.threads or max(1, (os.cpu_count() or 1) // engine.jobs)
    return replace(target, name=f"{platform.machine()} CPU, {threads} threads", workers=engine.jobs)


def price_entry(estimator: Estimator, entry: CellJob, seen: set[str]) -> PricedCell:
    """What a cell of a table takes, and what is left of it."""
    name = describe_cell(entry)
    is_seen = entry.job.text() in seen
    seen.add(entry.job.text())
    if entry.job.what != "run":
        return price_measurement(name, entry)
    config = configure(list(entry.cell.overrides))
    state = State(done=True) if is_seen else cell_state(config, entry.job.paper)
    return price_cell(estimator, name, config, state)


def describe_cell(entry: CellJob) -> str:
    """A cell in words: values of model and grid, row, seed."""
    values = map(str, entry.cell.point.values())
    return " ".join([*values, entry.cell.row, f"s{entry.cell.seed}"])


def cell_state(config: RunConfig, paper: Mapping[str, object] | None) -> State:
    """How far a cell is. One whose weights or reference are not here has not begun."""
    if paper is None:
        return run_state(config)
    if not has_weights(config):
        return State()
    try:
        place = Place.of(config, Judging(**paper))
    except (CheckpointError, ConfigError):
        return State()  # the files that are to judge it are missing
    if stored_result(place.folder, place.whole) is not None:
        return State(done=True)
    return State(images_done=count_images(place.images / "shards", config))


def price_measurement(name: str, entry: CellJob) -> PricedCell:
    """What an analysis or a benchmark takes: what its committed results took."""
    seconds = []
    for result in committed_results(entry.table.name)[0]:
        if result["cell"]["model"] == entry.cell.point.get("model") and "cell_s" in result["cost"]:
            seconds.append(result["cost"]["cell_s"])
    if not seconds:
        return PricedCell(name, State(), None, NOTHING)
    source = f"committed {entry.table.name}"
    time = Quantity.within(statistics.median(seconds), TWICE, ELSEWHERE, source)
    cost = CellCost({"measurement": time}, None, NOTHING)
    return PricedCell(name, State(), cost, time)

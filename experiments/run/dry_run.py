"""What a run will take, and how far it is, without running it or writing anything."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.config.schema import RunConfig
from experiments.estimate.cells import CellCost, Estimator, Quantity, Target, add_up
from experiments.estimate.costs import read_costs
from experiments.estimate.report import H200, show_bytes, show_grade, show_seconds
from experiments.identity.results import stored_result
from experiments.registry.labels import count_noun
from experiments.run.preparation import prepare_run
from experiments.store import provenance
from models import registry
from models.weights import conversions, digests

NOTHING = Quantity.exactly(0.0)


@dataclass(frozen=True)
class State:
    """How far a cell is.

    Attributes:
        done: its result is there. images_done: of its images, in finished micro-batches.
    """

    done: bool = False
    images_done: int = 0


@dataclass(frozen=True)
class PricedCell:
    """A cell with its state and what it takes; the cost is None where nothing is known of it."""

    name: str
    state: State
    cost: CellCost | None
    left: Quantity


def run_state(config: RunConfig) -> State:
    """How far a run is. One whose weights are not here has not begun."""
    if not has_weights(config):
        return State()
    run = prepare_run(config)
    if stored_result(run.folder, run.whole) is not None:
        return State(done=True)
    return State(images_done=count_images(run.folder / "shards", config))


def has_weights(config: RunConfig) -> bool:
    """Whether a model's weights are here and ready, so that nothing is fetched or converted."""
    model = config.model
    parts = {"transformer": model.weights, "tokenizer": model.tokenizer_weights}
    return all(is_ready(model.name, part, path) for part, path in parts.items())


def is_ready(name: str, part: str, explicit: str | None) -> bool:
    """Whether a part's weights are here as safetensors."""
    if explicit is not None:
        return is_converted(Path(explicit).expanduser())
    places = registry.known_places(registry.source_of(name, part))
    return any(is_converted(path) for path in places.values() if path is not None)


def is_converted(path: Path) -> bool:
    """Whether a file is there as safetensors, itself or converted before."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.is_file()
    return bool(conversions.list_conversions(digests.file_digest(path)))


def count_images(shards: Path, config: RunConfig) -> int:
    """Images of the finished micro-batches in a folder."""
    microbatch = config.sampler.microbatch
    batches = -(-config.eval.n // microbatch)
    finished = sum(int(path.stem) < batches for path in shards.glob("*.npz"))
    return min(config.eval.n, finished * microbatch)


def price_cell(estimator: Estimator, name: str, config: RunConfig, state: State) -> PricedCell:
    """What a cell takes, and what is left of it."""
    cost = estimator.estimate(config, has_held_out(config))
    if state.done:
        return PricedCell(name, state, cost, NOTHING)
    share = 1 - state.images_done / config.eval.n
    seconds = dict(cost.seconds)
    seconds["sampling"] = seconds["sampling"].scaled(share)
    return PricedCell(name, state, cost, replace(cost, seconds=seconds).total)


def has_held_out(config: RunConfig) -> bool:
    """Whether there are held-out tokens to judge a model by."""
    ships = registry.find_preset(config.model.name).weights.shipped
    return ships or config.heldout is not None


def find_target(config: RunConfig, released: bool, gpus: int = 1) -> Target:
    """Where a config is to run; released models on an H200, if there is no GPU here."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not has_gpu and not released):
        threads = torch.get_num_threads()
        return Target("cpu", f"{platform.machine()} CPU, {threads} threads")
    if has_gpu:
        return Target("cuda", provenance.device_name(torch.device("cuda")), gpus)
    return Target("cuda", H200, gpus)


def print_price(cells: Sequence[PricedCell], target: Target, has_device: bool = True) -> None:
    """Print cells one by one, and what is left in all."""
    width = max(len(cell.name) for cell in cells)
    print(f"{'cell':{width}}  {'state':22}{'time':24}{'GPU memory':12}{'disk':10}how good")
    for cell in cells:
        print(f"{cell.name:{width}}  {describe_cell(cell)}")
    open_cells = [cell for cell in cells if not cell.state.done]
    left = add_up([cell.left for cell in open_cells]).scaled(1 / target.workers)
    disks = []
    memories = []
    unknown = 0
    for cell in open_cells:
        if cell.cost is None:
            unknown += 1
            continue
        disks.append(cell.cost.disk)
        if cell.cost.memory is not None:
            memories.append(cell.cost.memory)
    largest = max(memories, key=lambda memory: memory.value, default=None)
    sizes = [f"{show_bytes(add_up(disks))} of disk"]
    if largest is not None:
        sizes.insert(0, f"up to {show_bytes(largest)} of GPU memory")
    print(
        f"in all: {count_noun(len(cells), 'cell')}, {len(cells) - len(open_cells)} done, "
        f"{len(open_cells)} to do: {show_seconds(left)} with {describe_workers(target)}, "
        f"{', '.join(sizes)}"
    )
    if unknown:
        print(f"nothing is known of the time of {unknown} of them, which is not in the sum")
    if not has_device:
        print(f"no GPU is here: times are of {target.name}")


def describe_cell(cell: PricedCell) -> str:
    """A cell's state, cost, and how good the estimate is."""
    state = "done" if cell.state.done else "to do"
    if cell.state.images_done and not cell.state.done:
        state = f"begun, {cell.state.images_done} images"
    if cell.cost is None:
        return f"{state:22}{'not known':24}{'–':12}{'–':10}nothing like it was measured"
    cost = cell.cost
    if cell.state.done:
        return f"{state:22}{'–':24}{'–':12}{show_bytes(cost.disk):10}done"
    columns = f"{show_seconds(cell.left):24}{show_bytes(cost.memory):12}{show_bytes(cost.disk):10}"
    return f"{state:22}{columns}{show_grade(cell.left)}"


def describe_workers(target: Target) -> str:
    """The devices and processes of a target."""
    gpus = f"{target.gpus} x " if target.gpus > 1 else ""
    each = f" in each of {target.workers} workers" if target.workers > 1 else ""
    return f"{gpus}{target.name}{each}"


class RunPrices:
    """Prices of the runs of one command line, one after the other."""

    def __init__(self) -> None:
        self.cells: list[PricedCell] = []
        self.estimator: Estimator | None = None

    def add(self, config: RunConfig) -> None:
        """Price a run."""
        if self.estimator is None:
            released = not registry.find_preset(config.model.name).weights.shipped
            target = find_target(config, released)
            self.estimator = Estimator(read_costs(Path(config.runs), target.device), target)
        name = describe_run(config)
        self.cells.append(price_cell(self.estimator, name, config, run_state(config)))

    def report(self) -> None:
        """Print them all."""
        if self.estimator is not None:
            target = self.estimator.target
            has_device = target.device == "cpu" or torch.cuda.is_available()
            print_price(self.cells, target, has_device)


def describe_run(config: RunConfig) -> str:
    """A run in words."""
    words = [config.model.name, config.method.name]
    if config.method.quantized:
        words += [config.quant.name, config.calib.selector]
    return " ".join([*words, f"s{config.seed}"])

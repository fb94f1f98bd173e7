"""Run a table: a grid of cells, each a run of its own, then print it.

    python -m experiments.table name=reproduce
    python -m experiments.table name=main eval=full seeds=[0,1,2] jobs=6 publish=true

A table is a file under `conf/table`. Cells that are done are read; cells that fail are recorded with their traceback
and shown as failed, and the rest goes on. With `publish=true` the results are copied to `experiments/results/<name>`,
where README tables come from. Further overrides (`eval=full`, `calib.n=64`, ...) apply to every cell.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from experiments import render
from experiments.config import RunConfig, explain, validate
from experiments.provenance import write_json
from ptq.types import ConfigError, require

CONF = Path(__file__).parents[1] / "conf"
RESULTS = Path(__file__).parent / "results"


@dataclass
class Table:
    """A file under `conf/table`: rows are methods, the grid adds overrides to every row but `fp`'s quantizers.

    Attributes:
        exclude: cells to leave out, each by some or all of its method and its values of the grid.
        columns: what the printed table shows (`render.COLUMNS`, `render.COSTS`); None stands for all metrics.
    """

    name: str
    title: str
    rows: list[str]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    columns: list[str] | None = None

    def __post_init__(self) -> None:
        for column in self.columns or []:
            require("columns", column, (*render.COLUMNS, *render.COSTS))
        axes = {"method": self.rows, **self.grid}
        for cell in self.exclude:
            if not cell or not all(key in axes and value in axes[key] for key, value in cell.items()):
                raise ConfigError(f"exclude: {cell} matches no cell, allowed are values of {', '.join(axes)}")

    def excluded(self, point: dict[str, Any]) -> bool:
        """Whether the cell of these values is left out."""
        return any(cell.items() <= point.items() for cell in self.exclude)


def read_table(name: str) -> Table:
    """The table called `name`.

    Raises:
        ConfigError: there is none, or it excludes or shows what is not there.
    """
    path = CONF / "table" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"name: {name!r} is not one of {known}")
    return Table(**OmegaConf.to_container(OmegaConf.load(path)))


def cells(table: Table, seeds: list[int], overrides: list[str]) -> Iterator[list[str]]:
    """Hydra overrides of every cell; full-precision cells come first and once per model and seed."""
    axes = list(table.grid)
    points = [dict(zip(axes, values)) for values in itertools.product(*table.grid.values())]
    if "fp" in table.rows:
        for model, seed in itertools.product(table.grid.get("model", ["rar_twin"]), seeds):
            yield [f"model={model}", "method=fp", f"seed={seed}", *overrides]
    for seed, point, row in itertools.product(seeds, points, [r for r in table.rows if r != "fp"]):
        if table.excluded({"method": row, **point}):
            continue
        grid = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in point.items()]
        yield [f"method={row}", *grid, f"seed={seed}", *overrides]


def configure(overrides: list[str]) -> RunConfig:
    """The typed config of one cell.

    Raises:
        ConfigError: Hydra or the schema refuse the overrides; one line.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return validate(raw)


def run_cell(overrides: list[str], threads: int | None, show: bool) -> dict[str, Any]:
    """The result of one cell, or what went wrong with it: {"overrides", "error", "traceback"}."""
    import torch

    from experiments import cell
    from experiments.run import progress

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return dict(cell.run(configure(overrides), progress if show else lambda it, what: it))
    except Exception as error:  # a failed cell is a result too: it is shown as failed
        return {"overrides": overrides, "error": str(error).splitlines()[0] if str(error) else type(error).__name__,
                "traceback": traceback.format_exc()}


def run_all(jobs: list[list[str]], processes: int) -> list[dict[str, Any]]:
    """Results of all cells in order; with several processes the full-precision cells are finished first."""
    if processes == 1:
        return [run_cell(job, None, True) for job in tqdm(jobs, desc="cells", dynamic_ncols=True)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, mp_context=context) as pool, tqdm(total=len(jobs), desc="cells") as bar:
        for phase in (True, False):
            chosen = [job for job in jobs if ("method=fp" in job) == phase]
            futures = [pool.submit(run_cell, job, threads, False) for job in chosen]
            for job, future in zip(chosen, futures):
                try:
                    results.append(future.result())
                except BrokenProcessPool as error:  # a worker was killed: its cells fail, what is done is kept
                    results.append({"overrides": job, "error": str(error), "traceback": ""})
                bar.update()
    return results


def publish(results: list[dict[str, Any]], name: str) -> Path:
    """Replace the committed results of a table by these."""
    folder = RESULTS / name
    temporary = RESULTS / f".{name}.tmp{os.getpid()}"
    for result in results:
        if "error" not in result:
            label = "-".join(v for k, v in result["cell"].items() if k in ("model", "method", "quant", "calib") and v)
            write_json(temporary / f"{label}-s{result['seed']}-{result['provenance']['hash']}.json", result)
    former = RESULTS / f".{name}.old{os.getpid()}"
    if folder.exists():
        os.replace(folder, former)
    os.replace(temporary, folder)
    shutil.rmtree(former, ignore_errors=True)
    return folder


def parse(arguments: list[str]) -> tuple[str, list[int], int, bool, list[str]]:
    """Name, seeds, jobs, publish, and the overrides for every cell, from key=value arguments."""
    own = {"name": "reproduce", "seeds": "[0]", "jobs": "1", "publish": "false"}
    rest: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(argument)
    try:
        seeds, jobs, published = (yaml.safe_load(own[key]) for key in ("seeds", "jobs", "publish"))
    except yaml.YAMLError as error:
        raise ConfigError(f"seeds, jobs, publish: {' '.join(str(error).split())}") from error
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) for s in seeds):
        raise ConfigError(f"seeds: {own['seeds']} is not a list of integers such as [0,1,2]")
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise ConfigError(f"jobs: {own['jobs']} is not a positive number of processes")
    if not isinstance(published, bool):
        raise ConfigError(f"publish: {own['publish']} is not one of true, false")
    return own["name"], seeds, jobs, published, rest


def main() -> None:
    try:
        name, seeds, processes, published, overrides = parse(sys.argv[1:])
        table = read_table(name)
        jobs = list(cells(table, seeds, overrides))
        runs = Path([configure(job) for job in jobs][0].runs)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    results = run_all(jobs, processes)
    failed = [r for r in results if "error" in r]
    text = render.markdown(results, table.columns)
    folder = runs / "tables" / name
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(f"{table.title}\n\n{text}\n")
    render.frame(results).to_csv(folder / "table.csv", index=False)
    print(f"\n{table.title}, seeds {', '.join(map(str, seeds))}\n\n{text}\n")
    for result in failed:
        print(f"failed: {' '.join(result['overrides'])}: {result['error']}", file=sys.stderr)
    if published and not failed:
        print(f"published: {publish(results, name)}")
    render.pictures(results, runs, folder)
    print("written:")
    for path in sorted(folder.iterdir()):
        print(f"  {path}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

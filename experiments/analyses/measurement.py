"""Figures and tables of the paper that are no grid of quantized models: measurements of a model or
of its layers.

    perturbation   loss of models whose scales are off those of GPS at random (Figure 5)
    approximation, ordering, cross_terms   what GPS approximates, layer by layer (Table 8, Figures 3, 8 and 10)
    invariance     ranges per token position, class by class (Figures 4, 11 and 12)
    outliers       outlier channels and sink tokens (Figure 1)
    recipes        the settings of a method, as the recipe has them (Table 7)
    speed          a report of `experiments.speed` (Figure 7, Table 12)

A measurement is a cell like a run: it is identified by the hash of what determines its numbers, its
folder `runs/<what>-<model>-...-<hash>/` is complete when metrics.json is there, and that has the
form of a run's, with `metrics` flat and `detail` for pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from experiments import statistics
from experiments.analyses import approximations, outliers
from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.evaluate import likelihood
from experiments.images.microbatches import draw_pool
from experiments.run import cell
from experiments.run.cell import Run
from experiments.run.preparation import choose_device
from experiments.store import files, locks, provenance, results
from experiments.store.results import RESULT_VERSION, SCHEMA
from models.registry import Generator
from ptq import calibration as calib
from ptq.inputs import capture_inputs
from ptq.pipeline import (
    Track,
    apply_transforms,
    calibrate_activations,
    round_weights,
    solve_transforms,
)
from ptq.types import CalibrationSet, ConfigError, InputTransform, QuantSpec, Site, require

Found = tuple[dict[str, float], dict[str, Any]]  # metrics and detail
LAYERS = ("qkv", "fc1")  # kinds that GPS acts on in the paper
OF_CLASS = 16  # images of each class whose ranges are compared
# number of the first of these images: never that of an evaluation or a calibration
ELSEWHERE = 2**41


def run(
    what: str, config: RunConfig, options: Mapping[str, Any], track: Track, wait: bool = True
) -> dict[str, Any]:
    """The result of a measurement; read if it is there.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
        Busy: another process is at it and we are not to `wait`.
    """
    require("what", what, tuple(MEASURES))
    of = cell.prepare_run(config)
    identity = of.identity | {"what": what, "options": dict(options)}
    key = files.value_digest(identity)
    folder = of.folder.with_name(f"{what}-{of.folder.name.rpartition('-')[0]}-{key}")
    found = results.stored_result(folder)
    if found is not None:
        return found
    with locks.hold_lock(folder, wait):
        found = results.stored_result(folder)
        if found is not None:
            return found
        started = time.perf_counter()
        metrics, detail = MEASURES[what](of, options, track, folder)
        result = {
            "schema": SCHEMA,
            "cell": {"what": what, **cell.describe_cell(config)},
            "seed": config.seed,
            "metrics": metrics,
            "detail": detail,
            "cost": provenance.elapsed_cost(started),
            "provenance": {
                "hash": key,
                "identity": identity,
                "config": OmegaConf.to_container(OmegaConf.structured(config)),
                "revision": provenance.code_revision(),
                "versions": provenance.package_versions(of.device),
            },
        }
        files.write_json(folder / "metrics.json", result)
        return result


def calibration_set(of: Run, track: Track) -> CalibrationSet:
    """The rows that the cell's method would be calibrated on."""
    c = of.config.calib
    adapter = of.generator.adapter
    adapter.layout = c.layout
    return calib.select_rows(
        c.selector, adapter, cell.calibration_pool(of, track), c.n, c.seed, c.batch
    )


# --- layers


def layers(of: Run, track: Track) -> dict[str, approximations.Layer]:
    """The first qkv and fc1 of the model with their inputs, in float64."""
    adapter = of.generator.adapter
    plan = build_recipe(of.config)
    rows = calibration_set(of, track)
    adapter.prepare()
    sites = {kind: next(s for s in adapter.sites if s.kind == kind) for kind in LAYERS}
    seen = capture_inputs(
        adapter, rows.batches(of.config.calib.batch), list(sites.values()), exclude_sinks=True
    )
    weights = {
        s.name: torch.cat([adapter.model.get_submodule(c).weight for c in s.consumers])
        for s in sites.values()
    }
    return {
        kind: approximations.Layer(
            seen[s.name].double(), weights[s.name].double(), plan.activations, plan.weights
        )
        for kind, s in sites.items()
    }


def of_layers(measure: Callable[[approximations.Layer], dict[str, Any]]) -> Measure:
    """The measurement that applies `measure` to the first qkv and fc1; nested names are joined by
    dots."""

    @torch.no_grad()
    def found(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
        metrics: dict[str, float] = {}
        for kind, layer in layers(of, track).items():
            for name, value in measure(layer).items():
                nested = (
                    {f".{k}": v for k, v in value.items()}
                    if isinstance(value, dict)
                    else {"": value}
                )
                metrics |= {f"{kind}.{name}{tail}": v for tail, v in nested.items()}
        return metrics, {}

    return found


# --- perturbation


@torch.no_grad()
def perturbation(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """KL of the model with GPS, and of `trials` models whose every scale is off by a factor of 1 +-
    `spread` at most.

    The transforms are solved once; rounding and activation ranges are found anew in every trial.
    Finished trials are kept in the folder.
    """
    config = of.config
    plan = build_recipe(of.config)
    if "gps" not in plan.transforms:
        raise ConfigError(f"method: {config.method.name} has no GPS scales to perturb")
    rows = calibration_set(of, track)
    batches = rows.batches(config.calib.batch)
    tokens, labels = sequences(of, track)
    of.generator.adapter.prepare()
    solution = solve_transforms(of.generator.adapter, batches, len(rows), plan, track)
    scaled = {s.name for s in of.generator.adapter.sites if s.kind in plan.sites_of("gps")}

    def kl(transforms: dict[str, InputTransform]) -> float:
        generator = duplicate(of.generator)
        trial = dataclasses.replace(solution, transforms=transforms)
        apply_transforms(generator.adapter, plan, trial)
        round_weights(generator.adapter, plan, batches, silent, {})
        calibrate_activations(generator.adapter, batches, len(rows), plan, silent, trial)
        return likelihood.score_likelihood(
            generator, tokens, labels, config.eval.batch, of.generator
        )["kl"]

    path = folder / "trials.json"
    # of GPS first, then of the trials
    found: list[float] = json.loads(path.read_text()) if path.is_file() else []
    for number in track(range(len(found), options["trials"] + 1), "trials"):
        noise = torch.Generator().manual_seed(config.seed * 2**32 + number)
        chosen = solution.transforms
        if number > 0:
            chosen = {
                n: off(t, options["spread"], noise) if n in scaled else t for n, t in chosen.items()
            }
        found.append(kl(chosen))
        files.write_json(path, found)
    gps, *trials = found
    ordered = torch.tensor(trials, dtype=torch.float64)
    metrics = {
        "kl": gps,
        "kl_min": ordered.min().item(),
        "kl_median": ordered.median().item(),
        "kl_max": ordered.max().item(),
        "share_worse": (ordered > gps).double().mean().item(),
    }
    return metrics, {"kl": trials, "spread": options["spread"]}


def duplicate(generator: Generator) -> Generator:
    """The same model with a transformer of its own."""
    twin = copy.copy(generator)
    twin.adapter = copy.deepcopy(generator.adapter)
    twin.transformer = twin.adapter.model
    return twin


def off(transform: InputTransform, spread: float, noise: torch.Generator) -> InputTransform:
    """The transform with every scale times a factor between 1 - spread and 1 + spread."""
    factor = 1 + spread * (2 * torch.rand(len(transform.scale), generator=noise) - 1)
    return dataclasses.replace(transform, scale=transform.scale * factor.to(transform.scale))


def silent(items: Sequence, what: str) -> Sequence:
    return items


def sequences(of: Run, track: Track) -> tuple[Tensor, Tensor]:
    """Tokens and labels to score on: held-out ones of a twin, images of a released model's own."""
    stored = likelihood.load_held_out(of.generator.preset, of.config.eval.sequences)
    if stored is not None:
        return stored["tokens"].to(of.device), stored["labels"].to(of.device)
    labels = torch.arange(of.config.eval.sequences) % of.generator.preset.classes
    return drawn(of, labels, track), labels.to(of.device)


def drawn(of: Run, labels: Tensor, track: Track) -> Tensor:
    """Tokens of images of the full-precision model, used for nothing else."""
    key = files.value_digest(
        {"identity": of.identity, "labels": labels.tolist(), "for": "analyses"}, 16
    )
    cache = Path(of.config.runs) / "cache" / f"pool-{key}.safetensors"
    seed = of.config.seed + ELSEWHERE
    return draw_pool(
        of.generator,
        labels,
        seed,
        of.config.sampler.microbatch,
        of.settings,
        of.device,
        cache,
        track,
    )


# --- statistics of activations


def token_ranges(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (P,) that occur, and the mean range (max - min over channels) of their tokens (P,),
    of x (B, T, C)."""
    width = (x.amax(dim=-1) - x.amin(dim=-1)).double().mean(dim=0)
    places, home = positions.unique(return_inverse=True)
    sums = torch.zeros(2, len(places), dtype=torch.float64, device=x.device)
    sums.index_add_(1, home, torch.stack((width, torch.ones_like(width))))
    return places, sums[0] / sums[1]


def middle(sites: Sequence[Site], kinds: Sequence[str]) -> Site:
    """The site of one of the kinds that stands in the middle of the model."""
    found = [s for s in sites if s.kind in kinds]
    return found[len(found) // 2]


def agreement(ranges: Tensor) -> dict[str, float]:
    """How far ranges (classes, positions) depend on either.

    position_share: part of the variance of the logarithm that the position explains. class_spread:
    standard deviation
    over classes relative to the mean at a position, averaged. position_spread: the other way round.
    """
    logs = ranges.log()
    share = logs.mean(dim=0).var(correction=0) / logs.var(correction=0).clamp(min=1e-30)
    return {
        "position_share": share.item(),
        "class_spread": (ranges.std(dim=0, correction=0) / ranges.mean(dim=0)).mean().item(),
        "position_spread": (ranges.std(dim=1, correction=0) / ranges.mean(dim=1)).mean().item(),
    }


@torch.no_grad()
def invariance(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """Ranges of tokens at every position, for the classes 0, 1, 2, the last one and none, at middle
    sites of each kind.

    `rest.` metrics leave out the sink tokens, which no one doubts to depend on their position.
    """
    adapter = of.generator.adapter
    classes = of.generator.preset.classes
    labels = torch.tensor([0, 1, 2, classes - 1]).repeat_interleave(OF_CLASS)
    tokens = drawn(of, labels, track)
    kinds = [
        kind
        for kind in ("adaln", "qkv", "proj", "fc1", "fc2")
        if any(s.kind == kind for s in adapter.sites)
    ]
    sites = [middle(adapter.sites, (kind,)) for kind in kinds]
    of_class = [
        adapter.rows(*part)
        for part in zip(tokens.split(OF_CLASS), labels.to(of.device).split(OF_CLASS))
    ]
    groups = [*(conditional for conditional, _ in of_class), of_class[0][1]]
    ranges: dict[str, list[Tensor]] = {s.kind: [] for s in sites}
    places: dict[str, Tensor] = {}
    for rows in track(groups, "classes"):
        with outliers.watch(adapter, sites) as seen:
            adapter.forward(rows)
        for site in sites:
            places[site.kind], found = token_ranges(*seen[site.name])
            ranges[site.kind].append(found)
    metrics = {}
    detail = {}
    for site in sites:
        table = torch.stack(ranges[site.kind])
        kept = places[site.kind] >= site.sinks
        if len(kept) == 1:
            continue  # one token position: VAR's modulation, which is that of the class alone
        metrics |= {f"{site.kind}.{k}": v for k, v in agreement(table).items()}
        if not bool(kept.all()):
            metrics |= {f"{site.kind}.rest.{k}": v for k, v in agreement(table[:, kept]).items()}
        detail[site.kind] = {
            "site": site.name,
            "sinks": site.sinks,
            "positions": places[site.kind].tolist(),
            "classes": [0, 1, 2, classes - 1, None],
            "ranges": [[round(v, 4) for v in row] for row in table.tolist()],
        }
    return metrics, detail


@torch.no_grad()
def outlier_statistics(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """The two ratios of `outliers.py` at every site that has sinks, the mean over those that
    matter, and two pictures.

    Held-out sequences of a twin, images of a released model's own; conditional branch.
    """
    adapter = of.generator.adapter
    rows, _ = adapter.rows(*sequences(of, track))
    found = outliers.measure(adapter, rows)
    kinds = {s.name: s.kind for s in adapter.sites}
    metrics = {
        ratio: torch.tensor([v[ratio] for n, v in found.items() if kinds[n] in acted]).mean().item()
        for ratio, acted in statistics.ACTED_ON.items()
    } | {f"inside.{ratio}": share for ratio, share in statistics.inside(found, kinds).items()}
    site = middle(adapter.sites, LAYERS)
    with outliers.watch(adapter, [site]) as seen:
        adapter.forward(rows)
    x, positions = seen[site.name]
    rms = outliers.channel_rms(x, positions, site.sinks)
    places, ranges = token_ranges(x, positions)
    return metrics, {
        "sites": found,
        "channels": {"site": site.name, "rms": [round(v, 5) for v in rms.tolist()]},
        "tokens": {
            "site": site.name,
            "sinks": site.sinks,
            "positions": places.tolist(),
            "ranges": [round(v, 5) for v in ranges.tolist()],
        },
    }


# --- recipes and speed


def recipes(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """The settings of a method that Table 7 lists, read off its recipe."""
    if not of.config.method.quantized:
        return {}, {"settings": {}}

    def said(spec: QuantSpec) -> str:
        found = "minmax" if spec.granularity == "token_dynamic" else spec.range
        return f"{spec.granularity}, {found}, {'symmetric' if spec.symmetric else 'asymmetric'}"

    plan = build_recipe(of.config)
    c = of.config.calib
    acted = {kind for t in plan.transforms for kind in plan.sites_of(t)} | set(
        plan.sites if plan.omniquant else ()
    )
    settings = {
        "transforms": list(plan.transforms) + (["omniquant"] if plan.omniquant else []),
        "sites": sorted(acted),
        "weights": said(plan.weights),
        "activations": said(plan.activations.at("token_static") if plan.stwq else plan.activations),
        "attention weights": plan.softmax,
        "rounding": plan.rounder,
        "calibration": f"{c.n} rows, {c.selector}",
        "scope": list(plan.scope.kinds) + (["attention products"] if plan.scope.matmuls else []),
    }
    if plan.omniquant:
        settings["training"] = dataclasses.asdict(plan.options.omniquant)
    if "svd" in plan.transforms:
        settings["branch"] = dataclasses.asdict(plan.options.svd)
    if "hadamard" in plan.transforms:
        settings["rotation"] = dataclasses.asdict(plan.options.hadamard)
    if "smoothquant" in plan.transforms:
        settings["alpha"] = plan.alpha
    return {}, {"settings": settings}


def speed(overrides: Sequence[str], wait: bool = True) -> dict[str, Any]:
    """A report of `experiments.speed` as a result, which its overrides and the device's name
    identify; read if it is there. To measure anew, remove its folder.

    Raises:
        ConfigError: there is no such benchmark, it refuses an override, or some of what it measures
            failed.
        Busy: another process is at it and we are not to `wait`.
    """
    from experiments.speed.__main__ import BENCHMARKS

    chosen = {
        k: v
        for k, v in (o.split("=", 1) for o in overrides)
        if k not in ("seed", "sampler", "eval")
    }
    what = chosen.pop("what", None)
    require("what", what, tuple(BENCHMARKS))
    given = [f"{k}={v}" for k, v in chosen.items()]
    config = configure([o for o in given if o.startswith(("model=", "device=", "runs="))])
    device = provenance.package_versions(choose_device(config))["device"]
    identity = {
        "what": "speed",
        "overrides": [
            f"what={what}",
            *(o for o in given if not o.startswith(("runs=", "tracker"))),
        ],
        "device": device,
        "version": RESULT_VERSION,
    }
    folder = Path(config.runs) / f"speed-{config.model.name}-{files.value_digest(identity)}"
    with locks.hold_lock(folder, wait):
        return results.stored_result(folder) or timed(
            BENCHMARKS[what], what, given, identity, folder
        )


def timed(
    benchmark: Callable[[list[str]], tuple[dict[str, Any], Path]],
    what: str,
    given: list[str],
    identity: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Run a benchmark and write its report as a result.

    Raises:
        ConfigError: as `speed` says.
    """
    started = time.perf_counter()
    report, path = benchmark(given)  # engines run it alone on its device
    failed = [f"{line['method']}: {line['error']}" for line in report["lines"] if "error" in line]
    if failed:
        raise ConfigError(
            f"{what}: {failed[0]} ({len(failed)} of {len(report['lines'])} failed, see {path})"
        )
    result = {
        "schema": SCHEMA,
        "cell": {"what": "speed", "model": report["model"], "method": None},
        "seed": 0,
        "metrics": {},
        "detail": report,
        "cost": provenance.elapsed_cost(started) | {"workers": 1},
        "provenance": {
            "hash": files.value_digest(identity),
            "identity": identity,
            "revision": provenance.code_revision(),
            "versions": report["versions"],
        },
    }
    files.write_json(folder / "metrics.json", result)
    return result


Measure = Callable[[Run, Mapping[str, Any], Track, Path], Found]
MEASURES: dict[str, Measure] = {
    "perturbation": perturbation,
    "approximation": of_layers(approximations.biases),
    "ordering": of_layers(approximations.orders),
    "cross_terms": of_layers(approximations.output_errors),
    "invariance": invariance,
    "outliers": outlier_statistics,
    "recipes": recipes,
}

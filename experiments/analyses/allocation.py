"""Bits by kind of site, by block, or by both, that lose least under a budget of bytes.

For every candidate number of bits a model's weights are rounded by its recipe, and the loss of one
group of weights is the KL to full precision where that group alone is rounded
(`sensitivity.py`). Losses of groups are taken to add up, and the best choice is an exact 0/1
program, a knapsack with one item of every group:

    minimise sum_g,b loss_gb x_gb      sum_b x_gb = 1 for all g,  sum_g,b bytes_gb x_gb <= budget

solved by HiGHS (`scipy.optimize.milp`). That losses add up is an approximation: errors of one group
may hide behind those of another, so the predicted loss is no forecast of KL. What was chosen is
written as a config that runs like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from scipy.optimize import Bounds, LinearConstraint, milp

from experiments.analyses.sensitivity import OUTSIDE, Part, PartlyQuantized
from experiments.run.preparation import Run
from experiments.store.files import write_text
from ptq.pipeline import Track
from ptq.recipe import Change, read_changes
from ptq.types import ConfigError

WEIGHTS = ("weight", "bias", "sink_shift")  # attributes of a layer that go with its weights


@dataclass(frozen=True)
class Choice:
    """One number of bits for one group of weights.

    Attributes:
        loss: KL in nats a token with the group alone rounded. size: bytes of the group's codes.
    """

    group: str
    bits: int
    loss: float
    size: int


def choose_bits(choices: Sequence[Choice], budget: int) -> dict[str, Choice]:
    """The choice of every group with the least sum of losses that takes at most `budget` bytes.

    Raises:
        ConfigError: even the smallest choices take more.
    """
    frame = pd.DataFrame(choices)  # columns: group, bits, loss, size
    least = int(frame.groupby("group")["size"].min().sum())
    if least > budget:
        raise ConfigError(f"budget: {budget} bytes are too few, the least that fits is {least}")
    # KL may be 1e-6, as small as the solver's tolerances
    costs = frame["loss"] / max(float(frame["loss"].abs().max()), 1e-30)
    belongs = pd.get_dummies(frame["group"]).T.to_numpy(dtype=float)  # (groups, choices)
    sizes = frame["size"].to_numpy(dtype=float)
    one_each = LinearConstraint(belongs, 1, 1)
    within_budget = LinearConstraint(sizes[None] / budget, ub=1)
    found = milp(
        costs.to_numpy(),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[one_each, within_budget],
        options={"mip_rel_gap": 0},
    )
    taken = np.flatnonzero(found.x > 0.5)
    return {choices[index].group: choices[index] for index in taken}


def group_of(part: Part, by: str, blocks: Sequence[str]) -> str | None:
    """The group that a part's weights belong to; None of other parts, and of what the way of
    grouping cannot name.

    A kind is called as it is, a block by its number, a site of a block `number.kind`.
    """
    if part.attribute not in WEIGHTS:
        return None
    kind = part.groups[0].removesuffix(" weights")
    if by == "kind":
        return kind
    if part.groups[1] == OUTSIDE:
        return None
    number = blocks.index(part.groups[1])
    return str(number) if by == "layer" else f"{number}.{kind}"


def require_one_width(changes: Sequence[Change]) -> None:
    """Refuse bits of weights that `quant` gives a place: all are measured at all numbers of bits.

    Raises:
        ConfigError: names the setting.
    """
    for change in changes:
        if change.operand == "weights" and "bits" in dict(change.settings):
            raise ConfigError(
                f"{change.path}.bits: {dict(change.settings)['bits']} leaves nothing to choose, "
                "allowed is quant.weights.bits alone"
            )


@torch.no_grad()
def measure_choices(run: Run, bits: Sequence[int], by: str, track: Track) -> list[Choice]:
    """The losses and sizes of all groups at all bits.

    Raises:
        ConfigError: the method has no sensitivity, or some weights have bits of their own.
    """
    quant = run.config.quant
    require_one_width(read_changes({"by_kind": quant.by_kind, "by_layer": quant.by_layer}))
    choices: list[Choice] = []
    blocks = list(run.generator.adapter.blocks)
    for count in bits:
        partly = PartlyQuantized(with_bits(run, count), track)
        groups: dict[str, int] = {}  # numbers in the weights
        for part in partly.parts:
            group = group_of(part, by, blocks)
            if group is not None:
                weights = part.rounded.numel() if part.attribute == "weight" else 0
                groups[group] = groups.get(group, 0) + weights
        for group, numbers in track(list(groups.items()), f"losses at {count} bits"):
            loss = loss_alone(partly, group, by, blocks)
            choices.append(Choice(group, count, loss, -(-numbers * count // 8)))
    return choices


def loss_alone(partly: PartlyQuantized, group: str, by: str, blocks: Sequence[str]) -> float:
    """KL where the weights of one group alone are rounded."""
    return partly.divergence(lambda part: group_of(part, by, blocks) == group)


def with_bits(run: Run, bits: int) -> Run:
    """The same run with other bits of its weights; both share the model."""
    quant = replace(run.config.quant, weights=replace(run.config.quant.weights, bits=bits))
    changed = replace(run, config=replace(run.config, quant=quant))
    changed.__dict__["generator"] = run.generator  # as loaded, it is copied before it is quantized
    return changed


def uniform_size(choices: Sequence[Choice], bits: int) -> int:
    """Bytes of all groups with the same bits, rounded down."""
    numbers: dict[str, float] = {}
    for choice in choices:
        numbers[choice.group] = choice.size / choice.bits
    return int(sum(numbers.values()) * bits)


def quant_changes(
    chosen: Mapping[str, Choice], by: str, kinds: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The fields `by_kind` or `by_layer` of `quant` that say what was chosen.

    Args:
        kinds: of sites in scope; of a block they all get the same bits.
    """
    by_kind: dict[str, Any] = {}
    by_layer: dict[str, dict[str, Any]] = {}  # numbers of blocks as text, as configs have them
    for group, choice in chosen.items():
        settings = {"weights": {"bits": choice.bits}}
        if by == "kind":
            by_kind[group] = settings
        elif by == "layer":
            by_layer[group] = {kind: settings for kind in kinds}
        else:
            number, kind = group.split(".")
            by_layer.setdefault(number, {})[kind] = settings
    return {"by_kind": by_kind, "by_layer": by_layer}


def merge_fields(own: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of fields with others added, field by field."""
    merged = dict(own)
    for name, value in added.items():
        if isinstance(value, Mapping) and isinstance(own.get(name), Mapping):
            value = merge_fields(own[name], value)
        merged[name] = value
    return merged


def write_recipe(folder: Path, name: str, quant: Mapping[str, Any]) -> Path:
    """Write `conf/quant/NAME.yaml` in a folder that `plugins=` takes; gives the file."""
    path = folder / "conf" / "quant" / f"{name}.yaml"
    text = yaml.safe_dump({**quant, "name": name}, sort_keys=False, width=100)
    header = "# Bits that python -m experiments.allocation has chosen; allocation.json says how.\n"
    write_text(path, header + text.replace("&id", "&bits").replace("*id", "*bits"))
    return path

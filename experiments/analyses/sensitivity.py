"""Which quantizers a model's loss comes from: KL to full precision with some of them alone.

A model is quantized by its recipe, and what every quantizer was given before it rounds is kept.
Then groups of quantizers are taken away and put back:

    alone      only the group rounds
    left out   everything but the group rounds

A group is a kind of site's inputs, a kind's weights (with their biases, which a recipe may
correct), an operand of attention, or all of a block. The shares do not add up: errors of one group
may hide behind those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.analyses.data import Measured, calibration_set, scoring_sequences
from experiments.config.recipe import build_recipe
from experiments.evaluate import likelihood
from experiments.run.preparation import Run, duplicate_generator
from experiments.run.scoring import scale_bytes
from ptq.modules import QuantLinear, QuantMatMul
from ptq.numbers.quantizers import Passthrough
from ptq.pipeline import Track, round_model, transform_model
from ptq.recipe import Recipe
from ptq.sites import Adapter
from ptq.staq.sink_shift import SinkShift
from ptq.types import ConfigError

# operands of attention: by kind of product, what is on its left and on its right
OPERANDS = {"qk": ("queries", "keys"), "pv": ("attention weights", "values")}
OUTSIDE = "outside of blocks"


class Unrounded(nn.Module):
    """A quantizer that passes on what it would have rounded."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.what_is_rounded: Callable[..., Tensor] = quantizer.without_rounding

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.what_is_rounded(x, positions)


@dataclass(frozen=True)
class Part:
    """A place of the model that is rounded or not.

    Attributes:
        groups: that it belongs to. rounded, exact: what stands there.
    """

    groups: tuple[str, str]
    module: nn.Module
    attribute: str
    rounded: nn.Module | Tensor | None
    exact: nn.Module | Tensor | None

    def put(self, rounds: bool) -> None:
        """Round here, or do not."""
        setattr(self.module, self.attribute, self.rounded if rounds else self.exact)


class PartlyQuantized:
    """A quantized copy of a run's model, any group of whose quantizers can be taken away.

    Raises:
        ConfigError: the method is full precision, or calibrates as the released code does, which
            rounds before it has transformed everything.
    """

    def __init__(self, run: Run, track: Track) -> None:
        recipe = build_recipe(run.config) if run.config.method.quantized else None
        if recipe is None or recipe.released:
            raise ConfigError(
                f"method: {run.config.method.name} has no sensitivity, allowed are quantized "
                "methods that do not follow the released code's order"
            )
        self.run = run
        rows = calibration_set(run, track)
        self.tokens, self.labels = scoring_sequences(run, track)
        self.generator = duplicate_generator(run.generator)
        adapter = self.generator.adapter
        adapter.prepare()
        batches = rows.batches(run.config.calib.batch)
        solution = transform_model(adapter, batches, len(rows), recipe, track)
        exact = exact_weights(adapter.model)
        round_model(adapter, batches, len(rows), recipe, solution, track)
        self.parts = [*linear_parts(adapter, recipe, exact), *operand_parts(adapter, recipe)]

    def kind_groups(self) -> list[str]:
        """The groups of kinds, in forward order of a block."""
        return list(dict.fromkeys(part.groups[0] for part in self.parts))

    def block_groups(self) -> list[str]:
        """The groups of blocks, and of what stands outside of them."""
        return list(dict.fromkeys(part.groups[1] for part in self.parts))

    def divergence(self, rounding: Callable[[Part], bool], chosen: slice = slice(None)) -> float:
        """KL to full precision, in nats a token, where the parts that `rounding` names round.

        Args:
            chosen: of the held-out sequences.
        """
        for part in self.parts:
            part.put(rounding(part))
        scores = likelihood.score_likelihood(
            self.generator,
            self.tokens[chosen],
            self.labels[chosen],
            self.run.config.eval.batch,
            self.run.generator,
        )
        return scores["kl"]

    def alone(self, group: str) -> float:
        """KL where only the group rounds."""
        return self.divergence(lambda part: group in part.groups)

    def left_out(self, group: str) -> float:
        """KL where everything but the group rounds."""
        return self.divergence(lambda part: group not in part.groups)

    def weights_of(self, group: str) -> list[Part]:
        """The weights in a group."""
        return [part for part in self.parts if group in part.groups and part.attribute == "weight"]

    def weight_bits(self, group: str) -> int:
        """Number of weights in a group times their bits, those of the place where each is."""
        bits = 0
        for part in self.weights_of(group):
            bits += part.rounded.numel() * part.module.weight_spec.bits
        return bits

    def scale_bytes(self, group: str) -> int:
        """Bytes of the scales and zero points of a group's weights."""
        return sum(scale_bytes(part.module) for part in self.weights_of(group))


def exact_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of every quantizable linear by name, before anything is rounded."""
    exact: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            bias = None if module.bias is None else module.bias.clone()
            exact[name] = (module.weight.clone(), bias)
    return exact


def linear_parts(
    adapter: Adapter, recipe: Recipe, exact: Mapping[str, tuple[Tensor, Tensor | None]]
) -> list[Part]:
    """Inputs and weights of all sites in scope."""
    parts: list[Part] = []
    for site in recipe.scope.sites(adapter):
        for name in site.consumers:
            linear = adapter.model.get_submodule(name)
            weight, bias = exact[name]
            inputs = (f"{site.kind} inputs", block_of(adapter, name))
            weights = (f"{site.kind} weights", block_of(adapter, name))
            parts += [
                Part(inputs, linear, "input", linear.input, exact_quantizer(linear.input)),
                Part(weights, linear, "weight", linear.weight, weight),
                Part(weights, linear, "bias", linear.bias, bias),
            ]
            if linear.sink_shift is not None:
                exact_shift = exact_sink_shift(linear.sink_shift, weight)
                parts.append(Part(weights, linear, "sink_shift", linear.sink_shift, exact_shift))
    return parts


def exact_sink_shift(shift: SinkShift, weight: Tensor) -> SinkShift:
    """A sink shift that gives back what an unrounded weight (O, C) makes of the mean."""
    return SinkShift(shift.mean, weight @ shift.mean, shift.sinks)


def operand_parts(adapter: Adapter, recipe: Recipe) -> list[Part]:
    """Operands of the products in scope."""
    parts: list[Part] = []
    for product in recipe.scope.products(adapter):
        module = adapter.model.get_submodule(product.name)
        assert isinstance(module, QuantMatMul)
        for attribute, operand in zip(("a", "b"), OPERANDS[product.kind]):
            quantizer = getattr(module, attribute)
            groups = (operand, block_of(adapter, product.name))
            parts.append(Part(groups, module, attribute, quantizer, exact_quantizer(quantizer)))
    return parts


def exact_quantizer(quantizer: nn.Module) -> nn.Module:
    """What stands in a quantizer's place where nothing is rounded."""
    if hasattr(quantizer, "without_rounding"):
        return Unrounded(quantizer)
    return Passthrough()


def block_of(adapter: Adapter, name: str) -> str:
    """The block that a module is in."""
    for block in adapter.blocks:
        if name.startswith(f"{block}."):
            return block
    return OUTSIDE


@torch.no_grad()
def measure_sensitivity(
    run: Run, options: Mapping[str, Any], track: Track, folder: Path
) -> Measured:
    """KL with everything rounded, with every group alone, and with every group left out.

    `kl_unseen` is of the held-out sequences past the first `options["seen"]`: nothing of a method
    was chosen by them. It is left out where no sequences are left. `weight_bytes` is what the codes
    of a group's weights take, `scale_bytes` what their scales and zero points do.
    """
    model = PartlyQuantized(run, track)
    seen = options["seen"]
    metrics = {"kl": model.divergence(lambda part: True)}
    if len(model.tokens) > seen:
        metrics["kl_seen"] = model.divergence(lambda part: True, slice(None, seen))
        metrics["kl_unseen"] = model.divergence(lambda part: True, slice(seen, None))
    alone: dict[str, float] = {}
    left_out: dict[str, float] = {}
    weight_bytes: dict[str, int] = {}
    scales: dict[str, int] = {}
    blocks = model.block_groups()
    for group in track([*model.kind_groups(), *blocks], "groups"):
        alone[group] = model.alone(group)
        left_out[group] = model.left_out(group)
        weight_bytes[group] = model.weight_bits(group) // 8
        scales[group] = model.scale_bytes(group)
    detail = {"alone": alone, "left_out": left_out, "weight_bytes": weight_bytes}
    return metrics, detail | {"scale_bytes": scales, "blocks": blocks}

"""Places that a quantizer is fitted for, and recording what reaches them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.modules import QuantLinear, QuantMatMul
from ptq.numbers.grouping import WHOLE
from ptq.numbers.numerics import NonFiniteError
from ptq.omniquant.streams import Arrived
from ptq.recipe import Recipe
from ptq.registry.entries import FORMATS
from ptq.sites import Adapter, MatMulSite, Segments, Site, product_segments
from ptq.spec import QuantSpec


@dataclass(frozen=True)
class Tokens:
    """What reached a place: values (N, C), of an operand of attention (N, H, D), and the positions
    (N,) of these tokens."""

    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class InputPlace:
    """The input of a site, in front of the linears that read it."""

    site: Site
    linears: tuple[QuantLinear, ...]
    observed = True

    @property
    def label(self) -> str:
        return self.site.name

    @property
    def quantizer(self) -> nn.Module:
        return self.linears[0].input

    def put(self, quantizer: nn.Module) -> None:
        for linear in self.linears:
            linear.input = quantizer

    def watch(self, recorder: nn.Module) -> None:
        """Put it in front of one linear only: all read the same."""
        self.linears[0].input = recorder


@dataclass(frozen=True)
class OperandPlace:
    """Operand `a` or `b` of a product of attention, and how it is quantized."""

    product: MatMulSite
    operand: str
    module: QuantMatMul
    spec: QuantSpec
    segments: Segments = WHOLE

    @property
    def label(self) -> str:
        return f"{self.product.name}.{self.operand}"

    @property
    def observed(self) -> bool:
        """Whether its quantizer depends on what reaches it."""
        number_format = FORMATS[self.spec.format]
        if number_format.own_quantizer:
            return False
        return number_format.tensor_scale or not self.spec.is_dynamic

    @property
    def role(self) -> str:
        """What the operand is: q, k, p (attention weights) or v."""
        return self.product.role(self.operand)

    @property
    def quantizer(self) -> nn.Module:
        return getattr(self.module, self.operand)

    def put(self, quantizer: nn.Module) -> None:
        setattr(self.module, self.operand, quantizer)

    watch = put


Place = InputPlace | OperandPlace


def input_places(adapter: Adapter, recipe: Recipe) -> list[InputPlace]:
    """The inputs of all sites in scope, in forward order."""
    model = adapter.model
    return [
        InputPlace(site, tuple(model.get_submodule(name) for name in site.consumers))
        for site in recipe.scope.sites(adapter)
    ]


def operand_places(adapter: Adapter, recipe: Recipe) -> list[OperandPlace]:
    """The operands of all products in scope that are quantized."""
    places = []
    for product in recipe.scope.products(adapter):
        module = adapter.model.get_submodule(product.name)
        for operand in ("a", "b"):
            spec = recipe.operand(adapter, product, operand)
            if spec is not None:
                by_segment = spec.granularity == "head_segment"
                segments = product_segments(adapter, product) if by_segment else WHOLE
                places.append(OperandPlace(product, operand, module, spec, segments))
    return places


class Recorder(nn.Module):
    """Stands in a quantizer's place, notes what passes and passes it on.

    Args:
        stops: nothing behind it is needed, so it ends the run.
    """

    def __init__(self, stops: bool = False) -> None:
        super().__init__()
        self.stops = stops
        self.parts: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        self.parts.append((x, positions))
        if self.stops:
            raise Arrived
        return x

    def tokens(self, name: str) -> Tokens:
        """All that passed. Tokens without a place in a sequence get position 0.

        Raises:
            NonFiniteError: NaN or infinity did.
        """
        values = []
        places = []
        ragged = len({x.shape[-1] for x, _ in self.parts}) > 1
        for x, positions in self.parts:
            if ragged:  # attention weights over different numbers of keys: values without channels
                x = x.reshape(-1, 1)
                positions = None
            if x.dim() == 4:
                x = x.transpose(1, 2)  # (B, H, T, D) -> (B, T, H, D)
            elif x.dim() == 2:
                x = x[:, None]  # (N, 1, C)
            if positions is None:
                positions = torch.zeros(x.shape[1], dtype=torch.long, device=x.device)
            values.append(x.flatten(0, 1))  # (B * T, C) or (B * T, H, D)
            places.append(positions.expand(len(x), -1).flatten())  # (B * T,)
        tokens = Tokens(torch.cat(values), torch.cat(places))
        if not bool(tokens.values.isfinite().all()):
            raise NonFiniteError(
                f"{name}: activations contain NaN or infinity, only finite numbers are allowed"
            )
        return tokens


@contextmanager
def recording(places: Sequence[Place], last: Place | None = None) -> Iterator[dict[str, Recorder]]:
    """Inside, recorders stand in these places; that of `last` ends a run."""
    quantizers = [place.quantizer for place in places]
    recorders = {place.label: Recorder(place is last) for place in places}
    try:
        for place in places:
            place.watch(recorders[place.label])
        yield recorders
    finally:
        for place, quantizer in zip(places, quantizers):
            place.watch(quantizer)

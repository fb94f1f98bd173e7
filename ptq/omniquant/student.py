"""The student of a block: a copy that computes with everything in scope rounded, and that gradients
pass through.

    x' = (x - shift) / scale,   W' = W diag(scale),   b' = b + W shift,   y = Q(x') Q(W')^T + b'

The block's own code runs, with these linears and quantized products in it. A transform that is
folded into rows of a linear of the block (V, the up projection of a gated MLP) acts on what these
rows give; one that is folded into a norm or an AdaLN projection acts on the site's input. Dividing
rows of a weight commutes with a quantizer per row, so both compute what the folded block will.
Activations are rounded per token, whatever they will be in the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ptq.modules import QuantMatMul, swap_module
from ptq.numbers.quantizers import Clip, DynamicQuantizer, Passthrough, fake_quantize_weight
from ptq.recipe import Recipe
from ptq.sites import Adapter, MatMulSite, RowsFold, Site
from ptq.spec import QuantSpec
from ptq.transform import InputTransform


class Round(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(TorchFunctionMode):
    """Inside, `torch.round` is `Round`: the library's own quantizers are differentiable."""

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        return Round.apply(*args) if func is torch.round else func(*args, **(kwargs or {}))


class TrainedLinear(nn.Module):
    """y = Q(x') Q(W')^T + b' in the place of a linear.

    Attributes:
        spec: of the weight, which stays unrounded if it is None. clip: of its rows, or None. input:
            quantizer of x'.
        transform: of the input, or None. arrives: x' is what comes in, not x.
        feeds: rows of y that another site takes in, and that site's transform, which y leaves with;
            or None.
    """

    def __init__(
        self, linear: nn.Linear, spec: QuantSpec | None = None, clip: Clip | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        self.register_buffer(
            "bias", None if linear.bias is None else linear.bias.detach(), persistent=False
        )
        self.spec = spec
        self.clip = clip
        self.input: nn.Module = Passthrough()
        self.transform: InputTransform | None = None
        self.arrives = False
        self.feeds: tuple[slice, InputTransform] | None = None
        self.frozen: tuple[Tensor, Tensor | None] | None = None

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Q(W') and b'."""
        weight = self.weight
        bias = self.bias
        if self.transform is not None:
            correction = weight @ self.transform.shift
            bias = correction if bias is None else bias + correction
            weight = self.transform.on_weight(weight)
        return weight if self.spec is None else fake_quantize_weight(weight, self.spec, self.clip)[
            0
        ], bias

    def freeze(self) -> None:
        self.frozen = self.operands()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.transform is not None and not self.arrives:
            x = self.transform(x)
        y = F.linear(self.input(x, positions), *(self.frozen or self.operands()))
        if self.feeds is None:
            return y
        rows, reader = self.feeds
        return torch.cat((y[..., : rows.start], reader(y[..., rows]), y[..., rows.stop :]), dim=-1)


def student(
    adapter: Adapter,
    block: str,
    recipe: Recipe,
    transforms: Mapping[str, InputTransform],
    clips: Mapping[str, Clip],
    final: bool = False,
) -> nn.Module:
    """A copy of a block that computes with everything in scope rounded; its tensors are the block's
    own.

    Args:
        transforms, clips: by site and by linear; gradients reach them. final: they will not change
            any more.
    """
    model = adapter.model
    original = adapter.model.get_submodule(block)
    found = copy.deepcopy(
        original, {id(t): t for t in (*original.parameters(), *original.buffers())}
    )
    linears: dict[str, TrainedLinear] = {}
    sites = within(block, recipe.scope.sites(adapter))
    for site in sites:
        for name in site.consumers:
            linears[name] = TrainedLinear(
                model.get_submodule(name), recipe.weights, clips.get(name)
            )
            linears[name].input = DynamicQuantizer(recipe.activations.at("token_dynamic"))
            linears[name].transform = transforms.get(site.name)
            linears[name].arrives = isinstance(site.fold, RowsFold)
    for site in sites:
        if site.name in transforms and isinstance(site.fold, RowsFold):
            producer = linears.setdefault(
                site.fold.linear, TrainedLinear(model.get_submodule(site.fold.linear))
            )
            producer.feeds = slice(*site.fold.rows), transforms[site.name]
    for name, linear in linears.items():
        if final:
            linear.freeze()
        swap_module(found, name.removeprefix(f"{block}."), linear)
    for product in within(block, recipe.scope.products(adapter)):
        module = QuantMatMul()
        for operand in ("a", "b"):
            spec = recipe.operand(product, operand)
            if spec is not None:
                setattr(module, operand, DynamicQuantizer(spec.at("token_dynamic")))
        swap_module(found, product.name.removeprefix(f"{block}."), module)
    return found


def within(block: str, sites: Sequence[Site | MatMulSite]) -> list:
    """Those of the sites or products that belong to a block."""
    return [site for site in sites if site.name.startswith(f"{block}.")]

"""The student of a block: a copy with everything in scope rounded, through which gradients pass.

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
from ptq.numbers.quantizers import Clip, Passthrough, fake_quantize_weight, run_time_quantizer
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
    """Inside, `torch.round` is `Round`, so that our quantizers are differentiable."""

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.round:
            return Round.apply(*args)
        return func(*args, **(kwargs or {}))


class TrainedLinear(nn.Module):
    """y = Q(x') Q(W')^T + b' in the place of a linear.

    Attributes:
        spec: of the weight, which stays unrounded if it is None.
        clip: of the weight's rows, or None.
        input: quantizer of x'.
        transform: of the input, or None.
        arrives: x' is what comes in, not x.
        feeds: rows of y that another site takes in, and that site's transform, which they leave
            with; or None.
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
        """Q(W') (O, C) and b' (O,)."""
        weight = self.weight
        bias = self.bias
        if self.transform is not None:
            correction = weight @ self.transform.shift  # (O,)
            bias = correction if bias is None else bias + correction
            weight = self.transform.on_weight(weight)  # (O, C)
        if self.spec is not None:
            weight, _ = fake_quantize_weight(weight, self.spec, self.clip)
        return weight, bias

    def freeze(self) -> None:
        """Round the weight once for all calls to come."""
        self.frozen = self.operands()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.transform is not None and not self.arrives:
            x = self.transform(x)
        weight, bias = self.frozen or self.operands()
        y = F.linear(self.input(x, positions), weight, bias)  # (..., O)
        if self.feeds is None:
            return y
        rows, reader_transform = self.feeds
        before = y[..., : rows.start]
        after = y[..., rows.stop :]
        return torch.cat((before, reader_transform(y[..., rows]), after), dim=-1)


def build_student(
    adapter: Adapter,
    block: str,
    recipe: Recipe,
    transforms: Mapping[str, InputTransform],
    clips: Mapping[str, Clip],
    final: bool = False,
) -> nn.Module:
    """A copy of a block with everything in scope rounded; its tensors are the block's own.

    Args:
        transforms: by site; gradients reach them.
        clips: by linear; gradients reach them.
        final: transforms and clips will not change any more.
    """
    student = copy_structure(adapter.model.get_submodule(block))
    for name, linear in make_linears(adapter, block, recipe, transforms, clips).items():
        if final:
            linear.freeze()
        swap_module(student, name.removeprefix(f"{block}."), linear)
    for product in select_within(block, recipe.scope.products(adapter)):
        module = make_product(adapter, product, recipe)
        swap_module(student, product.name.removeprefix(f"{block}."), module)
    return student


def copy_structure(block: nn.Module) -> nn.Module:
    """A copy of a block's modules, which share the block's tensors."""
    tensors = (*block.parameters(), *block.buffers())
    memo = {id(tensor): tensor for tensor in tensors}  # what `deepcopy` takes as copied already
    return copy.deepcopy(block, memo)


def make_linears(
    adapter: Adapter,
    block: str,
    recipe: Recipe,
    transforms: Mapping[str, InputTransform],
    clips: Mapping[str, Clip],
) -> dict[str, TrainedLinear]:
    """The linears of a student by name: those in scope, and those that feed values to others."""
    model = adapter.model
    sites = select_within(block, recipe.scope.sites(adapter))
    linears: dict[str, TrainedLinear] = {}
    for site in sites:
        own = recipe.at_site(adapter, site)
        for name in site.consumers:
            linear = TrainedLinear(model.get_submodule(name), own.weights, clips.get(name))
            linear.input = run_time_quantizer(own.activations)
            linear.transform = transforms.get(site.name)
            linear.arrives = isinstance(site.fold, RowsFold)
            linears[name] = linear
    for site in sites:
        if site.name in transforms and isinstance(site.fold, RowsFold):
            producer = site.fold.linear
            if producer not in linears:
                linears[producer] = TrainedLinear(model.get_submodule(producer))
            linears[producer].feeds = slice(*site.fold.rows), transforms[site.name]
    return linears


def make_product(adapter: Adapter, product: MatMulSite, recipe: Recipe) -> QuantMatMul:
    """An attention product with its quantizers."""
    module = QuantMatMul()
    for operand in ("a", "b"):
        spec = recipe.operand(adapter, product, operand)
        if spec is not None:
            setattr(module, operand, run_time_quantizer(spec))
    return module


def select_within(block: str, sites: Sequence[Site | MatMulSite]) -> list:
    """Those of the sites or products that belong to a block."""
    return [site for site in sites if site.name.startswith(f"{block}.")]

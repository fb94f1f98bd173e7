"""Applying an input transform to a site: the consumers' weights undo it, and what feeds the site
absorbs what it can.

    consumers:        W <- W diag(s) R - B A,  b <- b + W shift
    AdaLN producer:   LN(h) * (kappa + scale(c)) + shift(c):  kappa <- kappa / s,  scale rows <- rows / s,
                      shift rows <- rows / s with the bias (b - shift) / s
    norm producer:    weight <- weight / s,  bias <- (bias - shift) / s
    rows of a linear: rows <- rows / s,  bias <- (bias - shift) / s
    neither:          x' = (x - shift) / s runs online, in front of the consumer's quantizer

Rotations and low-rank branches of a transform always run online. What can be rotated offline is not
the input of one site but heads or a whole residual stream (`methods/quarot.py`); the last three
functions do that to what writes and reads it.

Row scaling commutes with a per-row quantizer, so folding into a projection costs its weights no
precision. The algebra is done in float64 and cast once. Nothing else in this library edits the
weights of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.sites import Fold, NormFold, RowsFold, Site
from ptq.spec import ConfigError
from ptq.transform import InputTransform, LowRank, Rotation


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _divide_rows(linear: nn.Module, rows: slice, scale: Tensor) -> None:
    """Divide rows of a linear by scale (n,): those of its weight and of its low-rank branch, if it
    has one."""
    for part in (linear.weight, getattr(linear, "up", None)):
        if part is not None:
            _assign(part[rows], part[rows].double() / scale[:, None])


@torch.no_grad()
def apply_to_consumers(model: nn.Module, site: Site, transform: InputTransform) -> None:
    """Undo the transform in every linear that reads the site (creating a bias where there is
    none)."""
    shift = transform.shift.double()
    first = 0
    for name in site.consumers:
        linear = model.get_submodule(name)
        weight = linear.weight.double()
        end = first + len(weight)
        if shift.any():
            correction = weight @ shift
            if linear.bias is None:
                linear.bias = nn.Parameter(correction.to(linear.weight.dtype), requires_grad=False)
            else:
                _assign(linear.bias, linear.bias.double() + correction)
        _assign(linear.weight, rows_of(transform, first, end).on_weight(weight))
        first = end


def rows_of(transform: InputTransform, first: int, end: int) -> InputTransform:
    """The transform as one of several consumers sees it, whose rows of the stacked weights are
    first .. end - 1."""
    branch = transform.low_rank
    if branch is not None:
        branch = LowRank(branch.down.double(), branch.up[first:end].double())
    return InputTransform(
        transform.scale.double(), transform.shift.double(), transform.rotation, branch
    )


@torch.no_grad()
def apply_to_producer(model: nn.Module, fold: Fold, transform: InputTransform) -> None:
    """Make the producer emit (x - shift) / scale in place of x.

    Raises:
        ConfigError: a shift where the producer can absorb a scale only.
    """
    scale = transform.scale.double()
    shift = transform.shift.double()
    if isinstance(fold, NormFold):
        norm = model.get_submodule(fold.norm)
        bias = norm.bias.double() if norm.bias is not None else torch.zeros_like(scale)
        _assign(norm.weight, norm.weight.double() / scale)
        if norm.bias is not None:
            _assign(norm.bias, (bias - shift) / scale)
        elif shift.any():
            norm.bias = nn.Parameter(
                ((bias - shift) / scale).to(norm.weight.dtype), requires_grad=False
            )
        return
    if isinstance(fold, RowsFold):
        linear = model.get_submodule(fold.linear)
        rows = slice(*fold.rows)
        if shift.any() and not fold.shift:
            raise ConfigError(
                f"{fold.linear}: a shift cannot pass the gate, allowed is a scale alone"
            )
        if linear.bias is None and shift.any():
            linear.bias = nn.Parameter(
                linear.weight.new_zeros(len(linear.weight)), requires_grad=False
            )
        _divide_rows(linear, rows, scale)
        if linear.bias is not None:
            _assign(linear.bias[rows], (linear.bias[rows].double() - shift) / scale)
        return
    projection = model.get_submodule(fold.linear)
    kappa = model.get_buffer(fold.kappa)
    rows_scale = slice(*fold.scale_rows)
    rows_shift = slice(*fold.shift_rows)
    _assign(kappa, kappa.double() / scale)
    for rows in (rows_scale, rows_shift):
        _divide_rows(projection, rows, scale)
    _assign(projection.bias[rows_scale], projection.bias[rows_scale].double() / scale)
    _assign(projection.bias[rows_shift], (projection.bias[rows_shift].double() - shift) / scale)


def apply_transform(model: nn.Module, site: Site, transform: InputTransform) -> bool:
    """Apply the transform to a site's weights; False says that its scale and shift have to run
    online."""
    apply_to_consumers(model, site, transform)
    if site.fold is None:
        return False
    apply_to_producer(model, site.fold, transform)
    return True


@torch.no_grad()
def rotate_outputs(
    linear: nn.Module, rotation: Rotation, rows: slice = slice(None), centred: bool = False
) -> None:
    """Make a linear emit y R in place of its outputs y = `rows`, or (y - mean(y)) R if
    `centred`."""
    for part in (linear.weight, linear.bias):
        if part is not None:
            _assign(part[rows], _rotated(part[rows].t(), rotation, centred).t())


@torch.no_grad()
def rotate_table(table: Tensor, rotation: Rotation, centred: bool = False) -> None:
    """The same for a parameter (..., C), embeddings for example."""
    _assign(table, _rotated(table, rotation, centred))


@torch.no_grad()
def rotate_past_norm(model: nn.Module, site: Site, rotation: Rotation) -> None:
    """Move weight and bias of the norm in front of a site into the site's linears, and make these
    read n R for what the plain norm gives, n."""
    norm = model.get_submodule(site.fold.norm)
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    apply_to_consumers(model, site, InputTransform(norm.weight.clone(), bias.clone(), rotation))
    norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()


def _rotated(x: Tensor, rotation: Rotation, centred: bool) -> Tensor:
    x = x.double()
    return rotation(x - x.mean(dim=-1, keepdim=True) if centred else x)

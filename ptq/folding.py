"""Applying an input transform to a site: the consumers' weights undo it, and what feeds the site
absorbs what it can.

    consumers:        W <- W diag(s) R - B A,  b <- b + W shift
    AdaLN producer:   LN(h) * (kappa + scale(c)) + shift(c):
                      kappa <- kappa / s,  scale rows <- rows / s,
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

from ptq.sites import AdaLNFold, Fold, NormFold, RowsFold, Site
from ptq.spec import ConfigError
from ptq.transform import InputTransform, LowRank, Rotation


def _assign(parameter: Tensor, value: Tensor) -> None:
    # in place, as it may be rows of a parameter
    parameter.copy_(value.to(parameter.dtype))


def _divide_rows(linear: nn.Module, rows: slice, scale: Tensor) -> None:
    """Divide rows of a linear by scale (n,), and those of its low-rank branch, if it has one."""
    # the branch adds to the same outputs, so they are divided in both
    branch = getattr(linear, "up", None)
    for part in (linear.weight, branch):
        if part is not None:
            _assign(part[rows], part[rows].double() / scale[:, None])


@torch.no_grad()
def apply_to_consumers(model: nn.Module, site: Site, transform: InputTransform) -> None:
    """Undo the transform in every linear that reads the site.

    A linear without a bias gets one where the transform has a shift.
    """
    shift = transform.shift.double()  # (C,)
    first = 0  # row of the linear in the stacked weights
    for name in site.consumers:
        linear = model.get_submodule(name)
        weight = linear.weight.double()  # (O, C)
        end = first + len(weight)
        # a shift of zero makes no bias, which every call would add
        if shift.any():
            correction = weight @ shift  # (O,)
            if linear.bias is None:
                linear.bias = nn.Parameter(correction.to(linear.weight.dtype), requires_grad=False)
            else:
                _assign(linear.bias, linear.bias.double() + correction)
        _assign(linear.weight, rows_of(transform, first, end).on_weight(weight))
        first = end


def rows_of(transform: InputTransform, first: int, end: int) -> InputTransform:
    """The transform, in float64, as one of several consumers sees it.

    Args:
        first, end: the consumer has the rows first .. end - 1 of the stacked weights.
    """
    branch = transform.low_rank
    if branch is not None:
        # (r, C) and (O of this linear, r)
        branch = LowRank(branch.down.double(), branch.up[first:end].double())
    scale = transform.scale.double()
    shift = transform.shift.double()
    return InputTransform(scale, shift, transform.rotation, branch)


@torch.no_grad()
def apply_to_producer(model: nn.Module, fold: Fold, transform: InputTransform) -> None:
    """Make the producer emit (x - shift) / scale in place of x.

    Raises:
        ConfigError: a shift where the producer can absorb a scale only.
    """
    scale = transform.scale.double()
    shift = transform.shift.double()
    if isinstance(fold, NormFold):
        _fold_into_norm(model.get_submodule(fold.norm), scale, shift)
    elif isinstance(fold, RowsFold):
        if shift.any() and not fold.shift:
            raise ConfigError(
                f"{fold.linear}: a shift cannot pass the gate, allowed is a scale alone"
            )
        _fold_into_rows(model.get_submodule(fold.linear), slice(*fold.rows), scale, shift)
    else:
        _fold_into_adaln(model, fold, scale, shift)


def _fold_into_norm(norm: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """weight <- weight / s, bias <- (bias - shift) / s, of an affine norm."""
    _assign(norm.weight, norm.weight.double() / scale)
    if norm.bias is not None:
        _assign(norm.bias, (norm.bias.double() - shift) / scale)
    elif shift.any():
        bias = (torch.zeros_like(scale) - shift) / scale  # (C,)
        norm.bias = nn.Parameter(bias.to(norm.weight.dtype), requires_grad=False)


def _fold_into_rows(linear: nn.Module, rows: slice, scale: Tensor, shift: Tensor) -> None:
    """rows <- rows / s, bias <- (bias - shift) / s, of a linear that may have no bias yet."""
    if linear.bias is None and shift.any():
        zeros = linear.weight.new_zeros(len(linear.weight))
        linear.bias = nn.Parameter(zeros, requires_grad=False)
    _divide_rows(linear, rows, scale)
    if linear.bias is not None:
        _assign(linear.bias[rows], (linear.bias[rows].double() - shift) / scale)


def _fold_into_adaln(model: nn.Module, fold: AdaLNFold, scale: Tensor, shift: Tensor) -> None:
    """kappa and the rows of scale(c) and shift(c) are divided by s, the latter also shifted."""
    projection = model.get_submodule(fold.linear)
    kappa = model.get_buffer(fold.kappa)
    scale_rows = slice(*fold.scale_rows)
    shift_rows = slice(*fold.shift_rows)
    _assign(kappa, kappa.double() / scale)
    _divide_rows(projection, scale_rows, scale)
    _divide_rows(projection, shift_rows, scale)
    bias = projection.bias
    _assign(bias[scale_rows], bias[scale_rows].double() / scale)
    _assign(bias[shift_rows], (bias[shift_rows].double() - shift) / scale)


def apply_transform(model: nn.Module, site: Site, transform: InputTransform) -> bool:
    """Apply the transform to a site's weights and to what feeds the site.

    Returns:
        False if its scale and shift have to run online, because nothing can absorb them.
    """
    apply_to_consumers(model, site, transform)
    if site.fold is None:
        return False
    apply_to_producer(model, site.fold, transform)
    return True


@torch.no_grad()
def rotate_outputs(
    linear: nn.Module, rotation: Rotation, rows: slice = slice(None), centred: bool = False
) -> None:
    """Make a linear emit y R in place of its outputs y = `rows`.

    Args:
        centred: emit (y - mean(y)) R.
    """
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
    # x = n weight + bias, so n = (x - bias) / weight is a transform's x'
    apply_to_consumers(model, site, InputTransform(norm.weight.clone(), bias.clone(), rotation))
    norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()


def _rotated(x: Tensor, rotation: Rotation, centred: bool) -> Tensor:
    """x R of x (..., C), or (x - mean(x)) R, in float64."""
    x = x.double()
    if centred:
        x = x - x.mean(dim=-1, keepdim=True)
    return rotation(x)

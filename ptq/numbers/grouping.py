"""Granularity as data layout: tensors to groups that share parameters, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams, join_params
from ptq.sites import Segments
from ptq.spec import QuantSpec

WHOLE = Segments()  # all positions in one group
Group = tuple[Tensor, Tensor]  # indices (g,) of the groups, and their values (g, n)


def split_groups(
    x: Tensor, granularity: str, positions: Tensor | None, segments: Segments
) -> list[Group]:
    """Groups of a tensor, a list of matrices: those of equal size are one.

    Args:
        x: a weight (O, I), an activation (..., C) or, for `token_static`, an activation (B, T, C).
        positions: token positions (T,) of an activation, for `token_static`.
        segments: their groups.

    Raises:
        ValueError: the granularity has no groups that calibration could find.
    """
    if granularity == "token_static":
        return split_tokens(x, positions, segments)
    if granularity == "tensor":
        values = x.reshape(1, -1)  # (1, n)
    elif granularity == "out_channel":
        values = x.flatten(1)  # (O, I)
    elif granularity == "in_channel":
        values = x.reshape(-1, x.shape[-1]).t()  # (C, N)
    else:
        raise ValueError(f"granularity: {granularity!r} has no groups to calibrate")
    return [(torch.arange(len(values), device=x.device), values)]


def split_tokens(x: Tensor, positions: Tensor, segments: Segments) -> list[Group]:
    """Groups of an activation (B, T, C) by the segments of its positions (T,)."""
    group = segments.index(positions)  # (T,)
    ids, counts = group.unique(return_counts=True)  # (G,) each
    order = group.argsort(stable=True)  # (T,), tokens of one group stand together
    starts = counts.cumsum(0) - counts  # (G,), where each group starts in that order
    parts: list[Group] = []
    for count in counts.unique().tolist():
        chosen = counts == count
        offsets = torch.arange(count, device=x.device)
        tokens = order[starts[chosen][:, None] + offsets]  # (g, count)
        values = x[:, tokens]  # (B, g, count, C)
        parts.append((ids[chosen], values.transpose(0, 1).flatten(1)))
    return parts


def merge_groups(parts: list[tuple[Tensor, QParams]]) -> QParams:
    """Parameters of all groups in order of their index, each from the one part that has it."""
    part_ids, part_params = zip(*parts)
    ids = torch.cat(part_ids)  # (G,)
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(len(ids), device=ids.device)):
        raise RuntimeError(
            f"groups {ids.unique().tolist()} are not 0 .. {len(ids) - 1}, each once: "
            "some got no values"
        )
    return join_params(part_params)[order]


def broadcast_params(params: QParams, spec: QuantSpec) -> QParams:
    """Parameters (G,) as they broadcast against the tensor (not for granularities of tokens)."""
    return params.view(-1, 1) if spec.granularity == "out_channel" else params

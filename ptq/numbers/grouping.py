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
    x: Tensor,
    granularity: str,
    positions: Tensor | None,
    segments: Segments,
    size: int | None = None,
) -> list[Group]:
    """Groups of a tensor, a list of matrices: those of equal size are one.

    Args:
        x: a weight (O, I) for `out_channel`, an activation (..., C), or (B, T, C) for
            `token_static`; of attention (B, H, T, D) for `head`, `head_segment` and `channel`.
        positions: token positions (T,) of an activation, for `token_static` and `head_segment`.
        segments: their groups.
        size: channels in a group, for `group` and `token_static`.

    Raises:
        ValueError: the granularity has no groups that calibration could find.
    """
    if granularity == "token_static":
        if size is None:
            return split_tokens(x, positions, segments)
        return split_token_channels(x, positions, segments, size)
    if granularity == "head_segment":
        return split_head_tokens(x, positions, segments)
    if granularity == "group":
        return split_channels(x, size)
    if granularity == "tensor":
        values = x.reshape(1, -1)  # (1, n)
    elif granularity == "out_channel":
        values = x.flatten(1)  # (O, I)
    elif granularity == "in_channel":
        values = x.reshape(-1, x.shape[-1]).t()  # (C, N)
    elif granularity == "head":
        values = x.transpose(0, 1).flatten(1)  # (H, n)
    elif granularity == "channel":
        values = channel_values(x)
    else:
        raise ValueError(f"granularity: {granularity!r} has no groups to calibrate")
    return [(torch.arange(len(values), device=x.device), values)]


def channel_values(x: Tensor) -> Tensor:
    """The values (H * D, n) of every channel of (B, H, T, D), or (C, n) of (..., C)."""
    if x.dim() == 4:
        return x.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)
    return x.reshape(-1, x.shape[-1]).t()


def count_groups(length: int, size: int) -> int:
    """How many groups a row of that length has."""
    return -(-length // size)


def count_static_groups(
    x: Tensor, granularity: str, segments: Segments, size: int | None
) -> int | None:
    """How many groups an activation has to bring in all, where they depend on positions."""
    if granularity == "head_segment":
        return x.shape[1] * len(segments)
    if granularity != "token_static":
        return None
    return len(segments) * (1 if size is None else count_groups(x.shape[-1], size))


def cut_rows(x: Tensor, size: int) -> list[Tensor]:
    """The groups of neighbours along the last dimension: (..., G, size) of whole groups, and
    (..., 1, r) of what is left, if either is there."""
    length = x.shape[-1]
    whole = length // size * size
    parts = []
    if whole:
        parts.append(x[..., :whole].unflatten(-1, (-1, size)))
    if whole < length:
        parts.append(x[..., None, whole:])
    return parts


def split_columns(weight: Tensor, size: int) -> list[Group]:
    """Groups of `size` columns in every row of a weight (O, I), row after row."""
    rows = len(weight)
    count = count_groups(weight.shape[1], size)
    ids = torch.arange(rows * count, device=weight.device).view(rows, count)
    parts: list[Group] = []
    first = 0
    for part in cut_rows(weight, size):  # (O, G, g)
        end = first + part.shape[1]
        parts.append((ids[:, first:end].flatten(), part.flatten(0, 1)))
        first = end
    return parts


def split_channels(x: Tensor, size: int) -> list[Group]:
    """Groups of `size` channels of an activation (..., C)."""
    parts: list[Group] = []
    first = 0
    for part in cut_rows(x, size):  # (..., G, g)
        values = part.movedim(-2, 0).flatten(1)  # (G, n)
        parts.append((first + torch.arange(len(values), device=x.device), values))
        first += len(values)
    return parts


def split_token_channels(
    x: Tensor, positions: Tensor, segments: Segments, size: int
) -> list[Group]:
    """Groups of an activation (B, T, C) by the segments of its positions and by channels."""
    count = count_groups(x.shape[-1], size)
    parts: list[Group] = []
    first = 0
    for part in cut_rows(x, size):  # (B, T, G, g)
        for index in range(part.shape[2]):
            for ids, values in split_tokens(part[:, :, index], positions, segments):
                parts.append((ids * count + first + index, values))
        first += part.shape[2]
    return parts


def split_head_tokens(x: Tensor, positions: Tensor, segments: Segments) -> list[Group]:
    """Groups of an operand of attention (B, H, T, D) by heads and by the segments of positions."""
    heads = x.shape[1]
    # all heads of a segment stand together, as if they were batches
    by_head = x.transpose(0, 1)  # (H, B, T, D)
    parts: list[Group] = []
    for ids, values in split_tokens(by_head.flatten(0, 1), positions, segments):
        # (g, H * B * count * D) -> (H * g, B * count * D)
        by_group = values.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)
        head_ids = torch.arange(heads, device=x.device)[:, None] * len(segments) + ids
        parts.append((head_ids.flatten(), by_group))
    return parts


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
    """Parameters (G,) as they broadcast against the tensor (not for granularities of tokens or
    groups)."""
    return params.view(-1, 1) if spec.granularity == "out_channel" else params


def params_of_columns(params: QParams, spec: QuantSpec, weight: Tensor) -> QParams:
    """Parameters of a weight (O, I) as they broadcast against it, groups included."""
    if spec.granularity != "group":
        return broadcast_params(params, spec)
    return spread_groups(params.view(len(weight), -1), spec.group_size, weight.shape[1])


def params_by_column(params: QParams, spec: QuantSpec, weight: Tensor) -> QParams:
    """Parameters (C, O) of the columns of a weight (O, C), whose columns have groups."""
    spread = params_of_columns(params, spec, weight)
    return QParams(spread.scale.t(), spread.zero_point.t())


def spread_groups(params: QParams, size: int, length: int) -> QParams:
    """Parameters (..., G) of groups as those of their values, (..., length)."""
    return QParams(
        params.scale.repeat_interleave(size, dim=-1)[..., :length],
        params.zero_point.repeat_interleave(size, dim=-1)[..., :length],
    )


def params_of_channels(params: QParams, spec: QuantSpec, x: Tensor) -> QParams:
    """Parameters (G,) of a tensor, of heads or of channels as they broadcast against a static
    activation, (..., C) or (B, H, T, D)."""
    if spec.granularity == "head":
        return params.view(-1, 1, 1)
    if spec.granularity == "channel" and x.dim() == 4:
        return params.view(x.shape[1], 1, -1)
    return params

"""The norm kernel of a decoding step: what a product left, the residual, LayerNorm, modulation and
codes, for a row of C channels a program.

    y        = the product's parts added up, with scales, bias (`epilogue.py`)
    residual = residual + gate y
    codes    = those of LayerNorm(residual) (kappa + scale) + shift, and their sum

gate, shift and scale are chunks of what an AdaLN projection made ahead, (R, A, C): row r of the
step reads row min(r, R - 1), so that all rows without a class share one, and position p column p
mod A.
`reference_norm` is the same in plain PyTorch.

`ptq/int8/blocks/norm_kernel.py` does much the same for many rows. Here a row has eight warps, since
there are fewer rows than places for programs; all rows have the position that the step is at; and
what no kernel of the step writes is loaded before the kernel ahead has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ptq.int8.epilogue import apply_epilogue
from ptq.int8.kernel_parts import round_codes
from ptq.int8.ops import entry_at, static_codes
from ptq.int8.steps.products import StepLinear

WARPS = 8  # of a row


@dataclass(frozen=True)
class StepNorm:
    """A LayerNorm with modulation, of which a product's input comes.

    Attributes:
        gain, bias: (C,) float32. kappa: (C,), what the modulation's scale is added to.
        eps: of the norm.
        reader: the layer that reads the codes.
    """

    gain: Tensor
    bias: Tensor
    kappa: Tensor
    eps: float
    reader: StepLinear


@dataclass(frozen=True)
class Branch:
    """What a branch of a block left to be added to the residual.

    Attributes:
        parts: of the product of its last layer, int32 (P, B, C).
        linear: that layer. code_sums: of its input, (B,) int32.
        gate: (R, A, C).
    """

    parts: Tensor
    linear: StepLinear
    code_sums: Tensor
    gate: Tensor


@triton.jit
def _modulation_place(chunk, position, row, R, A, row_stride, ahead_stride, channels):
    own = tl.minimum(row, R - 1)
    return chunk + own * row_stride + position % A * ahead_stride + channels


@triton.jit
def _norm_kernel(
    residual,
    position_at,
    R,  # rows and positions that the modulation holds
    A,
    gate_row,  # strides
    gate_ahead,
    shift_row,
    shift_ahead,
    # of the branch
    parts,
    code_sums,
    gate,
    table,
    w_scale,
    zero_correction,
    w_offset,
    branch_bias,
    P,
    new_residual,
    # of the norm
    shift,
    scale,
    gain,
    bias,
    kappa,
    next_table,
    NEXT_P,
    codes,
    sums,
    zeroed,
    B,
    C,
    eps,
    PARTS: tl.constexpr,
    HAS_W_OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    # what no kernel of the step writes is there already
    position = tl.load(position_at).to(tl.int32)
    if PARTS > 0:
        entry = table + tl.minimum(position, P - 1)
        x_scale = tl.load(entry)
        y_scale = x_scale * tl.load(w_scale + channels, mask=inside, other=0.0)
        y_bias = tl.load(entry + 2 * P) * tl.load(
            zero_correction + channels, mask=inside, other=0.0
        )
        y_bias += tl.load(branch_bias + channels, mask=inside, other=0.0)
        if HAS_W_OFFSET:
            y_slope = x_scale * tl.load(w_offset + channels, mask=inside, other=0.0)
    if HAS_NORM:
        norm_gain = tl.load(gain + channels, mask=inside, other=0.0)
        norm_bias = tl.load(bias + channels, mask=inside, other=0.0)
        one = tl.load(kappa + channels, mask=inside, other=0.0)
        next_entry = next_table + tl.minimum(position, NEXT_P - 1)
        next_scale = tl.load(next_entry)
        next_zero = tl.load(next_entry + NEXT_P)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    place = row * C + channels
    x = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        product = tl.load(parts + place, mask=inside, other=0)
        for part in tl.static_range(1, PARTS):
            product += tl.load(parts + part * B * C + place, mask=inside, other=0)
        y = product.to(tl.float32) * y_scale + y_bias
        if HAS_W_OFFSET:
            y -= tl.load(code_sums + row).to(tl.float32) * y_slope
        of_row = _modulation_place(gate, position, row, R, A, gate_row, gate_ahead, channels)
        x += tl.load(of_row, mask=inside, other=0.0).to(tl.float32) * y
        rounded = x.to(new_residual.dtype.element_ty)
        tl.store(new_residual + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(x, axis=0) / C
        centred = tl.where(inside, x - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / C
        normalized = centred * tl.rsqrt(variance + eps) * norm_gain + norm_bias
        of_row = _modulation_place(scale, position, row, R, A, shift_row, shift_ahead, channels)
        factor = one + tl.load(of_row, mask=inside, other=0.0).to(tl.float32)
        of_row = _modulation_place(shift, position, row, R, A, shift_row, shift_ahead, channels)
        modulated = normalized * factor + tl.load(of_row, mask=inside, other=0.0).to(tl.float32)
        rounded_codes = round_codes(modulated / next_scale, next_zero, HALF)
        tl.store(codes + place, rounded_codes, mask=inside)
        tl.store(sums + row, tl.sum(tl.where(inside, rounded_codes.to(tl.int32), 0), axis=0))
        tl.store(zeroed + row, 0)


def launch_norm(
    residual: Tensor,
    position: Tensor,
    branch: Branch | None,
    norm: StepNorm | None,
    shift: Tensor | None,
    scale: Tensor | None,
    early: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The new residual, codes (B, C), their sums (B,), and zeros (B,) for the next kernel's sums.

    Args:
        residual: (B, C).
        position: (1,).
        branch: what is added; None leaves the residual as it is.
        norm: None adds the branch and makes no codes.
        shift, scale: (R, A, C), chunks of one table; the branch's gate is one of another.
    """
    rows, channels = residual.shape
    device = residual.device
    unread = residual  # stands in for tensors that the kernel does not read
    chunk = branch.gate if shift is None else shift
    gate_strides = (0, 0)
    shift_strides = (0, 0) if shift is None else shift.stride()[:2]
    new_residual = residual
    of_branch = [unread] * 8 + [1]
    if branch is not None:
        gate_strides = branch.gate.stride()[:2]
        new_residual = torch.empty_like(residual)
        linear = branch.linear
        of_branch = [
            branch.parts,
            branch.code_sums,
            branch.gate,
            linear.table,
            linear.w_scale,
            linear.zero_correction,
            unread if linear.w_offset is None else linear.w_offset,
            linear.bias,
            linear.table.shape[1],
        ]
    codes = sums = zeroed = None
    of_norm = [unread] * 6 + [1] + [unread] * 3
    if norm is not None:
        codes = torch.empty(rows, channels, dtype=torch.int8, device=device)
        sums = torch.empty(rows, dtype=torch.int32, device=device)
        zeroed = torch.empty_like(sums)
        table = norm.reader.table
        of_norm = [shift, scale, norm.gain, norm.bias, norm.kappa, table, table.shape[1]]
        of_norm += [codes, sums, zeroed]
    _norm_kernel[(rows,)](
        residual,
        position,
        *chunk.shape[:2],
        *gate_strides,
        *shift_strides,
        *of_branch,
        new_residual,
        *of_norm,
        rows,
        channels,
        norm.eps if norm is not None else 0.0,
        PARTS=0 if branch is None else len(branch.parts),
        HAS_W_OFFSET=branch is not None and branch.linear.w_offset is not None,
        HAS_NORM=norm is not None,
        HALF=128 if norm is None else 2 ** (norm.reader.bits - 1),
        EARLY=early,
        BLOCK_C=triton.next_power_of_2(channels),
        num_warps=WARPS,
        **({"launch_pdl": True} if early else {}),
    )
    return new_residual, codes, sums, zeroed


def modulation_at(chunk: Tensor, position: Tensor, rows: int) -> Tensor:
    """The chunk (R, A, C) of the rows (B, C) at a position (1,), float32."""
    row = torch.arange(rows, device=chunk.device).clamp(max=len(chunk) - 1)  # (B,)
    return chunk[row, position % chunk.shape[1]].float()


def reference_norm(
    residual: Tensor,
    position: Tensor,
    branch: Branch | None,
    norm: StepNorm | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The new residual, codes and sums that `launch_norm` computes, in plain PyTorch."""
    rows = len(residual)
    if branch is not None:
        product = branch.parts.sum(dim=0, dtype=torch.int32)  # (B, C)
        epilogue = branch.linear.epilogue(branch.code_sums, position)
        y = apply_epilogue(product, product, epilogue, torch.float32)
        gate = modulation_at(branch.gate, position, rows)  # (B, C)
        residual = (residual.float() + gate * y).to(residual.dtype)
    if norm is None:
        return residual, None, None
    x = F.layer_norm(residual.float(), residual.shape[1:], norm.gain, norm.bias, norm.eps)
    factor = norm.kappa + modulation_at(scale, position, rows)  # (B, C)
    modulated = x * factor + modulation_at(shift, position, rows)
    next_scale, zero_point, _ = entry_at(norm.reader.table, position)[:, None]  # (1,) each
    codes = static_codes(modulated, next_scale, zero_point, norm.reader.bits)
    return residual, codes, codes.sum(dim=1, dtype=torch.int32)

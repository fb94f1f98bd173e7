"""The five operations of a decoding step, as kernels of a GPU and as plain PyTorch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ptq.int8.epilogue import exact_product
from ptq.int8.steps import attention as integer
from ptq.int8.steps import float_attention as floats
from ptq.int8.steps import norms, products
from ptq.int8.steps.attention import StepAttention
from ptq.int8.steps.float_attention import FloatStepAttention
from ptq.int8.steps.norms import Branch, StepNorm
from ptq.int8.steps.products import StepLinear

Normed = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Operations(Protocol):
    """What a step is made of; sums are those of the rows of codes, (B,) int32."""

    def norm(
        self,
        residual: Tensor,
        position: Tensor,
        branch: Branch | None,
        norm: StepNorm | None,
        shift: Tensor | None,
        scale: Tensor | None,
    ) -> Normed:
        """The new residual (B, C), codes, their sums, and zeros (B,); see `norms.py`."""

    def values(
        self, linear: StepLinear, codes: Tensor, sums: Tensor, position: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """A layer's output (B, N)."""

    def parts(self, linear: StepLinear, codes: Tensor) -> Tensor:
        """Integer parts (P, B, N) of a layer's product."""

    def gelu_codes(
        self,
        linear: StepLinear,
        following: StepLinear,
        form: str,
        codes: Tensor,
        sums: Tensor,
        out_sums: Tensor,
        position: Tensor,
    ) -> Tensor:
        """Codes (B, N) of GELU of a layer's output, whose sums are added to `out_sums`."""

    def attend(
        self,
        attention: StepAttention | FloatStepAttention,
        qkv: Tensor,
        cache: Any,
        position: Tensor,
        out_sums: Tensor,
    ) -> Tensor:
        """Codes (B, C) of attention's average, whose sums are added to `out_sums`."""


class Kernels:
    """The operations on a GPU.

    Args:
        early: launch kernels, but attention's, before those ahead of them have ended.
    """

    def __init__(self, early: bool) -> None:
        self.early = early

    def norm(self, *operands: Any) -> Normed:
        return norms.launch_norm(*operands, early=self.early)

    def values(self, *operands: Any) -> Tensor:
        return products.product_values(*operands, early=self.early)

    def parts(self, *operands: Any) -> Tensor:
        return products.product_parts(*operands, early=self.early)

    def gelu_codes(self, *operands: Any) -> Tensor:
        return products.product_codes(*operands, early=self.early)

    def attend(self, attention, qkv, cache, position, out_sums) -> Tensor:
        operands = (attention, qkv, cache.k, cache.v, position, out_sums)
        if isinstance(attention, FloatStepAttention):
            return floats.attend_floats(*operands, early=self.early)
        return integer.attend_codes(*operands, visible=cache.visible, early=self.early)


class References:
    """The operations in plain PyTorch, which the kernels are compared with."""

    def norm(self, residual: Tensor, *operands: Any) -> Normed:
        zeros = torch.zeros(len(residual), dtype=torch.int32, device=residual.device)
        return *norms.reference_norm(residual, *operands), zeros

    def values(self, *operands: Any) -> Tensor:
        return products.reference_values(*operands)

    def parts(self, linear: StepLinear, codes: Tensor) -> Tensor:
        return exact_product(codes, linear.weight).int()[None]

    def gelu_codes(self, linear, following, form, codes, sums, out_sums, position) -> Tensor:
        found = products.reference_codes(linear, following, form, codes, sums, position)
        out_sums += found.sum(dim=1, dtype=torch.int32)
        return found

    def attend(self, attention, qkv, cache, position, out_sums) -> Tensor:
        is_float = isinstance(attention, FloatStepAttention)
        reference = floats.reference_float_step if is_float else integer.reference_step
        codes, sums = reference(attention, qkv, cache.k, cache.v, position)
        out_sums += sums
        return codes

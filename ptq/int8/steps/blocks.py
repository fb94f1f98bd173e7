"""Runs the kernels of a decoding step (`__init__.py` draws them) through all blocks of a model.

A block qualifies if it is norm, attention, norm and MLP with AdaLN, all its linears are in integers
with static scales, and its attention is in integers too, or not quantized at all. If one block does
not qualify, all run as they are, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor, nn

from ptq.int8.blocks.layers import part_at, refusal_of_layer
from ptq.int8.modules import Int8Linear
from ptq.int8.steps import nvrtc
from ptq.int8.steps.attention import (
    NORM_EPS,
    StepAttention,
    compile_kernel,
    describe_attention,
    kernel_constants,
    refusal_of,
)
from ptq.int8.steps.float_attention import FloatStepAttention
from ptq.int8.steps.kernels import Kernels, Operations
from ptq.int8.steps.norms import Branch, StepNorm
from ptq.int8.steps.products import StepLinear
from ptq.sites import Adapter, BlockForm

log = logging.getLogger(__name__)

NUMBER_FORMATS = (torch.float32, torch.bfloat16)  # of the residual


class NoStep(Exception):
    """A block has no step of these kernels; the message says why."""


@dataclass(frozen=True)
class StepBlock:
    """A block as the kernels read it."""

    norm1: StepNorm
    qkv: StepLinear
    attention: StepAttention | FloatStepAttention
    proj: StepLinear
    norm2: StepNorm
    fc1: StepLinear
    fc2: StepLinear
    form: BlockForm


@dataclass(frozen=True)
class StepHead:
    """The modulated norm behind the last block and the layer that makes logits."""

    norm: StepNorm
    linear: StepLinear


def describe_block(block: nn.Module, form: BlockForm, first_position: int) -> StepBlock:
    """The block as the kernels read it, for steps of one token from `first_position` on.

    Raises:
        NoStep: it does not qualify.
    """
    linears = {}
    for name in ("qkv", "proj", "fc1", "fc2"):
        linear = part_at(block, getattr(form, name))
        linears[name] = describe_linear(linear, name, first_position)
    return StepBlock(
        norm1=_describe_norm(block, form.norm1, form.kappa1, linears["qkv"]),
        qkv=linears["qkv"],
        attention=_describe_attention(block, form, linears["proj"]),
        proj=linears["proj"],
        norm2=_describe_norm(block, form.norm2, form.kappa2, linears["fc1"]),
        fc1=linears["fc1"],
        fc2=linears["fc2"],
        form=form,
    )


def describe_head(norm: nn.Module, linear: nn.Module, first_position: int) -> StepHead | None:
    """The head as the kernels read it; None if they do not serve it."""
    try:
        described = describe_linear(linear, "the head", first_position)
    except NoStep:
        return None
    gain = torch.ones_like(norm.kappa, dtype=torch.float32)
    step_norm = StepNorm(
        gain, torch.zeros_like(gain), norm.kappa.float(), norm.norm_final.eps, described
    )
    return StepHead(step_norm, described)


def _describe_attention(
    block: nn.Module, form: BlockForm, proj: StepLinear
) -> StepAttention | FloatStepAttention:
    attention = part_at(block, form.attention)
    scores = attention.qk
    query_norm = _gain_and_bias(part_at(block, form.q_norm))
    key_norm = _gain_and_bias(part_at(block, form.k_norm))
    if scores.fused and attention.pv.fused:  # neither product is quantized
        return FloatStepAttention(
            query_norm, key_norm, attention.heads, proj.table[:2].contiguous(), proj.bits
        )
    if scores.attention is None:
        raise NoStep("its attention is simulated")
    refusal = refusal_of(scores, len(query_norm[0]))
    if refusal is not None:
        raise NoStep(refusal)
    return describe_attention(
        query_norm, key_norm, scores, attention.pv, attention.heads, proj.table, proj.bits
    )


def _gain_and_bias(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    if norm.eps != NORM_EPS:
        raise NoStep(f"a norm of q or k has eps {norm.eps}")
    return norm.weight.float().contiguous(), norm.bias.float().contiguous()


def describe_linear(linear: nn.Module, name: str, first_position: int) -> StepLinear:
    """A layer as the kernels read it.

    Raises:
        NoStep: it is not in integers, or has more to it than codes with static scales.
    """
    reason = refusal_of_layer(linear, scales_input=name == "fc2")  # GELU's kernel does
    if reason is not None:
        raise NoStep(f"{name} {reason}")
    if linear.sink_shift is not None and linear.sink_shift.sinks > first_position:
        raise NoStep(f"{name} shifts tokens up to position {linear.sink_shift.sinks - 1}")
    scale = None
    shift = None
    if linear.transform is not None:
        scale = linear.transform.scale
        shift = linear.transform.shift
    bias = torch.zeros_like(linear.w_scale) if linear.bias is None else linear.bias.float()
    return StepLinear(
        weight=linear.weight,
        table=linear.table,
        w_scale=linear.w_scale,
        zero_correction=linear.zero_correction,
        w_offset=linear.w_offset,
        bias=bias,
        bits=linear.bits,
        input_scale=scale,
        input_shift=shift,
    )


def _describe_norm(block: nn.Module, name: str, kappa: str, reader: StepLinear) -> StepNorm:
    norm = part_at(block, name)
    one = part_at(block, kappa).float()
    return StepNorm(norm.weight.float(), norm.bias.float(), one, norm.eps, reader)


class StepBlocks:
    """All blocks of a model and its head, one token a row.

    Args:
        head: None leaves it to the model.
        operations: kernels, or plain PyTorch.
    """

    def __init__(
        self, blocks: Sequence[StepBlock], head: StepHead | None, operations: Operations
    ) -> None:
        self.blocks = blocks
        self.head = head
        self.operations = operations

    def __call__(
        self,
        x: Tensor,
        tables: Sequence[Tensor],
        position: Tensor,
        caches: Sequence[Any],
        finish: Callable[[Tensor, None, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Logits (B, 1, V).

        Args:
            x: (B, 1, C).
            tables: what the AdaLN projections made ahead, (R, A, 6 C) for each block and
                (R, A, 2 C) for the head.
            position: (1,), of the token.
            caches: of each block, whose `k`, `v` (B, H, S, D) hold the tokens before.
            finish: the model's own head: logits of the last block's output, at a position and with
                the head's table.
        """
        residual = x.flatten(0, 1)  # (B, C)
        branch = None
        *block_tables, head_table = tables
        for block, table, cache in zip(self.blocks, block_tables, caches):
            residual, branch = self._run_block(block, residual, branch, table, position, cache)
        if self.head is None:
            residual, *_ = self.operations.norm(residual, position, branch, None, None, None)
            return finish(residual.view(x.shape), None, position, head_table)
        scale, shift = head_table.chunk(2, dim=-1)  # (R, A, C) each
        _, codes, sums, _ = self.operations.norm(
            residual, position, branch, self.head.norm, shift, scale
        )
        logits = self.operations.values(self.head.linear, codes, sums, position, x.dtype)  # (B, V)
        return logits[:, None]

    def _run_block(
        self,
        block: StepBlock,
        residual: Tensor,
        branch: Branch | None,
        table: Tensor,
        position: Tensor,
        cache: Any,
    ) -> tuple[Tensor, Branch]:
        """The residual (B, C), and what is to be added to it, from those before the block."""
        run = self.operations
        names = block.form.chunks
        chunks = dict(zip(names, table.chunk(len(names), dim=-1)))  # (R, A, C) each
        residual, codes, sums, average_sums = run.norm(
            residual, position, branch, block.norm1, chunks["shift_msa"], chunks["scale_msa"]
        )
        qkv = run.values(block.qkv, codes, sums, position, residual.dtype)  # (B, 3 C)
        average = run.attend(block.attention, qkv, cache, position, average_sums)  # (B, C)
        parts = run.parts(block.proj, average)  # (P, B, C)
        branch = Branch(parts, block.proj, average_sums, chunks["gate_msa"])
        residual, codes, sums, hidden_sums = run.norm(
            residual, position, branch, block.norm2, chunks["shift_mlp"], chunks["scale_mlp"]
        )
        hidden = run.gelu_codes(
            block.fc1, block.fc2, block.form.gelu, codes, sums, hidden_sums, position
        )  # (B, F)
        parts = run.parts(block.fc2, hidden)  # (P, B, C)
        return residual, Branch(parts, block.fc2, hidden_sums, chunks["gate_mlp"])


def install_steps(adapter: Adapter) -> bool:
    """Let a model on a GPU run its decoding steps of one token by these kernels, if it can.

    It can if it has a `step_runner`, to be called like `StepBlocks`, and all its blocks qualify.
    Otherwise, and where the attention cannot be compiled, the log has the reason.

    Returns:
        whether it does.
    """
    model = adapter.model
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        return False
    try:
        model.step_runner = build_steps(adapter)
    except NoStep as reason:
        log.info("decoding steps run block by block: %s", reason)
        return False
    except nvrtc.CompilerMissing as reason:
        log.warning("decoding steps run block by block, attention cannot be compiled: %s", reason)
        return False
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.one_kernel = True  # those outside of the blocks, and all in the first step
    return True


def build_steps(adapter: Adapter) -> StepBlocks:
    """The steps of a model on a GPU.

    Raises:
        NoStep: it does not qualify. CompilerMissing: its attention cannot be compiled.
    """
    model = adapter.model
    form = getattr(adapter, "block_form", None)  # a plugin's adapter may know nothing of it
    if form is None or form.q_norm is None or not form.chunks or not hasattr(model, "step_runner"):
        raise NoStep(f"those of {adapter.family} have another form")
    example = next(model.parameters())
    if example.dtype not in NUMBER_FORMATS:
        raise NoStep(f"what is not quantized is {example.dtype}")
    blocks = []
    for name in adapter.blocks:
        blocks.append(describe_block(model.get_submodule(name), form, model.prefix))
    head = describe_head(model.adaln_before_head, model.lm_head, model.prefix)
    early = launches_early(example.device)
    for block in blocks:
        compile_attention(block.attention, example.device, early)
    return StepBlocks(blocks, head, Kernels(early))


def launches_early(device: torch.device) -> bool:
    """Whether kernels may start before those ahead of them have ended: on Hopper and later, with a
    Triton that can say so."""
    is_new = torch.cuda.get_device_capability(device) >= nvrtc.HOPPER
    return is_new and hasattr(tl.extra.cuda, "gdc_wait")


def compile_attention(
    attention: StepAttention | FloatStepAttention, device: torch.device, early: bool
) -> None:
    """Compile the kernel for few keys, to see whether it can be.

    Raises:
        CompilerMissing: it cannot.
    """
    if isinstance(attention, StepAttention):
        constants = kernel_constants(attention, torch.float32, 1, early)
        compile_kernel(constants, device.index or 0)

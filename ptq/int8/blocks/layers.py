"""Transformer blocks run by the kernels of this folder, which `__init__.py` draws."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ptq.int8.blocks.attention import HeadNorm, normalise_heads
from ptq.int8.blocks.norms import Branch, Grid, Modulation, Norm
from ptq.int8.blocks.operators import (
    attention_codes,
    int8_linear_gelu,
    int8_linear_keys,
    norm_codes,
    store_keys,
)
from ptq.int8.codes import HEAD_CHANNELS
from ptq.int8.modules import Int8Linear
from ptq.int8.ops import int8_linear
from ptq.sites import Adapter, BlockForm

log = logging.getLogger(__name__)

QKV = 3  # outputs of that layer, one behind the other
HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class Pending:
    """A residual stream whose last branch is still to be added: the next block's first kernel does
    that on the way.

    Attributes:
        stream: (B, T, C).
        branch: of value (B T, C), and a gate if the block has one.
    """

    stream: Tensor
    branch: Branch | None

    def take_branch(self) -> Branch:
        """The branch, whose memory is then not held from here."""
        branch = self.branch
        self.branch = None
        return branch

    # models ask these of a tensor in its place

    def __len__(self) -> int:
        """B."""
        return len(self.stream)

    @property
    def shape(self) -> torch.Size:
        """(B, T, C)."""
        return self.stream.shape

    def add(self) -> Tensor:
        """The stream with the branch, (B, T, C)."""
        value = self.branch.value.view(self.stream.shape)
        if self.branch.gate is None:
            return self.stream + value
        gate = self.branch.gate.view(len(self), -1, value.shape[-1])  # (B, T, C) or (B, 1, C)
        return torch.addcmul(self.stream, gate, value)


def part_at(block: nn.Module, path: str) -> Any:
    """A part of a block by its name in it."""
    part = block
    for name in path.split("."):
        part = getattr(part, name)
    return part


def is_in_floats(attention: nn.Module) -> bool:
    """Whether neither product of attention is quantized."""
    return attention.qk.fused and attention.pv.fused


def norms_keys(linear: Int8Linear, attention: nn.Module, norm: HeadNorm) -> bool:
    """Whether the product of queries, keys and values can leave the norms of its keys."""
    # what is added for sinks would come behind them
    has_shift = linear.sink_shift is not None
    return norm.kind != "none" and attention.head_dim == HEAD_CHANNELS and not has_shift


def remember_keys(
    cache: Any, k: Tensor, v: Tensor, positions: Tensor, norm: HeadNorm
) -> tuple[Tensor, Tensor]:
    """Keys, normalised, and values (B, H, T, D) into a cache; returns all tokens' so far, (B, H, S,
    D) each."""
    slots = cache.slots(k, v)
    if slots is None:
        normalised = normalise_heads(k.float(), norm.kind, norm.k_weight, norm.k_bias, norm.eps)
        return cache.append(normalised.to(k.dtype), v, positions)
    store_keys(*slots, k, v, positions, norm)
    return cache.seen()


def multiply(
    linear: Int8Linear, codes: Tensor, sums: Tensor, positions: Tensor, like: Tensor
) -> Tensor:
    """The layer's output (B, T, O) of codes (B T, I) with sums (B T,), of the type of `like`
    (B, T, C)."""
    epilogue = linear.epilogue(linear.table, positions, sums)
    output = int8_linear(codes, linear.weight, *epilogue, like.dtype).view(*like.shape[:2], -1)
    if linear.sink_shift is None:
        return output
    return linear.sink_shift.restore_output_(output, positions)


def grid_of(linear: Int8Linear, positions: Tensor) -> Grid:
    """The grid of the layer's input."""
    return Grid(linear.table, positions, linear.bits, *sinks_of(linear, "mean"))


def sinks_of(linear: Int8Linear, part: str) -> tuple[Tensor | None, int]:
    """The mean or bias of the layer's sink tokens, and how many there are; None and 0 without."""
    shift = linear.sink_shift
    return (None, 0) if shift is None else (getattr(shift, part), shift.sinks)


def scales_of(linear: Int8Linear) -> tuple[Tensor | None, Tensor | None]:
    """What the layer's input is divided by online, and what is taken off before that, (I,) each;
    None where nothing is."""
    transform = linear.transform
    return (None, None) if transform is None else (transform.scale, transform.shift)


class Int8Block:
    """Comes before the class of a model's block, and replaces what both branches do.

    Attributes:
        form: of the block.
        head_scale: factors (H,) of unit queries, float32; or None.
        hands_on: the next block adds the last branch (`chain_blocks`).
    """

    form: BlockForm
    head_scale: Tensor | None
    hands_on = False

    def branches(
        self,
        x: Tensor | Pending,
        modulation: Tensor | None,
        positions: Tensor,
        mask: Tensor | str | None,
        cache: Any,
    ) -> Tensor | Pending:
        """The block's output (B, T, C), as the model's own method of this name gives it.

        Args:
            x: (B, T, C), or what the block before has handed on.
            modulation: (B, T, n C) or (B, 1, n C), what AdaLN gives.
            mask: additive, or `causal`, or None.
        """
        form = self.form
        before = None
        if isinstance(x, Pending):
            before = x.take_branch()
            x = x.stream
        proj = part_at(self, form.proj)
        fc1 = part_at(self, form.fc1)
        fc2 = part_at(self, form.fc2)
        stream = x.flatten(0, 1)  # (M, C)
        shifts = self._chunks(modulation)

        stream, codes, sums = norm_codes(
            stream,
            *self._norm("1", shifts, "msa"),
            grid_of(part_at(self, form.qkv), positions),
            before,
        )
        del before  # its memory, a modulation with it
        codes, sums = self._attend(codes, sums, x, positions, mask, cache)
        output = multiply(proj, codes, sums, positions, x).flatten(0, 1)  # (M, C)

        stream, codes, sums = norm_codes(
            stream,
            *self._norm("2", shifts, "mlp"),
            grid_of(fc1, positions),
            Branch(output, shifts.get("gate_msa")),
        )
        epilogue = fc1.epilogue(fc1.table, positions, sums)
        hidden = (fc2.table, form.gelu, fc2.bits)
        sinks = (*sinks_of(fc1, "bias"), *sinks_of(fc2, "mean"))
        codes, sums = int8_linear_gelu(
            codes, fc1.weight, *epilogue, *hidden, *sinks, *scales_of(fc2)
        )
        output = multiply(fc2, codes, sums, positions, x).flatten(0, 1)  # (M, C)
        pending = Pending(stream.view(x.shape), Branch(output, shifts.get("gate_mlp")))
        return pending if self.hands_on else pending.add()

    def _chunks(self, modulation: Tensor | None) -> dict[str, Tensor]:
        """The parts (G, C) of a modulation by name."""
        if modulation is None:
            return {}
        chunks = modulation.flatten(0, 1).chunk(len(self.form.chunks), dim=-1)
        return dict(zip(self.form.chunks, chunks, strict=True))

    def _norm(self, number: str, shifts: dict[str, Tensor], branch: str) -> tuple[Norm, Modulation]:
        """What happens to the stream in front of a branch."""
        form = self.form
        layer = part_at(self, form.norm1 if number == "1" else form.norm2)
        norm = Norm("layer", layer.weight, layer.bias, layer.eps)
        if not shifts:
            return norm, Modulation()
        kappa = part_at(self, form.kappa1 if number == "1" else form.kappa2)
        return norm, Modulation(shifts[f"scale_{branch}"], shifts[f"shift_{branch}"], kappa)

    def _attend(
        self,
        codes: Tensor,
        sums: Tensor,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | str | None,
        cache: Any,
    ) -> tuple[Tensor, Tensor]:
        """Codes (M, C) of the average of values for the projection, and their sums.

        Args:
            codes, sums: (M, C) and (M,), of what queries, keys and values are made of.
            x: the block's input (B, T, C), for its shape and type.
        """
        form = self.form
        attention = part_at(self, form.attention)
        layer = part_at(self, form.qkv)
        grid = grid_of(part_at(self, form.proj), positions)
        is_named = isinstance(mask, str)
        by_kernel = is_in_floats(attention) and x.dtype in HALF_PRECISION
        if not by_kernel or (is_named and cache is not None):
            qkv = multiply(layer, codes, sums, positions, x)  # (B, T, 3 C)
            average = attention.average(qkv, positions, mask, cache).flatten(0, 1)  # (M, C)
            _, codes, sums = norm_codes(average, Norm(), Modulation(), grid)
            return codes, sums
        norm = self._head_norm()
        if cache is None and norms_keys(layer, attention, norm):
            terms = layer.epilogue(layer.table, positions, sums)
            settings = x.dtype, attention.heads, norm.kind, norm.eps
            qkv, factors = int8_linear_keys(codes, layer.weight, *terms, *settings)
            norm = norm._replace(factors=factors)
        else:
            qkv = multiply(layer, codes, sums, positions, x)
        heads = qkv.view(*x.shape[:2], QKV, attention.heads, attention.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        if cache is not None:
            k, v = remember_keys(cache, k, v, positions, norm)  # (B, H, S, D) each
            mask = cache.mask(mask, q, positions)
            norm = norm._replace(keys=False)
        additive = None if is_named else mask
        return attention_codes(q, k, v, norm, attention.scale, is_named, additive, grid)

    def _head_norm(self) -> HeadNorm:
        """What happens to queries and keys."""
        form = self.form
        if form.query_scale is not None:
            kind = "none" if self.head_scale is None else "unit"
            return HeadNorm(kind, head_scale=self.head_scale)
        if form.q_norm is None:
            return HeadNorm()
        q_norm = part_at(self, form.q_norm)
        k_norm = part_at(self, form.k_norm)
        return HeadNorm("layer", q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, q_norm.eps)


class Int8Projection:
    """Comes before the class of AdaLN's projection, SiLU and a linear layer."""

    def forward(self, c: Tensor, positions: Tensor) -> Tensor:
        """The modulation (B, T, n C) of conditions c (B, T, C) or (B, 1, C)."""
        return self._multiply(c, Norm("silu"), positions)

    def project(self, activated: Tensor, positions: Tensor) -> Tensor:
        """The same of conditions after SiLU."""
        return self._multiply(activated, Norm(), positions)

    def _multiply(self, c: Tensor, norm: Norm, positions: Tensor) -> Tensor:
        _, linear = self
        positions = positions[: c.shape[1]]
        rows = c.flatten(0, 1)  # (M, C)
        _, codes, sums = norm_codes(rows, norm, Modulation(), grid_of(linear, positions))
        return multiply(linear, codes, sums, positions, c)


@lru_cache
def int8_class(base: type[nn.Module], before: type, form: BlockForm) -> type[nn.Module]:
    """A class of a model with one of the above before it."""
    return type(f"Int8{base.__name__}", (before, base), {"form": form})


def refusal_of_layer(linear: nn.Module, scales_input: bool = False) -> str | None:
    """Why the kernels cannot run a linear layer, as the end of a sentence; None if they can.

    Args:
        scales_input: whether what makes the layer's codes can scale and shift its input.
    """
    if not isinstance(linear, Int8Linear):
        return "is not in integers"
    if linear.table is None:
        return "has dynamic ranges"
    transform = linear.transform
    if transform is not None and (transform.rotation is not None or not scales_input):
        return "transforms its input online"
    if linear.down is not None:
        return "has a low-rank branch"
    if linear.padding:
        return f"has {linear.in_features} inputs, no multiple of 16"
    return None


def refusal_of(block: nn.Module, form: BlockForm) -> str | None:
    """Why a block stays as it is, in one line; None if the kernels can run it."""
    for name in ("qkv", "proj", "fc1", "fc2"):
        # GELU's kernel scales and shifts what it hands to fc2
        reason = refusal_of_layer(part_at(block, getattr(form, name)), scales_input=name == "fc2")
        if reason is not None:
            return f"{name} {reason}"
    for name in ("norm1", "norm2"):
        if not isinstance(part_at(block, getattr(form, name)), nn.LayerNorm):
            return f"{name} is no LayerNorm"
    for name in form.loose_bias:
        if part_at(block, name).any():
            return f"{name} is a bias beside qkv"
    return None


def run_by_kernels(adapter: Adapter) -> bool:
    """Let the kernels of this folder run the blocks of a model whose layers are in integers, if
    they can. The log says why they cannot. In float32 attention stays the library's.

    As with PyTorch's `fully_shard`, a block changes its class and stays the same module: names,
    parameters and calls are what they were.

    Returns:
        whether they do.
    """
    form = getattr(adapter, "block_form", None)  # a plugin's adapter may know nothing of it
    if form is None:
        log.info("blocks run layer by layer: those of %s have another form", adapter.family)
        return False
    blocks = [adapter.model.get_submodule(name) for name in adapter.blocks]
    for name, block in zip(adapter.blocks, blocks, strict=True):
        reason = refusal_of(block, form)
        if reason is not None:
            log.info("blocks run layer by layer: in %s %s", name, reason)
            return False
    for block in blocks:
        block.__class__ = int8_class(type(block), Int8Block, form)
        scale = None
        if form.query_scale is not None:
            scale = part_at(block, form.query_scale)()
        flat = None if scale is None else scale.detach().flatten().float()  # (H,)
        block.register_buffer("head_scale", flat, persistent=False)
        projection = getattr(block, form.projection) if form.projection is not None else None
        if projection is not None and refusal_of_layer(projection[-1]) is None:
            projection.__class__ = int8_class(type(projection), Int8Projection, form)
    return True


def chain_blocks(adapter: Adapter) -> bool:
    """Let every block hand its last branch on to the next one of its row, if all of them run by
    kernels alone: a pass through memory less. Their outputs are no tensors then.

    Returns:
        whether they do. There is nothing in such blocks for a compiler to fuse.
    """
    blocks = [adapter.model.get_submodule(name) for name in adapter.blocks]
    is_half = next(adapter.model.parameters()).dtype in HALF_PRECISION
    for block in blocks:
        if not isinstance(block, Int8Block) or not is_half:
            return False
        if not is_in_floats(part_at(block, block.form.attention)):
            return False
    for name, following in pairwise(adapter.blocks):
        row = name.rpartition(".")[0]
        if row == following.rpartition(".")[0]:
            adapter.model.get_submodule(name).hands_on = True
    return True

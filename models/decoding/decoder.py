"""Decoding steps whose shapes do not change, so that a GPU replays them from CUDA graphs.

A step of an autoregressive model is hundreds of small kernels, and starting them one by one takes
longer than running them. `Decoder` captures the step once per number of tokens and of cache slots
that are read (multiples of a stride) and then replays it; only the positions change, in place.
Without anything that captures it runs the step as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoding.step_attention import QUERIES, attend_step
from models.layers import Attention, KVCache

# record(work) -> a graph of the work, and its result
Recorder = Callable[[Callable[[], Tensor]], tuple[torch.cuda.CUDAGraph, Tensor]]
STRIDE = 64  # cache slots; a decoding step reads up to so many that it masks


class StaticCache(KVCache):
    """A cache of fixed shape: tokens go to their positions, the first `visible` slots are read.

    Slots behind the last token are masked and hold zeros: a quantized attention weight of a masked
    slot need not be zero, but its product is. `masked` says whether there can be any.
    """

    def __init__(self, length: int, masked: bool = True) -> None:
        super().__init__(length)
        self.visible = length
        self.masked = masked

    def append(
        self, k: Tensor, v: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) at `positions` (T,) and return the visible slots, (B, H, visible,
        D) each."""
        if self.k is None:
            batch, heads, _, channels = k.shape
            self.k = k.new_zeros(batch, heads, self.length, channels)
            self.v = v.new_zeros(batch, heads, self.length, channels)
        # positions stay on the device: a captured step writes wherever they point at replay
        self.k.index_copy_(2, positions, k)
        self.v.index_copy_(2, positions, v)
        return self.k[:, :, : self.visible], self.v[:, :, : self.visible]

    def mask(self, mask: Tensor | None, q: Tensor, positions: Tensor | None) -> Tensor | None:
        """The additive mask over the visible slots.

        A given mask (T, T') is that of the first T' slots; without one, all tokens so far are seen.
        """
        if not self.masked:
            return mask
        if mask is not None:
            return F.pad(mask, (0, self.visible - mask.shape[-1]), value=float("-inf"))
        behind = torch.arange(self.visible, device=q.device) > positions[-1]  # (visible,)
        return q.new_zeros(1, self.visible).masked_fill_(behind, float("-inf"))  # (1, visible)

    def count(self, positions: Tensor | None) -> Tensor | None:
        """Tokens stored so far (1,), on their device: zeros behind them are no codes of zero."""
        return positions[-1:] + 1 if self.masked else None

    def attention(self, q: Tensor) -> Attention | None:
        """One pass over the cache for the few queries of a decoding step on a GPU."""
        # the kernel sums in float32, which would spoil a float64 model
        few = q.is_cuda and q.shape[2] <= QUERIES and q.dtype != torch.float64
        return attend_step if few else None

    def clear(self) -> None:
        """Forget everything."""
        if self.k is not None:
            self.k.zero_()
            self.v.zero_()


@dataclass(frozen=True)
class Captured:
    """A recorded step, and the places that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    positions: Tensor
    changing: tuple[Tensor, ...]
    output: Tensor


class Decoder:
    """The steps of `model(*inputs, *changing, positions=..., cache=...)`, for fixed shapes.

    Args:
        blocks: the model's, one cache each. length: tokens that a cache holds.
        compiled: compile the blocks, whose graph all of them share, before capturing.
        record: captures a step on a GPU, like `ptq.omniquant.graphs.record_graph`; None runs every
            step as it is.
        stride: cache slots are read in multiples of it; 1 where steps are few and long.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        length: int,
        compiled: bool = False,
        record: Recorder | None = None,
        stride: int = STRIDE,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.length = length
        self.record = record
        self.stride = stride
        self.inputs: tuple[Tensor, ...] = ()
        if compiled:
            compile_alike(blocks)

    def begin(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Start new sequences: caches empty, inputs in the places from which the steps read them.

        Inputs of other shapes than before start anew, with nothing captured.
        """
        if [given.shape for given in inputs] != [place.shape for place in self.inputs]:
            # copies, whose addresses the captured steps keep reading
            self.inputs = tuple(given.clone() for given in inputs)
            self.caches = [StaticCache(self.length, self.stride > 1) for _ in self.blocks]
            self.all_positions = torch.arange(self.length, device=inputs[0].device)  # (length,)
            self.graphs: dict[tuple[int, int], Captured] = {}
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        for cache in self.caches:
            cache.clear()
        return self.inputs

    def __call__(self, first: int, end: int, *changing: Tensor) -> Tensor:
        """The model's output at positions first .. end - 1, valid until the next call.

        Args:
            changing: inputs of this step alone; their shapes follow from the positions.
        """
        strides = math.ceil(end / self.stride)
        # whole strides: all steps within one can share a captured graph
        visible = min(strides * self.stride, self.length)
        for cache in self.caches:
            cache.visible = visible
        positions = self.all_positions[first:end]
        if self.record is None:
            return self._step(positions, changing)

        key = (end - first, visible)
        if key not in self.graphs:
            # of the graph's own, as the caller's tensors may be gone at the next replay
            own_changing = tuple(value.clone() for value in changing)
            self.graphs[key] = self._capture(positions.clone(), own_changing)
        captured = self.graphs[key]
        places = (captured.positions, *captured.changing)
        for place, value in zip(places, (positions, *changing), strict=True):
            place.copy_(value)
        captured.graph.replay()
        return captured.output

    def _step(self, positions: Tensor, changing: tuple[Tensor, ...]) -> Tensor:
        return self.model(*self.inputs, *changing, positions=positions, cache=self.caches)

    def _capture(self, positions: Tensor, changing: tuple[Tensor, ...]) -> Captured:
        """Record a step; that it may run several times does no harm, as it writes the same."""
        graph, output = self.record(lambda: self._step(positions, changing))
        return Captured(graph, positions, changing, output)


def compile_alike(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward pass of blocks of one class, once for all of them."""
    compiled: Callable[..., Tensor] = torch.compile(type(blocks[0]).forward)
    for block in blocks:
        block.forward = compiled.__get__(block)

"""Decoding steps whose shapes do not change, so that a GPU replays them from CUDA graphs.

A step of an autoregressive model is hundreds of small kernels, and starting them one by one takes
longer than running them. `Decoder` captures the step once per number of tokens and of cache slots
that are read (multiples of a stride) and then replays it; only the positions change, in place.
Without anything that captures it runs the step as it is.

AdaLN's input does not depend on the tokens, so its projections are computed for many positions at
once, and unconditional rows, which are all alike, once for all:

    every `ahead` positions   tables of all layers = projections of B + 1 rows
    every step                embed -> blocks, which read their tables at the position -> head
                              -> `finish`: guide, draw, write the token where the next step reads it

An `exact` decoder does none of this: it replays what the sampler does without it, and its images
are the same byte for byte. Where a step cannot be captured, it runs on without graphs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoding.step_attention import QUERIES, attend_step
from models.layers import Attention, KVCache

# record(work) -> a graph of the work, and its result; graphs of one pool share their memory
Recorder = Callable[..., tuple[torch.cuda.CUDAGraph, Any]]
# finish(output, positions, inputs, *state) -> what a step returns
Finish = Callable[..., Tensor]
STRIDE = 64  # cache slots; a decoding step reads up to so many that it masks


class StaticCache(KVCache):
    """A cache of fixed shape: tokens go to their positions, the first `visible` slots are read.

    Slots behind the last token are masked and hold zeros: a quantized attention weight of a masked
    slot need not be zero, but its product is. `masked` says whether there can be any. An `exact`
    cache leaves attention to the library, as a growing one does.
    """

    def __init__(self, length: int, masked: bool = True, exact: bool = False) -> None:
        super().__init__(length)
        self.visible = length
        self.masked = masked
        self.exact = exact

    def append(
        self, k: Tensor, v: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) at `positions` (T,) and return the visible slots, (B, H, visible,
        D) each."""
        keys, values = self.slots(k, v)
        if self.masked:
            # positions stay on the device: a captured step writes wherever they point at replay
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
        else:  # of a step that is captured by itself: a slice is copied three times as fast
            own = slice(self.visible - k.shape[2], self.visible)
            keys[:, :, own] = k
            values[:, :, own] = v
        return self.seen()

    def slots(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Where keys and values like k, v (B, H, T, D) are kept, (B, H, S, D) each."""
        if self.k is None:
            batch, heads, _, channels = k.shape
            self.k = k.new_zeros(batch, heads, self.length, channels)
            self.v = v.new_zeros(batch, heads, self.length, channels)
        return self.k, self.v

    def seen(self) -> tuple[Tensor, Tensor]:
        """The visible slots, (B, H, visible, D) each."""
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
        if self.exact:
            return None
        return attend_step if few else None

    def clear(self) -> None:
        """Forget everything that could be read before it is written anew."""
        if self.k is not None and self.masked:
            self.k.zero_()
            self.v.zero_()


@dataclass(frozen=True)
class Captured:
    """A recorded step, and the places that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    positions: Tensor
    changing: tuple[Tensor, ...]
    output: Any

    def replay(self, positions: Tensor, changing: tuple[Tensor, ...] = ()) -> Any:
        """The output for these positions and changing inputs, valid until the next replay."""
        places = (self.positions, *self.changing)
        for place, value in zip(places, (positions, *changing), strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.output


class Decoder:
    """The steps of `model(*inputs, *changing, positions=..., cache=...)`, for fixed shapes.

    Args:
        blocks: the model's, one cache each. length: tokens that a cache holds.
        compiled: compile the blocks, whose graph all of them share, before capturing.
        record: captures a step on a GPU, like `ptq.omniquant.graphs.record_graph`; None runs every
            step as it is.
        stride: cache slots are read in multiples of it; 1 where steps are few and long.
        ahead: positions for which `model.modulate_ahead` is called at once; 0: the blocks do it.
        exact: keep the bytes of the sampler without a decoder, at a graph for every step.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        length: int,
        compiled: bool = False,
        record: Recorder | None = None,
        stride: int = STRIDE,
        ahead: int = 0,
        exact: bool = False,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.length = length
        self.record = record
        self.stride = 1 if exact else stride
        self.ahead = 0 if exact else ahead
        self.exact = exact
        self.inputs: tuple[Tensor, ...] = ()
        self.state: tuple[Tensor, ...] = ()
        self.finish: Finish | None = None
        self.distinct: int | None = None
        if compiled:
            compile_alike(blocks)

    def begin(
        self,
        *inputs: Tensor,
        distinct: int | None = None,
        finish: Finish | None = None,
        state: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Start new sequences: caches empty, inputs in the places from which the steps read them.

        Inputs of other shapes than before, or another end of the steps, start anew, with nothing
        captured.

        Args:
            distinct: of the rows of the last input, so many differ; all later ones are like the
                last of these. None: all may differ.
            finish: ends a step, in its graph; compared with the one before by its value.
            state: what `finish` reads beside the model's output and inputs.

        Returns:
            The places of the inputs.
        """
        given = (*inputs, *state)
        places = (*self.inputs, *self.state)
        same_shapes = [value.shape for value in given] == [place.shape for place in places]
        if not same_shapes or (distinct, finish) != (self.distinct, self.finish):
            # copies, whose addresses the captured steps keep reading
            self.inputs = tuple(value.clone() for value in inputs)
            self.state = tuple(value.clone() for value in state)
            self.distinct = distinct
            self.finish = finish
            self._forget_graphs(inputs[0].device)
        for place, value in zip((*self.inputs, *self.state), given, strict=True):
            place.copy_(value)
        for cache in self.caches:
            cache.clear()
        self.tables: Sequence[Tensor] | None = None
        self.window = -1
        return self.inputs

    def _forget_graphs(self, device: torch.device) -> None:
        """Caches and graphs for inputs in other places, with nothing in them."""
        masked = self.stride > 1
        self.caches = [StaticCache(self.length, masked, self.exact) for _ in self.blocks]
        self.all_positions = torch.arange(self.length, device=device)  # (length,)
        self.graphs: dict[tuple[int, int], Captured] = {}
        self.lookahead: Captured | None = None
        self.pool = None if self.record is None else torch.cuda.graph_pool_handle()

    def __call__(self, first: int, end: int, *changing: Tensor) -> Tensor:
        """The output of the step at positions first .. end - 1, valid until the next call.

        Args:
            changing: inputs of this step alone; their shapes follow from the positions.
        """
        strides = math.ceil(end / self.stride)
        # whole strides: all steps within one can share a captured graph
        visible = min(strides * self.stride, self.length)
        for cache in self.caches:
            cache.visible = visible
        positions = self.all_positions[first:end]
        if self.ahead:
            self._look_ahead(first // self.ahead)
        if self.record is None:
            return self._step(positions, changing)

        key = (end - first, visible)
        if key not in self.graphs:
            try:
                self.graphs[key] = self._capture_step(positions, changing)
            except RuntimeError as error:  # out of memory, or the step waits for the device
                if not self.exact:
                    raise
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"steps are not captured, and run as they are: {reason}", stacklevel=2
                )
                self.graphs.clear()
                self.record = None
                return self._step(positions, changing)
        return self.graphs[key].replay(positions, changing)

    def _capture_step(self, positions: Tensor, changing: tuple[Tensor, ...]) -> Captured:
        # of the graph's own, as the caller's tensors may be gone at the next replay
        own_positions = positions.clone()
        own_changing = tuple(value.clone() for value in changing)
        return self._capture(
            lambda: self._step(own_positions, own_changing), own_positions, own_changing
        )

    def _step(self, positions: Tensor, changing: tuple[Tensor, ...]) -> Tensor:
        tables = {} if self.tables is None else {"tables": self.tables}
        output = self.model(
            *self.inputs, *changing, positions=positions, cache=self.caches, **tables
        )
        if self.finish is None:
            return output
        return self.finish(output, positions, self.inputs, *self.state)

    def _look_ahead(self, window: int) -> None:
        """Fill the tables for the positions of a window, unless they are there."""
        if window == self.window:
            return
        self.window = window
        first = window * self.ahead
        # past the end of the sequence in the last window: the model says what stands there
        positions = torch.arange(first, first + self.ahead, device=self.all_positions.device)
        if self.record is None:
            self.tables = self._modulate(positions)
            return
        if self.lookahead is None:
            self.lookahead = self._capture(lambda: self._modulate(positions), positions)
        # in the same places every time, which the captured steps read
        self.tables = self.lookahead.replay(positions)

    def _modulate(self, positions: Tensor) -> list[Tensor]:
        return self.model.modulate_ahead(self.inputs[-1][: self.distinct], positions)

    def _capture(
        self, work: Callable[[], Any], positions: Tensor, changing: tuple[Tensor, ...] = ()
    ) -> Captured:
        """Record work; that it may run several times does no harm, as it writes the same."""
        graph, output = self.record(work, pool=self.pool)
        return Captured(graph, positions, changing, output)


def compile_alike(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward pass of blocks of one class, once for all of them."""
    compiled: Callable[..., Tensor] = torch.compile(type(blocks[0]).forward)
    for block in blocks:
        block.forward = compiled.__get__(block)

"""The two streams of a method that trains block by block: what full precision feeds a block and
what it makes of that, and what the blocks before feed it once they are quantized.

    h_0 = h^_0 = embedding,    h_(k+1) = f_k(h_k),    h^_(k+1) = f^_k(h^_k)      f_k: block, f^_k:
    its quantized student

The streams are cut into parts of a few calibration rows. An example of block k is one of its calls
on a part: the arguments of the quantized stream, h^_k first, and the target f_k(h_k).

A block's arguments are found by running the model itself: stations stand in the places of the
blocks, so that masks, conditions and what lies between two halves of a model (MAR) come out of the
model's own code. A station notes what it is given, hands on what the block before gave there, and
the last one stops the run. So a block costs one run of what
is not in blocks, and keeps its examples and outputs. Where these need more than `STREAM_BYTES`,
nothing is kept: every use of a part runs the blocks before it again, which takes time in place of
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.modules import replaced_modules
from ptq.sites import Adapter, Rows

STREAM_BYTES = 8 * 2**30  # of the examples of a block

Call = tuple[tuple, dict]  # positional arguments, the stream (B, T, C) first, and keyword arguments


@dataclass(frozen=True)
class Example:
    """One call of a block on the quantized stream, and the full-precision output (B, T, C) on its
    own stream."""

    args: tuple
    kwargs: dict
    target: Tensor

    def run(self, block: nn.Module) -> Tensor:
        return block(*self.args, **self.kwargs)

    def copy(self) -> Example:
        """The same with tensors of its own."""

        def own(value: object) -> object:
            return value.clone() if isinstance(value, Tensor) else value

        return Example(
            tuple(map(own, self.args)),
            {k: own(v) for k, v in self.kwargs.items()},
            self.target.clone(),
        )

    def rest(self) -> tuple:
        """The arguments that are no tensors, with None in the tensors' places."""

        def plain(value: object) -> object:
            return None if isinstance(value, Tensor) else value

        return (*map(plain, self.args), *((k, plain(v)) for k, v in self.kwargs.items()))

    def tensors(self) -> Iterator[Tensor]:
        yield from (
            t for t in (*self.args, *self.kwargs.values(), self.target) if isinstance(t, Tensor)
        )


class Arrived(Exception):
    """The last block is reached, the rest of the model need not be run."""


class Station(nn.Module):
    """Stands in the place of a block.

    Args:
        replies: what it returns, call by call; its own input if None. last: it stops the run.
    """

    def __init__(self, replies: Sequence[Tensor] | None = None, last: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.replies = replies
        self.last = last

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        self.calls.append((args, kwargs))
        if self.last:
            raise Arrived
        return args[0] if self.replies is None else self.replies[len(self.calls) - 1]


@torch.no_grad()
def calls_of(adapter: Adapter, index: int, before: Sequence[nn.Module], rows: Rows) -> list[Call]:
    """How the block of that index is called on `rows`, with `before` in the places of the blocks
    before it."""
    stations = [Station(last=name == adapter.last_block) for name in adapter.blocks[index:]]
    with (
        replaced_modules(adapter.model, dict(zip(adapter.blocks, [*before, *stations]))),
        suppress(Arrived),
    ):
        adapter.forward(rows)
    return stations[0].calls


class Streams:
    """The examples of the blocks, to be asked for in forward order.

    Args:
        parts: calibration rows, cut as they are to be run. student: gives the quantized block of a
            name.
    """

    def __init__(
        self, adapter: Adapter, parts: Sequence[Rows], student: Callable[[str], nn.Module]
    ) -> None:
        self.adapter = adapter
        self.parts = parts
        self.student = student
        self.originals = [adapter.model.get_submodule(name) for name in adapter.blocks]
        self.students: dict[str, nn.Module] = {}  # kept where outputs are not
        # of the block before: h and h^
        self.outputs: tuple[list[list[Tensor]], list[list[Tensor]]] | None = None

    def at(self, index: int) -> Sequence[list[Example]]:
        """The examples of a block, part by part."""
        kept: list[list[Example]] = []
        sizes: dict[int, int] = {}  # of what is kept, by address
        for number in range(len(self.parts)):
            kept.append(self.part(index, number))
            sizes |= {t.data_ptr(): t.nbytes for example in kept[-1] for t in example.tensors()}
            if sum(sizes.values()) > STREAM_BYTES:
                self.outputs = None
                return Recomputed(self, index)
        self.outputs = None
        return kept

    @torch.no_grad()
    def part(self, index: int, number: int) -> list[Example]:
        calls, quantized = (
            calls_of(self.adapter, index, self._before(index, number, stream), self.parts[number])
            for stream in (0, 1)
        )
        block = self.originals[index]
        return [
            Example(args, kwargs, block(*own, **own_kwargs))
            for (own, own_kwargs), (args, kwargs) in zip(calls, quantized)
        ]

    def _before(self, index: int, number: int, stream: int) -> Sequence[nn.Module]:
        """What stands before a block in stream 0 (full precision) or 1 (quantized)."""
        if index and self.outputs is not None:
            return [*(Station() for _ in range(index - 1)), Station(self.outputs[stream][number])]
        if stream == 0:
            return self.originals[:index]
        for name in self.adapter.blocks[:index]:
            if name not in self.students:
                self.students[name] = self.student(name)
        return [self.students[name] for name in self.adapter.blocks[:index]]

    @torch.no_grad()
    def leave(self, index: int, examples: Sequence[list[Example]]) -> None:
        """The student of the block is final: take the streams past it."""
        if isinstance(examples, list):
            student = self.student(self.adapter.blocks[index])
            self.outputs = (
                [[e.target for e in part] for part in examples],
                [[e.run(student) for e in part] for part in examples],
            )


class Recomputed(Sequence):
    """The examples of a block, found anew each time."""

    def __init__(self, streams: Streams, index: int) -> None:
        self.streams = streams
        self.index = index

    def __len__(self) -> int:
        return len(self.streams.parts)

    def __getitem__(self, number: int) -> list[Example]:
        return self.streams.part(self.index, number)

"""The two streams of a method that trains block by block.

    h_0 = h^_0 = embedding,    h_(k+1) = f_k(h_k),    h^_(k+1) = f^_k(h^_k)

f_k: block k, f^_k: its quantized student; h: what full precision feeds a block, h^: what the blocks
before feed it once they are quantized. The streams are cut into parts of a few calibration rows. An
example of block k is one of its calls on a part: the arguments of the quantized stream, h^_k first,
and the target f_k(h_k).

A block's arguments are found by running the model itself: stations stand in the places of the
blocks, so that masks, conditions and what lies between two halves of a model (MAR) come out of the
model's own code. A station notes what it is given and hands on what the block before gave there;
the last one stops the run. So a block costs one run of what is not in blocks, and keeps its
examples and outputs. Where these need more than `STREAM_BYTES`, nothing is kept: every use of a
part runs the blocks before it again, which takes time in place of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """One call of a block.

    Attributes:
        args, kwargs: arguments on the quantized stream.
        target: what the block makes of the full-precision stream (B, T, C).
    """

    args: tuple
    kwargs: dict
    target: Tensor

    def run(self, block: nn.Module) -> Tensor:
        return block(*self.args, **self.kwargs)

    def copy(self) -> Example:
        """The same with tensors of its own."""

        args = tuple(_clone_tensor(value) for value in self.args)
        kwargs = {name: _clone_tensor(value) for name, value in self.kwargs.items()}
        return Example(args, kwargs, self.target.clone())

    def plain_arguments(self) -> tuple:
        """The arguments that are no tensors, with None in the tensors' places."""
        args = tuple(_drop_tensor(value) for value in self.args)
        kwargs = tuple((name, _drop_tensor(value)) for name, value in self.kwargs.items())
        return args + kwargs

    def tensors(self) -> list[Tensor]:
        values = (*self.args, *self.kwargs.values(), self.target)
        return [value for value in values if isinstance(value, Tensor)]


def _clone_tensor(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _drop_tensor(value: object) -> object:
    return None if isinstance(value, Tensor) else value


class Arrived(Exception):
    """Stops a run at the last block: nothing behind it is needed."""


class Station(nn.Module):
    """Stands in the place of a block.

    Args:
        replies: what it returns, call by call; its own input if None.
        last: it stops the run.
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
        if self.replies is None:
            return args[0]
        return self.replies[len(self.calls) - 1]


@torch.no_grad()
def block_calls(
    adapter: Adapter, index: int, before: Sequence[nn.Module], rows: Rows
) -> list[Call]:
    """How a block is called on `rows`.

    Args:
        index: of the block.
        before: what stands in the places of the blocks before it.
    """
    stations = [Station(last=name == adapter.last_block) for name in adapter.blocks[index:]]
    stand_ins = dict(zip(adapter.blocks, [*before, *stations], strict=True))
    with replaced_modules(adapter.model, stand_ins), suppress(Arrived):
        adapter.forward(rows)
    return stations[0].calls


class Streams:
    """The examples of the blocks, to be asked for in forward order.

    Args:
        parts: calibration rows, cut as they are to be run.
        student: gives the quantized block of a name.
    """

    def __init__(
        self, adapter: Adapter, parts: Sequence[Rows], student: Callable[[str], nn.Module]
    ) -> None:
        self.adapter = adapter
        self.parts = parts
        self.student = student
        self.originals = [adapter.model.get_submodule(name) for name in adapter.blocks]
        self.students: dict[str, nn.Module] = {}  # used where outputs are not kept
        # of the block before, part by part and call by call, if they are kept
        self.full_outputs: list[list[Tensor]] | None = None  # h, (B, T, C) each
        self.quantized_outputs: list[list[Tensor]] | None = None  # h^, (B, T, C) each

    def examples_of(self, index: int) -> Sequence[list[Example]]:
        """The examples of a block, part by part."""
        examples: list[list[Example]] = []
        # bytes by address: examples of a part share masks and conditions
        sizes: dict[int, int] = {}
        for number in range(len(self.parts)):
            examples.append(self.examples_of_part(index, number))
            for example in examples[-1]:
                for tensor in example.tensors():
                    sizes[tensor.data_ptr()] = tensor.nbytes
            if sum(sizes.values()) > STREAM_BYTES:
                self.forget_outputs()
                return Recomputed(self, index)
        self.forget_outputs()
        return examples

    @torch.no_grad()
    def examples_of_part(self, index: int, number: int) -> list[Example]:
        """The examples of a block on one part."""
        rows = self.parts[number]
        full_calls = block_calls(self.adapter, index, self._full_before(index, number), rows)
        quantized_before = self._quantized_before(index, number)
        quantized_calls = block_calls(self.adapter, index, quantized_before, rows)
        block = self.originals[index]
        examples: list[Example] = []
        for full_call, quantized_call in zip(full_calls, quantized_calls, strict=True):
            full_args, full_kwargs = full_call
            args, kwargs = quantized_call
            examples.append(Example(args, kwargs, target=block(*full_args, **full_kwargs)))
        return examples

    def _full_before(self, index: int, number: int) -> Sequence[nn.Module]:
        """What stands in the places of the blocks before one in the full-precision stream."""
        if index and self.full_outputs is not None:
            return replying_stations(index, self.full_outputs[number])
        return self.originals[:index]

    def _quantized_before(self, index: int, number: int) -> Sequence[nn.Module]:
        """What stands in the places of the blocks before one in the quantized stream."""
        if index and self.quantized_outputs is not None:
            return replying_stations(index, self.quantized_outputs[number])
        before = self.adapter.blocks[:index]
        for name in before:
            if name not in self.students:
                self.students[name] = self.student(name)
        return [self.students[name] for name in before]

    @torch.no_grad()
    def pass_block(self, index: int, examples: Sequence[list[Example]]) -> None:
        """Take the streams past a block whose student is final."""
        if not isinstance(examples, list):
            return  # outputs are not kept
        student = self.student(self.adapter.blocks[index])
        self.full_outputs = []
        self.quantized_outputs = []
        for part in examples:
            self.full_outputs.append([example.target for example in part])
            self.quantized_outputs.append([example.run(student) for example in part])

    def forget_outputs(self) -> None:
        self.full_outputs = None
        self.quantized_outputs = None


def replying_stations(count: int, replies: Sequence[Tensor]) -> list[Station]:
    """Stations in the places of `count` blocks, of which the last one gives the replies."""
    return [*(Station() for _ in range(count - 1)), Station(replies)]


class Recomputed(Sequence):
    """The examples of a block, computed anew each time."""

    def __init__(self, streams: Streams, index: int) -> None:
        self.streams = streams
        self.index = index

    def __len__(self) -> int:
        return len(self.streams.parts)

    def __getitem__(self, number: int) -> list[Example]:
        return self.streams.examples_of_part(self.index, number)

"""CUDA graphs: work of many small kernels, recorded once and replayed as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """The stream on which work of a device runs before it is recorded.

    It is one for all recordings, since libraries keep memory for each stream.
    """
    return torch.cuda.Stream(device)


def record_graph(
    work: Callable[[], Result], warmup: int = 2, pool: tuple[int, int] | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Run `work` a few times on another stream, then record it.

    Every replay reads the tensors that `work` read and writes those that it returned. `work` must
    not wait for the device (read a value, copy to the host).

    Args:
        warmup: how often `work` runs before, in which libraries set themselves up.
        pool: memory that several graphs share, which are replayed one after the other.
    """
    stream = side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result

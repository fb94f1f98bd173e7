"""CUDA graphs: work of many small kernels, recorded once and replayed without starting them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def record(work: Callable[[], Result], warmup: int = 2) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Run `work` `warmup` times on a stream of its own, so that libraries set themselves up, then record it.

    Every replay reads the tensors that `work` read and writes those that it returned. `work` must not wait for the
    device (read a value, copy to the host).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result

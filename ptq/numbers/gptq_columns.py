"""The columns of one block of GPTQ (`../rounding.py`), one after the other.

A column takes a dozen small operators, and a GPU waits for their launches. There the columns of a
block are one CUDA graph, captured once for each shape: the same operators in the same order, so the
same numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams, simulate_format
from ptq.spec import QuantSpec

SHAPES = 16  # graphs that are kept; a model has linears of a few shapes


def round_columns(
    columns: Tensor, factor: Tensor, params: QParams, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """The columns (n, O) of a weight on their grid, and their errors e (n, O).

    Args:
        columns: changed in place. factor: U (n, n) of these columns. params: (O,) or (1,), or
            (n, O) of every column its own.
    """
    rounded = torch.empty_like(columns)  # (n, O)
    errors = torch.empty_like(columns)  # (n, O)
    by_column = params.scale.dim() == 2
    for i, column in enumerate(columns):
        own = params[i] if by_column else params
        rounded[i] = simulate_format(column, own, spec)  # (O,)
        errors[i] = (column - rounded[i]) / factor[i, i]
        # inside the block every error reaches the next columns at once
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return rounded, errors


def graphed_columns(
    columns: Tensor, factor: Tensor, params: QParams, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """`round_columns` of tensors on a GPU; what it returns is overwritten by the next call."""
    shape = tuple(columns.shape)
    graph = column_graph(shape, params.scale.shape, columns.dtype, columns.device, spec)
    return graph.run(columns, factor, params)


class ColumnGraph:
    """A captured `round_columns`.

    Args:
        shape: of the columns (n, O). groups: shape of the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        groups: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        spec: QuantSpec,
    ) -> None:
        self.columns = torch.zeros(shape, dtype=dtype, device=device)
        self.factor = torch.eye(shape[0], dtype=dtype, device=device)
        ones = torch.ones(groups, dtype=dtype, device=device)
        self.params = QParams(ones, torch.zeros_like(ones))
        # libraries set themselves up in a first run, which a capture does not allow
        with torch.cuda.stream(torch.cuda.Stream(device)):
            round_columns(self.columns.clone(), self.factor, self.params, spec)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = round_columns(self.columns, self.factor, self.params, spec)

    def run(self, columns: Tensor, factor: Tensor, params: QParams) -> tuple[Tensor, Tensor]:
        """Rounded columns and errors of these inputs."""
        self.columns.copy_(columns)
        self.factor.copy_(factor)
        self.params.scale.copy_(params.scale)
        self.params.zero_point.copy_(params.zero_point)
        self.graph.replay()
        return self.results


@lru_cache(maxsize=SHAPES)
def column_graph(
    shape: tuple[int, int],
    groups: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    spec: QuantSpec,
) -> ColumnGraph:
    """The graph for one shape."""
    return ColumnGraph(shape, groups, dtype, device, spec)

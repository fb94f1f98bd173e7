"""Modules whose tensors stay what they are when a whole model changes its number format."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Fixed(nn.Module):
    """`.bfloat16()`, `.to(...)` and the like move its tensors, and those of its children, to
    another device only."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fixed:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

"""The one algebra of all methods: what a site's input becomes before it is quantized, and what of
the weights is left to quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ptq.spec import ConfigError


class Rotation(Protocol):
    """An orthogonal map R of channels, the same for an activation and the weight that reads it."""

    def __call__(self, x: Tensor) -> Tensor:
        """x R along the last dimension."""


@dataclass(frozen=True)
class LowRank:
    """A branch in full precision beside the quantized weight: down A (r, C) and up B (O, r)."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class InputTransform:
    """What a site's input becomes, and what of its weights is left to quantize.

        x' = ((x - shift) / scale) R          W' = W diag(scale) R - B A         b' = b + W shift
        y  = Q(x') Q(W')^T + (x' A^T) B^T + b'

    Attributes:
        scale, shift: (C,).
        rotation: R, or None.
        low_rank: A and B (of all consumers, stacked), or None.
    """

    scale: Tensor
    shift: Tensor
    rotation: Rotation | None = None
    low_rank: LowRank | None = None

    @classmethod
    def identity(cls, channels: int, like: Tensor) -> InputTransform:
        """The transform that changes nothing, with the device and number format of `like`."""
        return cls(like.new_ones(channels), like.new_zeros(channels))

    @property
    def diagonal(self) -> InputTransform:
        """Scale and shift alone."""
        return InputTransform(self.scale, self.shift)

    def is_diagonal_identity(self) -> bool:
        """Whether scale and shift change nothing."""
        return bool((self.scale == 1).all()) and not bool(self.shift.any())

    def then(self, after: InputTransform) -> InputTransform:
        """The transform that applies `self` first and `after` second.

        Raises:
            ConfigError: it would not be of this form: a diagonal step follows a rotation, or a step
                a low-rank branch.
        """
        if self.rotation is not None and not after.is_diagonal_identity():
            raise ConfigError(
                "method: a scale or shift cannot follow a rotation, allowed is the other order"
            )
        rotates_twice = self.rotation is not None and after.rotation is not None
        if self.low_rank is not None or rotates_twice:
            raise ConfigError(
                "method: nothing can follow a low-rank branch, and no rotation another one"
            )
        # ((x - shift) / scale - after.shift) / after.scale
        return InputTransform(
            scale=self.scale * after.scale,
            shift=self.shift + self.scale * after.shift,
            rotation=self.rotation or after.rotation,
            low_rank=after.low_rank,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x' of x (..., C)."""
        x = (x - self.shift) / self.scale
        if self.rotation is not None:
            x = self.rotation(x)
        return x

    def on_weight(self, weight: Tensor) -> Tensor:
        """W' of the stacked weights W (O, C)."""
        weight = weight * self.scale
        if self.rotation is not None:
            weight = self.rotation(weight)
        if self.low_rank is not None:
            weight = weight - self.low_rank.up @ self.low_rank.down
        return weight

"""Calibration sets: a pool of generated images with both guidance branches, and its selectors.

Selectors by name (those called `dgc` are in `dgc.py`):
    random        n rows of the joint pool
    uniform       the same number of images of every class, both branches of each
    cond_only     the first n conditional rows
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ptq.files import digest_tensors
from ptq.numbers.numerics import NonFiniteError
from ptq.registry.entries import SELECTORS, register_selector
from ptq.sites import Adapter, CalibrationSet, Rows, Track
from ptq.spec import ConfigError

POOL_OFFSET = 2**40  # calibration images have indices from here on: never those of an evaluation


@dataclass(frozen=True)
class Pool:
    """N generated images: their conditional rows, the unconditional twins, and labels (N,)."""

    conditional: Rows
    unconditional: Rows
    labels: Tensor

    def joint(self) -> Rows:
        """All 2 N rows, conditional ones first."""
        joint_rows = {}
        for name, value in self.conditional.items():
            joint_rows[name] = torch.cat((value, self.unconditional[name]))
        return joint_rows


def pool_labels(selector: str, n: int, classes: int, seed: int) -> Tensor:
    """Class labels of the images to draw for a selector that keeps n rows.

    n images, 2 n candidate rows, of random classes, unless the selector has a way of its own.
    """
    draw_labels = SELECTORS[selector].draw_labels or random_labels
    if n < 1:
        raise ConfigError(f"calib.n: {n} is not a positive number of rows")
    return draw_labels(n, classes, seed)


def random_labels(n: int, classes: int, seed: int) -> Tensor:
    """Labels (n,) of n images, drawn on the CPU: the same images whatever the device."""
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def spread_labels(n: int, classes: int, seed: int) -> Tensor:
    """Labels of just the n / 2 images that n rows need, classes evenly spread."""
    images = (n + 1) // 2
    order = torch.arange(images)
    return order * classes // images if images < classes else order % classes


class Sampler(Protocol):
    """What draws tokens of class labels: the generators of `models`."""

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor: ...


def draw_tokens(
    sampler: Sampler,
    labels: Tensor,
    seed: int,
    microbatch: int,
    settings: dict[str, object],
    device: torch.device,
    track: Track,
) -> Tensor:
    """Tokens (N, T) or (N, T, D) of generated images with the given labels (N,).

    Sums depend on the shape of a batch, so every batch has `microbatch` images; those beyond the
    last label are thrown away.
    """
    drawn: list[Tensor] = []
    for start in track(list(range(0, len(labels), microbatch)), "calibration images"):
        index = torch.arange(start, start + microbatch)  # (B,), in the last batch beyond the end
        batch = labels[index % len(labels)].to(device)  # padded with the first labels
        drawn.append(sampler.sample(batch, seed, POOL_OFFSET + index, settings))
    return torch.cat(drawn)[: len(labels)]


@torch.no_grad()
def block_features(adapter: Adapter, rows: Rows, batch: int, first_token: bool) -> Tensor:
    """One feature per row (n, D) of a block's output.

    Args:
        batch: rows of a forward pass.
        first_token: token 0 of the released code's block; else the mean over all tokens but the
            sinks of the last one.

    Raises:
        NonFiniteError: a feature is not a finite number.
    """
    block = adapter.released_block if first_token else adapter.last_block
    feature_parts: list[Tensor] = []

    def keep_feature(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        # output (B, T, D)
        if first_token:
            feature_parts.append(output[:, 0])  # (B, D)
        else:
            feature_parts.append(output[:, adapter.sinks :].mean(dim=1))  # (B, D)

    num_rows = len(next(iter(rows.values())))
    handle = adapter.model.get_submodule(block).register_forward_hook(keep_feature)
    try:
        for part in CalibrationSet(rows, torch.ones(num_rows)).batches(batch):
            adapter.forward(part)
    finally:
        handle.remove()
    features = torch.cat(feature_parts).float()  # (n, D)
    if not bool(features.isfinite().all()):
        raise NonFiniteError(
            f"{block}: features contain NaN or infinity, only finite numbers are allowed"
        )
    return features


@dataclass(frozen=True)
class Selection:
    """What a selector chooses from.

    Attributes:
        n: how many of the pool's rows. batch: rows of a forward pass.
    """

    adapter: Adapter
    pool: Pool
    n: int
    seed: int
    batch: int = 64

    @property
    def images(self) -> int:
        """N: in the joint pool row i and row N + i are of image i, with its class and without."""
        return len(self.pool.labels)

    def features(self, first_token: bool = False) -> Tensor:
        """Features (2 N, D) of all rows, as `block_features` has them."""
        return block_features(self.adapter, self.pool.joint(), self.batch, first_token)


@register_selector("random")
def random_rows(selection: Selection) -> Tensor:
    """Any rows, in the pool's order, conditional ones first."""
    generator = torch.Generator().manual_seed(selection.seed)
    shuffled = torch.randperm(2 * selection.images, generator=generator)
    return shuffled[: selection.n].sort().values


@register_selector("uniform", draw_labels=spread_labels)
def both_branches(selection: Selection) -> Tensor:
    """The first images, both rows of each; an odd n keeps one unconditional twin less."""
    conditional = torch.arange((selection.n + 1) // 2)
    unconditional = selection.images + torch.arange(selection.n // 2)
    return torch.cat((conditional, unconditional))


@register_selector("cond_only", rows_per_image=1)
def first_conditional(selection: Selection) -> Tensor:
    return torch.arange(selection.n)


def select_rows(
    selector: str, adapter: Adapter, pool: Pool, n: int, seed: int, batch: int = 64
) -> CalibrationSet:
    """The calibration set of n rows that a selector keeps of the pool.

    Raises:
        ConfigError: unknown selector, or a pool too small for n.
    """
    entry = SELECTORS[selector]
    limit = entry.rows_per_image * len(pool.labels)
    if not 1 <= n <= limit:
        raise ConfigError(
            f"calib.n: {n} is not between 1 and {limit}, the rows that {selector} can choose from"
        )
    selection = Selection(adapter, pool, n, seed, batch)
    kept = _kept_rows(selector, pool, entry.choose(selection))
    if entry.rework is None:
        return kept
    return replace(kept, rows=entry.rework(selection, kept.rows))


def _kept_rows(selector: str, pool: Pool, index: Tensor) -> CalibrationSet:
    """The rows of the joint pool at `index`, and what results say of them."""
    images = len(pool.labels)
    conditional = index < images
    rows = {name: value[index.to(value.device)] for name, value in pool.joint().items()}
    meta = {
        "selector": selector,
        "rows": len(index),
        "pool": 2 * images,
        "conditional_share": conditional.double().mean().item(),
    }
    return CalibrationSet(rows, conditional, meta)


def no_rows() -> CalibrationSet:
    """The calibration set of a recipe that reads none (`Recipe.reads_rows`)."""
    meta = {"selector": "none", "rows": 0}
    return CalibrationSet({}, torch.zeros(0, dtype=torch.bool), meta)


def digest_rows(calibration: CalibrationSet) -> str:
    """The digest of a calibration set's rows."""
    return digest_tensors(calibration.rows)

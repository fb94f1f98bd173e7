"""Calibration sets: a pool of generated images, both guidance branches of each, and the selectors
that keep n rows.

Selectors by name:
    dgc           the n rows farthest from the mean of the joint pool (`dgc.select_paper`)
    dgc_released  the conditional share of the released code, then the first rows of each kind (`dgc.select_released`)
    random        n rows of the joint pool
    uniform       the same number of images of every class, both branches of each
    cond_only     the first n conditional rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq import dgc
from ptq.numbers.numerics import NonFiniteError
from ptq.sites import Adapter, CalibrationSet, Rows
from ptq.spec import ConfigError, require

SELECTORS = ("dgc", "dgc_released", "random", "uniform", "cond_only")


@dataclass(frozen=True)
class Pool:
    """N generated images: their conditional rows, the unconditional twins, and the class labels
    (N,)."""

    conditional: Rows
    unconditional: Rows
    labels: Tensor

    def joint(self) -> Rows:
        """All 2 N rows, conditional ones first."""
        return {k: torch.cat((v, self.unconditional[k])) for k, v in self.conditional.items()}


def pool_labels(selector: str, n: int, classes: int, seed: int) -> Tensor:
    """Class labels of the images to draw for a selector that keeps n rows.

    n images, 2 n candidate rows, of random classes; for `uniform` just the n / 2 that it needs,
    classes evenly spread.
    """
    require("calib.selector", selector, SELECTORS)
    if n < 1:
        raise ConfigError(f"calib.n: {n} is not a positive number of rows")
    if selector == "uniform":
        images = (n + 1) // 2
        return (
            torch.arange(images) * classes // images
            if images < classes
            else torch.arange(images) % classes
        )
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def block_features(adapter: Adapter, rows: Rows, batch: int, first_token: bool) -> Tensor:
    """One feature per row (n, D): token 0 of the released code's block, or the mean over all tokens
    but the sinks of the last one."""
    name = adapter.released_block if first_token else adapter.last_block
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        kept.append(output[:, 0] if first_token else output[:, adapter.sinks :].mean(dim=1))

    handle = adapter.model.get_submodule(name).register_forward_hook(keep)
    try:
        for part in CalibrationSet(rows, torch.ones(len(next(iter(rows.values()))))).batches(batch):
            adapter.forward(part)
    finally:
        handle.remove()
    features = torch.cat(kept).float()
    if not bool(features.isfinite().all()):
        raise NonFiniteError(
            f"{name}: features contain NaN or infinity, only finite numbers are allowed"
        )
    return features


def select_rows(
    selector: str, adapter: Adapter, pool: Pool, n: int, seed: int, batch: int = 64
) -> CalibrationSet:
    """The calibration set of n rows that a selector keeps of the pool.

    Raises:
        ConfigError: unknown selector, or a pool too small for n.
    """
    require("calib.selector", selector, SELECTORS)
    images = len(pool.labels)
    limit = images if selector in ("cond_only", "dgc_released") else 2 * images
    if not 1 <= n <= limit:
        raise ConfigError(
            f"calib.n: {n} is not between 1 and {limit}, the rows that {selector} can choose from"
        )
    if selector == "dgc":
        index = dgc.select_paper(block_features(adapter, pool.joint(), batch, first_token=False), n)
    elif selector == "dgc_released":
        features = block_features(adapter, pool.joint(), batch, first_token=True)
        cond, uncond = dgc.select_released(*features.split(images), n)
        index = torch.cat((torch.arange(cond), images + torch.arange(uncond)))
    elif selector == "random":
        index = (
            torch.randperm(2 * images, generator=torch.Generator().manual_seed(seed))[:n]
            .sort()
            .values
        )
    elif selector == "uniform":
        index = torch.cat((torch.arange((n + 1) // 2), images + torch.arange(n // 2)))
    else:
        index = torch.arange(n)
    conditional = index < images
    rows = {k: v[index.to(v.device)] for k, v in pool.joint().items()}
    share = conditional.double().mean().item()
    meta = {"selector": selector, "rows": n, "pool": 2 * images, "conditional_share": share}
    return CalibrationSet(rows, conditional, meta)


def digest_rows(calibration: CalibrationSet) -> str:
    """The digest of a calibration set's rows."""
    return digest_tensors(calibration.rows)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (16 hex digits) over names, types, shapes and bytes of tensors."""
    sha = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]

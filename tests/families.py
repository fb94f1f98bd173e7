"""A small model of every family on made-up weights: two blocks, random AdaLN projections, norms
with gain and bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.layers import KVCache
from models.llamagen.adapter import LlamaGenAdapter
from models.llamagen.transformer import LlamaGen
from models.mar.adapter import MARAdapter
from models.mar.transformer import MAR
from models.par.adapter import PARAdapter
from models.par.transformer import PAR
from models.rar.adapter import RARAdapter
from models.rar.transformer import RAR
from models.var.adapter import VARAdapter
from models.var.tokenizer import MultiScaleQuantizer
from models.var.transformer import VAR
from ptq.types import Adapter, CalibrationSet, Rows
from tests.reference import fill, made_up, made_up_ints

FAMILIES = ("var", "rar", "par", "mar")  # the paper's; LlamaGen's tests ask for it by name
CODES = 40
CLASSES = 10


def tiny(family: str, dtype: torch.dtype = torch.float64) -> Adapter:
    """The adapter of a small model, prepared."""
    if family == "var":
        model = fill(VAR(2, 48, 4, (1, 2, 3), CODES, 8, CLASSES))
        quantizer = fill(MultiScaleQuantizer(CODES, 8, (1, 2, 3), 4, 0.5, unit_codes=False))
        adapter = VARAdapter(model.to(dtype), quantizer.to(dtype))
    elif family == "rar":
        adapter = RARAdapter(fill(RAR(48, 2, 4, 192, 16, CODES, CLASSES)).to(dtype))
    elif family == "par":
        adapter = PARAdapter(
            fill(PAR(48, 2, 4, CODES, 36, 3, 4, CLASSES, multiple_of=32)).to(dtype)
        )
    elif family == "llamagen":
        adapter = LlamaGenAdapter(
            fill(LlamaGen(48, 2, 4, CODES, 36, CLASSES, multiple_of=32)).to(dtype)
        )
    else:
        adapter = MARAdapter(
            fill(
                MAR(
                    img_size=64,
                    vae_stride=16,
                    patch_size=1,
                    vae_embed_dim=4,
                    class_num=CLASSES,
                    buffer_size=4,
                    encoder_embed_dim=48,
                    encoder_depth=2,
                    encoder_num_heads=4,
                    decoder_embed_dim=48,
                    decoder_depth=2,
                    decoder_num_heads=4,
                    diffloss_d=2,
                    diffloss_w=32,
                )
            ).to(dtype)
        )
    adapter.model.requires_grad_(False)
    adapter.prepare()
    return adapter


def calibration(family: str, adapter: Adapter, images: int = 6) -> CalibrationSet:
    """Made-up images, both guidance branches of each."""
    lengths = {"var": 14, "rar": 16, "par": 36, "llamagen": 36}
    if family == "mar":
        tokens = made_up("tokens", (images, 16, 4)).to(adapter.model.mask_token.dtype)
    else:
        tokens = made_up_ints("tokens", (images, lengths[family]), CODES)
    labels = made_up_ints("labels", (images,), CLASSES)
    parts = adapter.rows(tokens, labels)
    rows = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    return CalibrationSet(rows, torch.arange(2 * images) < images)


@torch.no_grad()
def decoded(adapter: Adapter, rows: Rows) -> Tensor | None:
    """Logits (B, L, V) of a decoder with a KV cache that is fed the rows step by step; None for
    MAR, which has none."""
    model = adapter.model
    if isinstance(model, MAR):
        return None
    step: Callable[[Tensor, list[KVCache]], Tensor]
    if isinstance(model, VAR):
        inputs = adapter.quantizer.teacher_inputs(rows["ids"])
        start = model.start_length
        steps = model.spans
        blocks = model.blocks
        length = model.length

        def step(positions: Tensor, cache: list[KVCache]) -> Tensor:
            first = int(positions[0]) - start
            end = int(positions[-1]) + 1 - start
            return model(rows["label"], inputs[:, max(first, 0) : end], positions, cache)
    elif isinstance(model, RAR):
        blocks = model.blocks
        length = model.image_seq_len + 1
        steps = [(0, 2), *((p, p + 1) for p in range(2, length))]

        def step(positions: Tensor, cache: list[KVCache]) -> Tensor:
            return model(rows["ids"], rows["condition"], positions=positions, cache=cache)
    else:
        blocks = model.layers
        length = rows["ids"].shape[1] + model.layout.group
        steps = model.layout.steps(length)

        def step(positions: Tensor, cache: list[KVCache]) -> Tensor:
            return model(rows["ids"], rows["labels"], positions, cache)

    cache = [KVCache(length) for _ in blocks]
    every = torch.arange(length, device=next(iter(rows.values())).device)
    return torch.cat([step(every[first:end], cache) for first, end in steps], dim=1)


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((value - reference).abs().max() / reference.abs().max())


def assert_unchanged(adapter: Adapter, rows: Rows, before: Tensor, bound: float) -> None:
    """The model gives what it gave `before`, on the full sequence and decoding with a cache."""
    assert relative(adapter.forward(rows), before) < bound
    stepwise = decoded(adapter, rows)
    assert stepwise is None or relative(stepwise, before) < bound

"""The reference outputs of LTH14/mar, and the models, inputs and settings that made them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import pytest
from torch import Tensor

from models.mar.presets import PRESETS
from models.mar.transformer import MAR
from tests.reference import Golden, fill, made_up


@dataclass(frozen=True)
class Case:
    """One file of reference outputs: how its models were built, and its sampling sets by name.

    A set is (seed, iterations, guidance scale, schedule, temperature, labels or none).
    """

    file: str
    tag: str
    mar: dict
    steps: str
    sets: dict
    latents: tuple[int, ...]
    vae: dict | None = None
    image: tuple[int, ...] = ()
    tolerance: float = 2e-5

    @cached_property
    def golden(self) -> Golden:
        return Golden(self.file)

    @cached_property
    def model(self) -> MAR:
        return fill(MAR(**self.mar))

    @cached_property
    def z(self) -> Tensor:
        """The diffusion head's conditions for the stored mask."""
        return self.model(self.tokens, self.golden["mask"].bool(), self.golden["labels"])

    @property
    def tokens(self) -> Tensor:
        return self.model.patchify(made_up(f"{self.tag}:latent", self.latents))

    def made_up(self, name: str, rows: int) -> Tensor:
        return made_up(f"{self.tag}:{name}", (rows, self.model.token_embed_dim))

    def check(self, name: str, value: Tensor) -> None:
        self.golden.check(name, value, self.tolerance)


TINY_A = Case(
    "mar_tiny_a",
    "mar-tiny-a",
    dict(
        img_size=64,
        vae_stride=16,
        patch_size=1,
        encoder_embed_dim=48,
        encoder_depth=2,
        encoder_num_heads=4,
        decoder_embed_dim=64,
        decoder_depth=2,
        decoder_num_heads=4,
        vae_embed_dim=4,
        class_num=10,
        buffer_size=4,
        diffloss_d=2,
        diffloss_w=40,
    ),
    "10",
    {
        "cfg1": (5, 4, 1.0, "linear", 0.95, True),
        "cfg_linear": (6, 4, 2.9, "linear", 1.0, True),
        "cfg_const": (7, 3, 2.0, "constant", 1.0, True),
        "nolabel": (8, 4, 1.0, "linear", 1.0, False),
        "temp0": (9, 4, 2.9, "linear", 0.0, True),
    },
    (2, 4, 4, 4),
    dict(embed_dim=4, ch_mult=(1, 2, 2), ch=32, resolution=64),
    (2, 3, 32, 32),
)
TINY_B = Case(
    "mar_tiny_b_patch2",
    "mar-tiny-b",
    dict(
        img_size=128,
        vae_stride=16,
        patch_size=2,
        encoder_embed_dim=64,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=48,
        decoder_depth=3,
        decoder_num_heads=3,
        vae_embed_dim=4,
        class_num=5,
        buffer_size=3,
        diffloss_d=3,
        diffloss_w=32,
        mlp_ratio=3,
    ),
    "25",
    {"cfg1": (5, 4, 1.0, "linear", 0.95, True), "temp0": (9, 4, 2.9, "linear", 0.0, True)},
    (1, 4, 8, 8),
)
MAR_B = Case(
    "mar_b",
    "mar-b",
    dict(PRESETS["mar_b"].transformer),
    "100",
    {},
    (1, 16, 16, 16),
    dict(PRESETS["mar_b"].tokenizer),
    (1, 3, 256, 256),
    tolerance=1e-4,
)
MAR_B_10 = replace(
    MAR_B,
    file="mar_b_sample10",
    tag="mar-b-s10",
    steps="10",
    vae=None,
    sets={
        "cfg_linear": (3, 8, 2.9, "linear", 1.0, True),
        "temp0": (4, 4, 1.0, "linear", 0.0, True),
    },
)
CASES = [
    pytest.param(TINY_A, id="tiny_a"),
    pytest.param(TINY_B, id="tiny_b"),
    pytest.param(MAR_B, id="mar_b", marks=pytest.mark.slow),
    pytest.param(MAR_B_10, id="mar_b_sample10", marks=pytest.mark.slow),
]
SETS = [
    pytest.param(p.values[0], name, id=f"{p.id}-{name}", marks=p.marks)
    for p in CASES
    for name in p.values[0].sets
]

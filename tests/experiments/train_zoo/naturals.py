"""Toy sizes of the natural models, on a made-up Tiny-ImageNet of a few pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments.config.compose import CONF
from experiments.evaluate.extractors import lite0
from experiments.evaluate.extractors.base import flatten_spatial
from experiments.train_zoo import model_cards, trainers
from models import registry
from models.preset import Preset
from models.registry import PRESETS
from tests.experiments.data.pictures import official_files, write_zip

FAMILIES = ("rar", "var")
SHORT = {"steps": 3, "batch": 4, "warmup": 1}


def toy(name: str) -> Preset:
    """A natural preset of 64 pixels and 16 x 16 codes, with hardly any width."""
    preset = PRESETS[name]
    narrow = {
        "rar": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        "var": dict(depth=1, embed_dim=32, num_heads=2, vocab_size=64, z_channels=8),
    }
    coder = {
        "rar": dict(hidden_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, z_channels=8),
        "var": dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, vocab_size=64, z_channels=8),
    }
    codes = {"rar": dict(num_embeddings=64), "var": {}}
    vocabulary = {"rar": dict(codebook_size=64, intermediate_size=64), "var": dict(mlp_ratio=2.0)}
    family = preset.family
    return replace(
        preset,
        transformer={**preset.transformer, **narrow[family], **vocabulary[family]},
        tokenizer={**preset.tokenizer, **coder[family], **codes[family]},
    )


class StandIn(nn.Module):
    """An extractor with the layers of Lite0 but for their length, and no weights to fetch."""

    digest = "0123456789abcdef"
    image_size = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        colours = nn.functional.avg_pool2d(images.float() / 255, 16).flatten(1)  # (B, 48)
        logits = colours.repeat(1, 21)[:, :1000]  # (B, 1000)
        return {
            "pool": colours[:, :6],
            "logits": logits,
            "spatial": flatten_spatial(images[:, :3, ::32, ::32].float() / 255),
        }


def chosen(zoo: Path, data: Path, name: str, **changes: object) -> DictConfig:
    """The whole config of a training, shortened."""
    with initialize_config_dir(str(CONF / "train_zoo"), version_base="1.3"):
        config = compose("config", [f"model={name}", f"out={zoo}", f"data={data}"])
    OmegaConf.set_struct(config, False)
    short = {"schedule": SHORT} if "schedule" in config.model else {}
    if name.endswith("heldout"):
        short = {"n": 4}
    return OmegaConf.merge(config, {"model": short}, changes)


Train = Callable[..., None]


def natural_zoo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """A zoo of toy natural models in `folder`; returns what trains a recipe into it."""
    zoo = folder / "zoo"
    zoo.mkdir()
    (zoo / "SHA256SUMS").touch()
    data = write_zip(official_files(train=3, test=6), folder / "tiny-imagenet-200.zip")
    for family in FAMILIES:
        monkeypatch.setitem(PRESETS, f"{family}_natural", toy(f"{family}_natural"))
    monkeypatch.setattr(registry, "ZOO", zoo)
    monkeypatch.setattr(model_cards, "ZOO", zoo)
    write_cards = model_cards.write_cards
    monkeypatch.setattr(model_cards, "write_cards", lambda: write_cards(zoo / "README.md"))
    monkeypatch.setattr(lite0, "load_lite0", lambda path, device: StandIn().to(device))

    def train(name: str, **changes: object) -> None:
        trainers.train_model(chosen(zoo, data, name, **changes))

    return train

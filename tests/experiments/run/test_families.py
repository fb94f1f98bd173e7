"""Every family through a whole run: the smallest presets' code paths at toy sizes, and (slow) at
their real ones.

The weights are made up and saved under the official file names in the official wrappers, as a user
would have them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.run import cell
from models import registry
from models.preset import Preset
from ptq.spec import ConfigError
from tests.experiments.cells import config_of
from tests.official import save_official
from tests.reference import fill

# of PAR and LlamaGen, which share it
TINY_VQ = dict(
    ch_mult=(1, 2),
    ch=32,
    num_res_blocks=2,
    z_channels=32,
    codebook_size=64,
    codebook_embed_dim=8,
)
_SCALES = dict(vocab_size=64, z_channels=8, patch_nums=(1, 2, 3, 4))
TOYS: dict[str, dict[str, object]] = {  # preset: the fields that make a toy of it
    "var_d16": dict(
        transformer=dict(depth=2, embed_dim=64, num_heads=4, num_classes=10, **_SCALES),
        tokenizer=dict(ch=32, **_SCALES),
        image_size=64,
        tokens=30,
        classes=10,
    ),
    "rar_b": dict(
        transformer=dict(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            image_seq_len=16,
            codebook_size=40,
            condition_num_classes=10,
        ),
        tokenizer=dict(
            channel_mult=(1, 2),
            hidden_channels=32,
            num_res_blocks=2,
            z_channels=16,
            num_embeddings=40,
        ),
        image_size=8,
        tokens=16,
        classes=10,
    ),
    "llamagen_b_256": dict(
        transformer=dict(
            dim=64,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            block_size=36,
            num_classes=10,
            multiple_of=32,
        ),
        tokenizer=TINY_VQ,
        image_size=12,
        tokens=36,
        classes=10,
    ),
    "par_xl_4x": dict(
        transformer=dict(
            dim=64,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            block_size=36,
            spe_token_num=3,
            ar_token_num=4,
            num_classes=10,
            multiple_of=32,
        ),
        tokenizer=TINY_VQ,
        image_size=12,
        tokens=36,
        classes=10,
    ),
    "mar_b": dict(
        transformer=dict(
            img_size=64,
            vae_stride=16,
            patch_size=1,
            vae_embed_dim=4,
            class_num=10,
            buffer_size=4,
            encoder_embed_dim=48,
            encoder_depth=2,
            encoder_num_heads=4,
            decoder_embed_dim=48,
            decoder_depth=2,
            decoder_num_heads=4,
            diffloss_d=1,
            diffloss_w=32,
        ),
        tokenizer=dict(embed_dim=4, ch=32, ch_mult=(1, 2, 2)),
        image_size=16,
        tokens=16,
        classes=10,
    ),
}
FEW_STEPS = {"mar_b": ("+sampler.settings.num_iter=4", "+sampler.settings.diffusion_steps='5'")}


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path)


def saved(name: str, folder: Path) -> tuple[str, ...]:
    """Overrides that point at made-up weights of a preset."""
    generator = models.build(name)
    overrides = [f"model={name}"]
    for part, key in (("transformer", "weights"), ("tokenizer", "tokenizer_weights")):
        overrides.append(
            f"model.{key}={save_official(name, part, fill(getattr(generator, part)), folder)}"
        )
    return tuple(overrides)


def configured(name: str, folder: Path, *overrides: str) -> RunConfig:
    tiny = (
        "eval.n=4",
        "sampler.microbatch=4",
        "calib.n=4",
        "calib.batch=4",
        "device=cpu",
        f"runs={folder}/runs",
    )
    return config_of(*saved(name, folder), *tiny, *FEW_STEPS.get(name, ()), *overrides)


def toy(name: str) -> Preset:
    return replace(registry.PRESETS[name], **TOYS[name])


CASES = list(itertools.product(TOYS, ["ptq4arvg", "rtn_dynamic", "ptq4arvg_released"]))
CASES.remove(("llamagen_b_256", "ptq4arvg_released"))  # which the released code does not have


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_family_is_sampled_quantized_and_sampled_again(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, name, toy(name))
    scope = "released" if method == "ptq4arvg_released" else "paper"
    config = configured(name, tmp_path, f"method={method}", f"scope={scope}")
    result = cell.run_cell(config)
    folder = cell.prepare_run(config).folder
    assert result["cell"]["model"] == name
    parameters = load_file(folder / "quantization.safetensors")
    assert all(bool(torch.isfinite(v).all()) for v in parameters.values())
    quantized = {k.removesuffix(".weight.scale") for k in parameters if k.endswith(".weight.scale")}
    adapter = models.build(name).adapter
    kinds = set(build_recipe(config).scope.kinds)
    assert quantized == {c for s in adapter.sites if s.kind in kinds for c in s.consumers}


def test_the_released_code_has_no_llamagen() -> None:
    names = "rar, var, par, mar"
    with pytest.raises(ConfigError, match=f"family: 'llamagen' is not one of {names}"):
        config_of("model=llamagen_b_256", "method=ptq4arvg_released")
    with pytest.raises(ConfigError, match=f"family: 'llamagen' is not one of {names}"):
        config_of("model=llamagen_b_256", "method=ptq4arvg", "scope=released")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_the_smallest_preset_of_every_family_runs_at_full_size(name: str, tmp_path: Path) -> None:
    config = configured(
        name, tmp_path, "method=ptq4arvg", "quant=w6a6", "calib.n=2", "calib.batch=1"
    )
    full = cell.run_cell(cell.full_precision_config(config))
    quantized = cell.run_cell(config)
    assert full["cell"]["method"] == "fp"
    assert quantized["cell"]["method"] == "ptq4arvg"
    print(name, {k: r["cost"] for k, r in (("fp", full), ("w6a6", quantized))})

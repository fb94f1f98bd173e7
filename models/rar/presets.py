"""Sizes, files and sampling settings of the RAR presets and twins."""

from __future__ import annotations

from models.preset import Preset, Source

_TOKENIZER = dict(
    channel_mult=(1, 1, 2, 2, 4),
    hidden_channels=128,
    num_res_blocks=2,
    z_channels=256,
    num_embeddings=1024,
)
_TOKENIZER_FILE = Source("maskgit-vqgan-imagenet-f16-256.bin", "fun-research/TiTok")


def _released_preset(
    name: str,
    dim: int,
    depth: int,
    hidden: int,
    scale: float,
    power: float,
    temperature: float,
    fid: float,
) -> Preset:
    settings = dict(guidance_scale=scale, guidance_power=power, temperature=temperature)
    return Preset(
        name=name,
        family="rar",
        transformer=dict(
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=16,
            intermediate_size=hidden,
            image_seq_len=256,
            codebook_size=1024,
            condition_num_classes=1000,
        ),
        tokenizer=_TOKENIZER,
        weights=Source(f"{name}.bin", "yucornetto/RAR"),
        tokenizer_weights=_TOKENIZER_FILE,
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=256,
        tokens=256,
        licence="Apache-2.0",
        published_fid=fid,
    )


def _twin_preset(name: str) -> Preset:
    settings = dict(guidance_scale=3.0, guidance_power=1.0, temperature=1.0)
    return Preset(
        name=name,
        family="rar",
        transformer=dict(
            hidden_size=192,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=768,
            image_seq_len=64,
            codebook_size=512,
            condition_num_classes=10,
        ),
        tokenizer=dict(
            channel_mult=(1, 2, 4),
            hidden_channels=32,
            num_res_blocks=1,
            z_channels=64,
            num_embeddings=512,
        ),
        weights=Source(f"{name}/transformer.safetensors"),
        tokenizer_weights=Source("rar_tokenizer.safetensors"),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=32,
        tokens=64,
        classes=10,
        licence="trained here; data MIT",
    )


PRESETS = {
    p.name: p
    for p in (
        _released_preset("rar_b", 768, 24, 3072, 16.0, 2.75, 1.0, 1.95),
        _released_preset("rar_l", 1024, 24, 4096, 15.5, 2.5, 1.02, 1.70),
        _released_preset("rar_xl", 1280, 32, 5120, 6.9, 1.5, 1.02, 1.50),
        _released_preset("rar_xxl", 1408, 40, 6144, 8.0, 1.2, 1.02, 1.48),
        _twin_preset("rar_twin"),
        _twin_preset("rar_twin_plain"),
    )
}

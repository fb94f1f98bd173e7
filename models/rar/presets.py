"""Sizes, files and sampling settings of the RAR presets and twins."""

from __future__ import annotations

from models.preset import NATURAL_HUB, Preset, Source, by_name

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
    *,
    hidden_size: int,
    layers: int,
    intermediate_size: int,
    guidance_scale: float,
    guidance_power: float,
    temperature: float,
    published_fid: float,
) -> Preset:
    """A released model."""
    settings = dict(
        guidance_scale=guidance_scale, guidance_power=guidance_power, temperature=temperature
    )
    return Preset(
        name=name,
        family="rar",
        transformer=dict(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=16,
            intermediate_size=intermediate_size,
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
        published_fid=published_fid,
    )


def _twin_preset(name: str) -> Preset:
    """A small model of the same architecture, trained here."""
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
        dataset="fashion_mnist",
    )


def _natural_preset() -> Preset:
    """A larger model for 64-pixel natural images in 256 tokens, with the released models' sequence.

    Trained here; its weights do not ship.
    """
    settings = dict(guidance_scale=3.0, guidance_power=1.0, temperature=1.0)
    return Preset(
        name="rar_natural",
        family="rar",
        transformer=dict(
            hidden_size=384,
            num_hidden_layers=8,
            num_attention_heads=6,
            intermediate_size=1536,
            image_seq_len=256,
            codebook_size=1024,
            condition_num_classes=200,
        ),
        tokenizer=dict(
            channel_mult=(1, 1, 2),
            hidden_channels=64,
            num_res_blocks=2,
            z_channels=64,
            num_embeddings=1024,
        ),
        weights=Source("rar_natural/transformer.safetensors", mirror=NATURAL_HUB),
        tokenizer_weights=Source("rar_natural_tokenizer.safetensors", mirror=NATURAL_HUB),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=64,
        tokens=256,
        classes=200,
        licence="trained here; data under ImageNet's terms",
        dataset="tiny_imagenet",
        heldout="rar_natural_heldout",
    )


PRESETS = by_name(
    _released_preset(
        "rar_b",
        hidden_size=768,
        layers=24,
        intermediate_size=3072,
        guidance_scale=16.0,
        guidance_power=2.75,
        temperature=1.0,
        published_fid=1.95,
    ),
    _released_preset(
        "rar_l",
        hidden_size=1024,
        layers=24,
        intermediate_size=4096,
        guidance_scale=15.5,
        guidance_power=2.5,
        temperature=1.02,
        published_fid=1.70,
    ),
    _released_preset(
        "rar_xl",
        hidden_size=1280,
        layers=32,
        intermediate_size=5120,
        guidance_scale=6.9,
        guidance_power=1.5,
        temperature=1.02,
        published_fid=1.50,
    ),
    _released_preset(
        "rar_xxl",
        hidden_size=1408,
        layers=40,
        intermediate_size=6144,
        guidance_scale=8.0,
        guidance_power=1.2,
        temperature=1.02,
        published_fid=1.48,
    ),
    _twin_preset("rar_twin"),
    _twin_preset("rar_twin_plain"),
    _natural_preset(),
)

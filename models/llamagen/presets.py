"""Sizes, files and sampling settings of the class-conditional LlamaGen presets.

Sizes are those of `gpt.py` in FoundationVision/LlamaGen, figures and files those of its README,
guidance scales those of its GETTING_STARTED.md (which has none for 256 pixels: those of the same
sizes at 384), and the rest the defaults of `sample_c2i_ddp.py`.
"""

from __future__ import annotations

from models.preset import Preset, Source, by_name

_REPOSITORY = "FoundationVision/LlamaGen"
_TOKENIZER = dict(  # VQ-16, which PAR uses too
    ch_mult=(1, 1, 2, 2, 4),
    ch=128,
    num_res_blocks=2,
    z_channels=256,
    codebook_size=16384,
    codebook_embed_dim=8,
)
_PIXELS = 16  # a side of what one token stands for
_NOTES = dict(
    evaluation="the published figures are of images resized from 384 to 256 pixels: "
    "decode(tokens, size=256)",
)


def _released_preset(
    size: str,
    pixels: int,
    *,
    dim: int,
    layers: int,
    heads: int,
    cfg_scale: float,
    published_fid: float,
) -> Preset:
    """A released model of a size (`B`) for images of so many pixels a side."""
    settings = dict(cfg_scale=cfg_scale, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)
    tokens = (pixels // _PIXELS) ** 2
    is_resized = pixels != 256
    return Preset(
        name=f"llamagen_{size.lower()}_{pixels}",
        family="llamagen",
        transformer=dict(
            dim=dim,
            n_layer=layers,
            n_head=heads,
            vocab_size=16384,
            block_size=tokens,
            num_classes=1000,
        ),
        tokenizer=_TOKENIZER,
        # their loader passes over rotations that a file may hold
        weights=Source(f"c2i_{size}_{pixels}.pt", _REPOSITORY, ignore=("freqs_cis",)),
        tokenizer_weights=Source("vq_ds16_c2i.pt", _REPOSITORY),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=pixels,
        eval_size=256 if is_resized else None,
        tokens=tokens,
        dtype="bf16",
        licence="MIT",
        published_fid=published_fid,
        notes=_NOTES if is_resized else {},
    )


_B = dict(dim=768, layers=12, heads=12, cfg_scale=2.0)
_L = dict(dim=1024, layers=24, heads=16, cfg_scale=2.0)
_XL = dict(dim=1280, layers=36, heads=20, cfg_scale=1.75)
_XXL = dict(dim=1536, layers=48, heads=24, cfg_scale=1.75)
_3B = dict(dim=3200, layers=24, heads=32, cfg_scale=1.65)

PRESETS = by_name(
    _released_preset("B", 256, **_B, published_fid=5.46),
    _released_preset("B", 384, **_B, published_fid=6.09),
    _released_preset("L", 256, **_L, published_fid=3.80),
    _released_preset("L", 384, **_L, published_fid=3.07),
    _released_preset("XL", 384, **_XL, published_fid=2.62),
    _released_preset("XXL", 384, **_XXL, published_fid=2.34),
    _released_preset("3B", 384, **_3B, published_fid=2.18),
)

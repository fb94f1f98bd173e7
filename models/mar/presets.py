"""Sizes, files and sampling settings of the MAR presets and twins.

The authors' files all bear the same name, so the larger models keep the folder of the authors'
download script. Of each file the entry `model_ema` is the published model; `model`, beside it,
holds the weights before averaging. The hub has MAR-B and the tokenizer in an early revision of a
mirror. Its later safetensors files hold `model`: they fit, and sample worse (`models/README.md`),
so nothing here points at them.
"""

from __future__ import annotations

from models.preset import Preset, Source, by_name

_TOKENIZER = dict(embed_dim=16, ch_mult=(1, 1, 2, 2, 4))
_HUB = dict(repo="jadechoghari/mar", revision="773c9bdcd98740c7b876ce0d66f684a0e2468990")
_TOKENIZER_FILE = Source(
    "kl16.ckpt",
    **_HUB,
    sha256="34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f",
    ignore=("loss.",),
)
_FILE_B = Source(
    "checkpoint-last.pth",
    **_HUB,
    sha256="7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c",
)
_ELSEWHERE = "util/download.py of github.com/LTH14/mar downloads it"
_FILE_L = Source("mar_large/checkpoint-last.pth", elsewhere=_ELSEWHERE)
_FILE_H = Source("mar_huge/checkpoint-last.pth", elsewhere=_ELSEWHERE)

TWIN_LATENT_CHANNELS = 4


def _released_preset(
    name: str,
    *,
    weights: Source,
    dim: int,
    depth: int,
    heads: int,
    diffloss_depth: int,
    diffloss_width: int,
    cfg: float,
    published_fid: float,
) -> Preset:
    """A released model, whose encoder and decoder are of one size."""
    settings = dict(cfg=cfg, cfg_schedule="linear", temperature=1.0, diffusion_steps="100")
    return Preset(
        name=name,
        family="mar",
        transformer=dict(
            img_size=256,
            vae_stride=16,
            patch_size=1,
            vae_embed_dim=16,
            class_num=1000,
            buffer_size=64,
            encoder_embed_dim=dim,
            encoder_depth=depth,
            encoder_num_heads=heads,
            decoder_embed_dim=dim,
            decoder_depth=depth,
            decoder_num_heads=heads,
            diffloss_d=diffloss_depth,
            diffloss_w=diffloss_width,
        ),
        tokenizer=_TOKENIZER,
        weights=weights,
        tokenizer_weights=_TOKENIZER_FILE,
        samplers={
            "official": dict(num_iter=256, **settings),
            "ptq4arvg": dict(num_iter=64, **settings),
        },
        image_size=256,
        tokens=256,
        licence="MIT",
        published_fid=published_fid,
    )


def _twin_preset(name: str) -> Preset:
    """A small model of the same architecture, trained here."""
    # "25" would start at step 999, where the cosine schedule multiplies the small head's error by
    # 1,300, and samples diverge; "ddim25", the multiples of 40, starts at 960, where it is 1.5
    settings = dict(
        num_iter=16, cfg=4.0, cfg_schedule="linear", temperature=1.0, diffusion_steps="ddim25"
    )
    return Preset(
        name=name,
        family="mar",
        transformer=dict(
            img_size=32,
            vae_stride=4,
            patch_size=1,
            vae_embed_dim=TWIN_LATENT_CHANNELS,
            class_num=10,
            buffer_size=8,
            encoder_embed_dim=192,
            encoder_depth=3,
            encoder_num_heads=6,
            decoder_embed_dim=192,
            decoder_depth=3,
            decoder_num_heads=6,
            diffloss_d=3,
            diffloss_w=256,
        ),
        # its latents have unit variance, see `experiments.train_zoo.tasks.mar.KLTask.finish`
        tokenizer=dict(
            embed_dim=TWIN_LATENT_CHANNELS,
            ch=32,
            ch_mult=(1, 1, 1),
            resolution=32,
            attn_resolutions=(),
            scale=1.0,
        ),
        weights=Source(f"{name}/transformer.safetensors"),
        tokenizer_weights=Source("mar_tokenizer.safetensors"),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=32,
        tokens=64,
        classes=10,
        licence="trained here; data MIT",
        dataset="fashion_mnist",
    )


PRESETS = by_name(
    _released_preset(
        "mar_b",
        weights=_FILE_B,
        dim=768,
        depth=12,
        heads=12,
        diffloss_depth=6,
        diffloss_width=1024,
        cfg=2.9,
        published_fid=2.31,
    ),
    _released_preset(
        "mar_l",
        weights=_FILE_L,
        dim=1024,
        depth=16,
        heads=16,
        diffloss_depth=8,
        diffloss_width=1280,
        cfg=3.0,
        published_fid=1.78,
    ),
    _released_preset(
        "mar_h",
        weights=_FILE_H,
        dim=1280,
        depth=20,
        heads=16,
        diffloss_depth=12,
        diffloss_width=1536,
        cfg=3.2,
        published_fid=1.55,
    ),
    _twin_preset("mar_twin"),
    _twin_preset("mar_twin_plain"),
)

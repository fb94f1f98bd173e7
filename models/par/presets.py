"""Sizes, files and sampling settings of the PAR presets and twins.

The settings are those of the sampling commands in the PAR README and the defaults of
`sample_c2i_ddp.py`; PTQ4ARVG uses the same. The README calls the XXL file PAR-1B-4x.pt in its
command and PAR-XXL-4x.pt in its table and on the hub.
"""

from __future__ import annotations

from models.preset import Preset, Source, by_name

_TOKENIZER = dict(
    ch_mult=(1, 1, 2, 2, 4),
    ch=128,
    num_res_blocks=2,
    z_channels=256,
    codebook_size=16384,
    codebook_embed_dim=8,
)
_TOKENIZER_FILE = Source("vq_ds16_c2i.pt", "FoundationVision/LlamaGen")
_NOTES = dict(
    evaluation="the published figures are of images resized from 384 to 256 pixels: "
    "decode(tokens, size=256)",
)


def _released_preset(
    name: str,
    *,
    file: str,
    dim: int,
    layers: int,
    heads: int,
    parallel: int,
    cfg_scale: float,
    published_fid: float,
) -> Preset:
    """A released model that predicts `parallel` tokens at once, one per image region."""
    settings = dict(cfg_scale=cfg_scale, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)
    return Preset(
        name=name,
        family="par",
        transformer=dict(
            dim=dim,
            n_layer=layers,
            n_head=heads,
            vocab_size=16384,
            block_size=576,
            spe_token_num=parallel - 1,
            ar_token_num=parallel,
            num_classes=1000,
        ),
        tokenizer=_TOKENIZER,
        weights=Source(file, "Epiphqny/PAR"),
        tokenizer_weights=_TOKENIZER_FILE,
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=384,
        eval_size=256,
        tokens=576,
        dtype="bf16",
        licence="none stated; tokenizer MIT",
        published_fid=published_fid,
        notes=_NOTES,
    )


def _twin_preset(name: str) -> Preset:
    """A small model of the same architecture, trained here."""
    settings = dict(cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0)
    return Preset(
        name=name,
        family="par",
        transformer=dict(
            dim=192,
            n_layer=6,
            n_head=4,
            vocab_size=512,
            block_size=64,
            spe_token_num=3,
            ar_token_num=4,
            num_classes=10,
            multiple_of=32,
        ),
        tokenizer=dict(
            ch_mult=(1, 1, 1),
            ch=32,
            num_res_blocks=2,
            z_channels=32,
            codebook_size=512,
            codebook_embed_dim=8,
        ),
        weights=Source(f"{name}/transformer.safetensors"),
        tokenizer_weights=Source("par_tokenizer.safetensors"),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=32,
        tokens=64,
        classes=10,
        licence="trained here; data MIT",
        dataset="fashion_mnist",
    )


PRESETS = by_name(
    _released_preset(
        "par_xl_4x",
        file="PAR-XL-4x.pt",
        dim=1280,
        layers=36,
        heads=20,
        parallel=4,
        cfg_scale=1.5,
        published_fid=2.61,
    ),
    _released_preset(
        "par_xxl_4x",
        file="PAR-XXL-4x.pt",
        dim=1536,
        layers=48,
        heads=24,
        parallel=4,
        cfg_scale=1.435,
        published_fid=2.35,
    ),
    _released_preset(
        "par_3b_4x",
        file="PAR-3B-4x.pt",
        dim=3200,
        layers=24,
        heads=32,
        parallel=4,
        cfg_scale=1.345,
        published_fid=2.29,
    ),
    _released_preset(
        "par_3b_16x",
        file="PAR-3B-16x.pt",
        dim=3200,
        layers=24,
        heads=32,
        parallel=16,
        cfg_scale=1.5,
        published_fid=2.88,
    ),
    _twin_preset("par_twin"),
    _twin_preset("par_twin_plain"),
)

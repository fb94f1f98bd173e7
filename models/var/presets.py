"""Sizes, files and sampling settings of the VAR presets and twins.

Both samplers of the released models are the setting of the authors' FID evaluation, which PTQ4ARVG
took over. PTQ4ARVG restarts one random generator for every batch; here every image has random
numbers of its own.
"""

from __future__ import annotations

from models.preset import NATURAL_HUB, Preset, Source, by_name

# sides of the token maps, coarse to fine
PATCHES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCHES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PATCHES_TWIN = (1, 2, 3, 4, 6, 8)

_HUB = dict(repo="FoundationVision/var", revision="6d0ee6598a42f75079aa79e58b012b57b284c91b")
_SHA256 = {"var_d16": "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb"}
_TOKENIZER_FILE = Source(
    "vae_ch160v4096z32.pth",
    **_HUB,
    sha256="7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
)


def count_tokens(patch_nums: tuple[int, ...]) -> int:
    """Tokens of an image: those of its square maps, whose sides these are."""
    return sum(side * side for side in patch_nums)


def _released_preset(
    name: str,
    *,
    depth: int,
    published_fid: float,
    patch_nums: tuple[int, ...] = PATCHES_256,
    shared_aln: bool = False,
) -> Preset:
    """A released model, whose width and heads follow from its depth."""
    settings = dict(cfg=1.5, top_k=900, top_p=0.96, more_smooth=False)
    return Preset(
        name=name,
        family="var",
        transformer=dict(
            depth=depth,
            embed_dim=64 * depth,
            num_heads=depth,
            patch_nums=patch_nums,
            vocab_size=4096,
            z_channels=32,
            num_classes=1000,
            shared_aln=shared_aln,
        ),
        tokenizer=dict(vocab_size=4096, z_channels=32, ch=160, patch_nums=patch_nums),
        weights=Source(f"{name}.pth", **_HUB, sha256=_SHA256.get(name)),
        tokenizer_weights=_TOKENIZER_FILE,
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=16 * patch_nums[-1],
        tokens=count_tokens(patch_nums),
        dtype="fp16",
        licence="MIT",
        published_fid=published_fid,
    )


def _twin_preset(name: str) -> Preset:
    """A small model of the same architecture, trained here."""
    patch_nums = PATCHES_TWIN
    settings = dict(cfg=1.5, top_k=0, top_p=0.96, more_smooth=False)
    return Preset(
        name=name,
        family="var",
        transformer=dict(
            depth=6,
            embed_dim=160,
            num_heads=5,
            patch_nums=patch_nums,
            vocab_size=512,
            z_channels=16,
            num_classes=10,
        ),
        tokenizer=dict(
            vocab_size=512, z_channels=16, ch=32, patch_nums=patch_nums, ch_mult=(1, 1, 1)
        ),
        weights=Source(f"{name}/transformer.safetensors"),
        tokenizer_weights=Source("var_tokenizer.safetensors"),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=4 * patch_nums[-1],
        tokens=count_tokens(patch_nums),
        classes=10,
        licence="trained here; data MIT",
        dataset="fashion_mnist",
    )


def _natural_preset() -> Preset:
    """A larger model for 64-pixel natural images, with the scales of the released models.

    Trained here; its weights do not ship.
    """
    patch_nums = PATCHES_256
    # guidance as strong as rar_natural's: at 1.5 fewer than half as many samples are of their class
    settings = dict(cfg=3.0, top_k=0, top_p=0.96, more_smooth=False)
    return Preset(
        name="var_natural",
        family="var",
        transformer=dict(
            depth=8,
            embed_dim=384,
            num_heads=6,
            patch_nums=patch_nums,
            vocab_size=1024,
            z_channels=32,
            num_classes=200,
        ),
        tokenizer=dict(
            vocab_size=1024, z_channels=32, ch=64, patch_nums=patch_nums, ch_mult=(1, 1, 2)
        ),
        weights=Source("var_natural/transformer.safetensors", mirror=NATURAL_HUB),
        tokenizer_weights=Source("var_natural_tokenizer.safetensors", mirror=NATURAL_HUB),
        samplers={"official": settings, "ptq4arvg": settings},
        image_size=4 * patch_nums[-1],
        tokens=count_tokens(patch_nums),
        classes=200,
        licence="trained here; data under ImageNet's terms",
        dataset="tiny_imagenet",
        heldout="var_natural_heldout",
    )


PRESETS = by_name(
    _released_preset("var_d16", depth=16, published_fid=3.55),
    _released_preset("var_d20", depth=20, published_fid=2.95),
    _released_preset("var_d24", depth=24, published_fid=2.33),
    _released_preset("var_d30", depth=30, published_fid=1.97),
    _released_preset(
        "var_d36",
        depth=36,
        published_fid=2.63,
        patch_nums=PATCHES_512,
        shared_aln=True,
    ),
    _twin_preset("var_twin"),
    _twin_preset("var_twin_plain"),
    _natural_preset(),
)

"""The one door: names, protocols, where weights come from, and that every preset builds and is
described in full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from models import registry
from models.preset import Source, by_name
from models.weights import checkpoints, conversions, digests
from models.weights.checkpoints import CheckpointError
from tests.reference import fill, released_keys

KEYS = {  # reference keys by file name
    "vae_ch160v4096z32.pth": "var-vae_ch160v4096z32",
    "vq_ds16_c2i.pt": "par-vq_ds16_c2i",
    "kl16.ckpt": "mar-kl16",
    "maskgit-vqgan-imagenet-f16-256.bin": "rar-maskgit-vqgan-imagenet-f16-256",
}
RELEASED = [name for name, preset in models.PRESETS.items() if not preset.weights.shipped]
# controls whose figures alone are recorded, and MAR's twins, which are not good enough yet
UNSHIPPED = {
    *("var_twin_plain", "par_twin_plain", "mar_twin_plain"),
    *("rar_natural", "var_natural"),
}
BUFFERS = {"lvl_1L": torch.int64}  # every other tensor is float32

pytestmark = pytest.mark.usefixtures("offline")


def test_presets_of_a_family_have_names_of_their_own() -> None:
    preset = models.PRESETS["rar_twin"]
    other = models.PRESETS["rar_b"]
    assert by_name(preset, other) == {"rar_twin": preset, "rar_b": other}
    with pytest.raises(ValueError, match="models/rar/presets.py: rar_twin is there twice"):
        by_name(preset, other, preset)


def reference_name(name: str) -> str:
    """`par_3b_4x` -> `par-3B-4x`: names of the key files keep the authors' capitals."""
    family, *rest = name.split("_")
    if family == "llamagen":
        size, pixels = rest
        return f"llamagen-{size.upper()}_{pixels}"
    return "-".join(
        [
            family,
            *(
                part.upper() if family == "par" and part != "4x" and part != "16x" else part
                for part in rest
            ),
        ]
    )


def test_the_released_presets_are_all_there() -> None:
    assert [*RELEASED] == [
        "var_d16",
        "var_d20",
        "var_d24",
        "var_d30",
        "var_d36",
        "rar_b",
        "rar_l",
        "rar_xl",
        "rar_xxl",
        "par_xl_4x",
        "par_xxl_4x",
        "par_3b_4x",
        "par_3b_16x",
        "mar_b",
        "mar_l",
        "mar_h",
        "llamagen_b_256",
        "llamagen_b_384",
        "llamagen_l_256",
        "llamagen_l_384",
        "llamagen_xl_384",
        "llamagen_xxl_384",
        "llamagen_3b_384",
    ]


@pytest.mark.parametrize("name", RELEASED)
def test_state_dicts_equal_the_released_ones_in_keys_shapes_and_dtypes(name: str) -> None:
    model = registry.build_outline(name)
    files = {
        "transformer": reference_name(name),
        "tokenizer": KEYS[model.preset.tokenizer_weights.file],
    }
    for part, file in files.items():
        state = getattr(model, part).state_dict()
        assert {k: list(v.shape) for k, v in state.items()} == released_keys(file)
        assert {k: v.dtype for k, v in state.items()} == {
            k: BUFFERS.get(k, torch.float32) for k in state
        }


@pytest.mark.parametrize("name", models.PRESETS)
def test_presets_are_complete(name: str) -> None:
    preset = models.PRESETS[name]
    assert preset.name == name
    assert preset.family in registry.FAMILIES
    assert set(preset.samplers) == {"official", "ptq4arvg"}
    assert preset.licence
    for source in (preset.weights, preset.tokenizer_weights):
        assert source.shipped or source.repo or source.elsewhere
        assert source.sha256 is None or len(source.sha256) == 64
        assert source.revision == "main" or len(source.revision) == 40
    if name in RELEASED:
        assert preset.published_fid is not None
    else:
        assert (registry.ZOO / preset.weights.file).is_file() or name in UNSHIPPED
        assert (registry.ZOO / preset.tokenizer_weights.file).is_file() or name in UNSHIPPED


@pytest.mark.parametrize("name", models.PRESETS)
def test_a_generator_is_of_one_kind(name: str) -> None:
    model = registry.build_outline(name)
    assert isinstance(
        model, models.LatentGenerator if name.startswith("mar") else models.TokenGenerator
    )
    assert not isinstance(
        model, models.TokenGenerator if name.startswith("mar") else models.LatentGenerator
    )
    assert model.adapter.sites


def test_unknown_names() -> None:
    with pytest.raises(CheckpointError, match=r"^model: 'var_16' is not one of var_d16, .*, mar_h"):
        models.load("var_16")
    with pytest.raises(CheckpointError, match=r"'RAR-B' is not one of .*; did you mean rar_b\?$"):
        registry.find_preset("RAR-B")


def twin_state() -> dict[str, Tensor]:
    return {
        k: v.clone() for k, v in fill(models.build("rar_twin").transformer).state_dict().items()
    }


def test_an_explicit_path_comes_first_then_the_zoo(tmp_path: Path) -> None:
    shipped = models.load("rar_twin")
    save_file(twin_state(), tmp_path / "mine.safetensors")
    mine = models.load("rar_twin", weights=tmp_path / "mine.safetensors")
    assert digests.module_digest(mine.transformer) != digests.module_digest(shipped.transformer)
    assert digests.module_digest(mine.tokenizer) == digests.module_digest(shipped.tokenizer)
    assert not any(p.requires_grad for p in mine.transformer.parameters())
    assert {p.dtype for p in mine.transformer.parameters()} == {torch.float32}
    assert not mine.transformer.training


@pytest.mark.parametrize("name", ["rar_twin", "var_twin", "par_twin", "mar_twin"])
def test_loading_draws_no_weights_and_gives_the_same_model(name: str) -> None:
    before = torch.get_rng_state()
    loaded = models.load(name)
    assert torch.equal(torch.get_rng_state(), before)
    built = models.build(name)
    for part in models.registry.PARTS:
        module = getattr(built, part)
        module.load_state_dict(registry.state_of(registry.source_of(name, part), None, part))
        buffers = dict(getattr(loaded, part).named_buffers())  # those of no file, too
        assert all(torch.equal(buffers.pop(key), value) for key, value in module.named_buffers())
        assert not buffers
        assert digests.module_digest(getattr(loaded, part)) == digests.module_digest(module)


def test_a_pickle_is_converted_once_and_loads_the_same(tmp_path: Path) -> None:
    state = twin_state()
    torch.save({"model": {k: v.half() for k, v in state.items()}, "steps": 1}, tmp_path / "mine.pt")
    first = models.load("rar_twin", weights=tmp_path / "mine.pt")
    twins = list(conversions.list_conversions(digests.file_digest(tmp_path / "mine.pt")))
    assert len(twins) == 1
    assert digests.module_digest(first.transformer) == digests.module_digest(
        models.load("rar_twin", weights=twins[0]).transformer
    )


def test_the_cache_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    source = Source("a.pth", "someone/tiny", sha256=digests.file_digest(tmp_path / "a.pth"))
    monkeypatch.setattr(registry.hub, "fetch_file", lambda source: pytest.fail("asked the hub"))
    kept = conversions.convert_file(tmp_path / "a.pth")
    assert registry.locate_weights(source) == kept
    assert registry.known_places(source)["cache"] == kept


def test_a_file_of_another_model_is_recognised(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = models.build("rar_l").transformer.state_dict()
    # one number stands for a whole tensor, so that the file stays small
    torch.save(
        {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}, tmp_path / "rar_b.bin"
    )
    fitting = checkpoints.read_checkpoint(tmp_path / "rar_b.bin")
    with pytest.raises(CheckpointError) as caught:
        registry.require_fit(registry.build_outline("rar_b").transformer, fitting, "rar_b.bin")
    text = str(caught.value)
    assert text.startswith(
        "weights: rar_b.bin does not fit RAR: 440 misshapen keys (cls_token (1, 1, 1024) instead of"
    )
    assert text.endswith("; they fit the transformer of rar_l")
    assert "\n" not in text


def test_swapped_files_are_recognised() -> None:
    tokenizer = registry.ZOO / models.PRESETS["rar_twin"].tokenizer_weights.file
    with pytest.raises(
        CheckpointError, match=r"99 missing keys .* they fit the tokenizer of rar_twin"
    ):
        models.load("rar_twin", weights=tokenizer)


def test_extra_keys_are_dropped_by_the_presets_rule_only(tmp_path: Path) -> None:
    torch.save(
        {"model": {"a": torch.ones(1), "loss.logvar": torch.ones(1)}}, tmp_path / "kl16.ckpt"
    )
    rule = models.PRESETS["mar_b"].tokenizer_weights
    assert rule.ignore == ("loss.",)
    assert set(registry.state_of(rule, tmp_path / "kl16.ckpt")) == {"a"}
    assert set(registry.state_of(models.PRESETS["mar_b"].weights, tmp_path / "kl16.ckpt")) == {
        "a",
        "loss.logvar",
    }


def test_without_a_trained_file_the_message_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ZOO", tmp_path)
    for name in ("rar_twin_plain", "var_twin"):
        with pytest.raises(CheckpointError) as caught:
            models.load(name)
        assert str(caught.value) == (
            f"weights: models/zoo/{name}/transformer.safetensors is not here; "
            f"python -m experiments.train_zoo model={name} makes it, or "
            f"give its path: {registry.PARTS['transformer']}"
        )
    tokenizer = models.PRESETS["var_twin"].tokenizer_weights
    assert tokenizer.recipe == "var_tokenizer"
    with pytest.raises(CheckpointError, match=r"model=var_tokenizer makes it"):
        registry.locate_weights(tokenizer, None, "tokenizer")


@pytest.mark.parametrize("name", RELEASED)
def test_without_weights_the_message_says_what_is_needed(name: str) -> None:
    for part, source in (
        ("transformer", models.PRESETS[name].weights),
        ("tokenizer", models.PRESETS[name].tokenizer_weights),
    ):
        with pytest.raises(CheckpointError) as caught:
            registry.locate_weights(source, None, part)
        text = str(caught.value)
        assert "\n" not in text
        assert source.file in text
        assert source.repo is None or f"{source.repo} at revision {source.revision}" in text
        assert text.endswith(f"give its path: {registry.PARTS[part]}")

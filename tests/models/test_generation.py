"""`generate`: pictures or a tensor, the same whatever else is asked for; outlines have a tokenizer
alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from models.registry import Generator
from models.settings import require_setting

# seconds are for the other tests
SHORT = {"mar": {"num_iter": 2, "diffusion_steps": "2"}}


@pytest.fixture(scope="module")
def rar() -> Generator:
    return models.load("rar_twin")


@pytest.mark.parametrize("family", ["var", "rar", "par", "mar"])
def test_pictures_are_those_of_the_tokens(family: str) -> None:
    model = models.load(f"{family}_twin")
    settings = SHORT.get(family, {})
    images = model.generate(labels=[7], seed=1, output="tensor", **settings)
    chosen = {**model.preset.samplers["official"], **settings}
    tokens = model.sample(torch.tensor([7]), 1, torch.arange(1), chosen)
    assert torch.equal(images, model.decode(tokens).clamp(0, 1))

    fresh = models.outline(f"{family}_twin", tokenizer=True)
    assert torch.equal(fresh.decode(tokens), model.decode(tokens))
    assert next(fresh.transformer.parameters()).is_meta


def test_pil_rounds_what_the_tensor_holds(rar: Generator) -> None:
    images = rar.generate(labels=torch.tensor([3]), output="tensor")  # (1, 3, S, S)
    (picture,) = rar.generate(labels=[3])
    assert picture.size == (32, 32)
    pixels = torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1)
    assert torch.equal(pixels, (images[0] * 255).round().long())


def test_an_image_depends_on_its_place_not_on_its_batch(rar: Generator) -> None:
    seen: list[int] = []

    def record(batches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.extend(len(batch) for batch in batches)
        return batches

    together = rar.generate(labels=[3, 7, 3], output="tensor")
    apart = rar.generate(labels=[3, 7, 3], output="tensor", batch=2, progress=record)
    assert seen == [2, 1]
    torch.testing.assert_close(together, apart)
    assert not torch.equal(together[0], together[2])  # one class, two pictures


REFUSED = {
    "labels: 10 is not a class from 0 to 9": {"labels": [3, 10]},
    "labels: 0.5 is not a class": {"labels": [0.5]},
    r"labels: \[\] asks for no image": {"labels": []},
    "labels: 'cat' is no list of classes from 0 to 9": {"labels": "cat"},
    r"labels: \[3, None\] is no list of classes": {"labels": [3, None]},
    "sampler: 'mine' is not one of official": {"sampler": "mine"},
    "output: 'png' is not one of pil, tensor": {"output": "png"},
    "batch: 0 is not a positive": {"batch": 0},
    "seed: -3 is negative": {"seed": -3},
    "setting: 'cfg' is not one of guidance_scale": {"cfg": 2},
    "temperature: -1 is not a number from 1e-06 to 1000": {"temperature": -1},
    "temperature: nan is not a number": {"temperature": float("nan")},
    "temperature: True is not a number": {"temperature": True},
    "guidance_scale: '3' is not a number from 0 to 1000": {"guidance_scale": "3"},
    "setting: 'temperatur' is not one of .*; did you mean temperature?": {"temperatur": 1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_said_in_one_line(rar: Generator, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        rar.generate(**{"labels": [3], **REFUSED[message]})


def test_an_outline_that_was_not_filled_is_named() -> None:
    empty = models.outline("rar_twin", tokenizer=True)
    with pytest.raises(ValueError, match=r"^model: its transformer has no weights, ptq.load"):
        empty.generate(labels=[3])


def test_a_model_without_tokenizer_is_named(rar: Generator) -> None:
    tokens_only = models.outline("rar_twin")
    tokens_only.transformer = rar.transformer
    with pytest.raises(ValueError, match="^model: its tokenizer has no weights, models.outline"):
        tokens_only.generate(labels=[3])


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("var", {"top_k": -1}, "top_k: -1 is not an integer from 0 to"),
        ("var", {"more_smooth": 1}, "more_smooth: 1 is neither true nor false"),
        ("par", {"top_p": 1.5}, "top_p: 1.5 is not a number from 0 to 1"),
        ("par", {"cfg_interval": 0.5}, "cfg_interval: 0.5 is not an integer from -1 to"),
        ("mar", {"cfg_schedule": "cosine"}, "cfg_schedule: 'cosine' is not one of linear, const"),
        ("mar", {"num_iter": 0}, "num_iter: 0 is not an integer from 1 to 10000"),
        ("mar", {"diffusion_steps": "many"}, "diffusion_steps: 'many' is not a count of steps"),
    ],
)
def test_settings_of_every_family_have_bounds(
    family: str, settings: dict[str, object], message: str
) -> None:
    preset = models.PRESETS[f"{family}_twin"]
    for name, value in settings.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            require_setting(name, value, preset)


def test_every_setting_of_every_sampler_is_allowed() -> None:
    for preset in models.PRESETS.values():
        for settings in preset.samplers.values():
            for name, value in settings.items():
                require_setting(name, value, preset)


def test_a_misspelt_model_is_told_the_nearest() -> None:
    with pytest.raises(models.CheckpointError, match=r"did you mean rar_twin\?$"):
        models.load("rar_twim")

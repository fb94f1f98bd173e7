"""`generate`: pictures or a tensor, the same whatever else is asked for; outlines have a tokenizer
alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from models.registry import Generator

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

"""Counter-based random numbers: the published Philox vectors, the distributions, and image i on its
own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.decoding.philox import categorical, normal, philox, uniform

KNOWN = {  # Random123's kat_vectors for philox4x32-10: counter and key to output
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
    ): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
    ): "408f276d 41c83b0e a20bc7c6 6d5451fd",
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
    ): "d16cfe09 94fdcceb 5001e420 24126ea1",
}
INDEX = torch.tensor([0, 1, 5, 49_999, 2**32, 2**40 + 7])


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter_key", KNOWN)
def test_philox_gives_the_published_words(counter_key: tuple[str, str]) -> None:
    counter = tuple(torch.tensor([word]) for word in words(counter_key[0]))
    key = words(counter_key[1])
    assert [int(word) for word in philox(counter, (key[0], key[1]))] == words(KNOWN[counter_key])


def draws(seed: int, index: Tensor, step: int, n: int) -> tuple[Tensor, Tensor]:
    return uniform(seed, index, step, n), normal(seed, index, step, n)


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_an_images_numbers_do_not_depend_on_the_batch_it_is_in(n: int) -> None:
    for alone, together in zip(
        zip(*(draws(7, INDEX[i : i + 1], 3, n) for i in range(6))), draws(7, INDEX, 3, n)
    ):
        assert together.shape == (6, n)
        assert torch.equal(torch.cat(alone), together)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for shuffled, together in zip(draws(7, INDEX[order], 3, n), draws(7, INDEX, 3, n)):
        assert torch.equal(shuffled, together[order])


def test_asking_for_more_numbers_keeps_the_first_ones() -> None:
    for few, many in zip(draws(7, INDEX, 3, 5), draws(7, INDEX, 3, 64)):
        assert torch.equal(few, many[:, :5])


def test_seed_image_step_and_draw_all_matter() -> None:
    numbers = [
        uniform(s, INDEX, t, 8) for s in (0, 1, 2**32, 2**32 + 1, 2**63 - 1) for t in (0, 1, 255)
    ]
    assert len(torch.stack(numbers).unique()) == len(numbers) * 6 * 8


def test_uniform_numbers_are_uniform_inside_the_open_unit_interval() -> None:
    u = uniform(3, torch.arange(2000), 0, 100)
    assert u.dtype == torch.float64
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    n = u.numel()
    # Kolmogorov-Smirnov
    gap = (u.flatten().sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(gap) < 1.63 / math.sqrt(n)  # 1 % level
    by_place = torch.corrcoef(u[:, :20].t()) - torch.eye(20)
    assert float(by_place.abs().max()) < 5 / math.sqrt(2000)
    by_image = torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1]
    assert abs(float(by_image)) < 4 / math.sqrt(n)


def test_normal_numbers_have_moments_and_quantiles_of_a_normal() -> None:
    z = normal(3, torch.arange(2000), 0, 101).flatten()
    n = len(z)
    moments = [float(z.pow(k).mean()) for k in (1, 2, 3, 4)]
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96)):
        assert abs(moment - expected) < 4 * math.sqrt(variance / n)
    cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    assert float((cdf - (torch.arange(n) + 0.5) / n).abs().max()) < 1.63 / math.sqrt(n)


def test_categories_are_drawn_as_probable_and_never_where_that_is_zero() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    u = uniform(1, torch.arange(80_000), 0)[:, 0]
    for factor in (1.0, 7.0):  # unnormalised too
        ids = categorical((factor * probs).expand(len(u), -1), u)
        share = ids.bincount(minlength=6) / len(u)
        assert bool((share[probs == 0] == 0).all())
        assert float((share - probs).abs().max()) < 4 * 0.5 / math.sqrt(len(u))


def test_categories_are_the_inverse_of_the_distribution_function() -> None:
    probs = torch.tensor([[0.25, 0.25, 0.5]]).expand(6, -1)
    u = torch.tensor([1e-12, 0.249, 0.251, 0.499, 0.501, 1 - 1e-12], dtype=torch.float64)
    assert categorical(probs, u).tolist() == [0, 0, 1, 1, 2, 2]

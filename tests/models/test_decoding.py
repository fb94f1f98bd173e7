"""Decoding with caches of fixed shape: the same tokens as with growing ones, batch after batch."""

from __future__ import annotations

import pytest
import torch

import models
from models import random
from models.layers import KVCache
from ptq.graphs import record
from ptq.modules import QuantMatMul, swap
from ptq.numerics import QParams
from ptq.quantizers import StaticQuantizer
from ptq.types import QuantSpec

RECORDERS = {"cpu": None, "cuda": record}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def test_uniform_numbers_of_all_steps_are_those_of_each() -> None:
    index = torch.tensor([0, 5, 2**40 + 3])
    together = random.first_uniforms(7, index, 9)
    assert all(torch.equal(together[s], random.uniform(7, index, s)[:, 0]) for s in range(9))


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rar_twin", "par_twin"])
def test_logits_of_every_step_are_those_of_a_growing_cache(name: str, device: str) -> None:
    generator = models.load(name, device=device)
    model, decoder = generator.transformer, generator.captured(False, RECORDERS[device])
    blocks = model.blocks if name == "rar_twin" else model.layers
    ids = torch.randint(100, (3, model.image_seq_len if name == "rar_twin" else 64), device=device)
    labels = torch.tensor([1, 4, 7], device=device)
    classes = model.condition_ids(labels) if name == "rar_twin" else labels
    steps = [(0, 2), *((s, s + 1) for s in range(2, 65))] if name == "rar_twin" else model.layout.steps(64)
    for _ in range(2):  # the second time over what the first has left
        cache = [KVCache(decoder.length) for _ in blocks]
        decoder.begin(ids, classes)
        for first, end in steps:
            positions = torch.arange(first, end, device=device)
            expected = model(ids, classes, positions=positions, cache=cache)
            torch.testing.assert_close(decoder(first, end), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rar_twin", "par_twin", "var_twin"])
def test_samples_are_the_same(name: str, device: str) -> None:
    generator = models.load(name, device=device)
    labels, index = torch.arange(4, device=device), torch.arange(4)
    settings = dict(generator.preset.samplers["official"])
    expected = generator.sample(labels, 3, index, settings)
    generator.decoder = generator.captured(False, RECORDERS[device])
    found = [generator.sample(labels, 3, index, settings) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert (found[0] == expected).float().mean() > (0.99 if device == "cpu" else 0.9)
    assert len(generator.sample(labels[:2], 3, index[:2], settings)) == 2  # another shape


@torch.no_grad()
def test_masked_slots_add_nothing_where_a_quantized_weight_of_zero_is_not_zero() -> None:
    generator = models.load("rar_twin")
    model, spec = generator.transformer, QuantSpec(4)
    for block in range(len(model.blocks)):
        product = QuantMatMul()
        product.a = StaticQuantizer(spec, QParams(torch.tensor([0.07]), torch.tensor([-0.4])))  # 0 becomes .028
        swap(model, f"blocks.{block}.attn.pv", product)
    ids, labels = torch.randint(100, (2, model.image_seq_len)), model.condition_ids(torch.tensor([2, 3]))
    decoder, cache = generator.captured(compiled=False), [KVCache(65) for _ in model.blocks]
    for _ in range(2):
        decoder.begin(ids, labels)
        for first, end in ((0, 2), (2, 3), (3, 4)):
            found = decoder(first, end)
    for first, end in ((0, 2), (2, 3), (3, 4)):
        expected = model(ids, labels, positions=torch.arange(first, end), cache=cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

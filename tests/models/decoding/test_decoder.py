"""Decoding with caches of fixed shape: the same tokens as with growing ones, batch after batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import models
from models.decoding import philox, step_attention
from models.decoding.decoder import StaticCache
from models.layers import KVCache, causal_mask
from ptq.modules import QuantMatMul, swap_module
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import StaticQuantizer
from ptq.omniquant.graphs import record_graph
from ptq.types import QuantSpec

RECORDERS = {"cpu": None, "cuda": record_graph}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def test_uniform_numbers_of_all_steps_are_those_of_each() -> None:
    index = torch.tensor([0, 5, 2**40 + 3])
    together = philox.first_uniforms(7, index, 9)
    assert all(torch.equal(together[s], philox.uniform(7, index, s)[:, 0]) for s in range(9))
    spans = ((0, 1), (1, 5), (5, 14))
    of_spans = philox.span_uniforms(7, index, spans)
    for step, (begin, end) in enumerate(spans):
        assert torch.equal(of_spans[:, begin:end], philox.uniform(7, index, step, end - begin))


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rar_twin", "par_twin"])
def test_logits_of_every_step_are_those_of_a_growing_cache(name: str, device: str) -> None:
    generator = models.load(name, device=device)
    model = generator.transformer
    decoder = generator.captured(False, RECORDERS[device])
    blocks = model.blocks if name == "rar_twin" else model.layers
    ids = torch.randint(100, (3, model.image_seq_len if name == "rar_twin" else 64), device=device)
    labels = torch.tensor([1, 4, 7], device=device)
    classes = model.condition_ids(labels) if name == "rar_twin" else labels
    steps = (
        [(0, 2), *((s, s + 1) for s in range(2, 65))]
        if name == "rar_twin"
        else model.layout.steps(64)
    )
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
    labels = torch.arange(4, device=device)
    index = torch.arange(4)
    settings = dict(generator.preset.samplers["official"])
    expected = generator.sample(labels, 3, index, settings)
    generator.decoder = generator.captured(False, RECORDERS[device])
    found = [generator.sample(labels, 3, index, settings) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert (found[0] == expected).float().mean() > (0.99 if device == "cpu" else 0.9)
    assert len(generator.sample(labels[:2], 3, index[:2], settings)) == 2  # another shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rar_twin", "par_twin", "var_twin"])
def test_exact_decoders_keep_every_byte(name: str, device: str) -> None:
    generator = models.load(name, device=device)
    labels = torch.arange(4, device=device)
    index = torch.arange(4)
    settings = dict(generator.preset.samplers["official"])
    expected = generator.sample(labels, 3, index, settings)
    generator.decoder = generator.captured(False, RECORDERS[device], exact=True)
    for _ in range(2):
        assert torch.equal(generator.sample(labels, 3, index, settings), expected)


class Replay:
    """Stands for a graph: replaying does the work again and writes into the same result."""

    def __init__(self, work: Callable, pool: object) -> None:
        self.work = work
        self.result = work()

    def replay(self) -> None:
        again = self.work()
        kept = self.result if isinstance(self.result, list) else [self.result]
        renewed = again if isinstance(again, list) else [again]
        for place, value in zip(kept, renewed, strict=True):
            place.copy_(value)


@pytest.mark.parametrize("name", ["rar_twin", "par_twin", "var_twin"])
def test_replays_read_the_places_that_were_captured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(work: Callable, pool: object) -> tuple[Replay, object]:
        graph = Replay(work, pool)
        return graph, graph.result

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    generator = models.load(name)
    settings = dict(generator.preset.samplers["official"])
    for exact in (True, False):
        plain = generator.captured(False, exact=exact)
        replayed = generator.captured(False, record, exact=exact)
        for seed in (3, 4):  # the second time all is captured, and everything else
            labels = torch.tensor([seed, 7])
            images = []
            for decoder in (plain, replayed):
                generator.decoder = decoder
                images.append(generator.sample(labels, seed, torch.arange(2), settings))
            assert torch.equal(*images)


def test_an_exact_decoder_goes_on_where_a_step_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = models.load("rar_twin")
    labels = torch.arange(2)
    settings = dict(generator.preset.samplers["official"])
    expected = generator.sample(labels, 3, torch.arange(2), settings)

    def refuse(work: Callable, pool: object) -> None:
        work()
        raise RuntimeError("capturing is not permitted\nsecond line")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    generator.decoder = generator.captured(False, refuse, exact=True)
    with pytest.warns(UserWarning, match="run as they are: capturing is not permitted$"):
        assert torch.equal(generator.sample(labels, 3, torch.arange(2), settings), expected)
    generator.decoder = generator.captured(False, refuse)
    with pytest.raises(RuntimeError, match="capturing is not permitted"):
        generator.sample(labels, 3, torch.arange(2), settings)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rar_twin", "var_twin"])
def test_tables_made_ahead_hold_what_the_blocks_would_compute(name: str) -> None:
    model = models.load(name).transformer.double()
    labels = torch.tensor([3, 5, model.num_classes, model.num_classes])
    length = model.image_seq_len + 1 if name == "rar_twin" else model.length
    if name == "rar_twin":
        given = model.condition_ids(labels)
        ids = torch.randint(100, (4, 64))
        steps = [(0, 2), (2, 3), (63, 64), (64, 65)]
        inputs = [(ids, given)] * len(steps)
        ahead = 8
    else:
        given = labels
        steps = list(model.spans)
        inputs = [
            (labels, torch.randn(4, end - max(begin, 1), 16).double()) for begin, end in steps
        ]
        ahead = length
    for (first, end), fed in zip(steps, inputs, strict=True):
        positions = torch.arange(first, end)
        window = torch.arange(first // ahead * ahead, first // ahead * ahead + ahead)
        tables = model.modulate_ahead(given[:3], window)  # both rows without a class share one
        caches = [[KVCache(length) for _ in model.blocks] for _ in range(2)]
        expected = model(*fed, positions=positions, cache=caches[0])
        found = model(*fed, positions=positions, cache=caches[1], tables=tables)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rar_twin", "par_twin", "var_twin"])
def test_attention_of_steps_makes_the_same_samples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = models.load(name)
    asked = []

    def few(cache: StaticCache, q: torch.Tensor) -> object:
        asked.append(q.shape[2])
        return step_attention.attend_step if q.shape[2] <= step_attention.QUERIES else None

    labels = torch.arange(4)
    index = torch.arange(4)
    settings = dict(generator.preset.samplers["official"])
    expected = generator.sample(labels, 3, index, settings)
    monkeypatch.setattr(StaticCache, "attention", few)
    generator.decoder = generator.captured(compiled=False)
    assert (generator.sample(labels, 3, index, settings) == expected).float().mean() > 0.99
    assert {"rar_twin": {1, 2}, "par_twin": {1, 4}, "var_twin": {1, 4, 9, 16, 36, 64}}[name] == set(
        asked
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 37, 48), (1, 2, 4, 300, 64), (2, 1, 3, 16, 20), (1, 1, 1, 1, 80)]
)
def test_attention_of_steps_is_that_of_the_library(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    batch, heads, tokens, keys, channels = shape
    make = torch.Generator(device).manual_seed(0)
    kv = torch.randn(2, batch, heads, keys + 5, channels, generator=make, device=device).to(dtype)
    k, v = kv[:, :, :, :keys]  # what a cache shows of its slots
    q = torch.randn(batch, tokens, 3, heads, channels, generator=make, device=device).to(dtype)
    q = q.permute(2, 0, 3, 1, 4)[0]
    mask = None if tokens == 1 else causal_mask(keys, q.device)[-tokens:]
    for filled in (None, torch.tensor([max(keys - 2, 1)], device=device)):
        seen = torch.zeros(tokens, keys, device=device) if mask is None else mask.clone()
        if filled is not None:
            seen[:, int(filled) :] = float("-inf")
        expected = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), seen.double(), scale=0.2
        )
        found = step_attention.attend_step(
            q, k, v, 0.2, None if mask is None else mask.to(dtype), filled
        )
        close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)


def test_the_operator_says_what_the_compiler_is_to_expect() -> None:
    q = torch.randn(2, 3, 2, 8)
    k = torch.randn(2, 3, 9, 8)
    filled = torch.tensor([7])
    torch.library.opcheck(step_attention.step_attention, (q, k, k, 0.3, None, None))
    torch.library.opcheck(
        step_attention.step_attention, (q, k, k, 0.3, causal_mask(9)[-2:], filled)
    )


@pytest.mark.parametrize(
    ("tokens", "dtype", "cuda", "taken"),
    [
        (4, torch.bfloat16, True, True),
        (5, torch.bfloat16, True, False),
        (1, torch.float64, True, False),
        (1, torch.float32, False, False),
    ],
)
def test_steps_of_few_queries_on_a_gpu_attend_in_one_pass(
    tokens: int, dtype: torch.dtype, cuda: bool, taken: bool
) -> None:
    q = SimpleNamespace(is_cuda=cuda, shape=(2, 3, tokens, 8), dtype=dtype)
    assert (StaticCache(9).attention(q) is step_attention.attend_step) == taken
    assert KVCache(9).attention(q) is None


@torch.no_grad()
def test_masked_slots_add_nothing_where_a_weight_of_zero_is_not_zero() -> None:
    generator = models.load("rar_twin")
    model = generator.transformer
    spec = QuantSpec(4)
    for block in range(len(model.blocks)):
        product = QuantMatMul()
        # 0 becomes .028
        product.a = StaticQuantizer(spec, QParams(torch.tensor([0.07]), torch.tensor([-0.4])))
        swap_module(model, f"blocks.{block}.attn.pv", product)
    ids = torch.randint(100, (2, model.image_seq_len))
    labels = model.condition_ids(torch.tensor([2, 3]))
    decoder = generator.captured(compiled=False)
    cache = [KVCache(65) for _ in model.blocks]
    for _ in range(2):
        decoder.begin(ids, labels)
        for first, end in ((0, 2), (2, 3), (3, 4)):
            found = decoder(first, end)
    for first, end in ((0, 2), (2, 3), (3, 4)):
        expected = model(ids, labels, positions=torch.arange(first, end), cache=cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

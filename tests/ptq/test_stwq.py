"""Static token-wise quantization: a decoding step and the full sequence use the same parameters at
each position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layers import KVCache
from models.rar.adapter import RARAdapter
from models.rar.transformer import RAR
from ptq.modules import QuantLinear, QuantMatMul, swap_module
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import DynamicQuantizer, StaticQuantizer, fake_quantize_weight
from ptq.pipeline import quantize
from ptq.recipe import KINDS, Recipe
from ptq.sites import Scope
from ptq.stwq import TokenStaticQuantizer, input_spec, static_quantizer
from ptq.types import QuantSpec, Segments, Site
from tests.families import calibration, decoded, tiny
from tests.reference import fill

LENGTH = 16
IDS = torch.randint(40, (6, LENGTH - 1), generator=torch.Generator().manual_seed(0))
CONDITION = torch.tensor([41, 45, 49, 51, 51, 51])
BASE = QuantSpec(6)


class RequantizingMatMul(QuantMatMul):
    """Quantizes the whole cache in every step, as the released code does."""

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return b

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.a(a, positions) @ self.b(b, positions)


def quantized(product: type[QuantMatMul] = QuantMatMul, dtype: torch.dtype = torch.float64) -> RAR:
    """A small RAR whose linears and attention products are quantized by hand, inputs token-wise
    where the site says."""
    model = fill(RAR(48, 2, 4, 192, LENGTH, 40, 10)).to(dtype).requires_grad_(False)
    model.timesteps_embeddings[:, ::2] *= 4  # AdaLN inputs that vary with the position
    model.cls_token *= 10  # a sink token
    adapter = RARAdapter(model)
    places: list[tuple[torch.nn.Module, str, Observer]] = []
    for site in adapter.sites:
        linear = QuantLinear(model.get_submodule(site.name))
        linear.weight, linear.weight_params = fake_quantize_weight(
            linear.weight, BASE.at("out_channel")
        )
        swap_module(model, site.name, linear)
        places.append(
            (
                linear,
                "input",
                Observer(input_spec(site, BASE, stwq=True), site.segments, 6, site.name),
            )
        )
    for site in adapter.matmuls:
        swap_module(model, site.name, product())
        places += [
            (model.get_submodule(site.name), operand, Observer(BASE, rows=6))
            for operand in ("a", "b")
        ]
    for module, name, observer in places:
        setattr(module, name, observer)
    for _ in range(2):
        model(IDS, CONDITION)
        for _, _, observer in places:
            observer.end_pass()
    for module, name, observer in places:
        setattr(module, name, static_quantizer(observer.spec, observer.params(), observer.segments))
    return model


@torch.no_grad()
def stepwise(model: RAR, positions: list[Tensor] | None = None) -> Tensor:
    """Logits (B, L, V) of one decoding step after the other, the prefix (0, 1) first."""
    cache = [KVCache(LENGTH + 1) for _ in model.blocks]
    every = torch.arange(LENGTH + 1)
    calls = [every[:2]] + [every[p : p + 1] for p in range(2, LENGTH + 1)]
    return torch.cat([model(IDS, CONDITION, positions=p, cache=cache) for p in calls], dim=1)


def used_parameters(model: RAR, full: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Scale and zero point (T,) that every token-wise quantizer applied at each position."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def record(name: str):
        def hook(module: TokenStaticQuantizer, args: tuple[Tensor, Tensor], output: Tensor) -> None:
            x, positions = args
            ramp = torch.linspace(-1e4, 1e4, 10001, dtype=x.dtype).expand(1, len(positions), -1)
            levels = TokenStaticQuantizer.forward(module, ramp, positions)[0]
            found.setdefault(name, []).append((positions, levels.amin(-1), levels.amax(-1)))

        return hook

    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, TokenStaticQuantizer)}
    handles = [m.register_forward_hook(record(n)) for n, m in quantizers.items()]
    with torch.no_grad():
        _ = model(IDS, CONDITION) if full else stepwise(model)
    for handle in handles:
        handle.remove()
    columns = {n: [torch.cat(c) for c in zip(*calls)] for n, calls in found.items()}
    return {n: (lo[p.argsort()], hi[p.argsort()]) for n, (p, lo, hi) in columns.items()}


def test_decoding_uses_the_full_sequences_parameters_at_every_position() -> None:
    model = quantized()
    full = used_parameters(model, True)
    steps = used_parameters(model, False)
    sites = RARAdapter(RAR(48, 2, 4, 192, LENGTH, 40, 10)).sites
    kinds = {s.name + ".input": s for s in sites if len(s.segments) > 1}
    assert set(full) == set(steps) == set(kinds)
    for name, site in kinds.items():
        head = name.startswith("adaln_before_head")
        for a, b in zip(full[name], steps[name]):
            assert len(a) == LENGTH + (0 if head else 1)
            assert torch.equal(a, b)
            distinct = LENGTH + (0 if head else 1) if site.kind == "adaln" else 3
            assert len(a.unique()) > 1
            assert len(a.unique()) <= distinct


def test_decoding_step_by_step_gives_the_logits_of_the_full_sequence() -> None:
    model = quantized()
    with torch.no_grad():
        full = model(IDS, CONDITION)
        plain = fill(RAR(48, 2, 4, 192, LENGTH, 40, 10)).double()(IDS, CONDITION)
    torch.testing.assert_close(stepwise(model), full, rtol=0, atol=1e-9)
    assert float((full - plain).abs().max()) > 1e-3  # the quantizers do act


@pytest.mark.parametrize("family", ["var", "rar", "par"])
@pytest.mark.parametrize("transforms", [(), ("smoothquant", "shift", "gps")])
@torch.no_grad()
def test_every_family_decodes_to_the_logits_of_the_full_sequence(
    family: str, transforms: tuple[str, ...]
) -> None:
    adapter = tiny(family)
    chosen = calibration(family, adapter)
    plain = adapter.forward(chosen.rows)
    how = Recipe(
        BASE.at("out_channel"), BASE, transforms, scope=Scope(KINDS), stwq=True, exclude_sinks=True
    )
    quantize(adapter, chosen, how, batch=4)
    full = adapter.forward(chosen.rows)
    torch.testing.assert_close(decoded(adapter, chosen.rows), full, rtol=0, atol=1e-9)
    assert float((full - plain).abs().max()) > 1e-3


def test_quantizing_the_cache_once_gives_the_bits_of_every_step() -> None:
    once = quantized(dtype=torch.float32)
    every_step = quantized(RequantizingMatMul, torch.float32)
    assert torch.equal(stepwise(once), stepwise(every_step))


def test_a_weight_rounded_once_gives_the_bits_of_rounding_in_every_call() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 48, generator=generator)
    x = torch.randn(5, 7, 48, generator=generator)
    rounded, params = fake_quantize_weight(weight, BASE.at("out_channel"))
    every_call = fake_quantize(weight, params.view(-1, 1), BASE.levels)
    assert torch.equal(x @ rounded.t(), x @ every_call.t())


def params_of(n: int) -> QParams:
    return QParams(torch.linspace(0.01, 0.5, n), torch.arange(n).float() % 7 + 20)


@pytest.mark.parametrize(
    "starts", [(0, 1, 2), (0,), tuple(range(17)), tuple(range(1, 17)), (0, 1, 5, 9)]
)
def test_each_token_gets_the_parameters_of_its_segment(starts: tuple[int, ...]) -> None:
    segments = Segments(starts)
    params = params_of(len(starts))
    quantizer = TokenStaticQuantizer(QuantSpec(6, granularity="token_static"), params, segments)
    x = 5 * torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(1))
    full = quantizer(x, torch.arange(17))
    for t in range(17):
        group = max([g for g, start in enumerate(starts) if start <= t], default=0)
        expected = fake_quantize(x[:, t], params[group], 64)
        assert torch.equal(full[:, t], expected)
        assert torch.equal(quantizer(x[:, t : t + 1], torch.tensor([t]))[:, 0], expected)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantizer(x[:, order], order), full[:, order])
    beyond = quantizer(x[:, :3], torch.tensor([16, 400, 9000]))
    assert torch.equal(beyond, fake_quantize(x[:, :3], params[len(starts) - 1], 64))


def test_another_position_gets_other_parameters() -> None:
    quantizer = TokenStaticQuantizer(BASE, params_of(3), Segments((0, 1, 2)))
    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))
    outputs = [quantizer(x, torch.tensor([t])) for t in range(4)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[2], outputs[3])


def test_loading_other_parameters_changes_what_is_applied() -> None:
    first, second = (
        TokenStaticQuantizer(BASE, params, Segments((0, 1, 2)))
        for params in (
            params_of(3),
            QParams(torch.tensor([0.3, 0.2, 0.1]), torch.tensor([1.0, 30.0, 60.0])),
        )
    )
    assert set(first.state_dict()) == {"scale", "zero_point"}
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))
    positions = torch.arange(5)
    assert not torch.equal(first(x, positions), second(x, positions))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x, positions), second(x, positions))


def test_token_wise_parameters_need_stwq_on_and_more_than_one_segment() -> None:
    site = Site("fc1", "fc1", ("fc1",), Segments((0, 1, 2)))
    assert input_spec(site, BASE, stwq=True) == BASE.at("token_static")
    assert input_spec(site, BASE, stwq=False) == BASE
    assert input_spec(Site("head", "head", ("head",)), BASE, stwq=True) == BASE
    assert isinstance(static_quantizer(BASE, params_of(1), Segments()), StaticQuantizer)


def test_a_dynamic_quantizer_depends_on_its_own_token_alone() -> None:
    quantizer = DynamicQuantizer(QuantSpec(6, granularity="token_dynamic", range="minmax"))
    x = (
        torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(5))
        * torch.logspace(-2, 2, 9)[:, None]
    )
    full = quantizer(x)
    assert torch.equal(torch.cat([quantizer(x[:, t : t + 1]) for t in range(9)], dim=1), full)
    step = (x.amax(-1) - x.amin(-1)) / 63
    assert bool(((full - x).abs().amax(-1) <= step * (1 + 1e-4)).all())

"""What STAQ's tables and vectors add to a model at rest, for every released preset: counted from
shapes alone, which is checked on small models."""

from __future__ import annotations

import pytest
import torch

from experiments.config.recipe import build_recipe
from experiments.run.scoring import model_bytes
from models.registry import PRESETS, build_outline
from ptq.pipeline import quantize
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.types import Adapter, NormFold, Site
from tests.experiments.cells import config_of
from tests.families import FAMILIES, calibration, tiny

RELEASED = [name for name, preset in PRESETS.items() if not preset.weights.shipped]
# the diffusion head is not quantized, and its sites have no position
SCOPE = Scope()


def sequence_length(adapter: Adapter) -> int:
    """Positions of the longest sequence that calibration brings."""
    model = adapter.model
    if adapter.family == "var":
        return model.length
    if adapter.family == "rar":
        return model.image_seq_len + 1
    if adapter.family in ("par", "llamagen"):
        return model.layout.tokens
    return model.buffer_size + model.seq_len


def positions_of(adapter: Adapter, site: Site) -> int:
    """Positions at which a site's input is seen in calibration."""
    if site.kind == "head" and adapter.family == "rar":
        return sequence_length(adapter) - 1  # position 0 predicts nothing
    if site.kind != "adaln":
        return sequence_length(adapter)
    return 1 if adapter.family == "var" else len(site.segments)


def quantized_bytes(adapter: Adapter, bits: int, pair: int) -> int:
    """Bytes of codes and row parameters, and of everything that is not quantized."""
    model = adapter.model
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for site in SCOPE.sites(adapter):
        for name in site.consumers:
            weight = model.get_submodule(name).weight
            total += weight.numel() * bits // 8 - 4 * weight.numel() + pair * len(weight)
    return total


def missing_biases(adapter: Adapter, kinds: tuple[str, ...], corrected: bool) -> int:
    """Bytes of biases that a shift at sites of these kinds makes, in linears and norms, or that a
    correction makes in every linear."""
    model = adapter.model
    linears: set[str] = set()
    norms: set[str] = set()
    for site in SCOPE.sites(adapter):
        if corrected or site.kind in kinds:
            linears |= set(site.consumers)
        if site.kind in kinds and isinstance(site.fold, NormFold):
            norms.add(site.fold.norm)
    modules = [model.get_submodule(name) for name in (*linears, *norms)]
    return sum(4 * len(module.weight) for module in modules if module.bias is None)


def ptq4arvg_bytes(adapter: Adapter, bits: int) -> int:
    total = quantized_bytes(adapter, bits, 8)
    total += missing_biases(adapter, ("qkv", "fc1", "head"), False)
    for site in SCOPE.sites(adapter):
        segments = site.segments
        total += 8 * len(segments)
        if len(segments) > 1:  # the group of every position
            total += 8 * (segments.starts[-1] + 1)
    return total + 2 * 8 * len(adapter.matmuls)  # one pair an operand


def staq_bytes(adapter: Adapter, bits: int) -> int:
    model = adapter.model
    length = sequence_length(adapter)
    shifted = ("qkv", "proj", "fc1", "head")  # PAR's fc2 takes a scale alone
    total = quantized_bytes(adapter, bits, 4) + missing_biases(adapter, shifted, True)
    for site in SCOPE.sites(adapter):
        total += 4 * positions_of(adapter, site)
        weights = [model.get_submodule(name).weight for name in site.consumers]
        channels = weights[0].shape[1]
        if site.kind in ("qkv", "fc1", "fc2"):
            total += 4 * (channels + sum(len(weight) for weight in weights))  # of sinks
        if site.kind == "fc2" and site.fold is None:
            total += 2 * 4 * channels  # online scale and shift
    for product in adapter.matmuls:
        module = product.name.rsplit(".", 1)[0]
        heads = heads_of(adapter, module, product.channels)
        # q and k per head and position; v and its key weights per head
        total += 4 * heads * length if product.kind == "qk" else 0
        total += 4 * heads * length if product.kind == "qk" else 2 * 4 * heads
    return total


def heads_of(adapter: Adapter, attention: str, channels: int) -> int:
    site = next(s for s in adapter.sites if s.kind == "proj" and s.name.startswith(f"{attention}."))
    return adapter.model.get_submodule(site.name).weight.shape[1] // channels


def recipe_of(method: str) -> Recipe:
    return build_recipe(config_of(f"method={method}", "quant=w6a6"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_count_from_shapes_is_that_of_the_quantized_model(family: str) -> None:
    for method, count in (("ptq4arvg", ptq4arvg_bytes), ("staq", staq_bytes)):
        adapter = tiny(family, torch.float32)
        expected = count(adapter, 6)
        quantize(adapter, calibration(family, adapter), recipe_of(method), batch=6)
        found = model_bytes(adapter.model, config_of("quant=w6a6"))
        if (family, method) == ("mar", "staq"):
            # MAR's encoder never sees all image tokens, so its tables are a little shorter
            assert 0 <= expected - found < 0.02 * expected
        else:
            assert found == expected


@pytest.mark.parametrize(("bits", "share"), [(8, 0.02), (6, 0.02), (4, 0.025)])
@pytest.mark.parametrize("name", RELEASED)
def test_staq_is_as_small_as_ptq4arvg_at_released_sizes(name: str, bits: int, share: float) -> None:
    adapter = build_outline(name).adapter
    ours = staq_bytes(adapter, bits)
    theirs = ptq4arvg_bytes(adapter, bits)
    assert theirs < ours < (1 + share) * theirs

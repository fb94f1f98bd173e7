"""Decoding steps by kernels of their own: what they compute, where they apply, and what the log
says where they do not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from models.decoding.decoder import Decoder, StaticCache
from models.rar.adapter import BLOCK_FORM, RARAdapter
from models.rar.sampler import generate_in_graphs
from models.rar.transformer import RAR
from ptq.int8.modules import all_codes, to_int8
from ptq.int8.steps import attention, nvrtc
from ptq.int8.steps import blocks as steps
from ptq.int8.steps.attention import StepAttention
from ptq.int8.steps.blocks import NoStep, StepBlocks, describe_block, describe_head
from ptq.int8.steps.kernels import References
from ptq.methods.hadamard import HadamardRotation
from ptq.modules import QuantMatMul
from ptq.pipeline import quantize
from ptq.recipe import Recipe, Scope
from ptq.staq.sink_shift import SinkShift
from ptq.types import Adapter, QuantSpec
from tests.families import CLASSES, CODES, calibration
from tests.ptq.staq.test_fitting import STAQ
from tests.reference import fill

gpu = pytest.mark.gpu
RECIPES = {
    "normalised": Recipe(QuantSpec(8, granularity="out_channel"), QuantSpec(8)),
    "numerators": STAQ,
    "attention in floats": Recipe(
        QuantSpec(8, granularity="out_channel"),
        QuantSpec(8),
        scope=Scope(("qkv", "proj", "fc1", "fc2"), False),
    ),
}


def integer_rar(recipe: Recipe) -> Adapter:
    """A small RAR in integers whose heads have 16 channels."""
    model = fill(RAR(64, 2, 4, 128, 16, CODES, CLASSES)).float().requires_grad_(False)
    adapter = RARAdapter(model)
    quantize(adapter, calibration("rar", adapter, 2), recipe, batch=2)
    to_int8(model, all_codes(model, recipe.weights.bits))
    return adapter


def run_prefix(model: RAR, condition: Tensor) -> list[StaticCache]:
    """Caches with the first two tokens of every row."""
    caches = [StaticCache(model.image_seq_len + 1) for _ in model.blocks]
    positions = torch.arange(model.prefix, device=condition.device)
    model(condition.new_zeros(len(condition), 16), condition, positions=positions, cache=caches)
    return caches


def describe_model(model: RAR) -> StepBlocks:
    """Its steps in plain PyTorch."""
    described = [describe_block(block, BLOCK_FORM, model.prefix) for block in model.blocks]
    head = describe_head(model.adaln_before_head, model.lm_head, model.prefix)
    return StepBlocks(described, head, References())


@pytest.mark.parametrize("name", list(RECIPES))
@torch.no_grad()
def test_a_step_computes_what_the_blocks_do(name: str) -> None:
    torch.manual_seed(0)
    model = integer_rar(RECIPES[name]).model
    condition = model.condition_ids(torch.arange(3))
    caches = run_prefix(model, condition)
    own_caches = copy.deepcopy(caches)
    run = describe_model(model)
    assert (run.head is None) == (name == "attention in floats")
    ids = torch.randint(CODES, (3, 16))
    for place in range(2, 7):
        position = torch.tensor([place])
        tables = model.modulate_ahead(condition, position)
        x = model.embed_step(ids, position)
        found = run(x, tables, position, own_caches, model.predict)
        expected = model(ids, condition, None, position, caches, tables)
        # a code at the edge of two may be either, as sums of floats are rounded in another order
        bound = 4 / 2 ** RECIPES[name].activations.bits
        assert (found - expected).norm() < bound * expected.norm()
    for cache, own_cache in zip(caches, own_caches):
        differences = (cache.k.float() - own_cache.k.float()).abs()
        assert differences.max() <= (1 if cache.k.dtype == torch.int8 else 2e-2)


@torch.no_grad()
def test_a_decoder_that_looks_ahead_runs_its_steps_by_them() -> None:
    model = integer_rar(RECIPES["normalised"]).model
    runner = describe_model(model)
    places = []

    def recording(x: Tensor, tables: list[Tensor], position: Tensor, *rest) -> Tensor:
        places.append(int(position))
        return runner(x, tables, position, *rest)

    model.step_runner = recording
    uniforms = torch.rand(2, 16, dtype=torch.float64)
    for ahead, expected in ((8, list(range(2, 17))), (0, [])):
        places.clear()
        decoder = Decoder(model, model.blocks, 17, ahead=ahead)
        generate_in_graphs(model, torch.arange(2), uniforms, decoder, 4.0, 1.0, 1.0)
        assert places == expected


@torch.no_grad()
def test_rows_without_a_class_share_a_row_of_tables_made_ahead() -> None:
    model = integer_rar(RECIPES["normalised"]).model
    condition = model.condition_ids(torch.tensor([0, 1, CLASSES, CLASSES]))
    run = describe_model(model)
    x = torch.randn(4, 1, 64)
    position = torch.tensor([6])
    found = []
    for rows, positions in ((condition, position), (condition[:3], torch.arange(4, 8))):
        tables = model.modulate_ahead(rows, positions)
        found.append(run(x, tables, position, run_prefix(model, condition), model.predict))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def drop_qkv(block: nn.Module) -> None:
    block.attn.qkv = nn.Linear(64, 192)


def make_dynamic(block: nn.Module) -> None:
    block.mlp.fc2.table = None


def rotate_online(block: nn.Module) -> None:
    block.attn.qk.queries.rotation = HadamardRotation(16)


def move_weights(block: nn.Module) -> None:
    block.attn.qk.zero_points[2] = -120


def simulate_attention(block: nn.Module) -> None:
    block.attn.qk = QuantMatMul()


def add_low_rank(block: nn.Module) -> None:
    block.attn.proj.down = torch.ones(1, 64)


def shift_many(block: nn.Module) -> None:
    block.mlp.fc1.sink_shift = SinkShift(torch.zeros(64), torch.zeros(128), sinks=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_qkv, "qkv is not in integers"),
        (make_dynamic, "fc2 has dynamic ranges"),
        (rotate_online, "its queries and keys are rotated online"),
        (move_weights, "its attention weights have a zero point"),
        (simulate_attention, "its attention is simulated"),
        (add_low_rank, "proj has a low-rank branch"),
        (shift_many, "fc1 shifts tokens up to position 2"),
    ],
)
def test_other_blocks_run_as_they_are_and_it_is_said_why(change, said: str) -> None:
    block = integer_rar(RECIPES["normalised"]).model.blocks[0]
    describe_block(block, BLOCK_FORM, 2)
    change(block)
    with pytest.raises(NoStep, match=said):
        describe_block(block, BLOCK_FORM, 2)


def test_without_a_compiler_the_log_says_so_and_blocks_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = integer_rar(RECIPES["normalised"])
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention.compile_kernel.cache_clear()
    assert not steps.install_steps(adapter)
    assert adapter.model.step_runner is None
    assert "attention cannot be compiled: libnvrtc.so.99 is not installed" in caplog.text


@pytest.mark.gpu
def test_a_kernel_that_is_wrong_is_refused_with_the_compiler_s_words() -> None:
    with pytest.raises(nvrtc.CompilerMissing, match="nonsense"):
        nvrtc.compile_source("nonsense", {}, "sm_90")


# --- on a GPU


def random_table(*shape: int, step: float) -> Tensor:
    """Scales around `step` and zero points (2, ...)."""
    scales = step * (0.7 + 0.6 * torch.rand(*shape))
    return torch.stack((scales, torch.randint(-20, 20, shape).float())).cuda()


def random_attention(heads: int, channels: int, positions: int, numerators: bool) -> StepAttention:
    """One of either kind; numerators have parameters by head and position."""

    def norm() -> tuple[Tensor, Tensor]:
        return (1 + 0.1 * torch.randn(channels)).cuda(), 0.05 * torch.randn(channels).cuda()

    if numerators:
        queries, keys = random_table(2, heads, positions - 3, step=4 / 127).unbind(1)
        values = random_table(heads, step=4 / 127)
    else:
        queries, keys, values = random_table(3, step=4 / 127).unbind(1)  # (2,) each
        queries = queries[:, None, None].expand(-1, heads, -1)
        keys = keys[:, None, None].expand(-1, heads, -1)
        values = values[:, None].expand(-1, heads)
    return StepAttention(
        query_norm=norm(),
        key_norm=norm(),
        queries=queries.contiguous(),
        keys=keys.contiguous(),
        values=values.contiguous(),
        weight_scale=None if numerators else 1 / 255,
        key_weights=(0.3 + torch.rand(heads)).cuda(),
        sinks=2 if numerators else 0,
        output=random_table(positions, step=2 / 127),
        bits=(8, 8, 8, 8, 8),
    )


@gpu
@pytest.mark.parametrize("channels", [16, 48, 64, 80, 88])
@pytest.mark.parametrize("numerators", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("place", "visible"), [(2, 64), (100, 128), (256, 257)])
def test_the_attention_kernel_equals_the_reference(
    channels: int, numerators: bool, dtype: torch.dtype, place: int, visible: int
) -> None:
    torch.manual_seed(0)
    rows = 37  # with five heads no multiple of a block's warps
    heads = 5
    described = random_attention(heads, channels, 257, numerators)
    qkv = torch.randn(rows, 3 * heads * channels, device="cuda").to(dtype)
    shape = (2, rows, heads, 257, channels)
    cache = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    expected_cache = cache.clone()
    position = torch.tensor([place], device="cuda")
    sums = torch.zeros(rows, dtype=torch.int32, device="cuda")
    early = steps.launches_early(qkv.device)
    codes = attention.attend_codes(described, qkv, *cache, position, sums, visible, early)
    expected, _ = attention.reference_step(described, qkv, *expected_cache, position)
    assert (cache != expected_cache).float().mean() < 1e-5
    difference = (codes.int() - expected.int()).abs()
    # a weight at the edge of two codes may get either: a value of 127 steps then moves the average
    # by up to two codes, in all channels of that row and head. It happens to one in a hundred
    assert difference.max() <= 3
    moved = difference.view(rows, heads, channels).amax(dim=-1) > 0  # (B, H)
    assert moved.float().mean() < 0.03
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


@gpu
@pytest.mark.parametrize("name", list(RECIPES))
@torch.no_grad()
def test_a_step_s_kernels_compute_what_plain_pytorch_does(name: str) -> None:
    adapter = integer_rar(RECIPES[name])
    model = adapter.model.cuda()
    condition = model.condition_ids(torch.arange(3, device="cuda"))
    caches = run_prefix(model, condition)
    own_caches = copy.deepcopy(caches)
    assert steps.install_steps(adapter)
    reference = describe_model(model)
    for place in range(2, 7):
        position = torch.tensor([place], device="cuda")
        x = torch.randn(3, 1, 64, device="cuda")
        tables = model.modulate_ahead(condition, position)
        found = model.step_runner(x, tables, position, own_caches, model.predict)
        expected = reference(x, tables, position, caches, model.predict)
        bound = 4 / 2 ** RECIPES[name].activations.bits
        assert (found - expected).norm() < bound * expected.norm()

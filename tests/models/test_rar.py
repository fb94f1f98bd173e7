"""RAR and MaskGIT-VQGAN against reference outputs of bytedance/1d-tokenizer, and what the design
promises of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import models
from models.rar.sampler import generate
from models.rar.tokenizer import MaskGitVQGAN
from models.rar.transformer import RAR
from tests.reference import Golden, fill, made_up, released_keys

RELEASED = ["rar_b", "rar_l", "rar_xl", "rar_xxl"]
GREEDY = {  # golden entry: guidance scale, power, temperature, cached
    "greedy_cfg": (4, 2.75, 1.0, True),
    "greedy_pow0": (4, 0.0, 1.02, True),
    "greedy_nocfg": (0, 2.75, 1.0, True),
    "greedy_cfg_nocache": (4, 2.75, 1.0, False),
}


@pytest.fixture(scope="module")
def tiny() -> RAR:
    return fill(RAR(48, 2, 4, 192, 16, 40, 10))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("rar_tiny_a")


@pytest.mark.parametrize("name", RELEASED)
def test_state_dicts_match_the_released_files_key_for_key(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name)
    keys = {
        "transformer": name.replace("_", "-"),
        "tokenizer": "rar-maskgit-vqgan-imagenet-f16-256",
    }
    for part, file in keys.items():
        state = {k: list(v.shape) for k, v in getattr(model, part).state_dict().items()}
        assert list(state.items()) == list(released_keys(file).items())


def run_teacher_forced(model: RAR, golden: Golden, tolerance: float) -> None:
    ids = golden["tf_ids"]
    condition = golden["condition_token_id"]
    orders = golden["orders"]
    length = model.image_seq_len
    golden.check("tf_logits_raster", model(ids, condition), tolerance)
    none = torch.full_like(condition, model.none_condition)
    golden.check("tf_logits_raster_none_cond", model(ids, none), tolerance)
    golden.check(
        "tf_logits_random_order", model(ids.gather(1, orders), condition, orders), tolerance
    )
    golden.check("partial_is_sampling_logits", model(ids[:, : length // 2], condition), tolerance)


@torch.no_grad()
def test_teacher_forced_logits_and_blocks(tiny: RAR, golden: Golden) -> None:
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in tiny.blocks]
    tiny(golden["tf_ids"], golden["condition_token_id"])
    for handle in handles:
        handle.remove()
    for i, output in enumerate(outputs):
        golden.check(f"tf_block{i}_out", output)
    run_teacher_forced(tiny, golden, 2e-5)


@pytest.mark.parametrize("entry", GREEDY)
def test_greedy_tokens_with_and_without_cache(tiny: RAR, golden: Golden, entry: str) -> None:
    scale, power, temperature, cached = GREEDY[entry]
    ids = generate(
        tiny,
        golden["condition_class"],
        lambda p, step: p.argmax(-1),
        scale,
        power,
        temperature,
        cached,
    )
    golden.check(f"{entry}_ids", ids)


def test_seeded_sampling_follows_the_official_call_order(tiny: RAR, golden: Golden) -> None:
    torch.manual_seed(11)
    # the released code draws a label-drop mask first, also when the drop probability is zero
    torch.rand(2)
    ids = generate(
        tiny, golden["condition_class"], lambda p, step: torch.multinomial(p, 1)[:, 0], 4, 2.75, 1.0
    )
    golden.check("seeded_ids", ids)


@torch.no_grad()
def test_tokenizer(golden: Golden) -> None:
    tokenizer = fill(MaskGitVQGAN((1, 2), 32, 2, 16, 40))
    images = (made_up("rar-tiny-a:img", (2, 3, 8, 8)) * 0.25 + 0.5).clamp(0, 1)
    golden.check("tok_encode_hidden", tokenizer.encoder(images))
    golden.check("tok_encode_idx", tokenizer.encode(images))
    golden.check("tok_decode_img", tokenizer.decode(golden["tok_codes"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_token_is_embedded_like_a_whole_sequence(tiny: RAR, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny).to(dtype)
    ids = torch.randint(model.codebook_size, (3, model.image_seq_len))
    condition = model.condition_ids(torch.arange(3))
    positions = torch.arange(model.image_seq_len + 1)
    expected = model.embed(ids, condition, None, positions)
    for position in positions[2:]:
        found = model.embed_step(ids, position[None])
        assert torch.equal(found, expected[:, position][:, None])


def test_an_image_depends_on_its_seed_and_index_alone() -> None:
    model = models.build("rar_twin")
    fill(model.transformer)
    labels = torch.tensor([3, 1, 4, 1])
    index = torch.tensor([5, 9, 2, 6])
    settings = model.preset.samplers["official"]
    together = model.sample(labels, 7, index, settings)
    shuffled = model.sample(labels[[2, 0, 3, 1]], 7, index[[2, 0, 3, 1]], settings)
    assert torch.equal(together[[2, 0, 3, 1]], shuffled)
    assert not torch.equal(together[1], together[3])  # same class, other index


@pytest.mark.slow
@torch.no_grad()
def test_rar_b_and_its_full_tokenizer() -> None:
    golden = Golden("rar_b")
    model = models.build("rar_b")
    fill(model.transformer), fill(model.tokenizer)
    run_teacher_forced(model.transformer, golden, 1e-4)
    labels = golden["condition_class"]
    ids = generate(model.transformer, labels, lambda p, step: p.argmax(-1), 16, 2.75, 1.0)
    golden.check("greedy_cfg_ids", ids)
    golden.check("tok_decode_img", model.decode(golden["tok_codes"]), 1e-4)

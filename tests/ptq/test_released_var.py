"""`ptq4arvg_released` against the released code itself, stage by stage, on a small VAR of all 680 positions.

That code calibrates without the attention mask, and so does its full-precision reference here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.var.sampler import generate
from tests.ptq.released_cases import STAGES, Staged
from tests.reference import Golden


@pytest.fixture(scope="module")
def staged() -> Staged:
    return Staged("var")


def test_the_smoothing_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_smoothing()


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_folded_weights_are_those_of_the_released_code(staged: Staged, stage: str) -> None:
    staged.check_parameters(stage)


def test_zero_points_are_averages_over_minibatches(staged: Staged) -> None:
    zero_point = staged.run.inputs["blocks.0.attn.mat_qkv"].params.zero_point
    assert bool(((zero_point - zero_point.round()).abs() > 0.05).any())


def test_the_gps_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_gps()


def test_the_quantized_outputs_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_outputs()


def test_decoding_along_the_released_tokens_would_pick_nearly_all_of_them(staged: Staged) -> None:
    (entry,) = (n for n in staged.golden.data.files if n.startswith("q_greedy_idx"))
    model, reference, picked = staged.adapter.model, staged.golden[entry], []

    def draw(probs: Tensor, scale: int) -> Tensor:
        picked.append(probs.argmax(dim=-1))
        return reference[:, slice(*model.spans[scale])]

    generate(model, staged.adapter.quantizer, torch.tensor([3]), draw, 1.5, 0, 0.0)
    assert float((torch.cat(picked, dim=1) == reference).double().mean()) > 0.95  # unquantized: 0.76


def test_the_mask_is_what_the_layouts_differ_in(staged: Staged) -> None:
    golden, adapter = Golden("ptq_var_pipeline"), staged.adapter
    staged.check_full_precision()  # it undoes the quantization
    adapter.layout = "inference"
    with torch.no_grad():
        masked = adapter.forward(staged.rows)
    assert golden.error("fp_logits", masked) > 0.02
    with torch.no_grad():  # the last scale sees all the others with or without a mask, its values differ all the same
        first = adapter.forward({k: v[:1] for k, v in staged.rows.items()})
        other = {"ids": staged.rows["ids"][:1].clone(), "label": staged.rows["label"][:1]}
        other["ids"][:, -1] = (other["ids"][:, -1] + 1) % 64
        coarse = slice(0, adapter.model.spans[-1][0])
        assert torch.equal(first[:, coarse], adapter.forward(other)[:, coarse])
        adapter.layout = "released"
        assert not torch.equal(staged.full_precision[:1, coarse], adapter.forward(other)[:, coarse])

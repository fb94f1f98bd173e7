"""`ptq4arvg_released` against the released code itself, stage by stage, on a small PAR-4x of all 576 positions.

In layer 1 one rounding goes the other way and moves one of the 64 channels of w1's input, which the output's bias, a
sum that nearly cancels, shows most. Everything in front of that is exact.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.par.sampler import generate
from ptq.quantizers import StaticQuantizer
from ptq.stwq import TokenStaticQuantizer
from tests.ptq.released_cases import STAGES, Staged


@pytest.fixture(scope="module")
def staged() -> Staged:
    return Staged("par")


def test_the_smoothing_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_smoothing()


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_folded_weights_are_those_of_the_released_code(staged: Staged, stage: str) -> None:
    staged.check_parameters(stage)


def test_the_gps_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_gps()


def test_the_quantized_outputs_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_outputs()


def test_attention_weights_are_powers_of_sqrt2_and_token_parameters_bfloat16(staged: Staged) -> None:
    model = staged.adapter.model
    assert isinstance(model.layers[0].attention.pv.a, StaticQuantizer)
    assert model.layers[0].attention.pv.a.spec.format == "log_sqrt2"
    assert model.layers[0].attention.pv.b.spec.format == "int"
    wise = [m for m in model.modules() if isinstance(m, TokenStaticQuantizer)]
    assert len(wise) == 2 * 5
    for quantizer in wise:
        assert len(quantizer.scale) == 6
        assert torch.equal(quantizer.scale, quantizer.scale.bfloat16().float())


def test_decoding_along_the_released_tokens_would_pick_most_of_them(staged: Staged) -> None:
    (entry,) = (n for n in staged.golden.data.files if n.startswith("q_generate_greedy_seq"))
    model, reference, picked = staged.adapter.model, staged.golden[entry], []
    steps = model.layout.steps(576)

    def draw(probs: Tensor, step: int) -> Tensor:
        picked.append(probs.argmax(dim=-1))
        return reference[:, slice(*steps[step])]

    generate(model, torch.tensor([3]), draw, 1.5)
    assert float((torch.cat(picked, dim=1) == reference).double().mean()) > 0.85  # unquantized: 0.79


def test_the_full_precision_model_is_the_same_before_and_after_all_folds(staged: Staged) -> None:
    staged.check_full_precision()  # it undoes the quantization, so it is the last test

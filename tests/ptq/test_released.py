"""`ptq4arvg_released` against the released code itself, stage by stage, on small RAR and MAR models.

VAR and PAR, whose 680 and 576 tokens take longer, are in files of their own; `released_cases.py` holds what is checked.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.mar.diffusion import cosine_diffusion
from models.mar.sampler import generate as generate_mar
from models.rar.sampler import generate as generate_rar
from ptq.quantizers import StaticQuantizer
from ptq.released_quantizer import RunningQuantizer
from ptq.stwq import TokenStaticQuantizer
from tests.models.test_mar import official_noise
from tests.ptq.released_cases import STAGES, Staged, mean_error


@pytest.fixture(scope="module")
def rar() -> Staged:
    return Staged("rar")


@pytest.fixture(scope="module")
def mar() -> Staged:
    return Staged("mar")


@pytest.fixture(params=["rar", "mar"])
def staged(request: pytest.FixtureRequest) -> Staged:
    return request.getfixturevalue(request.param)


def test_the_smoothing_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_smoothing()


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_folded_weights_are_those_of_the_released_code(staged: Staged, stage: str) -> None:
    staged.check_parameters(stage)


def test_the_gps_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_gps()


def test_the_quantized_outputs_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_outputs()


def test_freezing_leaves_plain_quantizers_and_greedy_ids_of_the_released_code(rar: Staged) -> None:
    model = rar.adapter.model
    kinds = {type(m) for m in model.modules()}
    assert RunningQuantizer not in kinds
    assert {StaticQuantizer, TokenStaticQuantizer} <= kinds
    (entry,) = (n for n in rar.golden.data.files if n.startswith("q_generate_greedy_ids"))
    ids = generate_rar(model, torch.tensor([1, 5]), lambda p, step: p.argmax(-1), 4, 2.75, 1.0)
    assert torch.equal(ids, rar.golden[entry])


def test_quantized_mar_samples_what_the_released_code_does(mar: Staged) -> None:
    (entry,) = (n for n in mar.golden.data.files if n.startswith("q_sample") and "@" not in n)
    model = mar.adapter.model
    order, steps = np.arange(16), cosine_diffusion("5").steps
    np.random.RandomState(3).shuffle(order)
    torch.manual_seed(3)
    tokens = generate_mar(
        model, torch.tensor([2]), torch.from_numpy(order)[None],
        lambda iteration, step, n: official_noise(steps, n, 4, True)(step), 4, 2.9, "linear", 0.0, "5",
    )
    error = mean_error(model.unpatchify(tokens).flatten(), mar.golden[entry].flatten())
    assert error < 0.05  # unquantized: 0.063


def test_the_full_precision_model_is_the_same_before_and_after_all_folds(staged: Staged) -> None:
    staged.check_full_precision()  # it undoes the quantization, so it is the last test

"""`ptq4arvg_released` against the released code itself, stage by stage, on a small model of each
family.

VAR has all 680 positions; that code calibrates it without the attention mask, and so does its
full-precision reference here. PAR has all 576 of PAR-4x. A value that lies within float32's
rounding of the middle between two codes goes up on one processor and down on another; in PAR this
moves some of the 64 channels of w1's input by a step, which the output's bias, a sum that nearly
cancels, shows most. Everything in front of such a flip is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from models.mar.diffusion import cosine_diffusion
from models.mar.sampler import generate as generate_mar
from models.par.sampler import generate as generate_par
from models.rar.sampler import generate as generate_rar
from models.var.sampler import generate as generate_var
from ptq.numbers.quantizers import StaticQuantizer
from ptq.released.running_quantizer import RunningQuantizer
from ptq.released.sequence import ReleasedRun
from ptq.stwq import TokenStaticQuantizer
from ptq.types import CalibrationSet
from tests.models.test_mar import official_noise
from tests.ptq.released.released_cases import (
    CASES,
    STAGES,
    STRICT,
    Staged,
    close,
    mean_error,
    recipe,
)
from tests.reference import Golden


def staged_as(family: str) -> Callable[[], Staged]:
    """The fixture called `family`: its model, quantized once for the module."""

    @pytest.fixture(scope="module", name=family)
    def made() -> Staged:
        return Staged(family)

    return made


rar, mar, var, par = map(staged_as, ("rar", "mar", "var", "par"))


@pytest.fixture(params=["rar", "mar", "var", "par"])
def staged(request: pytest.FixtureRequest) -> Staged:
    return request.getfixturevalue(request.param)


def test_the_smoothing_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_smoothing()


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_folded_weights_are_those_of_the_released_code(
    staged: Staged, stage: str
) -> None:
    staged.check_parameters(stage)


def test_the_gps_scales_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_gps()


def test_the_quantized_outputs_are_those_of_the_released_code(staged: Staged) -> None:
    staged.check_outputs()


def test_freezing_leaves_plain_quantizers_and_the_released_greedy_ids(rar: Staged) -> None:
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
    order = np.arange(16)
    steps = cosine_diffusion("5").steps
    np.random.RandomState(3).shuffle(order)
    torch.manual_seed(3)
    tokens = generate_mar(
        model,
        torch.tensor([2]),
        torch.from_numpy(order)[None],
        lambda iteration, step, n: official_noise(steps, n, 4, True)(step),
        4,
        2.9,
        "linear",
        0.0,
        "5",
    )
    error = mean_error(model.unpatchify(tokens).flatten(), mar.golden[entry].flatten())
    assert error < 0.05  # unquantized: 0.063


def test_zero_points_are_averages_over_minibatches(var: Staged) -> None:
    zero_point = var.run.inputs["blocks.0.attn.mat_qkv"].params.zero_point
    assert bool(((zero_point - zero_point.round()).abs() > 0.05).any())


def test_decoding_var_along_released_tokens_picks_nearly_all_of_them(var: Staged) -> None:
    (entry,) = (n for n in var.golden.data.files if n.startswith("q_greedy_idx"))
    model = var.adapter.model
    reference = var.golden[entry]
    picked = []

    def draw(probs: Tensor, scale: int) -> Tensor:
        picked.append(probs.argmax(dim=-1))
        return reference[:, slice(*model.spans[scale])]

    generate_var(model, var.adapter.quantizer, torch.tensor([3]), draw, 1.5, 0, 0.0)
    # unquantized: 0.76
    assert float((torch.cat(picked, dim=1) == reference).double().mean()) > 0.95


def test_attention_weights_are_powers_of_sqrt2_and_parameters_bfloat16(par: Staged) -> None:
    model = par.adapter.model
    assert isinstance(model.layers[0].attention.pv.a, StaticQuantizer)
    assert model.layers[0].attention.pv.a.spec.format == "log_sqrt2"
    assert model.layers[0].attention.pv.b.spec.format == "int"
    wise = [m for m in model.modules() if isinstance(m, TokenStaticQuantizer)]
    assert len(wise) == 2 * 5
    for quantizer in wise:
        assert len(quantizer.scale) == 6
        assert torch.equal(quantizer.scale, quantizer.scale.bfloat16().float())


def test_decoding_par_along_the_released_tokens_would_pick_most_of_them(par: Staged) -> None:
    (entry,) = (n for n in par.golden.data.files if n.startswith("q_generate_greedy_seq"))
    model = par.adapter.model
    reference = par.golden[entry]
    picked = []
    steps = model.layout.steps(576)

    def draw(probs: Tensor, step: int) -> Tensor:
        picked.append(probs.argmax(dim=-1))
        return reference[:, slice(*steps[step])]

    generate_par(model, torch.tensor([3]), draw, 1.5)
    # 0.94 where nothing flips, 0.79 otherwise, as many as unquantized
    assert float((torch.cat(picked, dim=1) == reference).double().mean()) > 0.7


def test_the_full_precision_model_is_the_same_before_and_after_all_folds(staged: Staged) -> None:
    staged.check_full_precision()  # it undoes the quantization: what needs that stands above


def test_the_mask_is_what_the_layouts_differ_in(var: Staged) -> None:
    golden = Golden("ptq_var_pipeline")
    adapter = var.adapter
    var.check_full_precision()  # it undoes the quantization
    adapter.layout = "inference"
    with torch.no_grad():
        masked = adapter.forward(var.rows)
    assert golden.error("fp_logits", masked) > 0.02
    # the last scale sees all the others with or without a mask, its values differ all the same
    with torch.no_grad():
        first = adapter.forward({k: v[:1] for k, v in var.rows.items()})
        other = {"ids": var.rows["ids"][:1].clone(), "label": var.rows["label"][:1]}
        other["ids"][:, -1] = (other["ids"][:, -1] + 1) % 64
        coarse = slice(0, adapter.model.spans[-1][0])
        assert torch.equal(first[:, coarse], adapter.forward(other)[:, coarse])
        adapter.layout = "released"
        assert not torch.equal(var.full_precision[:1, coarse], adapter.forward(other)[:, coarse])


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize(("weight_bits", "bits"), [(6, 8), (8, 6), (6, 4), (4, 6)])
def test_weights_and_activations_have_bits_of_their_own(
    family: str, weight_bits: int, bits: int
) -> None:
    """The reference is of six bits each: of one width it holds in front of the first rounding,
    whatever the other is."""
    golden = Golden(f"ptq_{family}_pipeline")
    adapter, rows = CASES[family].build(golden)
    adapter.layout = "released"
    adapter.prepare()
    calibration = CalibrationSet(rows, torch.ones(8, dtype=torch.bool))
    run = ReleasedRun(adapter, calibration, recipe(family, bits, weight_bits), 4)
    run.smooth()
    run.first_calibration()

    for name, params in run.weight_params.items():
        scale = params.scale.reshape(-1)
        reference = golden[f"initial|{name}|w.delta"].to(scale.dtype).reshape(-1)
        if weight_bits == 6:
            close(scale, reference, STRICT, name)
        else:  # other percentiles may be best, but no step is that close
            ratio = (reference / scale).median()
            assert (float(ratio) > 2) == (weight_bits > 6), name

    first = next(iter(run.inputs))  # nothing is rounded in front of it
    scale = run.inputs[first].params.scale.reshape(-1)
    reference = golden[f"initial|{first}|in_.delta"].to(scale.dtype).reshape(-1)
    if bits == 6:
        close(scale, reference, STRICT, first)
    else:
        assert (float((reference / scale).median()) > 2) == (bits > 6)

"""`ptq4arvg_released` against the released code itself, stage by stage, on a small RAR with made-up weights.

What a stage computes from full-precision inputs, and the first block, agree to fp32 rounding. Behind a quantizer one
rounding flip moves an activation by a whole step, so later shifted quantities and the logits are compared loosely.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.rar.adapter import RARAdapter
from models.rar.sampler import generate
from models.rar.transformer import RAR
from ptq.quantizers import StaticQuantizer
from ptq.recipe import Recipe
from ptq.released import FirstUse, ReleasedRun
from ptq.stwq import TokenStaticQuantizer
from ptq.types import CalibrationSet, QuantSpec
from tests.reference import Golden, fill

STRICT, FLIPS = 2e-5, 0.05  # of the absolute maximum


class Staged:
    """The released run with what the golden file recorded after every stage."""

    def __init__(self) -> None:
        self.golden = Golden("ptq_rar_pipeline")
        self.model = fill(RAR(48, 2, 4, 192, 16, 40, 10))
        adapter = RARAdapter(self.model)
        rows = {"ids": self.golden["cali_input_ids"], "condition": self.golden["cali_condition"]}
        recipe = Recipe(
            QuantSpec(6, granularity="out_channel"), QuantSpec(6), ("smoothquant", "shift", "gps"), stwq=True,
            exclude_sinks=True, released=True,
        )
        with torch.no_grad():
            self.full_precision = adapter.forward(rows)
            run = ReleasedRun(adapter, CalibrationSet(rows, torch.ones(8, dtype=torch.bool)), recipe)
            run.smooth()
            self.smooth_scales = {name: transform.scale for name, transform in run.online.items()}
            self.logits, self.records = {}, {}
            stages = {"initial": run.first_calibration, "shifted": run.shift, "final": run.scale}
            for stage, act in stages.items():
                before = {name: t.scale for name, t in run.transforms.items()}
                self.logits[stage] = act()
                self.records[stage] = self.record(run)
                self.steps = {name: t.scale / before[name] for name, t in run.transforms.items()}
            run.freeze()

    @staticmethod
    def record(run: ReleasedRun) -> dict[str, dict[str, Tensor]]:
        """Parameters and folded weights by site and by the golden file's names, copied."""
        found: dict[str, dict[str, Tensor]] = {}
        for site in run.sites:
            inputs, weights, linear = run.inputs[site.name].params, run.weight_params[site.name], run.linears[site.name]
            values = {
                "in_.delta": inputs.scale, "in_.zp": inputs.zero_point, "w.delta": weights.scale,
                "w.zp": weights.zero_point, "weight.rowsum": linear.weight.sum(1), "bias": linear.bias,
            }
            found[site.name] = {k: v.detach().reshape(-1).clone() for k, v in values.items()}
        for number, name in enumerate(run.products):
            product = run.model.get_submodule(name)
            for operand, quantizer in (("A", product.a), ("B", product.b)):
                entry = {f"{operand}.delta": quantizer.params.scale, f"{operand}.zp": quantizer.params.zero_point}
                block = f"blocks.{number // 2}.attn.matmul{number % 2 + 1}"
                found.setdefault(block, {}).update({k: v.reshape(-1).clone() for k, v in entry.items()})
        return found


@pytest.fixture(scope="module")
def staged() -> Staged:
    return Staged()


def test_the_full_precision_model_is_the_same(staged: Staged) -> None:
    staged.golden.check("fp_logits", staged.full_precision, STRICT)


def test_the_smoothing_scales_are_those_of_the_released_code(staged: Staged) -> None:
    assert len(staged.smooth_scales) == 5
    for name, scale in staged.smooth_scales.items():
        staged.golden.check(f"smoothquant|{name}|calculate_scales#0", scale, STRICT)


@pytest.mark.parametrize("stage", ["initial", "shifted", "final"])
def test_parameters_and_folded_weights_are_those_of_the_released_code(staged: Staged, stage: str) -> None:
    expected = {n.rpartition("|")[0] for n in staged.golden.data.files if n.startswith(f"{stage}|")}
    assert {f"{stage}|{name}" for name in staged.records[stage]} == expected
    for name, values in staged.records[stage].items():
        for kind, value in values.items():
            loose = stage == "shifted" and not name.startswith("blocks.0") and kind in ("in_.delta", "bias")
            entry = f"{stage}|{name}|{kind}"
            staged.golden.check(entry, value, FLIPS if loose else STRICT)
            if kind.endswith("zp") and not loose:
                assert torch.equal(value, staged.golden[entry].reshape(-1).to(value.dtype)), entry


def test_the_gps_scales_are_those_of_the_released_code(staged: Staged) -> None:
    names = [n for n in staged.golden.data.files if n.startswith("gps|")]
    assert len(names) == 4
    for entry in names:
        staged.golden.check(entry, staged.steps[entry.split("|")[1]], STRICT)


def test_the_quantized_logits_are_those_of_the_released_code(staged: Staged) -> None:
    staged.golden.check("q_logits_initial", staged.logits["initial"], STRICT)
    staged.golden.check("q_logits_shift_recal", staged.logits["shifted"], FLIPS)
    staged.golden.check("q_logits_final", staged.logits["final"], FLIPS)
    assert staged.golden.error("fp_logits", staged.logits["final"]) > FLIPS  # quantization is visible


def test_freezing_leaves_plain_quantizers_and_greedy_ids_of_the_released_code(staged: Staged) -> None:
    kinds = {type(m) for m in staged.model.modules()}
    assert FirstUse not in kinds
    assert {StaticQuantizer, TokenStaticQuantizer} <= kinds
    (entry,) = (n for n in staged.golden.data.files if n.startswith("q_generate_greedy_ids"))
    ids = generate(staged.model, torch.tensor([1, 5]), lambda p, step: p.argmax(-1), 4, 2.75, 1.0)
    assert torch.equal(ids, staged.golden[entry])

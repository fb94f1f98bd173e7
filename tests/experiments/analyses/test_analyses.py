"""Measurements of the paper's other tables and figures: against brute force, on the twins, resumed
and read again."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.analyses import (
    activations,
    approximations,
    invariance,
    measurement,
    perturbation,
    sensitivity,
)
from experiments.analyses.approximations import Layer
from experiments.config.schema import RunConfig
from experiments.registry import tables
from experiments.run import cell
from experiments.run.calibration import quantize_model
from experiments.run.preparation import duplicate_generator
from experiments.run.scoring import score_held_out
from experiments.speed import calibrate
from experiments.speed.result import speed_result
from experiments.store import locks, results
from experiments.table import jobs
from ptq.gps import transform_from_energies
from ptq.types import ConfigError, QuantSpec
from tests.experiments.cells import tiny


@pytest.fixture
def layer() -> Layer:
    """40 tokens of 6 channels, one of them wide, into 5 outputs; 4 bits."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=source, dtype=torch.float64) * torch.tensor(
        [1.0, 2, 0.5, 20, 1, 3]
    )
    weight = torch.randn(5, 6, generator=source, dtype=torch.float64)
    return Layer(
        x,
        weight,
        QuantSpec(4, range="minmax"),
        QuantSpec(4, granularity="out_channel", range="minmax"),
    )


def brute(errors: Tensor, of: Tensor, cross: bool) -> float:
    """Mean over tokens of the squared output error, term by term."""
    total = 0.0
    for n, o in itertools.product(range(len(errors)), range(len(of))):
        for i, j in itertools.product(range(errors.shape[1]), repeat=2):
            if cross or i == j:
                total += (errors[n, i] * of[o, i] * errors[n, j] * of[o, j]).item()
    return total / len(errors)


def test_biases_are_those_of_the_sums_written_out(layer: Layer) -> None:
    dx = layer.rounded_x() - layer.x
    dw = layer.rounded_w() - layer.weight
    found = approximations.step_biases(layer)
    for name, errors, of in (("error_w", layer.x, dw), ("error_x", dx, layer.weight)):
        real = brute(errors, of, True)
        approx = brute(errors, of, False)
        assert found[name]["real"] == pytest.approx(real)
        assert found[name]["approx"] == pytest.approx(approx)
        assert found[name]["bias"] == pytest.approx(abs(approx - real) / real)
    assert found["error_x_rounded"]["approx"] == pytest.approx(brute(dx, layer.rounded_w(), False))
    output = layer.x @ layer.weight.t() - layer.rounded_x() @ layer.rounded_w().t()
    assert found["total"]["real"] == pytest.approx(output.square().sum(dim=1).mean().item())
    assert found["total"]["approx"] == pytest.approx(
        found["error_w"]["real"] + found["error_x"]["real"]
    )


def test_a_common_scale_is_where_eq_10_is_exact(layer: Layer) -> None:
    s = 4.0  # a power of two: steps and codes stay what they are
    dx = layer.rounded_x() - layer.x
    dw = layer.rounded_w() - layer.weight
    assert torch.allclose(layer.rounded_x(torch.full((6,), s)) - layer.x / s, dx / s)
    assert torch.allclose(layer.rounded_w(torch.full((6,), s)) - layer.weight * s, dw * s)


def test_orders_count_pairs_of_channels(layer: Layer) -> None:
    e = layer.energies()
    scale = transform_from_energies(e, "squares", torch.float64).scale
    ranges = layer.x.amax(0) - layer.x.amin(0)
    pairs = [(i, j) for i, j in itertools.permutations(range(6), 2) if ranges[i] > ranges[j]]
    assert len(pairs) == 15
    found = approximations.order_shares(layer)
    assert found["scale_order"] == pytest.approx(
        sum(bool(scale[i] > scale[j]) for i, j in pairs) / 15
    )
    after = ranges / scale
    assert found["range_order"] == pytest.approx(
        sum(bool(after[i] > after[j]) for i, j in pairs) / 15
    )
    before, scaled = (w.amax(1) - w.amin(1) for w in (layer.weight, layer.weight * scale))
    assert found["rows_factor"] == pytest.approx((scaled / before / e.anchor_scale).mean().item())


def test_the_scale_with_cross_terms_lowers_only_the_loss_with_them(
    layer: Layer,
) -> None:
    e = layer.energies()
    wq = layer.rounded_w()
    anchor = approximations.choose_qparams(layer.x[:, e.anchor], layer.activations.at("tensor"))
    dx = approximations.fake_quantize(layer.x, anchor, layer.activations.levels) - layer.x

    def loss(u: Tensor) -> float:
        parts = ((dx * u) @ wq.t()).square().sum() + (
            (layer.x / u) @ (wq - layer.weight).t()
        ).square().sum()
        return parts.item()

    gps, crossed = (
        s / e.anchor_scale
        for s in (layer.gps_scale(), approximations.scale_with_cross_terms(layer))
    )
    assert loss(crossed) < loss(gps)
    assert e.loss(crossed).sum() > e.loss(gps).sum()
    assert e.loss(gps).sum() < e.loss(torch.ones(6, dtype=torch.float64)).sum()


def test_output_errors_without_scaling_are_those_of_both_roundings(layer: Layer) -> None:
    found = approximations.output_errors(layer)
    error = layer.x @ layer.weight.t() - layer.rounded_x() @ layer.rounded_w().t()
    assert found["none"] == pytest.approx(error.abs().mean().item())
    assert found["gps"] < found["none"]


def test_ranges_of_tokens_are_averaged_by_position() -> None:
    x = torch.tensor([[[0.0, 2.0], [1.0, 4.0], [0.0, 1.0]], [[0.0, 4.0], [0.0, 1.0], [0.0, 3.0]]])
    places, ranges = activations.token_ranges(x, torch.tensor([0, 3, 3]))
    assert places.tolist() == [0, 3]
    assert ranges.tolist() == [3.0, 2.0]


def test_agreement_tells_positions_from_classes() -> None:
    by_position = torch.tensor([[1.0, 10.0, 3.0]] * 4)
    assert invariance.agreement(by_position)["position_share"] == pytest.approx(1)
    assert invariance.agreement(by_position)["class_spread"] == 0
    by_class = invariance.agreement(by_position.t().contiguous())
    assert by_class["position_share"] == pytest.approx(0)
    assert by_class["position_spread"] == 0
    column = by_position[0]
    assert by_class["class_spread"] == pytest.approx(
        (column.std(correction=0) / column.mean()).item()
    )


def run(what: str, runs: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return measurement.run_analysis(
        what, tiny(runs, "calib=random", *overrides), options, lambda items, what: items
    )


def kl_of_a_run(config: RunConfig) -> float:
    """KL as a run of the config measures it, without its images."""
    quantized = cell.prepare_run(config)
    original = duplicate_generator(quantized.generator)
    quantize_model(quantized, lambda items, what: items)
    return score_held_out(quantized.generator, original, config, quantized.device)["kl"]


@pytest.mark.parametrize(
    ("what", "method", "model"),
    [
        (what, method, model)
        for what, method in (
            ("approximation", "gps_only"),
            ("ordering", "gps_only"),
            ("invariance", "fp"),
            ("outliers", "fp"),
        )
        for model in tables.find_table(what).models["twin"]
        if model != "rar_twin_plain"
        # ordering is measured on the layers of approximation
        and (what, model) not in (("ordering", "mar_twin"), ("ordering", "par_twin"))
    ],
)
def test_every_measurement_is_finite_on_every_family_of_its_table(
    what: str, method: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "PER_CLASS", 4)
    found = run(what, tmp_path, f"model={model}", f"method={method}")
    assert found["metrics"]
    assert all(abs(v) < 1e6 for v in found["metrics"].values())
    assert (found["cell"]["what"], found["cell"]["model"]) == (what, model)
    path = next(tmp_path.glob(f"{what}-{model}-*/metrics.json"))
    assert results.read_result(path) == found
    before = path.stat().st_mtime_ns
    assert run(what, tmp_path, f"model={model}", f"method={method}") == found
    assert path.stat().st_mtime_ns == before


def test_sinks_and_outliers_are_seen_where_planted_not_in_the_control(
    tmp_path: Path,
) -> None:
    planted, plain = (
        run("outliers", tmp_path, f"model={m}", "method=fp") for m in ("rar_twin", "rar_twin_plain")
    )
    for ratio in ("channel_ratio", "sink_ratio"):
        assert planted["metrics"][ratio] > 2 * plain["metrics"][ratio]
    tokens = planted["detail"]["tokens"]
    assert min(tokens["ranges"][: tokens["sinks"]]) > max(tokens["ranges"][tokens["sinks"] :])


def test_perturbed_models_are_scored_by_trial_and_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perturb() -> dict[str, Any]:
        return run("perturbation", tmp_path, "method=ptq4arvg", "calib.n=4", trials=2, spread=0.3)

    whole = perturb()
    assert len(whole["detail"]["kl"]) == 2
    assert whole["detail"]["kl"][0] != whole["detail"]["kl"][1]
    # the first one is GPS itself
    of_a_run = kl_of_a_run(tiny(tmp_path, "calib=random", "method=ptq4arvg", "calib.n=4"))
    assert whole["metrics"]["kl"] == pytest.approx(of_a_run, rel=1e-6)

    original = perturbation.likelihood.score_likelihood
    calls = []

    def dies(*args: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    (folder,) = tmp_path.glob("perturbation-*")
    shutil.rmtree(folder)
    monkeypatch.setattr(perturbation.likelihood, "score_likelihood", dies)
    with pytest.raises(KeyboardInterrupt):
        perturb()
    again = perturb()
    assert len(calls) == 4  # GPS, one trial, the one that died, and that one again
    assert (again["metrics"], again["detail"]) == (whole["metrics"], whole["detail"])


def test_a_method_without_gps_has_nothing_to_perturb(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method: rtn has no GPS scales to perturb"):
        run("perturbation", tmp_path, "method=rtn", trials=1, spread=0.3)


# every part that leaves something behind where a quantizer is taken away
PARTS = (
    "method=sq_stwq",
    "method.softmax=numerators",
    "method.key_weights=true",
    "method.sink_shift=true",
    "method.per_position=true",
    "method.per_head=true",
    "method.bias_correction=true",
)


@pytest.mark.parametrize(
    ("model", "method"), [("rar_twin", PARTS), ("par_twin", ("method=quarot",))]
)
def test_groups_of_quantizers_are_taken_away_and_put_back(
    model: str, method: tuple[str, ...], tmp_path: Path
) -> None:
    config = tiny(tmp_path, "calib=random", f"model={model}", *method, "eval.n=8")
    partly = sensitivity.PartlyQuantized(cell.prepare_run(config), lambda items, what: items)
    whole = partly.divergence(lambda part: True)
    # transforms, key weights and sink shifts leave the function as it is
    assert partly.divergence(lambda part: False) < 1e-6 * whole
    alone = [partly.alone(group) for group in partly.kind_groups()]
    assert min(alone) > 0
    assert max(alone) < whole
    assert partly.divergence(lambda part: True) == whole
    of_kinds = sum(partly.weight_bits(group) for group in partly.kind_groups())
    assert of_kinds == sum(partly.weight_bits(group) for group in partly.block_groups())


def test_bytes_of_weights_are_those_that_quant_says_of_every_place(tmp_path: Path) -> None:
    overrides = ["method=rtn", "scope=blocks", "quant=w4a8", "calib=random", "eval.n=8"]
    overrides += ["quant.weights.granularity=group", "quant.weights.group_size=64"]
    overrides += ["quant.by_kind.fc2.weights.bits=8", "quant.by_layer.0.fc1.weights.bits=3"]
    overrides += ["quant.by_kind.proj.weights.granularity=out_channel"]
    overrides += ["quant.by_kind.qkv.weights.bits=16"]
    config = tiny(tmp_path, "model=rar_twin", *overrides)
    partly = sensitivity.PartlyQuantized(cell.prepare_run(config), lambda items, what: items)
    blocks = len(partly.block_groups())
    width = 192
    hidden = 4 * width
    in_groups = 8 * hidden * width // 64  # eight bytes for a scale and its zero point
    places = {
        "qkv weights": (16 * blocks * 3 * width**2, 0),
        "proj weights": (4 * blocks * width**2, 8 * blocks * width),
        "fc1 weights": ((4 * blocks - 1) * width * hidden, blocks * in_groups),
        "fc2 weights": (8 * blocks * width * hidden, blocks * in_groups),
        "fc2 inputs": (0, 0),
    }
    for group, (bits, scales) in places.items():
        assert (partly.weight_bits(group), partly.scale_bytes(group)) == (bits, scales)


def test_sensitivity_tells_kl_of_unseen_sequences(tmp_path: Path) -> None:
    overrides = ("method=rtn", "scope=blocks", "eval.n=8")
    found = run("sensitivity", tmp_path, *overrides, seen=6)
    metrics = found["metrics"]
    # means of 6 and of 2 sequences of equal length
    assert metrics["kl"] == pytest.approx(0.75 * metrics["kl_seen"] + 0.25 * metrics["kl_unseen"])
    of_a_run = kl_of_a_run(tiny(tmp_path, "calib=random", *overrides))
    assert metrics["kl"] == pytest.approx(of_a_run, rel=1e-6)
    detail = found["detail"]
    assert set(detail["alone"]) == set(detail["left_out"]) == set(detail["weight_bytes"])
    assert set(detail["scale_bytes"]) == set(detail["alone"])
    assert detail["alone"]["fc1 weights"] > 0
    assert "keys" not in detail["alone"]  # not in scope
    for refused in ("fp", "ptq4arvg_released"):
        with pytest.raises(ConfigError, match=f"method: {refused} has no sensitivity"):
            run("sensitivity", tmp_path, f"method={refused}", seen=6)


def test_settings_are_those_of_the_recipe(tmp_path: Path) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        return run("recipes", tmp_path, *overrides)["detail"]["settings"]

    omniquant = settings("method=omniquant_paper")
    assert (omniquant["training"]["clip_lr"], omniquant["training"]["transform_lr"]) == (5e-3, 1e-2)
    assert (omniquant["training"]["batch"], omniquant["training"]["epochs"]) == (32, 20)
    assert omniquant["activations"].startswith("token_dynamic")
    svdquant = settings("method=svdquant_paper")
    assert (
        svdquant["branch"]["rank"],
        svdquant["branch"]["alpha"],
        svdquant["branch"]["grid"],
    ) == (32, 0.5, False)
    assert settings("method=repq")["attention weights"] == "log_sqrt2"
    smooth = settings("method=smoothquant_paper")
    assert (smooth["alpha"], smooth["sites"], smooth["calibration"]) == (
        0.5,
        ["fc1", "qkv"],
        "8 rows, random",
    )
    assert settings("method=quarot_paper")["rotation"]["offline"] is False


def test_an_unknown_benchmark_is_a_failed_job() -> None:
    found = jobs.run_job(jobs.Job("speed", ("what=nope", "model=rar_b", "seed=0")))
    assert found["error"].startswith("what: 'nope' is not one of")


def test_a_benchmark_is_read_again_and_a_failure_in_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [
        "what=calibrate",
        "model=rar_twin",
        "methods=[rtn]",
        "calib=random",
        "calib.n=4",
        "device=cpu",
        "seed=0",
    ]
    first = speed_result([*own, f"runs={tmp_path}"])
    (folder,) = tmp_path.glob("speed-rar_twin-*")
    assert results.read_result(folder / "metrics.json") == first
    assert first["cost"]["cell_s"] > 0
    assert not any(str(tmp_path) in o for o in first["provenance"]["identity"]["overrides"])
    assert speed_result([*own, f"runs={tmp_path}"]) == first
    with locks.hold_lock(folder), pytest.raises(locks.Busy):
        speed_result([*own, f"runs={tmp_path}"], wait=False)

    def fails(*_: object) -> None:
        raise ConfigError("no rows")

    monkeypatch.setattr(calibrate, "quantize", fails)
    with pytest.raises(
        ConfigError, match=r"^calibrate: rtn: no rows \(1 of 1 failed, see .*calibrate-rar_twin-cpu"
    ):
        speed_result([*own, f"runs={tmp_path / 'other'}"])
    assert not list((tmp_path / "other").glob("*/metrics.json"))

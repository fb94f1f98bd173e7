"""What estimates are exact in: shapes, sizes on disk, and everything that was measured itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.config.compose import configure
from experiments.estimate import cells, costs, model, shapes
from experiments.estimate.cells import Estimator, Quantity, Target, nearness
from experiments.estimate.report import show_bytes, show_seconds
from experiments.images import shards
from models import registry

H200 = Target("cuda", "NVIDIA H200")
METHODS = ("fp", "ptq4arvg")  # a quantized cell is compared with full precision, too
TWIN = shapes.measure_shape("rar_twin")


def batch_cost(name: str, images: int, token_s: float, variant: str = "fp") -> costs.BatchCost:
    """A benchmark's line, on an H200 that it had alone."""
    measured = costs.Measured("NVIDIA H200", 1, False, "a benchmark")
    sampled = model.Sampled(shapes.measure_shape(name), images, model.EAGER, token_s, 0.1)
    return costs.BatchCost(measured, variant, sampled, 1e9)


def test_operations_of_linear_layers_are_two_a_weight_and_row() -> None:
    layer = nn.Linear(3, 5, device="meta")
    rows = torch.zeros(7, 3, device="meta")
    assert shapes.count_operations(lambda: layer(rows)) == 2 * 3 * 5 * 7
    assert shapes.count_products(layer) == 2 * 3 * 5


def test_a_shape_is_counted_on_the_model_itself() -> None:
    preset = registry.PRESETS["rar_twin"]
    transformer = registry.build("rar_twin").transformer
    assert TWIN.weight_bytes == sum(weight.nbytes for weight in transformer.parameters())
    assert TWIN.block_calls == preset.tokens * preset.transformer["num_hidden_layers"]
    # every block's linear layers see every row; AdaLN of a row is as wide as half a block
    block_products = shapes.count_products(transformer.blocks)
    assert TWIN.sequence_operations > (preset.tokens + 1) * block_products
    assert TWIN.sequence_operations < 1.2 * (preset.tokens + 1) * block_products
    assert TWIN.token_operations == 2 * TWIN.sequence_operations


def test_mar_takes_more_with_more_iterations_and_longer_chains() -> None:
    few = shapes.measure_shape("mar_twin", {"num_iter": 4, "diffusion_steps": "ddim25"})
    more = shapes.measure_shape("mar_twin", {"num_iter": 8, "diffusion_steps": "ddim25"})
    longer = shapes.measure_shape("mar_twin", {"num_iter": 4, "diffusion_steps": "ddim50"})
    head = shapes.count_products(registry.build("mar_twin").transformer.diffloss.net)
    assert more.block_calls == 2 * few.block_calls
    assert longer.token_operations - few.token_operations == 2 * 64 * 25 * head


def test_bytes_of_shards_are_those_of_the_files(tmp_path: Path) -> None:
    images = np.zeros((6, 3, 32, 32), np.uint8)
    tokens = np.zeros((6, 64), np.int32)
    for number in range(2):
        shards.write_shard(tmp_path, number, shards.Shard(images, tokens), "run")
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    # ten images in micro-batches of six are twelve
    assert model.shard_bytes(TWIN, 10, 6) == pytest.approx(written, rel=0.1)


def test_a_measurement_estimates_itself_and_its_multiples_exactly() -> None:
    line = batch_cost("rar_twin", 64, token_s=3.0)
    estimator = Estimator(costs.Costs("cuda", batches=[line]), H200)
    config = configure(["model=rar_twin", "method=fp", "eval.n=64", "sampler.microbatch=64"])
    once = estimator.sampling_seconds(config, TWIN, "fp", 64)
    assert once.value == pytest.approx(3.1, rel=1e-12)
    assert once.grade == cells.ELSEWHERE
    thrice = estimator.sampling_seconds(config, TWIN, "fp", 129)  # padded to 192
    assert thrice.value == pytest.approx(3 * 3.1, rel=1e-12)


def test_an_estimate_is_the_ratio_of_shapes_where_products_decide() -> None:
    small = shapes.measure_shape("rar_b")
    large = shapes.measure_shape("rar_l")
    rates = model.Rates(operations=1e12, pixels=1e12)
    ratio = rates.token_seconds(large, 8, model.EAGER) / rates.token_seconds(small, 8, model.EAGER)
    assert ratio == large.token_operations / small.token_operations


def test_constants_of_a_device_give_back_what_they_were_solved_from() -> None:
    true = model.Rates(operations=2e12, pixels=5e11, bytes=3e11, call_s={model.EAGER: 4e-3})
    lines = []
    for name, images, way in (
        ("var_twin", 4096, model.REPLAYED),
        ("rar_twin", 1, model.REPLAYED),
        ("rar_twin", 1, model.EAGER),
    ):
        shape = shapes.measure_shape(name)
        seconds = true.token_seconds(shape, images, way), true.pixel_seconds(shape, images)
        lines.append(model.Sampled(shape, images, way, *seconds))
    solved = model.solve_rates(lines)
    assert solved.call_s[model.EAGER] == pytest.approx(4e-3)
    assert solved.pixels == pytest.approx(5e11)
    assert solved.operations == pytest.approx(2e12, rel=0.1)
    for line in lines:
        again = solved.token_seconds(line.shape, line.images, line.way)
        assert again == pytest.approx(line.token_s, rel=0.15)


def test_calibration_of_var_is_within_its_range_of_that_of_rar() -> None:
    """One committed benchmark foretells the other, method by method."""
    committed = costs.Costs("cuda")
    for result in costs.committed_results("calibrate")[0]:
        costs.add_report(committed, result["detail"], "", here=False)
    known = [entry for entry in committed.calibrations if entry.model == "rar_b"]
    asked = [entry for entry in committed.calibrations if entry.model == "var_d16"]
    estimator = Estimator(costs.Costs("cuda", calibrations=known), H200)
    shape = shapes.measure_shape("var_d16")
    within = 0
    for entry in asked:
        config = configure(["model=var_d16", f"method={entry.method}", "calib=dgc"])
        estimate = estimator.calibration_seconds(config, shape)
        assert estimate.grade == cells.SCALED
        within += estimate.low <= entry.seconds <= estimate.high
    assert within >= 0.9 * len(asked)


def test_sums_are_as_good_as_their_worst_part_that_matters() -> None:
    good = Quantity.within(10.0, 2.0, cells.HERE, "a run")
    bad = Quantity.within(1.0, 2.0, cells.SCALED, "a guess")
    total = cells.add_up([good, bad])
    assert (total.value, total.low, total.high, total.grade) == (11.0, 5.5, 22.0, cells.SCALED)
    assert cells.add_up([good, bad.scaled(0.1)]).grade == cells.HERE
    assert cells.add_up([]).value == 0


def test_durations_and_sizes_read_at_a_glance() -> None:
    assert show_seconds(Quantity.within(7200, 2, cells.HERE, "")) == "2 (1 to 4) h"
    assert show_seconds(Quantity.exactly(42.3)) == "42 s"
    assert show_bytes(Quantity.exactly(9.83e9)) == "9.8 GB"
    assert show_bytes(None) == "–"


def test_constants_explain_what_was_measured_of_released_models() -> None:
    committed = costs.read_costs(Path("none"), "cuda")
    estimator = Estimator(committed, H200)
    released = 0
    for batch in committed.batches:
        line = batch.sampled
        if shapes.is_released(registry.PRESETS[line.shape.name]):
            released += 1
            rates = estimator.rates(batch.variant)
            modelled = rates.token_seconds(line.shape, line.images, line.way)
            assert modelled == pytest.approx(line.token_s, rel=0.3), (line.shape.name, line.way)
    assert released >= 8


def test_a_run_of_this_machine_is_the_nearest(tmp_path: Path) -> None:
    """A run of the CPU that is committed nowhere estimates itself, and twice as many images."""
    here = costs.Measured("x86_64 CPU, 64 threads", 1, True, str(tmp_path))
    run = costs.RunCost(here, TWIN, "fp", "fp", 128, 128, 256, False, 8.0, 3.0)
    read = costs.read_costs(tmp_path, "cpu")
    read.runs.append(run)
    estimator = Estimator(read, Target("cpu", "x86_64 CPU, 64 threads"))
    words = ["model=rar_twin", "method=fp", "sampler.microbatch=128", "eval.sequences=256"]
    once = estimator.estimate(configure([*words, "eval.n=128"]))
    assert once.seconds["sampling"].value == pytest.approx(8.0)
    assert once.seconds["rest"].value == pytest.approx(3.0)
    assert once.total.grade == cells.HERE
    twice = estimator.estimate(configure([*words, "eval.n=256"]))
    assert twice.seconds["sampling"].value == pytest.approx(16.0)


def test_of_equally_near_measurements_those_of_this_machine_come_first() -> None:
    shape = shapes.measure_shape("rar_twin")
    here = costs.Measured("a CPU", 1, True, "runs")
    elsewhere = costs.Measured("a CPU", 1, False, "committed")
    assert nearness(shape, shape, 1.25, here, 3.0) < nearness(shape, shape, 1.25, elsewhere, 0.0)
    assert nearness(shape, shape, 1.6, here, 0.0) > nearness(shape, shape, 1.25, elsewhere, 0.0)


def test_reference_images_count_once_and_distances_of_many() -> None:
    estimator = Estimator(costs.read_costs(Path("nowhere"), "cuda"), H200, reference_images=1000)
    few = configure(["model=rar_b", "method=fp", "eval=tiny"])
    rate = estimator.rates("fp").pixels
    first = estimator.estimate(few, held_out=False).seconds
    second = estimator.estimate(few, held_out=False).seconds
    assert first["judging"].value == pytest.approx(1004 * cells.INCEPTION_OPERATIONS / rate)
    assert second["judging"].value == pytest.approx(4 * cells.INCEPTION_OPERATIONS / rate)
    assert first["distances"].value == 0
    many = [
        cells.count_eigenvalues(configure([f"method={name}", "eval=adm50k"])) for name in METHODS
    ]
    assert many == [2, 3]

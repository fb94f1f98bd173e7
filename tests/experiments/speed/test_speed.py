"""Benchmarks: what is timed, how calibration is scaled to all blocks, and the files that come
out."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.config.compose import configure
from experiments.speed import __main__ as speed
from experiments.speed import (
    baseline,
    baseline_worker,
    blocks,
    calibrate,
    generate,
    random_models,
    timing,
)
from experiments.speed.options import (
    BLOCK_VARIANTS,
    GENERATE_VARIANTS,
    METHODS,
    parse_benchmark,
    with_defaults,
)
from experiments.speed.variants import VARIANTS, Variant, variant_overrides
from models import registry
from ptq import calibration as calib
from ptq.int8.attention import Int8Scores
from ptq.int8.numerators import Int8NumeratorScores
from ptq.modules import QuantLinear
from ptq.recipe import Recipe
from ptq.types import Adapter, CalibrationSet, ConfigError, Track
from tests.experiments.cells import ROOT
from tests.experiments.run.test_families import FEW_STEPS, TOYS, toy

# steps of STAQ's solver: what is tested here does not depend on how good its scales are
TINY = ("calib.n=4", "device=cpu", "method.options.geometric.steps=2")


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, what: str = "calibrate"
) -> dict:
    """The JSON that the command writes."""
    monkeypatch.setattr(sys, "argv", ["speed", f"what={what}", *TINY, f"runs={folder}", *arguments])
    speed.main()
    (path,) = (folder / "speed").iterdir()
    return {"file": path.name, **json.loads(path.read_text())}


def test_the_report_of_a_shipped_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(monkeypatch, tmp_path, "model=rar_twin", "methods=[rtn,ptq4arvg]", "repeats=2")
    assert found["file"] == "calibrate-rar_twin-cpu.json"
    assert (found["weights"], found["quant"], found["rows"], found["blocks"]) == (
        "loaded",
        "w8a8",
        4,
        5,
    )
    assert found["threads"] == torch.get_num_threads()
    assert [line["method"] for line in found["lines"]] == ["rtn", "ptq4arvg"]
    for line in found["lines"]:
        assert len(line["measurements"]) == 2
        assert 0 < line["selection_s"] < line["calibration_s"] < 60
        assert line["calibration_peak_mb"] > found["model_mb"] > 10
        assert line["blocks_trained"] is None
    shown = capsys.readouterr().out
    assert "PTQ4ARVG" in shown
    assert "written: " in shown


@pytest.mark.parametrize("name", TOYS)
def test_released_shapes_are_measured_on_random_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, name, toy(name))
    shallow = ("blocks=1", "method.options.omniquant.epochs=1")
    found = measured(
        monkeypatch, tmp_path, f"model={name}", "methods=[rtn,ptq4arvg,omniquant]", *shallow
    )
    assert found["weights"] == "random"
    assert [line["blocks_trained"] for line in found["lines"]] == [None, None, 1]
    assert not any("error" in line for line in found["lines"])


def test_the_time_of_some_blocks_is_scaled_to_all_and_the_rest_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock of its own: training a block takes 2 seconds, the start 1 and what comes after it
    4."""
    now = [0.0]
    asked = []
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def quantize(
        adapter: Adapter, chosen: CalibrationSet, recipe: Recipe, batch: int, track: Track
    ) -> None:
        asked.append(len(adapter.blocks))
        assert adapter.last_block == adapter.blocks[-1]
        for seconds, what in (
            (1, "omniquant"),
            *((2, f"omniquant, {block}") for block in adapter.blocks),
        ):
            for _ in track([1], what):
                now[0] += seconds
        now[0] += 4

    monkeypatch.setattr(calibrate, "quantize", quantize)
    config = configure(["model=rar_twin", "method=omniquant", *TINY, "calib=random"])
    device = torch.device("cpu")
    generator, _ = random_models.load_or_fill(config, device)
    chosen = calibrate.time_selection(
        generator.adapter, random_models.image_pool(generator, 4, device), config, device
    )
    chosen = replace(chosen, seconds=3.0, peak_mb=1e6)
    for trained in (2, 1, None):
        cost = calibrate.time_quantization(
            copy.deepcopy(generator.adapter), chosen, config, device, trained
        )
        assert (cost.selection_s, cost.calibration_s, cost.peak_mb) == (3, 3 + 1 + 5 * 2 + 4, 1e6)
    assert asked == [2, 1, 5]


@torch.no_grad()
def test_training_of_some_blocks_leaves_a_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(
        ["model=rar_twin", "method=omniquant_paper", *TINY, "method.options.omniquant.epochs=1"]
    )
    device = torch.device("cpu")
    generator, made_up = random_models.load_or_fill(config, device)
    assert not made_up
    adapter = generator.adapter
    chosen = calibrate.time_selection(
        adapter, random_models.image_pool(generator, 4, device), config, device
    )
    calibrate.time_quantization(adapter, chosen, config, device, 2)
    linears = [m for m in adapter.model.modules() if isinstance(m, QuantLinear)]
    assert len(linears) == len([c for s in adapter.sites if s.kind != "embed" for c in s.consumers])
    assert all(linear.weight_params is not None for linear in linears)


def test_methods_a_family_refuses_are_said_where_all_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, overrides = parse_benchmark("calibrate", ["model=mar_twin"])
    configs = calibrate.compose_configs(options, overrides)
    assert list(configs) == METHODS
    refused = [name for name, config in configs.items() if isinstance(config, str)]
    # the released code quantizes MAR's block linears alone, and FPQVAR's floats have no eight bits
    assert refused == ["ptq4arvg_released", "fpqvar"]
    assert "allowed is released" in configs["ptq4arvg_released"]
    assert {config.quant.name for config in configs.values() if not isinstance(config, str)} == {
        "w8a8"
    }


def test_a_method_that_fails_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = toy("var_d16")
    monkeypatch.setitem(
        registry.PRESETS,
        "var_d16",
        replace(shared, transformer={**shared.transformer, "shared_aln": True}),
    )
    with pytest.raises(SystemExit) as stopped:
        measured(monkeypatch, tmp_path, "model=var_d16", "methods=[ptq4arvg_released,rtn]")
    assert stopped.value.code == 1
    (path,) = (tmp_path / "speed").iterdir()
    failed, done = json.loads(path.read_text())["lines"]
    assert "needs a norm or AdaLN" in failed["error"]
    assert done["calibration_s"] > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("what=nope", "what: 'nope' is not one of calibrate, blocks, generate, sample"),
        ("methods=[fp]", "methods: 'fp' is not one of rtn"),
        ("methods=rtm", "methods: 'rtm' is not one of rtn"),
        ("methods=[", "methods: '[' is not one of rtn"),
        ("methods=[]", "methods: [] is an empty list"),
        ("blocks=0", "blocks: 0 is not an integer from 1 to "),
        ("repeats=true", "repeats: true is not an integer from 1 to "),
        ("repeats=null", "repeats: null is not an integer from 1 to "),
        ("method=rtn", "allowed is methods=[rtn]"),
        ("blocks=9", "blocks: 9 is more than the 5 of rar_twin"),
        ("calib.n=5000", "calib.n: 5000 is more than"),
        ("quant=nope", "quant: 'nope' is not one of"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_and_nothing_is_written(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [] if argument.startswith("methods") else ["methods=[rtn]"]
    monkeypatch.setattr(
        sys, "argv", ["speed", "device=cpu", f"runs={tmp_path}", *methods, argument]
    )
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["blocks", "generate", "sample"])
def test_a_method_is_refused_where_variants_have_theirs(what: str) -> None:
    said = rf"^method: quarot is not a setting of what={what}, allowed is variants=\[\.\.\.\]$"
    with pytest.raises(ConfigError, match=said):
        parse_benchmark(what, ["method=quarot"])


@pytest.mark.parametrize("name", [*TOYS, "rar_twin"])
def test_blocks_of_every_family_run_in_all_arithmetics(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = list(VARIANTS)
    if name in TOYS:
        monkeypatch.setitem(registry.PRESETS, name, toy(name))
    else:  # trained weights; all variants run on the toys
        every = ["fp32", "bf16", "simulated", "int8", "int8_stwq", "int8_stwq_all"]
    found = measured(
        monkeypatch,
        tmp_path,
        f"model={name}",
        "batch=2",
        "lengths=[4,6]",
        "rounds=2",
        f"variants=[{','.join(every)}]",
        what="blocks",
    )
    assert found["file"] == f"blocks-{name}-cpu.json"
    assert [(line["variant"], line["length"]) for line in found["lines"]] == [
        (v, n) for n in (4, 6) for v in every
    ]
    assert all(line["median_ms"] > 0 and line["peak_mb"] is None for line in found["lines"])
    size = {v: m["blocks_mb"] for v, m in found["models"].items()}
    assert (
        size["int8_stwq_all"]
        <= size["int8_stwq"]
        < size["bf16"]
        < size["fp32"]
        == size["simulated"]
    )
    free = [r for r in found["ratios"] if (r["of"], r["to"]) == ("int8_stwq", "int8")]
    assert [r["length"] for r in free] == [4, 6]
    assert all(low <= r["ratio"] <= high for r in free for low, high in [r["interval"]])
    assert "int8_stwq / fp32" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["int8_stwq", "int8_stwq_paper", "int8_staq_paper"])
@torch.no_grad()
def test_int8_blocks_compute_nearly_what_the_simulated_ones_do(name: str) -> None:
    own = with_defaults(["model=rar_twin", *TINY])
    config = configure(variant_overrides(VARIANTS[name], own))
    generator, _ = random_models.load_or_fill(config, torch.device("cpu"))
    rows = calib.select_rows(
        "random",
        generator.adapter,
        random_models.image_pool(generator, 8, torch.device("cpu")),
        8,
        0,
        8,
    )
    outputs = []
    for kind in ("float", "simulate", "int8"):
        variant = Variant(kind, torch.float32)
        model = blocks.build_variant(generator.adapter, variant, rows, config)
        outputs.append(blocks.forward_pass(model, "rar", 2, 16, variant)())
    kind = Int8NumeratorScores if "staq" in name else Int8Scores
    assert any(isinstance(m, kind) for m in model.modules()) == name.endswith("_paper")
    exact, simulated, integer = outputs
    assert 0 < (integer - simulated).norm() < 0.7 * (simulated - exact).norm()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lengths=[600]", "lengths: 600 is more than the 65 tokens"),
        ("lengths=[]", "lengths: [] is an empty list"),
        ("variants=[int4]", "variants: 'int4' is not one of fp32"),
        ("rounds=0", "rounds: 0 is not an integer from 1 to "),
        ("batch=x", "batch: x is not an integer from 1 to "),
        ("profile=maybe", "profile: 'maybe' is not a boolean, allowed are true and false"),
    ],
)
def test_a_bad_setting_of_blocks_is_refused_in_one_line(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "speed",
        "what=blocks",
        "model=rar_twin",
        "device=cpu",
        f"runs={tmp_path}",
        "variants=[fp32]",
        argument,
    ]
    monkeypatch.setattr(sys, "argv", given)  # the last of equal keys counts
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert not list(tmp_path.iterdir())


def test_things_compared_take_turns_and_their_ratio_is_that_of_the_rounds() -> None:
    order: list[str] = []
    works = {
        name: timing.Captured(lambda name=name: order.append(name), lambda: None) for name in "abc"
    }
    found = timing.alternate_replays(works, torch.device("cpu"), 5)
    assert order[:6] == list("abcbca")
    assert all(len(times) == 5 for times in found.values())
    ratio = timing.ratio_interval([2.0, 4.2, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert ratio["ratio"] == 2.0
    assert ratio["interval"] == [2.0, 2.1]
    assert timing.summarize_times([3.0]) == {"median_ms": 3.0, "quartiles_ms": [3.0, 3.0]}


@pytest.mark.parametrize("name", ["rar_b", "mar_b"])  # with a KV cache, and without
def test_images_are_generated_in_every_arithmetic(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, name, toy(name))
    variants = "[fp32,bf16,int8_stwq,int8_stwq_paper,int8_staq_paper,simulated]"
    found = measured(
        monkeypatch,
        tmp_path,
        f"model={name}",
        "batch=2",
        "repeats=2",
        f"variants={variants}",
        *FEW_STEPS.get(name, ()),
        what="generate",
    )
    assert found["file"] == f"generate-{name}-cpu.json"
    assert [line["variant"] for line in found["lines"]] == variants[1:-1].split(",")
    for line in found["lines"]:
        assert len(line["all_seconds"]) == 2
        assert line["images_per_s"] == pytest.approx(2 / line["seconds"], rel=0.01)
    sizes = {line["variant"]: line["model_mb"] for line in found["lines"]}
    assert sizes["int8_stwq"] < sizes["bf16"] < sizes["fp32"]


def test_passes_take_turns_with_those_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AR_PTQ_BASELINE_REVISION", "former")
    found = measured(
        monkeypatch,
        tmp_path,
        "model=rar_twin",
        "batch=2",
        "lengths=[4]",
        "rounds=2",
        "variants=[fp32]",
        f"baseline={ROOT}",
        what="blocks",
    )
    assert found["baseline"] == {"revision": "former", "variant": "bf16"}
    (line,) = found["lines"]
    assert line["baseline"] > 0
    low, high = line["speedup_interval"]
    assert low <= line["speedup"] <= high


def test_several_numbers_of_images_are_generated_beside_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker answers within this process, whose models are the toys."""
    monkeypatch.setitem(registry.PRESETS, "rar_b", toy("rar_b"))
    monkeypatch.setattr(generate, "start_baseline", answered_here)
    found = measured(
        monkeypatch,
        tmp_path,
        "model=rar_b",
        "batch=[1,2]",
        "repeats=2",
        "variants=[fp32]",
        "baseline=here",
        what="generate",
    )
    assert found["rows"] == 2
    assert [line["batch"] for line in found["lines"]] == [1, 2]
    for line in found["lines"]:
        assert line["baseline"] > 0
        assert line["baseline_peak_mb"] is None
        assert line["images_per_s"] == pytest.approx(line["batch"] / line["seconds"], rel=0.01)


@pytest.mark.parametrize("name", ["rar_b", "mar_b"])
def test_a_micro_batch_is_timed_as_runs_make_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, name, toy(name))
    overrides = (f"model={name}", "batch=[1,2]", "variants=[fp32,static]", "calib.n=2")
    found = measured(monkeypatch, tmp_path, *overrides, what="sample")
    lines = [(line["variant"], line["way"], line["batch"]) for line in found["lines"]]
    # replayed from CUDA graphs on a GPU alone
    assert lines == [
        ("fp32", "eager", 1),
        ("fp32", "eager", 2),
        ("static", "eager", 1),
        ("static", "eager", 2),
    ]
    for line in found["lines"]:
        seconds = line["tokens_s"] + line["pixels_s"]
        assert line["images_per_s"] == pytest.approx(line["batch"] / seconds, rel=0.01)
        assert line["peak_mb"] > 0


@contextmanager
def answered_here(folder: str, what: str, overrides: list[str]) -> Iterator[baseline.Baseline]:
    """A baseline whose requests a worker in a thread of this process answers."""
    to_worker, from_worker = (Pipe() for _ in range(2))
    thread = threading.Thread(
        target=baseline_worker.answer_requests, args=(to_worker.reader, from_worker.writer)
    )
    thread.start()
    process = SimpleNamespace(stdin=to_worker.writer, stdout=from_worker.reader)
    beside = baseline.Baseline(process)
    beside.begin(what, overrides)
    yield beside
    to_worker.writer.close()
    thread.join()


class Pipe:
    """Two text files: what is written into one is read from the other."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self.reader = os.fdopen(reader)
        self.writer = os.fdopen(writer, "w")


def test_rounds_with_a_baseline_are_compared_one_by_one() -> None:
    told = iter((9.0, 4.0, 6.0, 8.0))  # the first does not count
    works = {"ours": timing.Captured(lambda: None, lambda: None)}
    times = timing.alternate_replays(
        works, torch.device("cpu"), 3, {"baseline": lambda: next(told)}
    )
    assert times["baseline"] == [4.0, 6.0, 8.0]
    found = baseline.compare_with_baseline([2.0, 3.0, 4.0], times["baseline"])
    assert found == {"baseline": 6.0, "speedup": 2.0, "speedup_interval": [2.0, 2.0]}
    assert baseline.compare_with_baseline([2.0], []) == {}


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    def start() -> None:
        with baseline.start_baseline(str(tmp_path), "generate", []) as beside:
            beside.wait()

    with pytest.raises(ConfigError, match=f"baseline: {tmp_path} is no checkout of this project"):
        start()
    former = tmp_path / "experiments" / "speed" / "generate.py"
    former.parent.mkdir(parents=True)
    former.touch()
    with pytest.raises(ConfigError, match="baseline: the checkout cannot run this"):
        start()


def test_the_variants_that_options_name_are_those_there_are() -> None:
    assert list(VARIANTS) == list(BLOCK_VARIANTS)
    assert list(generate.VARIANTS) == list(GENERATE_VARIANTS)

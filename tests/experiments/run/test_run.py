"""A run: what it leaves, that it is not repeated, that a killed one continues as if nothing had
happened, bad input."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.config.compose import validate_config
from experiments.config.schema import RunConfig
from experiments.run import __main__ as run
from experiments.run import cell
from experiments.run.__main__ import describe_figures
from experiments.store import files, locks, results
from models import registry
from models.rar.generator import RARGenerator
from ptq.modules import QuantLinear
from ptq.types import ConfigError
from tests.experiments.cells import TINY, command_line, tiny

FILES = {
    "config.yaml",
    "identity.json",
    "metrics.json",
    "metrics.jsonl",
    "quantization.safetensors",
    "features.safetensors",
    "samples.npz",
    "grid.png",
}
CELL = {
    "model": "rar_twin",
    "method": "ptq4arvg",
    "quant": "w6a6",
    "calib": "dgc",
    "scope": "paper",
    "sampler": "official",
    "eval": "quick",
    "mode": "simulate",
}
PAIRED = {"fid2fp", "paired_distance", "psnr", "token_agreement"}
METRICS = {"fid", "sfid", "is", "precision", "recall", "nll", "kl", "agreement"} | PAIRED
COST = {"calibration_s", "calibration_peak_mb", "sampling_s", "model_bytes", "cell_s", "workers"}
TWIN = registry.ZOO / "rar_twin" / "transformer.safetensors"


class Killed(BaseException):
    """As abrupt as a signal: nothing catches it."""


class Calls:
    """Counts calls of `RARGenerator.sample`; kills the one with the number `fatal`."""

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int | None = None) -> None:
        self.finished = 0
        self.fatal = fatal
        original = RARGenerator.sample

        def sample(generator: RARGenerator, *args: object) -> Tensor:
            if self.finished == self.fatal:
                raise Killed
            tokens = original(generator, *args)
            self.finished += 1
            return tokens

        patch.setattr(RARGenerator, "sample", sample)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished quantized run, and with it the full-precision one."""
    config = tiny(tmp_path_factory.mktemp("finished"))
    cell.run_cell(config)
    return config


def folder_of(config: RunConfig) -> Path:
    return cell.prepare_run(config).folder


def read(config: RunConfig) -> dict:
    return results.read_result(folder_of(config) / "metrics.json")


# --- what a run leaves


def test_a_run_writes_its_folder_and_nothing_else(finished: RunConfig) -> None:
    folder = folder_of(finished)
    fp = folder_of(cell.full_precision_config(finished))
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == FILES
    assert {p.name for p in fp.iterdir() if not p.name.startswith(".")} == FILES - {
        "quantization.safetensors"
    }
    assert {p.name for p in Path(finished.runs).iterdir()} == {folder.name, fp.name, "cache"}
    result = json.loads((folder / "metrics.json").read_text())
    assert folder.name == f"rar_twin-ptq4arvg-w6a6-dgc-s0-{result['provenance']['hash']}"


def test_metrics_json_follows_the_schema(finished: RunConfig) -> None:
    result = read(finished)
    assert set(result) == {"schema", "cell", "seed", "metrics", "cost", "files", "provenance"}
    told_apart = {"config.yaml", "identity.json", "metrics.json", "metrics.jsonl"}
    assert set(result["files"]) == FILES - told_apart
    assert (result["cell"], result["seed"]) == (CELL, 0)
    assert set(result["metrics"]) == METRICS
    assert set(result["cost"]) == COST
    assert all(
        isinstance(v, (int, float)) and np.isfinite(v)
        for v in (result["metrics"] | result["cost"]).values()
    )
    provenance = result["provenance"]
    assert provenance["config"] == OmegaConf.to_container(OmegaConf.structured(finished))
    assert {"selector": "dgc", "rows": 8, "pool": 16}.items() <= provenance["calibration"].items()
    assert len(provenance["calibration"]["fingerprint"]) == 16
    assert {"python", "torch", "device"} <= set(provenance["versions"])


def test_steps_are_compiled_just_before_sampling_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("calib=random", "eval.n=8", "eval.sequences=4")
    config = tiny(tmp_path, "method=rtn", "sampler.compiled=true", *small)
    quantized = []
    with pytest.raises(
        ConfigError, match="sampler.compiled: true needs a GPU, allowed on cpu is false"
    ):
        cell.run_cell(config)
    assert not list(tmp_path.glob("*/config.yaml"))
    monkeypatch.setattr(cell, "require_graphs", lambda generator, device: None)
    monkeypatch.setattr(
        cell,
        "compile_steps",
        lambda generator: quantized.append(
            any(isinstance(m, QuantLinear) for m in generator.transformer.modules())
        ),
    )
    cell.run_cell(config)
    assert quantized == [False, True]  # full precision, then the run
    assert read(config)["provenance"]["identity"]["sampler"]["compiled"] is True


def test_full_precision_has_no_quantization_figures(finished: RunConfig) -> None:
    result = read(cell.full_precision_config(finished))
    assert {k: result["cell"][k] for k in ("method", "quant", "calib", "scope")} == {
        "method": "fp",
        "quant": None,
        "calib": None,
        "scope": None,
    }
    null = {k for k, v in (result["metrics"] | result["cost"]).items() if v is None}
    assert null == PAIRED | {"kl", "calibration_s", "calibration_peak_mb"}
    assert result["metrics"]["nll"] < read(finished)["metrics"]["nll"] + 0.05
    assert result["cost"]["model_bytes"] > 2 * read(finished)["cost"]["model_bytes"]


def test_the_resolved_config_reads_back_as_the_same_run(finished: RunConfig) -> None:
    assert validate_config(OmegaConf.load(folder_of(finished) / "config.yaml")) == finished


def test_images_and_quantization_parameters_can_be_read(finished: RunConfig) -> None:
    folder = folder_of(finished)
    with np.load(folder / "samples.npz") as stored:
        images = stored["arr_0"]
        tokens = stored["tokens"]
    assert (images.shape, images.dtype) == ((16, 32, 32, 3), np.uint8)
    assert (tokens.shape, tokens.dtype) == ((16, 64), np.int32)
    tensors = load_file(folder / "quantization.safetensors")
    assert {
        "blocks.0.attn.qkv.weight.scale",
        "blocks.0.attn.qkv.input.zero_point",
        "blocks.0.attn.pv.b.scale",
        "lm_head.transform.shift",
    } <= set(tensors)
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert tensors["blocks.4.mlp.fc1.input.scale"].shape == (3,)


def test_images_are_compared_with_those_of_full_precision_pair_by_pair(finished: RunConfig) -> None:
    ours, theirs = (
        np.load(folder_of(c) / "samples.npz")
        for c in (finished, cell.full_precision_config(finished))
    )
    metrics = read(finished)["metrics"]
    assert metrics["token_agreement"] == (ours["tokens"] == theirs["tokens"]).mean()
    error = ((ours["arr_0"].astype(float) - theirs["arr_0"]) ** 2).mean((1, 2, 3))
    assert metrics["psnr"] == pytest.approx(
        np.mean(10 * np.log10(255**2 / np.maximum(error, 1 / 12)))
    )
    assert 0 < metrics["paired_distance"] < 2


def test_old_full_precision_runs_without_tokens_are_still_compared_with(
    finished: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(finished.runs, tmp_path / "runs")
    config = RunConfig(**{**vars(finished), "runs": str(tmp_path / "runs")})
    samples = folder_of(cell.full_precision_config(config)) / "samples.npz"
    np.savez(samples, arr_0=np.load(samples)["arr_0"])
    old = results.read_result(samples.with_name("metrics.json"))
    del old["files"]  # nor did they say what lies beside them
    files.write_json(samples.with_name("metrics.json"), old)
    (folder_of(config) / "metrics.json").unlink()
    metrics = cell.run_cell(config)["metrics"]
    assert metrics["token_agreement"] is None
    assert metrics["psnr"] == read(finished)["metrics"]["psnr"]


@pytest.mark.parametrize("damage", [lambda content: content[:-500], lambda content: content[::-1]])
def test_full_precision_whose_images_are_damaged_is_made_anew(
    finished: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:
    full_precision = folder_of(cell.full_precision_config(finished))
    shutil.copytree(full_precision, tmp_path / full_precision.name)
    run_again = cell.prepare_run(RunConfig(**{**vars(finished), "runs": str(tmp_path)}))
    samples = tmp_path / full_precision.name / "samples.npz"
    whole = samples.read_bytes()
    samples.write_bytes(damage(whole))
    cell.run_full_precision(run_again, lambda items, what: items, wait=True)
    assert samples.read_bytes() == whole
    assert f"ignored: {samples}: is damaged" in capsys.readouterr().err


# --- repetition and resumption


def test_a_finished_run_is_read_and_not_repeated(
    finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(finished.runs).rglob("*") if p.is_file()}
    calls = Calls(monkeypatch)
    assert cell.run_cell(finished) == read(finished)
    assert calls.finished == 0
    assert {
        p: p.stat().st_mtime_ns for p in Path(finished.runs).rglob("*") if p.is_file()
    } == before


def test_full_precision_and_the_pool_are_shared_by_all_methods(
    finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp = folder_of(cell.full_precision_config(finished)) / "metrics.json"
    before = fp.stat().st_mtime_ns
    calls = Calls(monkeypatch)
    rtn = tiny(Path(finished.runs), "method=rtn", "quant=w8a8")
    result = cell.run_cell(rtn)
    # micro-batches of its own images; the pool is that of the other method
    assert calls.finished == 2
    assert fp.stat().st_mtime_ns == before
    one, other = (r["provenance"]["calibration"]["fingerprint"] for r in (result, read(finished)))
    assert one == other
    shutil.rmtree(folder_of(rtn))


# micro-batches: two of full precision, one of the pool, two of the quantized model
@pytest.mark.parametrize(("fatal", "left"), [(1, 4), (1, 1)])
def test_a_killed_run_continues_with_byte_identical_results(
    finished: RunConfig, tmp_path: Path, fatal: int, left: int
) -> None:
    config = tiny(tmp_path)
    in_full_precision = left > 1
    if not in_full_precision:
        shutil.copytree(finished.runs, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(folder_of(config))
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, fatal)
        with pytest.raises(Killed):
            cell.run_cell(config)
        assert calls.finished == fatal
    assert not (folder_of(config) / "metrics.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        result = cell.run_cell(config)
        assert calls.finished == left  # what was finished is not sampled again
    for method in (config, cell.full_precision_config(config)):
        other = cell.prepare_run(RunConfig(**{**vars(method), "runs": finished.runs})).folder
        for name in FILES - {"config.yaml", "metrics.json", "metrics.jsonl", "grid.png"}:
            mine = folder_of(method) / name
            assert mine.exists() == (other / name).exists()
            assert not mine.exists() or mine.read_bytes() == (other / name).read_bytes(), name
    assert result["metrics"] == read(finished)["metrics"]
    # part of the time is not known
    assert (result["cost"]["sampling_s"] is None) == (not in_full_precision)
    assert not list(tmp_path.rglob("shards"))


def test_a_second_process_waits_for_the_first_and_reads_its_result(
    finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(finished)
    calls = Calls(monkeypatch)
    found = []
    hidden = folder / "metrics.json.away"
    with locks.hold_lock(folder):
        (folder / "metrics.json").rename(hidden)
        thread = threading.Thread(target=lambda: found.append(cell.run_cell(finished)))
        thread.start()
        thread.join(2.0)
        assert thread.is_alive()
        hidden.rename(folder / "metrics.json")
    thread.join(60)
    assert found == [read(finished)]
    assert calls.finished == 0


def test_multirun_runs_every_method_once(tmp_path: Path) -> None:
    done = command_line(
        "-m", *TINY, "eval.n=1", f"runs={tmp_path}", "method=rtn,smoothquant", "calib=random"
    )
    assert done.returncode == 0, done.stderr
    names = sorted(p.parent.name.rpartition("-")[0] for p in tmp_path.glob("*/metrics.json"))
    assert names == [
        "rar_twin-fp-s0",
        "rar_twin-rtn-w6a6-random-s0",
        "rar_twin-smoothquant-w6a6-random-s0",
    ]
    assert done.stdout.count("results: ") == 2


# --- bad input


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command says on stderr as it exits, in this process."""
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert isinstance(caught.value.code, str)  # printed on stderr, exit status 1
    assert "\n" not in caught.value.code
    return caught.value.code


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("method=ptq4arv", "method: 'ptq4arv' is not one of fp,"),
        ("method.gsp=true", "method.gsp: no such field, allowed are name,"),
        ("seed=one", "seed: 'one' is not an integer from 0 to 9223372036854775807"),
        ("quant.weights.bits=9", "quant.weights.bits: 9 is not an integer from 2 to 8"),
        ("calib.n=0", "calib.n: 0 is not an integer from 1 to 100000"),
        ("model.name=rar_twn", "model.name: 'rar_twn' is not one of"),
        (
            "sampler.settings.guidance=2",
            "sampler.settings.guidance: no such setting, allowed are guidance_scale,",
        ),
        (
            "sampler.settings.temperature=0",
            "sampler.settings.temperature: 0 is not a number from 1e-06 to 1000",
        ),
        (
            "sampler.settings.guidance_scale=big",
            "sampler.settings.guidance_scale: 'big' is not a number from 0 to 1000",
        ),
        (
            "sampler.settings.guidance_scale=nan",
            "sampler.settings.guidance_scale: nan is not a number from",
        ),
        ("sampler.name=mine", "sampler.name: 'mine' is not one of official, ptq4arvg"),
        ("eval.sequences=2001", "eval.sequences: 2001 is more than the 2000 that ship"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, said: str
) -> None:
    assert refusal(monkeypatch, *TINY, f"runs={tmp_path}", given).startswith(f"error: {said}")
    assert not list(tmp_path.rglob("*.*"))


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(monkeypatch, *TINY, f"runs={tmp_path}", "device=cuda")
    assert line == "error: device: cuda is not available here, allowed are auto and cpu"


def truncated(path: Path) -> None:
    path.write_bytes(TWIN.read_bytes()[:1000])


def foreign(path: Path) -> None:
    shutil.copy(registry.ZOO / "extractor.safetensors", path)


def edited(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = load_file(TWIN)
        state[key] = change(state[key].float()).contiguous()
        save_file(state, path)

    return write


def poke(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[200] = value
        return tensor

    return change


UNFIT = "weights: {path} does not fit RAR: "


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: None, "weights: {path} is missing, expected a file"),
        (truncated, "weights: {path} cannot be read ("),
        (foreign, UNFIT),
        (edited("lm_head.bias", lambda t: t[:-1]), UNFIT + "1 misshapen keys (lm_head.bias (511,)"),
        (
            edited("blocks.1.mlp.fc1.weight", poke(float("nan"))),
            "weights: {path} holds NaN or infinity (blocks.1.mlp.fc1.weight: 1 of ",
        ),
        (
            edited("blocks.1.mlp.fc1.bias", poke(float("inf"))),
            "weights: {path} holds NaN or infinity (blocks.1.mlp.fc1.bias: 1 of ",
        ),
        (
            edited("blocks.1.adaLN_modulation.1.bias", poke(3e38)),
            "logits: NaN or infinity on held-out tokens",
        ),
    ],
    ids=[
        "missing",
        "truncated",
        "foreign",
        "misshapen",
        "nan weight",
        "infinite bias",
        "nan activations",
    ],
)
def test_a_bad_checkpoint_ends_in_one_line_and_leaves_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "weights.safetensors"
    runs = tmp_path / "runs"
    damage(path)
    line = refusal(monkeypatch, *TINY, f"runs={runs}", f"model.weights={path}")
    assert line.startswith(f"error: {said.format(path=path)}")
    names = {p.name for p in runs.rglob("*") if p.is_file()}
    assert names <= {"config.yaml", "identity.json", "metrics.jsonl", ".lock"}


def test_the_real_command_line_says_it_on_stderr_and_fails(tmp_path: Path) -> None:
    done = command_line(*TINY, f"runs={tmp_path}", "method=nonsense")
    assert done.returncode != 0
    assert done.stderr.startswith("error: method: 'nonsense' is not one of fp, ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_run_shows_no_figure_that_its_images_are_too_few_for() -> None:
    result = {
        "metrics": {"kl": 0.0213, "fid": 26.0, "recall": 0.5, "sfid": None},
        "cost": {"calibration_s": 2.0},
        "provenance": {"images": 4},
    }
    assert list(describe_figures(result)) == [
        "kl=0.0213  calibration_s=2",
        "4 images are too few for FID, Rec., not shown.",
    ]
    result["provenance"]["images"] = 10_000
    assert len(list(describe_figures(result))) == 1

"""Cells whose images are sampled in shards and judged by the evaluator; a twin stands in for a
released model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.identity.results import read_counting
from experiments.run import cell
from experiments.sample import __main__ as sample_command
from experiments.store import results
from experiments.table import paper_scale
from experiments.table.paper_scale import Judging
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError
from tests.experiments.cells import TINY, config_of

FASHION = Judging(extractor="fashion")


def overrides(runs: Path, *more: str) -> list[str]:
    return ["model=rar_twin", *TINY, f"runs={runs}", *more]


@pytest.fixture
def sampled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in this process: a new one imports for as long as it samples."""

    def run_here(command: list[str], *_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "experiments.sample"]
        monkeypatch.setattr(sys, "argv", command[2:])
        sample_command.main()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(paper_scale, "run_child", run_here)


@pytest.mark.usefixtures("sampled_here")
def test_a_quantized_cell_is_sampled_judged_compared_and_then_read(
    tmp_path: Path,
) -> None:
    given = overrides(tmp_path, "method=rtn", "quant=w6a6")
    result = paper_scale.run_cell(config_of(*given), given, FASHION)
    assert (
        result["cell"] | {"model": "rar_twin", "method": "rtn", "quant": "w6a6"} == result["cell"]
    )
    for name in ("fid", "sfid", "is", "precision", "recall", "fid2fp", "psnr", "token_agreement"):
        assert result["metrics"][name] is not None
    # what a run of the same model has
    alone = cell.run_cell(config_of(*overrides(tmp_path / "alone", "method=rtn", "quant=w6a6")))
    for name in ("kl", "nll"):
        assert result["metrics"][name] == alone["metrics"][name]
    assert result["provenance"]["sequences"] == alone["provenance"]["sequences"] == 8
    assert result["cost"]["model_bytes"] == alone["cost"]["model_bytes"]
    assert result["cost"]["calibration_s"] > 0
    assert result["cost"]["calibration_peak_mb"] > 0
    assert result["provenance"]["images"] == 16
    assert result["cost"]["cell_s"] > result["cost"]["sampling_s"] > 0
    found = [read_counting(path) for path in sorted(tmp_path.glob("*/metrics.json"))]
    assert [r["cell"]["method"] for r in found] == ["fp", "rtn"]
    fp = results.read_result(next(tmp_path.glob("rar_twin-fp-*/metrics.json")))
    assert (fp["metrics"]["kl"], fp["cost"]["calibration_s"]) == (None, None)
    assert fp["metrics"]["nll"] > 0
    shards = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/images/shards/*.npz")}
    assert len(shards) == 4
    assert paper_scale.run_cell(config_of(*given), given, FASHION) == result
    judged = paper_scale.run_cell(
        config_of(*given), given, Judging(extractor="fashion", prc_dtype="float64")
    )
    # another judgement of the same images
    assert judged["provenance"]["hash"] != result["provenance"]["hash"]
    assert judged["cost"]["sampling_s"] is None
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/images/shards/*.npz")} == shards


def test_figures_belong_to_what_the_files_hold_that_judge(tmp_path: Path) -> None:
    reference = tmp_path / "reference.npz"
    config = config_of(*overrides(tmp_path, "method=fp"))
    folders = set()
    for content in (b"one", b"two"):
        reference.write_bytes(content)
        paper_scale.cached_digest.cache_clear()
        folders.add(
            paper_scale.Place.of(
                config, Judging(reference=str(reference), extractor="fashion")
            ).folder
        )
    assert len(folders) == 2
    with pytest.raises(CheckpointError, match="^reference: nowhere.npz cannot be read"):
        paper_scale.Place.of(config, Judging(reference="nowhere.npz", extractor="fashion"))


def test_what_sampling_says_is_the_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="^sample: quant.weights.bits: 9 is not an integer from 2 to 8, or 16$"
    ):
        paper_scale.sample_images(
            overrides(tmp_path, "method=rtn", "quant.weights.bits=9"), tmp_path / "images", 1
        )


@pytest.mark.parametrize(
    ("judging", "message"),
    [
        (Judging(), "reference: missing, give VIRTUAL_imagenet256_labeled.npz or another$"),
        (Judging(extractor="nope"), "extractor: 'nope' is not one of"),
        (
            Judging(reference="nowhere.npz", extractor="fashion"),
            "reference: nowhere.npz is no file",
        ),
    ],
)
def test_what_cannot_judge_is_refused_beforehand(judging: Judging, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judging.check()


def test_several_gpus_are_a_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(
        paper_scale, "run_child", lambda command, *_: commands.append(command) or Done
    )
    paper_scale.sample_images(["model=rar_b"], tmp_path, 4)
    assert commands[0][1:7] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "4",
        "-m",
    ]
    assert commands[0][7:] == [
        "experiments.sample",
        "model=rar_b",
        "format=shards",
        "measure=true",
        f"out={tmp_path}",
    ]

"""`experiments.sample`: the same bytes however many processes, kills and calls; other runs and bad
input refused."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.images import shards
from experiments.images.image_sets import open_images
from experiments.images.shards import StorageError
from experiments.run import calibration, cell
from experiments.sample import __main__ as command
from experiments.sample import sampling
from experiments.sample.options import Options, parse
from experiments.sample.sampling import Workers
from experiments.store import files
from models.rar.generator import RARGenerator
from ptq.files import seal_object
from ptq.numbers.numerics import NonFiniteError
from ptq.omniquant import omniquant
from ptq.types import Adapter, ConfigError
from tests.experiments.cells import ROOT, config_of, tiny

TINY = ["model=rar_twin", "sampler.microbatch=3", "calib.n=6", "eval.sequences=8", "device=cpu"]
FP = [*TINY, "method=fp"]
RTN = ["method=rtn", "quant=w6a6", "calib=random"]
N = 10  # four micro-batches, the last one padded


def run(runs: Path, *overrides: str, **options: object) -> Path:
    """A run of this process alone; returns its folder."""
    base = TINY if any(o.startswith("method=") for o in overrides) else FP
    return sampling.sample_run(
        Options(**{"n": N, **options}), [*base, f"runs={runs}", *overrides], Workers()
    )


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node 2 -m experiments.sample ARGUMENTS`."""
    two = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "experiments.sample",
    ]
    return subprocess.run(
        [sys.executable, *two, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def copied(folder: Path, runs: Path) -> Path:
    """The same run below other `runs`."""
    return Path(shutil.copytree(folder, runs / "samples" / folder.name))


def contents(folder: Path) -> dict[str, bytes]:
    """Shards and what was made of them, by name; not the manifest, which says when and where."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".npz", ".png")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


class Calls:
    """Counts calls of `RARGenerator.sample`, and keeps the image indices."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.index: list[list[int]] = []
        original = RARGenerator.sample

        def counted(
            generator: RARGenerator, labels: Tensor, seed: int, index: Tensor, settings: dict
        ) -> Tensor:
            self.index.append(index.tolist())
            return original(generator, labels, seed, index, settings)

        patch.setattr(RARGenerator, "sample", counted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run in one process."""
    return run(tmp_path_factory.mktemp("finished"))


def test_what_a_run_leaves(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names == {".lock", "grid.png", "manifest.json", "samples.npz", "shards"}
    assert sorted(p.name for p in (finished / "shards").iterdir()) == [
        f"{k:05d}.npz" for k in range(4)
    ]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert finished.name == f"rar_twin-fp-s0-{manifest['run']}"
    assert finished.parent.name == "samples"
    assert {k: manifest[k] for k in ("images", "classes", "microbatch", "rounding")} == {
        "images": N,
        "classes": 10,
        "microbatch": 3,
        "rounding": "round",
    }
    assert manifest["cell"]["method"] == "fp"
    assert manifest["provenance"]["versions"][0]["torch"] == metadata.version("torch")
    images = np.load(finished / "samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((N, 32, 32, 3), np.uint8)
    assert open_images("samples", finished).tokens().shape == (N, 64)


def test_two_processes_make_the_same_files_as_one(finished: Path, tmp_path: Path) -> None:
    done = torchrun(*FP, f"runs={tmp_path}", f"n={N}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 images: ") == 1
    assert contents(tmp_path / "samples" / finished.name) == contents(finished)
    (line,) = re.findall("^sampling: .*$", done.stderr, re.MULTILINE)  # of all processes together
    # process 0 makes six of them; of the other's micro-batches some may be unfinished at its end
    rate = r"[\d.e+]+ a second"
    left = r"(, [\d:]+ left)?"
    assert re.fullmatch(rf"sampling: (6|9|10) of 10 images, {rate}{left}", line)


@pytest.mark.parametrize(
    ("rank", "world", "expected"), [(0, 2, [0, 2]), (1, 2, [1, 3]), (2, 3, [2])]
)
def test_a_process_makes_every_wth_micro_batch(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rank: int,
    world: int,
    expected: list[int],
) -> None:
    every = [0, 1, 2, 3]  # process 0 says what is missing, the others say nothing
    monkeypatch.setattr(
        Workers, "agree", lambda self, value: [every if value is None else value] * self.world
    )
    calls = Calls(monkeypatch)
    out = tmp_path / "out"
    options = Options(n=N, out=str(out), format="shards")
    workers = Workers(rank, world)
    if rank == 0:
        with pytest.raises(
            ConfigError, match="lacks 2 micro-batches; do all nodes share this folder"
        ):
            sampling.sample_run(options, FP, workers)
    else:
        sampling.sample_run(options, FP, workers)
    assert [index[0] // 3 for index in calls.index] == expected
    for number in expected:
        path = shards.shard_path(out / "shards", number)
        assert path.read_bytes() == shards.shard_path(finished / "shards", number).read_bytes()


def killed(when: Callable[[], bool], after: float, work: Callable[[], object]) -> bool:
    """Do the work in a child that gets SIGKILL so many seconds after `when`; whether it was still
    running then."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    while not when() and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_random_points_and_started_again(finished: Path, tmp_path: Path) -> None:
    """Kills fall at a random time after the run begins, and after one, two and three micro-batches
    are finished."""

    def shards_there() -> int:
        return len(list(tmp_path.glob("samples/*/shards/*.npz")))

    draw = random.Random(time.time_ns())
    for wanted in range(4):
        delay = draw.uniform(0, 0.3)
        assert (
            killed(lambda wanted=wanted: shards_there() >= wanted, delay, lambda: run(tmp_path))
            or wanted == 3
        )
        assert shards_there() >= wanted
    folder = run(tmp_path)
    assert contents(folder) == contents(finished)
    assert not [p for p in folder.rglob("*") if ".tmp" in p.name]


def test_only_what_is_missing_is_sampled_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path)
    calls = Calls(monkeypatch)
    shards.shard_path(folder / "shards", 3).unlink()
    damaged = shards.shard_path(folder / "shards", 1)
    damaged.write_bytes(damaged.read_bytes()[:500])
    (folder / "shards" / "00002.tmp77").write_bytes(b"half a shard of a killed process")
    (folder / "samples.npz").unlink()
    run(tmp_path)
    assert calls.index == [[3, 4, 5], [9, 10, 11]]
    assert contents(folder) == contents(finished)
    before = (folder / "samples.npz").stat().st_mtime_ns
    run(tmp_path)
    assert len(calls.index) == 2
    assert (folder / "samples.npz").stat().st_mtime_ns == before
    assert not list(folder.rglob("*.tmp*"))


def test_more_images_add_to_fewer_and_other_formats_need_no_sampling(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, n=4)
    assert len(np.load(folder / "samples.npz")["arr_0"]) == 4
    calls = Calls(monkeypatch)
    assert run(tmp_path, n=None, n_per_class=1, format="png") == folder
    assert [index[0] for index in calls.index] == [6, 9]
    assert run(tmp_path, n=4, format="shards") == folder
    assert open_images("samples", folder).n == 4
    assert len(calls.index) == 2
    found = np.concatenate(list(open_images("samples", folder / "png").chunks(5)))
    assert np.array_equal(found.transpose(0, 2, 3, 1), np.load(finished / "samples.npz")["arr_0"])


def test_the_number_of_images_is_the_evaluations_unless_it_is_given(
    finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path)
    run(tmp_path, "eval.n=7", n=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["images"], manifest["cell"]["eval"]) == (7, "quick")
    run(tmp_path, n=8)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["images"], manifest["cell"]["eval"]) == (8, None)
    assert config_of("eval=adm50k").eval.n == 50_000


def test_rounding_is_part_of_the_run(finished: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, rounding="truncate", n=6)
    assert folder.name != finished.name
    truncated, rounded = (
        np.load(f / "samples.npz")["arr_0"][:6].astype(int) for f in (folder, finished)
    )
    assert set(np.unique(rounded - truncated)) == {0, 1}


# --- quantized models


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("quantized"), *RTN, n=6)


def test_the_images_are_those_of_experiments_run(
    quantized: Path, finished: Path, tmp_path: Path
) -> None:
    """Cells of the same model, method, seed and micro-batch sample the same images and tokens."""
    assert quantized.name.startswith("rar_twin-rtn-w6a6-random-s0-")
    config = tiny(tmp_path, *RTN, "sampler.microbatch=3", "calib.n=6", "eval.n=6")
    cell.run_cell(config)
    for method, folder in ((config, quantized), (cell.full_precision_config(config), finished)):
        with np.load(cell.prepare_run(method).folder / "samples.npz") as stored:
            assert np.array_equal(stored["arr_0"], np.load(folder / "samples.npz")["arr_0"][:6])
            assert np.array_equal(stored["tokens"], open_images("samples", folder).tokens()[:6])
    assert len(json.loads((quantized / "manifest.json").read_text())["quantization"]) == 16


def test_a_finished_quantized_run_is_not_calibrated_again(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "quantize_model", lambda *_: pytest.fail("calibrated"))
    assert run(quantized.parents[1], *RTN, n=6) == quantized


def test_shards_of_another_calibration_are_not_continued(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.shard_path(quantized / "shards", 1).rename(quantized / "kept")
    original = calibration.quantize_model

    def shaken(*args: object) -> object:
        found = original(*args)
        args[0].generator.transformer.blocks[0].attn.qkv.input.scale.mul_(1.001)
        return found

    try:
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "quantize_model", shaken)
            with pytest.raises(
                ConfigError,
                match="calibration: the quantized model differs from that of the shards",
            ):
                run(quantized.parents[1], *RTN, n=6)
    finally:
        (quantized / "kept").rename(shards.shard_path(quantized / "shards", 1))


def test_processes_that_calibrate_differently_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(self: Workers, value: object) -> list:
        digests = isinstance(value, str)
        return [value, "another"] if digests else [value, value]

    monkeypatch.setattr(Workers, "agree", agree)
    with pytest.raises(ConfigError, match="calibration: 2 different results on 2 equal processes"):
        sampling.sample_run(Options(n=6), [*TINY, *RTN, f"runs={tmp_path}"], Workers(0, 2))


def test_what_a_method_trains_is_kept_beside_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    original = omniquant.train_block

    def counted(adapter: Adapter, block: str, *rest: object) -> omniquant.TrainedBlock:
        trained.append(block)
        return original(adapter, block, *rest)

    monkeypatch.setattr(omniquant, "train_block", counted)
    settings = (
        "method=omniquant_paper",
        "calib=random",
        "calib.n=4",
        "method.options.omniquant.epochs=1",
    )
    folder = run(tmp_path, *settings, n=3)
    assert trained == [f"blocks.{i}" for i in range(5)]
    assert (folder / calibration.TRAINED).is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "samples"}
    trained.clear()
    images = open_images("samples", run(tmp_path, *settings, n=6))
    assert (images.n, trained) == (6, [])


# --- bad input


def test_a_folder_of_another_run_is_refused(finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(ConfigError) as caught:
        run(finished.parents[1], "seed=1", out=str(finished))
    assert (
        str(caught.value)
        == f"out: {finished} holds samples of another run (seed is 0 there, 1 here)"
    )
    with pytest.raises(
        ConfigError, match=r"another run \(.*sampler.microbatch is 3 there, 8 here\)"
    ):
        run(finished.parents[1], "sampler.microbatch=8", out=str(finished))
    assert contents(finished) == before


def test_shards_put_together_from_two_runs_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path) / "shards"
    run_of_it = finished.name.rpartition("-")[2]
    shards.write_shard(folder, 1, shards.read_shard(folder, 1, run_of_it), "ffff0000")
    with pytest.raises(
        ConfigError, match=f"micro-batch 1 of the run 'ffff0000', expected 1 of '{run_of_it}'"
    ):
        run(tmp_path)


def test_another_machine_is_warned_of(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    elsewhere = json.loads(json.dumps(manifest))
    elsewhere["provenance"]["versions"][0]["device"] = "another device"
    (finished / "manifest.json").write_text(json.dumps(seal_object(elsewhere)))
    run(finished.parents[1])
    assert "was begun elsewhere: device is another device there, " in capsys.readouterr().err
    found = json.loads((finished / "manifest.json").read_text())
    assert [v["device"] for v in found["provenance"]["versions"]][0] == "another device"
    assert len(found["provenance"]["versions"]) == 2
    (finished / "manifest.json").write_text(json.dumps(manifest))


def test_a_full_disk_keeps_what_is_finished(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = np.lib.format.write_array
    room = 2
    written: list[np.ndarray] = []  # images of micro-batches

    def full(file: object, array: np.ndarray, **options: object) -> None:
        if array.ndim == 4:
            written.append(array)
        if len(written) > room:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, array, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        patch.setattr(sys, "argv", ["sample", *FP, f"runs={tmp_path}", f"n={N}"])
        with pytest.raises(SystemExit) as caught:
            command.main()
    said = str(caught.value.code)
    assert said.startswith("error: samples: ")
    assert said.endswith(
        "cannot be written (No space left on device); what is finished is kept, "
        "and the same command continues from there"
    )
    assert sorted(p.name for p in tmp_path.glob("samples/*/shards/*")) == ["00000.npz", "00001.npz"]
    calls = Calls(monkeypatch)
    assert contents(run(tmp_path)) == contents(finished)
    assert len(calls.index) == 2


def test_a_manifest_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(
        StorageError, match=r"manifest.json cannot be written \(No space left on device\)"
    ):
        run(tmp_path)


def test_images_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        RARGenerator,
        "decode",
        lambda self, tokens: torch.full((len(tokens), 3, 32, 32), float("nan")),
    )
    with pytest.raises(NonFiniteError, match="images: micro-batch 0 contains NaN or infinity"):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["n=5", "n_per_class=2"], "n, n_per_class: both are given, allowed is one of them"),
        (["n=0"], "n: 0 is not an integer from 1 to 10000000"),
        (["n_per_class=-1"], "n_per_class: -1 is not an integer from 1 to 1000000"),
        (["n=many"], "n: many is not an integer from 1 to 10000000"),
        (["n=5", "rounding=up"], "rounding: 'up' is not one of round, truncate"),
        (["heldout=images"], "heldout: images alone need none, it goes with measure=true"),
        (["n=5", "format=jpg"], "format: 'jpg' is not one of npz, png, shards"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert str(caught.value).startswith(said)


def test_options_are_told_from_overrides() -> None:
    options, overrides = parse(
        ["model=rar_twin", "n=12", "method.gps=false", "out=a/b", "format=png"]
    )
    assert options == Options(n=12, out="a/b", format="png")
    assert overrides == ["model=rar_twin", "method.gps=false"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["n=4", "method=nonsense"], "error: method: 'nonsense' is not one of fp, "),
        (
            ["n=4", "model.weights=none.safetensors"],
            "error: weights: none.safetensors is missing, expected a file",
        ),
        (["n=4", "n_per_class=1"], "error: n, n_per_class: both are given, allowed is one of them"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", "model=rar_twin", f"runs={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert str(caught.value.code).startswith(said)
    assert "\n" not in str(caught.value.code)
    assert not list(tmp_path.iterdir())

"""What the system refuses is one line for every command, and leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiments.evaluate import __main__ as evaluate
from experiments.images import image_sets, shards
from experiments.registry import sweeps
from experiments.render import __main__ as render
from experiments.run import __main__ as run
from experiments.store import files, results
from experiments.train_zoo.loop import save_atomically
from models import __main__ as models_command
from models.weights import conversions
from models.weights.checkpoints import CheckpointError, read_checkpoint
from ptq.files import TEMPORARY, write_tensors
from ptq.spec import ConfigError
from tests.experiments.evaluate.evaluations import Case

ROOT = Path(__file__).parents[2]
CODES = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.EMFILE)
LONG = "n" * 300

# --- every command, where renaming fails at the one writer


def start_evaluate(case: Case) -> Callable[[], None]:
    sys.argv[1:] = [
        f"samples={case.samples}",
        f"reference={case.reference()}",
        f"cache={case.folder / 'cache'}",
        "device=cpu",
        f"out={case.folder / 'out.json'}",
    ]
    return evaluate.main


def start_render(case: Case) -> Callable[[], None]:
    sys.argv[1:] = ["name=reproduce", f"out={case.folder / 'report'}"]
    return render.main


def start_sweeps(case: Case) -> Callable[[], None]:
    sys.argv[1:] = []
    return sweeps.main


def start_models(case: Case) -> Callable[[], None]:
    page = case.folder / "page.md"
    page.write_text(f"{models_command.BEGIN}\n{models_command.END}\n")
    return lambda: models_command.main(["list", "--markdown", str(page)])


COMMANDS = {
    "evaluate": start_evaluate,
    "render": start_render,
    "sweeps": start_sweeps,
    "models": start_models,
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_cannot_write_says_so_in_one_line(
    command: str, code: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.setattr(sweeps, "FOLDER", case.folder / "sweep")
    monkeypatch.setattr(models_command, "markdown_list", lambda: "the table")
    main = COMMANDS[command](case)

    def refuse(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit) as ended:
        main()
    line = str(ended.value.code)
    assert line.startswith("error: ")
    assert os.strerror(code) in line
    assert str(case.folder) in line
    assert "\n" not in line
    assert TEMPORARY not in line
    assert not [path for path in case.folder.rglob("*") if TEMPORARY in path.name]
    assert not list(case.folder.rglob("*.part"))


def test_a_score_that_cannot_be_written_is_printed(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    main = start_evaluate(case)
    write_json = files.write_json

    def full(path: Path, value: object) -> None:
        if path.name == "out.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).endswith("out.json: No space left on device")
    assert "fid " in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"metrics": {"fid": 1.5, "kl": None}, "cost": {"cell_s": 60.0}}
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory|File exists"):
        results.write_result(tmp_path / "file" / "metrics.json", result)
    assert capsys.readouterr().out == "not written: fid=1.5  cell_s=60\n"


# --- places that are refused before anything is computed


def make_place(kind: str, folder: Path) -> Path:
    """Where no file can be written."""
    (folder / "file").touch()
    return {
        "a folder": folder,
        "below a file": folder / "file" / "deep" / "out.json",
        "a long name": folder / LONG,
        "a long folder": folder / LONG / "out.json",
        "below a device": Path("/dev/null/out.json"),
    }[kind]


PLACES = ("a folder", "below a file", "a long name", "a long folder", "below a device")


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_where_nothing_can_be_written_is_refused(kind: str, tmp_path: Path) -> None:
    path = make_place(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="^out: .* cannot be written") as refusal:
        files.require_writable(path, "out")
    assert str(path) in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["", ".", "/"])
def test_a_place_without_a_name_of_its_own_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"^csv: [./] cannot be written \(Is a directory\)$"):
        files.require_writable(Path(place), "csv")


@pytest.mark.parametrize("kind", PLACES)
def test_evaluate_refuses_it_before_it_computes(
    kind: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    main = start_evaluate(case)
    sys.argv[-1] = f"out={make_place(kind, case.folder)}"
    with pytest.raises(SystemExit, match="^error: out: "):
        main()
    assert not (case.folder / "cache").exists()


@pytest.mark.parametrize("kind", PLACES[1:])
def test_a_run_refuses_a_folder_of_runs_that_cannot_be(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(kind, tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "method=fp", "device=cpu", f"runs='{place}'"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert str(ended.value.code).startswith("error: ")
    assert "\n" not in str(ended.value.code)


def test_what_can_be_written_is_let_pass_and_left_as_it_is(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "deep" / "er" / "out.json", "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.json").write_text("old")
    files.require_writable(tmp_path / "out.json", "out")
    assert (tmp_path / "out.json").read_text() == "old"
    longest = tmp_path / ("n" * 255)  # a temporary name must not be longer still
    files.write_text(longest, "text")
    assert longest.read_text() == "text"


# --- a full disk, in the words of every library that writes

LIMIT = 4096
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: files.write_text(path, "x" * 10_000),
    "tensors": lambda path: write_tensors({"a": torch.ones(10_000)}, path),
    "arrays": lambda path: files.save_arrays({"a": np.ones(10_000)}, path),
    "checkpoint": lambda path: save_atomically({"a": torch.ones(10_000)}, path),
    "shard": lambda path: shards.write_shard(
        path, 0, shards.Shard(np.zeros((9, 3, 32, 32), np.uint8)), "run"
    ),
    "npz": lambda path: image_sets.write_npz([np.zeros((9, 3, 32, 32), np.uint8)], 9, 32, path),
    "weights": lambda path: conversions.write_weights({"a": torch.ones(10_000)}, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_an_error_of_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
    try:
        with pytest.raises((OSError, ConfigError)) as refusal:
            WRITERS[kind](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(refusal.value)
    assert not [place for place in tmp_path.rglob("*") if place.is_file()]


# --- surroundings of a process

# no entry in passwd, as in a container that runs under a number
NOBODY = """
import pwd, runpy, sys
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
BARE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def bare_command(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A command without an environment, a home or an entry in passwd."""
    line = [sys.executable, "-c", NOBODY, *arguments]
    return subprocess.run(
        line, cwd=cwd, env=BARE, capture_output=True, text=True, timeout=60, **options
    )


def test_weights_are_found_without_a_home(tmp_path: Path) -> None:
    done = bare_command("models", "check", "rar_twin", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("keys and shapes agree") == 2


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("experiments.data", ["check", "folder=data"]),
        ("experiments.evaluate.fp_gate", ["missing.json"]),
        ("experiments.run", ["method=fp"]),
    ],
)
def test_a_removed_working_folder_is_no_traceback(
    module: str, arguments: list[str], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = bare_command(module, *arguments, cwd=gone, preexec_fn=gone.rmdir)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [8, 16])
def test_too_few_descriptors_are_no_traceback(number: int, tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from ptq.errors import user_errors\n"
        "from experiments.store import files\n"
        "with user_errors():\n"
        f"    resource.setrlimit(resource.RLIMIT_NOFILE, ({number}, {number}))\n"
        "    held = []\n"
        "    while True:\n"
        "        held.append(open(sys.executable))\n"
        "        if len(held) > 4: files.write_text(Path('a.txt'), 'text')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=BARE, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("Too many open files\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_cannot_be_opened_is_not_called_missing(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    tensors = {"a": torch.ones(2)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    read_checkpoint(path)  # whatever the reader imports is loaded from here on
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="Too many open files") as refusal:
            read_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(path) in str(refusal.value)

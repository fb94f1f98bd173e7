"""How commands end: one line and a status for what a user can mend, a traceback for the rest."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from models.weights.checkpoints import CheckpointError
from ptq import errors
from ptq.errors import describe_fault, error_line, user_errors
from ptq.numbers.numerics import NonFiniteError
from ptq.spec import ConfigError

ROOT = Path(__file__).parents[2]
CODES = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EROFS,
)
FAULTS = (  # of this code
    KeyError("a fault of the program"),
    ValueError("Cannot find it"),
    RuntimeError("shapes differ"),
    AssertionError(),
    TypeError("no such argument"),
)
LACK_OF_MEMORY: dict[str, Callable[[], object]] = {
    "python": lambda: bytearray(2**62),
    "numpy": lambda: np.empty(2**60, np.uint8),
    "torch": lambda: torch.empty(2**50),
}


def run_code(code: str, *, tail: str = "") -> subprocess.CompletedProcess[str]:
    """What a process says and how it ends; `tail`: of the shell's line."""
    command = f'{sys.executable} -c "$CODE" {tail}'
    environment = {**os.environ, "CODE": textwrap.dedent(code), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )


# --- one line


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, NonFiniteError])
def test_errors_of_the_user_end_in_one_line(kind: type[Exception]) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise kind("n: 0 is not a positive integer")
    assert stopped.value.code == "error: n: 0 is not a positive integer"


@pytest.mark.parametrize("code", CODES)
def test_what_the_system_refuses_names_the_path_and_the_reason(code: int) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise OSError(code, os.strerror(code), "runs/a/metrics.json")
    assert stopped.value.code == f"error: runs/a/metrics.json: {os.strerror(code)}"


@pytest.mark.parametrize("code", CODES)
def test_the_systems_reason_is_read_in_errors_of_libraries(code: int) -> None:
    reason = os.strerror(code)
    library_errors = (
        SafetensorError(f'IoError(Os {{ code: {code}, message: "{reason}" }})'),
        RuntimeError(f"[enforce fail at file.cc:1]\nopen of a.pt failed: {reason}\n frame 1"),
        ImportError(f"liba.so: cannot open shared object file: {reason}"),
    )
    for error in library_errors:
        line = describe_fault(error)
        assert reason in line
        assert "\n" not in line


@pytest.mark.parametrize("kind", LACK_OF_MEMORY)
def test_lack_of_memory_is_said_in_one_line(kind: str) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        LACK_OF_MEMORY[kind]()
    assert stopped.value.code.startswith("error: memory: there is too little (")
    assert "\n" not in stopped.value.code
    assert "enforce fail" not in stopped.value.code


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "can't start new thread",
        "std::bad_alloc",
        "libtorch_cpu.so: failed to map segment from shared object",
    ],
)
def test_lack_of_memory_has_many_words(message: str) -> None:
    line = describe_fault(RuntimeError(message))
    assert line == f"memory: there is too little ({message.splitlines()[0]})"


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error
    assert error_line(error).startswith(type(error).__name__)


def test_a_path_cannot_break_the_line() -> None:
    line = describe_fault(OSError(errno.ENOENT, "No such file or directory", "a\nb"))
    assert line == r"'a\nb': No such file or directory"
    assert describe_fault(ConfigError("two\n  lines")) == "two lines"


def test_of_two_paths_the_one_that_was_to_be_made_is_named() -> None:
    error = OSError(errno.EXDEV, "Invalid cross-device link", "a.tmp", None, "b")
    assert describe_fault(error) == "b: Invalid cross-device link"


def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path) -> None:
    place = tmp_path / "samples"
    place.write_text("")
    with pytest.raises(SystemExit) as stopped, user_errors():
        place.mkdir(parents=True, exist_ok=True)
    assert stopped.value.code == f"error: {place}: it is there already, and no folder"


def test_a_removed_working_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as stopped, user_errors():
        os.getcwd()
    assert stopped.value.code == "error: working folder: it was removed, go to one that is there"


def test_a_home_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        Path("~nobody-of-this-name/weights.pt").expanduser()
    assert stopped.value.code.startswith("error: home: ")


# --- output


PRINTING = """
from ptq.errors import user_errors
with user_errors():
    {work}
"""


@pytest.mark.parametrize("work", ["print('x' * 10)", "print('x' * 100_000)", "print(1); exit(0)"])
def test_a_full_output_is_said_in_one_line(work: str) -> None:
    done = run_code(PRINTING.format(work=work), tail="> /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("work", ["print('x' * 10)", "print('x' * 1000_000)", "print(1); exit(0)"])
def test_who_reads_no_further_gets_no_complaint(work: str) -> None:
    code = PRINTING.format(work=f"import time; time.sleep(.3); {work}")
    done = run_code(code, tail="| true")
    assert done.stderr == ""


def test_what_was_printed_before_an_error_is_not_lost() -> None:
    work = "print('fid 1.5'); open('/missing/file')"
    done = run_code(PRINTING.format(work=work))
    assert done.stdout == "fid 1.5\n"
    assert done.stderr == "error: /missing/file: No such file or directory\n"


def test_a_closed_output_is_no_error() -> None:
    done = run_code(PRINTING.format(work="print(1)"), tail=">&-")
    assert (done.returncode, done.stderr) == (0, "")


# --- signals and parents


SLEEPING = """
import os, subprocess, sys, time
from ptq import errors
with errors.user_errors():
    {child}
    print("begun", flush=True)
    time.sleep(60)
"""
CHILD = """
    command = [sys.executable, "-c", os.environ["CHILD"]]
    environment = {**os.environ, errors.PARENT: str(os.getpid())}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    print(child.pid, child.stdout.readline(), end="", flush=True)
"""


def start(code: str, **variables: str) -> subprocess.Popen:
    """A process that has said its first line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True
    )
    return process


@pytest.mark.parametrize(
    ("number", "word", "status"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGHUP, "SIGHUP", 129),
    ],
)
def test_who_is_stopped_says_one_line(number: int, word: str, status: int) -> None:
    process = start(SLEEPING.format(child=""))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert stderr == f"error: stopped by {word}; what is finished is kept\n"
    assert process.returncode == status


def test_handlers_of_the_caller_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    former = {number: signal.getsignal(number) for number in errors.STOP_SIGNALS}
    with user_errors():
        assert signal.getsignal(signal.SIGTERM) is not former[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in errors.STOP_SIGNALS} == former
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with user_errors():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former[signal.SIGHUP])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent_however_that_ends(number: int) -> None:
    parent = start(SLEEPING.format(child=CHILD.strip()), CHILD=SLEEPING.format(child=""))
    child = int(parent.stdout.readline().split()[0])
    assert errors.is_alive(child)
    parent.send_signal(number)
    parent.wait(timeout=20)
    limit = time.monotonic() + 20
    while errors.is_alive(child) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not errors.is_alive(child)
    parent.communicate()


@pytest.mark.parametrize("command", ["sample", "export"])
def test_of_torchruns_processes_one_says_what_is_wrong(tmp_path: Path, command: str) -> None:
    """Their parent is this process, as it would be torchrun's agent."""

    def fail(rank: int, **variables: str) -> tuple[int, str]:
        environment = os.environ | {"TMPDIR": str(tmp_path), "RANK": str(rank)} | variables
        line = [sys.executable, "-m", f"experiments.{command}", "model=no_such_model"]
        done = subprocess.run(
            line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    started = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500"}
    ends = [fail(rank, **started, TORCHELASTIC_RESTART_COUNT="0") for rank in (0, 1)]
    assert [status for status, _ in ends] == [1, 1]
    assert ends[0][1].startswith("error: model: 'no_such_model' is not one of")
    assert ends[0][1].count("\n") == 1
    assert ends[1][1] == ""
    again = fail(0, **started, TORCHELASTIC_RESTART_COUNT="1")
    assert again == ends[0]
    (alone,) = {fail(0) for _ in range(2)}  # without torchrun every command says it
    assert alone == ends[0]
    old = time.time() - 3600
    for mark in tmp_path.glob("ar-ptq-failed-*"):
        os.utime(mark, (old, old))
    assert fail(1, **started, TORCHELASTIC_RESTART_COUNT="0") == ends[0]


def test_torchruns_report_names_the_line_as_the_root_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    errors.tell_launcher("error: n: -1 is not allowed")
    errors.tell_launcher("error: a later one")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.message == "error: n: -1 is not allowed"
    assert abs(failure.timestamp - time.time()) < 60
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    errors.tell_launcher("error: without a place to write it")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    errors.tell_launcher("error: without torchrun")


def test_a_warning_of_this_project_is_one_plain_line() -> None:
    default = warnings.formatwarning
    with user_errors():
        ours = warnings.formatwarning("no\nroom", UserWarning, errors.__file__, 7, "line")
        other = warnings.formatwarning("no room", UserWarning, "library.py", 7, "line")
    assert ours == "warning: no room\n"
    assert other == default("no room", UserWarning, "library.py", 7, "line")
    assert warnings.formatwarning is default

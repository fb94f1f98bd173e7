"""How a command ends: with one line, `error: ...`, where a user can mend what is wrong.

    status 1      an option, a file, a full disk, too little memory
    status 130    Ctrl-C; 143 and 129: SIGTERM and SIGHUP

Every other error is one of this code and keeps its traceback. Processes that a command starts end
with it, however it ends: who starts them sets `PARENT` in their environment.

This module imports the standard library alone.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Classes of errors that a user can mend, by module. A module that is not loaded has raised none.
USER_ERRORS = {
    "concurrent.futures.process": "BrokenProcessPool",  # a worker was killed
    "ptq.registry.refusals": "ConfigError",
    "ptq.numbers.numerics": "NonFiniteError",
    "models.weights.checkpoints": "CheckpointError",
    "experiments.images.shards": "StorageError",
}
# what libraries say, in errors of many classes, where memory (or room for a thread) is short
MEMORY_ERRORS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "can't start new thread",
    "std::bad_alloc",
    "failed to map segment from shared object",
    "cannot allocate memory in static TLS block",
    "error return without exception set",  # of CPython, which found none to make one
)
# of the system, which libraries pass on as text in errors of their own
SYSTEM_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
NO_HOME = "Could not determine home directory"  # of `pathlib`
OUTPUT = "standard output"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# of the packages, which may lie beside those of others
OWN_FOLDERS = tuple(os.path.join(ROOT, name, "") for name in ("ptq", "models", "experiments"))
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
SIGNAL_STATUS = 128  # shells add the number of the signal
PARENT = "AR_PTQ_PARENT"  # the process with which this one ends
POLL_SECONDS = 0.5  # between two looks at the parent
STALE_SECONDS = 60.0  # after which a mark of a failed process counts no more
GRACE_SECONDS = 20.0  # for a process that is asked to end, before it is killed


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# --- ends


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with one line where the user can mend what is wrong, or stops it."""
    with raising_stopped(), plain_warnings():
        end_with_parent()
        try:
            os.getcwd()  # libraries may end the process themselves where it was removed
            with flushed_output():
                yield
        except KeyboardInterrupt as stop:
            # `Stopped` has a number, the KeyboardInterrupt of Python itself has none
            number = signal.Signals(getattr(stop, "number", signal.SIGINT))
            word = "Ctrl-C" if number == signal.SIGINT else number.name
            say(f"error: stopped by {word}; what is finished is kept")
            sys.exit(SIGNAL_STATUS + number)
        except Exception as error:
            # asked first: `settle_output` puts another file in the output's place
            is_broken_pipe = isinstance(error, BrokenPipeError) and is_output_closed()
            line = describe_fault(error)
            if line is None:
                raise
            settle_output(error)
            if is_broken_pipe:
                sys.exit(SIGNAL_STATUS + signal.SIGPIPE)
            tell_launcher(f"error: {line}")
            sys.exit(f"error: {line}" if is_first_to_fail() else 1)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block a warning of this project is a line without file, number and source."""
    default = warnings.formatwarning

    def format_plainly(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if os.path.abspath(filename).startswith(OWN_FOLDERS):
            return f"warning: {one_line(str(message))}\n"
        return default(message, category, filename, lineno, line)

    warnings.formatwarning = format_plainly
    try:
        yield
    finally:
        warnings.formatwarning = default


def is_first_to_fail() -> bool:
    """Whether no other process that the same torchrun started has ended with an error before.

    They mostly meet the same error, and one line is enough. torchrun's own report follows it: no
    process can keep its launcher from that.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    # processes of one torchrun have its number as parent, and these variables, in common
    start = (os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    name = "-".join(("ar-ptq-failed", str(os.getuid()), str(os.getppid()), *start))
    mark = os.path.join(tempfile.gettempdir(), name)
    with suppress(OSError):  # without a temporary folder, everyone says it
        if os.path.exists(mark) and time.time() - os.stat(mark).st_mtime > STALE_SECONDS:
            os.unlink(mark)  # of another torchrun of the same number
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # only one process can make it
        except FileExistsError:
            return False
    return True


def tell_launcher(line: str) -> None:
    """Leave the line where torchrun looks for what its report calls the root cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    with suppress(OSError), open(path, "x") as file:  # a file that is there tells of an earlier one
        json.dump({"message": line, "timestamp": int(time.time())}, file)


@contextmanager
def flushed_output() -> Iterator[None]:
    """Write out at the end of the block what was printed: later nobody handles the error."""
    try:
        yield
    except SystemExit:
        flush_output()
        raise
    flush_output()


def flush_output() -> None:
    if sys.stdout is None:  # the shell closed it
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = OUTPUT  # for the user, and for `settle_output`, which knows it by this
        raise


def settle_output(error: Exception) -> None:
    """Write out what was printed before an error, or give it up: the exit would fail once more."""
    try:
        flush_output()
    except OSError as of_output:
        error = of_output
    if isinstance(error, BrokenPipeError) or getattr(error, "filename", None) == OUTPUT:
        with suppress(OSError, ValueError, AttributeError):
            # what is still held is written at the exit, now to nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_output_closed() -> bool:
    """Whether who reads the output has gone, as `head` does."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # it is no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLERR comes unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))


def say(line: str) -> None:
    """A line on stderr, where there is one."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


# --- one line for an error


def error_line(error: BaseException) -> str:
    """What an error says, in one line; of one that no user can mend the class stands before it."""
    line = describe_fault(error)
    if line is not None:
        return line
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def describe_fault(error: BaseException) -> str | None:
    """One line for an error that a user can mend; None for one of this code."""
    if is_user_error(error):
        return one_line(str(error))
    if lacks_memory(error):
        return f"memory: there is too little ({short_reason(error)})"
    if isinstance(error, OSError):
        return describe_system_error(error)
    if str(error).startswith(NO_HOME):
        return (
            "home: the folder is not known (HOME is not set, and the user has no entry in passwd)"
        )
    code = system_code(error)
    if code is None:
        return None
    reason = os.strerror(code)
    return next(one_line(line) for line in str(error).splitlines() if reason in line)


def system_code(error: BaseException) -> int | None:
    """The number of the system's reason that a library passes on as text; None if it is none."""
    # SystemExit and interrupts carry texts of our own, no library's
    text = str(error) if isinstance(error, Exception) else ""
    for code in SYSTEM_ERRORS:
        if os.strerror(code) in text:
            return code
    return None


def is_user_error(error: BaseException) -> bool:
    """Whether an error is of one of the classes whose message is one line for the user."""
    loaded = ((sys.modules.get(module), class_name) for module, class_name in USER_ERRORS.items())
    return any(module and isinstance(error, getattr(module, name)) for module, name in loaded)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is want of memory, on the CPU or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    return not isinstance(error, OSError) and any(word in str(error) for word in MEMORY_ERRORS)


def short_reason(error: BaseException) -> str:
    """The first line that an error says, without the place in a library's code before it."""
    first_line = str(error).strip().partition("\n")[0]
    return one_line(first_line.rpartition("DefaultCPUAllocator: ")[2]) or "the system gives none"


def describe_system_error(error: OSError) -> str:
    """The path that the system refuses, and why."""
    reason = error.strerror or one_line(str(error)) or type(error).__name__
    if isinstance(error, FileExistsError):
        reason = "it is there already, and no folder"  # only making a folder is refused so
    # of a rename, the place where the file was to go
    path = error.filename if error.filename2 is None else error.filename2
    if path is not None:
        return f"{printable(os.fsdecode(path) if isinstance(path, bytes) else str(path))}: {reason}"
    # what fails in a removed folder may name no path
    if isinstance(error, FileNotFoundError) and not has_working_folder():
        return "working folder: it was removed, go to one that is there"
    return reason


def has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def one_line(text: str) -> str:
    """A text whose lines are joined."""
    lines = text.split("\n")
    return text if len(lines) == 1 else " ".join(line.strip() for line in lines).strip()


def printable(path: str) -> str:
    """A path as it is, or quoted where it would break the line."""
    return path if path.isprintable() else repr(path)


# --- signals and parents


@contextmanager
def raising_stopped() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise `Stopped`, as Ctrl-C raises KeyboardInterrupt.

    So blocks are left as on an error: temporary files are removed, workers ended. A signal that is
    ignored (nohup), or that the caller handles, stays so.
    """
    # only the main thread may set handlers of signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, raise_stopped)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def raise_stopped(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
    raise Stopped(number)


def end_with_parent() -> None:
    """End this process soon after the one that the environment names, if it names one.

    That is told apart from a killed one by nobody else: a child of a killed process lives on.
    """
    if PARENT not in os.environ:
        return
    parent = int(os.environ[PARENT])
    is_child = os.getppid() == parent  # else a launcher, such as torchrun, stands between

    def watch_parent() -> None:
        while os.getppid() == parent if is_child else is_alive(parent):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        # the main thread may hang in a library, where no handler of Python's is run
        time.sleep(GRACE_SECONDS)
        os._exit(SIGNAL_STATUS + signal.SIGTERM)

    # a daemon: it does not hold up the exit
    threading.Thread(target=watch_parent, daemon=True).start()


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)  # sends nothing, only looks whether it could
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True

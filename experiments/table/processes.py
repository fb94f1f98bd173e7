"""Processes that this one starts: they end with it, however it ends."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from experiments.data import fashion_mnist, tiny_imagenet
from models.registry import WEIGHTS_FOLDER
from models.weights.conversions import CACHE_FOLDER
from ptq.config.files import PACKAGES
from ptq.errors import GRACE_SECONDS, PARENT

LOOK_SECONDS = 1.0  # between two looks at what a child does

FOLDERS = (WEIGHTS_FOLDER, CACHE_FOLDER, fashion_mnist.VARIABLE, tiny_imagenet.VARIABLE)


def child_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, and more, for a child that is to end with it."""
    return {**os.environ, **(variables or {}), PARENT: str(os.getpid())}


def fix_folders() -> None:
    """Make the folders that variables name those of this process for all that it starts, which run
    elsewhere."""
    for variable in FOLDERS:
        if os.environ.get(variable):
            os.environ[variable] = str(Path(os.environ[variable]).expanduser().resolve())


def run_child(
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    look: Callable[[], object] = lambda: None,
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end; it is ended if this process is stopped.

    Args:
        variables: of its environment.
        look: what to do every now and then meanwhile.
    """
    child = subprocess.Popen(
        command,
        cwd=PACKAGES,
        env=child_environment(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            stdout, stderr = wait_for_child(child, look)
        except BaseException:  # a signal that stops this process is one
            end_processes([child])
            raise
    return subprocess.CompletedProcess(command, child.returncode, stdout, stderr)


def wait_for_child(child: subprocess.Popen, look: Callable[[], object]) -> tuple[str, str]:
    """What a child has written on stdout and stderr, once it has ended."""
    while True:
        try:
            return child.communicate(timeout=LOOK_SECONDS)
        except subprocess.TimeoutExpired:  # nothing that was read is lost
            look()


def end_processes(processes: Iterable[subprocess.Popen | None]) -> None:
    """Ask processes to end, which ends their children too, and kill those that do not in time.

    Those that were not started or have ended are passed over.
    """
    running = []
    for process in processes:
        if is_running(process):
            process.terminate()
            running.append(process)
    limit = time.monotonic() + GRACE_SECONDS  # one limit for all, since they are asked together
    for process in running:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()  # so that no zombie is left


def is_running(process: subprocess.Popen | None) -> bool:
    """Whether a process was started and has not ended."""
    return process is not None and process.poll() is None

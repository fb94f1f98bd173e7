"""A worker: a process that does the jobs of a board.

python -m experiments.table.workers BOARD      # what the engines `local` and `slurm` start
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from experiments.table.engine import POLL
from experiments.table.job_board import Board

PATIENCE = 10.0  # seconds after which a job that waited for another process is tried again


def work(board: Board, show: bool = False) -> None:
    """Do jobs until none is left that nobody holds: always the first that waits for no other
    process.

    One that does, for the full-precision run of its model, say, is tried again after `PATIENCE`, or
    waited for when nothing else is left.
    """
    bar = tqdm(total=len(board.jobs), desc="cells", dynamic_ncols=True, disable=not show)
    met: dict[int, float] = {}  # when a job was last seen to wait

    def done(index: int, wait: bool) -> bool:
        with board.claim(index) as ours:
            if not ours:
                return False
            if board.begin(index):
                outcome = board.attempt(index, wait, show)
                if outcome is None:
                    board.postpone(index)
                    met[index] = time.monotonic()
                    return False
                board.finish(index, outcome)
        bar.update(len(board.jobs) - len(board.open()) - bar.n)
        return True

    def ready(index: int) -> bool:
        return time.monotonic() - met.get(index, -PATIENCE) >= PATIENCE

    while any(ready(i) and done(i, wait=False) for i in board.open()) or any(
        done(i, wait=True) for i in board.open()
    ):
        pass
    bar.close()


def command(board: Board, *options: str) -> list[str]:
    """What starts a worker."""
    return [sys.executable, "-m", "experiments.table.engine", str(board.folder.resolve()), *options]


def end_with(parent: int) -> None:
    """End this process as soon as its parent has ended."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    folder, *options = sys.argv[1:]
    for option in options:
        end_with(int(option.removeprefix("parent=")))
    work(Board(Path(folder)))


if __name__ == "__main__":
    main()

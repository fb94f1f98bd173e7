"""The peak of a piece of work is that of the work, whatever the process has done before."""

from __future__ import annotations

import pytest
import torch

from experiments.run.peak_memory import PeakMemory, release_cuda

MIB = 2**20


def peak_of_work(device: torch.device) -> float:
    """The peak of a matrix product of 64 MiB in all."""
    with PeakMemory(device) as peak:
        x = torch.ones(16 * MIB // 4 // 1024, 1024, device=device)
        held = [
            x,
            x @ torch.ones(1024, 1024, device=device),
            torch.zeros(44 * MIB // 4, device=device),
        ]
        assert float(held[1][0, 0]) == 1024
    return peak.megabytes


def test_on_a_cpu_the_peak_is_that_of_the_process_and_covers_the_work() -> None:
    before = peak_of_work(torch.device("cpu"))
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as busy:
        torch.ones(200 * MIB // 4).sum()
    assert busy.megabytes - idle.megabytes > 150
    assert before > 64


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tensor = torch.zeros(size, device=device)
        self.self = self


@pytest.mark.gpu
def test_on_a_gpu_what_ran_before_does_not_count() -> None:
    device = torch.device("cuda")
    release_cuda()
    alone = peak_of_work(device)
    for _ in range(8):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        Cycle(8 * MIB, device)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(device) > 100 * MIB
    assert peak_of_work(device) == pytest.approx(alone, abs=1)

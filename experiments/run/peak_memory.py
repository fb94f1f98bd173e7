"""Peak memory of a piece of work: of the CUDA allocator, or of the process on a CPU."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident_peak_kb() -> int:
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):  # the high-water mark, in kB
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def release_freed() -> None:
    """Give back memory that nothing needs: garbage of Python, what the C library's allocator keeps,
    and workspaces of cuBLAS, of which every CUDA stream that ever multiplied matrices has one, tens
    of MiB each.

    CUDA graphs that were recorded before may read such workspaces: they must not be replayed
    afterwards.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
    with suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def release_cuda() -> None:
    """Give CUDA memory that is free, but kept by PyTorch's allocator, back to the device, for other
    processes."""
    if torch.cuda.is_initialized():
        release_freed()
        torch.cuda.empty_cache()


class PeakMemory(AbstractContextManager):
    """`megabytes` is the peak during the block: allocated CUDA memory, or resident memory of the
    process.

    What earlier work left behind is given back first (`release_freed`). On Linux the process's
    high-water mark is reset; where that is not allowed it covers the whole process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.megabytes = 0.0

    def __enter__(self) -> PeakMemory:
        release_freed()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                _CLEAR.write_text("5")  # resets VmHWM: proc(5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.megabytes = _resident_peak_kb() / 1024

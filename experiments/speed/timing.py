"""Timing on a GPU: work is captured in CUDA graphs, so that launches do not decide, and replayed.

Clocks and temperature drift while a card works. Things that are compared are therefore replayed in
alternation, in an order that rotates from round to round; a ratio is taken within a round, and its
interval over the rounds. At its limit of power a card slows down by what it has just done, so that
each is replayed once before its turn counts. On a CPU the calls themselves alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch


def wait_for_device(device: torch.device) -> None:
    """Wait for the device, so that the clock shows what it has done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def occupied_bytes(device: torch.device) -> int:
    """Bytes that tensors on a GPU hold; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@dataclass
class Captured:
    """Work ready to be repeated.

    Attributes:
        replay: does it once.
        work: what was captured; a graph reads its tensors, so it is kept.
        peak: bytes that were allocated at most while it ran, those from before included; None on a
            CPU.
    """

    replay: Callable[[], object]
    work: Callable[[], object]
    peak: int | None = None


def capture_work(work: Callable[[], object], device: torch.device, warmup: int = 3) -> Captured:
    """Run `work` a few times, then record it in a CUDA graph; on a CPU it stays as it is."""
    if device.type != "cuda":
        for _ in range(warmup):
            work()
        return Captured(work, work)
    # work is warmed up on a side stream, as capturing needs
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            work()
        stream.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()  # once more, for the peak alone
        stream.synchronize()
        peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()  # capturing has only recorded the work
    torch.cuda.synchronize(device)
    return Captured(graph.replay, work, peak)


def time_replay(work: Captured, device: torch.device) -> float:
    """Milliseconds of one replay, on a GPU after one that does not count."""
    if device.type != "cuda":
        started = time.perf_counter()
        work.replay()
        return 1000 * (time.perf_counter() - started)
    work.replay()
    # the device's own clock: launching and waiting do not count
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work.replay()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def alternate_replays(
    works: Mapping[str, Captured],
    device: torch.device,
    rounds: int,
    others: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every round by name; one round ahead does not count.

    Args:
        others: things that are compared too, which tell their milliseconds themselves.
    """
    timers: dict[str, Callable[[], float]] = dict(others or {})
    for name, work in works.items():
        timers[name] = partial(time_replay, work, device)
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            milliseconds = timers[name]()
            if number > 0:
                times[name].append(milliseconds)
    return times


def summarize_times(milliseconds: Sequence[float]) -> dict[str, float | list[float]]:
    """Median and quartiles."""
    if len(milliseconds) > 1:
        low, _, high = statistics.quantiles(milliseconds, n=4)
    else:
        low = high = milliseconds[0]  # one timing has no quartiles
    return {
        "median_ms": round(statistics.median(milliseconds), 4),
        "quartiles_ms": [round(low, 4), round(high, 4)],
    }


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], draws: int = 2000
) -> dict[str, float | list[float]]:
    """Median over rounds of a ratio, with the 95 % bootstrap interval of that median."""
    ratios = np.asarray(numerators) / np.asarray(denominators)  # (rounds,)
    # (draws, rounds)
    picks = np.random.default_rng(0).integers(len(ratios), size=(draws, len(ratios)))
    medians = np.median(ratios[picks], axis=1)  # (draws,)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {
        "ratio": round(float(np.median(ratios)), 5),
        "interval": [round(float(low), 5), round(float(high), 5)],
    }

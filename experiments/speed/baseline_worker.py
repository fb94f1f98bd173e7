"""Runs in a checkout of a former revision, and times its work when it is told to (`baseline.py`).

The file is of this revision, all that it imports of the project is of the checkout: it asks only
for what has long had its name there. A line of JSON is answered with a line:

    {"what": "generate", "variant": "bf16", "overrides": [...]}   {"revision": ...}
    {"prepare": {"batch": 100}}                                   {"first_s": ...}
    {"time": 3}                                                   {"seconds": ...}
    {"peak": true}                                                {"peak_mb": ...}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class Generation:
    """Whole generation of images."""

    def __init__(self, variant: str, overrides: list[str]) -> None:
        from experiments.run.preparation import sampler_settings
        from experiments.speed import generate, variants
        from experiments.speed.timing import occupied_bytes

        self.setup = variants.prepare_variants({variant: generate.VARIANTS[variant]}, overrides)
        self.device = self.setup.device
        self.bytes_before = occupied_bytes(self.device)  # of the model that this one is made of
        self.generator = generate.convert_generator(self.setup, variant)
        self.sampler = sampler_settings(self.setup.config, self.generator.preset)

    def prepare(self, batch: int) -> None:
        """Compile and capture for a number of images."""
        import torch

        from experiments.images.microbatches import compile_steps
        from models.registry import TokenGenerator

        if isinstance(self.generator, TokenGenerator) and self.device.type == "cuda":
            compile_steps(self.generator)
        self.labels = torch.arange(batch, device=self.device) % self.generator.preset.classes
        self.index = torch.arange(batch)
        self.run(0)

    def run(self, seed: int) -> float:
        """Seconds of one batch."""
        from experiments.speed.timing import wait_for_device

        wait_for_device(self.device)
        started = time.perf_counter()
        self.generator.sample(self.labels, seed, self.index, self.sampler)
        wait_for_device(self.device)
        return time.perf_counter() - started


class Passes:
    """Passes of all blocks."""

    def __init__(self, variant: str, overrides: list[str]) -> None:
        from experiments.speed import blocks, variants

        self.variant = variants.VARIANTS[variant]
        self.setup = variants.prepare_variants({variant: self.variant}, overrides)
        self.device = self.setup.device
        self.bytes_before = 0
        base = self.setup.generator.adapter
        self.model = blocks.build_variant(base, self.variant, self.setup.rows, self.setup.config)

    def prepare(self, batch: int, length: int) -> None:
        """Compile and capture for rows of one length."""
        from experiments.speed import blocks

        family = self.setup.generator.preset.family
        self.work = blocks.capture_pass(self.model, family, batch, length, self.variant)

    def run(self, seed: int) -> float:
        """Seconds of one pass."""
        from experiments.speed.timing import time_replay

        if self.device.type == "cuda":
            self.work.replay()  # as `time_replay` of this revision does
        return time_replay(self.work, self.device) / 1000


WORKS: dict[str, Callable[[str, list[str]], Generation | Passes]] = {
    "generate": Generation,
    "blocks": Passes,
}


def answer_requests(requests: TextIO, answers: TextIO) -> None:
    """Answer line by line, until there are no more requests."""
    import torch

    work: Generation | Passes | None = None
    for line in requests:
        request = json.loads(line)
        if "what" in request:
            from experiments.store.provenance import code_revision

            work = WORKS[request["what"]](request["variant"], request["overrides"])
            answer: dict[str, Any] = {"revision": code_revision()}
        elif "prepare" in request:
            started = time.perf_counter()
            with torch.no_grad():
                work.prepare(**request["prepare"])
            if work.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            answer = {"first_s": round(time.perf_counter() - started, 3)}
        elif "time" in request:
            with torch.no_grad():
                answer = {"seconds": work.run(request["time"])}
        else:
            peak = None
            if work.device.type == "cuda":
                peak = round((torch.cuda.max_memory_allocated() - work.bytes_before) / 2**20, 1)
            answer = {"peak_mb": peak}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # a script's own folder comes first, and would hide modules of the same names
    sys.path.pop(0)
    answer_requests(sys.stdin, answers)


if __name__ == "__main__":
    main()

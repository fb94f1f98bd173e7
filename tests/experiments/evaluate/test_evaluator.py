"""The one evaluator behind its two front ends, and what importing its parts costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from experiments.evaluate import adm
from experiments.evaluate.evaluator import class_agreement, score_summary
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import image_metrics, summarize_features
from tests.experiments.evaluate.evaluations import made_up_features

HEAVY = {"torch_fidelity", "torchvision", "sklearn", "scipy", "timm"}


@pytest.mark.parametrize("rows", [7, 203])
def test_both_front_ends_come_to_the_same_figures(rows: int) -> None:
    fake = made_up_features("fake", 203, 0.3)
    reference = Reference.from_features(made_up_features("real", 250), "x")
    in_memory = image_metrics(fake, reference.target())

    chunks = []
    for start in range(0, 203, rows):
        part = slice(start, start + rows)
        chunks.append({name: value[part] for name, value in vars(fake).items()})
    summary = adm.summarize_stream(chunks, 203, split=None)
    streamed = score_summary(summary, reference.target(), torch.float64)

    assert streamed.pop("is_file_order") != pytest.approx(in_memory["is"], rel=1e-6)
    assert streamed == pytest.approx(in_memory, rel=1e-10)
    for name in ("precision", "recall"):
        assert streamed[name] == in_memory[name]
    assert torch.equal(summary.predicted, summarize_features(fake).predicted)


def test_agreement_is_the_share_of_equal_classes() -> None:
    assert class_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75


def test_importing_the_evaluator_loads_no_library_of_metrics() -> None:
    modules = ("likelihood", "paired", "references", "small_images", "options", "command")
    imports = [f"import experiments.evaluate.{name}" for name in modules]
    program = "; ".join(["import sys", *imports, "print(*sys.modules)"])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stdout.split())

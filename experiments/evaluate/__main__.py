"""Evaluate sampled images as OpenAI's ADM evaluator does.

    python -m experiments.evaluate samples=SAMPLES extractor=fashion
    python -m experiments.evaluate samples=SAMPLES weights=WEIGHTS \\
        reference=VIRTUAL_imagenet256_labeled.npz

SAMPLES is a folder of PNG files, an npz with `arr_0`, or a folder of `experiments.sample`: see
`experiments/images/image_sets.py`.

Figures of Lite0 are called `lite0_*`. A metric that cannot be computed is null, and
`provenance.lacking` says why.
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.evaluate.options import Options, parse
from experiments.options import answer_help
from experiments.store.results import is_shown
from ptq.errors import user_errors


def print_figures(result: dict[str, Any]) -> None:
    """The figures of a result, and why others are not computed."""
    origin = result["provenance"]
    evaluator = origin["evaluator"]
    print(f"{origin['images']} images, {evaluator['extractor']} {evaluator['weights']}")
    for name, value in result["metrics"].items():
        if value is not None:
            print(f"  {name:20} {value:.6g}")
    known = [name for name, value in result["metrics"].items() if value is not None]
    noise = [name for name in known if not is_shown(name, origin["images"])]
    if noise:
        print(f"  {origin['images']} images say little of {', '.join(noise)}")
    for name, reason in origin["lacking"].items():
        print(f"  {name:20} not computed: {reason}")


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options = parse(sys.argv[1:])

        # PyTorch is loaded for a command line that is allowed
        from experiments.evaluate.command import evaluate_samples, result_path
        from experiments.store import files
        from experiments.store.progress import ProgressDisplay

        path = result_path(options)
        files.require_writable(path, "out")
        result = evaluate_samples(options, ProgressDisplay.of_process())
        print_figures(result)  # before the result is written, which may fail after all
        files.write_sealed(path, result)
        print(f"result: {path}")


if __name__ == "__main__":
    main()

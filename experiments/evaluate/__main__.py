"""Evaluate sampled images as OpenAI's ADM evaluator does.

    python -m experiments.evaluate samples=SAMPLES extractor=fashion
    python -m experiments.evaluate samples=SAMPLES weights=WEIGHTS \\
        reference=VIRTUAL_imagenet256_labeled.npz

SAMPLES is a folder of PNG files, an npz with `arr_0`, or a folder of `experiments.sample`: see
`experiments/images/image_sets.py`.

    extractor=inception   inception, fashion (the shipped classifier, 32 pixels) or lite0
                          (requirements-extra.txt)
    weights=FILE          of Inception, as torch-fidelity publishes them; default: where
                          torch-fidelity keeps them
    reference=FILE        see `experiments/evaluate/references.py`; default for fashion: its
                          training set's statistics
    fp=SAMPLES            the full-precision model's images of the same seeds: fid2fp, psnr,
                          token_agreement, ...
    n=N                   refuse samples of another number
    prc_dtype=float32     float16 compares distances for precision and recall as ADM does; float64
    batch=50 device=auto  images per forward pass; auto, cpu or cuda
    cache=FOLDER          where features are kept, default runs/cache/features
    out=FILE              the result, in the format of a run's metrics.json; default: beside the
                          samples

Figures of Lite0 are called `lite0_*`. A metric that cannot be computed is null, and
`provenance.lacking` says why.
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.evaluate.command import evaluate_samples, result_path
from experiments.evaluate.options import parse
from experiments.store import files
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError


def print_figures(result: dict[str, Any]) -> None:
    """The figures of a result, and why others are not computed."""
    origin = result["provenance"]
    evaluator = origin["evaluator"]
    print(f"{origin['images']} images, {evaluator['extractor']} {evaluator['weights']}")
    for name, value in result["metrics"].items():
        if value is not None:
            print(f"  {name:20} {value:.6g}")
    for name, reason in origin["lacking"].items():
        print(f"  {name:20} not computed: {reason}")


def main() -> None:
    try:
        options = parse(sys.argv[1:])
        path = result_path(options)
        result = evaluate_samples(options, progress=True)
        files.write_json(path, result)
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: out: {path} cannot be written ({error.strerror})")
    print_figures(result)
    print(f"result: {path}")


if __name__ == "__main__":
    main()

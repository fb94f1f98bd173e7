"""Quantize a model and write it as integers, or as torchao has them.

    python -m experiments.export model=rar_twin method=ptq4arvg quant=w8a8
    python -m experiments.export model=rar_b method=ptq4arvg quant=w6a6 out=exports/rar_b

Models, methods and all else are chosen as for `experiments.run`, and the same rows calibrate.

    format=int8      model.safetensors, config.json and a model card, which `ptq.load` reads
                     (ptq/use/saving.py)
    format=torchao   MODEL-torchao.safetensors, where every layer is static per-tensor W8A8 and
                     what is not quantized is FP32 (ptq/int8/exports/torchao_export.py)

It prints the size beside that of the model in FP32, and what stays in floating point. What has no
integer path (other number formats, fractional zero points) is refused, and nothing is written.
"""

from __future__ import annotations

import sys

from experiments.config.overrides import RUN
from experiments.export.options import Options, parse
from experiments.options import answer_help
from ptq.errors import user_errors


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options}, RUN.describe())
        options, overrides = parse(sys.argv[1:])

        # PyTorch is loaded for a command line that is allowed
        from experiments.export.exporting import export_model
        from experiments.store.progress import ProgressDisplay

        export_model(options, overrides, ProgressDisplay.of_process())


if __name__ == "__main__":
    main()

"""Measure a model that is trained here: samples, tokenizer, rounded models against real images.

    python -m experiments.train_zoo.quality model=var_twin

It makes three runs, in full precision and rounded to nearest at W8A8 and W6A6, and writes JSON and
a sample grid under runs/quality. Image metrics are those of `experiments.evaluate.small_images`
against the training set; beside them stand the same ones of real test images and of test images
through the tokenizer, which needs the data set. Natural images (model=rar_natural) are judged by
Lite0 against the validation set (`experiments/evaluate/judges.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config.overrides import RUN
from experiments.options import answer_help, option, option_names, parse_options
from ptq.errors import user_errors
from ptq.spec import ConfigError

OWN_GROUPS = ("method", "quant")


@dataclass
class Options:
    """What to measure, and where the figures go."""

    model: str = option("rar_twin", help="the twin", choices=tuple(RUN.group_choices("model")))
    record: bool = option(
        False, help="write to models/zoo/records, too, and rewrite the model cards"
    )
    data: str | None = option(None, help="folder of the data set; null searches the usual places")


def refuse_own_groups(overrides: Sequence[str]) -> None:
    """Refuse `method=` and `quant=`: all three runs would have them.

    Raises:
        ConfigError: one is given.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in OWN_GROUPS:
            raise ConfigError(f"{key}: the three runs have their own, leave it out")


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options}, RUN.describe())
        options, overrides = parse_options(Options, sys.argv[1:])
        RUN.check(overrides, option_names(Options))
        refuse_own_groups(overrides)

        # PyTorch is loaded for a command line that is allowed
        from experiments.train_zoo.quality_report import report_quality

        report_quality(options.model, overrides, options.data, options.record)


if __name__ == "__main__":
    main()

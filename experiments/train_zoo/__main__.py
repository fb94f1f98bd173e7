"""Train what ships in `models/zoo`: the feature extractor, the tokenizers, the twins.

    python -m experiments.train_zoo model=extractor
    python -m experiments.train_zoo model=rar_tokenizer
    python -m experiments.train_zoo model=rar_twin

Each command trains one model on one device (or on several, through torchrun), continues where a
killed run stopped, and writes FP16 safetensors and a JSON training record under `out`. The configs
in `conf/train_zoo/model` are lab notes.
"""

from __future__ import annotations

import typing

from experiments.config import hydra_command
from experiments.config.overrides import TRAINING
from experiments.options import answer_help
from ptq.errors import user_errors

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig


def run_training(config: DictConfig) -> None:
    # PyTorch is loaded for a command line that is allowed
    from experiments.train_zoo.trainers import train_model

    train_model(config)


def main() -> None:
    with user_errors():
        answer_help(__doc__, {}, f"{TRAINING.describe()}\n{hydra_command.HELP}")
        hydra_command.run_hydra(run_training, TRAINING)


if __name__ == "__main__":
    main()

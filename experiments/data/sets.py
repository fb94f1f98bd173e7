"""The data sets by the names that presets and configs give them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Protocol

from experiments.data import fashion_mnist, tiny_imagenet
from ptq.spec import require

if typing.TYPE_CHECKING:
    from torch import Tensor


class DataSet(Protocol):
    """What the module of a data set offers.

    Attributes:
        TITLE: its name. CONTENTS: what `check` has found, in words. FETCHED: where `fetch` puts it.
    """

    TITLE: str
    CONTENTS: str
    FETCHED: Path

    def load_split(self, split: str, folder: str | Path | None = None) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, 3, S, S) and labels int64 (N,) of "train" or "test"."""

    def check_files(self, folder: Path) -> list[str]:
        """One line for every file or split that is not as published."""

    def find_folder(self, folder: str | Path | None = None) -> Path:
        """Where the files lie."""


SETS: dict[str, DataSet] = {"fashion_mnist": fashion_mnist, "tiny_imagenet": tiny_imagenet}


def find_set(name: str) -> DataSet:
    """The data set called `name`.

    Raises:
        ConfigError: there is none.
    """
    require("set", name, tuple(SETS))
    return SETS[name]

"""Options of `experiments.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.compose import explain_refusal
from experiments.evaluate.precision_recall import DTYPES
from ptq.types import ConfigError, require

EXTRACTORS = ("inception", "fashion", "lite0")


@dataclass
class Options:
    samples: str = MISSING
    reference: str | None = None
    extractor: str = "inception"
    weights: str | None = None
    fp: str | None = None
    n: int | None = None
    prc_dtype: str = "float32"
    batch: int = 50
    device: str = "auto"
    cache: str = "runs/cache/features"
    out: str | None = None


def parse(arguments: list[str]) -> Options:
    """The options of a command line.

    Raises:
        ConfigError: an unknown option, a value of the wrong type or one that is not allowed.
    """
    bare = [a for a in arguments if "=" not in a]
    if bare:
        raise ConfigError(f"{bare[0]}: expected options such as samples=FOLDER")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(arguments))
        if OmegaConf.is_missing(merged, "samples"):
            raise ConfigError("samples: missing, give the path of images")
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error
    require("extractor", options.extractor, EXTRACTORS)
    require("prc_dtype", options.prc_dtype, tuple(DTYPES))
    require("device", options.device, ("auto", "cpu", "cuda"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here, allowed are auto and cpu")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options

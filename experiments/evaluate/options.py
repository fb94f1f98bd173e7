"""The options of `experiments.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.options import option, option_names, parse_options, refuse_unknown
from ptq.spec import ConfigError

# names alone: the modules that define what they stand for load PyTorch
EXTRACTORS = ("inception", "fashion", "lite0")
PRC_DTYPES = ("float16", "float32", "float64")
DEVICES = ("auto", "cpu", "cuda")
OFFICIAL_INCEPTION = "6726825d"  # first digits of the sha256 of Inception's weights


@dataclass
class Options:
    """What to evaluate, and against what."""

    samples: str = option(help="the path of images: a folder of PNG files, an npz, a run's folder")
    reference: str | None = option(
        None,
        help="see evaluate/references.py; null: with fashion its training set, else none",
    )
    extractor: str = option(
        "inception",
        help="inception, the shipped classifier of 32 pixels, or lite0 (requirements-extra.txt)",
        choices=EXTRACTORS,
    )
    weights: str | None = option(
        None,
        help="of Inception, as torch-fidelity publishes them; null: where it keeps them",
    )
    fp: str | None = option(
        None,
        help="the full-precision model's images of the same seeds: fid2fp, psnr, token_agreement",
    )
    n: int | None = option(
        None, help="refuse samples of another number", at_least=1, at_most=100_000_000
    )
    prc_dtype: str = option(
        "float32",
        help="of distances for precision and recall; ADM compares in float16",
        choices=PRC_DTYPES,
    )
    batch: int = option(50, help="images of a forward pass", at_least=1, at_most=100_000)
    device: str = option("auto", help="where the network runs", choices=DEVICES)
    cache: str = option("runs/cache/features", help="folder where features are kept")
    out: str | None = option(
        None, help="the result, in the format of a run's metrics.json; null: beside the samples"
    )


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        ConfigError: an unknown option, a value of the wrong type or one that is not allowed.
    """
    options, others = parse_options(Options, arguments)
    refuse_unknown(others, option_names(Options))
    options.device = choose_device(options.device)
    return options


def choose_device(name: str) -> str:
    """`cpu` or `cuda`, whichever `name` stands for here.

    Raises:
        ConfigError: it is cuda, and there is none.
    """
    import torch  # not before the options are read: what is misspelt is refused at once

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("device: cuda is not available here, allowed are auto and cpu")
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    return name

"""Get and verify the data sets that the shipped models are trained on.

    python -m experiments.data fetch                 # Fashion-MNIST, Debian's package
    python -m experiments.data check folder=FOLDER   # compare with the published files
    python -m experiments.data fetch set=tiny_imagenet source=tiny-imagenet-200.zip
    python -m experiments.data check set=tiny_imagenet folder=FOLDER_OR_ZIP

Only training and rebuilding reference statistics need images. Tiny-ImageNet is not downloaded: its
zip, or a folder of its files, is verified by its pixels and decoded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.data import fashion_mnist, tiny_imagenet
from experiments.data.errors import DataError
from experiments.data.sets import SETS, find_set
from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors


@dataclass
class Options:
    """What to do, and where the files lie."""

    command: str = option(
        help="fetch (Debian's package, after apt-get update; or source=) or check (by contents)",
        choices=("fetch", "check"),
        positional=True,
    )
    set: str = option("fashion_mnist", help="the data set", choices=tuple(SETS))
    source: str | None = option(
        None, help="tiny_imagenet, fetch: tiny-imagenet-200.zip, or a folder of its files"
    )
    folder: str | None = option(
        None,
        help="where to put the files, data/NAME if null; for check where they lie, if null "
        f"${fashion_mnist.VARIABLE} or ${tiny_imagenet.VARIABLE}, or the usual places",
    )


def fetch_set(options: Options) -> Path:
    """Get a data set, unless it is there already; returns its folder.

    Raises:
        DataError: it cannot be had, or is not the published one.
    """
    if options.set == "tiny_imagenet":
        folder = Path(options.folder or tiny_imagenet.FETCHED)
        tiny_imagenet.fetch_files(options.source, folder)
        return folder
    if options.source is not None:
        raise DataError("source: Fashion-MNIST is downloaded, it has none")
    folder = Path(options.folder or fashion_mnist.FETCHED)
    fashion_mnist.fetch_files(folder)
    return folder


def run_command(options: Options) -> list[str]:
    """Carry out a command; returns the problems found, one line each."""
    chosen = find_set(options.set)
    if options.command == "fetch":
        folder = fetch_set(options)
    else:
        folder = chosen.find_folder(options.folder)
    problems = chosen.check_files(folder)
    if not problems:
        print(f"{chosen.TITLE} in {folder}: {chosen.CONTENTS}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    if arguments is None:
        arguments = sys.argv[1:]
    with user_errors():
        answer_help(__doc__, {"Options": Options}, arguments=arguments)
        options, others = parse_options(Options, arguments)
        refuse_unknown(others, option_names(Options))
        try:
            problems = run_command(options)
        except DataError as error:
            problems = [str(error)]
        for line in problems:
            print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Give results from before there were whole identities theirs, without running anything again.

    python -m experiments.identity.migrate                     # what lies in `runs`
    python -m experiments.identity.migrate folders=FOLDER,...

Results, tables, samples, exports and killed runs below the folders get the digest of their whole
identity. It is made of what they state (departures from the defaults, weights, device) and of this
code's defaults and data; a run also keeps its config, which has to say the same. What states an
identity already is left alone. What cannot be given one is named, with the reason, and stays as it
is; what is not known of the others is said too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors
from ptq.spec import ConfigError

FOLDERS = ("runs",)


@dataclass
class Options:
    """Where to look."""

    folders: list[str] = option(FOLDERS, help="folders of results, runs, samples and exports")


def require_folders(folders: Sequence[str]) -> None:
    """Refuse folders that are not there; the default may be missing.

    Raises:
        ConfigError: another one is.
    """
    for folder in folders:
        if folder not in FOLDERS and not Path(folder).is_dir():
            raise ConfigError(f"folders: {folder} is not a folder")


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options, others = parse_options(Options, sys.argv[1:])
        refuse_unknown(others, option_names(Options))
        require_folders(options.folders)
        from experiments.identity.older import migrate_folders

        for line in migrate_folders(options.folders):
            print(line)


if __name__ == "__main__":
    main()

"""Hours, GPU memory and disk of every table of released models, as a Markdown table.

    python -m experiments.estimate                                  # on one H200
    python -m experiments.estimate gpus=8                           # each cell sampled by eight
    python -m experiments.estimate page=experiments/REPRODUCE.md    # rewrite the block of the page

Estimates are of committed results and benchmarks alone, the few seconds apart in which a process
starts; `dry_run=true` of `experiments.table` also knows what this machine has measured, and what is
done. It takes about a minute: the operations of every model are counted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors
from ptq.spec import ConfigError

BEGIN = "<!-- costs: python -m experiments.estimate page=experiments/REPRODUCE.md -->"
END = "<!-- end of costs -->"


@dataclass
class Options:
    """What for, and where to."""

    device: str = option("NVIDIA H200", help="a GPU, by its name in results")
    gpus: int = option(1, help="GPUs that sample a cell together", at_least=1, at_most=1024)
    page: str | None = option(None, help="a page whose block is rewritten; null: print the table")


def replace_block(text: str, block: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ConfigError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"page: it has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options, others = parse_options(Options, sys.argv[1:])
        refuse_unknown(others, option_names(Options))
        page = None if options.page is None else Path(options.page)
        if page is not None:
            replace_block(page.read_text(), "")  # refused at once where it has no block

        from experiments.estimate.report import paper_costs, render_costs
        from experiments.store.files import write_text

        # no folder of runs: this machine's own measurements do not count
        priced = paper_costs(options.device, options.gpus, runs=os.devnull)
        table = render_costs(priced)
        if page is None:
            print(table)
        else:
            write_text(page, replace_block(page.read_text(), table))


if __name__ == "__main__":
    main()

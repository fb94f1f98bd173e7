"""What works on this machine, and what is missing for what.

    python -m experiments.doctor
    python -m experiments.doctor reference=VIRTUAL_imagenet256_labeled.npz inception=WEIGHTS

Looks at packages, devices, compilers, weights, reference files, data sets, Slurm, W&B and disk. It
changes nothing, downloads nothing, and compiles nothing.
"""

from __future__ import annotations

import sys
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors

if typing.TYPE_CHECKING:
    from experiments.doctor.findings import Finding

WIDTH = 80
STATE_WIDTH = 9
NAME_WIDTH = 23


@dataclass
class Options:
    """What is to be looked at beside the machine."""

    reference: str | None = option(None, help="the reference batch of scale=paper")
    inception: str | None = option(None, help="the weights of Inception for scale=paper")
    heldout: str | None = option(None, help="the folder of ImageNet's validation images")
    runs: str = option("runs", help="the folder of runs, whose disk is looked at")


def format_row(state: str, name: str, text: str) -> str:
    """A line, or several with an indent, of at most 80 letters."""
    head = f"{state:{STATE_WIDTH}}{name:{NAME_WIDTH}}"
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )


def show_findings(findings: Sequence[Finding]) -> None:
    print("What is here")
    for finding in findings:
        print(format_row(finding.state, finding.name, finding.text))


def show_abilities(findings: Sequence[Finding]) -> None:
    from experiments.doctor.abilities import WORDS, judge_ability, list_abilities

    by_name = {finding.name: finding for finding in findings}
    print("\nWhat works")
    for ability in list_abilities():
        state, lacking = judge_ability(ability, by_name)
        text = ability.command if not lacking else f"lacks {', '.join(lacking)}"
        print(format_row(WORDS[state], ability.title, text))


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options, others = parse_options(Options, sys.argv[1:])
        refuse_unknown(others, option_names(Options))

        from experiments.doctor.machine import check_machine
        from experiments.doctor.own_files import check_files

        findings = check_machine(Path(options.runs))
        findings += check_files(options.reference, options.inception, options.heldout)
        show_findings(findings)
        show_abilities(findings)


if __name__ == "__main__":
    main()

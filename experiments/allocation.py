"""Choose bits of weights by kind of site, by block or by both, under a budget of bytes.

    python -m experiments.allocation model=rar_twin method=smoothquant quant=w4a8
    python -m experiments.allocation by=layer bits=2,4,8 budget=1200000 model=var_twin method=gptq

The loss of every group of weights is measured at all `bits`, on its own, and the best choice is
found exactly (`experiments/analyses/allocation.py` says how, and what it takes for granted). Left
out, the budget is what weights of the bits of `quant` take, so that both models are of one size.
Bits that `quant.by_kind` or `quant.by_layer` give weights are refused; what else they say stays.
It writes a folder with `allocation.json` (losses, sizes, what was chosen) and a recipe
`quant=allocated`, and prints the command that runs it. Activations stay as `quant` has them.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.config.overrides import RUN
from experiments.options import answer_help, option, option_names, parse_options
from ptq.errors import user_errors

LEAST_BITS = 2
MOST_BITS = 8
NAME = "allocated"  # of the recipe


@dataclass
class Options:
    """Between what to choose."""

    by: str = option(
        "kind",
        help="one choice for each kind of site, block (layer), or kind in a block (site)",
        choices=("kind", "layer", "site"),
    )
    bits: list[int] = option(
        (2, 3, 4, 6, 8), help="that weights may have", at_least=LEAST_BITS, at_most=MOST_BITS
    )
    budget: int | None = option(
        None, help="bytes of the weights' codes; left out, those of the bits of quant", at_least=1
    )
    out: str | None = option(None, help="folder; left out, one under runs/allocation")


def run_command(overrides: Sequence[str], folder: Path) -> str:
    """The command that runs what was chosen; all of `quant` stands in its recipe."""
    others = [text for text in overrides if not re.match(r"[+~]*quant[.@=]", text)]
    words = ["python", "-m", "experiments.run", f"plugins={folder}", f"quant={NAME}", *others]
    return shlex.join(words)


def allocate(options: Options, overrides: Sequence[str]) -> None:
    """Measure, choose, write the recipe, and print what was chosen.

    Raises:
        ConfigError, CheckpointError: one line that says what is wrong.
    """
    # PyTorch is loaded for a command line that is allowed
    from experiments.analyses import allocation
    from experiments.config.compose import configure
    from experiments.run import cell
    from experiments.store.files import require_writable, write_json
    from experiments.store.progress import ProgressDisplay

    config = configure(list(overrides))
    stem = f"{config.model.name}-{config.method.name}-{config.quant.name}-{options.by}"
    folder = Path(options.out or Path(config.runs) / "allocation" / stem)
    require_writable(folder / "allocation.json", "out")
    run = cell.prepare_run(config)
    bits = sorted(set(options.bits))
    choices = allocation.measure_choices(run, bits, options.by, ProgressDisplay.of_process())
    budget = options.budget or allocation.uniform_size(choices, config.quant.weights.bits)
    chosen = allocation.choose_bits(choices, budget)

    changes = allocation.quant_changes(chosen, options.by, config.scope.kinds)
    quant = allocation.merge_fields(asdict(config.quant), changes)
    allocation.write_recipe(folder, NAME, quant)
    used = sum(choice.size for choice in chosen.values())
    record = {
        "command": list(overrides),
        "by": options.by,
        "budget": budget,
        "bytes": used,
        "choices": [asdict(choice) for choice in choices],
        "chosen": {group: choice.bits for group, choice in chosen.items()},
    }
    write_json(folder / "allocation.json", record)
    print(f"{'weights of':16} bits      bytes  KL alone")
    for group, choice in chosen.items():
        print(f"{group:16} {choice.bits:4} {choice.size:10}  {choice.loss:.2e}")
    print(f"{used} of {budget} bytes")
    print(run_command(overrides, folder))


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options}, RUN.describe())
        options, overrides = parse_options(Options, sys.argv[1:])
        RUN.check(overrides, option_names(Options))
        allocate(options, overrides)


if __name__ == "__main__":
    main()

"""What can be done here, by what is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.data.sets import SETS
from experiments.doctor.findings import MISSING, OK, PART, Finding, worst_state
from experiments.doctor.own_files import paper_models, weights_name


@dataclass(frozen=True)
class Ability:
    """Something that can be done.

    Attributes:
        command: that does it.
        needs: names of findings.
    """

    title: str
    command: str
    needs: tuple[str, ...]


WORDS = {OK: "yes", PART: PART, MISSING: "no"}  # for whether something can be done
BASE = ("Python", "packages", "models/zoo", "disk of runs")
GPU_CODE = ("GPU", "Triton", "C compiler")


def list_abilities() -> list[Ability]:
    """Everything that needs more than another thing does."""
    abilities = [
        Ability("tables of the twins", "experiments.table name=reproduce", BASE),
        Ability("kernels, CUDA graphs", "experiments.speed what=generate", GPU_CODE),
        Ability("compiled steps", "experiments.run sampler.compiled=true", GPU_CODE),
    ]
    for family in paper_models():
        needs = (weights_name(family), "Inception", "reference", "GPU", "disk of runs")
        command = f"experiments.table name={family} scale=paper"
        abilities.append(Ability(f"paper's table of {family}", command, needs))
    abilities += [
        Ability(
            "KL of released models",
            "experiments.table scale=paper heldout=FOLDER",
            ("validation images",),
        ),
        Ability(
            "a cell on many GPUs",
            "torchrun -m experiments.sample",
            ("several GPUs", "torchrun"),
        ),
        Ability("cells on a cluster", "experiments.table engine=slurm", ("Slurm",)),
        Ability("tracking, offline", "experiments.run tracker=wandb_offline", ("W&B",)),
        Ability("tracking, online", "experiments.run tracker=wandb", ("W&B", "W&B login")),
    ]
    for data_set in SETS.values():
        command = f"experiments.train_zoo, models of {data_set.TITLE}"
        abilities.append(Ability("training", command, (data_set.TITLE,)))
    return abilities


def judge_ability(ability: Ability, findings: Mapping[str, Finding]) -> tuple[str, list[str]]:
    """Whether something can be done (the worst state of what it needs), and what is in its way."""
    needed = list(map(findings.__getitem__, ability.needs))
    lacking = []
    for finding in needed:
        if finding.state != OK:
            lacking.append(finding.name)
    return worst_state(needed), lacking

"""Every command explains itself and refuses what is misspelt: at once, without PyTorch, and leaving
every file as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config.overrides import RUN, TRAINING

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "torch_fidelity", "sklearn", "scipy", "matplotlib", "hydra")
# runs a command as `python -m` does, and says on the last line of stderr what it has loaded
PROBE = f"""
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print("loaded:", *loaded, file=sys.stderr)
"""
ALL_OF_RUN = [*RUN.group_defaults(), *RUN.plain_settings()]
BENCHMARKS = ["methods", "blocks", "repeats", "batch", "lengths", "variants", "rounds", "profile"]
EVALUATE = ["samples", "reference", "extractor", "weights", "fp", "n", "prc_dtype", "batch"]
TABLE = ["name", "scale", "seeds", "workers", "engine", "publish", "reference", "inception"]

# every command: what its help must name, an argument that is misspelt, and the word meant
COMMANDS: dict[str, tuple[list[str], str, str]] = {
    "run": (ALL_OF_RUN, "methd=rtn", "method"),
    "table": ([*TABLE, *ALL_OF_RUN], "name=compnents", "components"),
    "render": (["name", "out", "runs", "from", "readme", "check"], "--chek", "check"),
    "render.claims": ([], "--chek", "--help"),
    "registry.sweeps": ([], "--hlp", "--help"),
    "identity.migrate": (["folders"], "foldrs=x", "folders"),
    "sample": (
        ["n", "n_per_class", "rounding", "format", "out", *ALL_OF_RUN],
        "ronding=x",
        "rounding",
    ),
    "evaluate": ([*EVALUATE, "device", "cache", "out"], "refrence=x", "reference"),
    "evaluate.fp_gate": (["results"], "--reslts", "results"),
    "allocation": (["by", "bits", "budget", "out", *ALL_OF_RUN], "budgt=1", "budget"),
    "doctor": (["reference", "inception", "heldout", "runs"], "helout=x", "heldout"),
    "estimate": (["device", "gpus", "page"], "gpu=8", "gpus"),
    "statistics": (["model", "weights", "record"], "recrd=true", "record"),
    "speed": (["what", *BENCHMARKS, *ALL_OF_RUN], "what=calibrat", "calibrate"),
    "export": (["out", "rest", "format", *ALL_OF_RUN], "formt=int8", "format"),
    "train_zoo": (
        [*TRAINING.group_defaults(), *TRAINING.plain_settings()],
        "model=rar_twn",
        "rar_twin",
    ),
    "train_zoo.quality": (["model", "record", "data", *ALL_OF_RUN], "recrd=true", "record"),
    "train_zoo.cards": ([], "--hlp", "--help"),
    "data": (["command", "folder"], "chek", "check"),
}


def probe(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    line = [sys.executable, "-c", PROBE, f"experiments.{command}", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module", autouse=True)
def untouched() -> None:
    """After all of these commands the working tree is what it was before."""
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    diff = ["git", "diff"]
    before = [subprocess.check_output(line, cwd=ROOT) for line in (status, diff)]
    yield
    assert [subprocess.check_output(line, cwd=ROOT) for line in (status, diff)] == before


def test_every_command_is_among_them() -> None:
    texts = {path: path.read_text() for path in (ROOT / "experiments").rglob("*.py")}
    modules = {
        ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
        for path, text in texts.items()
        if '__name__ == "__main__"' in text
    }
    names = {module.removesuffix(".__main__") for module in modules}
    workers = {"table.workers", "speed.baseline_worker"}  # which commands start, and nobody else
    assert names - workers == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_loads_nothing_heavy(command: str) -> None:
    options, _, _ = COMMANDS[command]
    done = probe(command, "--help")
    assert done.returncode == 0
    assert done.stderr == "loaded:\n"
    assert f"python -m experiments.{command}" in done.stdout
    for name in options:
        assert f"\n  {name}=" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_misspelt_is_refused_in_one_line_with_what_was_meant(command: str) -> None:
    _, argument, meant = COMMANDS[command]
    done = probe(command, argument)
    assert done.returncode == 1
    assert done.stdout == ""
    refusal, loaded = done.stderr.splitlines()
    if refusal.startswith("loaded"):  # the interpreter prints the refusal as it exits
        refusal, loaded = loaded, refusal
    assert refusal.startswith("error: ")
    assert meant in refusal.rpartition(";")[2]
    assert loaded == "loaded:"


def test_a_misspelt_field_of_a_group_is_refused_as_soon() -> None:
    done = probe("run", "method.gsp=true")
    assert done.returncode == 1
    assert "mean gps?" in done.stderr
    assert "loaded:\n" in done.stderr


def test_validating_a_config_loads_torch_at_most_and_not_its_compiler() -> None:
    heavy = (*HEAVY[1:-1], "torch._dynamo")
    code = (
        "import sys, experiments.run.__main__\n"
        "from experiments.config.compose import configure\n"
        "configure(['model=rar_twin', 'method=ptq4arvg'])\n"
        f"print(*(name for name in {heavy} if name in sys.modules))"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"


def test_the_choices_of_options_are_those_of_the_code_behind_them() -> None:
    from experiments.evaluate.options import PRC_DTYPES
    from experiments.evaluate.precision_recall import DTYPES
    from experiments.export.options import NUMBER_FORMATS
    from experiments.images import microbatches
    from experiments.sample.options import ROUNDINGS
    from ptq.int8.exports.encoding import REST

    assert tuple(DTYPES) == PRC_DTYPES
    assert tuple(REST) == NUMBER_FORMATS
    assert microbatches.ROUNDINGS == ROUNDINGS


def test_help_of_sample_tells_its_own_default_of_the_method() -> None:
    assert "\n  method=fp " in probe("sample", "--help").stdout
    assert "\n  method=ptq4arvg " in probe("run", "--help").stdout

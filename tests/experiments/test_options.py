"""The reader of command lines: values by the fields' types, what is refused, and help."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from experiments.config.overrides import RUN, TRAINING
from experiments.options import (
    answer_help,
    help_text,
    nearest,
    option,
    option_names,
    parse_options,
    refuse_unknown,
)
from ptq.config.files import CONF
from ptq.spec import ConfigError


@dataclass
class Options:
    """One option of every kind."""

    samples: str = option(help="a folder")
    out: str | None = option(None, help="another folder")
    n: int | None = option(None, help="how many", at_least=1)
    seed: int = option(0, help="any integer")
    rounds: int = option(3, help="bounded", at_least=1, at_most=100)
    alpha: float = option(0.5, help="a number")
    publish: bool = option(False, help="a switch")
    kind: str = option("npz", help="a choice", choices=("npz", "png"))
    variants: list[str] = option(("fp32",), help="choices", choices=("fp32", "bf16"))
    lengths: list[int] | None = option(None, help="integers", at_least=1)
    from_: str = option("here", help="a word of Python's")
    workers: int = option(1, help="processes", formerly="jobs")


def parse(*arguments: str) -> Options:
    options, others = parse_options(Options, ["samples=x", *arguments])
    refuse_unknown(others, option_names(Options))
    return options


@pytest.mark.parametrize(
    "text",
    [
        "run #2",
        "2024_11_28",
        "@x",
        "[w8] x",
        "%x",
        "1e3",
        "true",
        "a=b",
        "{a: b}",
        "null",
        "",
        " x",
    ],
)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert parse(f"samples={text}").samples == text
    assert parse("--samples", text).samples == text
    assert parse(f"--samples={text}").samples == text


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("out=null", "out", None),
        ("n=null", "n", None),
        ("n=12", "n", 12),
        ("seed=-1", "seed", -1),
        ("alpha=1e-3", "alpha", 1e-3),
        ("publish=true", "publish", True),
        ("publish=False", "publish", False),
        ("--publish", "publish", True),
        ("kind=png", "kind", "png"),
        ("variants=bf16", "variants", ["bf16"]),
        ("variants=fp32,bf16", "variants", ["fp32", "bf16"]),
        ("variants=[fp32, bf16]", "variants", ["fp32", "bf16"]),
        ("lengths=[64]", "lengths", [64]),
        ("lengths=null", "lengths", None),
        ("from=there", "from_", "there"),
        ("workers=2", "workers", 2),
        ("jobs=2", "workers", 2),
        ("--jobs=2", "workers", 2),
    ],
)
def test_values_are_of_their_fields_types(argument: str, name: str, value: object) -> None:
    found = getattr(parse(argument), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("publish=yes", "publish: 'yes' is not a boolean, allowed are true and false"),
        ("publish=null", "publish: 'null' is not a boolean, allowed are true and false"),
        ("n=many", "n: many is not a positive integer"),
        ("n=0", "n: 0 is not a positive integer"),
        ("n=1.5", "n: 1.5 is not a positive integer"),
        ("seed=one", "seed: one is not an integer"),
        ("rounds=0", "rounds: 0 is not an integer from 1 to 100"),
        ("rounds=101", "rounds: 101 is not an integer from 1 to 100"),
        ("rounds=1e1", "rounds: 1e1 is not an integer from 1 to 100"),
        ("alpha=nan", "alpha: 'nan' is not a number"),
        ("alpha=-inf", "alpha: '-inf' is not a number"),
        ("seed=null", "seed: null is not an integer"),
        ("alpha=x", "alpha: 'x' is not a number"),
        ("kind=jpg", "kind: 'jpg' is not one of npz, png; did you mean png?"),
        ("variants=[]", "variants: [] is an empty list"),
        ("variants=fp32,bf17", "variants: 'bf17' is not one of fp32, bf16; did you mean bf16?"),
        ("lengths=[64,0]", "lengths: 0 is not a positive integer"),
        ("--kind", "kind: its value is missing, give kind=VALUE"),
        ("kind", "kind: its value is missing, give kind=VALUE"),
    ],
)
def test_a_value_of_another_type_is_refused(argument: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argument)
    assert str(caught.value) == said


@pytest.mark.parametrize("argument", ["publsh=true", "--publsh", "publsh"])
def test_a_misspelt_name_is_refused_with_the_nearest(argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argument)
    assert str(caught.value).startswith("publsh: no such option, allowed are samples, out, n, ")
    assert str(caught.value).endswith("; did you mean publish?")


def test_a_missing_option_is_said_and_a_misspelt_one_before_it() -> None:
    with pytest.raises(ConfigError, match="^samples: missing, give a folder$"):
        parse_options(Options, [])
    with pytest.raises(ConfigError, match="^sampels: no such option, .* did you mean samples\\?$"):
        parse_options(Options, ["sampels=x"])


def test_of_an_option_given_twice_the_last_counts() -> None:
    assert parse("n=1", "n=2").n == 2
    assert parse("workers=1", "jobs=2").workers == 2


def test_what_is_no_option_is_left() -> None:
    _, others = parse_options(Options, ["samples=x", "method.gps=false", "+a=b", "-m", "n=1"])
    assert others == ["method.gps=false", "+a=b", "-m"]


def test_words_without_an_equals_sign_are_the_positional_option() -> None:
    @dataclass
    class Words:
        results: list[str] = option(help="files", positional=True)

    @dataclass
    class Word:
        command: str = option(help="one", choices=("fetch", "check"), positional=True)

    # annotations of classes that a function holds are resolved by hand
    Words.__annotations__["results"] = list[str]
    Word.__annotations__["command"] = str
    assert parse_options(Words, ["a b", "c"])[0].results == ["a b", "c"]
    assert parse_options(Word, ["check"])[0].command == "check"
    with pytest.raises(ConfigError, match="^command: 'check' is one too many$"):
        parse_options(Word, ["fetch", "check"])


def test_help_has_every_option_with_its_default_and_what_is_allowed() -> None:
    shown = help_text("What it does.", {"Options": Options}, "More.")
    assert shown.startswith("What it does.\n\nOptions:\n  samples=  ")
    assert shown.endswith("\n\nMore.")
    assert "  publish=false       a switch (true or false)\n" in shown
    assert "  n=null              how many (integer or null; at least 1)\n" in shown
    assert "  kind=npz            a choice (one of npz, png)\n" in shown
    assert "  from=here " in shown
    assert "a folder (text; required)" in shown
    assert "processes (integer; formerly jobs=)" in shown
    assert all(len(line) <= 100 for line in shown.splitlines())


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_answered_before_anything_else(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "nonsense=1", flag])
    with pytest.raises(SystemExit) as stopped:
        answer_help("What it does.", {"Options": Options})
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("What it does.\n")


# --- overrides of a config


def test_a_run_has_the_groups_of_its_config_and_no_others() -> None:
    groups = ["model", "method", "quant", "calib", "scope", "sampler", "eval", "tracker"]
    assert list(RUN.group_defaults()) == groups
    assert list(RUN.plain_settings()) == [
        "seed",
        "dtype",
        "device",
        "mode",
        "runs",
        "heldout",
        "plugins",
    ]
    shown = RUN.describe()
    for group in groups:
        for path in (CONF / group).glob("*.yaml"):
            assert path.stem in shown
    for foreign in ("train_zoo", "table=", "engine", "sweep"):
        assert foreign not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=rar_twin", "method.gps=false", "quant=w8a8,w6a6", "++seed=1"],
        ["hydra.verbose=true", "method=glob(*)", "method=${x}", "calib.n=64"],
        ["sampler.settings.top_k=3", "method.sites.0=qkv", "model@other.x=rar_twin"],
    ],
)
def test_what_hydra_understands_passes(arguments: list[str]) -> None:
    RUN.check(arguments)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("metod=rtn", "metod: no such option or setting, allowed are n, model, method, "),
        ("metod.gps=false", "metod.gps: no such option or setting, allowed are n, model, "),
        ("method=ptq4arv", "method: 'ptq4arv' is not one of fp, "),
        ("quant=w8a8,w6a5", "quant: 'w6a5' is not one of fp"),
        ("seed", "seed: its value is missing, give seed=VALUE"),
        ("method.gsp=true", "method.gsp: no such field, allowed are name, quantized, omniquant,"),
        ("+method.gsp=true", "method.gsp: no such field, allowed are name, quantized,"),
        ("quant.weights.bitz=4", "quant.weights.bitz: no such field, allowed are bits, "),
        ("quant.weight.bits=4", "quant.weight.bits: no such field, allowed are name, weights,"),
    ],
)
def test_a_misspelt_override_is_refused(argument: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RUN.check(["model=rar_twin", argument], ["n"])
    assert str(caught.value).startswith(said)


def test_a_training_has_its_own_models() -> None:
    TRAINING.check(["model=extractor", "out=x"])
    with pytest.raises(ConfigError, match="did you mean rar_tokenizer"):
        TRAINING.check(["model=rar_tokeniser"])


def test_a_model_in_training_has_the_fields_of_its_file() -> None:
    TRAINING.check(["model.planted.weight=0"])
    TRAINING.check(["model=rar_twin,var_twin", "model.planted.weigth=0"])  # for Hydra to say
    TRAINING.check(["+model.note=new"])
    with pytest.raises(ConfigError, match="no such field, allowed are weight, .*mean weight"):
        TRAINING.check(["model.planted.weigth=0"])
    with pytest.raises(ConfigError, match="^model.planted.weight: no such field, allowed are "):
        TRAINING.check(["model.planted.weight=0", "model=extractor"])


def test_the_nearest_name_is_found_whatever_its_case_and_hyphens() -> None:
    allowed = ["var_d16", "rar_b", "PAR"]
    assert nearest("RAR-B", allowed) == "; did you mean rar_b?"
    assert nearest("par", allowed) == "; did you mean PAR?"
    assert nearest("nothing", allowed) == ""

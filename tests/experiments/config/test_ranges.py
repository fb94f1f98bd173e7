"""Values outside their range are refused in one line, values inside pass: kind by kind, and by a
fuzz test whose expected answers come from a table of its own."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.compose import CONF, configure, validate_config
from experiments.config.ranges import field_ranges, sampler_ranges
from experiments.config.recipe import boolean_fields
from experiments.config.schema import RunConfig, listed_fields
from models.registry import PRESETS
from ptq.config.schema import method_schema
from ptq.options import option_ranges
from ptq.ranges import FilePath, Name, Text
from ptq.registry.entries import TRANSFORMS
from ptq.registry.plugins import declared_switches
from ptq.spec import ConfigError
from tests.experiments.config.test_config import leaves


def refusal(*overrides: str) -> str:
    """The one line that refuses overrides."""
    with pytest.raises(ConfigError) as caught:
        configure(list(overrides))
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- the table is whole


def test_every_field_of_the_schema_has_a_range_and_no_other() -> None:
    paths = {path for path, value in leaves(RunConfig()) if not isinstance(value, dict)}
    assert set(field_ranges()) == paths
    assert {f"method.options.{name}" for name in option_ranges()} < paths


def test_every_default_lies_in_its_range() -> None:
    for path, value in leaves(RunConfig()):
        # what may hold any fields has a check of its own
        is_free = path in ("sampler.settings", "quant.by_kind", "quant.by_layer")
        assert is_free or field_ranges()[path].allows(value), path


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_of_a_sampler_has_a_range_in_which_its_default_lies(name: str) -> None:
    ranges = sampler_ranges(PRESETS[name])
    for settings in PRESETS[name].samplers.values():
        assert set(settings) == set(ranges)
        assert all(ranges[key].allows(value) for key, value in settings.items())


# --- kinds of nonsense

MISSING_VALUES = [
    "method.quantized",
    "seed",
    "calib.n",
    "runs",
    "quant.weights.bits",
    "scope.kinds",
]


@pytest.mark.parametrize("field", MISSING_VALUES)
def test_a_missing_value_is_no_default(field: str) -> None:
    assert refusal(f"{field}=???").startswith(f"{field}: its value is missing, it must be ")


@pytest.mark.parametrize("group", ["model", "method", "quant", "calib", "tracker"])
@pytest.mark.parametrize("value", ["null", "1", "???", "[rar_twin]", "{a: 1}", "true"])
def test_a_group_takes_a_name(group: str, value: str) -> None:
    assert refusal(f"{group}={value}").startswith(f"{group}: ")


@pytest.mark.parametrize("argument", ["~method", "~tracker", "~calib.n", "~seed"])
def test_nothing_is_left_out_of_a_config(argument: str) -> None:
    assert refusal(argument).startswith(f"{argument}: nothing can be left out of a config")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("method.gps=1", "method.gps: 1 is not a boolean, allowed are true and false"),
        ("method.stwq=0", "method.stwq: 0 is not a boolean"),
        ("method.gps='true'", "method.gps: 'true' is not a boolean"),
        ("scope.matmuls=yes", "scope.matmuls: 'yes' is not a boolean"),
        ("method.options.svd.grid=1", "method.options.svd.grid: 1 is not a boolean"),
        ("seed='5'", "seed: '5' is not an integer"),
        ("seed=true", "seed: true is not an integer"),
        ("calib.n=8.0", "calib.n: 8.0 is not an integer"),
        ("eval.n='64'", "eval.n: '64' is not an integer"),
        ("method.alpha='0.5'", "method.alpha: '0.5' is not a number"),
        ("method.alpha=true", "method.alpha: true is not a number"),
        ("method.options.gptq.damping='1'", "method.options.gptq.damping: '1' is not a number"),
        ("seed=null", "seed: null is not an integer"),
        ("runs=null", "runs: null is not a path"),
        ("method.sites=qkv", "method.sites: 'qkv' is not a list"),
        ("scope.kinds=null", "scope.kinds: null is not a list"),
        ("quant.weights=8", "quant.weights: 8 is not a group of fields, allowed are bits,"),
        ("method.options=null", "method.options: null is not a group of fields"),
        ("sampler.settings=3", "sampler.settings: 3 is not a group of settings"),
    ],
)
def test_a_value_is_of_its_fields_type(given: str, said: str) -> None:
    assert refusal(given).startswith(said)


NAMED_FIELDS = ["method.name", "quant.name", "scope.name", "eval.name"]
BAD_NAMES = ["''", "../x", "a/b", "..", "'a b'", "'a\tb'", "a" * 65, "5", "null", "'.x'"]


@pytest.mark.parametrize("field", NAMED_FIELDS)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_stays_in_the_folder_of_runs(field: str, name: str) -> None:
    assert refusal(f"{field}={name}").startswith(f"{field}: ")


@pytest.mark.parametrize("given", ["model.name=../rar_twin", "calib.selector=../dgc"])
def test_a_word_is_one_of_those_there_are(given: str) -> None:
    assert " is not one of " in refusal(given)


@pytest.mark.parametrize("name", ["mine", "rtn_2", "w8-a8", "a.b+c", "a" * 64])
def test_a_name_of_ones_own_passes(name: str) -> None:
    assert configure([f"method.name={name}"]).method.name == name


def test_a_name_has_no_nul() -> None:
    for allowed in (Name(), FilePath(), Text(9)):
        assert not allowed.allows("a\0b")
        assert not allowed.allows("a\nb")
        assert not allowed.allows("")
        assert not allowed.allows(10**5000)


@pytest.mark.parametrize("runs", ["", "''", "' '", "a" * 256, "x/" * 3000, "true"])
def test_the_folder_of_runs_is_a_path(runs: str) -> None:
    assert refusal(f"runs={runs}").startswith("runs: ")


@pytest.mark.parametrize(
    ("typed", "read"),
    [("2024", "2024"), ("'2024_11_28'", "2024_11_28"), ("../runs", "../runs"), ("/a b", "/a b")],
)
def test_a_path_may_be_any_text(typed: str, read: str) -> None:
    assert configure([f"runs={typed}"]).runs == read


@pytest.mark.parametrize("typed", ["2024_11_28", "1e3"])
def test_a_number_that_is_not_read_as_it_is_typed_needs_quotes(typed: str) -> None:
    assert refusal(f"runs={typed}").endswith(f"quote it: \"runs='{typed}'\"")


@pytest.mark.parametrize(
    "given",
    [
        "calib.n=1000000000000",
        "calib.n=1e12",
        "calib.batch=1000000000",
        "eval.n=1000000000",
        "eval.sequences=-1",
        "sampler.microbatch=1000000000",
        "method.options.os_plus.steps=1000000000",
        "method.options.svd.rank=1000000000",
        "method.options.omniquant.epochs=1000000000",
        "method.options.gptq.block=0",
        "quant.weights.bits=15",
        "quant.weights.bits=17",
        "quant.by_kind.fc2.weights.bits=1",
        "quant.by_layer.0.fc2.weights.group_size=0",
        "quant.activations.bits=-1",
        "seed=9223372036854775808",
        "method.alpha=nan",
        "method.alpha=inf",
        "method.options.gptaq.correction=nan",
        "method.options.repq.highest=inf",
        "method.options.geometric.steps=0",
    ],
)
def test_a_number_is_bounded_and_finite(given: str) -> None:
    field = given.partition("=")[0]
    assert refusal(given).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("mar_twin", "num_iter=0"),
        ("mar_twin", "num_iter=2.5"),
        ("mar_twin", "cfg_schedule=cosine"),
        ("mar_twin", "diffusion_steps='0'"),
        ("mar_twin", "diffusion_steps='1001'"),
        ("mar_twin", "diffusion_steps=true"),
        ("mar_twin", "cfg=inf"),
        ("rar_twin", "temperature=0"),
        ("rar_twin", "temperature=1e-40"),
        ("rar_twin", "guidance_scale=nan"),
        ("rar_twin", "guidance_power=-1"),
        ("rar_twin", "num_iter=4"),
        ("var_twin", "top_k=-1"),
        ("var_twin", "top_k=1e6"),
        ("var_twin", "top_p=1.1"),
        ("var_twin", "cfg=-inf"),
        ("var_twin", "more_smooth=true"),
        ("var_twin", "more_smooth=0"),
        ("par_twin", "top_p=-0.1"),
        ("par_twin", "top_k=513"),
        ("par_twin", "cfg_interval=-2"),
        ("par_twin", "temperature=-1"),
        ("par_twin", "cfg_scale='2'"),
    ],
)
def test_a_setting_of_a_sampler_has_a_range(model: str, setting: str) -> None:
    field = f"sampler.settings.{setting.partition('=')[0]}"
    assert refusal(f"model={model}", f"sampler.settings.{setting}").startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("mar_twin", "num_iter=1"),
        ("mar_twin", "diffusion_steps='4'"),
        ("mar_twin", "diffusion_steps=ddim25"),
        ("mar_twin", "cfg_schedule=constant"),
        ("rar_twin", "guidance_scale=0"),
        ("rar_twin", "temperature=0.01"),
        ("var_twin", "top_k=0"),
        ("var_twin", "top_p=0"),
        ("par_twin", "top_k=512"),
        ("par_twin", "cfg_interval=-1"),
        ("par_twin", "top_p=1"),
    ],
)
def test_a_setting_at_the_end_of_its_range_passes(model: str, setting: str) -> None:
    assert configure([f"model={model}", f"sampler.settings.{setting}"]).sampler.settings


# --- recipes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=smoothquant", "method.sites=[]"], "method.sites: [] gives smoothquant nothing"),
        (["method=repq", "method.sites=[diffusion]"], "method.sites: [diffusion] gives repq"),
        (["method=gps_only", "scope=blocks", "method.sites=[head]"], "method.sites: [head] gives"),
        (["method=svdquant", "method.options.svd.sites=[]"], "method.options.svd.sites: [] gives"),
        (
            ["method=quarot_paper", "method.options.hadamard.sites=[]"],
            "method.options.hadamard.sites: [] gives hadamard nothing",
        ),
        (["scope.kinds=[]", "scope.matmuls=false", "method=rtn"], "scope.kinds: [] without"),
        (
            [
                "method=omniquant",
                *(
                    f"method.options.omniquant.{name}=false"
                    for name in ("clip", "transform", "values")
                ),
            ],
            "method.options.omniquant: clip, transform and values are false",
        ),
        (["method=fp", "method.quantized=true"], "method.quantized: true does not go with"),
        (["method=rtn", "method.quantized=false"], "method.quantized: false does not go with"),
        (["method.name=fp"], "method.quantized: true does not go with the method fp"),
    ],
)
def test_a_method_that_would_be_another_one_is_refused(overrides: list[str], said: str) -> None:
    assert refusal(*overrides).startswith(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=rtn", "method.alpha=0.3"], "method.alpha: its value changes nothing without"),
        (["method=rtn", "method.gps_form=eq16"], "method.gps_form: its value changes nothing"),
        (["method=rtn", "method.sites=[qkv]"], "method.sites: its value changes nothing"),
        (["method=rtn", "method.options.svd.rank=8"], "method.options.svd: its settings change"),
        (["method=rtn", "method.options.gptq.block=8"], "method.options.gptq: its settings change"),
        (["method=stwq", "method.stwq=false"], "method: stwq has no switch on"),
        (["method=smoothquant", "method.smoothquant=false"], "method: smoothquant has no switch"),
        (
            ["method=staq", "method.block_hadamard=true"],
            "method.block_hadamard: it changes nothing",
        ),
    ],
)
def test_a_setting_that_changes_nothing_is_said(
    overrides: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        configure(overrides)
    assert [message.startswith(said) for message in caplog.messages] == [True]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_no_method_as_it_ships_has_such_a_setting(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        configure([f"method={name}"])
    assert not caplog.messages


def test_every_method_has_a_switch() -> None:
    assert set(TRANSFORMS) < set(boolean_fields(method_schema()))
    # what is read without importing them
    assert sorted(declared_switches()) == sorted(TRANSFORMS)
    assert listed_fields().keys() == asdict(RunConfig()).keys()
    assert listed_fields()["method"].keys() == asdict(RunConfig())["method"].keys()


# --- what Hydra cannot read


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("runs=a=b", "runs='a=b'"),
        ("model.weights=/a(b", "model.weights='/a(b'"),
        ("runs=x{y", "runs='x{y'"),
        ("tracker.group=it's", "tracker.group='it\\'s'"),
        ("seed=[1", "seed='[1'"),
    ],
)
def test_an_argument_that_hydra_cannot_read_is_named_with_its_quotes(
    argument: str, quoted: str
) -> None:
    line = refusal(argument)
    assert line.startswith(f"{argument}: Hydra cannot read it (")
    assert line.endswith(f'needs quotes: "{quoted}"')


@pytest.mark.parametrize("given", ["runs=a=b", "model.weights=/a(b", "tracker.group=it's"])
def test_the_quotes_that_are_proposed_work(given: str) -> None:
    key, _, value = given.partition("=")
    config = configure([refusal(given).rpartition('quotes: "')[2].removesuffix('"')])
    group, _, name = key.rpartition(".")
    assert getattr(getattr(config, group) if group else config, name) == value


@pytest.mark.parametrize(
    "given", ["seed=${seed}", "seed=${nowhere}", "runs=${oc.env:NOWHERE_AT_ALL}"]
)
def test_an_interpolation_that_leads_nowhere_is_refused(given: str) -> None:
    refusal(given)


# --- fuzz: expected answers, written apart from the validators


@dataclass(frozen=True)
class Expectation:
    """Draws of values that are right for a field, and of some that are not."""

    inside: Callable[[random.Random], object]
    outside: Callable[[random.Random], object]


NO_NUMBERS = ["x", True, None, math.nan, math.inf, [1], {"a": 1}, "???"]
NO_FLAGS = [0, 1, "yes", "true", None, 0.5, [True], "???"]
NO_NAMES = ["", "../x", "a/b", "a\0b", "a b", "x" * 300, None, 3, True, ["a"], "..", "???"]
NO_PATHS = ["", " ", "a\0b", "a\nb", "y" * 300, True, ["a"], {"a": 1}, "???"]


def whole(least: int, most: int) -> Expectation:
    """An integer."""
    beyond = [least - 1, most + 1, least - 10**6, most * 1000 + 1, least + 0.5, float(least), "5"]
    return Expectation(
        inside=lambda draw: draw.choice([least, most, draw.randint(least, most)]),
        outside=lambda draw: draw.choice([*beyond, *NO_NUMBERS]),
    )


def real(least: float, most: float, ends: bool = True) -> Expectation:
    """A number."""
    beyond = [least - 0.001, most * 1.01 + 0.001, -1e30, 1e30, "0.5"]
    between = [least, most] if ends else []
    return Expectation(
        inside=lambda draw: draw.choice([*between, draw.uniform(least + 1e-6, most * 0.999)]),
        outside=lambda draw: draw.choice([*beyond, *NO_NUMBERS]),
    )


def one_of(*words: str) -> Expectation:
    return Expectation(
        inside=lambda draw: draw.choice(words),
        outside=lambda draw: draw.choice(
            [f"{words[0]}x", words[0].upper(), "", 1, True, None, "../a"]
        ),
    )


def some_of(*words: str) -> Expectation:
    return Expectation(
        inside=lambda draw: draw.sample(words, draw.randint(1, len(words))),
        outside=lambda draw: draw.choice([[words[0], "x"], words[0], None, 3, [1], [[words[0]]]]),
    )


FLAG = Expectation(lambda draw: draw.choice([True, False]), lambda draw: draw.choice(NO_FLAGS))
NAME = Expectation(
    lambda draw: draw.choice(["mine", "w8a8", "a-b_c.d", "X9"]),
    lambda draw: draw.choice(NO_NAMES),
)
PATH = Expectation(
    lambda draw: draw.choice(["runs", "/tmp/runs", "../runs", "a b", "ü", "run #2"]),
    lambda draw: draw.choice(NO_PATHS),
)
SITES = ("qkv", "proj", "fc1", "fc2", "head", "adaln")
RAR = [f"sampler.settings.{name}" for name in ("guidance_scale", "guidance_power", "temperature")]
# of model=rar_twin, method=ptq4arvg; fields whose values exclude each other are left out
EXPECTED = {
    "seed": whole(0, 2**63 - 1),
    "calib.seed": whole(0, 2**63 - 1),
    "calib.n": whole(1, 100_000),
    "calib.batch": whole(1, 100_000),
    "calib.selector": one_of("dgc", "dgc_released", "random", "uniform", "cond_only"),
    "calib.layout": one_of("inference", "released"),
    "eval.n": whole(1, 10_000_000),
    "eval.sequences": whole(1, 10_000_000),
    "eval.batch": whole(1, 100_000),
    "sampler.microbatch": whole(1, 100_000),
    "sampler.compiled": FLAG,
    "sampler.name": one_of("official", "ptq4arvg"),
    RAR[0]: real(0, 1000),
    RAR[1]: real(0, 100),
    RAR[2]: real(0, 1000, ends=False),
    "quant.name": NAME,
    "method.name": NAME,
    "quant.weights.bits": whole(2, 8),
    "quant.activations.bits": whole(2, 8),
    "quant.weights.symmetric": FLAG,
    "quant.weights.granularity": one_of("out_channel", "tensor"),
    "quant.activations.granularity": one_of("tensor"),
    "quant.activations.observer": one_of("exact", "histogram"),
    "quant.activations.range": one_of("minmax", "percentile_mse"),
    "method.stwq": FLAG,
    "method.gps": FLAG,
    "method.exclude_sinks": FLAG,
    "method.symmetric": FLAG,
    "method.alpha": real(0, 1),
    "method.gps_form": one_of("squares", "eq16"),
    "method.sites": some_of(*SITES),
    "method.rounder": one_of("nearest", "gptq"),
    "method.options.os_plus.steps": whole(1, 100_000),
    "method.options.os_plus.floor": real(0, 1, ends=False),
    "method.options.svd.rank": whole(1, 65_536),
    "method.options.omniquant.epochs": whole(0, 10_000),
    "method.options.omniquant.clip_lr": real(0, 1, ends=False),
    "method.options.gptq.damping": real(0, 100, ends=False),
    "method.options.hadamard.sites": some_of(*SITES),
    "scope.kinds": some_of(*SITES),
    "tracker.mode": one_of("none", "wandb_offline", "wandb"),
    "dtype": one_of("float32", "float64"),
    "device": one_of("auto", "cpu", "cuda"),
    "mode": one_of("simulate"),
    "runs": PATH,
}


@pytest.fixture(scope="module")
def composed() -> object:
    """The config that the fuzz test changes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["model=rar_twin", "method=ptq4arvg"])


@pytest.mark.parametrize("number", range(300))
def test_of_random_configs_only_those_outside_the_table_are_refused(
    composed: object, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(1900 + number)
    config = OmegaConf.masked_copy(composed, list(composed))
    OmegaConf.set_struct(config, False)
    fields = draw.sample(sorted(EXPECTED), 4)
    if "method.sites" in fields and "scope.kinds" in fields:
        fields.remove("scope.kinds")  # the two must meet, which a test above states
    stray = draw.choice(fields) if number % 2 else None
    for field in fields:
        expectation = EXPECTED[field]
        value = expectation.outside(draw) if field == stray else expectation.inside(draw)
        OmegaConf.update(config, field, value, merge=False)
    if "scope.kinds" in fields and stray != "scope.kinds":
        OmegaConf.update(config, "scope.kinds", [*config.scope.kinds, "qkv"], merge=False)
    if stray is None:
        assert isinstance(validate_config(config), RunConfig)
        return
    with pytest.raises(ConfigError) as caught:
        validate_config(config)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(stray)

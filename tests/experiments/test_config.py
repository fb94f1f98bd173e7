"""Every config composes, says what CONTRACT.md says, and the identity of a run is what determines its numbers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments import config as schema
from experiments.config import RunConfig, explain, identity, recipe, validate
from experiments.provenance import digest
from experiments.run import CONF
from ptq.types import ConfigError
from tests.experiments.cells import config_of

NO_GROUPS = ("table", "train_zoo")  # read by other commands
OPTIONS = sorted((p.parent.name, p.stem) for p in CONF.glob("*/*.yaml") if p.parent.name not in NO_GROUPS)
METHODS = [name for group, name in OPTIONS if group == "method" and name != "fp"]
NAMED = {"calib": "selector", "tracker": "mode"}  # which field of a group repeats the file's name
MEANINGS = {  # method: transforms, static token-wise, sinks left out, dynamic, range
    "rtn": ((), False, False, False, "percentile_mse"),
    "rtn_minmax": ((), False, False, False, "minmax"),
    "rtn_dynamic": ((), False, False, True, "percentile_mse"),
    "smoothquant": (("smoothquant",), False, False, False, "percentile_mse"),
    "stwq": ((), True, True, False, "percentile_mse"),
    "sq_stwq": (("smoothquant",), True, True, False, "percentile_mse"),
    "gps_only": (("gps",), True, True, False, "percentile_mse"),
    "ptq4arvg": (("smoothquant", "shift", "gps"), True, True, False, "percentile_mse"),
    "ptq4arvg_released": (("smoothquant", "shift", "gps"), True, True, False, "percentile_mse"),
}
NOT_IDENTITY = {"tracker.mode", "device", "runs", "model.weights", "model.tokenizer_weights"}


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_file_of_every_group_composes_under_its_name(group: str, name: str) -> None:
    chosen = getattr(config_of(f"{group}={name}"), group)
    assert getattr(chosen, NAMED.get(group, "name")) == name


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "train_zoo" / "model").glob("*.yaml")))
def test_every_training_config_composes(name: str) -> None:
    with initialize_config_dir(str(CONF / "train_zoo"), version_base="1.3"):
        plain = OmegaConf.to_container(compose("config", [f"model={name}"]), resolve=True, throw_on_missing=True)
    assert plain["model"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_recipe_that_the_contract_says(name: str) -> None:
    chosen = recipe(config_of(f"method={name}"))
    dynamic = chosen.activations.granularity == "token_dynamic"
    assert MEANINGS[name] == (
        chosen.transforms, chosen.stwq, chosen.exclude_sinks, dynamic, chosen.activations.range
    )
    assert chosen.weights.range == chosen.activations.range
    assert chosen.released == (name == "ptq4arvg_released")
    assert (chosen.alpha, chosen.gps_form, chosen.weights.granularity) == (0.5, "squares", "out_channel")


def test_full_precision_is_not_quantized() -> None:
    assert not config_of("method=fp").method.quantized


@pytest.mark.parametrize("gps", [False, True])
@pytest.mark.parametrize("stwq", [False, True])
@pytest.mark.parametrize("calib", ["random", "dgc"])
def test_gps_stwq_and_dgc_switch_independently_by_config_alone(gps: bool, stwq: bool, calib: str) -> None:
    config = config_of(f"method.gps={gps}".lower(), f"method.stwq={stwq}".lower(), f"calib={calib}")
    chosen = recipe(config)
    assert chosen.transforms == (("smoothquant", "shift", "gps") if gps else ("smoothquant",))
    assert (chosen.stwq, chosen.exclude_sinks, config.calib.selector) == (stwq, stwq, calib)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("rtn_dynamic", "ptq4arvg_released")])
def test_leaving_sinks_out_follows_stwq_unless_it_is_set(name: str) -> None:
    for stwq in ("true", "false"):
        assert config_of(f"method={name}", f"method.stwq={stwq}").method.exclude_sinks == (stwq == "true")
        for own in ("true", "false"):
            chosen = config_of(f"method={name}", f"method.stwq={stwq}", f"method.exclude_sinks={own}")
            assert chosen.method.exclude_sinks == (own == "true")


@pytest.mark.parametrize(("override", "kinds", "matmuls"), [
    ("scope=paper", ("qkv", "proj", "fc1", "fc2", "head", "adaln"), True),
    ("scope=blocks", ("qkv", "proj", "fc1", "fc2"), False),
])
def test_a_scope_is_what_the_contract_says(override: str, kinds: tuple[str, ...], matmuls: bool) -> None:
    chosen = recipe(config_of(override)).scope
    assert (chosen.kinds, chosen.matmuls) == (kinds, matmuls)


@pytest.mark.parametrize(("name", "bits"), [("w8a8", (8, 8)), ("w6a6", (6, 6)), ("w4a8", (4, 8)), ("w4a4", (4, 4))])
def test_the_name_of_a_quantization_gives_its_bits(name: str, bits: tuple[int, int]) -> None:
    chosen = recipe(config_of(f"quant={name}"))
    assert (chosen.weights.bits, chosen.activations.bits) == bits


# --- what can be set, and what is refused


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of all fields that are no dataclasses."""
    for field in dataclasses.fields(value):
        child, path = getattr(value, field.name), prefix + field.name
        if dataclasses.is_dataclass(child):
            yield from leaves(child, path + ".")
        else:
            yield path, child


def override(path: str, value: object) -> str:
    if isinstance(value, bool) or value is None:
        return f"{path}={str(value).lower()}" if value is not None else f"{path}=null"
    return f"{path}=[{','.join(value)}]" if isinstance(value, list) else f"{path}={value}"


def test_every_field_of_the_schema_can_be_set_on_the_command_line() -> None:
    config = config_of()
    assert config_of(*(override(path, value) for path, value in leaves(config))) == config
    assert config_of("sampler.settings.guidance_scale=2").sampler.settings == {"guidance_scale": 2}
    assert config_of("method=rtn", "method.gps_form=eq16").method.gps_form == "eq16"


@pytest.mark.parametrize(("given", "said"), [
    ("method=ptq4arv", "method: 'ptq4arv' is not one of fp, gps_only, ptq4arvg,"),
    ("quant=w5a5x", "quant: 'w5a5x' is not one of w4a4, w4a8, w6a6, w8a8"),
    ("method.gsp=true", "method.gsp: no such field, allowed are name, quantized, smoothquant,"),
    ("+method.gsp=true", "method.gsp: no such field, allowed are name, quantized, smoothquant,"),
    ("sed=1", "sed: no such field, allowed are model, method,"),
    ("seed=one", "seed: Value 'one' of type 'str' could not be converted to Integer"),
    ("seed=-1", "seed: -1 is not an integer from 0 to"),
    ("method.gps=maybe", "method.gps: Value 'maybe' is not a valid bool"),
    ("method.alpha=1.5", "method.alpha: 1.5 is not between 0 and 1"),
    ("method.gps_form=eq15", "method.gps_form: 'eq15' is not one of squares, eq16"),
    ("method.sites=[qkw]", "method.sites: 'qkw' is not one of qkv, proj,"),
    ("scope.kinds=[qkw]", "scope.kinds: 'qkw' is not one of qkv, proj,"),
    ("quant.weights.bits=1", "quant.weights.bits: 1 is not an integer from 2 to 8"),
    ("quant.activations.bits=9", "quant.activations.bits: 9 is not an integer from 2 to 8"),
    ("quant.activations.bits=6.5", "quant.activations.bits: Value '6.5' of type 'float' could not be converted"),
    ("quant.activations.granularity=out_channel", "quant.activations.granularity: 'out_channel' is not one of tensor,"),
    ("quant.weights.range=max", "quant.weights.range: 'max' is not one of minmax, percentile_mse"),
    ("method.dynamic=true", "method.stwq: true needs static activations"),
    ("calib.n=0", "calib.n: 0 is not a positive integer"),
    ("eval.n=-3", "eval.n: -3 is not a positive integer"),
    ("sampler.microbatch=0", "sampler.microbatch: 0 is not a positive integer"),
    ("dtype=float8", "dtype: 'float8' is not one of float32, float64"),
    ("calib.selector=dcg", "calib.selector: 'dcg' is not one of dgc,"),
    ("tracker.mode=wb", "tracker.mode: 'wb' is not one of none, wandb_offline, wandb"),
    ("device=gpu", "device: 'gpu' is not one of auto, cpu, cuda"),
    ("mode=int8", "mode: 'int8' is not one of simulate"),
])
def test_a_wrong_value_is_refused_in_one_line_that_names_field_value_and_what_is_allowed(given: str, said: str) -> None:
    with pytest.raises((ConfigError, HydraException)) as caught:
        config_of(given)
    line = str(caught.value) if isinstance(caught.value, ConfigError) else explain(caught.value)
    assert line.startswith(said)
    assert "\n" not in line


# --- identity


def changed(config: RunConfig, path: str) -> RunConfig:
    """The config with another value in one field."""
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    holder: object = config
    for parent in parents:
        holder = getattr(holder, parent)
    value = getattr(holder, name)
    others = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value / 2, str: lambda: value + "x",
              list: lambda: [*value, "x"], type(None): lambda: "x"}
    setattr(holder, name, others[type(value)]())
    return config


def key(config: RunConfig, weights: str = "0123", **settings: object) -> str:
    return digest(identity(config, weights, {"guidance_scale": 3.0, **settings}))


FIELDS = [path for path, value in leaves(RunConfig()) if not isinstance(value, dict)]


@pytest.mark.parametrize("path", FIELDS)
def test_the_hash_changes_with_everything_but_tracker_paths_and_device(path: str) -> None:
    config = validate(OmegaConf.create({"method": {"name": "ptq4arvg"}}))
    assert (key(changed(config, path)) == key(config)) == (path in NOT_IDENTITY)


@pytest.mark.parametrize("path", FIELDS)
def test_the_hash_of_a_full_precision_run_ignores_quantization(path: str) -> None:
    config = validate(OmegaConf.create({"method": {"name": "fp", "quantized": False}}))
    ignored = path in NOT_IDENTITY or path.split(".")[0] in ("method", "quant", "calib", "scope")
    if path != "method.quantized":
        assert (key(changed(config, path)) == key(config)) == ignored


def test_the_hash_changes_with_weights_sampler_settings_and_result_version(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    first = key(config)
    assert key(config_of()) == first
    assert len({first, key(config, "4567"), key(config, guidance_scale=2.0), key(config, temperature=1.0)}) == 4
    monkeypatch.setattr(schema, "RESULT_VERSION", schema.RESULT_VERSION + 1)
    assert key(config) != first

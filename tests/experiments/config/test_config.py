"""Every config composes, and says what CONTRACT.md says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.compose import (
    CONF,
    are_plain,
    check_grammar,
    compose_plain,
    compose_with_hydra,
    configure,
    parse_override,
)
from experiments.config.overrides import RUN, Overrides
from experiments.config.recipe import build_recipe
from ptq.types import ConfigError
from tests.experiments.cells import config_of

NO_GROUPS = ("table", "sweep", "engine", "train_zoo")  # read by other commands
OPTIONS = sorted(
    (p.parent.name, p.stem) for p in CONF.glob("*/*.yaml") if p.parent.name not in NO_GROUPS
)
ALONE = [(group, name) for group, name in OPTIONS if RUN.stands_alone(group, name)]
NAMED = {"calib": "selector", "tracker": "mode"}  # which field of a group repeats the file's name
MEANINGS = {  # method: transforms, static token-wise, sinks left out, dynamic, range
    "rtn": ((), False, False, False, "percentile_mse"),
    "rtn_minmax": ((), False, False, False, "minmax"),
    "rtn_dynamic": ((), False, False, True, "percentile_mse"),
    "smoothquant": (("smoothquant",), False, False, False, "percentile_mse"),
    "smoothquant_paper": (("smoothquant",), False, False, False, "percentile_mse"),
    "os_plus": (("os_plus",), False, False, False, "percentile_mse"),
    "repq": (("repq",), False, False, False, "percentile_mse"),
    "repq_stwq": (("repq",), True, True, False, "percentile_mse"),
    "sq_repq": (("smoothquant", "repq"), False, False, False, "percentile_mse"),
    "stwq": ((), True, True, False, "percentile_mse"),
    "sq_stwq": (("smoothquant",), True, True, False, "percentile_mse"),
    "svdquant": (("svd",), False, False, True, "percentile_mse"),
    "svdquant_paper": (("svd",), False, False, True, "percentile_mse"),
    "omniquant": ((), False, False, True, "percentile_mse"),
    "omniquant_paper": ((), False, False, True, "percentile_mse"),
    "quarot": (("hadamard",), False, False, True, "minmax"),
    "quarot_paper": (("hadamard",), False, False, True, "percentile_mse"),
    "quarot_stwq": (("hadamard",), True, True, False, "percentile_mse"),
    "gptq": ((), False, False, False, "percentile_mse"),
    "gptaq": ((), False, False, False, "percentile_mse"),
    "qronos": ((), False, False, False, "percentile_mse"),
    "litevar": ((), False, False, True, "minmax"),
    "fpqvar": (("group_hadamard",), False, False, True, "minmax"),
    "shift_and_sum": ((), False, False, True, "minmax"),
    "gps_only": (("gps",), True, True, False, "percentile_mse"),
    "ptq4arvg": (("smoothquant", "shift", "gps"), True, True, False, "percentile_mse"),
    "staq": (("geometric",), True, True, False, "grid"),
    "ptq4arvg_gptq": (("smoothquant", "shift", "gps"), True, True, False, "percentile_mse"),
    "ptq4arvg_released": (("smoothquant", "shift", "gps"), True, True, False, "percentile_mse"),
}
METHODS = list(MEANINGS)  # those that ship; one's own may lie beside them


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_file_of_every_group_composes_under_its_name(group: str, name: str) -> None:
    # the default method reckons with integers, at linear layers
    others = ["method=rtn"] if group in ("quant", "scope") else []
    chosen = getattr(config_of(f"{group}={name}", *others), group)
    assert getattr(chosen, NAMED.get(group, "name")) == name


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (CONF / "train_zoo" / "model").glob("*.yaml"))
)
def test_every_training_config_composes(name: str) -> None:
    with initialize_config_dir(str(CONF / "train_zoo"), version_base="1.3"):
        plain = OmegaConf.to_container(
            compose("config", [f"model={name}"]), resolve=True, throw_on_missing=True
        )
    assert plain["model"]


@pytest.mark.parametrize("turn", range(max(Counter(group for group, _ in ALONE).values())))
def test_files_chosen_give_what_hydra_composes_of_them(turn: int) -> None:
    chosen = []
    for group in dict(ALONE):
        names = [name for other, name in ALONE if other == group]
        chosen.append(f"{group}={names[turn % len(names)]}")
    parsed = check_grammar(chosen, RUN)
    assert are_plain(parsed)
    assert OmegaConf.to_container(compose_plain(parsed)) == OmegaConf.to_container(
        compose_with_hydra(chosen)
    )


def test_fields_set_give_what_hydra_composes_of_them() -> None:
    given = [
        "method=repq",
        "method.sites=[qkv, fc1]",
        "method=ptq4arvg",  # the last one counts
        "method.options.svd={rank: 8, grid: false}",
        "method.stwq=${method.gps}",
        "method.alpha=1e-2",
        "quant.weights.bits=6.5",
        "calib.seed=null",
        "sampler.settings={guidance_scale: 2}",
        "sampler.settings.temperature='1'",
        "runs='a b=c'",
        "runs=2024_11_28",
        "seed=true",
        "dtype=???",
    ]
    parsed = [parse_override(override) for override in given]
    assert are_plain(parsed)
    assert OmegaConf.to_container(compose_plain(parsed)) == OmegaConf.to_container(
        compose_with_hydra(given)
    )
    # what is composed once is not what is changed
    assert configure([]).method.alpha == 0.5


@pytest.mark.parametrize(
    "override",
    ["+seed=1", "++seed=1", "~tracker", "model@other=rar_twin", "hydra.verbose=true", "seed=1,2"],
)
def test_other_overrides_are_left_to_hydra(override: str) -> None:
    assert not are_plain([parse_override(override)])


def test_a_file_that_builds_on_others_is_left_to_hydra(tmp_path: Path) -> None:
    texts = {
        "plain": "a: 1",
        "derived": "defaults: [plain]\na: 2",
        "elsewhere": "# @package other\na: 3",
    }
    (tmp_path / "group").mkdir()
    for name, text in texts.items():
        (tmp_path / "group" / f"{name}.yaml").write_text(text)
    overrides = Overrides(tmp_path, example="")
    alone = [name for name in (*texts, "absent") if overrides.stands_alone("group", name)]
    assert alone == ["plain"]
    # calib.layout; sampler.microbatch; quant.by_kind
    setting_others = {("method", "ptq4arvg_released"), ("eval", "tiny")}
    setting_others |= {("method", name) for name in ("litevar", "fpqvar", "shift_and_sum")}
    assert set(OPTIONS) - set(ALONE) == setting_others
    assert not are_plain([parse_override("method=ptq4arvg_released")])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_recipe_that_the_contract_says(name: str) -> None:
    chosen = build_recipe(config_of(f"method={name}"))
    dynamic = chosen.activations.granularity == "token_dynamic"
    assert MEANINGS[name] == (
        chosen.transforms,
        chosen.stwq,
        chosen.exclude_sinks,
        dynamic,
        chosen.activations.range,
    )
    assert chosen.weights.range == chosen.activations.range
    assert chosen.released == (name == "ptq4arvg_released")
    assert (chosen.alpha, chosen.gps_form, chosen.weights.granularity) == (
        0.5,
        "squares",
        "out_channel",
    )


@pytest.mark.parametrize("name", ["smoothquant_paper", "os_plus", "repq", "repq_stwq", "sq_repq"])
def test_scaling_baselines_act_on_qkv_and_fc1_repq_on_attention_too(
    name: str,
) -> None:
    chosen = build_recipe(config_of(f"method={name}"))
    assert chosen.sites == ("qkv", "fc1")
    assert chosen.softmax == ("log_sqrt2" if "repq" in name else "int")


@pytest.mark.parametrize(
    ("name", "symmetric", "offline"),
    [
        ("quarot", True, True),
        ("quarot_paper", False, False),
        ("quarot_stwq", False, True),
    ],
)
def test_quarot_is_officially_symmetric_and_all_online_in_the_papers(
    name: str, symmetric: bool, offline: bool
) -> None:
    chosen = build_recipe(config_of(f"method={name}"))
    assert chosen.weights.symmetric == chosen.activations.symmetric == symmetric
    assert not chosen.attention_weights.symmetric
    assert chosen.options.hadamard.offline == offline
    assert chosen.options.hadamard.sites == ("qkv", "proj", "fc1", "fc2", "head", "adaln")
    assert (chosen.rounder, chosen.softmax) == ("nearest", "int")


@pytest.mark.parametrize(
    ("name", "softmax", "batch", "clip_lr", "transform_lr"),
    [
        ("omniquant", "none", 1, 1e-2, 5e-3),
        ("omniquant_paper", "int", 32, 5e-3, 1e-2),
    ],
)
def test_omniquant_is_trained_as_its_authors_do_or_as_the_paper_says(
    name: str, softmax: str, batch: int, clip_lr: float, transform_lr: float
) -> None:
    chosen = build_recipe(config_of(f"method={name}"))
    options = chosen.options.omniquant
    assert (chosen.omniquant, chosen.sites, chosen.softmax) == (True, ("qkv", "fc1"), softmax)
    assert (options.epochs, options.batch, options.clip_lr, options.transform_lr) == (
        20,
        batch,
        clip_lr,
        transform_lr,
    )
    assert (options.clip, options.transform, options.values, options.second_loss) == (
        True,
        True,
        True,
        False,
    )
    assert [m for m in METHODS if build_recipe(config_of(f"method={m}")).omniquant] == [
        "omniquant",
        "omniquant_paper",
    ]


def test_a_tiny_run_is_one_micro_batch_unless_another_size_is_given() -> None:
    found = config_of("eval=tiny", "sampler=ptq4arvg", "calib=random")
    assert (found.eval.name, found.eval.n, found.eval.sequences, found.eval.batch) == (
        "tiny",
        4,
        4,
        4,
    )
    assert (found.sampler.name, found.sampler.microbatch) == ("ptq4arvg", 4)
    assert (found.calib.selector, found.calib.n, found.calib.batch) == ("random", 4, 4)
    larger = config_of("eval=tiny", "calib.n=16", "sampler.microbatch=2")
    assert (larger.calib.n, larger.sampler.microbatch, larger.eval.n) == (16, 2, 4)


def test_full_precision_is_not_quantized() -> None:
    assert not config_of("method=fp").method.quantized


@pytest.mark.parametrize("gps", [False, True])
@pytest.mark.parametrize("stwq", [False, True])
@pytest.mark.parametrize("calib", ["random", "dgc"])
def test_gps_stwq_and_dgc_switch_independently_by_config_alone(
    gps: bool, stwq: bool, calib: str
) -> None:
    config = config_of(f"method.gps={gps}".lower(), f"method.stwq={stwq}".lower(), f"calib={calib}")
    chosen = build_recipe(config)
    assert chosen.transforms == (("smoothquant", "shift", "gps") if gps else ("smoothquant",))
    assert (chosen.stwq, chosen.exclude_sinks, config.calib.selector) == (stwq, stwq, calib)


@pytest.mark.parametrize(
    "name", [m for m, how in MEANINGS.items() if not how[3] and m != "ptq4arvg_released"]
)
def test_leaving_sinks_out_follows_stwq_unless_it_is_set(name: str) -> None:
    for stwq in ("true", "false"):
        assert config_of(f"method={name}", f"method.stwq={stwq}").method.exclude_sinks == (
            stwq == "true"
        )
        for own in ("true", "false"):
            chosen = config_of(
                f"method={name}", f"method.stwq={stwq}", f"method.exclude_sinks={own}"
            )
            assert chosen.method.exclude_sinks == (own == "true")


@pytest.mark.parametrize(
    ("override", "kinds", "matmuls"),
    [
        ("scope=paper", ("qkv", "proj", "fc1", "fc2", "head", "adaln"), True),
        ("scope=blocks", ("qkv", "proj", "fc1", "fc2"), False),
    ],
)
def test_a_scope_is_what_the_contract_says(
    override: str, kinds: tuple[str, ...], matmuls: bool
) -> None:
    chosen = build_recipe(config_of(override)).scope
    assert (chosen.kinds, chosen.matmuls) == (kinds, matmuls)


@pytest.mark.parametrize(
    ("name", "bits"), [("w8a8", (8, 8)), ("w6a6", (6, 6)), ("w4a8", (4, 8)), ("w4a4", (4, 4))]
)
def test_the_name_of_a_quantization_gives_its_bits(name: str, bits: tuple[int, int]) -> None:
    chosen = build_recipe(config_of(f"quant={name}"))
    assert (chosen.weights.bits, chosen.activations.bits) == bits


@pytest.mark.parametrize("method", METHODS)
def test_only_the_released_method_has_the_released_layout_by_itself(method: str) -> None:
    released = method == "ptq4arvg_released"
    assert config_of(f"method={method}").calib.layout == ("released" if released else "inference")
    assert config_of(f"method={method}", "calib.layout=released").calib.layout == "released"


@pytest.mark.parametrize("model", ["var_twin", "rar_twin", "par_twin", "mar_twin"])
def test_the_released_method_serves_every_family_in_the_released_scope(
    model: str,
) -> None:
    chosen = build_recipe(config_of(f"model={model}", "method=ptq4arvg_released", "scope=released"))
    blocks = ("qkv", "proj", "fc1", "fc2")
    assert (chosen.scope.kinds, chosen.scope.matmuls) == (
        (blocks, False) if model == "mar_twin" else ((*blocks, "head", "adaln"), True)
    )
    assert chosen.released


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("calib.layout=inference", "calib.layout: 'inference' is not one of released"),
        (
            "scope=paper",
            "scope: 'paper' is more than ptq4arvg_released quantizes of mar, allowed is released",
        ),
    ],
)
def test_the_released_method_is_refused_where_it_would_be_another(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        config_of("model=mar_twin", "method=ptq4arvg_released", "scope=released", given)


# --- what can be set, and what is refused


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of all fields that are no dataclasses."""
    for field in dataclasses.fields(value):
        child = getattr(value, field.name)
        path = prefix + field.name
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("method=ptq4arv", "method: 'ptq4arv' is not one of fp, fpqvar, gps_only, "),
        ("quant=w5a5x", "quant: 'w5a5x' is not one of fp4_g128, fp6, fp8, kv2, "),
        ("method.gsp=true", "method.gsp: no such field, allowed are name, quantized, omniquant,"),
        (
            "+method.gsp=true",
            "method.gsp: no such field, allowed are name, quantized, omniquant,",
        ),
        ("sed=1", "sed: no such field, allowed are model, method,"),
        ("seed=one", "seed: 'one' is not an integer from 0 to 9223372036854775807"),
        ("seed=-1", "seed: -1 is not an integer from 0 to"),
        ("method.gps=maybe", "method.gps: 'maybe' is not a boolean, allowed are true and false"),
        ("method.alpha=1.5", "method.alpha: 1.5 is not a number from 0 to 1"),
        (
            "method.omniquant=true",
            "method.transforms: smoothquant, shift, gps does not go with omniquant, which trains",
        ),
        ("method.gps_form=eq15", "method.gps_form: 'eq15' is not one of squares, eq16"),
        ("method.sites=[qkw]", "method.sites: 'qkw' is not one of qkv, proj,"),
        (
            "method.options.hadamard.sites=[qkw]",
            "method.options.hadamard.sites: 'qkw' is not one of qkv, proj,",
        ),
        ("scope.kinds=[qkw]", "scope.kinds: 'qkw' is not one of qkv, proj,"),
        ("quant.weights.bits=1", "quant.weights.bits: 1 is not an integer from 2 to 8"),
        ("quant.activations.bits=9", "quant.activations.bits: 9 is not an integer from 2 to 8"),
        (
            "quant.activations.bits=6.5",
            "quant.activations.bits: 6.5 is not an integer from 2 to 8",
        ),
        (
            "quant.activations.granularity=out_channel",
            "quant.activations.granularity: 'out_channel' is not one of tensor,",
        ),
        (
            "quant.weights.range=max",
            "quant.weights.range: 'max' is not one of minmax, percentile_mse",
        ),
        ("method.dynamic=true", "method.stwq: true needs static activations"),
        ("calib.n=0", "calib.n: 0 is not an integer from 1 to 100000"),
        ("eval.n=-3", "eval.n: -3 is not an integer from 1 to 10000000"),
        ("sampler.microbatch=0", "sampler.microbatch: 0 is not an integer from 1 to 100000"),
        ("dtype=float8", "dtype: 'float8' is not one of float32, float64"),
        ("calib.selector=dcg", "calib.selector: 'dcg' is not one of cond_only,"),
        ("tracker.mode=wb", "tracker.mode: 'wb' is not one of none, wandb_offline, wandb"),
        ("device=gpu", "device: 'gpu' is not one of auto, cpu, cuda"),
        ("mode=int4", "mode: 'int4' is not one of simulate, int8"),
        ("calib.layout=masked", "calib.layout: 'masked' is not one of inference, released"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(
    given: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(given)
    line = str(caught.value)
    assert line.startswith(said)
    assert "\n" not in line

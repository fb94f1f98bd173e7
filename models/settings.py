"""Which values the settings of samplers may have, for `generate` and for configs of runs."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real

from models.choices import describe_unknown
from models.mar.diffusion import spaced_timesteps
from models.preset import Preset

GUIDANCE = (0.0, 1000.0)
WORDS = {"cfg_schedule": ("linear", "constant")}
FLAGS = ("more_smooth",)
RESPACING = "diffusion_steps"
RESPACING_WORDS = 'a count of steps in quotes ("100"), counts with commas between them, or ddimN'


def number_bounds(preset: Preset) -> Mapping[str, tuple[float, float]]:
    """The least and the most of every number; both are integers where it has to be one."""
    vocabulary = preset.transformer.get("vocab_size", preset.tokenizer.get("vocab_size", 0))
    return {
        "cfg": GUIDANCE,
        "cfg_scale": GUIDANCE,
        "guidance_scale": GUIDANCE,
        "guidance_power": (0.0, 100.0),
        "cfg_interval": (-1, preset.tokens),  # -1: guidance throughout
        "temperature": (1e-6, 1000.0),  # logits over less are infinite in float32
        "top_k": (0, vocabulary),  # 0: of all
        "top_p": (0.0, 1.0),
        "num_iter": (1, 10_000),
    }


def is_respacing(value: object) -> bool:
    """Whether a value says which steps of MAR's diffusion are kept."""
    if not isinstance(value, str) or len(value) > 100:
        return False
    try:
        return bool(spaced_timesteps(value))
    except ValueError:
        return False


def require_setting(name: str, value: object, preset: Preset) -> None:
    """Refuse a setting that the model's samplers have not, or a value that it may not have.

    Raises:
        ValueError: one line: the setting, the value, what is allowed.
    """
    known = preset.samplers["official"]
    if name not in known:
        raise ValueError(describe_unknown("setting", name, known))
    if name in WORDS:
        if value not in WORDS[name]:
            raise ValueError(describe_unknown(name, value, WORDS[name]))
    elif name in FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is neither true nor false")
    elif name == RESPACING:
        if not is_respacing(value):
            raise ValueError(f"{name}: {value!r} is not {RESPACING_WORDS}")
    else:
        require_number(name, value, *number_bounds(preset)[name])


def require_number(name: str, value: object, least: float, most: float) -> None:
    """Refuse what is no number within its bounds, or no integer where these are integers."""
    is_whole = isinstance(least, int)
    kind = Integral if is_whole else Real
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        noun = "an integer" if is_whole else "a number"
        raise ValueError(f"{name}: {value!r} is not {noun} from {least:g} to {most:g}")

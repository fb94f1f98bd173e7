"""A command's own options, from its arguments."""

from __future__ import annotations

from dataclasses import fields

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.compose import explain_refusal
from experiments.config.schema import T
from ptq.types import ConfigError


def own_options(kind: type[T], arguments: list[str]) -> tuple[T, list[str]]:
    """A command's own options, a dataclass, from its key=value arguments, and the arguments that
    are left.

    Raises:
        ConfigError: an option is of the wrong type.
    """
    names = {f.name for f in fields(kind)}
    own = [a for a in arguments if a.partition("=")[0] in names]
    try:
        options = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(own))
        )
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error
    return options, [a for a in arguments if a not in own]

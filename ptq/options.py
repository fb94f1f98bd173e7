"""Settings of the methods that have any beyond an on/off switch: `method.options` of a config.

A method's settings are a dataclass in its own file, each field with its range; the defaults are the
authors' own (`conf/method/*_paper.yaml` holds what PTQ4ARVG's Table 7 states instead):

    @register_settings("svd")
    @dataclass(frozen=True)
    class SVDQuantSettings(Settings):
        rank: int = setting(32, Integer(1, 65_536))
"""

from __future__ import annotations

from dataclasses import asdict, field, fields
from functools import cache
from typing import Any, ClassVar

from ptq.ranges import Integer, ListOf, Range, Word, check_value
from ptq.registry.entries import SETTINGS
from ptq.spec import ConfigError

GPS_FORMS = ("squares", "eq16")
KINDS = ("qkv", "proj", "fc1", "fc2", "head", "adaln", "embed", "diffusion")  # of sites

COUNT = Integer(1, 100_000)  # of rows or steps; no calibration reaches the bound
SITES = ListOf(Word(*KINDS))


def setting(default: Any, allowed: Range) -> Any:
    """A field of a dataclass of settings: its default and the values that it may have."""
    return field(default=default, metadata={"allowed": allowed})


class Settings:
    """What the dataclasses of settings have in common: values outside their ranges are refused.

    Attributes:
        switch: the name that they are registered under.
    """

    switch: ClassVar[str]

    def __post_init__(self) -> None:
        for entry in fields(self):
            path = f"method.options.{self.switch}.{entry.name}"
            check_value(path, getattr(self, entry.name), entry.metadata["allowed"])


def option_ranges() -> dict[str, Range]:
    """The range of every setting, as `svd.rank`."""
    ranges = {}
    for switch, kind in SETTINGS.items():
        for entry in fields(kind):
            ranges[f"{switch}.{entry.name}"] = entry.metadata["allowed"]
    return ranges


def has_sites(switch: str) -> bool:
    """Whether a switch's settings say at which kinds of sites it acts."""
    return switch in SETTINGS and "sites" in [entry.name for entry in fields(SETTINGS[switch])]


@cache
def default_settings(kind: type) -> Settings:
    """Settings at their defaults."""
    return kind()


class Options:
    """The settings of all methods, by the name of the switch that turns the method on.

        Options(svd=SVDQuantSettings(rank=8)).svd.rank

    What is not given is at its default, so a method that is registered later has its settings here,
    too. Two are equal if all their settings are.
    """

    def __init__(self, **given: Settings) -> None:
        changed = {}
        for switch, settings in given.items():
            kind = SETTINGS[switch]
            if not isinstance(settings, kind):
                raise ConfigError(f"method.options.{switch}: {settings!r} is no {kind.__name__}")
            if settings != default_settings(kind):
                changed[switch] = settings
        self._changed = changed

    def __getattr__(self, switch: str) -> Any:
        # what Python itself looks up, when it copies for example
        if switch.startswith("_"):
            raise AttributeError(switch)
        if switch not in SETTINGS:
            raise AttributeError(f"no settings are registered for {switch!r}")
        return self._changed.get(switch) or default_settings(SETTINGS[switch])

    def as_plain(self) -> dict[str, dict[str, Any]]:
        """The settings of methods that are not at their defaults, by switch and field."""
        return {switch: asdict(settings) for switch, settings in self._changed.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._changed == other._changed

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._changed.items(), key=lambda item: item[0])))

    def __repr__(self) -> str:
        shown = [f"{switch}={settings!r}" for switch, settings in self._changed.items()]
        return f"Options({', '.join(shown)})"

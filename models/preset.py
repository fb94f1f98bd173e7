"""What a preset is: the sizes of a released (or shipped) model and where its weights come from. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Source:
    """A weights file: `file` in the hub repository `repo`, or, without a repository, relative to `models/zoo`."""

    file: str
    repo: str | None = None


@dataclass(frozen=True)
class Preset:
    """One model: everything needed to build it, find its weights and sample from it.

    Attributes:
        transformer, tokenizer: constructor arguments of the family's two modules.
        samplers: sampling settings by name (`official`, `ptq4arvg`), arguments of the family's `generate`.
        image_size: side of the decoded image in pixels. tokens: image tokens per image. classes: class labels.
        published_fid: FID of the full-precision model as its authors give it, or None.
    """

    name: str
    family: str
    transformer: Mapping[str, object]
    tokenizer: Mapping[str, object]
    weights: Source
    tokenizer_weights: Source
    samplers: Mapping[str, Mapping[str, object]]
    image_size: int
    tokens: int
    classes: int = 1000
    licence: str = ""
    published_fid: float | None = None
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

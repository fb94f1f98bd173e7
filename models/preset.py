"""What a preset is: the sizes of a released (or shipped) model and where its weights come from.
Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Source:
    """A weights file: `file` of the hub repository `repo`, or, without a repository, relative to
    `models/zoo`.

    Attributes:
        revision: commit of the repository; a branch where the commit is not known
            (`models/README.md` says which).
        sha256: of the whole file, if known; a fetched file that differs is refused.
        ignore: prefixes of keys that the file holds beside those of the model (`loss.` of an
            autoencoder's training).
        elsewhere: how the authors publish a file that no hub repository holds; it is then loaded by
            path only.
    """

    file: str
    repo: str | None = None
    revision: str = "main"
    sha256: str | None = None
    ignore: tuple[str, ...] = ()
    elsewhere: str = ""

    @property
    def shipped(self) -> bool:
        """Whether the file belongs under `models/zoo`: trained here, though not every one comes
        with the repository."""
        return self.repo is None and not self.elsewhere

    @property
    def recipe(self) -> str:
        """The config of `experiments.train_zoo` that makes a file of `models/zoo`."""
        return self.file.split("/")[0].removesuffix(".safetensors")

    def __str__(self) -> str:
        if self.repo is not None:
            return f"{self.file} of {self.repo} at revision {self.revision}"
        return f"{self.file} ({self.elsewhere})" if self.elsewhere else f"models/zoo/{self.file}"


@dataclass(frozen=True)
class Preset:
    """One model: everything needed to build it, find its weights and sample from it.

    Attributes:
        transformer, tokenizer: constructor arguments of the family's two modules.
        samplers: sampling settings by name (`official`, `ptq4arvg`), arguments of the family's
            `generate`.
        image_size: side of the decoded image in pixels. tokens: image tokens per image. classes:
            class labels.
        eval_size: side that images are resized to before the published figures are measured; None
            means not at all.
        dtype: number format of the released sampling where it is known not to be fp32 (VAR: fp16
            autocast, PAR: bf16); our runs use fp32.
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
    eval_size: int | None = None
    dtype: str = "fp32"
    licence: str = ""
    published_fid: float | None = None
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

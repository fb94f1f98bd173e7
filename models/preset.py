"""What a preset is: the sizes of a released (or shipped) model and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

# hub repository of the models that were trained on natural images and are too large to ship here;
# None until their owner has published them
NATURAL_HUB: str | None = None


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
        mirror: hub repository that holds a file of `models/zoo`, too; asked where it is not there.
    """

    file: str
    repo: str | None = None
    revision: str = "main"
    sha256: str | None = None
    ignore: tuple[str, ...] = ()
    elsewhere: str = ""
    mirror: str | None = None

    @property
    def shipped(self) -> bool:
        """Whether the file belongs under `models/zoo`: trained here, though not every one comes
        with the repository."""
        return self.repo is None and not self.elsewhere

    @property
    def published(self) -> Source | None:
        """Where the hub has a file of `models/zoo`; None if it has not."""
        if self.mirror is None:
            return None
        return replace(self, repo=self.mirror, mirror=None)

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
        dataset: what it was trained on; of models trained here a set of `experiments.data.sets`.
        heldout: recipe of the held-out tokens of a model trained here; None for its family's.
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
    dataset: str = "imagenet"
    heldout: str | None = None
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def heldout_file(self) -> str:
        """The held-out tokens of a model trained here, below `models/zoo`."""
        return f"{self.heldout or f'{self.family}_heldout'}.safetensors"


def by_name(*presets: Preset) -> dict[str, Preset]:
    """The presets of a family by their names.

    Raises:
        ValueError: two have the same name.
    """
    named: dict[str, Preset] = {}
    for preset in presets:
        if preset.name in named:
            raise ValueError(f"models/{preset.family}/presets.py: {preset.name} is there twice")
        named[preset.name] = preset
    return named

"""All presets by name, and the one door that turns a name into a model with weights.

Weights come from the first of: an explicit path, `models/zoo`, the folder that AR_PTQ_WEIGHTS
names, files that were added (`models.user_files`), the cache of conversions, the hub.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.choices import describe_unknown
from models.decoding.decoder import Decoder, Recorder
from models.mar.adapter import MARAdapter
from models.mar.generator import Density, Draws
from models.par.adapter import PARAdapter
from models.preset import Preset, Source
from models.rar.adapter import RARAdapter
from models.var.adapter import VARAdapter
from models.weights import added, checkpoints, conversions, digests, hub, pins, recognition

ZOO = Path(__file__).parent / "zoo"
PAPER_FAMILIES = ("var", "rar", "par", "mar")  # the paper's, first wherever models are listed


def list_families() -> list[str]:
    """The folders of `models` that hold a family: those with presets."""
    found = [path.parent.name for path in Path(__file__).parent.glob("*/presets.py")]
    return [*PAPER_FAMILIES, *sorted(set(found) - {*PAPER_FAMILIES})]


def collect_presets() -> dict[str, Preset]:
    """The presets of all families by name.

    Raises:
        ValueError: a family's preset has another one's name, or says that it is of another family.
    """
    presets: dict[str, Preset] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"models.{family}.presets")
        for name, preset in module.PRESETS.items():
            if name in presets or preset.family != family or preset.name != name:
                raise ValueError(
                    f"models/{family}/presets.py: {name} is of {preset.family}, or twice"
                )
            presets[name] = preset
    return presets


FAMILIES = list_families()
PRESETS = collect_presets()
WEIGHTS_FOLDER = "AR_PTQ_WEIGHTS"  # names a folder with released files
# the two modules of a generator, and how a user gives the path of their weights
PARTS = {
    "transformer": "model.weights=PATH, or --weights PATH",
    "tokenizer": "model.tokenizer_weights=PATH, or --tokenizer PATH",
}


class Generator(Protocol):
    """A transformer with its tokenizer: what experiments need of a model, whatever its family."""

    preset: Preset
    transformer: nn.Module
    tokenizer: nn.Module
    adapter: VARAdapter | RARAdapter | PARAdapter | MARAdapter

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Image tokens for class labels (B,); image i draws from random numbers of (seed, index[i])
        alone."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images (B, 3, S, S) in [0, 1]."""

    def generate(self, labels: Sequence[int] | Tensor, seed: int = 0, **settings: object) -> object:
        """Images of class labels; see `models.generation.ImageGenerator`."""


@runtime_checkable
class TokenGenerator(Generator, Protocol):
    """A generator whose tokens are ids (B, T) with log-probabilities: VAR, RAR, PAR, LlamaGen.

    Attributes:
        decoder: runs the steps of `sample` if it is there; None by default.
    """

    decoder: Decoder | None

    def captured(
        self, compiled: bool, record: Recorder | None = None, exact: bool = False
    ) -> Decoder:
        """A decoder for this model, to be put into `decoder`; see `Decoder` for the arguments."""

    def log_probs(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced log-probabilities (B, T, V) of every token, conditional branch, no
        guidance."""

    def targets(self, tokens: Tensor) -> Tensor:
        """The token ids (B, T) that `log_probs` predicts."""


@runtime_checkable
class LatentGenerator(Generator, Protocol):
    """A generator whose tokens are vectors (B, T, D), with a diffusion loss in place of
    log-probabilities: MAR."""

    def draws(self, seed: int, index: Tensor) -> Draws:
        """Masks, diffusion steps and noise on which images `index` (B,) are judged."""

    def density(self, tokens: Tensor, labels: Tensor, draws: Draws) -> Density:
        """Diffusion loss (B, T), and p(x_{t-1} | x_t) of the hidden tokens; conditional branch, no
        guidance."""


def find_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        CheckpointError: there is none; names those there are, and the nearest.
    """
    if name not in PRESETS:
        raise checkpoints.CheckpointError(describe_unknown("model", name, PRESETS))
    return PRESETS[name]


def build(name: str) -> Generator:
    """The model called `name` with uninitialised weights."""
    chosen = find_preset(name)
    module = importlib.import_module(f"models.{chosen.family}.generator")
    return module.GENERATOR(chosen)


def build_outline(name: str) -> Generator:
    """The model called `name` without memory for its weights: names, shapes and dtypes only."""
    with torch.device("meta"), _WithoutDraws():
        return build(name)


class _WithoutDraws(TorchFunctionMode):
    """Leaves weights as they are where a module would draw them: billions of numbers of a large
    model, for nothing where a file has them. Drawing a tensor without memory makes PyTorch load
    its compiler, which takes a second."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = keywords or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return keywords["tensor"] if "tensor" in keywords else arguments[0]
        return function(*arguments, **keywords)


def outline(name: str, tokenizer: bool | str | Path = False, device: str = "cpu") -> Generator:
    """The model called `name` whose transformer has names and shapes, and no memory for weights:
    what an export is loaded into.

    Args:
        tokenizer: load the tokenizer onto `device`, from a path if one is given, or else from where
            `load` finds it. Without one the model has tokens, and no images.

    Raises:
        CheckpointError: unknown name; the tokenizer's weights are missing, damaged or another's.
    """
    model = build_outline(name)
    if tokenizer:
        model.tokenizer.to_empty(device=device)  # every tensor of it is in its state dict
        load_part(model, "tokenizer", None if tokenizer is True else tokenizer, device)
    return model


def source_of(name: str, part: str) -> Source:
    """Where the weights of a preset's `transformer` or `tokenizer` come from."""
    chosen = find_preset(name)
    return chosen.weights if part == "transformer" else chosen.tokenizer_weights


@cache
def released_modules() -> dict[Source, nn.Module]:
    """What every released file fits: modules without memory for their weights."""
    modules: dict[Source, nn.Module] = {}
    for name, preset in PRESETS.items():
        if preset.weights.shipped:
            continue
        model = build_outline(name)
        for part in PARTS:
            # presets that share a file share what it fits
            modules.setdefault(source_of(name, part), getattr(model, part))
    return modules


def users_of(source: Source) -> list[tuple[str, str]]:
    """The presets, each with its part, whose weights a file holds."""
    users = []
    for name in PRESETS:
        for part in PARTS:
            if source_of(name, part) == source:
                users.append((name, part))
    return users


def known_places(source: Source) -> dict[str, Path | None]:
    """Where a file is looked for besides an explicit path and the hub, and what lies there."""
    if source.shipped:
        path = ZOO / source.file
        in_zoo: dict[str, Path | None] = {"zoo": path if path.is_file() else None}
        return in_zoo if source.published is None else in_zoo | known_places(source.published)
    places: dict[str, Path | None] = {}
    if WEIGHTS_FOLDER in os.environ:
        places[WEIGHTS_FOLDER] = None
        with suppress(checkpoints.CheckpointError):  # whoever needs the file is told
            places[WEIGHTS_FOLDER] = file_of_folder(source)
    entry = added.find_entry(source)
    if entry is not None:
        places["added"] = entry.path if is_there(entry.path) else None
    sha256 = conversions.known_digest(source)
    cached = conversions.list_conversions(sha256) if sha256 is not None else []
    places["cache"] = cached[0] if cached else None
    if source.repo is not None:
        places["hub's cache"] = hub.cached_file(source)
    return places


def has_weights(name: str) -> bool:
    """Whether both files of a preset are on this machine, as far as looking tells."""
    return all(any(known_places(source_of(name, part)).values()) for part in PARTS)


def is_there(path: Path) -> bool:
    """Whether there is a file, whichever entry of it is named."""
    return checkpoints.split_entry(path)[0].is_file()


def files_of_folder() -> list[recognition.WeightsFile]:
    """The files of the folder that AR_PTQ_WEIGHTS names, with what they are; none without it.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = os.environ.get(WEIGHTS_FOLDER)
    if not folder:
        return []
    try:
        paths = recognition.list_files(Path(folder).expanduser().absolute())
    except checkpoints.CheckpointError as error:
        reason = str(error).removeprefix("weights: ")
        raise checkpoints.CheckpointError(f"{WEIGHTS_FOLDER}: {reason}") from error
    return [recognition.recognise_file(path, released_modules()) for path in paths]


def folder_fault() -> str | None:
    """What is wrong with the folder that AR_PTQ_WEIGHTS names, in a line; None where nothing is."""
    try:
        files_of_folder()
    except checkpoints.CheckpointError as error:
        return str(error)
    return None


def file_of_folder(source: Source) -> Path | None:
    """The file in the folder that AR_PTQ_WEIGHTS names whose content is that of a released one.

    Raises:
        CheckpointError: there is no such folder, or several files may be it and none was added.
    """
    files = files_of_folder()
    try:
        return recognition.choose_file(source, files)
    except checkpoints.CheckpointError as error:
        if added.find_entry(source) is not None:  # which has said which one it is
            return None
        name = users_of(source)[0][0]
        raise checkpoints.CheckpointError(
            f"{error}; python -m models add FILE --name {name} says which"
        ) from error


def added_file(source: Source) -> Path | None:
    """The file that was added in the place of a released one, or its conversion where it is gone.

    Raises:
        CheckpointError: it was moved, or is another one by now.
    """
    entry = added.find_entry(source)
    if entry is None:
        return None
    name = users_of(source)[0][0]
    advice = (
        f"python -m models add takes it from where it is now, python -m models remove {name} "
        "forgets it"
    )
    if not is_there(entry.path):
        conversion = conversions.find_conversion(entry.sha256)
        if conversion is None:
            raise checkpoints.CheckpointError(
                f"weights: {entry.path}, added as {source.file}, is there no more; {advice}"
            )
        return conversion
    if digests.file_digest(entry.path) != entry.sha256:
        raise checkpoints.CheckpointError(
            f"weights: {entry.path} has changed since it was added as {source.file}; {advice}"
        )
    return entry.path


def shipped_file(name: str) -> Path:
    """The path of a file of the zoo, which may be missing.

    Raises:
        CheckpointError: it is there, but not the one that ships.
    """
    return pins.require_pinned(ZOO / name)


def locate_weights(
    source: Source, explicit: str | Path | None = None, part: str = "transformer"
) -> Path:
    """The file to read: the explicit path, the zoo's, that of AR_PTQ_WEIGHTS, the added one, the
    cached conversion, or the hub's (fetched and converted).

    Raises:
        CheckpointError: there is none, and the line says which file is needed and how to give its
            path; the zoo's is not the one that ships; an added one was moved or changed.
    """
    if explicit is not None:
        return Path(explicit).expanduser()
    advice = f"give its path: {PARTS[part]}"
    if source.shipped:
        path = shipped_file(source.file)
        if path.is_file():
            return path
        if source.published is not None:
            return locate_weights(source.published, None, part)
        command = f"python -m experiments.train_zoo model={source.recipe}"
        raise checkpoints.CheckpointError(
            f"weights: {source} is not here; {command} makes it, or {advice}"
        )

    own = file_of_folder(source) or added_file(source)
    if own is not None:
        return own
    sha256 = conversions.known_digest(source)
    cached = conversions.find_conversion(sha256) if sha256 is not None else None
    if cached is not None:
        return cached

    advice = f"add it (python -m models add FOLDER), or {advice}"
    if source.repo is None:
        raise checkpoints.CheckpointError(f"weights: {source} is on no hub; {advice}")
    try:
        path, sha256 = hub.fetch_file(source)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(f"{error}; {advice}") from error
    conversion = safetensors_of(path, sha256)
    if conversion != path:  # else the cache cannot be written
        conversions.remember_source(source, sha256)
    return conversion


def safetensors_of(path: Path, sha256: str | None = None) -> Path:
    """The safetensors file to read for `path`: itself, or its conversion, made if need be."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path
    return conversions.convert_file(path, sha256)


def state_of(
    source: Source, explicit: str | Path | None = None, part: str = "transformer"
) -> dict[str, Tensor]:
    """The state dict of a source as `load` reads it.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = safetensors_of(locate_weights(source, explicit, part))
    return checkpoints.without_ignored(source, checkpoints.read_checkpoint(path))


def load(
    name: str,
    weights: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str = "cpu",
) -> Generator:
    """The model called `name` with weights, in eval mode and fp32 on `device`.

    Files are those of explicit paths, or else found or fetched as `locate` says; PyTorch files are
    converted to safetensors on first use.

    Raises:
        CheckpointError: unknown name; weights missing, damaged or of another model.
    """
    with _WithoutDraws():  # files have every weight
        model = build(name)
    for part, explicit in zip(PARTS, (weights, tokenizer)):
        load_part(model, part, explicit, device)
    return model


def load_part(model: Generator, part: str, explicit: str | Path | None, device: str) -> None:
    """Put weights into a model's `transformer` or `tokenizer`, in eval mode and fp32 on `device`.

    Raises:
        CheckpointError: they are missing, damaged or of another model.
    """
    module = getattr(model, part)
    source = source_of(model.preset.name, part)
    state = state_of(source, explicit, part)
    require_fit(module, state, f"{explicit or source}")
    module.load_state_dict(state)  # copies into fp32, whatever the file's number format
    module.eval().requires_grad_(False).to(torch.device(device))


def weights_digests(
    name: str,
    weights: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, str]:
    """Digests by part ("transformer", "tokenizer") of the model that `load` would give.

    They equal `module_digest` of the loaded modules, but no module is built, and a file that this
    process has digested before is not read again.

    Args:
        weights, tokenizer: paths, as in `load`.
        dtype: number format that the loaded transformer is turned into; the tokenizer stays fp32.

    Raises:
        CheckpointError: as `load`.
    """
    return {
        "transformer": part_digest(name, "transformer", weights, dtype),
        "tokenizer": part_digest(name, "tokenizer", tokenizer),
    }


def part_digest(
    name: str,
    part: str,
    explicit: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """The digest of a model's `transformer` or `tokenizer`, as `weights_digests` has it."""
    source = source_of(name, part)
    path = safetensors_of(locate_weights(source, explicit, part))

    def digest_weights() -> str:
        state = checkpoints.without_ignored(source, checkpoints.read_checkpoint(path))
        module = getattr(build_outline(name), part)
        require_fit(module, state, f"{explicit or source}")
        return digests.tensors_digest(_loaded_tensors(module, state, dtype))

    return digests.remember_digest(path, (name, part, source, dtype), digest_weights)


def _loaded_tensors(
    module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The state dict that a module would have: in its own order, as `load_state_dict` copies the
    values, floating-point ones then turned into `dtype`."""
    for key, own in module.state_dict().items():
        value = state[key].to(own.dtype)
        yield key, value.to(dtype) if value.is_floating_point() else value


def require_fit(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Make sure that weights are finite and fit; else an error says which of our models they are.

    Raises:
        CheckpointError: the weights do not fit, or hold NaN or infinity.
    """
    try:
        checkpoints.require_fit(module, state, source)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(f"{error}{describe_owner(state)}") from error
    checkpoints.require_finite(module, state, source)


def describe_owner(state: dict[str, Tensor]) -> str:
    """The end of an error: "; they fit ..." for weights that fit other presets, else nothing."""
    fitting = []
    for name in PRESETS:
        model = build_outline(name)
        for part in PARTS:
            if checkpoints.compare_state(getattr(model, part), state).fits:
                fitting.append(f"the {part} of {name}")
    if not fitting:
        return ""
    more = ", ..." if len(fitting) > 3 else ""
    return f"; they fit {', '.join(fitting[:3])}{more}"

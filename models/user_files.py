"""Released files that a user has: which they are, and adding them by name.

Later `load` finds what was added, in every command, as if the hub had given it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models import registry
from models.preset import Source
from models.weights import added, digests, recognition
from models.weights.added import AddedFile
from models.weights.checkpoints import CheckpointError
from models.weights.recognition import WeightsFile

MOST_NAMED = 3  # files or names that one line shows


@dataclass(frozen=True)
class Addition:
    """What came of adding files.

    Attributes:
        files: by the released file that each stands for.
        strangers: files that are no released one.
        questions: what content and name leave open, a line each.
    """

    files: dict[Source, AddedFile]
    strangers: list[WeightsFile]
    questions: list[str]


def add_files(places: Sequence[Path], name: str | None = None) -> Addition:
    """Recognise the files of folders, and add what is clear.

    Args:
        places: folders, files, or `FILE::ENTRY`.
        name: of the preset that all of them are for.

    Raises:
        CheckpointError: there is nothing at a place, or it cannot be read; `name` is no released
            preset; the entries cannot be written.
    """
    modules = registry.released_modules()
    if name is not None:
        wanted = released_sources(name)
        modules = {source: modules[source] for source in wanted}
    paths: list[Path] = []
    for place in places:
        paths += recognition.list_files(place.expanduser().absolute())
    files = [recognition.recognise_file(path, modules) for path in dict.fromkeys(paths)]
    addition = sort_files(files)
    if addition.files:
        added.add_entries(addition.files)
    return addition


def released_names() -> list[str]:
    """The presets whose weights do not ship."""
    return [name for name, preset in registry.PRESETS.items() if not preset.weights.shipped]


def released_sources(name: str) -> list[Source]:
    """The files of a preset.

    Raises:
        CheckpointError: there is no such preset, or it ships.
    """
    preset = registry.find_preset(name)
    if preset.weights.shipped:
        raise CheckpointError(f"model: {name} ships with this repository, nothing is added for it")
    return [preset.weights, preset.tokenizer_weights]


def sort_files(files: Sequence[WeightsFile]) -> Addition:
    """Which file stands for which released one, as far as that is clear."""
    chosen: dict[Source, AddedFile] = {}
    questions: dict[str, None] = {}  # each once
    sources: dict[Source, None] = {}  # each once
    for file in files:
        sources |= dict.fromkeys(file.sources)
    for source in sources:
        candidates = [file for file in files if source in file.sources]
        try:
            path = recognition.choose_file(source, candidates)
        except CheckpointError:
            questions[ask_for_name(candidates)] = None
            continue
        if path is not None:
            chosen[source] = AddedFile(path, digests.file_digest(path))
    strangers = [file for file in files if not file.sources]
    return Addition(chosen, strangers, list(questions))


def ask_for_name(candidates: Sequence[WeightsFile]) -> str:
    """What to answer where files may be several released ones, or several may be one."""
    names: dict[str, None] = {}
    for file in candidates:
        for source in file.sources:
            names[registry.users_of(source)[0][0]] = None
    shown = " and ".join(str(file.path) for file in candidates[:MOST_NAMED])
    verb = "fits" if len(candidates) == 1 else "fit"
    file = "FILE" if len(candidates) > 1 else shown
    return (
        f"weights: {shown} {verb} {' and '.join(names)}; say which: "
        f"python -m models add {file} --name {next(iter(names))}"
    )


def remove_files(name: str) -> list[Source]:
    """Forget what was added for a preset; its tokenizer stays while another added model uses it.

    Raises:
        CheckpointError: nothing was added for it; no such released preset.
    """
    transformer, tokenizer = released_sources(name)
    keys = added.read_entries().keys()
    wanted = [transformer, tokenizer]
    for user, _ in registry.users_of(tokenizer):
        other = registry.find_preset(user).weights
        if user != name and added.entry_key(other) in keys:
            wanted = [transformer]
    present = [source for source in wanted if added.entry_key(source) in keys]
    if not present:
        raise CheckpointError(f"model: nothing was added for {name}")
    added.remove_entries(present)
    return present

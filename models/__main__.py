"""Which models there are, what is missing to run one, and whether a file is what it should be.

    list            every model, whether its weights are here, and how to get those that are not
    info NAME       sizes, sampling settings, files, and the places where they are looked for
    add PLACE ...   take in released files that you have: folders or files, told by their content
    remove NAME     forget what was added for a model; no file of weights is removed
    check NAME      compare keys and shapes of files with the model; nothing stays loaded
    fetch NAME      download, check and convert the files of a model
    convert NAME    convert files to safetensors, in the cache or in a folder

`check` and `convert` take --weights and --tokenizer; without either they use the files that `load`
would use. Example: python -m models check mar_b --weights checkpoint-last.pth
Of a file with several models, name the entry: --weights ar-ckpt-best.pth::trainer.var_wo_ddp

What was added is found by every command, by the name of its model. So are the files of the folder
that AR_PTQ_WEIGHTS names, without being added. Where content fits several models, the official
file name decides, or else --name: python -m models add mine.pt --name llamagen_b_256
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from models import registry, user_files
from models.preset import Preset, Source
from models.weights import added, checkpoints, conversions, digests, recognition
from models.weights.checkpoints import CheckpointError
from ptq.errors import say, user_errors

BEGIN = "<!-- presets: python -m models list --markdown models/README.md -->"
END = "<!-- end of presets -->"


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def where_found(source: Source) -> str:
    """A word on where a file lies: shipped, added, cache, ..., or else moved or missing."""
    places = registry.known_places(source)
    for place, path in places.items():
        if path is not None:
            return "shipped" if place == "zoo" else place
    return "moved" if "added" in places else "missing"


def format_table(head: list[str], rows: list[list[str]], markdown: bool = False) -> str:
    """Left-aligned columns, as plain text or as a Markdown table."""
    if markdown:
        rule = ["---"] * len(head)
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]
    else:
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    return "\n".join(lines)


def plain_list() -> str:
    """What `list` prints: the models, then the files that are the user's, and missing ones."""
    head = ["name", "family", "parameters", "tokens", "pixels", "transformer", "tokenizer"]
    parts = [format_table(head, list(map(_plain_row, registry.PRESETS.values())))]
    own = _own_files()
    if own:
        parts.append("your files\n" + format_table(["model", "part", "file"], own))
    missing = [source for source in _released_sources() if where_found(source) == "missing"]
    if missing:
        parts.append(_describe_remedies(missing))
    return "\n\n".join(parts)


def _released_sources() -> list[Source]:
    """The released files, each once."""
    return list(registry.released_modules())


def _own_files() -> list[list[str]]:
    """Of every file that was added, or that AR_PTQ_WEIGHTS has: its models, its part, its path."""
    rows = []
    for source in _released_sources():
        places = registry.known_places(source)
        path = places.get(registry.WEIGHTS_FOLDER) or places.get("added")
        entry = added.find_entry(source)
        if path is not None:
            rows.append([*_name_users(source), str(path)])
        elif entry is not None:
            rows.append([*_name_users(source), f"{entry.path} (moved: add it again)"])
    return rows


def _describe_remedies(missing: Sequence[Source]) -> str:
    """How to get the files that are not here."""
    head = "missing:"
    lines = [
        f"{head} python -m models add FOLDER takes in files that you have",
        f"{'':{len(head)}} python -m models fetch NAME downloads those of a model",
    ]
    unhubbed = [registry.users_of(source)[0][0] for source in missing if source.repo is None]
    if unhubbed:
        advice = f"python -m models info {unhubbed[0]}"
        lines.append(f"{'':{len(head)}} {' and '.join(unhubbed)} are on no hub: {advice}")
    return "\n".join(lines)


def _name_users(source: Source) -> tuple[str, str]:
    """The models that use a file, and as which part."""
    users = registry.users_of(source)
    first, part = users[0]
    return (f"{first}, ..." if len(users) > 1 else first), part


def _plain_row(preset: Preset) -> list[str]:
    parameters = count_parameters(registry.build_outline(preset.name).transformer)
    return [
        preset.name,
        preset.family,
        f"{parameters / 1e6:,.1f}M",
        str(preset.tokens),
        str(preset.image_size),
        where_found(preset.weights),
        where_found(preset.tokenizer_weights),
    ]


def markdown_list() -> str:
    """The table of models/README.md: of the presets alone, not of what is installed or cached."""
    head = [
        "model",
        "parameters",
        "of the tokenizer",
        "tokens",
        "pixels",
        "file",
        "tokenizer file",
        "from",
        "licence",
        "published FID",
    ]
    rows = list(map(_markdown_row, registry.PRESETS.values()))
    return format_table(head, rows, markdown=True)


def _markdown_row(preset: Preset) -> list[str]:
    model = registry.build_outline(preset.name)
    sources = [preset.weights, preset.tokenizer_weights]
    origins = dict.fromkeys(map(_source_origin, sources))  # each once
    return [
        f"`{preset.name}`",
        f"{count_parameters(model.transformer):,}",
        f"{count_parameters(model.tokenizer):,}",
        str(preset.tokens),
        str(preset.image_size),
        f"`{preset.weights.file}`",
        f"`{preset.tokenizer_weights.file}`",
        "; ".join(origins),
        preset.licence,
        "—" if preset.published_fid is None else f"{preset.published_fid:.2f}",
    ]


def _source_origin(source: Source) -> str:
    if source.repo is not None:
        return f"{source.repo} @ {source.revision[:8]}"
    return source.elsewhere or "`models/zoo`"


def with_block(text: str, block: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        CheckpointError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise CheckpointError(f"file: it has no lines {BEGIN!r} and {END!r}")
    before = text.partition(BEGIN)[0]
    after = text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def show_list(markdown: str | None) -> None:
    """`list`. `markdown`: None for plain text, "-" for Markdown, else the file to rewrite."""
    if markdown is None:
        print(plain_list())
        _report_folder_fault()
    elif markdown == "-":
        print(markdown_list())
    else:
        path = Path(markdown)
        text = with_block(path.read_text(), markdown_list())
        with conversions.temporary_file(path.parent) as part:
            part.write_text(text)
            os.replace(part, path)


def show_info(name: str) -> None:
    """`info`: the preset, then its two parts."""
    preset = registry.find_preset(name)
    model = registry.build_outline(name)
    print(
        f"{name}: {preset.family.upper()}, {preset.classes} classes, {preset.tokens} tokens, "
        f"{preset.image_size} x {preset.image_size} pixels"
    )
    print(f"  {_describe_origin(preset)}")
    for key, note in preset.notes.items():
        print(f"  {key}: {note}")
    for sampler, settings in preset.samplers.items():
        print(f"  sampler {sampler}: {_format_settings(settings)}")
    for part in registry.PARTS:
        module = getattr(model, part)
        print(f"{part}: {count_parameters(module):,} parameters, {len(module.state_dict())} keys")
        print(f"  {_format_settings(getattr(preset, part))}")
        _show_source(name, part)
    _report_folder_fault()


def _report_folder_fault() -> None:
    """Say why nothing was found in the folder that AR_PTQ_WEIGHTS names."""
    fault = registry.folder_fault()
    if fault is not None:
        say(f"ignored: {fault}")


def _describe_origin(preset: Preset) -> str:
    """Licence, published figure, and how the released sampling differs from ours."""
    facts = [f"licence {preset.licence}"]
    if preset.published_fid is None:
        facts.append("no published FID")
    else:
        facts.append(f"published FID {preset.published_fid:.2f}")
    if preset.dtype != "fp32":
        facts.append(f"released sampling in {preset.dtype}")
    if preset.eval_size:
        facts.append(f"evaluated at {preset.eval_size} pixels")
    return "; ".join(facts)


def _show_source(name: str, part: str) -> None:
    """The file of a part, where it is, and how to get it if it is missing."""
    source = registry.source_of(name, part)
    print(f"  file: {source}" + (f", sha256 {source.sha256}" if source.sha256 else ""))
    for place, path in registry.known_places(source).items():
        print(f"  {place}: {path or 'no'}")
    found = where_found(source)
    if found == "moved":
        print(
            f"  moved: {added.find_entry(source).path}, add it again: python -m models add FOLDER"
        )
    if found == "missing":
        remedies = []
        if source.repo:
            remedies.append(f"python -m models fetch {name}")
        elif source.shipped:
            remedies.append(f"python -m experiments.train_zoo model={source.recipe}")
        if not source.shipped:
            remedies.append("python -m models add FOLDER")
        remedies.append(f"give its path: {registry.PARTS[part]}")
        print(f"  missing: {', or '.join(remedies)}")


def _format_settings(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _chosen_files(
    name: str, weights: str | None, tokenizer: str | None
) -> list[tuple[str, Source, str | None]]:
    """Part, source and explicit path of the files that a command is about: the given ones, or else
    both."""
    registry.find_preset(name)
    nothing_given = not (weights or tokenizer)
    files = []
    for part, path in zip(registry.PARTS, (weights, tokenizer)):
        if path or nothing_given:
            files.append((part, registry.source_of(name, part), path))
    return files


def _describe_agreement(name: str, part: str, state: dict[str, Tensor], path: Path) -> str:
    """What agrees, in a line.

    Raises:
        CheckpointError: the file does not fit, or holds NaN or infinity.
    """
    module = getattr(registry.build_outline(name), part)
    comparison = checkpoints.compare_state(module, state)
    if not comparison.fits:
        raise CheckpointError(
            f"{part}: {path} does not fit {name} ({len(comparison.agreeing)} keys agree): "
            f"{comparison}{registry.describe_owner(state)}"
        )
    checkpoints.require_finite(module, state, str(path))
    keys = len(comparison.agreeing)
    parameters = count_parameters(module)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    return f"{keys} of {keys} keys and shapes agree, {parameters:,} parameters, {', '.join(dtypes)}"


def check_files(name: str, weights: str | None, tokenizer: str | None) -> None:
    """`check`: whether keys and shapes agree, and whether a given file is the pinned one."""
    for part, source, explicit in _chosen_files(name, weights, tokenizer):
        path = registry.locate_weights(source, explicit, part)
        state = checkpoints.without_ignored(source, checkpoints.read_checkpoint(path))
        print(f"{part}: {path}: {_describe_agreement(name, part, state, path)}")
        if explicit is not None and source.sha256 is not None:
            same = digests.file_digest(path) == source.sha256
            print(f"  sha256: {'that of' if same else 'not that of'} {source}")


def fetch_files(name: str) -> None:
    """`fetch`: both parts, one after the other."""
    errors = []
    for part, source, _ in _chosen_files(name, None, None):
        try:
            path = registry.locate_weights(source, None, part)
            state = registry.state_of(source, path, part)
            print(f"{part}: {path}: {_describe_agreement(name, part, state, path)}")
        except CheckpointError as error:  # the other part may be had all the same
            errors.append(str(error))
    if errors:
        raise CheckpointError("; ".join(errors))


def convert_files(
    name: str, weights: str | None, tokenizer: str | None, output: str | None
) -> None:
    """`convert`: into the cache, or into the folder `output`."""
    for part, source, explicit in _chosen_files(name, weights, tokenizer):
        path = registry.locate_weights(source, explicit, part)
        if output is None:
            target = registry.safetensors_of(path)
            state = checkpoints.without_ignored(source, checkpoints.read_checkpoint(target))
            agreement = _describe_agreement(name, part, state, path)
        else:
            target = Path(output) / f"{name}-{part}.safetensors"
            state = checkpoints.without_ignored(source, checkpoints.read_checkpoint(path))
            agreement = _describe_agreement(name, part, state, path)
            _write_output(state, target)
        print(f"{part}: {target}: {agreement}")


def _write_output(state: dict[str, Tensor], target: Path) -> None:
    try:
        conversions.write_weights(state, target)
    except OSError as error:
        raise CheckpointError(
            f"output: {target} cannot be written ({error.strerror or error})"
        ) from error


def add_files(places: list[str], name: str | None) -> None:
    """`add`: what each file is taken for; then what is left open, as an error."""
    wanted = name or "a released model"
    if "" in places:  # an unset variable of the shell; it would be the working folder
        raise CheckpointError("place: '' is empty, expected a folder or a file")
    addition = user_files.add_files([Path(place) for place in places], name)
    for source, file in addition.files.items():
        names = ", ".join(user for user, _ in registry.users_of(source))
        part = registry.users_of(source)[0][1]
        print(f"added: {file.path}: {part} of {names} ({_describe_basis(source, file.sha256)})")
    for file in addition.strangers:
        reason = file.fault or f"{file.path}: its tensors are not those of {wanted}"
        print(f"passed over: {reason.removeprefix('weights: ')}")
    for source in addition.files:
        _report_other_part(source)
    if addition.questions:
        raise CheckpointError("; ".join(addition.questions))
    if not addition.files:
        suffixes = ", ".join(recognition.SUFFIXES)
        raise CheckpointError(
            f"weights: nothing to add in {', '.join(places)}, expected weights of {wanted} in a "
            f"file that ends in {suffixes}"
        )


def _describe_basis(source: Source, sha256: str) -> str:
    """By what a file was recognised."""
    if source.sha256 is None:
        return "by keys and shapes"
    if sha256 == source.sha256:
        return "the pinned file, by its hash"
    return "by keys and shapes; its hash is not that of the pinned file"


def _report_other_part(source: Source) -> None:
    """Say if a model whose transformer is here lacks its tokenizer."""
    name, part = registry.users_of(source)[0]
    tokenizer = registry.source_of(name, "tokenizer")
    if part == "transformer" and where_found(tokenizer) == "missing":
        print(f"missing: {tokenizer.file}, the tokenizer of {name}: python -m models fetch {name}")


def remove_files(name: str) -> None:
    """`remove`: which files are forgotten."""
    for source in user_files.remove_files(name):
        print(f"forgotten: {source.file}")


COMMANDS = {
    "list": show_list,
    "info": show_info,
    "add": add_files,
    "remove": remove_files,
    "check": check_files,
    "fetch": fetch_files,
    "convert": convert_files,
}
HELP = {
    "list": "every model, whether its weights are here, and how to get those that are not",
    "info": "sizes, settings, files and where they are looked for",
    "add": "take in released files that you have, told by their content",
    "remove": "forget what was added for a model; no file of weights is removed",
    "check": "compare keys and shapes of files with the model",
    "fetch": "download, check and convert the files of a model",
    "convert": "convert files to safetensors, in the cache or in a folder",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each entry of `COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    subparsers = {}
    for command, text in HELP.items():
        description = f"{text.capitalize()}."
        subparsers[command] = commands.add_parser(command, help=text, description=description)

    subparsers["list"].add_argument(
        "--markdown",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the table of models/README.md; rewrites the block in FILE if one is given",
    )
    subparsers["add"].add_argument(
        "places", metavar="PLACE", nargs="+", help="a folder, which is searched, or a file"
    )
    subparsers["add"].add_argument(
        "--name", metavar="NAME", help="of the model, where content does not tell it"
    )
    for command in ("info", "remove", "check", "fetch", "convert"):
        subparsers[command].add_argument(
            "name", metavar="NAME", help="of a model that `python -m models list` shows"
        )
    for command in ("check", "convert"):
        subparsers[command].add_argument(
            "--weights", metavar="PATH", help="file of the transformer"
        )
        subparsers[command].add_argument(
            "--tokenizer", metavar="PATH", help="file of the tokenizer"
        )
    subparsers["convert"].add_argument(
        "--output", metavar="FOLDER", help="write NAME-transformer.safetensors and the like there"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    with user_errors():
        options = vars(build_parser().parse_args(argv))
        run_command = COMMANDS[options.pop("command")]
        run_command(**options)


if __name__ == "__main__":
    main()

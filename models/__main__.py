"""`python -m models`: which models there are, what is missing to run one, and whether a file is
what it should be.

    list                     every model, and whether its weights are here info NAME
    sizes, sampling settings, files and the places where they are looked for check NAME
    compare keys and shapes of files with the model; nothing stays loaded fetch NAME
    download, check and convert the files of a model convert NAME             convert files to
    safetensors, in the cache or in a folder

`check` and `convert` take --weights and --tokenizer; without either they use the files that `load`
would use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from models import registry
from models.preset import Preset, Source
from models.weights import checkpoints, conversions, digests
from models.weights.checkpoints import CheckpointError

BEGIN = "<!-- presets: python -m models list --markdown models/README.md -->"
END = "<!-- end of presets -->"


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def where_found(source: Source) -> str:
    """One word on where a file lies: shipped, cache, hub's cache, or missing."""
    place = next(
        (name for name, path in registry.known_places(source).items() if path is not None),
        "missing",
    )
    return "shipped" if place == "zoo" else place


def format_table(head: list[str], rows: list[list[str]], markdown: bool = False) -> str:
    """Left-aligned columns, as plain text or as a Markdown table."""
    if markdown:
        return "\n".join(
            "| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]
        )
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])


def plain_list() -> str:
    head = ["name", "family", "parameters", "tokens", "pixels", "transformer", "tokenizer"]
    return format_table(
        head,
        [
            [
                p.name,
                p.family,
                f"{count_parameters(registry.build_outline(p.name).transformer) / 1e6:,.1f}M",
                str(p.tokens),
                str(p.image_size),
                where_found(p.weights),
                where_found(p.tokenizer_weights),
            ]
            for p in registry.PRESETS.values()
        ],
    )


def markdown_list() -> str:
    """The table of models/README.md; it depends on the presets alone, not on what is installed or
    cached."""
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
    return format_table(head, [_markdown_row(p) for p in registry.PRESETS.values()], markdown=True)


def _markdown_row(preset: Preset) -> list[str]:
    model = registry.build_outline(preset.name)
    sources = [preset.weights, preset.tokenizer_weights]
    return [
        f"`{preset.name}`",
        f"{count_parameters(model.transformer):,}",
        f"{count_parameters(model.tokenizer):,}",
        str(preset.tokens),
        str(preset.image_size),
        *(f"`{source.file}`" for source in sources),
        "; ".join(dict.fromkeys(map(_source_origin, sources))),
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
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{block}\n\n{END}{text.partition(END)[2]}"


def show_list(markdown: str | None) -> None:
    if markdown is None:
        print(plain_list())
    elif markdown == "-":
        print(markdown_list())
    else:
        path = Path(markdown)
        path.write_text(with_block(path.read_text(), markdown_list()))


def show_info(name: str) -> None:
    preset = registry.find_preset(name)
    model = registry.build_outline(name)
    published = (
        "no published FID"
        if preset.published_fid is None
        else f"published FID {preset.published_fid:.2f}"
    )
    print(
        f"{name}: {preset.family.upper()}, {preset.classes} classes, {preset.tokens} tokens, "
        f"{preset.image_size} x {preset.image_size} pixels"
    )
    print(
        f"  licence {preset.licence}; {published}"
        + (f"; released sampling in {preset.dtype}" if preset.dtype != "fp32" else "")
        + (f"; evaluated at {preset.eval_size} pixels" if preset.eval_size else "")
    )
    for key, note in preset.notes.items():
        print(f"  {key}: {note}")
    for sampler, settings in preset.samplers.items():
        print(f"  sampler {sampler}: {_format_settings(settings)}")
    for part in registry.PARTS:
        module = getattr(model, part)
        source = registry.source_of(name, part)
        print(f"{part}: {count_parameters(module):,} parameters, {len(module.state_dict())} keys")
        print(f"  {_format_settings(getattr(preset, part))}")
        print(f"  file: {source}" + (f", sha256 {source.sha256}" if source.sha256 else ""))
        for place, path in registry.known_places(source).items():
            print(f"  {place}: {path or 'no'}")
        if where_found(source) == "missing":
            train = (
                f"python -m experiments.train_zoo model={source.recipe}, or "
                if source.shipped
                else ""
            )
            todo = f"python -m models fetch {name}, or " if source.repo else train
            print(f"  missing: {todo}give its path: {registry.PARTS[part]}")


def _format_settings(values: Mapping[str, object]) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items())


def _chosen_files(
    name: str, weights: str | None, tokenizer: str | None
) -> list[tuple[str, Source, str | None]]:
    """Part, source and explicit path of the files that a command is about: the given ones, or else
    both."""
    registry.find_preset(name)
    given = list(zip(registry.PARTS, (weights, tokenizer)))
    return [
        (p, registry.source_of(name, p), path)
        for p, path in given
        if path or not (weights or tokenizer)
    ]


def _describe_agreement(name: str, part: str, state: dict[str, Tensor], path: Path) -> str:
    """What agrees, in a line.

    Raises:
        CheckpointError: the file does not fit.
    """
    module = getattr(registry.build_outline(name), part)
    comparison = checkpoints.compare_state(module, state)
    if not comparison.fits:
        raise CheckpointError(
            f"{part}: {path} does not fit {name} ({len(comparison.agreeing)} keys agree): {comparison}"
            + registry.describe_owner(state)
        )
    keys = len(comparison.agreeing)
    dtypes = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in state.values()}))
    return (
        f"{keys} of {keys} keys and shapes agree, {count_parameters(module):,} parameters, {dtypes}"
    )


def check_files(name: str, weights: str | None, tokenizer: str | None) -> None:
    for part, source, explicit in _chosen_files(name, weights, tokenizer):
        path = registry.locate_weights(source, explicit, part)
        state = registry.without_ignored(source, checkpoints.read_checkpoint(path))
        print(f"{part}: {path}: {_describe_agreement(name, part, state, path)}")
        if explicit is not None and source.sha256 is not None:
            same = digests.file_digest(path) == source.sha256
            print(f"  sha256: {'that of' if same else 'not that of'} {source}")


def fetch_files(name: str) -> None:
    errors = []
    for part, source, _ in _chosen_files(name, None, None):
        try:
            path = registry.locate_weights(source, None, part)
            print(
                f"{part}: {path}: {_describe_agreement(name, part, registry.state_of(source, path, part), path)}"
            )
        except CheckpointError as error:  # the other part may be had all the same
            errors.append(str(error))
    if errors:
        raise CheckpointError("; ".join(errors))


def convert_files(
    name: str, weights: str | None, tokenizer: str | None, output: str | None
) -> None:
    for part, source, explicit in _chosen_files(name, weights, tokenizer):
        path = registry.locate_weights(source, explicit, part)
        if output is None:
            target = registry.safetensors_of(path)
            state = registry.without_ignored(source, checkpoints.read_checkpoint(target))
        else:
            target = Path(output) / f"{name}-{part}.safetensors"
            state = registry.without_ignored(source, checkpoints.read_checkpoint(path))
        agreeing = _describe_agreement(name, part, state, path)
        if output is not None:
            try:
                conversions.write_weights(state, target)
            except OSError as error:
                raise CheckpointError(
                    f"output: {target} cannot be written ({error.strerror or error})"
                ) from error
        print(f"{part}: {target}: {agreeing}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="list | info | check | fetch | convert"
    )
    sub = commands.add_parser("list", help="every model, and whether its weights are here")
    sub.add_argument(
        "--markdown",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the table of models/README.md; rewrites the block in FILE if one is given",
    )
    for command, text in (
        ("info", "sizes, settings, files and where they are looked for"),
        ("check", "compare files with the model"),
        ("fetch", "download, check and convert the files"),
        ("convert", "convert files to safetensors"),
    ):
        sub = commands.add_parser(command, help=text)
        sub.add_argument("name", metavar="NAME")
        if command in ("check", "convert"):
            sub.add_argument("--weights", metavar="PATH", help="file of the transformer")
            sub.add_argument("--tokenizer", metavar="PATH", help="file of the tokenizer")
        if command == "convert":
            sub.add_argument(
                "--output",
                metavar="FOLDER",
                help="write NAME-transformer.safetensors and the like there",
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 1 after one line on what is wrong."""
    options = vars(build_parser().parse_args(argv))
    commands = {
        "list": show_list,
        "info": show_info,
        "check": check_files,
        "fetch": fetch_files,
        "convert": convert_files,
    }
    try:
        commands[options.pop("command")](**options)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

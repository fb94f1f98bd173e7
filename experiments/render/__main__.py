"""Write everything that results say, from result files alone.

    python -m experiments.render                             # runs/report: every table's files, index.html; the README
    python -m experiments.render name=rar,components         # these tables only, no README
    python -m experiments.render name=rar from=runs/tables   # of results that are not committed
    python -m experiments.render --readme                    # the README's blocks and pictures, no report
    python -m experiments.render --check                     # exit 1 if one of these is not current

`out=FOLDER` replaces runs/report; `runs=FOLDER` is where samples of runs are looked for. Files that
do not count (truncated, of another run or version) are named and left out.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from experiments.registry import tables as registry
from experiments.registry.tables import SCALES, Table
from experiments.render import files, html, readme
from experiments.render.sheet import Result, Sheet, build_sheet
from experiments.store import results
from experiments.store.files import replacing, write_text
from ptq.spec import ConfigError, require

DEFAULTS = {"name": "all", "out": "runs/report", "runs": "runs", "from": ""}
FLAGS = ("--check", "--readme")


def local(folder: Path) -> tuple[list[Result], list[str]]:
    """The results of a table that ran here, failures included, and lines on files that do not
    count.

    Raises:
        ConfigError: there is no table in the folder.
    """
    path = folder / "results.json"
    try:
        found = list(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"from: {path} is not there, allowed is a folder that experiments.table wrote"
        ) from error
    except (ValueError, TypeError):
        return [], [f"{path}: cannot be read (it is truncated or damaged)"]
    faults = ["" if failed(entry) else results.find_fault(entry) for entry in found]
    return (
        [entry for entry, fault in zip(found, faults) if not fault],
        [f"{path}: entry {n} {fault}" for n, fault in enumerate(faults) if fault],
    )


def failed(entry: object) -> bool:
    """Whether an entry of results.json is a failed cell with its place."""
    fields = {"error": str, "seed": int, "table": dict}
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in fields.items())
        and all(key in entry["table"] for key in ("row", "point"))
    )


def parse(arguments: list[str]) -> tuple[dict[str, str], list[Table]]:
    """Settings, and the tables they name.

    Raises:
        ConfigError: an argument is unknown, or there is no such table.
    """
    settings = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        require("argument", key, tuple(DEFAULTS) if equals else FLAGS)
        if equals:
            settings[key] = value
    names = (
        list(registry.load_tables()) if settings["name"] == "all" else settings["name"].split(",")
    )
    return settings, [registry.find_table(name) for name in names]


def render(tables: list[Table], out: Path, runs: Path, source: str) -> list[html.Section]:
    """Write the files of all tables at all scales; `source`: folder of `experiments.table`, or
    committed results.

    Sample grids of tables that compare with the paper stand in the repository too, since their
    images do not.

    Raises:
        ConfigError: results make no table, or `source` has none of these.
    """
    sections = []
    for table in tables:
        for scale in (s for s in SCALES if s in table.models):
            name = results.table_label(table.name, scale)
            if source and not (Path(source) / name).is_dir():
                continue
            found, ignored = (
                local(Path(source) / name) if source else results.committed_results(name)
            )
            sheet = build_sheet(table, scale, found)
            folder = out / name
            files.write_sheet(sheet, folder, runs)
            if not source and table.paper:
                keep_samples(sheet, folder / "samples.png", readme.SAMPLES / f"{name}.png")
            sections.append(html.Section(sheet, folder, ignored))
    if not sections:
        raise ConfigError(
            f"from: {source} has no results of {', '.join(table.name for table in tables)}"
        )
    return sections


def keep_samples(sheet: Sheet, made: Path, kept: Path) -> None:
    """Copy a whole sample grid to the committed ones; where runs are not at hand, take the
    committed one of them."""
    from experiments.render.pictures import is_current, samples_source

    whole = samples_source(sheet)
    if is_current(made, whole):
        copy(made, kept)
    elif is_current(kept, whole):
        copy(kept, made)


def copy(source: Path, target: Path) -> None:
    """Copy a file under its final name in one step."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def main() -> None:
    arguments = sys.argv[1:]
    try:
        settings, tables = parse(arguments)
        if "--check" in arguments:
            stale = readme.find_stale()
            sys.exit(
                "\n".join(f"error: {line}; run python -m experiments.render" for line in stale)
                if stale
                else 0
            )
        everything = settings["name"] == "all" and not settings["from"]
        if "--readme" not in arguments:
            out = Path(settings["out"])
            sections = render(tables, out, Path(settings["runs"]), settings["from"])
            write_text(out / "index.html", html.format_page(sections, with_claims=everything))
            for line in (line for part in sections for line in (*part.ignored, *part.sheet.strays)):
                print(f"ignored: {line}", file=sys.stderr)
            print(f"written: {out / 'index.html'} and the files of {len(sections)} tables")
        if everything or "--readme" in arguments:
            readme.update_pages()
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""The report of tables: their files, and one page of all; and whether the README's pages are current."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from experiments.registry import tables as registry
from experiments.registry.tables import SCALES, Table
from experiments.render import files, html, readme
from experiments.render.options import Options
from experiments.render.sheet import Result, Sheet, build_sheet
from experiments.store import results
from experiments.store.files import replacing, write_text
from ptq.spec import ConfigError


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


def check_pages() -> str | int:
    """The exit status of a check: 0, or a line for every page that is not current."""
    stale = [f"error: {line}; run python -m experiments.render" for line in readme.find_stale()]
    return "\n".join(stale) or 0


def write_report(options: Options) -> None:
    """Write the report of the tables that are named, and the README where all are.

    Raises:
        ConfigError: results make no table, or there are none of these.
    """
    everything = options.name == "all" and not options.from_
    if not options.readme:
        names = registry.load_tables() if options.name == "all" else options.name.split(",")
        tables = [registry.find_table(name) for name in names]
        out = Path(options.out)
        sections = render(tables, out, Path(options.runs), options.from_ or "")
        write_text(out / "index.html", html.format_page(sections, with_claims=everything))
        for section in sections:
            for line in (*section.ignored, *section.sheet.strays):
                print(f"ignored: {line}", file=sys.stderr)
        print(f"written: {out / 'index.html'} and the files of {len(sections)} tables")
    if everything or options.readme:
        readme.update_pages()

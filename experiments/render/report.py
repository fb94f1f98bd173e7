"""The report of tables: their files, one page of all, and whether the README is current."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from experiments.identity.results import committed_results, find_identity_fault
from experiments.registry import tables as registry
from experiments.registry.tables import SCALES, Table
from experiments.render import files, html, readme
from experiments.render.options import Options
from experiments.render.sheet import Result, Sheet, build_sheet
from experiments.store import results
from experiments.store.files import write_text
from ptq.files import read_json, replacing
from ptq.spec import ConfigError


def load_local(folder: Path) -> tuple[list[Result], list[str]]:
    """The results of a table that ran here, failed cells included, and lines on ignored ones.

    Raises:
        ConfigError: there is no table in the folder.
    """
    path = folder / "results.json"
    try:
        entries = list(read_json(path))
    except FileNotFoundError as error:
        raise ConfigError(
            f"from: {path} is not there, allowed is a folder that experiments.table wrote"
        ) from error
    except (ValueError, TypeError):
        return [], [f"{path}: cannot be read (it is truncated or damaged)"]
    counting = []
    ignored = []
    for number, entry in enumerate(entries):
        # a failed cell has no metrics to judge, and is shown as failed
        find_fault = results.describe_seal if is_failed_cell(entry) else find_any_fault
        fault = find_fault(entry)
        if fault:
            ignored.append(f"{path}: entry {number} {fault}")
        else:
            counting.append(entry)
    return counting, ignored


def find_any_fault(entry: object) -> str:
    """Why an entry of results.json does not count; "" if it does."""
    return results.find_fault(entry) or find_identity_fault(entry)


def is_failed_cell(entry: object) -> bool:
    """Whether an entry of results.json is a failed cell with its place."""
    match entry:
        case {"error": str(), "seed": int(), "table": {"row": _, "point": _}}:
            return True
    return False


def render_tables(tables: list[Table], out: Path, runs: Path, source: str) -> list[html.Section]:
    """Write the files of all tables at all scales.

    Args:
        source: a folder of `experiments.table`; empty for committed results.

    Raises:
        ConfigError: results make no table, or `source` has none of these.
    """
    sections = []
    for table in tables:
        for scale in SCALES:
            name = results.table_label(table.name, scale)
            is_there = not source or (Path(source) / name).is_dir()
            if scale not in table.models or not is_there:
                continue
            # natural models have no figures in the paper: without results there is nothing to show
            if scale == "natural" and not source and not (results.ROOT / name).is_dir():
                continue
            sections.append(render_table(table, scale, out, runs, source))
    if not sections:
        names = ", ".join(table.name for table in tables)
        raise ConfigError(f"from: {source} has no results of {names}")
    return sections


def render_table(table: Table, scale: str, out: Path, runs: Path, source: str) -> html.Section:
    """Write the files of a table at one scale."""
    name = results.table_label(table.name, scale)
    if source:
        table_results, ignored = load_local(Path(source) / name)
    else:
        table_results, ignored = committed_results(name)
    sheet = build_sheet(table, scale, table_results)
    folder = out / name
    files.write_sheet(sheet, folder, runs)
    # these pictures of samples are committed, since the images are not
    if not source and table.keeps_samples(scale):
        keep_samples(sheet, folder / "samples.png", readme.SAMPLES / f"{name}.png")
    return html.Section(sheet, folder, ignored)


def keep_samples(sheet: Sheet, made: Path, kept: Path) -> None:
    """Commit a whole sample grid; where the runs are not at hand, show the committed one."""
    from experiments.render.pictures import is_current, samples_source

    whole = samples_source(sheet)  # a grid that lacks runs carries no digest, and so is never kept
    if is_current(made, whole):
        copy_file(made, kept)
    elif is_current(kept, whole):
        copy_file(kept, made)


def copy_file(source: Path, target: Path) -> None:
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
    # the README needs every committed table
    everything = options.name == "all" and not options.from_
    if not options.readme:
        names = registry.load_tables() if options.name == "all" else options.name.split(",")
        tables = [registry.find_table(name) for name in names]
        out = Path(options.out)
        sections = render_tables(tables, out, Path(options.runs), options.from_ or "")
        if everything:
            readme.update_pages()  # first: the report opens with pictures of the pages
        write_text(out / "index.html", html.format_page(sections, with_claims=everything))
        for section in sections:
            for line in (*section.ignored, *section.sheet.strays):
                print(f"ignored: {line}", file=sys.stderr)
        print(f"written: {out / 'index.html'} and the files of {len(sections)} tables")
    else:
        readme.update_pages()

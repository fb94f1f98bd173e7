"""One HTML page with all tables, pictures and sample grids, to be opened from disk: no script, no
network, one file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.render.formats import format_html
from experiments.render.readme import measured_on
from experiments.render.sheet import Sheet
from experiments.render.text import arrange_costs, arrange_sheet

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1.5em; max-width: 1320px }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; border-top: 1px solid #ccc; padding-top: 1em; margin-top: 2em }
nav a { display: inline-block; margin-right: 1em } a { color: #0057a3; text-decoration: none }
table { border-collapse: collapse; font-size: .8em; font-variant-numeric: tabular-nums }
th { text-align: left; border-bottom: 2px solid #444; vertical-align: bottom } th, td { padding: .2em .7em .2em 0 }
td { white-space: nowrap } .recipes td, .speed td:last-child { white-space: normal }
.claims td { white-space: normal }
.claims td { vertical-align: top; min-width: 8em }
tr.group td { border-top: 1px solid #999 } tr.absent td { color: #888 } tr.failed td { color: #b00020 }
.wide { overflow-x: auto } img { max-width: 100%; height: auto; display: block; margin: 1em 0 }
.samples { image-rendering: pixelated } dt { font-weight: 600; float: left; margin-right: .6em } dd { margin: 0 }
.state { color: #666; font-weight: normal; font-size: .8em } summary { cursor: pointer; color: #0057a3 }
"""


LONG = 60  # rows of a table that are shown at once


@dataclass(frozen=True)
class Section:
    """A table in the report: its sheet, the folder with its pictures, and what was ignored in
    reading it."""

    sheet: Sheet
    folder: Path
    ignored: Sequence[str] = ()


def progress(sheet: Sheet) -> str:
    """How much of a table is there, in words."""
    failed = sum(bool(line.failures) for line in sheet.lines)
    words = f"{len(sheet.done)} of {len(sheet.lines)} rows measured"
    return words + (f", {failed} failed" if failed else "")


def embedded(path: Path, alternative: str, kind: str = "") -> str:
    """An image as part of the page; nothing where there is no file."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<img class="{kind}" alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'
    )


def prose(words: str) -> str:
    """Text with `code` as HTML."""
    return re.sub("`(.+?)`", r"<code>\1</code>", html.escape(words))


def section(part: Section) -> str:
    """One table: what it is, its figures, its pictures."""
    sheet = part.sheet
    table = part.sheet.table
    of_twins = sheet.scale == "twin"
    expected = table.expected if of_twins else ""  # what the registry says is of the twins
    facts = {"Reproduces": table.reproduces, "Expected": expected, "Measured": measured_on(sheet)}
    listed = "".join(f"<dt>{k}</dt><dd>{prose(v)}</dd>" for k, v in facts.items() if v)
    quality = arrange_sheet(sheet)
    shown = f'<div class="{table.what}">{format_html(quality)}</div>'
    if len(quality.cells) > LONG:
        shown = f"<details><summary>All {len(quality.cells)} rows</summary>{shown}</details>"
    spent = arrange_costs(sheet) if table.what == "run" and sheet.done else None
    left_out = (*part.ignored, *sheet.strays)
    ignored = "".join(f"<li>{html.escape(line)}</li>" for line in left_out)
    return "\n".join(
        filter(
            None,
            (
                f'<h2 id="{sheet.name}">{html.escape(table.title)}{"" if of_twins else ", released models"} '
                f'<span class="state">{sheet.name}: {progress(sheet)}</span></h2>',
                f"<dl>{listed}</dl>",
                embedded(part.folder / "plot.png", table.title),
                shown,
                embedded(part.folder / "samples.png", f"samples: {table.title}", "samples"),
                f"<details><summary>Times, memory and size</summary>{format_html(spent)}</details>"
                if spent
                else "",
                f"<details><summary>Ignored files: {len(left_out)}</summary><ul>{ignored}</ul></details>"
                if left_out
                else "",
            ),
        )
    )


def claims_section() -> str:
    """The paper's statements, with what the twins show."""
    from experiments.render import claims

    def listed(words: Sequence[str]) -> str:
        first, more = (
            "<br>".join(map(html.escape, part))
            for part in (words[: claims.SHOWN], words[claims.SHOWN :])
        )
        left = len(words) - claims.SHOWN
        return first + (
            f"<details><summary>and {left} more</summary>{more}</details>" if more else ""
        )

    rows = "".join(
        '<tr class="group">'
        + "".join(
            f"<td>{cell}</td>"
            for cell in (
                html.escape(claim.statement),
                claim.marked_verdict,
                listed(claim.figures),
                listed(claim.control),
            )
        )
        + "</tr>"
        for claim in claims.evaluate()
    )
    heads = ("The paper says", "The twins", "Figures", f"Control ({claims.CONTROL})")
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return f'<h2 id="claims">Claims</h2><div class="wide claims"><table><tr>{head}</tr>{rows}</table></div>'


def page(sections: Sequence[Section], with_claims: bool) -> str:
    """The whole page: claims first, then tables with results, then those without."""
    ordered = sorted(sections, key=lambda part: not part.sheet.done)  # stable
    lists = {
        "Measured": [s for s in ordered if s.sheet.done],
        "Not run": [s for s in ordered if not s.sheet.done],
    }
    links = "".join(
        f"<p>{what}: {''.join(f'<a href=#{s.sheet.name}>{s.sheet.name}</a>' for s in parts)}</p>"
        for what, parts in lists.items()
        if parts
    )
    claims = claims_section() if with_claims else ""
    first = '<p><a href="#claims">Claims of the paper</a></p>' if with_claims else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>PTQ4ARVG: results</title>'
        f"<style>{STYLE}</style></head><body><h1>Post-training quantization of autoregressive image generators: results"
        "</h1><p>Generated by <code>python -m experiments.render</code> from result files alone. Columns headed "
        "“Paper” hold figures of PTQ4ARVG (arXiv 2601.21238), of the model they name, on ImageNet with Inception; all "
        "other figures were measured here, mean ± standard deviation over seeds. No image metric of a twin compares "
        f"with one of the paper.</p><nav>{first}{links}</nav>{claims}"
        + "\n".join(section(part) for part in ordered)
        + "</body></html>\n"
    )

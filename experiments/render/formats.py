"""Tables of text as Markdown, LaTeX, HTML and CSV; figures of a sheet as CSV."""

from __future__ import annotations

import html
from collections.abc import Iterable

import pandas as pd

from experiments.registry.labels import COST_HEADINGS
from experiments.render.numbers import SPENT_HEADINGS
from experiments.render.sheet import PLACE, Sheet, names_among, names_beside
from experiments.render.text import TextTable

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        ">": r"$>$",
        "<": r"$<$",
    }
)
LATEX_HEAD = 4  # lines of a tabular above its first row: begin, rule, heads, rule
HTML_STATES = {"failed": "failed", "not run": "absent", "refused": "absent"}


def format_markdown(table: TextTable) -> str:
    """A Markdown table with its note; a sentence where there are no lines."""
    if table.cells.empty:
        return table.note or "Not run."
    heads = list(table.cells)
    rows = [heads, ["---"] * len(heads)]
    for line in table.cells.itertuples(index=False, name=None):
        row = []
        for column, cell in enumerate(line):
            # a bare bar would end the cell
            row.append(f"`{cell}`" if column in table.code else cell.replace("|", r"\|"))
        rows.append(row)
    text = "\n".join(map(format_row, rows))
    return f"{text}\n\n{table.note}" if table.note else text


def format_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def format_latex(table: TextTable, title: str) -> str:
    """A LaTeX table (package booktabs)."""
    cells = table.cells.map(lambda cell: cell.translate(LATEX))
    cells.columns = [head.translate(LATEX) for head in table.cells]
    layout = "l" * len(cells.columns)
    # needs Jinja2, which torch depends on
    tabular = cells.to_latex(index=False, escape=False, column_format=layout).splitlines()
    for row in sorted(table.groups, reverse=True):  # from below: the lines above keep their places
        tabular.insert(LATEX_HEAD + row, r"\midrule")
    caption = f"{title}. {table.note}" if table.note else f"{title}."
    lines = [
        r"\begin{table}",
        r"\centering",
        *tabular,
        rf"\caption{{{caption.translate(LATEX)}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def format_html(table: TextTable) -> str:
    """An HTML table with its note."""
    if table.cells.empty:
        return f"<p>{html.escape(table.note or 'Not run.')}</p>"
    head = wrap_each("th", map(html.escape, table.cells))
    rows = []
    for number, line in enumerate(table.cells.itertuples(index=False, name=None)):
        # the last column is the state where not all is measured: "failed: why"
        state = HTML_STATES.get(line[-1].partition(":")[0], "")
        group = "group" if number in table.groups else ""
        classes = " ".join(filter(None, (state, group)))
        cells = wrap_each("td", map(html.escape, line))
        tags = f" {format_tags(*table.tags[number])}" if table.tags else ""
        rows.append(f'<tr class="{classes}"{tags}>{cells}</tr>')
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{note}'


def format_tags(model: str, bits: str, method: str) -> str:
    """The attributes by which the report filters."""
    pairs = {"model": model, "bits": bits, "method": method}
    return " ".join(f'data-{key}="{html.escape(value)}"' for key, value in pairs.items())


def wrap_each(tag: str, contents: Iterable[str]) -> str:
    """Contents that are HTML, each inside a tag of its own."""
    return "".join(f"<{tag}>{content}</{tag}>" for content in contents)


def format_csv(frame: pd.DataFrame) -> str:
    """A frame as CSV; what is missing is empty."""
    return frame.to_csv(index=False, lineterminator="\n")


def quality_csv(sheet: Sheet) -> str:
    """One line per figure: where it stands, the paper's (and its model's name), ours and state.

    No times: the same results give the same bytes.
    """
    metrics = [*(sheet.metrics() or sheet.table.columns or ()), *sheet.paper_metrics()]
    metrics = names_beside(dict.fromkeys(metrics), COST_HEADINGS)
    # one row per line and metric, measured or not
    wanted = pd.MultiIndex.from_product([range(len(sheet.lines)), metrics])
    wanted.names = ["line", "metric"]
    frame = sheet.figures.rename_axis(wanted.names).reindex(wanted).join(sheet.paper_figures)
    frame = frame.reset_index().join(sheet.places, on="line")
    frame["seeds"] = frame["seeds"].fillna(0).astype(int)  # missing counts made it float
    figures = ["metric", "paper_model", "paper", "mean", "std", "seeds", "state"]
    return format_csv(frame[[*PLACE, *sheet.grid, *figures]])


def costs_csv(sheet: Sheet) -> str:
    """One line per measured cell and seed: seconds, MiB and bytes."""
    recorded = recorded_costs(sheet)
    costs = names_among(SPENT_HEADINGS, recorded)
    return format_csv(sheet.results[[*PLACE, *sheet.grid, "seed", *costs]])


def recorded_costs(sheet: Sheet) -> set[str]:
    """The costs of which any result speaks, be it to say that they are unknown."""
    names: set[str] = set()
    for line in sheet.lines:
        for result in line.results:
            names.update(result["cost"])
    return names

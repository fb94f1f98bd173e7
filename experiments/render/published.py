"""What authors of rival methods publish, of released models: figures that were not measured here.

They stand in `experiments/paper/rivals.csv`, each with who measured it and where it was read; one
that was measured by others than the method's authors says `second-hand`. Nothing is quoted from
memory, so a method whose figures could not be read has none.
"""

from __future__ import annotations

from experiments.registry.paper import read_numbers
from experiments.render.formats import format_markdown
from experiments.render.text import TextTable

HEADINGS = {
    "method": "Method",
    "model": "Model",
    "bits": "Bits",
    "scope": "Scope",
    "IS": "Published: IS",
    "FID": "Published: FID",
    "precision": "Published: precision",
    "recall": "Published: recall",
    "measured_by": "Measured by",
    "source": "Source",
}


def published_block() -> str:
    """The published figures as a table."""
    figures = read_numbers("rivals.csv", as_text=True)
    return format_markdown(TextTable(figures[list(HEADINGS)].rename(columns=HEADINGS)))

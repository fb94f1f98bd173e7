"""The comparison with the official code of PTQ4ARVG, which was measured outside of this repository.

Its figures stand in one file (`RECORD`), with what is known of where they come from. The page
`experiments/OFFICIAL.md` and the README have them from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.render.formats import format_markdown
from experiments.render.text import TextTable
from experiments.store import results
from ptq.files import read_sealed
from ptq.spec import require

RECORD = results.ROOT / "raw" / "official-code.json"
NOT_RECORDED = "not recorded"
QUANTITIES = {  # of a model, in the order of the table
    "kl": "KL to full precision [nats/token]",
    "quantizing_s": "Quantizing [s]",
    "sampling_s": "Sampling 100 images, full precision [s]",
    "sampling_quantized_s": "Sampling 100 images, simulated W6A6 [s]",
    "sampling_compiled_s": "Sampling 100 images, compiled [s]",
    "peak_mb": "Peak memory [MiB]",
}
ORIGIN = {  # what the record says of itself
    "repository": "Official code",
    "revision": "Its revision",
    "rows": "Calibration rows",
    "weights": "Weights",
    "device": "Device",
    "date": "Date",
    "patches": "What was patched in it",
}


def load_comparison() -> Mapping[str, Any]:
    """The record of the comparison.

    Raises:
        DamagedFile: it is not what its digest says.
    """
    return read_sealed(RECORD)


def find_model(family: str) -> Mapping[str, Any]:
    """What was compared on a family's model.

    Raises:
        ConfigError: there is no such family in the record.
    """
    entries = {}
    for entry in load_comparison()["models"]:
        entries[entry["family"]] = entry
    require("family", family, tuple(entries))
    return entries[family]


def official_block(name: str) -> str:
    """A block of the page: `figures` or `origin`.

    Raises:
        ConfigError: there is no such block.
    """
    require("official", name, ("figures", "origin"))
    record = load_comparison()
    frame = arrange_figures(record) if name == "figures" else arrange_origin(record)
    return format_markdown(TextTable(frame))


def arrange_figures(record: Mapping[str, Any]) -> pd.DataFrame:
    """One line per model and recorded quantity: ours and the official code's; of times how many
    times as fast ours is."""
    lines = []
    for entry in record["models"]:
        model = f"{entry['family']}, {entry['quant'].upper()}"
        for key, quantity in QUANTITIES.items():
            figures = entry.get(key)
            if figures is None:
                continue
            ratio = figures["official"] / figures["ours"]
            faster = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
            faster = faster if key.endswith("_s") else ""
            ours = f"{figures['ours']:g}"
            theirs = f"{figures['official']:g}"
            lines.append([model, quantity, ours, theirs, faster])
    heads = ["Model", "Quantity", "This repository", "Official code", "Times as fast"]
    return pd.DataFrame(lines, columns=heads)


def arrange_origin(record: Mapping[str, Any]) -> pd.DataFrame:
    """One line per thing that the record says of itself, or does not."""
    lines = []
    for key, heading in ORIGIN.items():
        lines.append([heading, record.get(key) or NOT_RECORDED])
    return pd.DataFrame(lines, columns=["What", "Known"])

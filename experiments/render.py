"""Results to tables: markdown on the terminal, CSV, and the generated blocks of the README.

    python -m experiments.render          # rewrite the README's result blocks from experiments/results
    python -m experiments.render --check  # exit 1 if they are not current

A block stands between `<!-- results:NAME -->` and `<!-- end -->`; it holds the mean over seeds and, from two seeds on,
the standard deviation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NAMES = {
    "fp": "FP32", "rtn": "RTN", "rtn_minmax": "RTN (min-max)", "rtn_dynamic": "RTN dynamic",
    "smoothquant": "SmoothQuant", "stwq": "STWQ alone", "sq_stwq": "SmoothQuant + STWQ",
    "gps_only": "GPS + STWQ, no pre-steps", "ptq4arvg": "PTQ4ARVG", "ptq4arvg_released": "PTQ4ARVG as released",
}
COLUMNS = {  # metric: (heading, digits)
    "kl": ("KL to FP", 4), "nll": ("NLL", 4), "fid2fp": ("FID to FP", 3), "fid": ("FID", 3), "sfid": ("sFID", 3),
    "is": ("IS", 2), "precision": ("Prec.", 3), "recall": ("Rec.", 3), "agreement": ("Agree.", 3),
}


def frame(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One line per finished cell: model, quant, method, switches that differ from the method's, seed and metrics."""
    lines = []
    for r in results:
        if "error" in r:
            continue
        method = r["provenance"]["config"]["method"]
        lines.append({
            **{k: r["cell"][k] for k in ("model", "quant", "method", "calib")}, "gps": method["gps"],
            "stwq": method["stwq"], "seed": r["seed"], **{k: r["metrics"].get(k) for k in COLUMNS},
            "calibration_s": r["cost"]["calibration_s"], "sampling_s": r["cost"]["sampling_s"],
            "model_mb": r["cost"]["model_bytes"] / 2**20, "images": r["provenance"]["images"],
        })
    return pd.DataFrame(lines)


def cell_text(values: pd.Series, digits: int) -> str:
    """Mean, with the standard deviation over seeds if there are several; an en dash where nothing was measured."""
    values = values.dropna().astype(float)
    if values.empty:
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def label(line: pd.Series, varied: list[str]) -> str:
    """The row's name, with the switches that the table varies."""
    name = NAMES.get(line["method"], line["method"])
    if line["method"] == "fp" or not varied:
        return name
    return name + " (" + ", ".join(f"{k}={str(line[k]).lower()}" for k in varied) + ")"


def markdown(results: list[dict[str, Any]]) -> str:
    """A table per model: full precision first, then the rows of each bit width in the order they were run."""
    data = frame(results)
    failed = [r for r in results if "error" in r]
    if data.empty:
        return "no finished cells"
    quantized = data[data.method != "fp"]
    varied = [k for k in ("gps", "stwq", "calib") if quantized.groupby("method")[k].nunique().max() > 1]
    shown = [k for k in COLUMNS if data[k].notna().any()]
    several = data.model.nunique() > 1
    head = (["Model"] if several else []) + ["Bits", "Method"] + [COLUMNS[k][0] for k in shown]
    lines = [head, ["---"] * len(head)]
    for model, of_model in data.groupby("model", sort=False):
        for quant, of_quant in of_model.groupby(of_model.quant.fillna("fp32"), sort=False):
            keys = ["method", *varied]
            for _, rows in of_quant.groupby([of_quant[k].astype(str) for k in keys], sort=False):
                values = [cell_text(rows[k], COLUMNS[k][1]) for k in shown]
                bits = "32/32" if quant == "fp32" else quant.upper()
                lines.append(([f"`{model}`"] if several else []) + [bits, label(rows.iloc[0], varied), *values])
    for r in failed:
        lines.append([*([""] if several else []), "", f"failed: {' '.join(r['overrides'])}", *[""] * len(shown)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pictures(results: list[dict[str, Any]], runs: Path, folder: Path) -> None:
    """An image grid of all methods at the first model, bit width and seed, and the outliers of each model."""
    from experiments.figures import image_grid, outlier_figure
    from models import load
    from models.checkpoints import read
    from models.registry import ZOO

    done = [r for r in results if "error" not in r]
    if not done:
        return
    model, seed = done[0]["cell"]["model"], done[0]["seed"]
    quants = [r["cell"]["quant"] for r in done if r["cell"]["quant"]]
    wanted = [r for r in done if r["cell"]["model"] == model and r["seed"] == seed
              and r["cell"]["quant"] in (None, quants[-1] if quants else None)]
    panels = {}
    for r in wanted[:8]:
        method = r["cell"]["method"]
        for path in runs.glob(f"*-{r['provenance']['hash']}/samples.npz"):
            panels[NAMES.get(method, method)] = np.load(path)["arr_0"].transpose(0, 3, 1, 2)
    if panels:
        image_grid(panels, folder / "samples.png")
    for name in sorted({r["cell"]["model"] for r in done}):
        generator = load(name)
        if generator.preset.weights.shipped:
            stored = read(ZOO / f"{generator.preset.family}_heldout.safetensors")
            rows, _ = generator.adapter.rows(stored["tokens"][:128].long(), stored["labels"][:128].long())
            outlier_figure(generator.adapter, rows, folder / f"outliers-{name}.png", name)


def stored(name: str) -> list[dict[str, Any]]:
    """The committed results of a table, full precision first, methods in the order of NAMES."""
    order = list(NAMES)
    results = [json.loads(p.read_text()) for p in sorted((RESULTS / name).glob("*.json"))]
    quants = ["w8a8", "w6a6", "w4a8", "w4a4"]

    def place(r: dict[str, Any]) -> tuple:
        c, method = r["cell"], r["provenance"]["config"]["method"]
        quant = quants.index(c["quant"]) if c["quant"] in quants else -1
        return c["model"], quant, order.index(c["method"]) if c["method"] in order else len(order), \
            method["gps"], method["stwq"], c["calib"] or "", r["seed"]

    return sorted(results, key=place)


def block(name: str) -> str:
    """The generated text of one README block: the table, and where it was measured."""
    results = stored(name)
    if not results:
        return f"No results are committed under `experiments/results/{name}` yet."
    first = results[0]["provenance"]
    seeds = sorted({r["seed"] for r in results})
    devices = sorted({r["provenance"]["versions"]["device"] for r in results})
    return (
        f"{markdown(results)}\n\n{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {first['images']:,} images and "
        f"{first['sequences']:,} held-out sequences per run; {', '.join(devices)}, torch {first['versions']['torch']}. "
        f"Raw results: `experiments/results/{name}`."
    )


def rewritten(text: str) -> str:
    """The text with every block between result markers replaced by its current contents."""
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: m.group(1) + block(m.group(2)) + m.group(3), text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrite the README's result blocks from experiments/results.")
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = rewritten(old)
    if arguments.check:
        sys.exit(0 if new == old else "error: README.md: results are not current; run python -m experiments.render")
    path.write_text(new)


if __name__ == "__main__":
    main()

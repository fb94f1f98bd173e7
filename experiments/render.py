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
import yaml

from ptq.types import ConfigError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NAMES = {
    "fp": "FP32", "rtn": "RTN", "rtn_minmax": "RTN (min-max)", "rtn_dynamic": "RTN dynamic",
    "smoothquant": "SmoothQuant", "stwq": "STWQ alone", "sq_stwq": "SmoothQuant + STWQ",
    "gps_only": "GPS + STWQ, no pre-steps", "ptq4arvg": "PTQ4ARVG", "ptq4arvg_released": "PTQ4ARVG as released",
    "smoothquant_paper": "SmoothQuant (paper)", "os_plus": "OS+", "repq": "RepQ*", "repq_stwq": "RepQ* + STWQ",
    "sq_repq": "SmoothQuant, RepQ*", "omniquant": "OmniQuant", "omniquant_paper": "OmniQuant (paper)",
    "quarot": "QuaRot", "quarot_paper": "QuaRot (paper)", "quarot_stwq": "QuaRot + STWQ",
    "svdquant": "SVDQuant", "svdquant_paper": "SVDQuant (paper)", "gptq": "RTN + GPTQ",
    "ptq4arvg_gptq": "PTQ4ARVG + GPTQ",
}
COLUMNS = {  # metric: (heading, digits)
    "kl": ("KL to FP", 4), "nll": ("NLL", 4), "fid2fp": ("FID to FP", 3), "fid": ("FID", 3), "sfid": ("sFID", 3),
    "is": ("IS", 2), "precision": ("Prec.", 3), "recall": ("Rec.", 3), "agreement": ("Agree.", 3),
}
COSTS = {"calibration_s": ("Calibration [s]", 1), "calibration_peak_mb": ("Peak [MiB]", 0)}  # for tables that ask


NOT_A_ROW = ("seed", "calib.seed", "runs", "device", "tracker", "method.name", "quant.name")  # never tell rows apart


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as {dotted key: value as text}, without what never tells two rows of a table apart."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in NOT_A_ROW:
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        else:
            found[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def varied(results: list[dict[str, Any]]) -> list[str]:
    """Config keys in which quantized results of one model, method and bit width differ."""
    groups: dict[tuple, list[dict[str, str]]] = {}
    for r in results:
        if "error" not in r and r["cell"]["method"] != "fp":
            c = r["cell"]
            groups.setdefault((c["model"], c["method"], c["quant"]), []).append(flat(r["provenance"]["config"]))
    keys = {k for g in groups.values() for k in g[0] if len({config.get(k) for config in g}) > 1}
    followers = {"method.shift": "method.gps", "method.exclude_sinks": "method.stwq"}  # set by another switch
    return sorted(k for k in keys if followers.get(k) not in keys)


def frame(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One line per finished cell: model, quant, method, the config keys that vary, seed, metrics and cost.

    Raises:
        ConfigError: two results are of the same cell and seed.
    """
    keys, lines = varied(results), []
    for r in results:
        if "error" in r:
            continue
        config = flat(r["provenance"]["config"])
        lines.append({
            **{k: r["cell"][k] for k in ("model", "quant", "method")}, **{k: config[k] for k in keys},
            "seed": r["seed"], **{k: r["metrics"].get(k) for k in COLUMNS},
            **{k: r["cost"].get(k) for k in COSTS}, "sampling_s": r["cost"]["sampling_s"],
            "model_mb": r["cost"]["model_bytes"] / 2**20, "images": r["provenance"]["images"],
        })
    data = pd.DataFrame(lines)
    if not data.empty and data.duplicated(["model", "quant", "method", *keys, "seed"]).any():
        raise ConfigError("results: a cell stands twice with the same seed; every row needs one result a seed")
    return data


def cell_text(values: pd.Series, digits: int) -> str:
    """Mean, with the standard deviation over seeds if there are several; an en dash where nothing was measured."""
    values = values.dropna().astype(float)
    if values.empty:
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def label(line: pd.Series, keys: list[str]) -> str:
    """The row's name, with the settings that the table varies."""
    name = NAMES.get(line["method"], line["method"])
    if line["method"] == "fp" or not keys:
        return name
    return name + " (" + ", ".join(f"{k.rpartition('.')[2]}={line[k]}" for k in keys) + ")"


def markdown(results: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """A table per model: full precision first, then the rows of each bit width in the order they were run.

    `columns`: names of `COLUMNS` and `COSTS` to show, in this order; None stands for all metrics. Those that no row has
    are left out.
    """
    data = frame(results)
    failed = [r for r in results if "error" in r]
    if data.empty:
        return "no finished cells"
    settings = varied(results)
    known = {**COLUMNS, **COSTS}
    shown = [k for k in columns or COLUMNS if data[k].notna().any()]
    several = data.model.nunique() > 1
    head = (["Model"] if several else []) + ["Bits", "Method"] + [known[k][0] for k in shown]
    lines = [head, ["---"] * len(head)]
    for model, of_model in data.groupby("model", sort=False):
        for quant, of_quant in of_model.groupby(of_model.quant.fillna("fp32"), sort=False):
            keys = ["method", *settings]
            for _, rows in of_quant.groupby([of_quant[k].astype(str) for k in keys], sort=False):
                values = [cell_text(rows[k], known[k][1]) for k in shown]
                bits = "32/32" if quant == "fp32" else quant.upper()
                lines.append(([f"`{model}`"] if several else []) + [bits, label(rows.iloc[0], settings), *values])
    for r in failed:
        lines.append([*([""] if several else []), "", f"failed: {' '.join(r['overrides'])}", *[""] * len(shown)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pictures(results: list[dict[str, Any]], runs: Path, folder: Path) -> None:
    """An image grid of all rows at the first model, last bit width and first seed; the outliers of shipped models."""
    from experiments.figures import image_grid, outlier_figure
    from experiments.statistics import heldout_rows
    from models import load
    from models.registry import preset

    done = [r for r in results if "error" not in r]
    if not done:
        return
    model, seed = done[0]["cell"]["model"], done[0]["seed"]
    quants = [r["cell"]["quant"] for r in done if r["cell"]["quant"]]
    wanted = [r for r in done if r["cell"]["model"] == model and r["seed"] == seed
              and r["cell"]["quant"] in (None, quants[-1] if quants else None)]
    panels, settings = {}, varied(results)
    for r in wanted[:12]:
        name = label(pd.Series({**flat(r["provenance"]["config"]), "method": r["cell"]["method"]}), settings)
        for path in runs.glob(f"*-{r['provenance']['hash']}/samples.npz"):
            panels[name] = np.load(path)["arr_0"].transpose(0, 3, 1, 2)
    if panels:
        image_grid(panels, folder / "samples.png")
    for name in sorted({r["cell"]["model"] for r in done}):
        if preset(name).weights.shipped:
            generator = load(name)
            outlier_figure(generator.adapter, *heldout_rows(generator, 128), folder / f"outliers-{name}.png", name)


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


def calibration(results: list[dict[str, Any]]) -> str:
    """Which selector and scope all quantized rows share, as a sentence; empty where they differ."""
    used = {(r["cell"]["calib"], r["cell"]["scope"]) for r in results if r["cell"]["method"] != "fp"}
    if len(used) != 1:
        return ""
    selector, scope = used.pop()
    return f"All quantized rows: `calib={selector}`, `scope={scope}`. "


def columns_of(name: str) -> list[str] | None:
    """The columns that the file of a table asks for, if it does."""
    path = ROOT / "conf" / "table" / f"{name}.yaml"
    return yaml.safe_load(path.read_text()).get("columns") if path.is_file() else None


def block(name: str) -> str:
    """The generated text of one README block: the table, and where it was measured."""
    results = stored(name)
    if not results:
        return f"No results are committed under `experiments/results/{name}` yet."
    first = results[0]["provenance"]
    sizes = {(r["provenance"]["images"], r["provenance"]["sequences"]) for r in results}
    if len(sizes) > 1:
        raise ConfigError(f"results: {name} mixes evaluations of different sizes, {sorted(sizes)}")
    seeds = sorted({r["seed"] for r in results})
    devices = sorted({r["provenance"]["versions"]["device"] for r in results})
    where = f"{', '.join(devices)}, torch {first['versions']['torch']}"
    table = markdown(results, columns_of(name))
    return (
        f"{table}\n\n{calibration(results)}{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, "
        f"{first['images']:,} images and {first['sequences']:,} held-out sequences per run; {where}. "
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

"""Names of metrics, methods and models in tables, and of their counterparts in the paper."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import yaml

from experiments.store.results import is_shown
from ptq.config.files import group_files

METRIC_HEADINGS = {  # what a table of runs may show: heading and digits of each metric
    "kl": ("KL to FP", 4),
    "nll": ("NLL", 4),
    "fid2fp": ("FID to FP", 3),
    "fid": ("FID", 3),
    "sfid": ("sFID", 3),
    "is": ("IS", 2),
    "precision": ("Prec.", 3),
    "recall": ("Rec.", 3),
    "agreement": ("Agree.", 3),
    # of natural images, by the features of EfficientNet-Lite0 (`evaluate.judges`)
    "lite0_fid2fp": ("FID to FP, Lite0", 2),
    "lite0_fid": ("FID, Lite0", 2),
    "lite0_is": ("IS, Lite0", 2),
    "lite0_top1": ("Top-1, Lite0", 3),
}
COST_HEADINGS = {"calibration_s": ("Calibration [s]", 1), "calibration_peak_mb": ("Peak [MiB]", 0)}
PAPER_MODELS = {  # the preset's name in the paper, and the twin's counterpart there
    "var_d16": "VAR-d16",
    "var_d20": "VAR-d20",
    "var_d24": "VAR-d24",
    "var_d30": "VAR-d30",
    "rar_b": "RAR-B",
    "rar_l": "RAR-L",
    "rar_xl": "RAR-XL",
    "rar_xxl": "RAR-XXL",
    "par_xl_4x": "PAR-XL-4x",
    "par_xxl_4x": "PAR-XXL-4x",
    "par_3b_4x": "PAR-3B-4x",
    "par_3b_16x": "PAR-3B-16x",
    "mar_b": "MAR-B",
    "mar_l": "MAR-L",
    "mar_h": "MAR-H",
    "var_twin": "VAR-d16",
    "rar_twin": "RAR-B",
    "par_twin": "PAR-XL-4x",
    "mar_twin": "MAR-B",
}
# the column of quality.csv for our name of the metric
PAPER_METRICS = {"is": "IS", "fid": "FID", "sfid": "sFID", "precision": "precision"}
# of the methods that ship, in the order of tables; others follow
METHOD_ORDER = (
    "fp",
    "rtn",
    "rtn_minmax",
    "rtn_dynamic",
    "smoothquant",
    "stwq",
    "sq_stwq",
    "gps_only",
    "ptq4arvg",
    "ptq4arvg_released",
    "smoothquant_paper",
    "os_plus",
    "repq",
    "repq_stwq",
    "sq_repq",
    "omniquant",
    "omniquant_paper",
    "quarot",
    "quarot_paper",
    "quarot_stwq",
    "svdquant",
    "svdquant_paper",
    "gptq",
    "gptaq",
    "qronos",
    "ptq4arvg_gptq",
    "litevar",
    "fpqvar",
    "shift_and_sum",
    "staq",
)


def describe_hidden(metrics: Iterable[str], images: int | None) -> str:
    """One sentence on the metrics that so many images are too few for; "" if there are none."""
    hidden = [metric for metric in metrics if not is_shown(metric, images)]
    if not hidden:
        return ""
    return f"{images} images are too few for {', '.join(map(metric_heading, hidden))}, not shown."


def count_noun(number: int, noun: str) -> str:
    """A number of things: `1 cell`, `2 cells`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_seeds(counts: Collection[int]) -> str:
    """How many seeds several results have: `3 seeds`, or `2 to 3 seeds`."""
    least = min(counts)
    most = max(counts)
    return count_noun(most, "seed") if least == most else f"{least} to {most} seeds"


def describe_sizes(found: Iterable[Mapping[str, Any]]) -> str:
    """By what runs were judged: `2,000 images and 1,000 held-out sequences per run`.

    Models are named where their sizes differ. Results of analyses state no images: of these alone
    it is "".
    """
    models_of_sizes: dict[str, dict[str, None]] = {}  # each model once, in the order of the results
    models: dict[str, None] = {}
    for result in found:
        model = result["cell"]["model"]
        models[model] = None
        origin = result["provenance"]
        if not origin.get("images"):
            continue
        size = f"{origin['images']:,} images"
        if origin.get("sequences"):
            size += f" and {origin['sequences']:,} held-out sequences"
        models_of_sizes.setdefault(size, {})[model] = None
    parts = []
    for size, of_size in models_of_sizes.items():
        whose = "" if of_size == models else f" of {', '.join(of_size)}"
        parts.append(f"{size} per run{whose}")
    return ", ".join(parts)


def metric_heading(metric: str) -> str:
    """What a metric is called in tables."""
    return METRIC_HEADINGS.get(metric, (metric, None))[0]


def method_label(name: str) -> str:
    """A method's name in tables, where none gives a row its own: what its file says."""
    path = group_files("method").get(name)
    settings = yaml.safe_load(path.read_text()) if path is not None else {}
    settings = settings.get("method", settings)  # a file that sets other groups, too
    return settings.get("label") or name


def method_place(name: str) -> int:
    """The place of a method in tables."""
    return METHOD_ORDER.index(name) if name in METHOD_ORDER else len(METHOD_ORDER)

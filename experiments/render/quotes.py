"""Single figures inside sentences: what each is, and how it is made of committed results.

A page writes `<!-- quote:NAME -->1.65<!-- end -->` inside of a sentence; `experiments.render` puts
the figure there, and `--check` finds one that is not current. A figure that was not measured is
"not run".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.registry import tables
from experiments.render import official
from experiments.render.sheet import Line, Sheet
from experiments.render.text import images_of, report_of
from experiments.store import results
from ptq.config.files import group_files
from ptq.files import read_sealed
from ptq.spec import require

LoadSheet = Callable[[str], Sheet]  # a table's name to its committed results
Quote = Callable[[LoadSheet], str]
Shares = Mapping[str, tuple[str, str, Sequence[str]]]  # by name: a row, another row, bit widths
UNKNOWN = "not run"
TWINS = ("var_twin", "rar_twin", "par_twin", "mar_twin")
ALL_TWINS = (*TWINS, "rar_twin_plain")  # with the control
CACHED_TWINS = TWINS[:3]  # those with a KV cache
NATURAL = ("rar_natural", "var_natural")


def quote_figure(name: str, load_sheet: LoadSheet) -> str:
    """A figure as it stands in a sentence.

    Raises:
        ConfigError: there is no such figure, or its table is not in the registry.
    """
    require("quote", name, tuple(QUOTES))
    return QUOTES[name](load_sheet)


def format_range(values: Sequence[float | None], form: str, unit: str = "") -> str:
    """The least and the largest of values, or the one that both are; "not run" if one is missing.

    Args:
        form: a format of one number, such as `.2f`.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return UNKNOWN
    least = f"{min(known):{form}}"
    most = f"{max(known):{form}}"
    return f"{least}{unit}" if least == most else f"{least} to {most}{unit}"


# --- tables of runs


def find_line(sheet: Sheet, model: str, row: str, quant: str | None) -> Line | None:
    """The measured line of a row of a table."""
    for line in sheet.done:
        if (line.model, line.row, line.quant) == (model, row, quant):
            return line
    return None


def mean_of_line(
    sheet: Sheet, metric: str, model: str, row: str, quant: str | None
) -> float | None:
    """The mean over seeds of a metric or cost; None if the line was not measured."""
    line = find_line(sheet, model, row, quant)
    values = line.values(metric) if line is not None else []
    return statistics.fmean(values) if values else None


def mean_figure(
    table: str, metric: str, row: str, model: str, quant: str | None, digits: int
) -> Quote:
    """A metric of one row."""

    def quote(load_sheet: LoadSheet) -> str:
        mean = mean_of_line(load_sheet(table), metric, model, row, quant)
        return format_range([mean], f".{digits}f")

    return quote


def share_of_row(
    table: str, metric: str, row: str, other: str, models: Sequence[str], quant: str
) -> Quote:
    """A row's metric as a share of another row's, in per cent; the range over models."""

    def quote(load_sheet: LoadSheet) -> str:
        sheet = load_sheet(table)
        shares: list[float | None] = []
        for model in models:
            own = mean_of_line(sheet, metric, model, row, quant)
            others = mean_of_line(sheet, metric, model, other, quant)
            shares.append(100 * own / others if own is not None and others else None)
        return format_range(shares, ".0f", " %")

    return quote


@dataclass(frozen=True)
class Place:
    """Lines of a table, one of every model.

    Attributes:
        scope: of them, where the table has several.
    """

    table: str
    row: str
    quant: str
    scope: str | None = None

    def mean(self, load_sheet: LoadSheet, model: str, metric: str) -> float | None:
        """The mean over seeds of a metric; None if it was not measured."""
        for line in load_sheet(self.table).done:
            chosen = (line.model, line.row, line.quant, line.point.get("scope"))
            if chosen == (model, self.row, self.quant, self.scope):
                values = line.values(metric)
                return statistics.fmean(values) if values else None
        return None


def share_of_place(
    own: Place, other: Place, models: Sequence[str] = TWINS, metric: str = "kl"
) -> Quote:
    """A metric of lines as a share of other lines', in per cent; the range over models."""

    def quote(load_sheet: LoadSheet) -> str:
        shares: list[float | None] = []
        for model in models:
            mean = own.mean(load_sheet, model, metric)
            others = other.mean(load_sheet, model, metric)
            shares.append(100 * mean / others if mean is not None and others else None)
        return format_range(shares, ".0f", " %")

    return quote


def times_of_place(
    own: Place,
    other: Place,
    models: Sequence[str] = TWINS,
    metric: str = "kl",
    digits: int = 1,
) -> Quote:
    """How many times other lines' metric that of lines is; the range over models."""

    def quote(load_sheet: LoadSheet) -> str:
        ratios: list[float | None] = []
        for model in models:
            mean = own.mean(load_sheet, model, metric)
            others = other.mean(load_sheet, model, metric)
            ratios.append(mean / others if mean is not None and others else None)
        return format_range(ratios, f".{digits}f")

    return quote


# --- reports of `experiments.speed`


def read_entry(
    sheet: Sheet, model: str, variant: str, beside: str | None = None
) -> Mapping[str, Any] | None:
    """The entry of a variant in the report of `what=generate` or `what=blocks` of a model, of its
    largest batch.

    Args:
        beside: another variant that the same report must have.
    """
    needed = {variant} if beside is None else {variant, beside}
    for line in sheet.done:
        if line.model != model:
            continue
        report = report_of(line)
        measured = {entry["variant"] for entry in report["lines"]}
        if needed <= measured:
            entries = [entry for entry in report["lines"] if entry["variant"] == variant]
            return max(entries, key=lambda entry: images_of(entry, report))
    return None


def compare_generation(model: str, variant: str, key: str, form: str, share: bool) -> Quote:
    """A variant beside BF16: as a share of it in per cent, or how many times less it is."""

    def quote(load_sheet: LoadSheet) -> str:
        sheet = load_sheet("generate")
        plain = read_entry(sheet, model, "bf16", beside=variant)
        entry = read_entry(sheet, model, variant)
        if plain is None or entry is None:
            return UNKNOWN
        if share:
            return format_range([100 * entry[key] / plain[key]], form, " %")
        return format_range([plain[key] / entry[key]], form)

    return quote


def compare_former(model: str, variant: str, table: str = "generate") -> Quote:
    """How many times as fast a variant is as BF16 of the revision that it was timed beside."""

    def quote(load_sheet: LoadSheet) -> str:
        entry = read_entry(load_sheet(table), model, variant)
        if entry is None or "speedup" not in entry:
            return UNKNOWN
        return format_range([entry["speedup"]], ".2f")

    return quote


def compare_variants(table: str, own: str, other: str, key: str, models: Sequence[str]) -> Quote:
    """How many times another variant's figure that of a variant is; the range over models. They may
    be of different jobs."""

    def quote(load_sheet: LoadSheet) -> str:
        sheet = load_sheet(table)
        ratios: list[float | None] = []
        for model in models:
            entry = read_entry(sheet, model, own)
            others = read_entry(sheet, model, other)
            measured = entry is not None and others is not None
            ratios.append(entry[key] / others[key] if measured else None)
        return format_range(ratios, ".2f")

    return quote


def share_of_kernels(profile: str, kernel: str) -> Quote:
    """The share of a kernel in the summed time of all kernels of a committed profile."""

    def quote(load_sheet: LoadSheet) -> str:
        (measured,) = read_sealed(results.ROOT / "raw" / f"{profile}.json")["profiles"]
        milliseconds = {entry["kernel"]: entry["ms"] for entry in measured["slowest"]}
        return format_range([100 * milliseconds[kernel] / measured["kernels_ms"]], ".0f") + " %"

    return quote


# --- the registry, and the comparison with the official code


def count_methods(load_sheet: LoadSheet) -> str:
    """How many methods have a file of their own, full precision left out."""
    return str(len(group_files("method")) - 1)


def count_tables(load_sheet: LoadSheet) -> str:
    """How many tables and figures the registry has."""
    return str(len(tables.load_tables()))


def official_times(load_sheet: LoadSheet) -> str:
    """How many times as fast as the official code this one quantizes."""
    ratios: list[float | None] = []
    for entry in official.load_comparison()["models"]:
        seconds = entry["quantizing_s"]
        ratios.append(seconds["official"] / seconds["ours"])
    return format_range(ratios, ".0f")


def official_figure(family: str, metric: str) -> Quote:
    """A figure of ours against that of the official code."""

    def quote(load_sheet: LoadSheet) -> str:
        entry = official.find_model(family)[metric]
        return f"{entry['ours']:g} against {entry['official']:g}"

    return quote


def change_unseen(row: str) -> Quote:
    """By how much KL on sequences that chose nothing differs at most from that on those that did,
    in per cent, over the models and bit widths of `sensitivity`."""

    def quote(load_sheet: LoadSheet) -> str:
        changes = []
        for line in load_sheet("sensitivity").done:
            if line.row == row:
                seen = line.values("kl_seen")[0]
                unseen = line.values("kl_unseen")[0]
                changes.append(100 * abs(unseen / seen - 1))
        return format_range([max(changes)] if changes else [], ".1f", " %")

    return quote


GROUPS = Place("w4a4", "RTN", "w4a4_g128")
WEIGHTS_GPTQ = Place("weight_only", "GPTQ", "w4a16")
BY_FORMAT: dict[str, Quote] = {
    "w4a4-svdquant": share_of_place(
        Place("w4a4", "SVDQuant", "w4a4_g64"), Place("w4a4", "STAQ", "w4a4_g128")
    ),
    "w4a4-staq": share_of_place(Place("w4a4", "STAQ", "w4a4_g128"), GROUPS),
    "w4a4-nvfp4": share_of_place(Place("w4a4", "RTN", "nvfp4"), GROUPS),
    "w4a4-mxfp4": share_of_place(Place("w4a4", "RTN", "mxfp4"), GROUPS),
    "weights-gptq": share_of_place(WEIGHTS_GPTQ, Place("weight_only", "RTN", "w4a16")),
    "weights-gptaq": share_of_place(Place("weight_only", "GPTAQ", "w4a16"), WEIGHTS_GPTQ),
    "weights-qronos": share_of_place(Place("weight_only", "Qronos", "w4a16"), WEIGHTS_GPTQ),
    "weights-qronos-w3": share_of_place(
        Place("weight_only", "Qronos", "w3a16"), Place("weight_only", "GPTQ", "w3a16")
    ),
    "kv-three-bits": times_of_place(
        Place("kv", "RTN", "kv3"), Place("kv", "RTN", "kv4"), CACHED_TWINS
    ),
    "kv-two-bits": times_of_place(
        Place("kv", "RTN", "kv2"), Place("kv", "RTN", "kv3"), CACHED_TWINS
    ),
    "fp8-times": times_of_place(
        Place("fp8", "RTN dynamic", "fp8"), Place("methods", "RTN dynamic", "w8a8")
    ),
    "rivals-scope": share_of_place(
        Place("rivals", "PTQ4ARVG", "w6a6", "blocks"),
        Place("rivals", "PTQ4ARVG", "w6a6", "paper"),
        ["var_twin"],
    ),
    "rivals-fpqvar": share_of_place(
        Place("rivals", "FPQVAR (FP4)", "w4a4_g128", "blocks"),
        Place("rivals", "RTN dynamic", "w4a4_g128", "blocks"),
        ["var_twin"],
    ),
    "rivals-shift": share_of_place(
        Place("rivals", "Shift-and-Sum", "w6a6", "paper"),
        Place("rivals", "RTN dynamic", "w6a6", "paper"),
        ["var_twin"],
    ),
}
WIDTHS = ("w8a8", "w6a6", "w4a8")  # of the table `methods`
# on the models of natural images: a row's KL as a share of another row's, at these widths
NATURAL_SHARES: Shares = {
    "staq": ("STAQ", "PTQ4ARVG", WIDTHS),
    "gptq": ("STAQ", "RTN + GPTQ", ("w4a8",)),
    "gps": ("PTQ4ARVG", "SmoothQuant + STWQ", WIDTHS),
    "rtn": ("PTQ4ARVG", "RTN", ("w4a8",)),
    "stwq": ("SmoothQuant + STWQ", "SmoothQuant", WIDTHS),
    "dynamic": ("RTN dynamic", "STAQ", ("w4a8",)),
    "quarot": ("QuaRot (paper)", "STAQ", ("w4a8",)),
    "omniquant": ("OmniQuant", "STAQ", ("w8a8", "w6a6")),
    "svdquant": ("SVDQuant", "STAQ", ("w8a8", "w6a6")),
    "repq": ("RepQ*", "PTQ4ARVG", WIDTHS),
}
# the same of each model by itself, where a sentence tells them apart
SHARES_BY_MODEL: Shares = {
    "dynamic": ("RTN dynamic", "STAQ", ("w8a8", "w6a6")),
    "quarot": ("QuaRot (paper)", "STAQ", ("w8a8", "w6a6")),
    "svdquant": ("SVDQuant", "STAQ", ("w4a8",)),
    "released": ("PTQ4ARVG as released", "PTQ4ARVG", WIDTHS),
}
# of `components`, at W6A6: KL with these parts as a share of that of SmoothQuant without them
NATURAL_PARTS = {
    "gps-alone": "+GPS",
    "stwq-alone": "+STWQ",
    "both": "+GPS+STWQ",
    "dgc": "+DGC",
    "parts": "+GPS+STWQ+DGC",
}
# FID by Lite0 of a model and row, in full precision or at a width
NATURAL_FIDS = {
    "var-natural-fid-fp": ("var_natural", "FP32", None),
    "var-natural-fid-ptq4arvg-w8a8": ("var_natural", "PTQ4ARVG", "w8a8"),
    "var-natural-fid-staq-w8a8": ("var_natural", "STAQ", "w8a8"),
    "var-natural-fid-ptq4arvg-w6a6": ("var_natural", "PTQ4ARVG", "w6a6"),
    "var-natural-fid-staq-w6a6": ("var_natural", "STAQ", "w6a6"),
    "var-natural-fid-quarot-w4a8": ("var_natural", "QuaRot", "w4a8"),
    "var-natural-fid-staq-w4a8": ("var_natural", "STAQ", "w4a8"),
    "rar-natural-fid-fp": ("rar_natural", "FP32", None),
    "rar-natural-fid-rtn-w6a6": ("rar_natural", "RTN", "w6a6"),
    "rar-natural-fid-ptq4arvg-w6a6": ("rar_natural", "PTQ4ARVG", "w6a6"),
}


def natural_figures() -> dict[str, Quote]:
    """The figures of models of natural images: `natural-staq-w6a6` is a range over both,
    `var-natural-quarot-w6a6` is of one."""
    figures = name_shares("natural", NATURAL, NATURAL_SHARES)
    for model in NATURAL:
        figures |= name_shares(model.replace("_", "-"), [model], SHARES_BY_MODEL)
    for name, row in NATURAL_PARTS.items():
        figures[f"natural-{name}"] = share_of_row(
            "components-natural", "kl", row, "SmoothQuant", NATURAL, "w6a6"
        )
    for name, (model, row, quant) in NATURAL_FIDS.items():
        figures[name] = mean_figure("methods-natural", "lite0_fid", row, model, quant, digits=1)
    return figures


def name_shares(prefix: str, models: Sequence[str], shares: Shares) -> dict[str, Quote]:
    """Shares of KL on models, named by a prefix, their own name and the width."""
    named: dict[str, Quote] = {}
    for name, (row, other, widths) in shares.items():
        for quant in widths:
            named[f"{prefix}-{name}-{quant}"] = share_of_row(
                "methods-natural", "kl", row, other, models, quant
            )
    return named


QUOTES: dict[str, Quote] = {
    "methods": count_methods,
    "tables": count_tables,
    "official-times": official_times,
    "official-rar-kl": official_figure("RAR", "kl"),
    "official-var-kl": official_figure("VAR", "kl"),
    "staq-share": share_of_row(
        "methods", "kl", row="STAQ", other="PTQ4ARVG", models=TWINS, quant="w6a6"
    ),
    "staq-share-w4a8": share_of_row(
        "methods", "kl", row="STAQ", other="PTQ4ARVG", models=TWINS, quant="w4a8"
    ),
    "staq-share-control": share_of_row(
        "main", "kl", row="STAQ", other="PTQ4ARVG", models=["rar_twin_plain"], quant="w6a6"
    ),
    "staq-share-w4a4": share_of_row(
        "staq", "kl", row="STAQ", other="PTQ4ARVG", models=ALL_TWINS, quant="w4a4"
    ),
    "staq-unseen": change_unseen("STAQ"),
    "staq-mar": times_of_place(
        Place("methods", "STAQ", "w6a6"), Place("methods", "QuaRot", "w6a6"), ["mar_twin"], digits=2
    ),
    "omniquant-share": share_of_row(
        "methods", "kl", row="OmniQuant", other="STAQ", models=TWINS, quant="w6a6"
    ),
    "sequential-share": share_of_row(
        "staq_components", "kl", "STAQ", other="not sequential", models=ALL_TWINS, quant="w6a6"
    ),
    "blocks-of-8-share": share_of_row(
        "staq", "kl", row="STAQ + blocks of 8", other="STAQ", models=["par_twin"], quant="w6a6"
    ),
    "svdquant-share": share_of_row(
        "methods", "kl", row="SVDQuant", other="STAQ", models=TWINS, quant="w6a6"
    ),
    "svdquant-bytes": share_of_row(
        "methods", "model_bytes", row="SVDQuant", other="STAQ", models=TWINS, quant="w6a6"
    ),
    "quarot-share": share_of_row(
        "methods", "kl", row="QuaRot", other="STAQ", models=TWINS, quant="w6a6"
    ),
    "released-var-w8a8": mean_figure(
        "methods", "kl", "PTQ4ARVG as released", "var_twin", quant="w8a8", digits=4
    ),
    "masked-var-w8a8": mean_figure("methods", "kl", "PTQ4ARVG", "var_twin", "w8a8", digits=4),
    "released-var-w6a6": mean_figure(
        "methods", "kl", "PTQ4ARVG as released", "var_twin", quant="w6a6", digits=4
    ),
    "masked-var-w6a6": mean_figure("methods", "kl", "PTQ4ARVG", "var_twin", "w6a6", digits=4),
    "released-rar-w6a6": mean_figure(
        "methods", "kl", "PTQ4ARVG as released", "rar_twin", quant="w6a6", digits=4
    ),
    "int8-times": compare_generation(
        "rar_b", "int8_stwq_paper", "seconds", form=".2f", share=False
    ),
    "int8-memory": compare_generation("rar_b", "int8_stwq_paper", "peak_mb", ".0f", share=True),
    "int8-bf16-attention-times": compare_generation(
        "rar_b", "int8_stwq", "seconds", form=".2f", share=False
    ),
    "int8-var-times": compare_generation("var_d16", "int8_stwq", "seconds", ".2f", share=False),
    "int8-former-times": compare_former("rar_b", "int8_stwq_paper"),
    "int8-former-xxl-times": compare_former("rar_xxl", "int8_stwq_paper"),
    "int8-former-xl-times": compare_former("rar_xl", "int8_stwq_paper"),
    "int8-xl-products": share_of_kernels("profile-rar_xl-h200", "_product_kernel"),
    "int8-xl-attention": share_of_kernels("profile-rar_xl-h200", "attend_codes"),
    "int8-xl-norms": share_of_kernels("profile-rar_xl-h200", "_norm_kernel"),
    "int8-former-var-d30-times": compare_former("var_d30", "int8_stwq"),
    "int8-former-var-times": compare_former("var_d16", "int8_stwq"),
    "int8-var-memory": compare_generation("var_d16", "int8_stwq", "peak_mb", ".0f", share=True),
    "int8-var-paper-memory": compare_generation(
        "var_d16", "int8_stwq_paper", "peak_mb", ".0f", share=True
    ),
    "int8-var-paper-times": compare_generation(
        "var_d16", "int8_stwq_paper", "seconds", ".2f", share=False
    ),
    "int8-par-times": compare_generation("par_xl_4x", "int8_stwq", "seconds", ".2f", share=False),
    "int8-staq-times": compare_variants(
        "generate", "int8_staq_paper", "int8_stwq_paper", "seconds", ["rar_b"]
    ),
    "int8-blocks-staq": compare_variants(
        "blocks", "int8_staq", "int8_stwq", "median_ms", ["rar_l", "var_d20", "var_d16"]
    ),
    "int8-blocks-var-d20": compare_former("var_d20", "int8_stwq", "blocks"),
    "int8-blocks-var-d16": compare_former("var_d16", "int8_stwq", "blocks"),
    "int8-blocks-rar": compare_former("rar_l", "int8_stwq_all", "blocks"),
    "int8-blocks-rar-float": compare_former("rar_l", "int8_stwq", "blocks"),
    **natural_figures(),
    **BY_FORMAT,
}

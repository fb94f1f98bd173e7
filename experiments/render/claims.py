"""The paper's statements, and what the committed results say to them.

    python -m experiments.render.claims

Rules, the same for all:

- A beats B at one place (a model, a bit width, ...) if the mean over seeds of the metric (KL from
  full precision, unless said) is lower by more than `SPREADS` standard deviations of the difference
  and by more than `LEAST` of B; is beaten if the other way round; else both are even. Standard
  deviations are over seeds: a single seed compares nothing.
- A number holds at one place if its mean is on the right side of a threshold that the statement
  names, and is even with it where that is within `SPREADS` standard deviations; one that was
  measured once, and a time with its interval, holds or does not.
- A statement is reproduced if all its places agree, partly if some do, refuted if none does, and
  not run if there are no results for it. `rar_twin_plain`, without planted outliers and sink
  tokens, is the control: it is reported, and decides nothing. What the planted statistics imply is
  marked as so by construction.
- Models of natural images, in which nothing is planted, are judged by the same rules, apart from
  the twins. Where their verdict is another one, theirs counts. "Single seeds" of them compare
  nothing, and of some statements' tables they are "not asked".
"""

from __future__ import annotations

import operator
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.options import answer_help, refuse_unknown
from experiments.registry.labels import METRIC_HEADINGS
from experiments.registry.tables import find_table
from experiments.render.formats import format_row
from experiments.render.numbers import format_values
from experiments.store.results import table_label
from ptq.errors import user_errors

Result = Mapping[str, Any]
Load = Callable[[str], list[dict[str, Any]]]  # the results of a table
SPREADS = 2.0
LEAST = 0.01
CONTROL = "rar_twin_plain"
NATURAL = "natural"  # scale of the models in which nothing is planted
NATURAL_HEADS = ["Natural images, nothing planted", "Figures there"]
NEAR = 0.05  # of FID: what counts as near-lossless
FREE = 1.02  # of the time per tensor: what counts as free
SIGNS = {True: "+", False: "–", None: "="}  # what a finding says to the statement
SHOWN = 4  # figures of a claim that a table shows, against it first; the rest is counted
NOT_RUN = "not run"
SINGLE_SEEDS = "single seeds"
NOT_ASKED = "not asked"  # the registry has no such models for the statement's tables


@dataclass(frozen=True)
class Finding:
    """What one place says: `agrees` is True, False, or None (even); `text` has the figures."""

    agrees: bool | None
    text: str
    control: bool = False

    @property
    def marked(self) -> str:
        """The figures, with a sign for what they say."""
        return f"{SIGNS[self.agrees]} {self.text}"


@dataclass(frozen=True)
class Claim:
    """A statement with its verdict, a line of figures per place, and those of the control.

    Attributes:
        natural: figures of the models of natural images, which have a verdict of their own.
    """

    name: str
    statement: str
    verdict: str
    figures: list[str]
    by_construction: bool
    control: list[str] = field(default_factory=list)
    natural: list[str] = field(default_factory=list)
    verdict_there: str = NOT_RUN

    @property
    def natural_verdict(self) -> str:
        """The verdict of natural images, and whether it is another one than the twins'."""
        is_judged = bool(self.natural) and self.verdict != NOT_RUN
        if is_judged and self.verdict_there != self.verdict:
            return f"{self.verdict_there}, unlike the twins: this counts"
        return self.verdict_there

    @property
    def marked_verdict(self) -> str:
        """The verdict, and whether what the twins were trained for implies it."""
        implied = self.by_construction and self.verdict != NOT_RUN
        return f"{self.verdict}, by construction" if implied else self.verdict


Findings = Callable[[Load], Iterator[Finding]]


@dataclass(frozen=True)
class Statement:
    """A statement of the paper and the findings that decide it."""

    text: str
    findings: Findings
    by_construction: bool = False


# --- reading results


def seeds_of(table_results: Sequence[Result], row: str, point: Mapping[str, Any]) -> list[Result]:
    """The results of a row at a point, one per seed."""
    seeds = []
    for result in table_results:
        place = result["table"]
        if place["row"] == row and place["point"] == point:
            seeds.append(result)
    return seeds


def points_of(table_results: Sequence[Result], row: str) -> list[dict[str, Any]]:
    """The points at which a row was run, in the order of the results."""
    points = []  # a list: dicts have no hash
    for result in table_results:
        point = result["table"]["point"]
        if result["table"]["row"] == row and point not in points:
            points.append(point)
    return points


def metric_values(table_results: Sequence[Result], metric: str) -> list[float]:
    """A metric of the results that have it."""
    values = []
    for result in table_results:
        value = result["metrics"].get(metric)
        if value is not None:
            values.append(value)
    return values


def judging_fid(table_results: Sequence[Result]) -> str:
    """The FID that results have: models of natural images have one by Lite0's features."""
    return "fid" if metric_values(table_results, "fid") else "lite0_fid"


def describe_point(point: Mapping[str, Any]) -> str:
    """A point in words: `rar_twin W6A6 calib.n=8`."""
    words = [point["model"]]
    if "quant" in point:
        words.append(str(point["quant"]).upper())
    for key, value in point.items():
        if key not in ("model", "quant"):
            words.append(f"{key}={value}")
    return " ".join(words)


# --- rules


def compare_means(ours: Sequence[float], theirs: Sequence[float]) -> bool | None:
    """Whether ours has the lower mean by the rule of this module; None where they are even."""
    spread = joint_deviation(ours, theirs)
    difference = statistics.mean(theirs) - statistics.mean(ours)
    if abs(difference) <= max(SPREADS * spread, LEAST * abs(statistics.mean(theirs))):
        return None
    return difference > 0


def joint_deviation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The standard deviation of a difference."""
    # of single seeds, not of means: stricter than a standard error
    return (statistics.variance(ours) + statistics.variance(theirs)) ** 0.5


def judge_findings(findings: Sequence[Finding]) -> str:
    """The verdict of findings, those of the control left out."""
    agree = [finding.agrees is True for finding in findings if not finding.control]
    if not agree:
        return NOT_RUN
    if all(agree):
        return "reproduced"
    return "partly" if any(agree) else "refuted"


def compare_rows(
    table_results: Sequence[Result],
    row: str,
    point: Mapping[str, Any],
    other_row: str,
    other_point: Mapping[str, Any],
) -> Finding | None:
    """A row at one point against another at its point; None unless both have two seeds."""
    ours = metric_values(seeds_of(table_results, row, point), "kl")
    theirs = metric_values(seeds_of(table_results, other_row, other_point), "kl")
    if min(len(ours), len(theirs)) < 2:  # one seed has no deviation
        return None
    agrees = compare_means(ours, theirs)
    word = {True: "better", False: "worse", None: "even"}[agrees]
    names = f"{row}, {other_row}"
    if point != other_point:
        names = f"{row} {point['calib']}, {other_row} {other_point['calib']}"
    common = {}
    for key, value in point.items():
        if other_point.get(key) == value:
            common[key] = value
    figures = f"KL {format_values(ours, 4)} against {format_values(theirs, 4)}"
    text = f"{describe_point(common)}: {figures} ({names}): {word}"
    return Finding(agrees, text, point["model"] == CONTROL)


def compare_pairs(
    rows: Sequence[tuple[str, str]], *tables: str, but: Sequence[Mapping[str, Any]] = ()
) -> Findings:
    """Findings of rows against others, where a table has both; points in `but` are left out."""

    def findings(load: Load) -> Iterator[Finding]:
        for table_results in map(load, tables):
            for row, other_row in rows:
                for point in points_of(table_results, row):
                    finding = compare_rows(table_results, row, point, other_row, point)
                    if finding is not None and point not in but:
                        yield finding

    return findings


def join_findings(*parts: Findings) -> Findings:
    """The findings of all parts."""

    def findings(load: Load) -> Iterator[Finding]:
        for part in parts:
            yield from part(load)

    return findings


def compare_selectors(load: Load) -> Iterator[Finding]:
    """DGC against random rows at every calibration size."""
    table_results = load("calibration")
    for point in points_of(table_results, "PTQ4ARVG"):
        if point["calib"] != "dgc":
            continue
        random_point = {**point, "calib": "random"}
        finding = compare_rows(table_results, "PTQ4ARVG", point, "PTQ4ARVG", random_point)
        if finding is not None:
            yield finding


def compare_thresholds(
    table: str, thresholds: Mapping[str, float], right: Callable[[float, float], bool], sign: str
) -> Findings:
    """Findings of an analysis: metrics whose names end in a key of `thresholds`, against these."""

    def findings(load: Load) -> Iterator[Finding]:
        for model, results_of_model in group_by_model(load(table)).items():
            for name in results_of_model[0]["metrics"]:
                values = metric_values(results_of_model, name)
                for ending, threshold in thresholds.items():
                    # whole parts of a name: `share` must not stand for `position_share`
                    if not f".{name}".endswith(f".{ending}"):
                        continue
                    agrees = compare_threshold(values, threshold, right)
                    mean = statistics.mean(values)
                    text = f"{model} {name}: {mean:.3f} ({sign} {threshold:g})"
                    yield Finding(agrees, text, model == CONTROL)

    return findings


def group_by_model(table_results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of every model, in the order of the results."""
    groups: dict[str, list[Result]] = {}
    for result in table_results:
        model = result["table"]["point"]["model"]
        groups.setdefault(model, []).append(result)
    return groups


def compare_threshold(
    values: Sequence[float], threshold: float, right: Callable[[float, float], bool]
) -> bool | None:
    """Whether the mean of values is on the right side of a threshold; None if even with it."""
    mean = statistics.mean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    if abs(mean - threshold) < SPREADS * spread:
        return None
    return right(mean, threshold)


def at_most(table: str, thresholds: Mapping[str, float]) -> Findings:
    """Findings of metrics that should not be above their thresholds."""
    return compare_thresholds(table, thresholds, operator.le, "at most")


def at_least(table: str, thresholds: Mapping[str, float]) -> Findings:
    """Findings of metrics that should not be below their thresholds."""
    return compare_thresholds(table, thresholds, operator.ge, "at least")


def near_lossless(load: Load) -> Iterator[Finding]:
    """FID of PTQ4ARVG at W8A8 above full precision by at most `NEAR` of it, or by the spread."""
    judged = []  # points
    # the paper's tables; `methods` has the models of natural images, and these of the twins again
    for table in ("var", "rar", "par", "mar", "methods"):
        table_results = load(table)
        for point in points_of(table_results, "PTQ4ARVG"):
            if point["quant"] != "w8a8" or point in judged:
                continue
            finding = compare_fid(table_results, point)
            if finding is not None:
                judged.append(point)
                yield finding


def compare_fid(table_results: Sequence[Result], point: Mapping[str, Any]) -> Finding | None:
    """FID of PTQ4ARVG at a point beside full precision; None where a single seed says nothing."""
    # no value of the grid changes full precision
    unquantized = seeds_of(table_results, "FP32", {"model": point["model"]})
    fid = judging_fid(unquantized)
    ours = metric_values(seeds_of(table_results, "PTQ4ARVG", point), fid)
    full = metric_values(unquantized, fid)
    if min(len(ours), len(full)) < 2:
        return None
    limit = max(NEAR * statistics.mean(full), SPREADS * joint_deviation(ours, full))
    agrees = statistics.mean(ours) - statistics.mean(full) <= limit
    heading, digits = METRIC_HEADINGS[fid]
    figures = f"{heading} {format_values(ours, digits)}"
    figures += f", full precision {format_values(full, digits)}"
    # decides nothing: the paper says it of W8A8, and W6A6 shows how much is left
    six_bits = seeds_of(table_results, "PTQ4ARVG", {**point, "quant": "w6a6"})
    lower = metric_values(six_bits, fid)
    if len(lower) > 1:
        figures += f", W6A6 {format_values(lower, digits)}"
    return Finding(agrees, f"{describe_point(point)}: {figures}", point["model"] == CONTROL)


def layer_errors(
    ours: str, theirs: str, decide: Callable[[float, float], bool], word: str
) -> Findings:
    """Findings of Figure 10: mean |output error| of the first qkv and fc1 under two scalings."""

    def findings(load: Load) -> Iterator[Finding]:
        table_results = load("cross_terms")
        for point in points_of(table_results, "GPS"):
            here = seeds_of(table_results, "GPS", point)
            for kind in ("qkv", "fc1"):
                our_error = statistics.mean(metric_values(here, f"{kind}.{ours}"))
                their_error = statistics.mean(metric_values(here, f"{kind}.{theirs}"))
                figures = f"{ours} {our_error:.4f}, {theirs} {their_error:.4f}"
                text = f"{describe_point(point)} {kind}: {figures} ({word})"
                agrees = decide(our_error, their_error)
                yield Finding(agrees, text, point["model"] == CONTROL)

    return findings


def static_is_free(load: Load) -> Iterator[Finding]:
    """The time of INT8 with static token-wise parameters over that with one per tensor."""
    for result in load("speed"):
        report = result["detail"]
        for ratio in report.get("ratios", ()):
            if (ratio["of"], ratio["to"]) != ("int8_stwq", "int8"):
                continue
            low, high = ratio["interval"]  # 95 %, over rounds
            agrees = None  # the limit is inside the interval
            if high <= FREE:
                agrees = True
            elif low > FREE:
                agrees = False
            place = f"{report['model']} L={ratio['length']}"
            figures = f"{ratio['ratio']:.3f} of the time per tensor ({low:.3f} to {high:.3f})"
            yield Finding(agrees, f"{place}: {figures}")


# --- the paper's statements

COMPONENTS = ("components", "components_others")
SCALINGS = ("SmoothQuant", "OS+", "RepQ*")


def close_to(ours: float, theirs: float) -> bool:
    """Whether an error is within 5 % of another."""
    return abs(ours - theirs) <= 0.05 * theirs


def clearly_less(ours: float, theirs: float) -> bool:
    """Whether an error is below another by more than `LEAST` of it."""
    return ours < (1 - LEAST) * theirs


STATEMENTS = {
    "gps_beats_scalings": Statement(
        "As scaling, GPS beats SmoothQuant, OS+ and RepQ* (STWQ and DGC kept)",
        join_findings(
            compare_pairs([("GPS", row) for row in SCALINGS], "scaling"),
            compare_pairs(
                [("PTQ4ARVG", "SmoothQuant + STWQ"), ("PTQ4ARVG", "RepQ* + STWQ")],
                "methods",
                but=[{"model": "rar_twin", "quant": "w6a6"}],
            ),  # which `scaling` has
        ),
    ),
    "stwq_beats_static": Statement(
        "Static token-wise parameters beat one per tensor",
        compare_pairs([("SmoothQuant+STWQ", "SmoothQuant per-tensor")], "granularity"),
        by_construction=True,
    ),
    "stwq_beats_dynamic": Statement(
        "Static token-wise parameters beat dynamic ones of min-max range",
        compare_pairs([("SmoothQuant+STWQ", "SmoothQuant dynamic token-wise")], "granularity"),
    ),
    "stwq_is_free": Statement(
        "STWQ is free at run time (at most 2 % more than per tensor)", static_is_free
    ),
    "dgc_beats_random": Statement(
        "Calibration rows of DGC beat random ones, at every size", compare_selectors
    ),
    "gps_adds": Statement(
        "GPS adds to every combination of the other components",
        compare_pairs(
            [
                ("+GPS", "SmoothQuant"),
                ("+GPS+STWQ", "+STWQ"),
                ("+GPS+DGC", "+DGC"),
                ("+GPS+STWQ+DGC", "+STWQ+DGC"),
            ],
            *COMPONENTS,
        ),
    ),
    "stwq_adds": Statement(
        "STWQ adds to every combination of the other components",
        compare_pairs(
            [
                ("+STWQ", "SmoothQuant"),
                ("+GPS+STWQ", "+GPS"),
                ("+STWQ+DGC", "+DGC"),
                ("+GPS+STWQ+DGC", "+GPS+DGC"),
            ],
            *COMPONENTS,
        ),
        by_construction=True,
    ),
    "dgc_adds": Statement(
        "DGC adds to every combination of the other components",
        compare_pairs(
            [
                ("+DGC", "SmoothQuant"),
                ("+GPS+DGC", "+GPS"),
                ("+STWQ+DGC", "+STWQ"),
                ("+GPS+STWQ+DGC", "+GPS+STWQ"),
            ],
            *COMPONENTS,
        ),
    ),
    "near_lossless": Statement(
        "PTQ4ARVG is near-lossless at W8A8 (FID within 5 % or the spread)", near_lossless
    ),
    "position_invariant": Statement(
        "Ranges at a position hardly depend on the class: they vary by at most 10 %, "
        "and position explains most",
        join_findings(
            at_most("invariance", {"class_spread": 0.10}),
            at_least("invariance", {"position_share": 0.5}),
        ),
        by_construction=True,
    ),
    "sums_hold": Statement(
        "Errors are sums over channels: cross terms change them by at most 10 %",
        at_most("approximation", {"error_w.bias": 0.10, "error_x.bias": 0.10}),
    ),
    "cross_terms_change_little": Statement(
        "With its cross terms GPS leaves nearly the same output error in a layer (within 5 %)",
        layer_errors("gps_cross", "gps", close_to, "within 5 %"),
    ),
    "gps_lowers_layer_error": Statement(
        "GPS leaves less output error in a layer than SmoothQuant",
        layer_errors("gps", "smoothquant", clearly_less, "less"),
    ),
    "approximations_hold": Statement(
        "After scaling, rounding errors follow Eq. 10 within 16 % (15.1 % at worst in the paper)",
        at_most("approximation", {"delta_x.bias": 0.16, "delta_w.bias": 0.16}),
    ),
    "order_is_kept": Statement(
        "Wider channels get larger scales (98 % of pairs) and stay wider (99.5 %)",
        at_least("ordering", {"scale_order": 0.98, "range_order": 0.995}),
    ),
    "rows_follow_scale": Statement(
        "Of the output rows of a weight 99 % get a range within 5 % of s_k times theirs",
        at_least("ordering", {"rows_close": 0.99}),
    ),
    "gps_is_best_nearby": Statement(
        "Scales perturbed by up to 30 % are worse than those of GPS (95 % of trials)",
        at_least("perturbation", {"share_worse": 0.95}),
    ),
}


def load_placed(name: str, scale: str = "twin") -> list[dict[str, Any]]:
    """The committed results of a table that count and know their place in it."""
    # with PyTorch, which help and refusals do without
    from experiments.identity.results import committed_results

    committed, _ = committed_results(table_label(name, scale))
    return [result for result in committed if "table" in result]


def load_natural(name: str) -> list[dict[str, Any]]:
    """The committed results of a table on the models of natural images."""
    return load_placed(name, NATURAL)


def evaluate_claims(load: Load = load_placed, natural: Load = load_natural) -> list[Claim]:
    """All statements with their verdicts."""
    return [evaluate_statement(name, load, natural) for name in STATEMENTS]


class NaturalTables:
    """Results of tables on the models of natural images, and why a statement finds nothing there.

    Called with a table's name, as a `Load`.
    """

    def __init__(self, load: Load) -> None:
        self.load = load
        self.results: dict[str, list[dict[str, Any]]] = {}  # by the tables that were asked for

    def __call__(self, table: str) -> list[dict[str, Any]]:
        self.results[table] = self.load(table)
        return self.results[table]

    def why_nothing(self) -> str:
        """The verdict on a statement that has no finding."""
        if any(self.results.values()):
            return SINGLE_SEEDS
        is_asked = any(NATURAL in find_table(table).models for table in self.results)
        return NOT_RUN if is_asked else NOT_ASKED


def sort_findings(findings: Iterator[Finding]) -> list[Finding]:
    """Findings, those that speak against the statement first."""
    return sorted(findings, key=lambda finding: (False, None, True).index(finding.agrees))


def evaluate_statement(name: str, load: Load, natural: Load) -> Claim:
    """A statement with its verdict and figures."""
    statement = STATEMENTS[name]
    findings = sort_findings(statement.findings(load))
    tables_there = NaturalTables(natural)
    findings_there = sort_findings(statement.findings(tables_there))
    verdict_there = judge_findings(findings_there)
    if not findings_there:
        verdict_there = tables_there.why_nothing()
    figures = []
    control = []
    for finding in findings:
        (control if finding.control else figures).append(finding.marked)
    return Claim(
        name=name,
        statement=statement.text,
        verdict=judge_findings(findings),
        figures=figures,
        by_construction=statement.by_construction,
        control=control,
        natural=[finding.marked for finding in findings_there],
        verdict_there=verdict_there,
    )


def shorten_figures(figures: Sequence[str]) -> str:
    """The figures of a claim in a table's cell, after how many of several agree."""
    lines = list(figures[:SHOWN])
    if len(figures) > 1:
        agreeing = sum(text.startswith(SIGNS[True]) for text in figures)
        lines.insert(0, f"{agreeing} of {len(figures)} agree")
    if len(figures) > SHOWN:
        lines.append(f"and {len(figures) - SHOWN} more")
    return "<br>".join(lines)


def format_claims(load: Load = load_placed, natural: Load = load_natural) -> str:
    """The claims as a table; natural images have columns once there are results of them."""
    evaluated = evaluate_claims(load, natural)
    with_natural = any(claim.natural for claim in evaluated)
    heads = ["The paper says", "The twins", "Figures", "Control (`rar_twin_plain`)"]
    if with_natural:
        heads += NATURAL_HEADS
    rows = [heads, ["---"] * len(heads)]
    for claim in evaluated:
        figures = shorten_figures(claim.figures)
        control = shorten_figures(claim.control)
        row = [claim.statement, claim.marked_verdict, figures, control]
        if with_natural:
            row += [claim.natural_verdict, shorten_figures(claim.natural)]
        rows.append(row)
    return "\n".join(map(format_row, rows))


def print_claims() -> None:
    """Print all claims with their figures."""
    for claim in evaluate_claims():
        remark = " (by construction)" if claim.by_construction else ""
        print(f"{claim.verdict:11} {claim.statement}{remark}")
        for figure in claim.figures:
            print(f"              {figure}")
        for figure in claim.control:
            print(f"    control   {figure}")
        for figure in claim.natural:
            print(f"    natural   {figure}")


def main() -> None:
    with user_errors():
        answer_help(__doc__, {})
        refuse_unknown(sys.argv[1:], [])
        print_claims()


if __name__ == "__main__":
    main()

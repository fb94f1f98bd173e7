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
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.store import results

Result = Mapping[str, Any]
Load = Callable[[str], list[dict[str, Any]]]  # the results of a table
SPREADS = 2.0
LEAST = 0.01
CONTROL = "rar_twin_plain"
SHOWN = 4  # figures of a claim that a table shows, against it first; the rest is counted


@dataclass(frozen=True)
class Finding:
    """What one place says: `agrees` is True, False, or None (even); `text` has the figures."""

    agrees: bool | None
    text: str
    control: bool = False

    @property
    def marked(self) -> str:
        """The figures, with a sign for what they say."""
        return f"{'+' if self.agrees else '–' if self.agrees is False else '='} {self.text}"


@dataclass(frozen=True)
class Claim:
    """A statement with its verdict, a line of figures per place, and those of the control."""

    name: str
    statement: str
    verdict: str
    figures: list[str]
    by_construction: bool
    control: list[str] = field(default_factory=list)

    @property
    def marked_verdict(self) -> str:
        """The verdict, and whether what the twins were trained for implies it."""
        return self.verdict + (
            ", by construction" if self.by_construction and self.verdict != "not run" else ""
        )


@dataclass(frozen=True)
class Statement:
    """A statement of the paper and the findings that decide it."""

    text: str
    findings: Callable[[Load], Iterator[Finding]]
    by_construction: bool = False


# --- reading results


def seeds_of(found: Sequence[Result], row: str, point: Mapping[str, Any]) -> list[Result]:
    """The results of a row at a point, one per seed."""
    return [r for r in found if r["table"]["row"] == row and r["table"]["point"] == point]


def points(found: Sequence[Result], row: str) -> list[dict[str, Any]]:
    """The points at which a row was run, in the order of the results."""
    seen: dict[str, dict[str, Any]] = {}
    for r in found:
        if r["table"]["row"] == row:
            seen.setdefault(str(r["table"]["point"]), r["table"]["point"])
    return list(seen.values())


def values(found: Sequence[Result], metric: str) -> list[float]:
    return [r["metrics"][metric] for r in found if r["metrics"].get(metric) is not None]


def place(point: Mapping[str, Any]) -> str:
    """A point in words: `rar_twin W6A6 calib.n=8`."""
    quant = str(point.get("quant", "")).upper()
    rest = [f"{k}={v}" for k, v in point.items() if k not in ("model", "quant")]
    return " ".join(part for part in (point["model"], quant, *rest) if part)


def shown(numbers: Sequence[float]) -> str:
    """Mean ± standard deviation, as in tables."""
    from experiments.render.numbers import format_values  # which shows claims, too

    return format_values(numbers, 4)


# --- rules


def beats(a: Sequence[float], b: Sequence[float]) -> bool | None:
    """Whether a has the lower mean by the rule of this module; None where they are even."""
    spread = (statistics.variance(a) + statistics.variance(b)) ** 0.5
    difference = statistics.mean(b) - statistics.mean(a)
    if abs(difference) <= max(SPREADS * spread, LEAST * abs(statistics.mean(b))):
        return None
    return difference > 0


def verdict(findings: Sequence[Finding]) -> str:
    """The verdict of findings, those of the control left out."""
    agree = [f.agrees is True for f in findings if not f.control]
    if not agree:
        return "not run"
    return "reproduced" if all(agree) else "partly" if any(agree) else "refuted"


def compared(
    found: Sequence[Result], a: str, at: Mapping[str, Any], b: str, other: Mapping[str, Any]
) -> Finding | None:
    """Row a at one point against row b at another; None unless both have two seeds."""
    ours, theirs = (
        values(seeds_of(found, row, point), "kl") for row, point in ((a, at), (b, other))
    )
    if min(len(ours), len(theirs)) < 2:
        return None
    agrees = beats(ours, theirs)
    word = {True: "better", False: "worse", None: "even"}[agrees]
    here = {"calib": at["calib"], "against": other["calib"]} if at != other else {}
    names = f"{a} {here['calib']}, {b} {here['against']}" if here else f"{a}, {b}"
    common = {k: v for k, v in at.items() if other.get(k) == v}
    text = f"{place(common)}: KL {shown(ours)} against {shown(theirs)} ({names}): {word}"
    return Finding(agrees, text, at["model"] == CONTROL)


def pairs(
    rows: Sequence[tuple[str, str]], *tables: str, but: Sequence[Mapping[str, Any]] = ()
) -> Callable[[Load], Iterator[Finding]]:
    """Findings of rows a against rows b, wherever one of the tables has both, `but` at some
    points."""

    def findings(load: Load) -> Iterator[Finding]:
        for found in map(load, tables):
            for a, b in rows:
                for point in (p for p in points(found, a) if p not in but):
                    if (finding := compared(found, a, point, b, point)) is not None:
                        yield finding

    return findings


def both(*parts: Callable[[Load], Iterator[Finding]]) -> Callable[[Load], Iterator[Finding]]:
    def findings(load: Load) -> Iterator[Finding]:
        for part in parts:
            yield from part(load)

    return findings


def selectors(load: Load) -> Iterator[Finding]:
    """DGC against random rows at every calibration size."""
    found = load("calibration")
    for point in points(found, "PTQ4ARVG"):
        if point["calib"] == "dgc":
            finding = compared(found, "PTQ4ARVG", point, "PTQ4ARVG", {**point, "calib": "random"})
            if finding is not None:
                yield finding


def numbers(
    table: str, metrics: Mapping[str, float], right: Callable[[float, float], bool], sign: str
) -> Callable[[Load], Iterator[Finding]]:
    """Findings of an analysis: metrics whose names end in a key of `metrics`, against the
    thresholds there."""

    def findings(load: Load) -> Iterator[Finding]:
        found = load(table)
        models = list(dict.fromkeys(r["table"]["point"]["model"] for r in found))
        for model in models:
            of_model = [r for r in found if r["table"]["point"]["model"] == model]
            for name in of_model[0]["metrics"]:
                for ending, threshold in metrics.items():
                    if name == ending or name.endswith(f".{ending}"):
                        seen = values(of_model, name)
                        mean = statistics.mean(seen)
                        spread = statistics.stdev(seen) if len(seen) > 1 else 0.0
                        agrees = (
                            None
                            if abs(mean - threshold) < SPREADS * spread
                            else right(mean, threshold)
                        )
                        text = f"{model} {name}: {mean:.3f} ({sign} {threshold:g})"
                        yield Finding(agrees, text, model == CONTROL)

    return findings


def at_most(table: str, metrics: Mapping[str, float]) -> Callable[[Load], Iterator[Finding]]:
    return numbers(table, metrics, lambda value, threshold: value <= threshold, "at most")


def at_least(table: str, metrics: Mapping[str, float]) -> Callable[[Load], Iterator[Finding]]:
    return numbers(table, metrics, lambda value, threshold: value >= threshold, "at least")


NEAR = 0.05  # of FID


def near_lossless(load: Load) -> Iterator[Finding]:
    """FID of PTQ4ARVG at W8A8 above full precision by at most `NEAR` of it or by `SPREADS` standard
    deviations."""
    for table in ("var", "rar", "par", "mar"):
        found = load(table)
        for point in points(found, "PTQ4ARVG"):
            ours = values(seeds_of(found, "PTQ4ARVG", point), "fid")
            full = values(seeds_of(found, "FP32", {"model": point["model"]}), "fid")
            if point["quant"] != "w8a8" or min(len(ours), len(full)) < 2:
                continue
            spread = (statistics.variance(ours) + statistics.variance(full)) ** 0.5
            limit = max(NEAR * statistics.mean(full), SPREADS * spread)
            agrees = statistics.mean(ours) - statistics.mean(full) <= limit
            six = values(seeds_of(found, "PTQ4ARVG", {**point, "quant": "w6a6"}), "fid")
            text = f"{place(point)}: FID {shown(ours)}, full precision {shown(full)}"
            text += f", W6A6 {shown(six)}" if len(six) > 1 else ""
            yield Finding(agrees, text, point["model"] == CONTROL)


def layer_errors(
    a: str, b: str, decide: Callable[[float, float], bool], word: str
) -> Callable[[Load], Iterator[Finding]]:
    """Findings of Figure 10: mean |output error| of the first qkv and fc1 under two scalings, means over seeds."""

    def findings(load: Load) -> Iterator[Finding]:
        found = load("cross_terms")
        for point in points(found, "GPS"):
            here = seeds_of(found, "GPS", point)
            for kind in ("qkv", "fc1"):
                ours, theirs = (statistics.mean(values(here, f"{kind}.{name}")) for name in (a, b))
                text = f"{place(point)} {kind}: {a} {ours:.4f}, {b} {theirs:.4f} ({word})"
                yield Finding(decide(ours, theirs), text, point["model"] == CONTROL)

    return findings


FREE = 1.02  # of the time per tensor


def static_is_free(load: Load) -> Iterator[Finding]:
    """The ratio of times, with its interval, of INT8 with token-wise and with per-tensor static
    parameters."""
    for result in load("speed"):
        report = result["detail"]
        for r in report.get("ratios", ()):
            if (r["of"], r["to"]) == ("int8_stwq", "int8"):
                low, high = r["interval"]
                agrees = True if high <= FREE else False if low > FREE else None
                text = f"{report['model']} L={r['length']}: {r['ratio']:.3f} of the time per tensor"
                yield Finding(agrees, f"{text} ({low:.3f} to {high:.3f})")


# --- the paper's statements

COMPONENTS = ("components", "components_others")
SCALINGS = ("SmoothQuant", "OS+", "RepQ*")
STATEMENTS = {
    "gps_beats_scalings": Statement(
        "As scaling, GPS beats SmoothQuant, OS+ and RepQ* (STWQ and DGC kept)",
        both(
            pairs([("GPS", row) for row in SCALINGS], "scaling"),
            pairs(
                [("PTQ4ARVG", "SmoothQuant + STWQ"), ("PTQ4ARVG", "RepQ* + STWQ")],
                "methods",
                but=[{"model": "rar_twin", "quant": "w6a6"}],
            ),  # which `scaling` has
        ),
    ),
    "stwq_beats_static": Statement(
        "Static token-wise parameters beat one per tensor",
        pairs([("SmoothQuant+STWQ", "SmoothQuant per-tensor")], "granularity"),
        by_construction=True,
    ),
    "stwq_beats_dynamic": Statement(
        "Static token-wise parameters beat dynamic ones of min-max range",
        pairs([("SmoothQuant+STWQ", "SmoothQuant dynamic token-wise")], "granularity"),
    ),
    "stwq_is_free": Statement(
        "STWQ is free at run time (at most 2 % more than per tensor)", static_is_free
    ),
    "dgc_beats_random": Statement(
        "Calibration rows of DGC beat random ones, at every size", selectors
    ),
    "gps_adds": Statement(
        "GPS adds to every combination of the other components",
        pairs(
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
        pairs(
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
        pairs(
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
        "Ranges at a position hardly depend on the class: they vary by at most 10 %, and position explains most",
        both(
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
        layer_errors("gps_cross", "gps", lambda a, b: abs(a - b) <= 0.05 * b, "within 5 %"),
    ),
    "gps_lowers_layer_error": Statement(
        "GPS leaves less output error in a layer than SmoothQuant",
        layer_errors("gps", "smoothquant", lambda a, b: a < (1 - LEAST) * b, "less"),
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


def committed(name: str) -> list[dict[str, Any]]:
    """The committed results of a table that count and know their place in it."""
    return [r for r in results.committed_results(name)[0] if "table" in r]


def evaluate(load: Load = committed) -> list[Claim]:
    """All statements with their verdicts."""
    claims = []
    for name, statement in STATEMENTS.items():
        found = list(statement.findings(load))
        # what speaks against it first
        found.sort(key=lambda f: (False, None, True).index(f.agrees))
        figures, control = (
            [f.marked for f in found if f.control == wanted] for wanted in (False, True)
        )
        claims.append(
            Claim(name, statement.text, verdict(found), figures, statement.by_construction, control)
        )
    return claims


def summary(findings: Sequence[str]) -> str:
    """The figures of a claim in a table's cell, after how many of several agree."""
    left = len(findings) - SHOWN
    agree = sum(text.startswith("+") for text in findings)
    first = [f"{agree} of {len(findings)} agree"] if len(findings) > 1 else []
    return "<br>".join([*first, *findings[:SHOWN], *([f"and {left} more"] if left > 0 else [])])


def markdown(load: Load = committed) -> str:
    """The claims as a table."""
    lines = [
        "| The paper says | The twins | Figures | Control (`rar_twin_plain`) |",
        "| --- | --- | --- | --- |",
    ]
    for claim in evaluate(load):
        lines.append(
            f"| {claim.statement} | {claim.marked_verdict} | {summary(claim.figures)} | {summary(claim.control)} |"
        )
    return "\n".join(lines)


def main() -> None:
    for claim in evaluate():
        print(
            f"{claim.verdict:11} {claim.statement}{' (by construction)' if claim.by_construction else ''}"
        )
        for text in claim.figures:
            print(f"              {text}")
        for text in claim.control:
            print(f"    control   {text}")


if __name__ == "__main__":
    main()

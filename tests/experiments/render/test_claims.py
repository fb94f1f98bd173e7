"""The rules by which results speak for or against the paper's statements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from experiments.registry import tables as registry
from experiments.render import claims
from experiments.render.claims import Finding


def result(row: str, seed: int, metrics: dict[str, float], **point: object) -> dict[str, Any]:
    point = {"model": "rar_twin", "quant": "w6a6"} | point
    return {"table": {"row": row, "point": point}, "seed": seed, "metrics": metrics}


def runs(row: str, kls: Sequence[float], **point: object) -> list[dict[str, Any]]:
    return [result(row, seed, {"kl": kl}, **point) for seed, kl in enumerate(kls)]


def judged(name: str, **tables: list[dict[str, Any]]) -> claims.Claim:
    return next(
        c for c in claims.evaluate_claims(lambda table: tables.get(table, [])) if c.name == name
    )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], True),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], False),
        ([1.0, 1.2, 0.8], [1.3, 1.5, 1.1], None),  # 0.3 apart, spread 0.28
        # less and more than one per cent
        ([1.0, 1.0], [1.009, 1.009], None),
        ([1.0, 1.0], [1.02, 1.02], True),
    ],
)
def test_one_beats_another_by_more_than_two_spreads_and_one_per_cent(
    a: list[float], b: list[float], expected: bool | None
) -> None:
    assert claims.compare_means(a, b) is expected


@pytest.mark.parametrize(
    ("agree", "expected"),
    [
        ([], "not run"),
        ([True, True], "reproduced"),
        ([True, None], "partly"),
        ([True, False], "partly"),
        ([None, False], "refuted"),
        ([None], "refuted"),
    ],
)
def test_verdicts(agree: list[bool | None], expected: str) -> None:
    assert claims.judge_findings([Finding(a, "") for a in agree]) == expected
    assert (
        claims.judge_findings([*(Finding(a, "") for a in agree), Finding(False, "", control=True)])
        == expected
    )


def test_natural_images_have_a_column_once_there_are_results_of_them() -> None:
    twins = {"components": runs("+GPS", [1.0, 1.0]) + runs("SmoothQuant", [2.0, 2.0])}
    there = {"components": runs("+GPS", [3.0, 3.0]) + runs("SmoothQuant", [2.0, 2.0])}

    def load(table: str) -> list[dict[str, Any]]:
        return twins.get(table, [])

    def natural(table: str) -> list[dict[str, Any]]:
        return there.get(table, [])

    assert claims.NATURAL_HEADS[0] not in claims.format_claims(load, lambda table: [])
    shown = claims.format_claims(load, natural)
    assert claims.NATURAL_HEADS[0] in shown
    claim = claims.evaluate_statement("gps_adds", load, natural)
    assert (claim.verdict, claim.verdict_there) == ("reproduced", "refuted")
    assert claim.natural_verdict == "refuted, unlike the twins: this counts"
    assert claim.natural[0].startswith("–")
    alike = claims.evaluate_statement("gps_adds", load, load)
    assert alike.natural_verdict == "reproduced"
    assert claims.evaluate_statement("gps_adds", load, lambda table: []).natural == []


def test_a_statement_without_a_finding_of_natural_images_says_why() -> None:
    rows = {"components": runs("+GPS", [1.0]) + runs("SmoothQuant", [2.0])}

    def one_seed(table: str) -> list[dict[str, Any]]:
        return rows.get(table, [])

    def nothing(table: str) -> list[dict[str, Any]]:
        return []

    def verdict(name: str, natural: claims.Load) -> str:
        return claims.evaluate_statement(name, nothing, natural).natural_verdict

    assert verdict("gps_adds", one_seed) == claims.SINGLE_SEEDS
    assert verdict("gps_adds", nothing) == claims.NOT_RUN
    assert verdict("stwq_is_free", nothing) == claims.NOT_ASKED


def test_without_results_nothing_is_claimed() -> None:
    found = claims.evaluate_claims(lambda table: [])
    assert {c.verdict for c in found} == {"not run"}
    assert [c.name for c in found] == list(claims.STATEMENTS)


def test_a_statement_reads_the_tables_that_name_it_and_no_others() -> None:
    for name, statement in claims.STATEMENTS.items():
        read: list[str] = []
        list(statement.findings(lambda table, read=read: read.append(table) or []))
        assert set(read) == {
            n for n, table in registry.load_tables().items() if name in table.claims
        }, name


def test_a_row_counts_against_another_only_with_two_seeds() -> None:
    one = runs("SmoothQuant+STWQ", [0.1]) + runs("SmoothQuant per-tensor", [0.9, 0.8])
    assert judged("stwq_beats_static", granularity=one).verdict == "not run"
    two = runs("SmoothQuant+STWQ", [0.1, 0.11]) + runs("SmoothQuant per-tensor", [0.9, 0.8])
    found = judged("stwq_beats_static", granularity=two)
    assert (found.verdict, found.by_construction) == ("reproduced", True)
    assert found.figures == [
        "+ rar_twin W6A6: KL 0.1050 ± 0.0071 against 0.8500 ± 0.0707 "
        "(SmoothQuant+STWQ, SmoothQuant per-tensor): better"
    ]


def test_the_control_is_reported_and_decides_nothing() -> None:
    good = runs("GPS", [0.1, 0.1]) + runs("OS+", [0.2, 0.2])
    plain = runs("GPS", [0.3, 0.3], model="rar_twin_plain") + runs(
        "OS+", [0.2, 0.2], model="rar_twin_plain"
    )
    found = judged("gps_beats_scalings", scaling=good + plain)
    assert found.verdict == "reproduced"
    assert found.control == [
        "– rar_twin_plain W6A6: KL 0.3000 ± 0.0000 against 0.2000 ± 0.0000 (GPS, OS+): worse"
    ]


def test_dgc_is_compared_with_random_rows_of_the_same_number() -> None:
    table = [
        r
        for n, dgc in ((8, [0.1, 0.1]), (32, [0.3, 0.3]))
        for r in runs("PTQ4ARVG", dgc, **{"calib": "dgc", "calib.n": n})
        + runs("PTQ4ARVG", [0.2, 0.2], **{"calib": "random", "calib.n": n})
    ]
    found = judged("dgc_beats_random", calibration=table)
    assert found.verdict == "partly"
    assert [text.partition(":")[0] for text in found.figures] == [
        # what speaks against the statement first
        "– rar_twin W6A6 calib.n=32",
        "+ rar_twin W6A6 calib.n=8",
    ]


def test_near_lossless_is_judged_by_fid_at_eight_bits_alone() -> None:
    def table(
        fids: Sequence[float], quant: str, model: str = "rar_twin", fid: str = "fid"
    ) -> list[dict[str, Any]]:
        full = [
            {
                **result("FP32", s, {fid: f}),
                "table": {"row": "FP32", "point": {"model": model}},
            }
            for s, f in enumerate((2.00, 2.02))
        ]
        ours = [result("PTQ4ARVG", s, {fid: f}, quant=quant) for s, f in enumerate(fids)]
        for entry in ours:
            entry["table"]["point"]["model"] = model
        return full + ours

    assert judged("near_lossless", rar=table((2.05, 2.07), "w8a8")).verdict == "reproduced"
    assert judged("near_lossless", rar=table((2.25, 2.27), "w8a8")).verdict == "refuted"
    assert judged("near_lossless", rar=table((2.05, 2.07), "w6a6")).verdict == "not run"

    # a twin that is in `methods` too counts once
    near = {"rar": table((2.05, 2.07), "w8a8"), "methods": table((2.25, 2.27), "w8a8")}
    twice = judged("near_lossless", **near)
    assert (twice.verdict, len(twice.figures)) == ("reproduced", 1)
    # models of natural images are there alone, and Lite0 judges them
    far = {"methods": table((2.25, 2.27), "w8a8", "rar_natural", "lite0_fid")}
    claim = claims.evaluate_statement(
        "near_lossless", lambda name: near.get(name, []), lambda name: far.get(name, [])
    )
    assert claim.natural_verdict == "refuted, unlike the twins: this counts"
    assert claim.natural == [
        "– rar_natural W8A8: FID, Lite0 2.26 ± 0.01, full precision 2.01 ± 0.01"
    ]


def test_measurements_are_held_against_their_thresholds() -> None:
    def of(metrics: dict[str, float]) -> list[dict[str, Any]]:
        return [result("GPS", 0, metrics)]

    biases = {
        "qkv.error_w.bias": 0.02,
        "fc1.error_w.bias": 0.2,
        "qkv.delta_x.bias": 0.15,
        "qkv.delta_w.bias": 0.1,
    }
    assert judged("sums_hold", approximation=of(biases)).verdict == "partly"
    assert judged("approximations_hold", approximation=of(biases)).verdict == "reproduced"
    assert (
        judged(
            "order_is_kept", ordering=of({"qkv.scale_order": 0.8, "qkv.range_order": 0.9})
        ).verdict
        == "refuted"
    )
    assert (
        judged("gps_is_best_nearby", perturbation=of({"share_worse": 0.97})).verdict == "reproduced"
    )
    errors = {
        f"{kind}.{n}": v
        for kind in ("qkv", "fc1")
        for n, v in (("smoothquant", 0.5), ("gps", 0.4), ("gps_cross", 0.39))
    }
    assert judged("gps_lowers_layer_error", cross_terms=of(errors)).verdict == "reproduced"
    assert judged("cross_terms_change_little", cross_terms=of(errors)).verdict == "reproduced"
    invariance = {"qkv.class_spread": 0.05, "qkv.rest.class_spread": 0.2, "qkv.position_share": 0.9}
    assert judged("position_invariant", invariance=of(invariance)).verdict == "partly"


def test_a_threshold_within_the_spread_over_seeds_decides_nothing() -> None:
    def of(*biases: float) -> str:
        found = [
            result("GPS", seed, {"qkv.error_w.bias": bias}) for seed, bias in enumerate(biases)
        ]
        (figure,) = judged("sums_hold", approximation=found).figures
        return figure[0]

    assert (of(0.07, 0.12, 0.10), of(0.02, 0.03, 0.02), of(0.2, 0.21, 0.22)) == ("=", "+", "–")


def test_static_parameters_are_free_if_the_interval_is_below_two_percent() -> None:
    def speed(*ratios: tuple[float, float, float]) -> list[dict[str, Any]]:
        lines = [
            {"length": 64, "of": "int8_stwq", "to": "int8", "ratio": r, "interval": [a, b]}
            for r, a, b in ratios
        ]
        return [
            {
                "detail": {
                    "model": "rar_l",
                    "ratios": [*lines, {**lines[0], "to": "fp32", "ratio": 0.3}],
                }
            }
        ]

    assert judged("stwq_is_free", speed=speed((1.0, 0.99, 1.01))).verdict == "reproduced"
    assert judged("stwq_is_free", speed=speed((1.01, 0.99, 1.03))).verdict == "refuted"
    assert (
        judged("stwq_is_free", speed=speed((1.0, 0.99, 1.01), (1.05, 1.04, 1.06))).verdict
        == "partly"
    )


def test_the_table_of_claims_marks_what_is_so_by_construction() -> None:
    rows = runs("SmoothQuant+STWQ", [0.1, 0.11]) + runs("SmoothQuant per-tensor", [0.9, 0.8])

    def load(table: str) -> list[dict[str, Any]]:
        return rows if table == "granularity" else []

    lines = claims.format_claims(load, lambda table: []).splitlines()
    assert len(lines) == 2 + len(claims.STATEMENTS)
    (line,) = [x for x in lines if "one per tensor" in x]
    assert "| reproduced, by construction |" in line
    assert sum("| not run |" in x for x in lines) == len(claims.STATEMENTS) - 1


def test_many_figures_are_shortened() -> None:
    signs = "–=++++"
    assert claims.shorten_figures([f"{s} {i}" for i, s in enumerate(signs)]) == (
        "4 of 6 agree<br>– 0<br>= 1<br>+ 2<br>+ 3<br>and 2 more"
    )
    assert claims.shorten_figures(["+ alone"]) == "+ alone"

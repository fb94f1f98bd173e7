"""Which rows each selector keeps of a pool."""

from __future__ import annotations

import pytest
import torch

from models.rar.adapter import RARAdapter
from models.rar.transformer import RAR
from ptq import dgc
from ptq.calibration import Pool, block_features, digest_rows, pool_labels, select_rows
from ptq.registry.entries import SELECTORS
from ptq.types import CalibrationSet, ConfigError
from tests.families import calibration, tiny
from tests.reference import fill

OF_ALL_MODELS = [name for name in SELECTORS if name != "resample"]  # which is of VAR alone
CLASSES = 10
LENGTH = 16
N = 24


@pytest.fixture(scope="module")
def adapter() -> RARAdapter:
    return RARAdapter(fill(RAR(48, 2, 4, 192, LENGTH, 40, CLASSES)))


def pool(adapter: RARAdapter, labels: torch.Tensor) -> Pool:
    tokens = torch.randint(40, (len(labels), LENGTH), generator=torch.Generator().manual_seed(5))
    return Pool(*adapter.rows(tokens, labels), labels)


def chosen(
    adapter: RARAdapter, selector: str, n: int = N, seed: int = 0
) -> tuple[CalibrationSet, Pool]:
    drawn = pool(adapter, pool_labels(selector, n, CLASSES, seed))
    return select_rows(selector, adapter, drawn, n, seed, batch=7), drawn


@pytest.mark.parametrize("selector", OF_ALL_MODELS)
@pytest.mark.parametrize("n", [1, 7, N])
def test_every_selector_keeps_n_different_rows_and_says_their_kind(
    adapter: RARAdapter, selector: str, n: int
) -> None:
    kept, drawn = chosen(adapter, selector, n)
    assert len(kept) == len(kept.rows["ids"]) == len(kept.rows["condition"]) == n
    candidates = [
        (*map(int, i), int(c)) for i, c in zip(drawn.joint()["ids"], drawn.joint()["condition"])
    ]
    found = [(*map(int, i), int(c)) for i, c in zip(kept.rows["ids"], kept.rows["condition"])]
    assert len(set(found)) == n
    assert set(found) <= set(candidates)
    assert torch.equal(kept.rows["condition"] != adapter.model.none_condition, kept.conditional)
    assert kept.meta["conditional_share"] == pytest.approx(float(kept.conditional.float().mean()))
    assert kept.meta["selector"] == selector
    assert kept.meta["pool"] == 2 * len(drawn.labels)


def test_uniform_and_random_keep_both_branches_and_cond_only_one(adapter: RARAdapter) -> None:
    shares = {
        s: chosen(adapter, s)[0].meta["conditional_share"]
        for s in ("uniform", "random", "cond_only", "dgc")
    }
    assert shares["uniform"] == 0.5
    assert shares["cond_only"] == 1.0
    assert 0 < shares["random"] < 1
    assert 0 < shares["dgc"] < 1


@pytest.mark.parametrize("n", [20, 40, 60])
def test_uniform_keeps_the_same_number_of_rows_of_every_class(adapter: RARAdapter, n: int) -> None:
    kept, drawn = chosen(adapter, "uniform", n)
    assert torch.equal(
        drawn.labels.bincount(minlength=CLASSES), torch.full((CLASSES,), n // 2 // CLASSES)
    )
    classes = kept.rows["condition"][kept.conditional] - 41
    assert torch.equal(
        classes.bincount(minlength=CLASSES), torch.full((CLASSES,), n // 2 // CLASSES)
    )


@pytest.mark.parametrize(("n", "classes"), [(5, 10), (24, 10), (128, 1000), (128, 10), (47, 10)])
def test_labels_of_the_pool_are_classes_and_uniform_ones_spread_evenly(
    n: int, classes: int
) -> None:
    for selector in SELECTORS:
        labels = pool_labels(selector, n, classes, 3)
        assert labels.min() >= 0
        assert labels.max() < classes
        assert len(labels) == ((n + 1) // 2 if selector == "uniform" else n)
    counts = pool_labels("uniform", n, classes, 3).bincount(minlength=classes)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("selector", OF_ALL_MODELS)
def test_a_selection_is_reproducible_from_its_seed(adapter: RARAdapter, selector: str) -> None:
    assert digest_rows(chosen(adapter, selector)[0]) == digest_rows(chosen(adapter, selector)[0])
    if selector != "uniform":
        assert digest_rows(chosen(adapter, selector)[0]) != digest_rows(
            chosen(adapter, selector, seed=1)[0]
        )


def test_dgc_keeps_the_rows_that_the_paper_describes(adapter: RARAdapter) -> None:
    kept, drawn = chosen(adapter, "dgc")
    outputs: list[torch.Tensor] = []
    handle = adapter.model.blocks[-1].register_forward_hook(
        lambda m, a, out: outputs.append(out.detach())
    )
    with torch.no_grad():
        adapter.forward(drawn.joint())
    handle.remove()
    means = outputs[0][:, 2:].mean(dim=1)  # tokens 0 and 1 are sinks
    torch.testing.assert_close(block_features(adapter, drawn.joint(), 7, first_token=False), means)
    torch.testing.assert_close(
        block_features(adapter, drawn.joint(), 5, first_token=True), outputs[0][:, 0]
    )
    index = dgc.select_paper(means, N)
    assert torch.equal(kept.rows["ids"], drawn.joint()["ids"][index])
    assert torch.equal(kept.conditional, index < N)


def test_released_dgc_keeps_the_first_conditional_rows_of_a_causal_model(
    adapter: RARAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    kept, drawn = chosen(adapter, "dgc_released")
    assert bool(kept.conditional.all())
    assert torch.equal(kept.rows["ids"], drawn.conditional["ids"])
    assert "carry no information" in caplog.text


@pytest.mark.parametrize(
    ("family", "block"), [("var", 32), ("par", 32), ("rar", None), ("mar", None)]
)
def test_released_dgc_rounds_the_share_in_the_blocks_of_the_familys_files(
    family: str, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 70 rows 2.8 would be conditional; of 32 it is 1.28, and of the six left 0.24."""
    monkeypatch.setattr(dgc, "released_share", lambda *distances: 0.04)
    monkeypatch.setattr(
        "ptq.calibration.block_features", lambda *arguments, **options: torch.ones(140, 4)
    )
    adapter = tiny(family)
    rows = {"number": torch.arange(70)}
    drawn = Pool(rows, {"number": torch.arange(70) + 70}, torch.zeros(70))
    kept = select_rows("dgc_released", adapter, drawn, 70, seed=0).rows["number"].tolist()
    if block is None:
        assert kept == [0, 1, 2, *range(70, 137)]
    else:
        starts = [0, 32]  # six rows of the last block: 0.24 of them
        first_unconditional = [*range(70, 101), *range(102, 133), *range(134, 140)]
        assert kept == starts + first_unconditional


@torch.no_grad()
def test_the_released_features_are_those_of_the_last_encoder_block_in_mar() -> None:
    mar = tiny("mar")
    rows = calibration("mar", mar).rows
    seen: list[torch.Tensor] = []
    block = mar.model.encoder_blocks[-1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output[:, 0]))
    mar.forward(rows)
    handle.remove()
    # 12 rows, in the calls of their sampling iterations
    found = block_features(mar, rows, 12, first_token=True)
    torch.testing.assert_close(found, torch.cat(seen).float())


@pytest.mark.parametrize("selector", OF_ALL_MODELS)
@pytest.mark.parametrize("n", [0, -3])
def test_an_empty_calibration_set_is_refused(adapter: RARAdapter, selector: str, n: int) -> None:
    with pytest.raises(ConfigError, match=f"^calib.n: {n} is not"):
        pool_labels(selector, n, CLASSES, 0)
    with pytest.raises(ConfigError, match=f"^calib.n: {n} is not between 1 and"):
        select_rows(selector, adapter, pool(adapter, torch.arange(4)), n, 0)


@pytest.mark.parametrize(
    ("selector", "limit"), [("dgc", 8), ("random", 8), ("cond_only", 4), ("dgc_released", 4)]
)
def test_a_pool_that_is_too_small_is_refused(
    adapter: RARAdapter, selector: str, limit: int
) -> None:
    small = pool(adapter, torch.arange(4))
    assert len(select_rows(selector, adapter, small, limit, 0)) == limit
    with pytest.raises(
        ConfigError, match=f"^calib.n: {limit + 1} is not between 1 and {limit}, .*{selector}"
    ):
        select_rows(selector, adapter, small, limit + 1, 0)


def test_an_unknown_selector_is_refused_before_anything_is_drawn(adapter: RARAdapter) -> None:
    names = "cond_only, dgc, dgc_released, random, resample, uniform"
    message = f"^calib.selector: 'best' is not one of {names}$"
    with pytest.raises(ConfigError, match=message):
        pool_labels("best", 4, CLASSES, 0)
    with pytest.raises(ConfigError, match=message):
        select_rows("best", adapter, pool(adapter, torch.arange(4)), 4, 0)


def test_the_fingerprint_sees_values_names_shapes_and_types() -> None:
    def of(**rows: torch.Tensor) -> str:
        return digest_rows(CalibrationSet(rows, torch.ones(2, dtype=torch.bool)))

    ids = torch.arange(8).view(2, 4)
    prints = [
        of(ids=ids),
        of(ids=ids + 1),
        of(tokens=ids),
        of(ids=ids.view(4, 2)),
        of(ids=ids.int()),
        of(ids=ids.bfloat16()),
        of(ids=ids, condition=ids[:, 0]),
    ]
    assert len(set(prints)) == len(prints)
    assert of(condition=ids[:, 0], ids=ids) == prints[-1]

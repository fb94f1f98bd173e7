"""OmniQuant starts from SmoothQuant, keeps the function at any epoch, lowers its loss, and goes on
after a kill."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.par.transformer import PAR
from ptq.activations import calibrate_activations
from ptq.inputs import capture_inputs
from ptq.methods.smoothquant import smoothquant_step
from ptq.modules import QuantLinear, replaced_modules
from ptq.numbers.numerics import NonFiniteError
from ptq.numbers.quantizers import Passthrough, fake_quantize_weight
from ptq.omniquant import omniquant, streams
from ptq.omniquant.block_files import block_file_key, read_blocks, training_seconds
from ptq.omniquant.omniquant import SMALLEST_SCALE, cut_rows, join_batches, train_blocks
from ptq.omniquant.omniquant import OmniQuantSettings as Settings
from ptq.omniquant.start import Extent
from ptq.omniquant.student import TrainedLinear, build_student
from ptq.pipeline import Solution, apply_transforms, quantize, round_weights, solve_transforms
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.types import ConfigError, QuantSpec
from tests.families import FAMILIES, assert_unchanged, calibration, relative, tiny
from tests.ptq.omniquant.omniquant_cases import (
    LINEARS,
    features,
    outlying,
    recipe,
    same,
    silent,
    trained,
)

# --- the start


def running_middle(x: Tensor) -> Tensor:
    """The shift of the official start: rows (N, T, C) one after the other."""
    found = None
    for row in x:
        middle = (row.amax(0) + row.amin(0)) / 2
        found = middle if found is None else 0.99 * found + 0.01 * middle
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_epochs_is_smoothquant_with_a_shift_and_dynamic_tokens(family: str) -> None:
    how = recipe(epochs=0, clip=False)
    adapter = tiny(family)
    twin = tiny(family)
    chosen = calibration(family, adapter)
    kinds = ("qkv", "fc1", "proj")
    sites = [s for s in adapter.sites if s.kind in kinds]
    inputs = capture_inputs(adapter, chosen.batches(4), sites, False)
    found = solve_transforms(adapter, chosen.batches(4), len(chosen), how, silent).transforms
    assert set(found) == {s.name for s in sites}
    for site in sites:
        x = inputs[site.name]
        weight = torch.cat([adapter.model.get_submodule(name).weight for name in site.consumers])
        torch.testing.assert_close(found[site.name].scale, smoothquant_step(x, weight, 0.5).scale)
        if family == "par":
            assert not found[site.name].shift.any()
        elif family != "mar":  # whose rows arrive in groups
            torch.testing.assert_close(
                found[site.name].shift, running_middle(x.view(len(chosen), -1, x.shape[1]))
            )
    quantize(adapter, chosen, how, batch=4)
    plain = recipe(changes={"omniquant": False})
    apply_transforms(twin, plain, Solution(found))
    round_weights(twin, plain)
    calibrate_activations(twin, chosen.batches(4), len(chosen), plain, silent, {})
    assert torch.equal(adapter.forward(chosen.rows), twin.forward(chosen.rows))


def test_par_has_scales_alone_and_gets_no_biases() -> None:
    adapter = tiny("par")
    chosen = calibration("par", tiny("par"))
    found = quantize(adapter, chosen, recipe(epochs=2), batch=4).tensors
    assert isinstance(adapter.model, PAR)
    assert not any(v.any() for k, v in found.items() if k.endswith("transform.shift"))
    assert all(block.attention_norm.bias is None for block in adapter.model.layers)
    assert all(m.bias is None for m in adapter.model.modules() if isinstance(m, QuantLinear))


def test_the_running_middle_does_not_depend_on_how_rows_are_cut() -> None:
    x = torch.randn(9, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1, 4, 9):
        extent = Extent(x[0, 0])
        for part in x.split(size):
            extent.update(part)
        extent.update(x[:0])
        torch.testing.assert_close(extent.middle, running_middle(x))
        assert torch.equal(extent.peaks, x.abs().amax(dim=(0, 1)))


# --- the function stays, and training sees what will be deployed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_without_quantizers_the_trained_model_is_unchanged(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    adapter = outlying(family, dtype)
    how = recipe(epochs=2)
    chosen = calibration(family, adapter)
    before = adapter.forward(chosen.rows)
    weights = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    start = solve_transforms(adapter, chosen.batches(4), len(chosen), recipe(epochs=0), silent)
    solution = solve_transforms(adapter, chosen.batches(4), len(chosen), how, silent)
    # training leaves no trace
    assert all(torch.equal(v, weights[k]) for k, v in adapter.model.state_dict().items())
    for name, transform in solution.transforms.items():
        assert not torch.equal(transform.scale, start.transforms[name].scale)
        assert float(transform.scale.min()) >= SMALLEST_SCALE
        assert torch.equal(transform.shift, start.transforms[name].shift) == (family == "par")
    assert all((clip.low != 4).any() and (clip.high != 4).any() for clip in solution.clips.values())
    apply_transforms(adapter, how, solution)
    assert_unchanged(adapter, chosen.rows, before, bound)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_student_without_quantizers_is_its_block_after_any_epoch(family: str) -> None:
    adapter = outlying(family)
    for epochs in (0, 2):
        how = recipe(epochs=epochs, scope=Scope(matmuls=False))
        students = {}
        for block, result in trained(family, adapter, how).items():
            students[block] = build_student(adapter, block, how, result.transforms, {})
            for module in students[block].modules():
                if isinstance(module, TrainedLinear):
                    module.spec = None
                    module.input = Passthrough()
        rows = calibration(family, adapter).rows
        before = adapter.forward(rows)
        with replaced_modules(adapter.model, students):
            assert relative(adapter.forward(rows), before) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("softmax", ["int", "none"])
@torch.no_grad()
def test_students_compute_what_the_quantized_model_does(family: str, softmax: str) -> None:
    adapter = outlying(family)
    how = recipe(bits=6, changes={"softmax": softmax})
    chosen = calibration(family, adapter)
    found = trained(family, adapter, how)
    students = {
        b: build_student(adapter, b, how, t.transforms, t.clips, final=True)
        for b, t in found.items()
    }
    before = features(adapter, chosen.rows)
    with replaced_modules(adapter.model, students):
        expected = features(adapter, chosen.rows)
    assert relative(expected, before) > 1e-3
    quantize(adapter, chosen, how, batch=4)
    assert relative(features(adapter, chosen.rows), expected) < 1e-9


# --- training


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_loss_falls_in_every_block_and_the_model_gets_better(
    family: str, tmp_path: Path
) -> None:
    errors = []
    for epochs in (0, 8):
        adapter = outlying(family)
        how = recipe(3, LINEARS, epochs=epochs, clip_lr=0.2, transform_lr=0.03)
        for site in how.scope.sites(adapter):
            for weight in (adapter.model.get_submodule(name).weight for name in site.consumers):
                # with tails that are worth clipping
                weight.copy_(weight**3 * (weight.std() / (weight**3).std()))
        chosen = calibration(family, adapter)
        path = tmp_path / f"{epochs}.safetensors"
        before = adapter.forward(chosen.rows)
        losses = [t.losses for t in trained(family, adapter, how, checkpoint=path).values()]
        assert all(len(each) == epochs for each in losses)
        assert epochs == 0 or all(float(each[-1]) < 0.9 * float(each[0]) for each in losses), losses
        quantize(adapter, chosen, how, batch=4, checkpoint=path)
        errors.append(float((adapter.forward(chosen.rows) - before).square().mean()))
    assert errors[1] < errors[0]


def test_a_checkpoint_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("a file where a folder is wanted")
    with pytest.raises(
        ConfigError, match=r"^omniquant: .*there/trained\.safetensors cannot be written \(.*\)$"
    ):
        trained(
            "rar",
            outlying("rar"),
            recipe(),
            checkpoint=tmp_path / "there" / "trained.safetensors",
        )


def test_gradients_of_the_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for part in (2, 8):
        monkeypatch.setattr(omniquant, "ROWS_AT_ONCE", part)
        found.append(trained("rar", outlying("rar"), recipe(batch=6)))
    for block, result in found[0].items():
        torch.testing.assert_close(result.losses, found[1][block].losses, rtol=1e-9, atol=0)
        for name, transform in result.transforms.items():
            torch.testing.assert_close(
                transform.scale, found[1][block].transforms[name].scale, rtol=1e-9, atol=0
            )


def test_rows_are_cut_into_batches_and_these_into_parts() -> None:
    parts, steps = cut_rows({"ids": torch.arange(27)}, 10)
    assert [p["ids"].tolist() for p in parts] == [
        [*range(8)],
        [8, 9],
        [*range(10, 18)],
        [18, 19],
        [*range(20, 27)],
    ]
    assert [list(s) for s in steps] == [[0, 1], [2, 3], [4]]
    assert [list(s) for s in cut_rows({"ids": torch.arange(3)}, 1)[1]] == [[0], [1], [2]]


def test_the_second_loss_and_each_part_of_what_is_learned_can_be_chosen() -> None:
    adapter = outlying("rar")
    plain = trained("rar", adapter, recipe())
    both = trained("rar", adapter, recipe(second_loss=True))
    assert all(float(both[b].losses[0]) > float(plain[b].losses[0]) for b in plain)
    assert all(not t.clips for t in trained("rar", adapter, recipe(clip=False)).values())
    kinds = {"transform": ["attn.proj"], "values": ["attn.qkv", "mlp.fc1"]}
    for off, left in kinds.items():
        for block, result in trained("rar", adapter, recipe(**{off: False})).items():
            assert sorted(result.transforms) == [f"{block}.{path}" for path in left]
    nothing = trained("rar", adapter, recipe(clip=False, transform=False, values=False))
    assert all(not t.transforms and not t.clips and not len(t.losses) for t in nothing.values())


def test_training_that_does_not_keep_its_streams_comes_to_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = trained("mar", outlying("mar"), recipe())
    monkeypatch.setattr(streams, "STREAM_BYTES", 0)
    assert same(kept, trained("mar", outlying("mar"), recipe()))


def test_a_loss_that_is_not_finite_stops_training_in_one_line() -> None:
    adapter = outlying("rar", torch.float32)
    adapter.model.blocks[1].mlp.fc2.weight *= 1e25
    with pytest.raises(
        NonFiniteError, match=r"^blocks.1: NaN or infinity in OmniQuant's loss in epoch 1, only"
    ):
        trained("rar", adapter, recipe())


# --- deployment and a killed run


@torch.no_grad()
def test_weights_are_deployed_in_the_ranges_that_were_learned() -> None:
    adapter = outlying("rar")
    how = recipe()
    chosen = calibration("rar", adapter)
    solution = solve_transforms(adapter, chosen.batches(4), len(chosen), how, silent)
    apply_transforms(adapter, how, solution)
    weights = {n: m.weight for n, m in adapter.model.named_modules() if isinstance(m, QuantLinear)}
    round_weights(adapter, how, clips=solution.clips)
    for name, weight in weights.items():
        scale = adapter.model.get_submodule(name).weight_params.scale
        if name.startswith("blocks"):
            clip = solution.clips[name]
            lo = weight.amin(1) * clip.low.sigmoid()
            hi = weight.amax(1) * clip.high.sigmoid()
            torch.testing.assert_close(scale, (hi - lo) / 15)
        else:
            torch.testing.assert_close(scale, fake_quantize_weight(weight, how.weights)[1].scale)


class Killed(Exception):
    pass


@pytest.mark.parametrize("family", ["var", "mar"])
def test_a_killed_run_goes_on_with_the_next_block_and_comes_to_the_same(
    family: str, tmp_path: Path
) -> None:
    path = tmp_path / "trained.safetensors"
    how = recipe()
    trained_blocks = []
    whole = trained(family, outlying(family), how)
    last = list(whole)[-1]

    def killing(items: Iterable, what: str) -> Iterable:
        if what.endswith(last):
            raise Killed
        return items

    def noting(items: Iterable, what: str) -> Iterable:
        trained_blocks.extend(block for block in whole if what == f"omniquant, {block}")
        return items

    adapter = outlying(family)
    batches = calibration(family, adapter).batches(4)
    assert training_seconds(path) == 0
    with pytest.raises(Killed):
        train_blocks(adapter, batches, how, killing, path)
    spent = [training_seconds(path)]
    for expected in ([last], []):  # the second time all is there
        resumed = train_blocks(outlying(family), batches, how, noting, path)
        assert same(resumed, whole)
        assert trained_blocks == expected
        trained_blocks.clear()
        spent.append(training_seconds(path))
    assert 0 < spent[0] < spent[1] == spent[2]
    assert [p.name for p in tmp_path.iterdir()] == ["trained.safetensors"]


def test_a_foreign_or_broken_file_is_not_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "trained.safetensors"
    adapter = outlying("rar")
    batches = calibration("rar", adapter).batches(4)
    first = train_blocks(adapter, batches, recipe(), silent, path)
    assert (
        len(read_blocks(path, adapter, block_file_key(adapter, recipe(), join_batches(batches))))
        == 2
    )
    other = outlying("rar")
    other.model.lm_head.weight.data[0, 0] += 1
    for model, rows, how in (
        (adapter, batches, recipe(bits=5)),
        (other, batches, recipe()),
        (adapter, batches[:2], recipe()),
    ):
        assert not read_blocks(path, model, block_file_key(model, how, join_batches(rows)))
    path.write_bytes(path.read_bytes()[:100])
    assert same(train_blocks(adapter, batches, recipe(), silent, path), first)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"transforms": ("smoothquant",)},
            "method.transforms: smoothquant does not go with omniquant, which trains its own, "
            "allowed is none",
        ),
        (
            {"softmax": "log_sqrt2"},
            "method.softmax: log_sqrt2 does not go with omniquant, which trains through uniform "
            "steps, allowed is int or none",
        ),
        (
            {"activations": QuantSpec(format="fp8_e4m3")},
            "quant.activations.format: fp8_e4m3 does not go with omniquant, allowed is int",
        ),
    ],
)
def test_what_does_not_go_with_omniquant_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        recipe(changes=changes)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gptq_rounds_within_the_clipping_that_was_trained(family: str) -> None:
    errors = {}
    params = {}
    for rounder in ("nearest", "gptq"):
        adapter = outlying(family)
        chosen = calibration(family, adapter)
        full = adapter.forward(chosen.rows)
        found = quantize(
            adapter, chosen, recipe(bits=4, changes={"rounder": rounder}), batch=4
        ).tensors
        errors[rounder] = float((adapter.forward(chosen.rows) - full).square().mean())
        params[rounder] = {
            name: value for name, value in found.items() if name.endswith(".weight.scale")
        }
    assert errors["gptq"] < errors["nearest"]
    inside = [name for name in params["gptq"] if "blocks" in name or "layers" in name]
    assert inside
    assert all(torch.equal(params["gptq"][name], params["nearest"][name]) for name in inside)


def test_a_weight_range_per_tensor_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="^quant.weights.granularity: tensor does not go with omniquant, which clips",
    ):
        Recipe(QuantSpec(), QuantSpec(), omniquant=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": -1}, "epochs: -1 is not an integer from 0 to 10000"),
        ({"batch": 0}, "batch: 0 is not an integer from 1 to 100000"),
        ({"clip_lr": 0.0}, "clip_lr: 0.0 is not a number above 0 and at most 1"),
        ({"transform_lr": -1.0}, "transform_lr: -1.0 is not a number above 0 and at most 1"),
        ({"clip_lr": 1e38}, "clip_lr: 1e[+]38 is not a number above 0 and at most 1"),
        ({"alpha": 2.0}, "alpha: 2.0 is not a number from 0 to 1"),
    ],
)
def test_settings_are_checked(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^method.options.omniquant.{said}$"):
        Settings(**changes)

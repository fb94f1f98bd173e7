"""Who judges the images of a model that was trained here: an extractor, a reference, and names.

    | data set      | extractor                     | against                       | figures     |
    | ------------- | ----------------------------- | ----------------------------- | ----------- |
    | fashion_mnist | the classifier that ships     | the training set              | fid, ...    |
    | tiny_imagenet | EfficientNet-Lite0 (ImageNet) | the 10,000 validation images  | lite0_fid,  |
    |               |                               |                               | lite0_top1  |

Top-1 is class fidelity: the share of images whose most probable class, among the 200 of ImageNet
that Tiny-ImageNet has, is the one asked for. Lite0 has 1,280 features and judges neither sFID nor
precision and recall in a run; `experiments.evaluate extractor=lite0` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.data import tiny_imagenet
from experiments.evaluate.evaluator import Target, class_agreement
from experiments.evaluate.extractors import fashion, lite0
from experiments.evaluate.extractors.base import Extractor
from experiments.evaluate.features import Features
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import image_metrics, pool_distance
from models import registry
from models.preset import Preset
from models.weights.checkpoints import CheckpointError

NATURAL = "tiny_imagenet"
NATURAL_REFERENCE = "natural_reference.safetensors"


@dataclass(frozen=True)
class Judge:
    """What scores images of a data set.

    Attributes:
        target: what they are compared with.
        prefix: of the figures' names.
        agreement: name of the share of images of the class asked for.
        classes: numbers of the data set's classes among the extractor's; None if they are all.
        keeps_all: whether features of quantized runs are kept, too.
    """

    extractor: Extractor
    target: Target
    prefix: str = ""
    agreement: str = "agreement"
    classes: Sequence[int] | None = None
    keeps_all: bool = True

    def score(self, features: Features, labels: Tensor) -> dict[str, float]:
        """All figures of features of images whose classes are `labels` (N,)."""
        scores = image_metrics(features, self.target)
        scores["agreement"] = class_agreement(self.predict_classes(features), labels)
        return self.name_figures(scores)

    def predict_classes(self, features: Features) -> Tensor:
        """The most probable class (N,) of the data set."""
        logits = features.logits
        if self.classes is not None:
            logits = logits[:, list(self.classes)]  # (N, classes of the data set)
        return logits.argmax(dim=1)

    def compare(self, features: Features, theirs: Features) -> dict[str, float]:
        """The Frechet distance from full precision's images."""
        return self.name_figures({"fid2fp": pool_distance(features, theirs)})

    def name_figures(self, scores: dict[str, float | None]) -> dict[str, float]:
        """Figures under their names in tables; those that are not judged are left out."""
        named = {}
        for name, value in scores.items():
            if value is not None:
                label = self.agreement if name == "agreement" else name
                named[f"{self.prefix}{label}"] = value
        return named

    @property
    def classifier(self) -> fashion.ClassifierExtractor | None:
        """The extractor, if its maps compare images pair by pair."""
        is_shipped = isinstance(self.extractor, fashion.ClassifierExtractor)
        return self.extractor if is_shipped else None


def find_judge(preset: Preset, device: torch.device) -> Judge | None:
    """Who judges a model's images; None for released models, whose images `evaluate` judges.

    Raises:
        CheckpointError: weights or reference are missing or damaged.
    """
    if preset.dataset == NATURAL:
        return open_natural_judge(device)
    if preset.image_size != fashion.SIZE:
        return None
    extractor = fashion.load_classifier(registry.shipped_file("extractor.safetensors"), device)
    path = registry.shipped_file("reference.safetensors")
    return Judge(extractor, Reference.load(path, extractor.digest).target())


def open_natural_judge(device: torch.device) -> Judge:
    """Lite0 against the validation images of Tiny-ImageNet.

    Raises:
        CheckpointError: its package or the reference is missing; says how to get it.
    """
    path = registry.shipped_file(NATURAL_REFERENCE)
    if not path.is_file():
        raise CheckpointError(
            f"reference: {path} is missing; python -m experiments.train_zoo model=natural_reference"
            " makes it"
        )
    extractor = lite0.load_lite0(None, device)
    target = Reference.load(path, extractor.digest).target()
    return Judge(
        extractor,
        replace(target, spatial=None, manifold=None),
        prefix="lite0_",
        agreement="top1",
        classes=tiny_imagenet.imagenet_classes(),
        keeps_all=False,
    )

"""The feature extractor of the small-image metrics: a Fashion-MNIST classifier behind
torch-fidelity's interface.

Inception features say little about 32x32 grey images, and their weights cannot ship here. A
residual network of 0.3M parameters, trained by `train_classifier` and shipped as
`models/zoo/extractor.safetensors`, takes Inception's place:

    | layer   | shape  | what                                                 | read by               |
    | pool    | (128,) | spatial mean of the last stage                       | FID, precision/recall |
    | logits  | (10,)  | class scores                                         | Inception score       |
    | spatial | (448,) | first 7 channels of the middle stage, 8 x 8 x 7      | sFID                  |

`spatial` takes 7 channels of an intermediate map in (height, width, channel) order, as ADM's
evaluator does with 17 x 17 x 7 of Inception's `mixed_6` (Nash et al., 2021; Dhariwal and Nichol,
2021). Values of such metrics compare only with values of the same extractor, never with those of
Inception.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.torchvision_shim import ensure_torchvision
from models.weights import checkpoints, digests
from ptq.types import ConfigError

ensure_torchvision()
from torch_fidelity import register_feature_extractor  # noqa: E402
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # noqa: E402
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402

SIZE = 32
CLASSES = 10
SPATIAL_CHANNELS = 7
LAYERS = {"pool": 128, "logits": CLASSES, "spatial": SPATIAL_CHANNELS * 8 * 8}  # name: length
LAYER_OF_METRIC = {"isc": "logits", "fid": "pool", "kid": "pool", "prc": "pool"}


class ResidualBlock(nn.Module):
    """relu(skip(x) + norm(conv(relu(norm(conv(x)))))): (B, C, H, W) -> (B, D, H/stride, W/stride)
    (He et al., 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + y)


class Classifier(nn.Module):
    """Residual network for images (B, 3, 32, 32) in [-1, 1]: stages of 32, 64, 128 channels at 16,
    8, 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.stage1 = nn.Sequential(ResidualBlock(32, 32, 2), ResidualBlock(32, 32, 1))
        self.stage2 = ResidualBlock(32, 64, 2)
        self.stage3 = ResidualBlock(64, LAYERS["pool"], 2)
        self.head = nn.Linear(LAYERS["pool"], CLASSES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps after stem and stages: 32 channels at 32 and at 16 pixels, 64 at 8, 128 at 4."""
        found = [self.stem(x)]
        for stage in (self.stage1, self.stage2, self.stage3):
            found.append(stage(found[-1]))
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The middle stage's map (B, 64, 8, 8), pooled features (B, 128) and logits (B, 10)."""
        _, _, middle, last = self.maps(x)
        pooled = last.mean(dim=(2, 3))
        return middle, pooled, self.head(pooled)


def as_input(images: Tensor) -> Tensor:
    """uint8 images to the classifier's range: 0 .. 255 -> -1 .. 1."""
    return images.float() / 127.5 - 1


class Extractor(FeatureExtractorBase):
    """What the extractors share: three layers, `pool`, `logits` and `spatial`, of which
    torch-fidelity asks for some.

    Attributes:
        digest: first 16 hex digits of the weights' sha256. image_size: the side it takes, None for
            any.
    """

    digest: str
    image_size: int | None = None

    def chosen(self, pool: Tensor, logits: Tensor, spatial: Tensor) -> tuple[Tensor, ...]:
        """The requested layers, in the order of the request."""
        layers = {"pool": pool, "logits": logits, "spatial": spatial}
        return tuple(layers[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return tuple(LAYERS)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER_OF_METRIC[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class ClassifierExtractor(Extractor):
    """The classifier as torch-fidelity wants it: uint8 (B, 3, 32, 32) in, a tuple of the requested
    layers out.

    `register` derives one class per weights file from this one, which fills in `source`; `digest`
    identifies the weights. torch-fidelity passes all of its settings to the constructor; none of
    the others matters here.
    """

    source: Path | None = None
    image_size: int | None = SIZE

    def __init__(
        self,
        name: str,
        features_list: list[str] | tuple[str, ...],
        feature_extractor_weights_path: str | Path | None = None,
        **_: object,
    ) -> None:
        super().__init__(name, features_list)
        path = feature_extractor_weights_path or self.source
        if path is None:
            raise ConfigError(
                "feature_extractor_weights_path: None is not the path of a classifier's weights"
            )
        path = Path(path)
        self.net = Classifier()
        checkpoints.load_into(self.net, checkpoints.read_checkpoint(path), str(path))
        self.digest = digest_of(path)
        if name != name_of(self.digest):
            raise ConfigError(
                f"extractor: {path} has changed: it was registered as {name}, now {name_of(self.digest)}"
            )
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE):
            raise ConfigError(
                f"images: {images.dtype} {tuple(images.shape)} is not torch.uint8 (B, 3, {SIZE}, {SIZE})"
            )
        middle, pooled, logits = self.net(as_input(images))
        # (B, 7, 8, 8) -> (B, 8 * 8 * 7)
        spatial = middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return self.chosen(pooled, logits, spatial)


def digest_of(path: str | Path) -> str:
    """sha256 (16 hex digits) of a weights file: the identity of an extractor.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    return digests.file_digest(Path(path))[:16]


def name_of(digest: str) -> str:
    """The registered name of the extractor with these weights; torch-fidelity's caches are keyed by
    it."""
    return f"ar-ptq-classifier-{digest}"


def register(path: str | Path) -> str:
    """Make a weights file known to torch-fidelity; returns the extractor's name.

    The name holds the file's digest, so other weights get another name (torch-fidelity caches
    features by name alone). Registering the same contents again, also from another place, only
    updates the place.
    """
    name = name_of(digest_of(path))
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(
            name, type("RegisteredClassifierExtractor", (ClassifierExtractor,), {})
        )
    FEATURE_EXTRACTORS_REGISTRY[name].source = Path(path).absolute()
    return name


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> ClassifierExtractor:
    """The registered extractor of a weights file with all layers, on `device`.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    name = register(path)
    return FEATURE_EXTRACTORS_REGISTRY[name](name, tuple(LAYERS)).to(device)


def augment_images(images: Tensor, flip: Tensor, offset: Tensor, reach: int) -> Tensor:
    """Mirror the images (B, C, H, W) where `flip` (B,) is true and move them by `offset` (B, 2)
    pixels within +-reach.

    What moves in from outside is zero, the images' background.
    """
    batch, channels, height, width = images.shape
    index = {"device": images.device}
    # (B, H), rows of the padded images
    rows = torch.arange(height, **index) + reach + offset[:, :1]
    columns = torch.arange(width, **index).expand(batch, -1)
    # (B, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + reach + offset[:, 1:]
    padded = F.pad(images, (reach, reach, reach, reach))
    samples = torch.arange(batch, **index)
    planes = torch.arange(channels, **index)
    return padded[
        samples[:, None, None, None],
        planes[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@torch.no_grad()
def classifier_accuracy(
    model: Classifier, images: Tensor, labels: Tensor, batch: int = 1000
) -> float:
    """Share of uint8 images (N, 3, 32, 32) whose class (N,) is the model's first choice; all on the
    model's device."""
    hits = [
        (model(as_input(x))[2].argmax(1) == y).sum()
        for x, y in zip(images.split(batch), labels.split(batch))
    ]
    return torch.stack(hits).sum().item() / len(labels)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged parameters and buffers towards the model's."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 15,
    batch: int = 256,
    lr: float = 0.2,
    weight_decay: float = 5e-4,
    ema: float = 0.998,
    reach: int = 2,
    seed: int = 0,
    log: Callable[[Mapping[str, float], int], None] = lambda figures, step: None,
) -> tuple[Classifier, float]:
    """Train the classifier on uint8 images (N, 3, 32, 32) and labels (N,), on the device where they
    lie.

    SGD with Nesterov momentum, one cycle of the learning rate, cross-entropy, random mirroring and
    shifts up to `reach` pixels, and an exponential moving average of weights and normalisation
    statistics. All randomness comes from `seed` and is drawn on the CPU; the caller's random state
    stays as it was. `log(figures, step)` is called per epoch.

    Returns:
        the averaged model in eval mode, and its accuracy on the test images.
    """
    if len(images) < 2 or len(images) != len(labels):
        raise ConfigError(
            f"images: {len(images)} images with {len(labels)} labels, expected 2 or more, and as many"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    model.to(images.device)
    average = copy.deepcopy(model).eval()
    draw = torch.Generator().manual_seed(seed)
    batch = min(batch, len(images))
    per_epoch = len(images) // batch
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * per_epoch + 1, pct_start=0.2
    )
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=draw)[: per_epoch * batch].view(
            per_epoch, batch
        )
        flips = torch.rand(per_epoch, batch, generator=draw) < 0.5
        offsets = torch.randint(-reach, reach + 1, (per_epoch, batch, 2), generator=draw)
        total = torch.zeros((), device=images.device)
        for index, flip, offset in zip(*(t.to(images.device) for t in (order, flips, offsets))):
            x = as_input(augment_images(images[index], flip, offset, reach))
            loss = F.cross_entropy(model(x)[2], labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            # short memory while there is little to remember
            _update_average(average, model, min(ema, step / (step + 9)))
            total += loss.detach()
        log(
            {
                "loss": total.item() / per_epoch,
                "test_accuracy": classifier_accuracy(average, test_images, test_labels),
            },
            step,
        )
    return average, classifier_accuracy(average, test_images, test_labels)

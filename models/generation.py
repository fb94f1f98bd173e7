"""Images for class labels: what all generators have in common, whatever their family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.choices import describe_unknown
from models.preset import Preset
from models.settings import require_setting

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUTS = ("pil", "tensor")


class ImageGenerator:
    """Base of the families' generators.

    Attributes:
        quantization: what `ptq.quantize` made of the model, None as long as it is not quantized.
    """

    preset: Preset
    transformer: nn.Module
    tokenizer: nn.Module
    quantization: object | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.tokenizer.parameters()).device

    @torch.no_grad()
    def sample_images(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] of class labels (B,); arguments as for `sample`."""
        return self.decode(self.sample(labels, seed, index, settings))

    def generate(
        self,
        labels: Sequence[int] | Tensor,
        seed: int = 0,
        *,
        sampler: str = "official",
        output: str = "pil",
        batch: int = 64,
        progress: Callable[[Iterable], Iterable] = lambda batches: batches,
        **settings: object,
    ) -> list[Image] | Tensor:
        """Images of class labels.

        Image i draws from random numbers of (seed, i) alone. Images are the same bits for equal
        labels, seed, batch, device, versions and number of threads.

        Args:
            labels: one class for every image.
            sampler: settings to begin with, a name of `preset.samplers`.
            output: `pil`, a list of pictures, or `tensor`, (N, 3, S, S) in [0, 1].
            batch: images sampled together, at most.
            progress: wraps the list of batches, as `tqdm` does.
            settings: of the sampler, in place of those of its name (`temperature=0.9`).

        Raises:
            ValueError: a label, seed, sampler, output, batch or setting is not allowed, or a part
                of the model has no weights; one line.
        """
        self._require_weights()
        classes = _checked_labels(labels, self.preset.classes)
        _require_choice("sampler", sampler, self.preset.samplers)
        _require_choice("output", output, OUTPUTS)
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative, allowed are integers from 0")
        if batch < 1:
            raise ValueError(f"batch: {batch} is not a positive number of images")
        chosen = dict(self.preset.samplers[sampler])
        for name, value in settings.items():
            require_setting(name, value, self.preset)
            chosen[name] = value

        parts: list[Tensor] = []
        for index in progress(torch.arange(len(classes)).split(batch)):  # (B,) each
            own_labels = classes[index].to(self.device)
            parts.append(self.sample_images(own_labels, seed, index, chosen).cpu())
        images = torch.cat(parts).clamp(0, 1)  # (N, 3, S, S)
        return images if output == "tensor" else as_pictures(images)

    def _require_weights(self) -> None:
        """Refuse an outline that was not filled, or has no tokenizer.

        Raises:
            ValueError: a part has no memory for its weights.
        """
        advice = {
            "transformer": "ptq.load(FOLDER, model) fills it",
            "tokenizer": "models.outline(NAME, tokenizer=True) loads it",
        }
        for part, remedy in advice.items():
            if any(weight.is_meta for weight in getattr(self, part).parameters()):
                raise ValueError(f"model: its {part} has no weights, {remedy}")


def as_pictures(images: Tensor) -> list[Image]:
    """Images (N, 3, S, S) in [0, 1] as pictures of 8 bits, rounded to nearest."""
    from PIL import Image

    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (N, S, S, 3)
    return [Image.fromarray(picture) for picture in pixels]


def _checked_labels(labels: Sequence[int] | Tensor, classes: int) -> Tensor:
    """Labels (N,) int64.

    Raises:
        ValueError: there are none, or one is no class.
    """
    try:
        given = torch.as_tensor(labels).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"labels: {labels!r} is no list of classes from 0 to {classes - 1}"
        ) from error
    if not len(given):
        raise ValueError("labels: [] asks for no image, give one class for every image")
    for label in given.tolist():
        if not isinstance(label, int) or not 0 <= label < classes:
            raise ValueError(f"labels: {label!r} is not a class from 0 to {classes - 1}")
    return given.long()


def _require_choice(noun: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(describe_unknown(noun, value, allowed))

"""What is measured of a run's model: held-out likelihoods, images, bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.config.schema import RunConfig
from experiments.evaluate import judges, likelihood, paired
from experiments.evaluate.features import Features
from experiments.evaluate.held_out import encode_held_out
from experiments.evaluate.judges import Judge
from experiments.evaluate.small_images import extract_features
from experiments.images.microbatches import Plan, sampled_tokens
from experiments.plotting.grids import image_grid
from experiments.run.preparation import Run
from experiments.store import files
from models.registry import Generator
from ptq.files import read_tensors, write_tensors
from ptq.modules import QuantLinear
from ptq.pipeline import Track
from ptq.registry.entries import FORMATS
from ptq.staq.positions import TableQuantizer

FLOAT_BYTES = 4  # of a scale in float32


def score_held_out(
    generator: Generator,
    original: Generator,
    config: RunConfig,
    device: torch.device,
    named: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """NLL on held-out tokens, and KL to full precision unless the model is it.

    Args:
        named: tokens of images that the user has named; left out, those that ship with a twin.

    Returns:
        Nothing for a released model without named images.

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    held_out = named or likelihood.load_held_out(generator.preset, config.eval.sequences)
    if held_out is None:
        return {}
    tokens = held_out["tokens"].to(device)  # (n, L) ids or (n, L, D) latents
    labels = held_out["labels"].to(device)  # (n,)
    compared = None if original is generator else original
    return likelihood.score_likelihood(generator, tokens, labels, config.eval.batch, compared)


def named_tokens(run: Run, track: Track) -> dict[str, Tensor] | None:
    """Tokens of the held-out images that the user has named, if there are some."""
    if run.held_out is None:
        return None
    runs = Path(run.config.runs)
    return encode_held_out(run.generator, run.held_out, run.tokenizer_digest, runs, track)


@dataclasses.dataclass(frozen=True)
class FullPrecision:
    """What the full-precision run left: images (N, 3, S, S), and tokens (N, T) if it has any."""

    folder: Path
    images: np.ndarray
    tokens: np.ndarray | None

    @classmethod
    def load(cls, folder: Path) -> FullPrecision:
        """Raises: DamagedFile: the images cannot be read."""
        arrays = files.read_arrays(folder / "samples.npz", "arr_0", "tokens")
        images = arrays["arr_0"].transpose(0, 3, 1, 2)  # (N, 3, S, S)
        return cls(folder, images, arrays.get("tokens"))


def score_images(run: Run, images: np.ndarray, plan: Plan) -> dict[str, float]:
    """Image metrics against real images and the full-precision ones.

    Leaves images, grid and features in the run's folder.
    """
    tokens = sampled_tokens(plan, run.folder / "shards")
    save_images(images, run.folder / "samples.npz", tokens)
    reference = FullPrecision.load(run.reference) if run.config.method.quantized else None
    write_grid(run, images, reference)
    judge = judges.find_judge(run.preset, run.device)
    scores: dict[str, float] = {}
    if reference is not None:
        scores["token_agreement"] = paired.token_agreement(tokens, reference.tokens)
        # where the sets are split into chunks of `eval.batch` images
        cuts = range(run.config.eval.batch, plan.images, run.config.eval.batch)
        scores |= paired.compare_images(
            np.split(images, cuts),
            np.split(reference.images, cuts),
            None if judge is None else judge.classifier,
            run.device,
        )
    # a covariance needs two images
    if judge is not None and plan.images > 1:
        scores |= score_features(run, images, plan, judge, reference)
    return scores


def write_grid(run: Run, images: np.ndarray, reference: FullPrecision | None) -> None:
    """Draw the run's images, beside those of full precision."""
    panels = {} if reference is None else {"fp": reference.images}
    panels[run.config.method.name] = images
    image_grid(panels, run.folder / "grid.png")


def score_features(
    run: Run,
    images: np.ndarray,
    plan: Plan,
    judge: Judge,
    reference: FullPrecision | None,
) -> dict[str, float]:
    """Metrics of the judge's features, which are kept for the runs compared with this one."""
    features = extract_features(torch.from_numpy(images), judge.extractor, 256, run.device)
    if judge.keeps_all or reference is None:
        write_tensors(dataclasses.asdict(features), run.folder / "features.safetensors")
    labels = torch.arange(plan.images) % plan.classes  # (N,)
    scores = judge.score(features, labels)
    if reference is not None:
        # kept by that run: its images are not gone through again
        # runs of earlier versions left features without a digest
        kept, _ = read_tensors(reference.folder / "features.safetensors", sealed=False)
        scores |= judge.compare(features, Features(**kept))
    return scores


def save_images(images: np.ndarray, path: Path, tokens: np.ndarray | None) -> None:
    """uint8 images (N, 3, S, S) as `arr_0` (N, S, S, 3) of an npz, as the ADM evaluator reads them,
    and `tokens`."""
    arrays = {"arr_0": images.transpose(0, 2, 3, 1)}
    if tokens is not None:
        arrays["tokens"] = tokens
    files.save_arrays(arrays, path)


def weight_bytes(linear: QuantLinear, bits: int) -> int:
    """Bytes of a rounded weight at rest, with its scales and zero points.

    Args:
        bits: of its codes, where the linear does not say.
    """
    spec = linear.weight_spec
    codes = linear.weight.numel() * (bits if spec is None else spec.bits) // 8
    return codes + scale_bytes(linear)


def scale_bytes(linear: QuantLinear) -> int:
    """Bytes of the scales and zero points of a weight, none of one that is left as it is."""
    spec = linear.weight_spec
    params = linear.weight_params
    if params is None:
        return 0
    if spec is None or spec.format == "int":
        return params.pair_bytes * len(params.scale)
    number_format = FORMATS[spec.format]
    whole = FLOAT_BYTES if number_format.tensor_scale else 0
    return number_format.scale_bytes * len(params.scale) + whole


def model_bytes(transformer: nn.Module, config: RunConfig) -> int:
    """Bytes of the transformer at rest.

    Codes at their bit width, 8 bytes per scale and zero point of a row or of a group, 4 where both
    are short (`CompactQParams`), of formats without zero points what a scale takes, 2 per number of
    a low-rank branch (whose `down` linears of one site share), the rest as it is, online transforms
    and vectors of sinks included.
    """
    total = 0
    counted = set()  # addresses of weights and branches
    for module in transformer.modules():
        if isinstance(module, TableQuantizer):
            total += module.table_bytes
            counted |= {buffer.data_ptr() for buffer in module.table}
        if not isinstance(module, QuantLinear):
            continue
        if module.weight_params is not None:
            counted.add(module.weight.data_ptr())
            total += weight_bytes(module, config.quant.weights.bits)
        for part in (module.down, module.up):
            if part is not None and part.data_ptr() not in counted:
                counted.add(part.data_ptr())
                total += 2 * part.numel()
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if tensor.data_ptr() not in counted:
            total += tensor.numel() * tensor.element_size()
    return total

"""What is measured of a cell's model: held-out likelihoods, images against real and full-precision
ones, bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.config.schema import RunConfig
from experiments.evaluate import likelihood, paired
from experiments.evaluate.evaluator import class_agreement
from experiments.evaluate.extractors import fashion
from experiments.evaluate.features import Features
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import extract_features, image_metrics, pool_distance
from experiments.images.microbatches import Plan, sampled_tokens
from experiments.plotting.grids import image_grid
from experiments.run.preparation import Run
from experiments.store import files
from models import registry
from models.registry import Generator
from ptq.modules import QuantLinear


def score_held_out(
    generator: Generator, reference: Generator, config: RunConfig, device: torch.device
) -> dict[str, float]:
    """NLL, and KL to full precision unless the model is it, on held-out tokens; nothing but for
    twins.

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    stored = likelihood.load_held_out(generator.preset, config.eval.sequences)
    if stored is None:
        return {}
    tokens, labels = (stored[k].to(device) for k in ("tokens", "labels"))
    return likelihood.score_likelihood(
        generator, tokens, labels, config.eval.batch, None if reference is generator else reference
    )


def score_images(cell: Run, images: np.ndarray, plan: Plan) -> dict[str, float]:
    """Image metrics against the training set and against the full-precision images; grid and
    features on disk."""
    tokens = sampled_tokens(plan, cell.folder / "shards")
    save_images(images, cell.folder / "samples.npz", tokens)
    panels = {cell.config.method.name: images}
    found = {}
    fp_folder = cell.reference if cell.config.method.quantized else None
    if fp_folder is not None:
        with np.load(fp_folder / "samples.npz") as stored:
            fp_images = stored["arr_0"].transpose(0, 3, 1, 2)
            fp_tokens = stored.get("tokens")
        panels = {"fp": fp_images, **panels}
        found["token_agreement"] = paired.token_agreement(tokens, fp_tokens)
    image_grid(panels, cell.folder / "grid.png")
    known = cell.generator.preset.image_size == fashion.SIZE  # to the shipped extractor
    net = (
        fashion.load_classifier(registry.ZOO / "extractor.safetensors", cell.device)
        if known
        else None
    )
    if fp_folder is not None:
        parts = range(cell.config.eval.batch, plan.images, cell.config.eval.batch)
        found |= paired.compare_images(
            np.split(images, parts), np.split(fp_images, parts), net, cell.device
        )
    if plan.images < 2 or net is None:
        return found
    features = extract_features(torch.from_numpy(images), net, 256, cell.device)
    files.save_tensors(dataclasses.asdict(features), cell.folder / "features.safetensors")
    found |= image_metrics(
        features, Reference.load(registry.ZOO / "reference.safetensors", net.digest)
    )
    labels = torch.arange(plan.images) % plan.classes
    found["agreement"] = class_agreement(features.logits.argmax(dim=1), labels)
    if fp_folder is not None:
        found["fid2fp"] = pool_distance(
            features, Features(**load_file(fp_folder / "features.safetensors"))
        )
    return found


def save_images(images: np.ndarray, path: Path, tokens: np.ndarray | None) -> None:
    """uint8 images (N, 3, S, S) as `arr_0` (N, S, S, 3) of an npz, as the ADM evaluator reads them,
    and `tokens`."""
    arrays = {"arr_0": images.transpose(0, 2, 3, 1)}
    if tokens is not None:
        arrays["tokens"] = tokens
    files.save_arrays(arrays, path)


def model_bytes(transformer: nn.Module, config: RunConfig) -> int:
    """Bytes of the transformer at rest.

    Codes at their bit width, 8 bytes per scale and zero point, 2 per number of a low-rank branch
    (whose `down` linears of one site share), the rest as it is, online transforms included.
    """
    total = 0
    counted = set()
    for module in transformer.modules():
        if isinstance(module, QuantLinear):
            counted.add(module.weight.data_ptr())
            total += module.weight.numel() * config.quant.weights.bits // 8 + 8 * len(
                module.weight_params.scale
            )
            for part in (module.down, module.up):
                if part is not None and part.data_ptr() not in counted:
                    counted.add(part.data_ptr())
                    total += 2 * part.numel()
    rest = [
        p
        for p in (*transformer.parameters(), *transformer.buffers())
        if p.data_ptr() not in counted
    ]
    return total + sum(p.numel() * p.element_size() for p in rest)

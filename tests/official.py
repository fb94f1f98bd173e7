"""Made-up files in the place of official ones: weights under the authors' file names, with what
their scripts saved around them; Inception's weights; ADM's reference batch.

    python -m tests.official FOLDER rar_b var_d16     # all that tables of these models need
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import models
from experiments.evaluate.extractors import inception
from experiments.speed.random_models import fill_randomly
from models import registry
from models.torchvision_shim import ensure_torchvision
from models.weights.digests import file_digest

ARGS = argparse.Namespace(lr=1e-4, epochs=800, output_dir="out", distributed=True)
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}},
    "param_groups": [{"params": [0]}],
}


def wrapped(family: str, part: str, state: dict[str, Tensor]) -> object:
    """The object that the authors' training scripts saved."""
    if family in ("par", "llamagen"):
        return {"model": state, "optimizer": OPTIMIZER, "steps": 450_000, "args": ARGS}
    if family == "mar" and part == "transformer":
        unaveraged = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}
        return {
            "model": unaveraged,
            "model_ema": state,
            "optimizer": OPTIMIZER,
            "epoch": 799,
            "scaler": {"scale": 65536.0},
            "args": ARGS,
        }
    if family == "mar":
        return {"model": {**state, "loss.logvar": torch.zeros(())}}
    return state


def save_official(name: str, part: str, module: nn.Module, folder: Path) -> Path:
    """Write a module (`transformer` or `tokenizer` of a preset) as its official file; returns the
    path."""
    path = folder / Path(registry.source_of(name, part).file).name
    torch.save(wrapped(registry.find_preset(name).family, part, module.state_dict()), path)
    return path


def save_released(name: str, folder: Path) -> None:
    """Write made-up weights of a released model as its two official files, in fp16."""
    model = models.build(name)
    for part in registry.PARTS:
        save_official(name, part, fill_randomly(getattr(model, part)).half(), folder)


def save_inception(folder: Path) -> Path:
    """Write weights of Inception's shapes, such that activations neither vanish nor explode.

    Their name carries the first digits of their hash, as the official one's does.
    """
    ensure_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    network = theirs.FeatureExtractorInceptionV3
    with (  # their constructor wants a file
        mock.patch.object(theirs.torch, "load", return_value={}),
        mock.patch.object(network, "load_state_dict", return_value=None),
    ):
        state = network("inception-v3-compat", ["2048"], "none").state_dict()
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.ndim == 4:
            fan_in = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
        elif value.is_floating_point():
            value.add_(0.1 * torch.rand(value.shape, generator=generator))
    path = folder / "state.pth"
    torch.save(state, path)
    return path.rename(folder / f"weights-made-up-{file_digest(path)[:8]}.pth")


def save_reference(path: Path, images: int = 16, size: int = 256) -> Path:
    """Write a reference batch as ADM's: made-up statistics of Inception's features, and images."""
    draws = np.random.default_rng(0)
    arrays = {}
    for layer, (mean, covariance) in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        length = inception.LAYERS[layer]
        arrays[mean] = draws.normal(size=length)
        arrays[covariance] = np.diag(draws.uniform(0.5, 1.5, length))
    arrays["arr_0"] = draws.integers(256, size=(images, size, size, 3), dtype=np.uint8)
    np.savez(path, **arrays)
    return path


def main(folder: Path, names: list[str]) -> None:
    """Write all that tables of the named models need."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        # some authors' files of several models bear one name
        (folder / name).mkdir(exist_ok=True)
        save_released(name, folder / name)
    print(f"inception={save_inception(folder)}")
    print(f"reference={save_reference(folder / 'reference.npz')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

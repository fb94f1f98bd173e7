"""Reference facts: the deterministic weight fill, the inputs, and the comparison, as the official
code was run with.

`tests/golden/*.npz` hold outputs of the official repositories on made-up weights; nothing in them
is trained. A float entry `name` may be a strided sample of the tensor: `name@shape`, `name@stats`
(mean, std, absmax) and `name@stride` describe the whole.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
_HALF_SCALE = (
    "class_emb.weight",
    "lvl_embed.weight",
    "pos_start",
    "pos_1LC",
    "quantize.embedding.weight",
    "embeddings.weight",
    "embedding_table.weight",
    "cls_token",
    "mask_token",
    "pos_embed",
    "pos_embed_learned",
    "timesteps_embeddings",
    "fake_latent",
)


def _draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers of mean 0 and variance 1 from a seed that is the key's checksum."""
    u = np.random.RandomState(zlib.crc32(key.encode())).random_sample(int(np.prod(shape)))
    return ((2 * u - 1) * np.sqrt(3)).reshape(shape)


@torch.no_grad()
def fill(model: nn.Module, salt: str = "") -> nn.Module:
    """Give every parameter its made-up value (buffers keep theirs) and switch to eval mode."""
    for key, parameter in model.named_parameters():
        z = _draw(salt + key, tuple(parameter.shape))
        if key.endswith("scale_mul_1H11"):
            z = 2 + 2 * z
        elif key.endswith(_HALF_SCALE):
            z = 0.5 * z
        elif parameter.ndim >= 2:
            z = z / np.sqrt(np.prod(parameter.shape[1:]))
        elif key.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.05 * z
        parameter.copy_(torch.from_numpy(z.astype(np.float32)))
    return model.eval()


def made_up(name: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """A made-up float input."""
    return torch.from_numpy(_draw(salt + "input:" + name, shape).astype(np.float32))


def made_up_ints(name: str, shape: tuple[int, ...], high: int, salt: str = "") -> Tensor:
    """Made-up integers in [0, high)."""
    seed = zlib.crc32((salt + "int:" + name).encode())
    u = np.random.RandomState(seed).random_sample(int(np.prod(shape)))
    return torch.from_numpy(np.floor(u * high).astype(np.int64).reshape(shape))


class Golden:
    """One npz of reference outputs."""

    def __init__(self, name: str) -> None:
        self.data = np.load(GOLDEN / f"{name}.npz")

    def __contains__(self, name: str) -> bool:
        return name in self.data.files

    def __getitem__(self, name: str) -> Tensor:
        value = torch.from_numpy(self.data[name])
        return value.long() if value.dtype == torch.int32 else value

    def error(self, name: str, value: Tensor) -> float:
        """Largest difference from the reference, relative to the reference's absolute maximum."""
        reference = self.data[name].reshape(-1)
        flat = value.detach().double().reshape(-1).numpy()
        absmax = np.abs(reference).max()
        if f"{name}@shape" in self.data.files:
            assert tuple(self.data[f"{name}@shape"]) == tuple(value.shape), (
                f"{name}: shape {tuple(value.shape)}"
            )
            absmax = self.data[f"{name}@stats"][2]
        if f"{name}@stride" in self.data.files:
            flat = flat[:: int(self.data[f"{name}@stride"])]
        return float(np.abs(flat - reference).max() / max(absmax, 1e-30))

    def check(self, name: str, value: Tensor, tolerance: float = 2e-5) -> None:
        """Floats within `tolerance` of the absolute maximum, integers exact."""
        if not value.is_floating_point():
            assert torch.equal(value.long(), self[name].long()), name
        else:
            error = self.error(name, value)
            assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def released_keys(name: str) -> dict[str, list[int]]:
    """State-dict keys and shapes of a released checkpoint, in file order."""
    return json.loads((GOLDEN / "keys" / f"{name}.json").read_text())["keys"]

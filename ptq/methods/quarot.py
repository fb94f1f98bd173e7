"""QuaRot (Ashkboos et al., 2024, arXiv 2404.00456): rotate activations before quantizing.

    x' = x R,   W' = W R,   y = Q(x') Q(W')^T + b,   R R^T = I

An outlier channel becomes a small part of all channels (`hadamard.py`); no calibration is needed. A
rotation costs nothing where what writes x takes it over (offline); elsewhere it runs in front of
the quantizer (online).

    what                        offline where exact                online elsewhere
    qkv, fc1, head inputs (R1)  PAR, MAR: the residual stream      VAR, RAR: AdaLN's scale(c) and
                                                                   gate(c) are in the way
    V -> proj input (R2)        all: each head by H_d, rows of V   the rest of the way to a rotation
                                and columns of proj                of all heads (`AcrossHeads`)
    q, k (R3)                   VAR (unit vectors), MAR (no norm)  RAR (LayerNorm), PAR (rotary
                                                                   embedding)
    fc2, AdaLN inputs (R4)      nowhere: GELU, SwiGLU, SiLU        all

The residual stream h of L blocks becomes h R for good:

    PAR   h = E + sum_l f_l(w_l * h / rms(h)).  Norm weights move into the readers,
          W <- W diag(w) R; writers and embeddings get W <- R^T W, E <- E R; rms(h R) = rms(h).
    MAR   LayerNorm also subtracts the mean. Each writer does so beforehand,
          W <- R^T (I - 11^T / C) W, so that an RMS norm (same epsilon) takes the LayerNorm's place,
          weight and bias having moved into the readers. The encoder's stream starts at a LayerNorm,
          whose output is centred and rotated online; the decoder's ends at one whose output is
          added to a position embedding, and is rotated back in front of it. The norm between the
          two feeds a linear, a reader of the first stream and a writer of the second.

Offline rotations are made wherever the adapter has them (`Adapter.rotations`), the sites of the
options are those that are rotated online. Diagonal steps of a recipe come after the offline
rotations: at readers of a rotated stream (PAR, MAR) they scale mixed channels, at all other sites
the model's own, before an online rotation. Random signs, with which no simple pattern of channels
adds up in one place, are free in the residual stream, and there alone.

Official code and paper. spcl/QuaRot: dynamic per-token symmetric activations, symmetric weights,
GPTQ or round to nearest, the head in full precision; R3 when keys are quantized, as they are here
with the products in scope. A rotation's weight side and activation side are built apart there and
disagree for 20 heads; sizes without a table fail. PTQ4ARVG runs every rotation online (Table 7) and
leaves PAR out, because its numbers of heads are no powers of two; PAR has the most exact offline
rotations of all four families.

Static per-tensor quantization gains little: a rotation spreads a channel over channels, never a
token over tokens, so a sink token sets the range as before. A constant offset of all tokens rotates
into a few large channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq import folding
from ptq.methods.hadamard import AcrossHeads, HadamardRotation
from ptq.methods.solver import Problem
from ptq.modules import swap_module
from ptq.options import SITES, Settings, setting
from ptq.ranges import Flag
from ptq.registry.entries import register_settings, register_transform
from ptq.sites import Adapter, HeadRotation, MatMulSite, StreamRotation
from ptq.transform import InputTransform

SEED = 0  # of the residual stream's signs


@register_settings("hadamard")
@dataclass(frozen=True)
class HadamardSettings(Settings):
    """QuaRot's rotations.

    Attributes:
        sites: whose inputs are rotated online.
        offline: rotate for good wherever that is exact, whatever the site, and online only what is
            left.
    """

    sites: tuple[str, ...] = setting(("qkv", "proj", "fc1", "fc2", "head", "adaln"), SITES)
    offline: bool = setting(True, Flag())


@register_transform("hadamard", step=70)
class OnlineHadamard:
    """Rotates all channels of a site, as far as its input is not rotated offline."""

    streams = False

    def __init__(self, problem: Problem) -> None:
        self.weight = problem.weight
        self.rotated = problem.rotated

    def solve(self) -> InputTransform:
        width = self.weight.shape[1]
        device = self.weight.device
        identity = InputTransform.identity(width, self.weight)
        if self.rotated == width:
            return identity
        if self.rotated:
            heads = width // self.rotated
            return replace(identity, rotation=AcrossHeads(heads, self.rotated, device))
        return replace(identity, rotation=HadamardRotation(width, device=device))


def rotated_offline(adapter: Adapter, options: HadamardSettings) -> dict[str, int]:
    """Channels that are rotated together offline, by the name of their site or `qk` product."""
    if not options.offline:
        return {}
    rotated_channels: dict[str, int] = {}
    for rotation in adapter.rotations:
        if isinstance(rotation, StreamRotation):
            rotated_channels |= dict.fromkeys(rotation.readers, rotation.channels)
        else:
            rotated_channels[rotation.reader] = rotation.channels
    return rotated_channels


def score_rotation(
    adapter: Adapter, product: MatMulSite, options: HadamardSettings
) -> HadamardRotation | None:
    """What rotates both operands of a `qk` product at run time; None where nothing has to."""
    if product.kind != "qk" or product.name in rotated_offline(adapter, options):
        return None
    return HadamardRotation(product.channels, device=next(adapter.model.parameters()).device)


@torch.no_grad()
def rotate_offline(adapter: Adapter) -> None:
    """Make all of the adapter's offline rotations; the model's outputs stay the same.

    The model is prepared and not quantized yet.
    """
    device = next(adapter.model.parameters()).device
    for rotation in adapter.rotations:
        if isinstance(rotation, HeadRotation):
            rotate_heads(adapter, rotation, HadamardRotation(rotation.channels, device=device))
        else:
            rotate_stream(adapter, rotation, HadamardRotation(rotation.channels, SEED, device))


def rotate_heads(adapter: Adapter, heads: HeadRotation, rotation: HadamardRotation) -> None:
    """Rotate the heads that rows of a linear hold; linears that read them undo it."""
    model = adapter.model
    folding.rotate_outputs(model.get_submodule(heads.linear), rotation, slice(*heads.rows))
    for site in adapter.sites:
        if site.name == heads.reader:
            weight = model.get_submodule(site.name).weight
            identity = InputTransform.identity(weight.shape[1], weight)
            folding.apply_to_consumers(model, site, replace(identity, rotation=rotation))


def rotate_stream(adapter: Adapter, stream: StreamRotation, rotation: HadamardRotation) -> None:
    """Rotate a residual stream: readers with their norms, writers, and where it starts and ends."""
    model = adapter.model
    for site in adapter.sites:
        if site.name in stream.readers:
            folding.rotate_past_norm(model, site, rotation)
            if stream.centred:
                norm = model.get_submodule(site.fold.norm)
                swap_module(model, site.fold.norm, RMSNorm(norm.weight, norm.eps))
    for name in stream.writers:
        folding.rotate_outputs(model.get_submodule(name), rotation, centred=stream.centred)
    for name in stream.tables:
        folding.rotate_table(model.get_parameter(name), rotation, stream.centred)
    if stream.entry is not None:
        norm = model.get_submodule(stream.entry)
        swap_module(model, stream.entry, Entry(norm, rotation, stream.centred))
    if stream.exit is not None:
        norm = model.get_submodule(stream.exit)
        swap_module(model, stream.exit, Exit(norm, rotation))


class RMSNorm(nn.Module):
    """What a LayerNorm does to a centred stream: x / rms(x) * weight + bias.

    The bias is None until one is folded in.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return out if self.bias is None else out + self.bias


class Entry(nn.Module):
    """A norm whose output becomes a rotated stream."""

    def __init__(self, norm: nn.Module, rotation: HadamardRotation, centred: bool) -> None:
        super().__init__()
        self.norm = norm
        self.rotation = rotation
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)  # (..., C)
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return self.rotation(x)


class Exit(nn.Module):
    """A norm that reads a rotated stream and gives what it gave before."""

    def __init__(self, norm: nn.Module, rotation: HadamardRotation) -> None:
        super().__init__()
        self.norm = norm
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.rotation.inverse(x))

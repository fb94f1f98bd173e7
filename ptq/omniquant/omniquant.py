"""OmniQuant (Shao et al., 2024, arXiv 2308.13137): learn how far to clip weights and how to scale
and shift inputs, by gradient descent, block by block.

For every linear of a block in scope, with the range of each row drawn in (LWC),

    lo = sigmoid(low) min W',   hi = sigmoid(high) max W',     low, high (O,), both 4 at the start

and for the inputs of qkv and fc1, and between V and the projection, a scale and a shift (LET) that
fold into what feeds them (`folding.py`),

    x' = (x - shift) / scale,   W' = W diag(scale),   b' = b + W shift,   y = Q(x') Q(W')^T + b'.

All are parameters of AdamW (no weight decay) for `epochs` passes over the calibration rows, in
their order, on

    loss = MSE(f^(h^), f(h))  [ + MSE(f^(h^), f(h^)) with `second_loss` ]

f: the block, f^: its `student` with everything in scope rounded, activations per token; h, h^: what
the full-precision and the quantized blocks before make of the rows (`streams.py`).

Start: SmoothQuant's scale for `alpha`, and as the shift of channel j the running average over rows
of the middle (max_j + min_j) / 2, each row entering with weight .01. Where the producer has no bias
(LLaMA-type blocks, PAR's) there is no shift, neither at the start nor later.

Symbols. x (B, T, C): input of a site. W (O, C): weight of a linear that reads it. h (B, T, C):
residual stream.

Official code (OpenGVLab/OmniQuant) and here. The official OPT model trains V -> projection by
another formula than it deploys, the LLaMA one scales q and k before their rotary embedding, which
changes the function; here training and
deployment are the algebra above, exact in every family. There is no scale of q against k: it is
exact in MAR alone. Scales stay above .01, as there. A row's range is never widened, as sigmoid(low)
min does where all its weights are positive (`quantizers.Clip`). Zero points pass gradients, too. V
is transformed in front of its product with the attention weights, so that the product's quantizers
see what they will see. Linears outside of blocks are rounded by the recipe's range rule; GPTQ, if
the recipe has it, rounds within the ranges that were learned. All runs in the model's precision,
without AMP. With static activations (`stwq`, say) training still rounds per token, and ranges are
calibrated afterwards. PTQ4ARVG's Table 7 states the two learning rates the other way round, and
batches of 32 in place of 1.

The training of a block depends on the blocks before it alone, so it is saved when it is done, and
read back by a run of the same recipe, weights and calibration rows.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq.calibration import digest_tensors
from ptq.inputs import watch_inputs
from ptq.methods.smoothquant import smoothing_step
from ptq.methods.solver import stacked_weight
from ptq.numbers.numerics import NonFiniteError
from ptq.numbers.quantizers import Clip
from ptq.omniquant.graphs import record
from ptq.omniquant.streams import Example, Streams
from ptq.omniquant.student import StraightThrough, student, within
from ptq.recipe import Recipe
from ptq.sites import Adapter, Fold, NormFold, Rows, RowsFold, Site, Track
from ptq.spec import ConfigError
from ptq.transform import InputTransform

SMALLEST = 1e-2  # scale in training
OPEN = 4.0  # logits of the clipping at the start
MEMORY = 0.99  # of the running shift, per row
PART = 8  # rows that run together at most; the gradients of a batch's parts add up


@dataclass(frozen=True)
class Trained:
    """What came out of a block: transforms by site, clipping by linear, and the mean loss of every
    epoch (epochs,)."""

    transforms: Mapping[str, InputTransform]
    clips: Mapping[str, Clip]
    losses: Tensor


@torch.no_grad()
def solve(
    adapter: Adapter,
    batches: Sequence[Rows],
    recipe: Recipe,
    track: Track,
    checkpoint: Path | None = None,
) -> dict[str, Trained]:
    """Train all blocks; the adapter's model stays as it is.

    Args:
        batches: calibration rows. checkpoint: file that finished blocks are written to, and read
            from if it is of the same recipe, weights and rows.

    Raises:
        NonFiniteError: an activation or a loss is NaN or infinite. ConfigError: the checkpoint
            cannot be written.
    """
    rows = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
    key = identity(adapter, recipe, rows) if checkpoint else ""
    found = load(checkpoint, adapter, key) if checkpoint else {}
    started = time.perf_counter() - (seconds(checkpoint) if found else 0.0)
    if len(found) == len(adapter.blocks):
        return found
    start, (parts, steps) = (
        starts(adapter, batches, recipe, track),
        cut(rows, recipe.options.omniquant.batch),
    )
    streams = Streams(
        adapter,
        parts,
        lambda name: student(
            adapter, name, recipe, found[name].transforms, found[name].clips, final=True
        ),
    )
    for index, name in enumerate(adapter.blocks):
        examples = streams.at(index)
        if name not in found:
            found[name] = train(adapter, name, recipe, start, examples, steps, track)
            if checkpoint:
                save(checkpoint, found, key, time.perf_counter() - started)
        streams.leave(index, examples)
    return found


# --- what is learned, and where it starts


def transformed_sites(adapter: Adapter, recipe: Recipe, block: str) -> list[Site]:
    """The sites of a block that are given a scale, those of V only where V alone feeds its
    projection."""
    options = recipe.options.omniquant
    return [
        site
        for site in within(block, recipe.scope.sites(adapter))
        if (options.transform and site.kind in recipe.sites)
        or (options.values and site.kind == "proj" and isinstance(site.fold, RowsFold))
    ]


def takes_shift(model: nn.Module, fold: Fold | None) -> bool:
    """Whether what feeds a site has a bias for a shift to go into (online, none is needed)."""
    if isinstance(fold, NormFold):
        return model.get_submodule(fold.norm).bias is not None
    if isinstance(fold, RowsFold):
        return fold.shift and model.get_submodule(fold.linear).bias is not None
    return True


class Extent:
    """The largest |x| of every channel and the running middle of its range, both (C,)."""

    def __init__(self, like: Tensor) -> None:
        self.peaks = torch.zeros_like(like)
        self.middle = None

    def update(self, x: Tensor) -> None:
        """Take in rows (B, T, C), in their order; without sinks they may be empty."""
        if not x.numel():
            return
        lo = x.amin(dim=1)
        hi = x.amax(dim=1)
        self.peaks = torch.maximum(self.peaks, torch.maximum(-lo, hi).amax(dim=0))
        middles = (lo + hi) / 2
        if self.middle is None:
            self.middle = middles[0]
            middles = middles[1:]
        ages = torch.arange(len(middles) - 1, -1, -1, device=x.device)
        weights = (1 - MEMORY) * (MEMORY**ages).to(x.dtype)
        self.middle = MEMORY ** len(middles) * self.middle + weights @ middles


def starts(
    adapter: Adapter, batches: Sequence[Rows], recipe: Recipe, track: Track
) -> dict[str, InputTransform]:
    """The transforms before training, by site, from one pass over the calibration rows."""
    sites = [site for block in adapter.blocks for site in transformed_sites(adapter, recipe, block)]
    weights = {site.name: stacked_weight(adapter.model, site) for site in sites}
    extents = {name: Extent(weight[0]) for name, weight in weights.items()}
    with watch_inputs(
        adapter, sites, recipe.exclude_sinks, lambda site, x: extents[site.name].update(x)
    ):
        for part in track(batches if sites else [], "omniquant"):
            adapter.forward(part)
    found = {}
    for site in sites:
        extent = extents[site.name]
        found[site.name] = smoothing_step(
            extent.peaks, weights[site.name], recipe.options.omniquant.alpha
        )
        if takes_shift(adapter.model, site.fold) and extent.middle is not None:
            found[site.name] = InputTransform(found[site.name].scale, extent.middle)
    return found


# --- training a block


def cut(rows: Rows, batch: int) -> tuple[list[Rows], list[range]]:
    """The rows in parts of at most `PART`, and which of these make up each batch."""
    total = len(next(iter(rows.values())))
    parts: list[Rows] = []
    steps: list[range] = []
    for first in range(0, total, batch):
        end = min(first + batch, total)
        edges = [*range(first, end, PART), end]
        steps.append(range(len(parts), len(parts) + len(edges) - 1))
        parts += [{k: v[a:b] for k, v in rows.items()} for a, b in zip(edges, edges[1:])]
    return parts, steps


def train(
    adapter: Adapter,
    block: str,
    recipe: Recipe,
    start: Mapping[str, InputTransform],
    examples: Sequence[list[Example]],
    steps: Sequence[range],
    track: Track,
) -> Trained:
    """Train one block.

    Args:
        start: transforms before training, by site. examples: of the block, part by part. steps:
            parts of each batch.

    Raises:
        NonFiniteError: the loss of an epoch is NaN or infinite.
    """
    options = recipe.options.omniquant
    model = adapter.model
    sites = transformed_sites(adapter, recipe, block)
    transforms = {
        site.name: InputTransform(
            nn.Parameter(start[site.name].scale.clone()),
            nn.Parameter(
                start[site.name].shift.clone(), requires_grad=takes_shift(model, site.fold)
            ),
        )
        for site in sites
    }
    linears = [
        name for site in within(block, recipe.scope.sites(adapter)) for name in site.consumers
    ]
    clips = {name: open_clip(model.get_submodule(name).weight) for name in linears if options.clip}
    scales = [transform.scale for transform in transforms.values()]
    shifts = [transform.shift for transform in transforms.values() if transform.shift.requires_grad]
    ends = [end for clip in clips.values() for end in (clip.low, clip.high)]
    groups = [(scales + shifts, options.transform_lr), (ends, options.clip_lr)]
    learned = scales + shifts + ends
    losses = []
    if learned and options.epochs:
        gradients = partial(
            gradients_of,
            student(adapter, block, recipe, transforms, clips),
            model.get_submodule(block),
            learned,
            options.second_loss,
        )
        if learned[0].is_cuda:
            gradients = Replayed(gradients)
        optimizer = torch.optim.AdamW(
            [{"params": p, "lr": lr} for p, lr in groups if p],
            weight_decay=0,
            fused=learned[0].is_cuda,
        )
        for epoch in track(range(options.epochs), f"omniquant, {block}"):
            total = learned[0].new_zeros(())
            for numbers in steps:
                loss, found = gradients(
                    [example for number in numbers for example in examples[number]]
                )
                for tensor, gradient in zip(learned, found, strict=True):
                    tensor.grad = gradient
                total += loss
                optimizer.step()
                for scale in scales:
                    scale.clamp_(min=SMALLEST)
            if not bool(total.isfinite()):
                raise NonFiniteError(
                    f"{block}: NaN or infinity in OmniQuant's loss in epoch {epoch + 1}, only finite numbers are "
                    "allowed; smaller method.options.omniquant.clip_lr and transform_lr may help"
                )
            losses.append(total / len(steps))
    return Trained(
        {
            name: InputTransform(t.scale.detach(), t.shift.detach())
            for name, t in transforms.items()
        },
        {name: Clip(clip.low.detach(), clip.high.detach()) for name, clip in clips.items()},
        torch.stack(losses) if losses else torch.zeros(0),
    )


def open_clip(weight: Tensor) -> Clip:
    """The clipping before training of a weight (O, C)."""
    return Clip(*(nn.Parameter(torch.full_like(weight[:, 0], OPEN)) for _ in range(2)))


def gradients_of(
    found: nn.Module,
    original: nn.Module,
    learned: list[Tensor],
    second_loss: bool,
    examples: Sequence[Example],
) -> tuple[Tensor, list[Tensor]]:
    """The loss over a batch's examples, (), and its gradients by the learned tensors."""
    size = sum(e.target.numel() for e in examples)
    total = learned[0].new_zeros(())
    sums = [torch.zeros_like(tensor) for tensor in learned]
    for example in examples:
        targets = [example.target, example.run(original)] if second_loss else [example.target]
        with torch.enable_grad(), StraightThrough():
            output = example.run(found)
            loss = sum((output - target).square().sum() for target in targets) / size
            parts = torch.autograd.grad(loss, learned, materialize_grads=True)
        torch._foreach_add_(sums, parts)
        total = total + loss.detach()
    return total, sums


Gradients = Callable[[Sequence[Example]], tuple[Tensor, list[Tensor]]]


class Replayed:
    """Gradients from CUDA graphs: a step is hundreds of small kernels, which take longer to start
    than to run.

    Batches whose examples are alike in all but the numbers in tensors share a graph, which reads
    these from places of its own. What a call returns is valid until the next one.
    """

    def __init__(self, gradients: Gradients) -> None:
        self.gradients = gradients
        self.graphs: dict[
            tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, list[Tensor]]]
        ] = {}

    def __call__(self, examples: Sequence[Example]) -> tuple[Tensor, list[Tensor]]:
        given = [tensor for example in examples for tensor in example.tensors()]
        alike = (
            tuple((tensor.shape, tensor.dtype) for tensor in given),
            tuple(example.rest() for example in examples),
        )
        if alike not in self.graphs:
            own = [example.copy() for example in examples]
            graph, result = record(lambda: self.gradients(own))
            self.graphs[alike] = (
                graph,
                [tensor for example in own for tensor in example.tensors()],
                result,
            )
        graph, places, result = self.graphs[alike]
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result


# --- what is kept of finished blocks


def identity(adapter: Adapter, recipe: Recipe, rows: Rows) -> str:
    """What training depends on, in 64 hex digits: recipe, weights and calibration rows."""
    model = adapter.model
    weights = digest_tensors({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return hashlib.sha256(
        f"{recipe} {adapter.layout} {weights} {digest_tensors(rows)}".encode()
    ).hexdigest()


def save(path: Path, found: Mapping[str, Trained], key: str, spent: float) -> None:
    """Write finished blocks and the seconds `spent` on them; `path` appears complete or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for block, trained in found.items():
        tensors[f"{block}.losses"] = trained.losses
        for name, transform in trained.transforms.items():
            tensors |= {f"{name}.scale": transform.scale, f"{name}.shift": transform.shift}
        for name, clip in trained.clips.items():
            tensors |= {f"{name}.low": clip.low, f"{name}.high": clip.high}
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save_file(
            {name: t.cpu().contiguous() for name, t in tensors.items()},
            temporary,
            {"identity": key, "seconds": f"{spent:.3f}"},
        )
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"omniquant: {path} cannot be written ({error})") from error


def seconds(path: Path) -> float:
    """What the finished blocks in a file took, in all processes that worked at them; 0 if there is
    no such file."""
    try:
        with safe_open(path, "pt") as file:
            return float((file.metadata() or {}).get("seconds", 0.0))
    except (FileNotFoundError, SafetensorError):
        return 0.0


def load(path: Path, adapter: Adapter, key: str) -> dict[str, Trained]:
    """The finished blocks in a file; none if there is no such file, or one of another identity."""
    try:
        with safe_open(path, "pt", str(next(adapter.model.parameters()).device)) as file:
            same = (file.metadata() or {}).get("identity") == key
            tensors = {name: file.get_tensor(name) for name in file.keys()} if same else {}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return {}

    def under(block: str, kind: type, *parts: str) -> dict:
        names = [
            name.removesuffix(f".{parts[0]}")
            for name in tensors
            if name.startswith(f"{block}.") and name.endswith(f".{parts[0]}")
        ]
        return {name: kind(*(tensors[f"{name}.{part}"] for part in parts)) for name in names}

    return {
        block: Trained(
            under(block, InputTransform, "scale", "shift"),
            under(block, Clip, "low", "high"),
            tensors[f"{block}.losses"],
        )
        for block in adapter.blocks
        if f"{block}.losses" in tensors
    }

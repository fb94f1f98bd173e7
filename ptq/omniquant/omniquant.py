"""OmniQuant (Shao et al., 2024, arXiv 2308.13137): train the clipping of weights and the
transforms.

How far to clip weights and how to scale and shift inputs is learned by gradient descent, block by
block.

For every linear of a block in scope, the range of each row is drawn in (LWC):

    lo = sigmoid(low) min W',   hi = sigmoid(high) max W',     low, high (O,), both 4 at the start

and likewise that of each group of columns where weights have groups.

The inputs of qkv and fc1, and what goes from V to the projection, get a scale and a shift (LET)
that fold into what feeds them (`folding.py`):

    x' = (x - shift) / scale,   W' = W diag(scale),   b' = b + W shift,   y = Q(x') Q(W')^T + b'.

AdamW (no weight decay) trains them all, in `epochs` passes over the calibration rows in their
order, on the loss

    loss = MSE(f^(h^), f(h))  [ + MSE(f^(h^), f(h^)) with `second_loss` ]

f: the block, f^: its student (`student.py`) with everything in scope rounded, activations per
token; h, h^: what the full-precision and the quantized blocks before make of the rows
(`streams.py`).

Where training starts is told in `start.py`.

Symbols. x (B, T, C): input of a site. W (O, C): weight of a linear that reads it. h (B, T, C):
residual stream.

Official code (OpenGVLab/OmniQuant) and here. The official OPT model trains V -> projection by
another formula than it deploys, the LLaMA one scales q and k before their rotary embedding, which
changes the function; here training and deployment are the algebra above, exact in every family.
There is no scale of q against k: it is exact in MAR alone. Scales stay above .01, as there. A row's
range is never widened, as sigmoid(low) min does where all its weights are positive
(`quantizers.Clip`). Zero points pass gradients, too. V is transformed in front of its product with
the attention weights, so that the product's quantizers see what they will see. Linears outside of
blocks are rounded by the recipe's range rule; GPTQ, if the recipe has it, rounds within the ranges
that were learned. All runs in the model's precision, without AMP. With static activations (`stwq`,
say) training still rounds per token, and ranges are calibrated afterwards. PTQ4ARVG's Table 7
states the two learning rates the other way round, and batches of 32 in place of 1.

The training of a block depends on the blocks before it alone, so it is saved when it is done, and
read back by a run of the same recipe, weights and calibration rows (`block_files.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq.numbers.grouping import count_groups
from ptq.numbers.numerics import NonFiniteError
from ptq.numbers.quantizers import Clip
from ptq.omniquant import block_files
from ptq.omniquant.block_files import TrainedBlock
from ptq.omniquant.gradients import Gradients, Replayed, batch_gradients
from ptq.omniquant.start import initial_transforms, takes_shift, transformed_sites
from ptq.omniquant.streams import Example, Streams
from ptq.omniquant.student import build_student, select_within
from ptq.options import COUNT, Settings, setting
from ptq.ranges import Flag, Integer, Number
from ptq.recipe import Recipe
from ptq.registry.entries import register_settings
from ptq.sites import Adapter, Rows, Track
from ptq.spec import QuantSpec
from ptq.transform import InputTransform

SMALLEST_SCALE = 1e-2  # in training, as in the official code
OPEN_LOGIT = 4.0  # of the clipping at the start: sigmoid(4) = .982 of the range is left
ROWS_AT_ONCE = 8  # rows that run together at most; the gradients of a batch's parts add up


@register_settings("omniquant")
@dataclass(frozen=True)
class OmniQuantSettings(Settings):
    """OmniQuant's training, block by block.

    Attributes:
        epochs: passes over the calibration rows per block.
        batch: rows per step.
        clip_lr, transform_lr: AdamW learning rates of the weight clipping and of the transforms.
        clip: learn the clipping.
        transform: learn scale and shift at the method's sites (qkv and fc1).
        values: learn scale and shift between V and proj.
        alpha: of the SmoothQuant start.
        second_loss: add the distance to the full-precision block on quantized inputs.
    """

    epochs: int = setting(20, Integer(0, 10_000))
    batch: int = setting(1, COUNT)
    clip_lr: float = setting(1e-2, Number(0, 1, above=True))
    transform_lr: float = setting(5e-3, Number(0, 1, above=True))
    clip: bool = setting(True, Flag())
    transform: bool = setting(True, Flag())
    values: bool = setting(True, Flag())
    alpha: float = setting(0.5, Number(0, 1))
    second_loss: bool = setting(False, Flag())


@torch.no_grad()
def train_blocks(
    adapter: Adapter,
    batches: Sequence[Rows],
    recipe: Recipe,
    track: Track,
    checkpoint: Path | None = None,
) -> dict[str, TrainedBlock]:
    """Train all blocks, in forward order; the adapter's model stays as it is.

    Args:
        batches: calibration rows.
        checkpoint: file that finished blocks are written to. They are read from it if it is of the
            same recipe, weights and rows.

    Raises:
        NonFiniteError: an activation or a loss is NaN or infinite.
        ConfigError: the checkpoint cannot be written.
    """
    rows = join_batches(batches)
    key = ""
    trained: dict[str, TrainedBlock] = {}
    if checkpoint:
        key = block_files.block_file_key(adapter, recipe, rows)
        trained = block_files.read_blocks(checkpoint, adapter, key)
    started = time.perf_counter()
    if trained:
        started -= block_files.training_seconds(checkpoint)
    if len(trained) == len(adapter.blocks):
        return trained

    initial = initial_transforms(adapter, batches, recipe, track)
    parts, steps = cut_rows(rows, recipe.options.omniquant.batch)

    def final_student(block: str) -> nn.Module:
        result = trained[block]
        return build_student(adapter, block, recipe, result.transforms, result.clips, final=True)

    streams = Streams(adapter, parts, final_student)
    for index, block in enumerate(adapter.blocks):
        examples = streams.examples_of(index)
        if block not in trained:
            trained[block] = train_block(adapter, block, recipe, initial, examples, steps, track)
            if checkpoint:
                seconds = time.perf_counter() - started
                block_files.write_blocks(checkpoint, trained, key, seconds)
        streams.pass_block(index, examples)
    return trained


def join_batches(batches: Sequence[Rows]) -> Rows:
    """All rows of the batches in one."""
    # (n, ...) each
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def cut_rows(rows: Rows, batch: int) -> tuple[list[Rows], list[range]]:
    """The rows in parts of at most `ROWS_AT_ONCE`, and the numbers of the parts of each batch."""
    total = len(next(iter(rows.values())))
    parts: list[Rows] = []
    steps: list[range] = []
    for first in range(0, total, batch):
        end = min(first + batch, total)
        first_part = len(parts)
        for part_first in range(first, end, ROWS_AT_ONCE):
            part_rows = slice(part_first, min(part_first + ROWS_AT_ONCE, end))
            parts.append({name: values[part_rows] for name, values in rows.items()})
        steps.append(range(first_part, len(parts)))
    return parts, steps


# --- training a block


@dataclass(frozen=True)
class Learned:
    """What a block's training changes.

    Attributes:
        transforms: by site, scale and shift (C,).
        clips: by linear, logits (O,) or (O * G,).
    """

    transforms: Mapping[str, InputTransform]
    clips: Mapping[str, Clip]

    def scales(self) -> list[Tensor]:
        return [transform.scale for transform in self.transforms.values()]

    def shifts(self) -> list[Tensor]:
        """The shifts that have a place to go to; the others stay zero."""
        shifts = [transform.shift for transform in self.transforms.values()]
        return [shift for shift in shifts if shift.requires_grad]

    def logits(self) -> list[Tensor]:
        """Both ends of every clipping."""
        logits: list[Tensor] = []
        for clip in self.clips.values():
            logits += [clip.low, clip.high]
        return logits

    def tensors(self) -> list[Tensor]:
        return self.scales() + self.shifts() + self.logits()

    def result(self, losses: Sequence[Tensor]) -> TrainedBlock:
        """The tensors as they are now, without gradients, and the losses () of all epochs."""
        transforms: dict[str, InputTransform] = {}
        for site, transform in self.transforms.items():
            transforms[site] = InputTransform(transform.scale.detach(), transform.shift.detach())
        clips: dict[str, Clip] = {}
        for linear, clip in self.clips.items():
            clips[linear] = Clip(clip.low.detach(), clip.high.detach())
        return TrainedBlock(
            transforms, clips, torch.stack(list(losses)) if losses else torch.zeros(0)
        )


def train_block(
    adapter: Adapter,
    block: str,
    recipe: Recipe,
    initial: Mapping[str, InputTransform],
    examples: Sequence[list[Example]],
    steps: Sequence[range],
    track: Track,
) -> TrainedBlock:
    """Train one block.

    Args:
        initial: transforms before training, by site.
        examples: of the block, part by part.
        steps: numbers of the parts of each batch.

    Raises:
        NonFiniteError: the loss of an epoch is NaN or infinite.
    """
    options = recipe.options.omniquant
    learned = make_learned(adapter, block, recipe, initial)
    tensors = learned.tensors()
    losses: list[Tensor] = []
    if not tensors or not options.epochs:
        return learned.result(losses)

    student = build_student(adapter, block, recipe, learned.transforms, learned.clips)
    original = adapter.model.get_submodule(block)
    gradients = partial(batch_gradients, student, original, tensors, options.second_loss)
    if tensors[0].is_cuda:
        gradients = Replayed(gradients)
    optimizer = make_optimizer(learned, options)
    for epoch in track(range(options.epochs), f"omniquant, {block}"):
        total_loss = tensors[0].new_zeros(())
        for part_numbers in steps:
            batch: list[Example] = []
            for number in part_numbers:
                batch += examples[number]
            total_loss += take_step(gradients, batch, learned, optimizer)
        if not bool(total_loss.isfinite()):
            raise NonFiniteError(
                f"{block}: NaN or infinity in OmniQuant's loss in epoch {epoch + 1}, "
                "only finite numbers are allowed; "
                "smaller method.options.omniquant.clip_lr and transform_lr may help"
            )
        losses.append(total_loss / len(steps))
    return learned.result(losses)


def make_learned(
    adapter: Adapter, block: str, recipe: Recipe, initial: Mapping[str, InputTransform]
) -> Learned:
    """The parameters of a block before training."""
    model = adapter.model
    transforms: dict[str, InputTransform] = {}
    for site in transformed_sites(adapter, recipe, block):
        start = initial[site.name]
        transforms[site.name] = InputTransform(
            nn.Parameter(start.scale.clone()),  # a copy, as training changes it in place
            nn.Parameter(start.shift.clone(), requires_grad=takes_shift(model, site.fold)),
        )
    clips: dict[str, Clip] = {}
    if recipe.options.omniquant.clip:
        for site in select_within(block, recipe.scope.sites(adapter)):
            spec = recipe.at_site(adapter, site).weights
            for linear in site.consumers:
                clips[linear] = open_clip(model.get_submodule(linear).weight, spec)
    return Learned(transforms, clips)


def open_clip(weight: Tensor, spec: QuantSpec) -> Clip:
    """The clipping before training of a weight (O, C)."""
    groups = 1 if spec.group_size is None else count_groups(weight.shape[1], spec.group_size)
    logits = weight.new_full((len(weight) * groups,), OPEN_LOGIT)  # (O * G,)
    return Clip(low=nn.Parameter(logits.clone()), high=nn.Parameter(logits.clone()))


def make_optimizer(learned: Learned, options: OmniQuantSettings) -> torch.optim.Optimizer:
    """AdamW with a learning rate for the transforms and one for the clipping."""
    transform_group = {
        "params": learned.scales() + learned.shifts(),
        "lr": options.transform_lr,
    }
    clip_group = {"params": learned.logits(), "lr": options.clip_lr}
    groups = [group for group in (transform_group, clip_group) if group["params"]]
    on_gpu = learned.tensors()[0].is_cuda
    return torch.optim.AdamW(groups, weight_decay=0, fused=on_gpu)


def take_step(
    gradients: Gradients,
    batch: Sequence[Example],
    learned: Learned,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """Change what is learned by the gradients of a batch; returns the batch's loss ()."""
    loss, batch_gradient = gradients(batch)
    for tensor, gradient in zip(learned.tensors(), batch_gradient, strict=True):
        tensor.grad = gradient
    optimizer.step()
    for scale in learned.scales():
        scale.clamp_(min=SMALLEST_SCALE)  # in place: the optimizer holds the same tensor
    return loss

"""Fitting quantizers and weights block by block, with a block's inputs in memory.

The streaming pipeline rounds all weights first and looks at all activations afterwards. Here the
activation parameters of a site come first, so that its weight can be rounded for the inputs that it
will get, and `sequential` goes further: inputs are taken from the model with everything before them
rounded.

    for each block:
        record what reaches its quantizers in full precision
        for each step (adaln, qkv, the operands of attention, proj, fc1, fc2):
            if sequential, record what reaches the step with all before it rounded
            site:      sink shift, input parameters, weights, biases       (inputs.py)
            operands:  parameters per head and position, key weights       (operands.py)
    then the sites outside of blocks, in the same way

A block is run a few times and the model around it once (`block_stream.py`). Sites outside of blocks
are fitted last, also what stands before the first block (VAR's shared AdaLN projection).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Clip
from ptq.recipe import Recipe
from ptq.rounding import shorten_branch
from ptq.sites import Adapter, Rows, Track
from ptq.staq.block_stream import (
    BlockStream,
    record_block,
    record_step,
    run_block,
    steps_of,
    tokens_of,
)
from ptq.staq.inputs import fit_site
from ptq.staq.operands import fit_operands
from ptq.staq.places import (
    InputPlace,
    Place,
    Tokens,
    input_places,
    operand_places,
    recording,
)


@torch.no_grad()
def fit_model(
    adapter: Adapter,
    recipe: Recipe,
    batches: Sequence[Rows],
    track: Track = lambda it, what: it,
    input_params: Mapping[str, QParams] | None = None,
    clips: Mapping[str, Clip] | None = None,
) -> None:
    """Fit a model whose linears and products are quantizable already and transformed.

    Args:
        batches: calibration rows. input_params: by site, what a method fixes of its input
            quantizer. clips: by linear, what a method fixes of its weight's range.

    Raises:
        NonFiniteError: a weight or an activation holds NaN or infinity. ConfigError: the damping of
            the rounder is too small.
    """
    fitter = Fitter(adapter, recipe, batches, input_params or {}, clips or {})
    for place in fitter.inputs:
        shorten_branch(place.linears)
    outside = fitter.places_outside()
    exact = fitter.record_model(outside)
    streams = {"exact": BlockStream(adapter, batches)}
    if recipe.sequential:
        streams["given"] = BlockStream(adapter, batches)
    for index, name in enumerate(track(adapter.blocks, "blocks")):
        fitter.fit_block(index, name, streams)
    given = fitter.record_model(outside) if recipe.sequential else exact
    for place in outside:
        fitter.fit_step([place], exact, given)


class Fitter:
    """Fits the places of a model, step by step."""

    def __init__(
        self,
        adapter: Adapter,
        recipe: Recipe,
        batches: Sequence[Rows],
        input_params: Mapping[str, QParams],
        clips: Mapping[str, Clip],
    ) -> None:
        self.adapter = adapter
        self.recipe = recipe
        self.batches = batches
        self.input_params = input_params
        self.clips = clips
        self.inputs = input_places(adapter, recipe)
        self.operands = operand_places(adapter, recipe)

    def places_outside(self) -> list[InputPlace]:
        """The sites that are in no block."""
        prefixes = tuple(f"{name}." for name in self.adapter.blocks)
        return [place for place in self.inputs if not place.label.startswith(prefixes)]

    def record_model(self, places: Sequence[InputPlace]) -> dict[str, Tokens]:
        """What reaches the places in runs of the whole model, by label."""
        if not places:
            return {}
        with recording(places) as recorders:
            for rows in self.batches:
                self.adapter.forward(rows)
        return tokens_of(recorders)

    def fit_block(self, index: int, name: str, streams: Mapping[str, BlockStream]) -> None:
        """Fit everything in one block, and take the streams past it."""
        block: nn.Module = self.adapter.model.get_submodule(name)
        steps = steps_of(name, self.inputs, self.operands)
        every = [place for step in steps for place in step if place.observed]
        calls = streams["exact"].calls_at(index)
        exact, streams["exact"].outputs = record_block(block, calls, every)
        if "given" not in streams:
            for step in steps:
                self.fit_step(step, exact, exact)
            return
        calls = streams["given"].calls_at(index)
        for step in steps:
            given = record_step(block, calls, [place for place in step if place.observed])
            self.fit_step(step, exact, given)
        streams["given"].outputs = run_block(block, calls)

    def fit_step(
        self, places: Sequence[Place], exact: Mapping[str, Tokens], given: Mapping[str, Tokens]
    ) -> None:
        """Fit a site, or the operands of an attention.

        Args:
            exact: what reaches them in full precision. given: what reaches them.
        """
        first = places[0]
        if isinstance(first, InputPlace):
            label = first.label
            fixed = self.input_params.get(label)
            recipe = self.recipe.at_site(self.adapter, first.site)
            fit_site(first, exact[label], given[label], recipe, fixed, self.clips)
        else:
            fit_operands(places, given, self.recipe, self.adapter.sinks)

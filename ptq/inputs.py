"""Watching the inputs of sites during calibration forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq.numbers.numerics import NonFiniteError
from ptq.sites import Adapter, Rows, Site

Take = Callable[[Site, Tensor], None]
TakeTokens = Callable[[Site, Tensor, Tensor | None], None]


@contextmanager
def watch_tokens(adapter: Adapter, sites: Iterable[Site], take: TakeTokens) -> Iterator[None]:
    """Inside, `take` gets the input (B, T, C) of every site of every forward pass, with the
    positions (T,) of its tokens (None where they have none).

    Raises:
        NonFiniteError: an input contains NaN or infinity.
    """

    def hook_of(site: Site) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            positions = args[1] if len(args) > 1 else None
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteError(
                    f"{site.name}: activations contain NaN or infinity, "
                    "only finite numbers are allowed"
                )
            take(site, x, positions)

        return hook

    handles = []
    for site in sites:
        # the first consumer stands for all that read the site
        consumer = adapter.model.get_submodule(site.name)
        handles.append(consumer.register_forward_pre_hook(hook_of(site)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_inputs(
    adapter: Adapter, sites: Iterable[Site], exclude_sinks: bool, take: Take
) -> Iterator[None]:
    """Inside, `take` gets the input (B, T, C) of every site of every forward pass, sinks left out
    if asked to.

    Raises:
        NonFiniteError: an input contains NaN or infinity.
    """

    def take_tokens(site: Site, x: Tensor, positions: Tensor | None) -> None:
        if exclude_sinks and site.sinks and positions is not None:
            x = x[:, positions >= site.sinks]
        take(site, x)

    with watch_tokens(adapter, sites, take_tokens):
        yield


def capture_inputs(
    adapter: Adapter, batches: Sequence[Rows], sites: list[Site], exclude_sinks: bool
) -> dict[str, Tensor]:
    """Inputs (N, C) of the sites over the batches, all of them in memory."""
    parts: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def take(site: Site, x: Tensor) -> None:
        parts[site.name].append(x.reshape(-1, x.shape[-1]))

    with watch_inputs(adapter, sites, exclude_sinks, take):
        for rows in batches:
            adapter.forward(rows)
    return {name: torch.cat(x) for name, x in parts.items()}

"""Judging a step at the output that a site's linears lead to, with candidates in their place.

The probe of a site (`Site.probe`) is a module that holds the site's linears: the attention with its
mask, norms and rotary embedding, read where its output meets the projection; a gated MLP, read
where the product meets the down projection. Without a probe the outputs of the linears are compared
themselves. The loss of a candidate is

    1/N  sum_n || f(x_n) - f^(x_n) ||^2        over N tokens, the norm over output channels,

where f^ computes  Q(x') W^^T + (x' A^T) B^T + b + W shift  in place of every linear of the site.
The arguments of the module are recorded once, on some of the calibration rows, in full precision;
only the module runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.folding import rows_of
from ptq.inputs import watch_inputs
from ptq.modules import OnlineTransform, QuantLinear, replaced_modules
from ptq.sites import Adapter, Rows, Site
from ptq.spec import ConfigError
from ptq.transform import InputTransform


@dataclass(frozen=True)
class Call:
    """One call of a module: its path, its input, and its output in full precision."""

    module: str
    args: tuple
    kwargs: dict
    expected: Tensor


class Judge:
    """The loss of candidates for one step of a site's transform.

    Args:
        chain: the transform that the steps before came to; candidates and `inputs` are what follows
            it.
        batches: calibration rows.
        rows: how many of them are recorded and kept.
        spread: they lie evenly over all; otherwise they are the first.
        exclude_sinks: sink tokens reach the linears unrounded and are not in `inputs`.

    Attributes:
        inputs: what arrives at the site after the chain, in parts (..., C).

    Raises:
        NonFiniteError: an input contains NaN or infinity. ConfigError: no calibration row reaches
            the probe.
    """

    @torch.no_grad()
    def __init__(
        self,
        adapter: Adapter,
        site: Site,
        chain: InputTransform,
        batches: Sequence[Rows],
        exclude_sinks: bool,
        rows: int,
        spread: bool = False,
    ) -> None:
        self.model = adapter.model
        self.site = site
        self.chain = chain
        self.sinks = site.sinks if exclude_sinks else 0
        self.linears = {name: self.model.get_submodule(name) for name in site.consumers}
        self.inputs: list[Tensor] = []
        recorded: list[tuple[str, tuple, dict]] = []
        modules = [site.probe.module] if site.probe else list(site.consumers)

        def record_of(name: str) -> Callable[[nn.Module, tuple, dict], None]:
            def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
                recorded.append((name, args, kwargs))

            return record

        def take(site: Site, x: Tensor) -> None:
            self.inputs.append(chain(x))

        handles = []
        for name in modules:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(record_of(name), with_kwargs=True))
        try:
            with watch_inputs(adapter, [site], exclude_sinks, take):
                for part in some_rows(batches, rows, spread):
                    adapter.forward(part)
        finally:
            for handle in handles:
                handle.remove()
        if not recorded:
            raise ConfigError(f"{site.name}: no calibration row reaches {', '.join(modules)}")
        self.calls = [Call(*call, self._read(*call)) for call in recorded]

    @torch.no_grad()
    def __call__(self, step: InputTransform, weight: Tensor, quantizer: nn.Module) -> Tensor:
        """The loss () in float64 of a step.

        Args:
            weight: what W' of the step is rounded to, (O, C), the linears stacked.
            quantizer: rounds x' of the step, from (x', positions).
        """
        with replaced_modules(
            self.model, self._candidate(self.chain.then(step), weight, quantizer)
        ):
            errors: list[Tensor] = []
            for call in self.calls:
                output = self._read(call.module, call.args, call.kwargs)
                errors.append((output - call.expected).double())
        tokens = sum(error[..., 0].numel() for error in errors)
        return sum(error.square().sum() for error in errors) / tokens

    def _candidate(
        self, transform: InputTransform, weight: Tensor, quantizer: nn.Module
    ) -> dict[str, QuantLinear]:
        """The site's linears as they compute with a candidate, by name."""
        candidates: dict[str, QuantLinear] = {}
        first = 0  # row of the linear in the stacked weights
        for name, linear in self.linears.items():
            new = QuantLinear(linear)
            end = first + len(linear.weight)
            new.weight = weight[first:end]
            if bool(transform.shift.any()):
                correction = linear.weight @ transform.shift
                new.bias = correction if linear.bias is None else linear.bias + correction
            branch = rows_of(transform, first, end).low_rank
            if branch is not None:
                new.down = branch.down.to(weight)
                new.up = branch.up.to(weight)
            new.transform = OnlineTransform(transform)
            new.input = PastSinks(quantizer, self.sinks) if self.sinks else quantizer
            candidates[name] = new
            first = end
        return candidates

    def _read(self, module: str, args: tuple, kwargs: dict) -> Tensor:
        """What the probe reads when `module` is called."""
        reads = self.site.probe.reads if self.site.probe else None
        if reads is None:
            return self.model.get_submodule(module)(*args, **kwargs)

        def stop(module: nn.Module, args: tuple) -> None:
            raise Arrived(args[0])

        handle = self.model.get_submodule(reads).register_forward_pre_hook(stop)
        try:
            self.model.get_submodule(module)(*args, **kwargs)
        except Arrived as arrived:
            return arrived.x
        finally:
            handle.remove()
        raise ConfigError(
            f"{self.site.name}: {module} does not call {reads}, allowed is a linear inside it"
        )


class Arrived(Exception):
    """Carries what is read out of a module, the rest of which need not be computed."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class PastSinks(nn.Module):
    """A quantizer for all but the tokens at the first `sinks` positions, which stay."""

    def __init__(self, quantizer: nn.Module, sinks: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.sinks = sinks

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        is_sink = (positions < self.sinks)[:, None]  # (T, 1)
        return torch.where(is_sink, x, self.quantizer(x, positions))


def some_rows(batches: Sequence[Rows], rows: int, spread: bool) -> list[Rows]:
    """The first `rows` rows or, `spread`, as many that lie evenly over all, in their order and cut
    as the batches are.
    """
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    total = sum(sizes)
    rows = min(rows, total)
    chosen = torch.zeros(total, dtype=torch.bool)
    if spread:
        chosen[torch.arange(rows) * total // rows] = True
    else:
        chosen[:rows] = True
    parts: list[Rows] = []
    for batch, here in zip(batches, chosen.split(sizes)):
        if here.any():
            parts.append({name: tensor[here.to(tensor.device)] for name, tensor in batch.items()})
    return parts

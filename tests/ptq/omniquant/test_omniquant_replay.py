"""OmniQuant's steps of training can be recorded, and recorded ones are those of single kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq.omniquant import gradients, omniquant
from ptq.omniquant.gradients import Replayed, batch_gradients
from ptq.omniquant.omniquant import TrainedBlock, train_blocks
from tests.families import FAMILIES, calibration
from tests.ptq.omniquant.omniquant_cases import outlying, recipe, same, silent, trained

aten = torch.ops.aten


class NoWaiting(TorchDispatchMode):
    """Inside, an operator whose result decides what the host does next is an error: CUDA graphs
    have none."""

    WAITS = (
        aten._local_scalar_dense,
        aten.nonzero,
        aten._unique2,
        aten.unique_dim,
        aten.equal,
        aten.masked_select,
    )

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        masks = (
            args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        )
        assert func.overloadpacket not in self.WAITS
        assert not any(m is not None and m.dtype == torch.bool for m in masks)
        return func(*args, **(kwargs or {}))


def test_what_waits_is_noticed() -> None:
    x = torch.ones(3)
    for work in (lambda: bool(x.sum()), lambda: x[x > 0], lambda: x.sum().item()):
        with pytest.raises(AssertionError), NoWaiting():
            work()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training_can_be_recorded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = omniquant.batch_gradients

    def watched(*args: object) -> tuple[Tensor, list[Tensor]]:
        calls.append(args)
        with NoWaiting():
            return original(*args)

    monkeypatch.setattr(omniquant, "batch_gradients", watched)
    trained(family, outlying(family), recipe())
    assert calls


class FakeGraph:
    """Stands in for a CUDA graph: does the work again, and leaves what comes out where it was left
    at first."""

    def __init__(
        self, work: Callable[[], tuple[Tensor, list[Tensor]]], result: tuple[Tensor, list[Tensor]]
    ) -> None:
        self.work = work
        self.result = result

    def replay(self) -> None:
        (loss, found), (place, places) = self.work(), self.result
        for to, new in zip((place, *places), (loss, *found), strict=True):
            to.copy_(new)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_read_every_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(
        work: Callable[[], tuple[Tensor, list[Tensor]]],
    ) -> tuple[FakeGraph, tuple[Tensor, list[Tensor]]]:
        result = work()
        return FakeGraph(work, result), result

    replayed: dict[nn.Module, Replayed] = {}

    def through(student: nn.Module, *args: object) -> tuple[Tensor, list[Tensor]]:
        *given, examples = args
        return replayed.setdefault(student, Replayed(partial(batch_gradients, student, *given)))(
            examples
        )

    expected = trained(family, outlying(family), recipe(batch=3))
    monkeypatch.setattr(gradients, "record_graph", fake)
    monkeypatch.setattr(omniquant, "batch_gradients", through)
    assert same(expected, trained(family, outlying(family), recipe(batch=3)))
    assert len(replayed) == len(expected)
    assert all(each.recordings for each in replayed.values())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_training_is_that_of_single_kernels(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu() -> dict[str, TrainedBlock]:
        adapter = outlying(family)
        rows = calibration(family, adapter).batches(4)
        for module in (adapter.model, getattr(adapter, "quantizer", adapter.model)):
            module.cuda()
        return train_blocks(
            adapter,
            [{k: v.cuda() for k, v in part.items()} for part in rows],
            recipe(batch=3),
            silent,
        )

    found = on_gpu()
    monkeypatch.setattr(omniquant, "Replayed", lambda gradients: gradients)
    for block, expected in on_gpu().items():
        torch.testing.assert_close(found[block].losses, expected.losses, rtol=1e-6, atol=0)
        for name, transform in expected.transforms.items():
            torch.testing.assert_close(found[block].transforms[name].scale, transform.scale)
        for name, clip in expected.clips.items():
            torch.testing.assert_close(found[block].clips[name].high, clip.high)

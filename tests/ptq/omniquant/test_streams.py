"""The streams bring every block what the model brings it, whether its examples are kept or found
anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq.modules import replaced_modules
from ptq.omniquant import streams
from ptq.omniquant.streams import Arrived, Station, Streams, block_calls
from ptq.types import Adapter
from tests.families import FAMILIES, calibration, tiny


class Noisy(nn.Module):
    """A student that is off by a tenth, in place of a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object) -> Tensor:
        return 1.1 * self.block(*args)


def seen(adapter: Adapter, rows: dict[str, Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Input and output of every call of every block when the model itself runs."""
    found: dict[str, list] = {name: [] for name in adapter.blocks}
    handles = [
        adapter.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found[name].append((args[0], output))
        )
        for name in adapter.blocks
    ]
    adapter.forward(rows)
    for handle in handles:
        handle.remove()
    return found


def walk(adapter: Adapter, family: str) -> list[list[list[streams.Example]]]:
    """The examples of all blocks, part by part, with students that are off by a tenth."""
    students = {name: Noisy(adapter.model.get_submodule(name)) for name in adapter.blocks}
    both = Streams(adapter, calibration(family, adapter).batches(5), students.__getitem__)
    found = []
    for index in range(len(adapter.blocks)):
        examples = both.examples_of(index)
        found.append([examples[number] for number in range(len(examples))])
        both.pass_block(index, examples)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_examples_are_quantized_inputs_and_full_precision_outputs(
    family: str,
) -> None:
    adapter = tiny(family)
    found = walk(adapter, family)
    parts = calibration(family, adapter).batches(5)
    blocks = [adapter.model.get_submodule(name) for name in adapter.blocks]
    assert len(parts) == 3
    for number, rows in enumerate(parts):
        own = seen(adapter, rows)
        with replaced_modules(adapter.model, {n: Noisy(b) for n, b in zip(adapter.blocks, blocks)}):
            quantized = seen(adapter, rows)
        for index, name in enumerate(adapter.blocks):
            examples = found[index][number]
            assert len(examples) == len(own[name]) == len(quantized[name]) >= 1
            for example, (_, output), (x, noisy) in zip(examples, own[name], quantized[name]):
                assert torch.equal(example.target, output)
                assert torch.equal(example.args[0], x)
                assert torch.equal(1.1 * example.run(blocks[index]), noisy)
    assert [adapter.model.get_submodule(name) for name in adapter.blocks] == blocks
    if family == "mar":  # whose rows hide different numbers of tokens
        assert max(len(part) for part in found[0]) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_that_do_not_fit_are_found_anew_and_are_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny(family)
    kept = walk(adapter, family)
    monkeypatch.setattr(streams, "STREAM_BYTES", 0)
    parts = calibration(family, adapter).batches(5)
    assert not isinstance(Streams(adapter, parts, adapter.model.get_submodule).examples_of(0), list)
    for one, other in zip(kept, walk(adapter, family)):
        for a, b in zip(
            (e for part in one for e in part), (e for part in other for e in part), strict=True
        ):
            assert torch.equal(a.target, b.target)
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_blocks_before_run_and_nothing_behind_the_last(family: str) -> None:
    adapter = tiny(family)
    ran = []
    blocks = [adapter.model.get_submodule(name) for name in adapter.blocks]
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    for site in adapter.sites:
        if site.kind == "head":
            adapter.model.get_submodule(site.name).register_forward_pre_hook(
                lambda module, args: ran.append("head")
            )
    block_calls(adapter, 1, blocks[:1], calibration(family, adapter).batches(5)[0])
    assert set(ran) == {0}


def test_a_station_replies_call_by_call_and_the_last_one_stops() -> None:
    replies = [torch.zeros(2), torch.ones(2)]
    station = Station(replies)
    x = torch.full((2,), 7.0)
    assert torch.equal(station(x), replies[0])
    assert torch.equal(station(x, other=1), replies[1])
    assert [kwargs for _, kwargs in station.calls] == [{}, {"other": 1}]
    assert Station()(x) is x
    with pytest.raises(Arrived):
        Station(last=True)(x)

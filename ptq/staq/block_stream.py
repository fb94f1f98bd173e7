"""Running a model block by block, and recording what reaches the quantizers of one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Tensor, nn

from ptq.omniquant.streams import Arrived, Call, block_calls, replying_stations
from ptq.sites import Adapter, Rows
from ptq.staq.places import InputPlace, OperandPlace, Place, Recorder, Tokens, recording

Calls = Sequence[Sequence[Call]]  # of a block, part by part of the calibration rows


class BlockStream:
    """The calls of the blocks, to be asked for in forward order.

    Args:
        parts: calibration rows, cut as they are to be run.
    """

    def __init__(self, adapter: Adapter, parts: Sequence[Rows]) -> None:
        self.adapter = adapter
        self.parts = parts
        self.outputs: list[list[Tensor]] | None = None  # of the block before

    def calls_at(self, index: int) -> Calls:
        """How the block of that index is called."""
        calls = []
        for number, rows in enumerate(self.parts):
            before = []
            if index:
                before = replying_stations(index, self.outputs[number])
            calls.append(block_calls(self.adapter, index, before, rows))
        return calls


def run_block(block: nn.Module, calls: Calls) -> list[list[Tensor]]:
    """The block's outputs, part by part and call by call."""
    return [[block(*args, **kwargs) for args, kwargs in part] for part in calls]


def record_block(
    block: nn.Module, calls: Calls, places: Sequence[Place]
) -> tuple[dict[str, Tokens], list[list[Tensor]]]:
    """What reaches the places, by label, and the block's outputs."""
    with recording(places) as recorders:
        outputs = run_block(block, calls)
    return tokens_of(recorders), outputs


def record_step(block: nn.Module, calls: Calls, places: Sequence[Place]) -> dict[str, Tokens]:
    """What reaches places that belong together, by label; the block is run no further."""
    if not places:
        return {}
    with recording(places, last_reached(places)) as recorders:
        for part in calls:
            for args, kwargs in part:
                with suppress(Arrived):
                    block(*args, **kwargs)
    return tokens_of(recorders)


def last_reached(places: Sequence[Place]) -> Place:
    """The place of an attention that is reached last: k and v are prepared, then come q and p."""
    by_role = {place.role: place for place in places if isinstance(place, OperandPlace)}
    return by_role.get("p") or by_role.get("q") or places[-1]


def tokens_of(recorders: Mapping[str, Recorder]) -> dict[str, Tokens]:
    return {name: recorder.tokens(name) for name, recorder in recorders.items()}


def steps_of(
    block: str, inputs: Sequence[InputPlace], operands: Sequence[OperandPlace]
) -> list[list[Place]]:
    """The places of a block in the order in which they can be fitted: sites one by one, attention's
    operands together after the site that makes them."""
    steps: list[list[Place]] = []
    own = [place for place in operands if place.label.startswith(f"{block}.")]
    for place in inputs:
        if not place.label.startswith(f"{block}."):
            continue
        if place.site.kind == "proj" and own:
            steps.append(own)
            own = []
        steps.append([place])
    return steps if not own else [*steps, own]

"""The gradients of a batch in OmniQuant's training, as single kernels or replayed from CUDA
graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.omniquant.graphs import record_graph
from ptq.omniquant.streams import Example
from ptq.omniquant.student import StraightThrough

# of a batch's examples: the loss () and its gradients by what is learned
Gradients = Callable[[Sequence[Example]], tuple[Tensor, list[Tensor]]]


def batch_gradients(
    student: nn.Module,
    original: nn.Module,
    learned: list[Tensor],
    second_loss: bool,
    examples: Sequence[Example],
) -> tuple[Tensor, list[Tensor]]:
    """The loss () over a batch's examples, and its gradients by the learned tensors.

    Args:
        second_loss: add the error to what the original block makes of the student's own input.
    """
    # of the whole batch, so that the parts' gradients add up
    size = sum(example.target.numel() for example in examples)
    total_loss = learned[0].new_zeros(())
    sums = [torch.zeros_like(tensor) for tensor in learned]
    for example in examples:
        targets = [example.target]  # (B, T, C) each
        if second_loss:
            targets.append(example.run(original))
        with torch.enable_grad(), StraightThrough():
            output = example.run(student)  # (B, T, C)
            squared_error = sum((output - target).square().sum() for target in targets)
            loss = squared_error / size
            # a scale that is not rounded anywhere in this call has no gradient: zeros
            example_gradients = torch.autograd.grad(loss, learned, materialize_grads=True)
        torch._foreach_add_(sums, example_gradients)
        total_loss = total_loss + loss.detach()
    return total_loss, sums


@dataclass(frozen=True)
class Recording:
    """A CUDA graph, the tensors that it reads, and the loss and gradients that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: tuple[Tensor, list[Tensor]]


class Replayed:
    """Gradients from CUDA graphs.

    A step is hundreds of small kernels, which take longer to start than to run. Batches whose
    examples are alike in all but the numbers in tensors share a graph, which reads these from
    tensors of its own. What a call returns is valid until the next one.
    """

    def __init__(self, gradients: Gradients) -> None:
        self.gradients = gradients
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, examples: Sequence[Example]) -> tuple[Tensor, list[Tensor]]:
        tensors = tensors_of(examples)
        kinds = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        key = kinds, tuple(example.plain_arguments() for example in examples)
        if key not in self.recordings:
            self.recordings[key] = self.record(examples)
        recording = self.recordings[key]
        for own, tensor in zip(recording.inputs, tensors, strict=True):
            own.copy_(tensor)
        recording.graph.replay()
        return recording.result

    def record(self, examples: Sequence[Example]) -> Recording:
        """Record the work on copies of the examples, which later batches are written into."""
        copies = [example.copy() for example in examples]
        graph, result = record_graph(lambda: self.gradients(copies))
        return Recording(graph, tensors_of(copies), result)


def tensors_of(examples: Sequence[Example]) -> list[Tensor]:
    """The tensors of all examples, in a fixed order."""
    tensors: list[Tensor] = []
    for example in examples:
        tensors += example.tensors()
    return tensors

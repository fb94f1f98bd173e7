"""What a decoding step does before and behind the blocks, in one operator each."""

from __future__ import annotations

import pytest
import torch

from models.decoding.drawing import draw_next
from models.decoding.embedding import embed_token

gpu = pytest.mark.gpu


def step_of_images(count: int, guided: bool) -> tuple:
    """Arguments of `draw_next` but the tokens, for 5 images of 20 tokens; and those tokens."""
    rows = 10 if guided else 5
    uniforms, scales = torch.rand(5, 20).double(), torch.rand(20).double()
    logits = torch.randn(rows, count, 100)
    ids = torch.randint(100, (rows, 20))
    return ids, (logits, torch.arange(8, 13), uniforms, scales, guided, 0.9, 1)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_tokens_go_to_their_places(count: int, guided: bool) -> None:
    ids, given = step_of_images(count, guided)
    before = ids.clone()
    drawn = draw_next(ids, *given)
    places = torch.arange(12 - count, 12)
    assert torch.equal(ids[:5, places], drawn)
    assert torch.equal(ids[-5:, places], drawn)
    ids[:, places] = before[:, places]
    assert torch.equal(ids, before)


def test_the_operators_say_what_the_compiler_is_to_expect() -> None:
    ids, given = step_of_images(2, guided=True)
    torch.library.opcheck(draw_next, (ids, *given))
    torch.library.opcheck(embed_token, (ids, torch.tensor([4]), *torch.randn(3, 100, 8)))


@gpu
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_the_kernel_draws_the_same_tokens(count: int, guided: bool) -> None:
    ids, given = step_of_images(count, guided)
    on_gpu = [part.cuda() if isinstance(part, torch.Tensor) else part for part in given]
    ids_on_gpu = ids.cuda()
    assert torch.equal(draw_next(ids_on_gpu, *on_gpu).cpu(), draw_next(ids, *given))
    assert torch.equal(ids_on_gpu.cpu(), ids)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernel_embeds_the_same_bits(dtype: torch.dtype) -> None:
    ids = torch.randint(300, (7, 20))
    tables = torch.randn(3, 300, 200).to(dtype)
    given = ids, torch.tensor([6]), *tables
    on_gpu = [part.cuda() for part in given]
    assert torch.equal(embed_token(*on_gpu).cpu(), embed_token(*given))

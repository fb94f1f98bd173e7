"""The Triton kernels, run on a CPU by Triton's interpreter and compared with plain PyTorch.

    TRITON_INTERPRET=1 python -m tests.interpreted linear

The variable has to be set before Triton is imported, so `test_interpreted.py` starts a process for
each kernel. What a GPU makes of them, its shared memory and its rounding, only the GPU tests show.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def linear() -> None:
    from ptq.int8 import gemm
    from ptq.int8.epilogue import Epilogue, reference_linear

    # there are none here; few programs do several tiles each
    gemm._multiprocessors = lambda device: 2
    for m, k, n in ((100, 64, 96), (130, 112, 33)):
        codes = random_codes(m, k)
        weight = random_codes(n, k)
        x_params = torch.rand(3, m)
        places = torch.randint(0, m + 3, (m // 2,))
        w_scale, zero_correction, w_offset, bias = torch.randn(4, n)
        code_sums = codes.sum(dim=1, dtype=torch.int32)
        tables = ((x_params, None), (x_params, places), (x_params[:, :1].contiguous(), None))
        optional_terms = ((code_sums, None), (w_offset, None), (bias, None), tables)
        for own_sums, own_offset, own_bias, (table, positions) in itertools.product(
            *optional_terms
        ):
            epilogue = Epilogue(
                table,
                positions,
                own_sums,
                1e-3 * w_scale,
                zero_correction,
                own_offset,
                own_bias,
            )
            found = gemm.launch_linear(codes, weight, epilogue, torch.float32)
            expected = reference_linear(codes, weight, epilogue, torch.float32)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def rows() -> None:
    from ptq.int8 import row_kernels

    for shape in ((200, 48), (13, 1040), (6, 4096)):
        codes = random_codes(*shape)
        assert torch.equal(row_kernels.row_sums(codes), codes.sum(dim=1, dtype=torch.int32))
    table = torch.randn(3, 300)
    for tokens in (1, 256, 700):
        positions = torch.arange(200, 200 + tokens)
        assert torch.equal(
            row_kernels.lookup_columns(table, positions), table[:, positions.clamp(max=299)]
        )


def attention() -> None:
    from ptq.int8 import attention_kernel
    from ptq.int8.attention import reference_attention

    for batch, heads, tokens, keys, channels in ((2, 2, 70, 70, 64), (1, 2, 1, 130, 48)):
        q, k, v = (random_codes(batch, heads, n, channels) for n in (tokens, keys, keys))
        mask = torch.full((tokens, keys), float("-inf")).triu_(keys - tokens + 1)
        scales = torch.tensor([1e-4, 1 / 255, 1 / 255])
        zeros = torch.tensor([3, -7, -128, 5]).int()
        for seen, filled in itertools.product((mask, None), (None, torch.tensor([keys - 3]))):
            given = q, k, v, seen, filled, scales, zeros, 0.2, 8, torch.float32
            error = (attention_kernel.launch_attention(*given) - reference_attention(*given)).abs()
            # a weight at the edge of two codes may get either
            assert (error > 1e-5).float().mean() < 0.005
            assert error.max() < 2 * (128 + 5) / 255**2 + 1e-5


def numerators() -> None:
    from ptq.int8 import numerator_kernel
    from ptq.int8.numerators import reference_numerators

    for batch, heads, tokens, keys, channels in ((2, 2, 70, 70, 64), (1, 3, 1, 130, 48)):
        q, k, v = (random_codes(batch, heads, n, channels) for n in (tokens, keys, keys))
        mask = torch.full((tokens, keys), float("-inf")).triu_(keys - tokens + 1)
        queries = parameters(heads, tokens, 1e-2)
        # positions from the last one of the table on share its parameters
        of_keys = parameters(heads, keys - 5, 1e-2)
        values = parameters(heads, 1, 1 / 255)[:, :, 0]
        weights = 0.3 + torch.rand(heads)
        for seen, filled, sinks, bits in (
            (mask, None, 3, 8),
            (None, torch.tensor([keys - 3]), 3, 8),
            (mask, torch.tensor([keys - 3]), 0, 4),
            (None, None, 1, 6),
        ):
            given = q, k, v, seen, filled, queries, of_keys, values, weights, sinks, 0.2, bits
            found = numerator_kernel.launch_numerators(*given, torch.float32)
            error = (found - reference_numerators(*given, torch.float32)).abs()
            # a numerator at the edge of two codes may get either
            assert (error > 1e-5).float().mean() < 0.01
            assert error.max() < 3 / 2**bits


def parameters(heads: int, positions: int, scale: float) -> torch.Tensor:
    """Scales around `scale` and zero points of heads and positions (2, H, P)."""
    scales = scale * (0.5 + torch.rand(heads, positions))
    return torch.stack((scales, torch.randint(-9, 9, (heads, positions)).float()))


def step_attention() -> None:
    from models.decoding import step_attention_kernel

    for tokens, keys, channels in ((1, 37, 48), (4, 20, 64)):
        q, k, v = (torch.randn(2, 3, n, channels) for n in (tokens, keys, keys))
        behind = torch.arange(keys) >= keys - 3
        mask = torch.full((tokens, keys), float("-inf")).triu_(keys - tokens + 1)
        for seen, filled in itertools.product((mask, None), (None, torch.tensor([keys - 3]))):
            whole = torch.zeros(tokens, keys) if seen is None else seen
            whole = whole if filled is None else whole.masked_fill(behind, float("-inf"))
            expected = F.scaled_dot_product_attention(q, k, v, whole, scale=0.2)
            found = step_attention_kernel.launch_attention(q, k, v, 0.2, seen, filled)
            torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


KERNELS = {f.__name__: f for f in (linear, rows, attention, numerators, step_attention)}

if __name__ == "__main__":
    torch.manual_seed(0)
    KERNELS[sys.argv[1]]()

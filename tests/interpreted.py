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


def linear_gelu() -> None:
    from ptq.int8 import gemm
    from ptq.int8.blocks.operators import reference_linear_gelu
    from ptq.int8.epilogue import Epilogue

    gemm._multiprocessors = lambda device: 2
    cases = (
        (130, 48, 112, "erf", 8, 0, False, False),
        (64, 48, 128, "tanh", 8, 3, False, False),
        (100, 32, 33, "tanh", 6, 2, True, True),
        (60, 32, 128, "erf", 8, 0, True, False),
    )
    for m, k, n, form, bits, sinks, scaled, shifted in cases:
        codes = random_codes(m, k)
        terms = torch.randn(4, n)
        positions = torch.randint(0, 9, (m // 2,))
        sums = codes.sum(dim=1, dtype=torch.int32)
        epilogue = Epilogue(
            input_table(7), positions, sums, 1e-2 * terms[0], 0.1 * terms[1], *(0.01 * terms[2:])
        )
        vectors = torch.randn(2, n)
        shifts = (vectors[0], sinks, vectors[1], sinks + 1) if sinks else (None, 0, None, 0)
        scale = 0.5 + torch.rand(n) if scaled else None
        shift = 0.1 * torch.randn(n) if shifted else None
        given = (
            codes,
            random_codes(n, k),
            epilogue,
            input_table(5),
            form,
            bits,
            *shifts,
            scale,
            shift,
        )
        found, out_sums = gemm.launch_linear_gelu(*given)
        expected, _ = reference_linear_gelu(*given)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.005
        assert torch.equal(out_sums, found.sum(dim=1, dtype=torch.int32))


def norm_codes() -> None:
    for channels in (40, 160):  # a row in one piece, and in two
        compare_norm_codes(channels)


def compare_norm_codes(channels: int) -> None:
    from ptq.int8.blocks import norm_kernel
    from ptq.int8.blocks.norms import Branch, Grid, Modulation, Norm, reference_norm_codes
    from ptq.int8.epilogue import Epilogue

    rows = 12
    positions = torch.tensor([3, 0, 7, 5])
    table = input_table(6)  # the last position is that of 7, too
    vectors = torch.randn(6, channels)
    modulation = torch.randn(rows, 6 * channels).chunk(6, dim=1)  # strided parts of one tensor
    x = torch.randn(rows, channels)
    epilogue = Epilogue(
        input_table(3),
        positions,
        torch.randint(-99, 99, (rows,), dtype=torch.int32),
        1e-4 * torch.rand(channels),
        *vectors[3:],
    )
    parts = torch.randint(-9999, 9999, (3, rows, channels), dtype=torch.int32)
    plain = Grid(input_table(1), None)
    of_image = Modulation(modulation[1][:3], modulation[0][:3], vectors[2])
    # eleven rows of a class, and one that the others share
    shared_gate = modulation[2][:11]
    cases = (
        (Norm(), Modulation(), plain, None),
        (Norm("silu"), Modulation(), Grid(table, positions), None),
        (Norm("rms", vectors[0], None, 1e-5), Modulation(), Grid(table, positions, 6), None),
        (Norm("layer", None, None, 1e-6), of_image, Grid(table, positions), Branch(x.flip(0))),
        (
            Norm("layer", vectors[0], vectors[1], 1e-6),
            Modulation(modulation[1], modulation[0]),
            Grid(table, positions, 8, vectors[0], 2),
            Branch(parts, shared_gate, epilogue),
        ),
        (Norm(), Modulation(), Grid(table, positions), Branch(parts[:1], None, epilogue)),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for norm, shifts, grid, branch in cases:
            if branch is not None and branch.epilogue is None:
                branch = branch._replace(value=branch.value.to(dtype))
            given = x.to(dtype), norm, shifts, grid, branch
            stream, codes, sums = norm_kernel.launch_norm_codes(*given)
            # the interpreter cuts bfloat16 off where a GPU rounds
            torch.testing.assert_close(stream, reference_norm_codes(*given)[0])
            _, expected_codes, _ = reference_norm_codes(stream, norm, shifts, grid)
            # what lies at the edge of two codes may get either
            difference = (codes.int() - expected_codes.int()).abs()
            assert difference.max() <= 1
            assert difference.float().mean() < 0.01
            assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


def keys() -> None:
    from ptq.int8.blocks import keys_kernel
    from ptq.int8.blocks.attention import HeadNorm, normalise_heads

    for channels, kind in ((64, "layer"), (48, "unit"), (16, "none")):
        weight, bias = 1 + 0.3 * torch.randn(2, channels)
        norm = HeadNorm(kind, k_weight=weight, k_bias=bias, eps=1e-6)
        # as a product leaves them: (B, T, 3, H, D)
        _, k, v = torch.randn(2, 7, 3, 3, channels).permute(2, 0, 3, 1, 4).unbind(0)
        cache = torch.randn(2, 2, 3, 12, channels)
        expected = cache.clone()
        places = torch.tensor([3, 4, 5, 6, 7, 8, 11])
        keys_kernel.launch_store(*cache, k, v, places, norm)
        expected[0][:, :, places] = normalise_heads(k, kind, weight, bias, 1e-6)
        expected[1][:, :, places] = v
        torch.testing.assert_close(cache, expected)


def linear_keys() -> None:
    from ptq.int8 import gemm
    from ptq.int8.blocks.operators import reference_linear_keys
    from ptq.int8.epilogue import Epilogue

    gemm._multiprocessors = lambda device: 2
    codes = random_codes(100, 48)
    weight = random_codes(3 * 128, 48)
    terms = torch.randn(3, 3 * 128)
    sums = codes.sum(dim=1, dtype=torch.int32)
    epilogue = Epilogue(input_table(7), torch.arange(50), sums, 1e-2 * terms[0], *terms[1:], None)
    for kind in ("layer", "unit"):
        given = codes, weight, epilogue, torch.float32, 2, kind, 1e-6
        found, factors = gemm.launch_linear_keys(*given)
        expected, expected_factors = reference_linear_keys(*given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(factors, expected_factors, rtol=1e-4, atol=1e-6)


def attention_codes() -> None:
    from ptq.int8.blocks import attention_kernel
    from ptq.int8.blocks.attention import HeadNorm, reference_attention_codes
    from ptq.int8.blocks.norms import Grid

    positions = torch.arange(3, 73)
    for channels, keys, kind in ((64, 70, "layer"), (48, 130, "unit"), (16, 70, "none")):
        vectors = 1 + 0.3 * torch.randn(4, channels)
        shift = (torch.randn(2 * channels), 5) if kind == "layer" else ()
        grid = Grid(input_table(60), positions, 8, *shift)
        head_scale = 2 + torch.rand(2) if kind == "unit" else None
        norm = HeadNorm(kind, *vectors, 1e-6, head_scale, keys == 70)
        # as a product leaves them: (B, T, 3, H, D)
        q, k, v = torch.randn(2, 130, 3, 2, channels).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.zeros(70, keys).masked_fill(torch.rand(70, keys) < 0.4, float("-inf"))
        mask[:, 69] = 0
        factors = None
        if norm.keys and kind == "layer":  # the product before has left them
            factors = torch.rsqrt(k[:, :, :keys].var(dim=-1, correction=0) + 1e-6)  # (B, H, S)
            factors = factors.transpose(1, 2).flatten(0, 1).contiguous()
        for causal, seen, own in ((keys == 70, None, factors), (False, mask, None)):
            given = q[:, :, :70], k[:, :, :keys], v[:, :, :keys]
            rest = 0.2, causal, seen, grid
            norm = norm._replace(factors=own)
            codes, sums = attention_kernel.launch_attention_codes(*given, norm, *rest)
            expected = reference_attention_codes(*given, norm, *rest)[0]
            difference = (codes.int() - expected.int()).abs()
            assert difference.max() <= 1
            assert difference.float().mean() < 0.005
            assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


def input_table(columns: int) -> Tensor:
    """Scales, zero points and their products of so many positions (3, P)."""
    scale = 0.02 + 0.02 * torch.rand(columns)
    zero_point = torch.randint(-20, 20, (columns,)).float()
    return torch.stack((scale, zero_point, scale * zero_point))


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


def uniform_numbers() -> None:
    from models.decoding import philox, philox_kernel

    index = torch.tensor([0, 7, 2**40 + 3])
    steps = torch.arange(300) // 7
    numbers = torch.arange(300) % 7
    for seed in (0, 1, 2**31 + 5, 2**63 - 1):
        expected = philox.uniform_numbers(seed, index, steps, numbers)
        assert torch.equal(philox_kernel.launch_philox(seed, index, steps, numbers), expected)


def drawing() -> None:
    from models.decoding import drawing, drawing_kernel

    uniforms = torch.rand(24, dtype=torch.float64)
    weight = torch.tensor([1.5 / 9], dtype=torch.float64)
    for codes, (guidance, top_k, top_p) in itertools.product(
        (100, 512),
        (
            (None, 0, 0.0),
            (None, 30, 0.0),
            ("grown", 0, 0.955),
            ("grown", 90, 0.953),
            ("scaled", 0, 0.0),
            ("scaled", 1, 1e-9),
        ),
    ):
        rows = 48 if guidance else 24
        for logits in (
            3 * torch.randn(rows, codes),
            (3 * torch.randn(rows, codes)).round(),  # many ties
            torch.zeros(rows, codes),  # nothing else
        ):
            given = logits, uniforms, guidance, weight, 1.0, top_k, top_p
            found = drawing_kernel.launch_draw(*given)
            assert torch.equal(found, drawing.draw_tokens(*given)), (codes, guidance, top_k, top_p)


def drawing_next() -> None:
    from models.decoding import drawing, drawing_kernel

    for count, guided, offset in ((1, True, 1), (4, True, 0), (3, False, 2)):
        uniforms = torch.rand(5, 20, dtype=torch.float64)
        scales = torch.rand(20, dtype=torch.float64)
        rows = 10 if guided else 5
        logits = torch.randn(rows, count, 100)
        positions = torch.arange(8, 13)
        given = logits, positions, uniforms, scales, guided, 0.9, offset
        ids = torch.zeros(rows, 20, dtype=torch.long)
        expected_ids = ids.clone()
        found = drawing_kernel.launch_draw_next(ids, *given)
        assert torch.equal(found, drawing.draw_next(expected_ids, *given))
        assert torch.equal(ids, expected_ids)


def embedding() -> None:
    from models.decoding import embedding, embedding_kernel

    ids = torch.randint(0, 30, (5, 9))
    for dtype in (torch.float32, torch.float64):
        tokens, own, following = torch.randn(3, 30, 40, dtype=dtype)
        given = ids, torch.tensor([4]), tokens, own, following
        assert torch.equal(embedding_kernel.launch_embed(*given), embedding.embed_token(*given))


def step_linear(n: int, k: int, positions: int, with_offset: bool = True):
    """A linear layer of a decoding step with random codes and terms."""
    from ptq.int8.steps.products import StepLinear

    scale = 0.02 + 0.02 * torch.rand(positions)
    zero_point = torch.randint(-20, 20, (positions,)).float()
    return StepLinear(
        weight=random_codes(n, k),
        table=torch.stack((scale, zero_point, scale * zero_point)),
        w_scale=1e-3 * torch.rand(n),
        zero_correction=torch.randn(n),
        w_offset=1e-2 * torch.randn(n) if with_offset else None,
        bias=torch.randn(n),
        bits=8,
        input_scale=0.5 + torch.rand(k) if with_offset else None,
        input_shift=torch.randn(k) if with_offset else None,
    )


def step_products() -> None:
    from ptq.int8.epilogue import exact_product
    from ptq.int8.steps import products

    tiling = products.Tiling(32, 32, 32, parts=2)
    for rows, n, k, place, with_offset in ((40, 48, 96, 5, True), (7, 33, 80, 1, False)):
        position = torch.tensor([place])
        linear = step_linear(n, k, positions=4, with_offset=with_offset)
        following = step_linear(16, n, positions=9, with_offset=with_offset)
        codes = random_codes(rows, k)
        sums = codes.sum(dim=1, dtype=torch.int32)
        parts = products.product_parts(linear, codes, tiling=tiling)
        assert len(parts) == 2
        assert torch.equal(parts.sum(dim=0), exact_product(codes, linear.weight))
        given = linear, codes, sums, position, torch.float32
        values = products.product_values(*given, tiling=tiling._replace(parts=1))
        torch.testing.assert_close(values, products.reference_values(*given), rtol=1e-5, atol=1e-4)
        hidden_sums = torch.zeros(rows, dtype=torch.int32)
        given = linear, following, "erf", codes, sums
        hidden = products.product_codes(
            *given, hidden_sums, position, tiling=tiling._replace(parts=1)
        )
        expected = products.reference_codes(*given, position)
        assert_codes_agree(hidden, expected)
        assert torch.equal(hidden_sums, hidden.sum(dim=1, dtype=torch.int32))


def assert_codes_agree(codes: Tensor, expected: Tensor) -> None:
    """What lies at the edge of two codes may get either."""
    difference = (codes.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.002


def step_norms() -> None:
    from ptq.int8.steps import norms

    rows = 12
    channels = 40
    for place, with_offset in ((9, True), (2, False)):
        position = torch.tensor([place])
        before = step_linear(channels, 16, positions=3, with_offset=with_offset)
        reader = step_linear(16, channels, positions=20)
        # eight rows of a class and one that the others share, at four positions
        table = torch.randn(9, 4, 6 * channels)
        shift, scale, gate, *_ = table.chunk(6, dim=-1)
        parts = torch.randint(-5000, 5000, (3, rows, channels), dtype=torch.int32)
        sums = torch.randint(-99, 99, (rows,), dtype=torch.int32)
        branch = norms.Branch(parts, before, sums, gate)
        gain, bias, kappa = torch.randn(3, channels)
        norm = norms.StepNorm(gain, bias, kappa, 1e-6, reader)
        residual = torch.randn(rows, channels)
        cases = (
            (None, norm, shift, scale),
            (branch, norm, shift, scale),
            (branch, None, None, None),
        )
        for given in cases:
            found = norms.launch_norm(residual, position, *given)
            expected = norms.reference_norm(residual, position, *given)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
            if given[1] is None:
                continue
            assert_codes_agree(found[1], expected[1])
            assert torch.equal(found[2], found[1].sum(dim=1, dtype=torch.int32))
            assert not found[3].any()


def step_float_attention() -> None:
    from ptq.int8.steps import float_attention

    for channels, slots, place in ((24, 40, 37), (16, 40, 2)):
        heads = 2
        norms = torch.randn(2, 2, channels).unbind()
        output = step_linear(16, 32, positions=30).table[:2]
        attention = float_attention.FloatStepAttention(*map(tuple, norms), heads, output, 8)
        qkv = torch.randn(3, 3 * heads * channels)
        cache = torch.randn(2, 3, heads, slots, channels)
        expected_cache = cache.clone()
        position = torch.tensor([place])
        sums = torch.zeros(3, dtype=torch.int32)
        codes = float_attention.attend_floats(attention, qkv, *cache, position, sums)
        expected, expected_sums = float_attention.reference_float_step(
            attention, qkv, *expected_cache, position
        )
        assert_codes_agree(codes, expected)
        assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))
        torch.testing.assert_close(cache, expected_cache)


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        linear,
        linear_gelu,
        linear_keys,
        norm_codes,
        keys,
        attention_codes,
        rows,
        attention,
        numerators,
        step_attention,
        uniform_numbers,
        drawing,
        drawing_next,
        embedding,
        step_products,
        step_norms,
        step_float_attention,
    )
}

if __name__ == "__main__":
    torch.manual_seed(0)
    KERNELS[sys.argv[1]]()

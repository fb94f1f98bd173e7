"""Hadamard matrices of every width that occurs, and rotations by them that are orthogonal, fast and
portable."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import registry
from ptq.methods.hadamard import (
    AcrossHeads,
    HadamardRotation,
    core_order,
    hadamard_matrix,
    kronecker_factors,
    largest_order,
)
from ptq.types import ConfigError

CORES = {  # width of a released model: k of k 2^m
    768: 12,
    3072: 12,
    48: 12,
    1024: 1,
    4096: 1,
    64: 1,
    16: 1,
    32: 1,
    1280: 20,
    5120: 20,
    80: 20,
    20: 20,
    1408: 44,
    88: 44,
    1536: 12,
    6144: 12,
    24: 12,
    12: 12,
    3584: 28,
    1920: 60,
    7680: 60,
    3200: 200,
    8704: 68,
    2304: 36,
    9216: 36,
    36: 36,
}
# width without a matrix here: order of the blocks that it is cut into
NONE = {100: 20, 30: 2, 5: 1}


@cache
def preset_widths() -> tuple[set[int], set[tuple[int, int]]]:
    """Widths of all inputs, and (heads, channels of a head), of all presets."""
    widths = set()
    heads = set()
    for name in registry.PRESETS:
        adapter = registry.build_outline(name).adapter
        for site in adapter.sites:
            width = adapter.model.get_submodule(site.name).in_features
            widths.add(width)
            if site.kind == "proj":
                heads.add((width // adapter.matmuls[0].channels, adapter.matmuls[0].channels))
    return widths, heads


def dense(rotation: HadamardRotation | AcrossHeads, width: int) -> Tensor:
    return rotation(torch.eye(width, dtype=torch.float64))


def is_hadamard(matrix: Tensor) -> bool:
    n = len(matrix)
    return bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.t(), n * torch.eye(n))


@pytest.mark.parametrize(
    "n", sorted({1, 2, 4, 8, *CORES.values(), *(n for n in CORES if n <= 2304)})
)
def test_the_matrix_has_entries_of_one_and_orthogonal_rows(n: int) -> None:
    assert is_hadamard(hadamard_matrix(n))  # sums of ones are exact in float32


@pytest.mark.parametrize("n", [4, 12, 28, 64])
def test_a_matrix_lies_on_the_device_that_was_asked_for(n: int) -> None:
    """Every construction; the device `meta` mixes with the CPU as little as a GPU does."""
    assert hadamard_matrix(n, torch.device("meta")).shape == (n, n)
    assert {
        b.device.type for b in HadamardRotation(n, seed=0, device=torch.device("meta")).buffers()
    } == {"meta"}


@pytest.mark.parametrize(("n", "k"), CORES.items())
def test_an_order_splits_into_the_smallest_core_and_a_power_of_two(n: int, k: int) -> None:
    a, b = kronecker_factors(n)
    assert (core_order(n), largest_order(n), a * b) == (k, n, n)
    assert is_hadamard(hadamard_matrix(a))
    assert is_hadamard(hadamard_matrix(b))
    assert a + b <= 216  # 200 and 16: the products stay small


@pytest.mark.parametrize("n", [3, 6, 30, 92, 100])
def test_an_order_without_a_construction_is_refused(n: int) -> None:
    assert core_order(n) is None
    with pytest.raises(
        ConfigError, match=f"^hadamard: there is no matrix of order {n} here, allowed is k 2"
    ):
        hadamard_matrix(n)


def test_a_width_without_a_matrix_is_cut_into_the_largest_blocks() -> None:
    assert {n: largest_order(n) for n in NONE} == NONE
    rotation = dense(HadamardRotation(100), 100)
    expected = torch.block_diag(*[hadamard_matrix(20).double() / 20**0.5] * 5)
    torch.testing.assert_close(rotation, expected)


def test_every_width_of_every_preset_is_rotated_as_a_whole_and_back() -> None:
    widths, heads = preset_widths()
    assert {768, 1024, 1280, 1408, 1536, 1920, 3200, 3584, 8704} <= widths
    assert {(30, 64), (12, 64), (16, 88), (32, 100), (5, 32)} <= heads
    for width in sorted(widths):
        assert largest_order(width) == width
        x = torch.randn(2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rotation = HadamardRotation(width, seed=0)
        y = rotation(x)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        torch.testing.assert_close(rotation.inverse(y), x, rtol=0, atol=1e-12)
        one = torch.zeros(width, dtype=torch.float64)
        one[width // 3] = 7.0
        # spread over all
        torch.testing.assert_close(rotation(one).abs(), torch.full_like(one, 7 / width**0.5))


@pytest.mark.parametrize("n", [12, 64, 100, 160, 768])
@pytest.mark.parametrize("seed", [None, 3])
def test_the_two_products_are_the_matrix(n: int, seed: int | None) -> None:
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = HadamardRotation(n, seed)
    blocks = (
        torch.block_diag(*[hadamard_matrix(largest_order(n)).double()] * (n // largest_order(n)))
        / largest_order(n) ** 0.5
    )
    signed = x if seed is None else x * rotation.signs
    torch.testing.assert_close(rotation(x), signed @ blocks, rtol=0, atol=1e-13)
    assert seed is None or set(rotation.signs.tolist()) == {-1.0, 1.0}


def test_a_power_of_two_agrees_with_the_butterfly() -> None:
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x.numpy().copy()
    half = 1
    while half < 1024:
        pairs = expected.reshape(4, -1, 2, half)
        expected = np.stack(
            (pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2
        ).reshape(4, 1024)
        half *= 2
    np.testing.assert_allclose(HadamardRotation(1024)(x).numpy(), expected / 32, atol=1e-13)


@pytest.mark.parametrize(
    ("heads", "size"), [(12, 64), (16, 88), (30, 64), (2, 100), (5, 32), (3, 16), (1, 64)]
)
def test_rotating_heads_and_then_across_them_mixes_all_channels_evenly(
    heads: int, size: int
) -> None:
    width = heads * size
    within = dense(HadamardRotation(size), width)  # head by head
    total = AcrossHeads(heads, size)(within)
    torch.testing.assert_close(
        total @ total.t(), torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(total.abs(), torch.full_like(total, width**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_number_format_is_kept(dtype: torch.dtype) -> None:
    assert HadamardRotation(96, 0)(torch.ones(2, 96, dtype=dtype)).dtype == dtype
    assert AcrossHeads(3, 16)(torch.ones(2, 48, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "rotation", [HadamardRotation(96, 1), AcrossHeads(4, 24), AcrossHeads(3, 32)]
)
def test_copies_and_pickles_rotate_alike(rotation: HadamardRotation | AcrossHeads) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    for other in (
        copy.deepcopy(rotation),
        pickle.loads(pickle.dumps(rotation)),
        copy.deepcopy(rotation).double(),
    ):
        assert torch.equal(other(x), rotation(x))
    assert {b.device.type for b in copy.deepcopy(rotation).to("meta").buffers()} == {"meta"}
    assert not rotation.state_dict()


def test_matrices_are_built_once_and_shared() -> None:
    one = HadamardRotation(768)
    other = HadamardRotation(768, seed=0)
    assert one.left is other.left
    assert one.right is other.right


class Products(TorchDispatchMode):
    """The products that are made inside, by the name of their operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [48, 768, 1280, 4096])
def test_all_rows_are_in_one_product_per_factor(width: int) -> None:
    rotation = HadamardRotation(width)
    with Products() as made:
        rotation(torch.randn(3, 5, width))
    assert made.names == ["mm"] * (1 if len(rotation.right) == 1 else 2)

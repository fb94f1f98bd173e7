"""One thread for every test: tensors are small, two workers fill two cores, and sums depend on the
number of threads."""

from __future__ import annotations

import gc
import os

# before torch starts its pool; processes that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_collection_finish() -> None:
    """Set aside what imports and collection have made, half a million objects that stay: every run
    collects garbage before it measures memory, and need not look through them each time."""
    gc.collect()
    gc.freeze()

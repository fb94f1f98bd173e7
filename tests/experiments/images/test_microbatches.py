"""Image i is the same however many images are asked for and however the work is split; calibration
has its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from experiments.images import shards
from experiments.images.microbatches import (
    WORTH_CAPTURING,
    Plan,
    compile_steps,
    discard_shards,
    draw_pool,
    replayed_steps,
    require_graphs,
    sample_images,
    to_uint8,
)
from experiments.images.shards import Shard
from models.registry import Generator
from ptq.calibration import POOL_OFFSET
from ptq.omniquant.graphs import record_graph
from ptq.types import ConfigError

CPU = torch.device("cpu")


def plan(generator: Generator, images: int, seed: int = 0, microbatch: int = 4) -> Plan:
    return Plan(images, 10, seed, microbatch, dict(generator.preset.samplers["official"]))


def silent(items: Iterable, what: str) -> Iterable:
    return items


class Counting:
    """A generator whose calls of `sample` are kept, (labels, seed, index) each."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.preset = generator.preset
        self.decode = generator.decode
        self.calls: list[tuple[Tensor, int, Tensor]] = []

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        self.calls.append((labels, seed, index))
        return self.generator.sample(labels, seed, index, settings)


@pytest.fixture(scope="module")
def twin() -> Generator:
    return models.load("rar_twin")


@pytest.fixture(scope="module")
def ten(twin: Generator, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Ten images in micro-batches of four."""
    return sample_images(twin, plan(twin, 10), tmp_path_factory.mktemp("ten"), CPU, silent)


@pytest.mark.parametrize("n", [3, 8])
def test_the_first_images_do_not_depend_on_how_many_are_asked_for(
    twin: Generator, ten: np.ndarray, tmp_path: Path, n: int
) -> None:
    fewer = sample_images(twin, plan(twin, n), tmp_path, CPU, silent)
    assert fewer.shape == (n, 3, 32, 32)
    assert np.array_equal(fewer, ten[:n])


def test_the_last_micro_batch_is_padded_and_the_padding_thrown_away(
    twin: Generator, ten: np.ndarray, tmp_path: Path
) -> None:
    counting = Counting(twin)
    images = sample_images(counting, plan(twin, 6), tmp_path, CPU, silent)
    assert [index.tolist() for _, _, index in counting.calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [labels.tolist() for labels, _, _ in counting.calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert np.array_equal(images, ten[:6])


def test_shards_redone_in_another_order_are_the_same_and_kept_ones_stay(
    twin: Generator, ten: np.ndarray, tmp_path: Path
) -> None:
    sample_images(twin, plan(twin, 10), tmp_path, CPU, silent)
    for number in (0, 1):
        shards.shard_path(tmp_path, number).unlink()
    (tmp_path / "00001.tmp1").write_bytes(b"half a shard of a killed run")
    backwards = plan(twin, 10)
    batches = list(backwards.batches())
    counting = Counting(twin)
    for number in (1, 0):  # one at a time, last first: another process could do either
        index = batches[number]
        tokens = counting.sample(index % 10, 0, index, backwards.settings)
        shards.write_shard(
            tmp_path,
            number,
            Shard(to_uint8(twin.decode(tokens)).numpy(), tokens.numpy()),
            backwards.run,
        )
    again = sample_images(counting, backwards, tmp_path, CPU, silent)
    assert len(counting.calls) == 2
    assert np.array_equal(again, ten)


def test_another_seed_gives_other_images_of_the_same_classes(
    twin: Generator, ten: np.ndarray, tmp_path: Path
) -> None:
    other = sample_images(twin, plan(twin, 4, seed=1), tmp_path, CPU, silent)
    assert all(not np.array_equal(a, b) for a, b in zip(other, ten))


@pytest.mark.gpu
def test_compiled_steps_make_the_same_images_but_for_rounding(tmp_path: Path) -> None:
    generator = models.load("rar_twin", device="cuda")
    device = torch.device("cuda")
    expected = sample_images(generator, plan(generator, 10), tmp_path / "eager", device, silent)
    compile_steps(generator)
    found = [
        sample_images(generator, plan(generator, 10), tmp_path / name, device, silent)
        for name in "ab"
    ]
    assert np.array_equal(found[0], found[1])
    assert (found[0] == expected).mean() > 0.9


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("rar_twin", "cpu", "sampler.compiled: true needs a GPU, allowed on cpu is false"),
        (
            "mar_twin",
            "cuda",
            "sampler.compiled: true, but MAR's sequences change their length, allowed is false",
        ),
    ],
)
def test_compiled_steps_are_refused_where_there_are_none(name: str, device: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_graphs(models.load(name), torch.device(device))
    assert str(refused.value) == said


def test_steps_are_replayed_where_many_micro_batches_are_made(twin: Generator) -> None:
    cuda = torch.device("cuda")
    with replayed_steps(twin, cuda, WORTH_CAPTURING):
        assert twin.decoder.exact
        assert twin.decoder.record is record_graph
    assert twin.decoder is None
    with replayed_steps(twin, cuda, WORTH_CAPTURING - 1):
        assert twin.decoder is None
    with replayed_steps(twin, CPU, 1000):
        assert twin.decoder is None
    latent = models.build("mar_twin")
    with replayed_steps(latent, cuda, 1000):
        assert not hasattr(latent, "decoder")
    twin.decoder = compiled = twin.captured(compiled=False)
    with replayed_steps(twin, cuda, 1000):
        assert twin.decoder is compiled
    twin.decoder = None


def test_pixels_are_rounded_to_nearest_and_clipped() -> None:
    values = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 254.4 / 255, 254.6 / 255, 1.0, 1.3])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(values).dtype == torch.uint8


def test_discarding_shards_twice_is_fine(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.npy").touch()
    discard_shards(tmp_path / "shards")
    discard_shards(tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


# --- the calibration pool


def pool(generator: Generator, labels: Tensor, cache: Path, seed: int = 0) -> Tensor:
    return draw_pool(
        generator, labels, seed, 4, dict(generator.preset.samplers["official"]), CPU, cache, silent
    )


def test_the_pool_never_shares_an_index_with_an_evaluation(twin: Generator, tmp_path: Path) -> None:
    counting = Counting(twin)
    pool(counting, torch.arange(6), tmp_path / "pool.safetensors")
    drawn = torch.cat([index for _, _, index in counting.calls])
    largest = max(int(i.max()) for i in Plan(10**6, 10, 0, 128, {}).batches())
    assert len(drawn.unique()) == len(drawn) == 8
    assert int(drawn.min()) >= POOL_OFFSET > largest
    images = twin.sample(
        torch.arange(4), 0, torch.arange(4), dict(twin.preset.samplers["official"])
    )
    assert (
        not (pool(twin, torch.arange(6), tmp_path / "pool.safetensors")[:4] == images)
        .all(dim=1)
        .any()
    )


def test_the_pool_is_padded_cached_and_drawn_again_when_damaged(
    twin: Generator, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "pool.safetensors"
    labels = torch.tensor([7, 1, 7, 3, 2])
    counting = Counting(twin)
    first = pool(counting, labels, cache)
    assert first.shape == (5, 64)
    assert [len(c[0]) for c in counting.calls] == [4, 4]
    assert torch.equal(pool(counting, labels, cache), first)
    assert len(counting.calls) == 2
    for damage in (cache.read_bytes()[:100], b""):
        cache.write_bytes(damage)
        assert torch.equal(pool(twin, labels, cache), first)
    save_file({"other": torch.zeros(1)}, cache)
    assert torch.equal(pool(twin, labels, cache), first)
    assert torch.equal(pool(twin, labels[:3], tmp_path / "fewer.safetensors"), first[:3])
    assert not torch.equal(pool(twin, labels, tmp_path / "seed.safetensors", seed=1), first)
    assert [p.name for p in cache.parent.iterdir()] == ["pool.safetensors"]

"""What a run uses of plugins, by the text of their files: who changes a method of their own and
runs it again gets another run, not the results of before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments.config.schema import RunConfig
from ptq.files import value_digest
from ptq.registry.entries import FORMATS, ROUNDERS, SELECTORS, TRANSFORMS, Registry
from ptq.registry.plugins import is_of_plugin


def plugin_digests(config: RunConfig) -> dict[str, str]:
    """Digests (16 hex digits) of the files of plugins that a run's config uses, by what it uses."""
    digests = {}
    for registry, name in used_names(config):
        if name not in registry:
            continue  # attention weights may be left in full precision
        home = Path(registry.homes[name])
        if is_of_plugin(home):
            # with the files that those of plugins import
            texts = [path.read_text() for path in [home, *sorted(home.parent.glob("_*.py"))]]
            digests[f"{registry.noun}.{name}"] = value_digest(texts, 16)
    return digests


def used_names(config: RunConfig) -> Iterator[tuple[Registry, str]]:
    """What a quantized run uses of each registry."""
    method = config.method
    for name in TRANSFORMS:
        if getattr(method, name, False):
            yield TRANSFORMS, name
    yield ROUNDERS, method.rounder
    yield SELECTORS, config.calib.selector
    for name in (method.softmax, config.quant.weights.format, config.quant.activations.format):
        yield FORMATS, name

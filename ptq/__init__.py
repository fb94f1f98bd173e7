"""Post-training quantization of autoregressive image generators. Knows no model: adapters describe
models to it.

    ptq.quantize(model, method="ptq4arvg", bits="w8a8")
    ptq.save(model, "exports/rar_twin")
    model = ptq.load("exports/rar_twin", models.outline("rar_twin", tokenizer=True))

`ptq.recipe.named("ptq4arvg", "w6a6")` is a recipe as a value, which `quantize` takes for `method`;
`ptq.registry.load_plugins(FOLDER)` takes in methods that lie elsewhere.
"""

from __future__ import annotations

import importlib

# Where each public name is defined. They are looked up when they are asked for: every command
# imports `ptq.errors` before it reads its options, and must not load PyTorch for that.
PUBLIC = {
    "CalibrationSet": "ptq.sites",
    "ConfigError": "ptq.spec",
    "ExportError": "ptq.int8.exports.export_files",
    "NonFiniteError": "ptq.numbers.numerics",
    "Pool": "ptq.calibration",
    "QuantSpec": "ptq.spec",
    "Quantization": "ptq.use.quantizing",
    "Recipe": "ptq.recipe",
    "Scope": "ptq.sites",
    "draw_pool": "ptq.use.quantizing",
    "load": "ptq.use.saving",
    "make_pool": "ptq.use.quantizing",
    "quantize": "ptq.use.quantizing",
    "save": "ptq.use.saving",
}

MODULES = ("recipe", "registry")

__all__ = [*PUBLIC, *MODULES]


def __getattr__(name: str) -> object:
    if name in MODULES:
        return importlib.import_module(f"ptq.{name}")
    if name not in PUBLIC:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__

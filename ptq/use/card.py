"""The model card of an export: what it is, what it weighs, what was measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ptq.int8.exports.export_files import Export
from ptq.int8.exports.structure import Plain

CARD = "README.md"
# what a figure that the library measures is
MEANINGS = {
    "output error": "relative squared error of the teacher-forced outputs on 4 calibration rows",
}

LOADING = """\
```python
import models
import ptq

model = ptq.load("FOLDER OR REPOSITORY", models.outline("{name}", tokenizer=True))
images = model.generate(labels=[3, 7], seed=0)
```"""


def describe_model(export: Export, figures: Mapping[str, float]) -> str:
    """The card's text, with the header that the hub reads."""
    about = export.plain["about"]
    bits = about["bits"]
    title = f"{about['model']}, W{bits['weights']}A{bits['activations']}"
    if about.get("method"):
        title += f", {about['method']}"
    lines = [
        *_header_lines(about),
        f"# {title}",
        "",
        f"The transformer of `{about['model']}`, quantized after training to {bits['weights']}-bit "
        f"weights and {bits['activations']}-bit activations. {_running_line(export)}",
        "",
        LOADING.format(name=about["model"]),
        "",
        "`models` and `ptq` come with the package `ar-ptq`. The tokenizer is not in here; `models` "
        "finds it.",
        "",
        "## Size",
        "",
        *_size_lines(export),
        "",
        "## Figures",
        "",
        *_figure_lines(figures),
        "",
        "## Calibration",
        "",
        *_calibration_lines(about),
    ]
    return "\n".join(lines) + "\n"


def _header_lines(about: Plain) -> Iterator[str]:
    yield "---"
    yield "library_name: ar-ptq"
    licence = about.get("licence") or ""
    if re.fullmatch(r"[A-Za-z0-9.-]+", licence):
        yield f"license: {licence.lower()}"
    yield "tags: [image-generation, quantization, autoregressive]"
    yield "---"


def _running_line(export: Export) -> str:
    """How the layers compute after loading."""
    layers = export.plain["layers"].values()
    if not layers:
        return "Its linear layers are in full precision."
    simulated = sum("weight" in layer for layer in layers)
    if not simulated:
        return "Its linear layers run in integers."
    if simulated == len(layers):
        return "No kernel is here for such layers: they are simulated, bit for bit."
    return (
        f"{simulated} of its {len(layers)} linear layers have no kernel here and are simulated, "
        "bit for bit; the others run in integers."
    )


def _size_lines(export: Export) -> Iterator[str]:
    plain = export.plain
    sizes = export.sizes()
    full = plain["about"]["fp32_bytes"]
    yield "| part | MiB |"
    yield "| --- | --- |"
    yield f"| file | {_mib(plain['bytes'])}, {plain['bytes'] / full:.3f} of FP32 |"
    yield f"| codes of {len(plain['layers'])} layers | {_mib(sizes['codes'])} |"
    yield f"| their scales, zero points and biases | {_mib(sizes['parameters'])} |"
    yield f"| not quantized, in {plain['rest']} | {_mib(sizes['rest'])} |"
    yield f"| the transformer in FP32 | {_mib(full)} |"


def _figure_lines(figures: Mapping[str, float]) -> Iterator[str]:
    if not figures:
        yield "None was measured."
        return
    yield "| figure | value |"
    yield "| --- | --- |"
    for name, value in figures.items():
        meaning = f" ({MEANINGS[name]})" if name in MEANINGS else ""
        yield f"| {name}{meaning} | {value:.4g} |"


def _calibration_lines(about: Plain) -> Iterator[str]:
    for name, value in about.get("calibration", {}).items():
        yield f"- {name.replace('_', ' ')}: {value}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"

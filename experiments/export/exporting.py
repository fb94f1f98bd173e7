"""Calibrating a model and writing it as integers, with a summary of what a file holds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from experiments.config.compose import configure, require_integer_path
from experiments.config.recipe import build_recipe
from experiments.export.options import REST, Options
from experiments.identity.results import stored_result
from experiments.run import int8_export
from experiments.run.calibration import TRAINED, Quantization, quantize_model
from experiments.run.preparation import Run, prepare_run
from experiments.store import files, locks
from ptq.int8.exports import torchao_export
from ptq.int8.exports.encoding import check_export, check_integer_path
from ptq.int8.exports.export_files import CONFIG, TENSORS, Export
from ptq.pipeline import Track
from ptq.types import ConfigError

SHOWN = 0.01  # of the file: smaller parts that stay in floating point are not named one by one


def export_model(
    options: Options, overrides: list[str], track: Track = lambda it, what: it
) -> Path:
    """Calibrate and export; returns the folder, or the file for torchao.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line; nothing is written.
    """
    config = configure(overrides)
    require_integer_path(config)
    if options.format == "torchao" and "diffusion" in config.scope.kinds:
        raise ConfigError(
            "scope.kinds: diffusion has no place in an export for torchao, allowed are others"
        )
    if options.format == "torchao":
        torchao_export.require_torchao()  # refused now, not after the calibration
    run = prepare_run(config)
    check = check_integer_path if options.format == "torchao" else check_export
    check(run.generator.adapter, build_recipe(config))
    folder = Path(options.out) if options.out else run.folder / "int8"
    files.require_writable(folder / CONFIG, "out")
    # `experiments.run` trains into the same file
    with locks.hold_lock(run.folder):
        quantization = quantize_model(run, track, run.folder / TRAINED)
        if options.format == "torchao":
            return write_torchao(run, quantization, folder)
        export = int8_export.write_export(
            run,
            quantization.report,
            quantization.origin,
            folder,
            options.rest or REST,
            measured_figures(run),
        )
    print(summarize_export(export, folder / TENSORS))
    return folder


def measured_figures(run: Run) -> dict[str, float | None]:
    """The metrics of the finished run of the same config, if there is one, for the model card."""
    result = stored_result(run.folder, run.whole)
    return {} if result is None else dict(result["metrics"])


def write_torchao(run: Run, quantization: Quantization, folder: Path) -> Path:
    """Write the quantized model as torchao has it; returns the file."""
    config = run.config
    state = torchao_export.encode_state(run.generator.transformer, config.quant.weights.bits)
    about = int8_export.describe_export(run, quantization.report, quantization.origin)
    path = folder / f"{config.model.name}-torchao.safetensors"
    torchao_export.save_state(state, path, about)
    print(f"{path}  {path.stat().st_size / 2**20:.2f} MiB")
    return path


def summarize_export(export: Export, path: Path) -> str:
    """Sizes of the tensor file `path`, and what stays in floating point."""
    plain = export.plain
    sizes = export.sizes()
    size = plain["bytes"]
    full = plain["about"]["fp32_bytes"]
    lines = [
        f"{path}  {_mib(size)}, {size / full:.3f} of {_mib(full)} in FP32",
        f"  {len(plain['layers'])} layers: codes {_mib(sizes['codes'])}, parameters and biases "
        f"{_mib(sizes['parameters'])}",
        f"in floating point, kept in {plain['rest']}: {_mib(sizes['rest'])}",
    ]
    rest: Counter[str] = Counter()
    for name, value in export.rest.items():
        # of all blocks together: `blocks.3.norm.weight` is one of `blocks.*.norm.weight`
        rest[re.sub(r"\.\d+\.", ".*.", name, count=1)] += value.nbytes
    named = {name: n for name, n in rest.most_common() if n >= SHOWN * size}
    lines += [f"  {name} {_mib(n)}" for name, n in named.items()]
    if len(named) < len(rest):
        lines.append(
            f"  {len(rest) - len(named)} smaller kinds of tensors "
            f"{_mib(rest.total() - sum(named.values()))}"
        )
    if plain["products"]:
        lines.append(
            f"  {len(plain['products'])} attention products, in integers where all four "
            "operands are static"
        )
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"

"""Replace the committed results of a table (`experiments/results`) by new ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from experiments.store import results
from experiments.store.files import write_json
from ptq.spec import ConfigError


def publish_results(found: list[dict[str, Any]], name: str) -> Path:
    """Replace the committed results of a table by these; of the config they keep what decides the
    numbers.

    Raises:
        ConfigError: there are fewer than before; the results stay where the runs are.
    """
    folder = results.ROOT / name
    # of a publication that was killed between its two renames
    for old in results.ROOT.glob(f".{name}.old*"):
        if not folder.exists():
            os.replace(old, folder)
    former = len(results.committed_results(name)[0])
    if len(found) < former:
        raise ConfigError(
            f"publish: {len(found)} results of {name} would replace {former}, allowed are no fewer"
        )
    temporary = results.ROOT / f".{name}.tmp{os.getpid()}"
    for result in found:
        parts = [
            v
            for k, v in result["cell"].items()
            if k in ("what", "model", "method", "quant", "calib") and v
        ]
        # `identity` stays
        origin = {k: v for k, v in result["provenance"].items() if k != "config"}
        write_json(
            temporary / f"{'-'.join(parts)}-s{result['seed']}-{origin['hash']}.json",
            {**result, "provenance": origin},
        )
    old = results.ROOT / f".{name}.old{os.getpid()}"
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder

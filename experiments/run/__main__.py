"""Run one cell of a table, or several with -m.

    python -m experiments.run model=rar_twin method=ptq4arvg quant=w6a6 calib=dgc eval=quick
    tracker=wandb_offline python -m experiments.run -m method=rtn,smoothquant,ptq4arvg
    quant=w8a8,w6a6

A finished run is not repeated and a killed one resumes; see `experiments/run/cell.py` for what a
run's folder holds.
"""

from __future__ import annotations

import logging
import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config.compose import CONF, USER_ERRORS, explain_refusal, validate_config
from experiments.run import cell
from experiments.store.progress import progress_bar


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(raw: DictConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = validate_config(raw)
        folder = cell.prepare_run(config).folder
        result = cell.run_cell(config, progress_bar)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    shown = {k: v for k, v in {**result["metrics"], **result["cost"]}.items() if v is not None}
    print("  ".join(f"{k}={v:.4g}" for k, v in shown.items()))
    print(f"results: {folder}")


def command() -> None:
    """`main`, with what Hydra refuses said in one line too. HYDRA_FULL_ERROR=1 shows where it comes
    from."""
    if "HYDRA_FULL_ERROR" in os.environ:
        return main()
    # makes Hydra raise its errors in place of printing them over many lines
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain_refusal(error)}")
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


if __name__ == "__main__":
    command()

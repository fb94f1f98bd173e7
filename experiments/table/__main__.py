"""Run a table or figure of the registry, or all of them: every cell is a run of its own; then write
the table.

    python -m experiments.table name=reproduce python -m experiments.table name=all eval=full
    seeds=3 jobs=6 publish=true python -m experiments.table name=rar scale=paper
    reference=VIRTUAL_imagenet256_labeled.npz inception=WEIGHTS

`conf/table/registry.yaml` says what there is. Cells that are done are read; cells that fail are
recorded with their
traceback and shown as failed, and the rest goes on. Options of this command:

    name=reproduce          a table, or all scale=twin              twin: shipped models; paper:
    released presets, given their weights seeds=[0]               a list, or the number of seeds
    from 0 on engine=inproc           inproc, local, slurm (conf/engine, `engine.KEY=VALUE`); jobs=N
    stands for engine=local and
                            engine.jobs=N
    publish=false           true copies the results to experiments/results/<name>, where README tables come from
    reference=, inception=  at scale=paper: the reference batch, and the weights of Inception (`experiments.evaluate`);
    extractor=, prc_dtype=  as there

Further overrides (`eval=full`, `calib.n=64`, `tracker=wandb_offline`, ...) go to every cell; one of
the model or of a key of a table's grid picks values of it (`model=rar_twin`), and `row=LABEL` picks
a row.
"""

from __future__ import annotations

import sys

from experiments.registry import tables
from experiments.store import results
from experiments.table.publish import publish_results
from experiments.table.request import parse_request
from experiments.table.tables import run_request, write_table
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError


def main() -> None:
    try:
        request = parse_request(sys.argv[1:])
        found = run_request(request)
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    for name, of_table in found.items():
        if not of_table:
            print(f"{name}: no cell has all the values that are picked")
            continue
        write_table(tables.find_table(name), of_table, request)
        if request.publish and not any("error" in r for r in of_table):
            try:
                print(
                    f"published: {publish_results(of_table, results.table_label(name, request.scale))}"
                )
            except ConfigError as error:
                sys.exit(f"error: {error}")
    if any("error" in r for of_table in found.values() for r in of_table):
        sys.exit(1)


if __name__ == "__main__":
    main()

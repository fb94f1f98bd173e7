"""Run a table or figure of the registry, or all: every cell is a run; then write the table.

    python -m experiments.table name=reproduce
    python -m experiments.table name=all eval=full seeds=3 workers=6 publish=true
    python -m experiments.table name=rar scale=paper reference=REFERENCE.npz inception=WEIGHTS
    python -m experiments.table name=rar scale=paper dry_run=true         # what would it take?
    python -m experiments.table compare FOLDER OTHER                      # --help says more

`conf/table/registry.yaml` says what there is. Cells that are done are read; cells that fail are
recorded with their traceback and shown as failed, and the rest goes on.

Overrides (`eval=full`, `calib.n=64`, `tracker=wandb_offline`, ...) go to every cell; one of the
model or of a key of a table's grid picks values of it (`model=rar_twin`), and `row=LABEL` picks a
row.
"""

from __future__ import annotations

import sys
import typing
from typing import Any

from experiments.config.overrides import RUN
from experiments.options import answer_help
from experiments.table.options import Options, parse_arguments
from ptq.errors import user_errors

if typing.TYPE_CHECKING:
    from experiments.table.request import Request


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        from experiments.table.compare import command

        command.main(sys.argv[2:])
        return
    with user_errors():
        answer_help(__doc__, {"Options": Options}, RUN.describe())
        arguments = parse_arguments(sys.argv[1:])

        # late: help and refused options need none of it
        from experiments.table.request import make_request
        from experiments.table.tables import run_request

        request = make_request(arguments)
        if request.dry_run:
            from experiments.table.dry_run import print_request

            print_request(request)
            return
        results = run_request(request)
        failed = False
        for name, table_results in results.items():
            report_table(name, table_results, request)
            failed = failed or has_errors(table_results)
        report_upload(request)
    if failed:
        sys.exit(1)


def has_errors(table_results: list[dict[str, Any]]) -> bool:
    """Whether some cell of a table failed."""
    return any("error" in result for result in table_results)


def report_upload(request: Request) -> None:
    """Say how to upload the runs that W&B keeps offline, if the request is tracked."""
    from experiments.registry.tables import is_tracked
    from experiments.store.tracking import sync_command
    from experiments.table.request import runs_of

    if is_tracked(request.overrides):
        upload = sync_command(runs_of(request))
        if upload is not None:
            print(f"to upload: {upload}")


def report_table(name: str, table_results: list[dict[str, Any]], request: Request) -> None:
    """Write and print a table, and publish its results if that is asked for.

    Raises:
        ConfigError: they may not be published.
    """
    from experiments.registry.tables import find_table
    from experiments.store.results import table_label
    from experiments.table.compare.expected import describe_end
    from experiments.table.publish import publish_results
    from experiments.table.request import picked
    from experiments.table.tables import write_table
    from experiments.table.tracked import track_table

    if not table_results:
        print(f"{name}: no cell has all the values that are picked")
        return
    table = find_table(name)
    folder = write_table(table, table_results, request)
    label = table_label(name, request.scale)
    for line in describe_end(label, table_results, folder):
        print(line)
    track_table(table, label, folder, request)
    if request.publish and not has_errors(table_results):
        part = bool(picked(table, request.overrides))
        print(f"published: {publish_results(table_results, label, part)}")


if __name__ == "__main__":
    main()

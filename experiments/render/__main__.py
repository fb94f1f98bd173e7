"""Write everything that results say, from result files alone.

    python -m experiments.render                             # a report of all tables; the README
    python -m experiments.render name=rar,components         # these tables only, no README
    python -m experiments.render name=rar from=runs/tables   # of results that are not committed
    python -m experiments.render --readme                    # the README's blocks and pictures
    python -m experiments.render --check                     # exit 1 if these are not current

The report holds every table's files and an index.html. Files that do not count (truncated, of
another run or version) are named and left out.
"""

from __future__ import annotations

import sys

from experiments.options import answer_help
from experiments.render.options import Options, parse
from ptq.errors import user_errors


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options = parse(sys.argv[1:])

        # late: help and refused options need neither pandas nor results
        from experiments.render.report import check_pages, write_report

        if options.check:
            sys.exit(check_pages())
        write_report(options)


if __name__ == "__main__":
    main()

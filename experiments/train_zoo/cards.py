"""Rewrite the model cards of `models/zoo` from training records and measured statistics.

    python -m experiments.train_zoo.cards

It writes models/zoo/README.md.
"""

from __future__ import annotations

import sys

from experiments.options import answer_help, refuse_unknown
from ptq.errors import user_errors


def main() -> None:
    with user_errors():
        answer_help(__doc__, {})
        refuse_unknown(sys.argv[1:], [])

        # PyTorch is loaded for a command line that is allowed
        from experiments.train_zoo import model_cards

        model_cards.write_cards()


if __name__ == "__main__":
    main()

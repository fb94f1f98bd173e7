"""The request that a command line of `experiments.table` makes, for tests."""

from __future__ import annotations

from experiments.table.options import parse_arguments
from experiments.table.request import Request, make_request


def request_of(*arguments: str) -> Request:
    """What `python -m experiments.table ARGUMENTS` would run; nothing runs."""
    return make_request(parse_arguments(arguments))

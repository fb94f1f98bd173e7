"""Identities of made-up results, for the tests of all rooms."""

from __future__ import annotations

from typing import Any

from experiments.identity.results import state_identity
from experiments.identity.whole import whole_identity
from experiments.store.results import RESULT_VERSION
from ptq.files import value_digest


def made_origin(**values: Any) -> dict[str, Any]:
    """The provenance of a result of full precision on a GPU, which `values` tell from others."""
    departures = {
        "model": "rar_twin",
        "mode": "simulate",
        "method": "fp",
        "version": RESULT_VERSION,
        **values,
    }
    return {
        "hash": value_digest(departures),
        "identity": departures,
        **state_identity(whole_identity(departures, "cuda")),
    }

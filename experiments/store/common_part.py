"""What mappings have in common, so that a file of many similar ones can hold it once.

    common = common_part(wholes)
    own = without_common(whole, common)     of each
    whole = with_common(own, common)

    wholes  {"model": "m", "eval": {"n": 8, "seed": 0}}, {"model": "m", "eval": {"n": 8, "seed": 1}}
    common  {"model": "m", "eval": {"n": 8}}
    owns    {"eval": {"seed": 0}}, {"eval": {"seed": 1}}

Mappings inside are treated in the same way; lists are one value. What comes back is equal to what
was there; the order of its keys is another one, those in common come first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any


def common_part(wholes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that all of some JSON-able mappings have; of none, there are none."""
    if not wholes:
        return {}
    common = {}
    for name in wholes[0]:
        values = [whole[name] for whole in wholes if name in whole]
        if len(values) < len(wholes):
            continue
        if all(isinstance(value, dict) for value in values):
            common[name] = common_part(values)
        elif len(set(map(json.dumps, values))) == 1:  # as text: 1 equals 1.0 and true
            common[name] = values[0]
    return common


def without_common(whole: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """What is a mapping's own beside the common part of it and others."""
    own = {}
    # the order that `with_common` leaves: what is read and written again is the same text
    for name in {**common, **whole}:
        if name not in common:
            own[name] = whole[name]
        elif isinstance(common[name], dict):
            own_inside = without_common(whole[name], common[name])
            if own_inside:
                own[name] = own_inside
    return own


def with_common(own: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The whole mapping of which these are its own entries and the common ones."""
    whole = copy.deepcopy(dict(common))  # whoever changes one whole must not change the others
    for name, value in own.items():
        has_common = isinstance(value, dict) and isinstance(common.get(name), dict)
        whole[name] = with_common(value, common[name]) if has_common else value
    return whole

"""The one error of all data sets."""

from __future__ import annotations

from ptq.spec import ConfigError


class DataError(ConfigError):
    """The data set is missing, damaged or not the one expected. The message is one line."""

"""What values a field may have: its type, its range, and the words that say so.

    "calib.n": Integer(1, 100_000)
    "method.alpha": Number(0, 1)
    "mode": Word("simulate", "int8")

Upper bounds of counts lie beyond any real use; they keep a slip of the keyboard from asking for all
memory of the machine. Nothing is converted: `1` is no boolean, and `"5"` is no integer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from ptq.spec import ConfigError

MISSING = "???"  # how OmegaConf writes a value that is yet to be given
SHOWN = 60  # letters of a value in an error
LONGEST_NAME = 64  # letters; several names make the name of a folder, which 255 bytes end
LONGEST_PART = 255  # bytes of a file's or folder's name
LONGEST_PATH = 4096  # bytes
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class Range(Protocol):
    """The values that a field may have; `words` completes "is not ..."."""

    @property
    def words(self) -> str: ...

    def allows(self, value: object) -> bool: ...


@dataclass(frozen=True)
class Flag:
    """True or false."""

    words = "a boolean, allowed are true and false"

    def allows(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Integer:
    """An integer between two bounds, which belong to it."""

    least: int
    most: int

    @property
    def words(self) -> str:
        return f"an integer from {self.least} to {self.most}"

    def allows(self, value: object) -> bool:
        # True and False are integers to Python
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and self.least <= value <= self.most


@dataclass(frozen=True)
class Number:
    """A finite number between two bounds; `above` and `below` leave out the bound itself."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    @property
    def words(self) -> str:
        if not self.above and not self.below:
            return f"a number from {self.least:g} to {self.most:g}"
        lower = f"above {self.least:g}" if self.above else f"of at least {self.least:g}"
        upper = f"below {self.most:g}" if self.below else f"at most {self.most:g}"
        return f"a number {lower} and {upper}"

    def allows(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        if not self.least <= value <= self.most:  # NaN is not, either
            return False
        return not (self.above and value == self.least) and not (self.below and value == self.most)


class Word:
    """One of several words."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.allowed)}"

    def allows(self, value: object) -> bool:
        return isinstance(value, str) and value in self.allowed


@dataclass(frozen=True)
class Name:
    """A name that becomes part of a folder's name."""

    words = f"a name of at most {LONGEST_NAME} letters, digits, _, -, + and ."

    def allows(self, value: object) -> bool:
        is_short = isinstance(value, str) and len(value) <= LONGEST_NAME
        return is_short and bool(NAME.fullmatch(value))


@dataclass(frozen=True)
class Text:
    """One line of text, not empty. A number counts as the text that it is written as."""

    most: int

    @property
    def words(self) -> str:
        return f"a line of 1 to {self.most} letters"

    def allows(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return False
        if isinstance(value, int) and abs(value) >= 10**LONGEST_NAME:
            return False
        text = str(value)
        return bool(text.strip()) and len(text) <= self.most and text.isprintable()


@dataclass(frozen=True)
class FilePath:
    """The path of a file or folder. A number counts as the text that it is written as."""

    words = f"a path (no empty text, no control characters, names of at most {LONGEST_PART} bytes)"

    def allows(self, value: object) -> bool:
        if not Text(LONGEST_PATH).allows(value):
            return False
        try:
            encoded = str(value).encode()
        except UnicodeEncodeError:  # half a character
            return False
        parts = encoded.split(b"/")
        return len(encoded) <= LONGEST_PATH and max(map(len, parts)) <= LONGEST_PART


@dataclass(frozen=True)
class Optional:
    """A value of another range, or none."""

    of: Range

    @property
    def words(self) -> str:
        return f"{self.of.words}, or null"

    def allows(self, value: object) -> bool:
        return value is None or self.of.allows(value)


@dataclass(frozen=True)
class ListOf:
    """A list of values that each lie in another range."""

    of: Range
    least: int = 0

    @property
    def words(self) -> str:
        length = f" with at least {self.least} of them" if self.least else ""
        return f"a list{length}, each entry {self.of.words}"

    def allows(self, value: object) -> bool:
        return self.is_list(value) and len(value) >= self.least and self.stray_entry(value) is None

    def is_list(self, value: object) -> bool:
        return isinstance(value, (list, tuple))

    def stray_entry(self, value: object) -> tuple[object] | None:
        """The first entry that is not allowed, or None."""
        for entry in value:
            if not self.of.allows(entry):
                return (entry,)
        return None


def check_value(field_name: str, value: object, allowed: Range) -> None:
    """Refuse a value outside a field's range.

    Raises:
        ConfigError: "field: value is not ..."; of a list it names the entry.
    """
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{field_name}: its value is missing, it must be {allowed.words}")
    if allowed.allows(value):
        return
    if isinstance(allowed, ListOf) and allowed.is_list(value):
        stray = allowed.stray_entry(value)
        if stray is not None:
            raise ConfigError(f"{field_name}: {show_value(stray[0])} is not {allowed.of.words}")
    raise ConfigError(f"{field_name}: {show_value(value)} is not {allowed.words}")


def show_value(value: object) -> str:
    """A value as an error shows it: on one line, its end left out where it is long."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"an integer of more than {SHOWN} digits"  # which Python may refuse to print
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."

"""The one reader of command lines. A command's options are the fields of a dataclass:

    @dataclass
    class Options:
        samples: str = option(help="a folder of PNG files, or an npz")
        batch: int = option(50, help="images of a forward pass", at_least=1)
        extractor: str = option("inception", help="the network", choices=("inception", "fashion"))

    def main() -> None:
        with user_errors():
            answer_help(__doc__, {"Options": Options})
            options, others = parse_options(Options, sys.argv[1:])
            refuse_unknown(others, option_names(Options))

An option is given as `name=value`, `--name=value` or `--name value`, a boolean also as `--name`; of
one that is given twice, the last counts. Values are text as it stands: `samples=run #2` is the
folder `run #2`. Only what a field's type asks for is read out of it: integers, numbers, booleans,
lists (`a,b` or `[a,b]`), and `null` where the type allows None.

This module imports the standard library (and `ptq.spec`) alone, and so must a command until its
line is read: help and refusals come at once.
"""

from __future__ import annotations

import difflib
import math
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from types import NoneType
from typing import Any, TypeVar

from ptq.spec import ConfigError

T = TypeVar("T")
LONGEST_SHOWN = 60  # letters of a value in an error
WIDTH = 100  # letters of a line of help
INDENT = 22  # where descriptions begin
HELP_FLAGS = ("--help", "-h")
TYPE_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


# --- describing options


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[str] = (),
    at_least: int | None = None,
    at_most: int | None = None,
    formerly: str | None = None,
    positional: bool = False,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: left out, the option must be given. A tuple is the default of a list.
        help: one line.
        choices: the values allowed, of a list the entries.
        at_least, at_most: the least and the greatest integer allowed. The latter lies beyond any
            real use; it keeps a slip of the keyboard from asking for all memory of the machine.
        formerly: another name that is understood.
        positional: takes the arguments that are words without `=`.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "at_least": at_least,
        "at_most": at_most,
        "formerly": formerly,
        "positional": positional,
    }
    if isinstance(default, tuple):
        # a list for each object: dataclasses refuse one that all would share
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_names(kind: type) -> list[str]:
    """The names of a dataclass's options, as they are typed."""
    return [typed_name(entry) for entry in fields(kind)]


def typed_name(entry: Field) -> str:
    """The name of an option on the command line: `from_` of Python is `from`."""
    return entry.name.removesuffix("_")


# --- reading


def parse_options(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """The options among a command's arguments, and the arguments that are none.

    Raises:
        ConfigError: a value is not of its option's type or not allowed, or an option is missing.
    """
    known = {}
    positional = None
    for entry in fields(kind):
        known[typed_name(entry)] = entry
        if entry.metadata["formerly"]:
            known[entry.metadata["formerly"]] = entry
        if entry.metadata["positional"]:
            positional = entry
    types = typing.get_type_hints(kind)
    texts: dict[str, str] = {}
    words: list[str] = []
    others: list[str] = []
    for argument in joined_flags(arguments, known, types):
        name, equals, text = argument.partition("=")
        if equals and name in known:
            texts[known[name].name] = text
        elif positional and not equals and not argument.startswith("-"):
            words.append(argument)
        else:
            others.append(argument)  # overrides, or misspelt options: the command knows

    values: dict[str, Any] = {}
    for entry in fields(kind):
        if entry is positional and words:
            values[entry.name] = positional_value(entry, types[entry.name], words)
        elif entry.name in texts:
            values[entry.name] = read_value(entry, types[entry.name], texts[entry.name])
        elif entry.default is MISSING and entry.default_factory is MISSING:
            # a misspelt name is the likelier reason
            refuse_unknown(others, option_names(kind))
            raise ConfigError(f"{typed_name(entry)}: missing, give {entry.metadata['help']}")
    return kind(**values), others


def joined_flags(
    arguments: Sequence[str], known: Mapping[str, Field], types: Mapping[str, Any]
) -> Iterator[str]:
    """The arguments, with `--name value`, `--name=value` and `--name` of options as
    `name=value`."""
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in known:
            yield argument
        elif equals:
            yield argument.removeprefix("--")
        elif types[known[name].name] is bool:
            yield f"{name}=true"
        else:
            # whatever comes, a negative number too, which begins like a flag
            value = next(remaining, None)
            if value is None:
                raise ConfigError(f"{name}: its value is missing, give {name}=VALUE")
            yield f"{name}={value}"


def positional_value(entry: Field, kind: Any, words: Sequence[str]) -> Any:
    """The value of the option that takes words without `=`: a list of them, or one."""
    if typing.get_origin(kind) is list:
        return [read_one(entry, typing.get_args(kind)[0], word) for word in words]
    if len(words) > 1:
        raise ConfigError(f"{typed_name(entry)}: {words[1]!r} is one too many")
    return read_one(entry, kind, words[0])


def read_value(entry: Field, kind: Any, text: str) -> Any:
    """The value of an option's text, by the field's type.

    Raises:
        ConfigError: it is none.
    """
    alternatives = typing.get_args(kind)
    if NoneType in alternatives:
        if text == "null":
            return None
        # an option's type is `X` or `X | None`
        (kind,) = (one for one in alternatives if one is not NoneType)
    if typing.get_origin(kind) is not list:
        return read_one(entry, kind, text)
    items = split_list(text)
    if not items:
        raise ConfigError(f"{typed_name(entry)}: {text} is an empty list")
    return [read_one(entry, typing.get_args(kind)[0], item) for item in items]


def split_list(text: str) -> list[str]:
    """The entries of `a,b` or `[a, b]`."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return [item.strip() for item in text.split(",")] if text.strip() else []


def read_one(entry: Field, kind: type, text: str) -> Any:
    """A single value, as a whole or of a list."""
    name = typed_name(entry)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}: {text!r} is not a boolean, allowed are true and false")
        return text.lower() == "true"
    if kind is int:
        return read_integer(name, text, entry.metadata["at_least"], entry.metadata["at_most"])
    if kind is float:
        return read_number(name, text)
    choices = entry.metadata["choices"]
    if choices and text not in choices:
        raise ConfigError(
            f"{name}: {text!r} is not one of {', '.join(choices)}{nearest(text, choices)}"
        )
    return text


def read_integer(
    name: str, text: str, at_least: int | None = None, at_most: int | None = None
) -> int:
    """An integer between the bounds."""
    try:
        value = int(text)
    except ValueError:
        value = None
    is_below = value is not None and at_least is not None and value < at_least
    is_above = value is not None and at_most is not None and value > at_most
    if value is None or is_below or is_above:
        if at_most is not None:
            allowed = f"an integer from {at_least} to {at_most}"
        else:
            wanted = {None: "an integer", 1: "a positive integer"}
            allowed = wanted.get(at_least, f"an integer from {at_least} on")
        raise ConfigError(f"{name}: {text[:LONGEST_SHOWN]} is not {allowed}")
    return value


def read_number(name: str, text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan  # refused below, as a nan that was typed is
    if not math.isfinite(value):
        raise ConfigError(f"{name}: {text!r} is not a number")
    return value


def refuse_unknown(arguments: Sequence[str], allowed: Iterable[str]) -> None:
    """Refuse the first of the arguments that are no options.

    Raises:
        ConfigError: there is one; the line names it, the nearest allowed name and all of them.
    """
    if not arguments:
        return
    allowed = list(allowed)
    name, equals, _ = arguments[0].partition("=")
    name = name.removeprefix("--")
    if not allowed:
        raise ConfigError(f"{arguments[0]}: this command takes no arguments but --help")
    # `batch` in place of `batch=50`; what `--batch` lacks was said while reading
    if not equals and name in allowed:
        raise ConfigError(f"{name}: its value is missing, give {name}=VALUE")
    raise ConfigError(
        f"{name}: no such option, allowed are {', '.join(allowed)}{nearest(name, allowed)}"
    )


def nearest(text: str, allowed: Iterable[str]) -> str:
    """The end of an error: `; did you mean X?`, or nothing where no allowed word is similar.

    Case and hyphens do not count: `RAR-B` is `rar_b`. `models/choices.py` does the same.
    """
    by_plain_name: dict[str, str] = {}
    for word in allowed:
        by_plain_name.setdefault(word.lower().replace("-", "_"), word)
    similar = difflib.get_close_matches(text.lower().replace("-", "_"), by_plain_name, n=1)
    return f"; did you mean {by_plain_name[similar[0]]}?" if similar else ""


# --- help


def answer_help(
    about: str,
    sections: Mapping[str, type],
    notes: str = "",
    arguments: Sequence[str] | None = None,
) -> None:
    """If help is asked for, print it and exit: the module's docstring, its options by section
    (title and dataclass), and what else it takes."""
    if arguments is None:
        arguments = sys.argv[1:]
    if any(argument in HELP_FLAGS for argument in arguments):
        print(help_text(about, sections, notes))
        sys.exit(0)


def help_text(about: str, sections: Mapping[str, type], notes: str = "") -> str:
    """The answer to --help."""
    parts = [about.strip()]
    for title, kind in sections.items():
        lines = [describe_option(entry, kind) for entry in fields(kind)]
        parts.append("\n".join([f"{title}:", *lines]))
    if notes:
        parts.append(notes.strip())
    return "\n\n".join(parts)


def describe_option(entry: Field, kind: type) -> str:
    """`name=default`, what it is for, and what is allowed, wrapped."""
    details = [type_words(typing.get_type_hints(kind)[entry.name])]
    if entry.metadata["choices"]:
        details = [f"one of {', '.join(entry.metadata['choices'])}"]
    if entry.metadata["at_most"] is not None:
        details.append(f"{entry.metadata['at_least']} to {entry.metadata['at_most']}")
    elif entry.metadata["at_least"] is not None:
        details.append(f"at least {entry.metadata['at_least']}")
    if entry.metadata["formerly"]:
        details.append(f"formerly {entry.metadata['formerly']}=")
    if entry.default is MISSING and entry.default_factory is MISSING:
        details.append("required")
    default = default_text(entry)
    # the choices stand in the description: a list of all of them is not said twice
    if default and default == ",".join(entry.metadata["choices"]):
        default = ""
        details.append("all of them by default")
    usage = f"{typed_name(entry)}={default}"
    return wrapped(usage, f"{entry.metadata['help']} ({'; '.join(details)})")


def default_text(entry: Field) -> str:
    """An option's default as it would be typed; nothing for one that must be given."""
    if entry.default_factory is not MISSING:
        return ",".join(map(str, entry.default_factory()))
    if entry.default is MISSING:
        return ""
    words = {None: "null", True: "true", False: "false"}
    # by type, because 1 and 0 are the same keys as True and False
    is_word = entry.default is None or isinstance(entry.default, bool)
    return words[entry.default] if is_word else str(entry.default)


def type_words(kind: Any) -> str:
    """A field's type in words: `integer or null`."""
    arguments = typing.get_args(kind)
    if NoneType in arguments:
        (inner,) = (one for one in arguments if one is not NoneType)
        return f"{type_words(inner)} or null"
    if typing.get_origin(kind) is list:
        return f"list of {TYPE_WORDS[arguments[0]]}"
    return TYPE_WORDS[kind]


def wrapped(term: str, text: str) -> str:
    """A term and its description, in two columns."""
    start = f"  {term}".ljust(INDENT)
    lines = textwrap.wrap(text, WIDTH - INDENT)
    # a term too long for its column gets a line of its own
    if len(start) > INDENT or not start.endswith(" "):
        return "\n".join([start, *(" " * INDENT + line for line in lines)])
    return "\n".join([start + lines[0], *(" " * INDENT + line for line in lines[1:])])

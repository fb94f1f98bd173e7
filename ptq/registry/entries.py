"""What a recipe calls by a name: input transforms, rounders of weights, number formats, selectors
of calibration rows, and groups of settings. Each is registered by a decorator in its own file:

    @register_transform("gps", step=50, integers_only=True)
    class GPS: ...

From here comes what configs may say: the switch of a transform, its settings with their ranges, the
words of `method.rounder`, `method.softmax`, `quant.*.format` and `calib.selector`. What ships is
imported when a name is first asked for (`plugins.py`). `ADDING.md` shows how to add one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from ptq.registry import plugins
from ptq.registry.refusals import ConfigError

T = TypeVar("T")
# what a rounder is made from beside the recipe
READS = ("nothing", "correlations", "site")
OPERANDS = ("weights", "activations", "softmax")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name, in an order that does not depend on which file was imported first.

    Args:
        noun: what an entry is, for errors.
        order: what comes before the name when entries are sorted.
    """

    def __init__(self, noun: str, order: Callable[[T], Any] = lambda entry: 0) -> None:
        self.noun = noun
        self.order = order
        self.entries: dict[str, T] = {}
        self.homes: dict[str, str] = {}  # the file that each comes from
        self.names: dict[str, str] = {}  # what each is called there

    def add(self, name: str, entry: T, registered: object) -> None:
        """Take an entry in.

        Args:
            registered: the class or function that a decorator stands above.

        Raises:
            ConfigError: the name is taken, or no name.
        """
        home = inspect.getfile(registered)
        if not name.isidentifier():
            raise ConfigError(f"{self.noun}: {name!r} in {home} is no name of letters, digits, _")
        # the same file may be imported again
        is_same = self.homes.get(name) == home and self.names[name] == registered.__qualname__
        if name in self.entries and not is_same:
            raise ConfigError(
                f"{self.noun}: {name!r} is registered twice, as {self.names[name]} in "
                f"{self.homes[name]} and as {registered.__qualname__} in {home}"
            )
        self.entries[name] = entry
        self.homes[name] = home
        self.names[name] = registered.__qualname__
        self.entries = dict(sorted(self.entries.items(), key=self._place))

    def _place(self, item: tuple[str, T]) -> tuple[Any, str]:
        name, entry = item
        return self.order(entry), name

    def __getitem__(self, name: str) -> T:
        import_everything()
        if name not in self.entries:
            raise ConfigError(f"{self.noun}: {name!r} is not one of {', '.join(self.entries)}")
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        import_everything()
        return iter(self.entries)

    def __len__(self) -> int:
        import_everything()
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        import_everything()
        return name in self.entries


@dataclass(frozen=True)
class Transform:
    """A method that solves for an input transform, site by site.

    Attributes:
        solver: makes the solver of a site (`methods/solver.py`).
        step: transforms are solved in ascending order of it.
        integers_only: it reckons with integer codes.
        sites: the kinds of sites that it always acts at; None leaves them to its own setting
            `sites` or, without one, to `method.sites`.
    """

    name: str
    solver: Callable[..., Any]
    step: int
    integers_only: bool
    sites: tuple[str, ...] | None


@dataclass(frozen=True)
class Rounder:
    """A way of rounding weights.

    Attributes:
        make: makes the rounder of a site from the recipe and from what it reads.
        reads: of the site's inputs, `nothing` (None), `correlations` (the sum of x x^T, (C, C)), or
            `site` (a `SiteData` of `staq/inputs.py`: the model is then fitted block by block).
        integers_only: it reckons with integer codes.
    """

    name: str
    make: Callable[..., Any]
    reads: str
    integers_only: bool


@dataclass(frozen=True)
class NumberFormat:
    """What operands can be rounded to.

    Attributes:
        kind: a class with two static methods: `choose_params(lo, hi, spec)` gives the parameters of
            ranges lo, hi (G,), and `simulate(x, params, spec)` rounds x. One with `own_quantizer`
            is a module in their place, made from the number of codes.
        operands: that it is for, some of `OPERANDS`.
        bits: that it can have; none: any.
        block: neighbours that share a scale, if the format says how many.
        tensor_scale: scales of blocks are relative to one of the whole tensor: `kind` has
            `tensor_scale(lo, hi)` of ranges (G,), and `choose_params` takes it as `whole`.
        scale_bytes: that a scale takes at rest.
    """

    name: str
    kind: Any
    operands: tuple[str, ...]
    bits: tuple[int, ...]
    own_quantizer: bool
    block: int | None = None
    tensor_scale: bool = False
    scale_bytes: int = 4


@dataclass(frozen=True)
class Selector:
    """A way of choosing calibration rows.

    Attributes:
        choose: gives the indices (n,) of the rows in the joint pool, from a
            `calibration.Selection`.
        draw_labels: gives the labels of the images to draw, from the number of rows, the number of
            classes and the seed; None: random ones.
        rows_per_image: how many rows of an image it can keep, 1 or 2.
        rework: gives other rows for those that were kept, from the `Selection` and them; None: they
            stay.
    """

    name: str
    choose: Callable[..., Any]
    draw_labels: Callable[..., Any] | None
    rows_per_image: int
    rework: Callable[..., Any] | None = None


TRANSFORMS: Registry[Transform] = Registry("method", order=lambda entry: entry.step)
ROUNDERS: Registry[Rounder] = Registry("method.rounder")
FORMATS: Registry[NumberFormat] = Registry("format")
SELECTORS: Registry[Selector] = Registry("calib.selector")
SETTINGS: Registry[type] = Registry("method.options")
REGISTRIES = (TRANSFORMS, ROUNDERS, FORMATS, SELECTORS, SETTINGS)


def register_transform(
    name: str, *, step: int, integers_only: bool = False, sites: tuple[str, ...] | None = None
) -> Callable[[T], T]:
    """Register a solver's class as the method `name`; see `Transform`."""

    def decorate(solver: T) -> T:
        if not callable(getattr(solver, "solve", None)):
            raise ConfigError(f"method: {name!r} has no `solve`, which gives the input transform")
        TRANSFORMS.add(name, Transform(name, solver, step, integers_only, sites), solver)
        return solver

    return decorate


def register_rounder(
    name: str, *, reads: str = "nothing", integers_only: bool = False
) -> Callable[[T], T]:
    """Register a rounder's class; see `Rounder`."""

    def decorate(make: T) -> T:
        _require_words("method.rounder", name, "reads", (reads,), READS)
        ROUNDERS.add(name, Rounder(name, make, reads, integers_only), make)
        return make

    return decorate


def register_format(
    name: str,
    *,
    operands: tuple[str, ...] = OPERANDS,
    bits: int | tuple[int, ...] = (),
    own_quantizer: bool = False,
    block: int | None = None,
    tensor_scale: bool = False,
    scale_bytes: int = 4,
) -> Callable[[T], T]:
    """Register a number format's class; see `NumberFormat`."""

    def decorate(kind: T) -> T:
        _require_words("format", name, "operands", operands, OPERANDS)
        choices = (bits,) if isinstance(bits, int) else bits
        entry = NumberFormat(
            name, kind, operands, choices, own_quantizer, block, tensor_scale, scale_bytes
        )
        FORMATS.add(name, entry, kind)
        return kind

    return decorate


def register_selector(
    name: str,
    *,
    draw_labels: Callable[..., Any] | None = None,
    rows_per_image: int = 2,
    rework: Callable[..., Any] | None = None,
) -> Callable[[T], T]:
    """Register the function that chooses rows; see `Selector`."""

    def decorate(choose: T) -> T:
        SELECTORS.add(name, Selector(name, choose, draw_labels, rows_per_image, rework), choose)
        return choose

    return decorate


def register_settings(name: str) -> Callable[[type], type]:
    """Register a dataclass of `options.Settings` as the settings of the switch or rounder `name`:
    `method.options.<name>` of a config."""

    def decorate(kind: type) -> type:
        for entry in fields(kind):
            if "allowed" not in entry.metadata:
                raise ConfigError(
                    f"method.options.{name}.{entry.name}: it has no range, "
                    "give setting(DEFAULT, RANGE)"
                )
        SETTINGS.add(name, kind, kind)
        kind.switch = name
        return kind

    return decorate


def load_plugins(folder: str | Path) -> None:
    """Import a folder of plugins (`plugins.py`), whose names are known from then on.

    Raises:
        ConfigError: a file cannot be imported, or registers nothing.
    """
    plugins.add_folder(Path(folder))
    import_everything()


def import_everything() -> None:
    """Import what is not imported yet.

    Raises:
        ConfigError: a file of plugins cannot be imported, registers nothing, or settings alone.
    """
    homes: set[str] = set()
    paths = plugins.import_all()
    for path in paths:
        for registry in REGISTRIES:
            homes.update(registry.homes.values())
        if str(path) not in homes:
            raise ConfigError(
                f"plugins: {path} registers nothing (what others import is named _{path.name})"
            )
    for path in paths:
        _require_owners(str(path))


def _require_owners(path: str) -> None:
    """Refuse settings, registered in a file, of a name that nothing else is registered under.

    Raises:
        ConfigError: nothing has that name; a decorator was forgotten.
    """
    owners: set[str] = set()
    for registry in (TRANSFORMS, ROUNDERS, FORMATS, SELECTORS):
        owners.update(registry.homes)
    for name, home in SETTINGS.homes.items():
        if home == path and name not in owners:
            raise ConfigError(
                f"plugins: {path} registers settings of {name!r}, and nothing of that name"
            )


def formats_of(operand: str) -> tuple[str, ...]:
    """The names of the number formats that an operand can have."""
    return tuple(entry.name for entry in FORMATS.values() if operand in entry.operands)


def registered_entries() -> tuple[tuple[str, object], ...]:
    """All entries with their names: what is derived from them is made anew when they change."""
    registered: list[tuple[str, object]] = []
    for registry in REGISTRIES:
        registered += registry.items()
    return tuple(registered)


def _require_words(
    noun: str, name: str, argument: str, words: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    """Refuse a registration with a word that is none of those allowed."""
    for word in words:
        if word not in allowed:
            raise ConfigError(
                f"{noun}: {argument} of {name!r}: {word!r} is not one of {', '.join(allowed)}"
            )

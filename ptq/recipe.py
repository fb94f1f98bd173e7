"""A recipe: everything that makes one row of a table, as a value.

named("ptq4arvg", bits="w6a6")    the recipe that the files of `conf` describe
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq.config.files import read_choice, read_other_group
from ptq.config.schema import (
    Method,
    Quant,
    ScopeConfig,
    Spec,
    library_options,
    library_value,
    method_schema,
)
from ptq.options import GPS_FORMS, KINDS, Options, has_sites
from ptq.ranges import Number, check_value, show_value
from ptq.registry.entries import FORMATS, ROUNDERS, TRANSFORMS, formats_of
from ptq.released.families import RELEASED
from ptq.sites import Adapter, MatMulSite, Scope, Site, block_number
from ptq.spec import (
    ACTIVATION_GRANULARITIES,
    ATTENTION_OPERANDS,
    BY_GROUP,
    BY_HEAD,
    WEIGHT_GRANULARITIES,
    ConfigError,
    QuantSpec,
    require,
)

# granularities that STWQ makes finer
STWQ_REFINES = ("tensor", "group", "head", "head_segment")


def softmax_words() -> tuple[str, ...]:
    """What attention weights can be: a number format, or left in full precision."""
    return (*formats_of("softmax"), "none")


@dataclass(frozen=True)
class Change:
    """What is other than elsewhere in the spec of an operand.

    Attributes:
        kind: of sites, or an operand of attention.
        operand: `weights` or `activations`.
        settings: fields of `QuantSpec` and their values.
        block: number of the only block where it is so; None: everywhere.
    """

    kind: str
    operand: str
    settings: tuple[tuple[str, object], ...]
    block: int | None = None

    @property
    def path(self) -> str:
        """The setting that says so."""
        place = "by_kind" if self.block is None else f"by_layer.{self.block}"
        return f"quant.{place}.{self.kind}.{self.operand}"

    def matches(self, kind: str, block: int | None) -> bool:
        return self.kind == kind and self.block in (None, block)

    def apply(self, spec: QuantSpec) -> QuantSpec:
        """The spec with these settings; a granularity without groups takes the size away.

        Raises:
            ConfigError: they do not go with the rest of the spec.
        """
        settings = dict(self.settings)
        try:
            granularity = settings.get("granularity", spec.granularity)
            keeps_size = granularity in BY_GROUP
            settings.setdefault("group_size", spec.group_size if keeps_size else None)
            return replace(spec, **settings)
        except ConfigError as error:
            raise ConfigError(f"{self.path}.{error}") from error


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        weights, activations: specs of both operands.
        transforms: names of input transforms, in the order in which they are solved and applied.
        sites: site kinds that the transforms act on.
        stwq: static token-wise parameters at linear inputs.
        exclude_sinks: leave sink tokens out of the statistics that transforms are solved from.
        alpha: of SmoothQuant.
        gps_form: `squares` (released code) or `eq16` (paper).
        options: settings of the other methods.
        rounder: of the weights, one of `registry.entries.ROUNDERS`.
        softmax: number format of attention weights, such as `int` or `log_sqrt2` (RepQ); `none`
            leaves them unquantized.
        omniquant: train the transforms and the clipping of weights block by block, in place of
            `transforms`.
        sink_shift, per_position, per_head, key_weights, bias_correction, sequential: parts of STAQ
            (`ptq/staq/`), which fits a model block by block; `fitted` says whether any is on.
        shift_and_sum: round values that get much attention several times
            (`rivals/shift_and_sum.py`).
        changes: where specs are others, by kind of site or operand of attention, and by block.
        released: run the released code's own sequence of calibrations instead
            (`released/sequence.py`).
    """

    weights: QuantSpec
    activations: QuantSpec
    transforms: tuple[str, ...] = ()
    sites: tuple[str, ...] = ("qkv", "fc1", "head")
    scope: Scope = field(default_factory=Scope)
    stwq: bool = False
    exclude_sinks: bool = False
    alpha: float = 0.5
    gps_form: str = "squares"
    options: Options = Options()
    rounder: str = "nearest"
    softmax: str = "int"
    omniquant: bool = False
    sink_shift: bool = False
    per_position: bool = False
    per_head: bool = False
    key_weights: bool = False
    bias_correction: bool = False
    sequential: bool = False
    shift_and_sum: bool = False
    released: bool = False
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        self._check_names()
        for operand in ("weights", "activations"):
            self._check_format(operand)
        check_value("method.alpha", self.alpha, Number(0, 1))
        self._check_switches()
        if self.omniquant:
            self._check_training()
        self._check_fitting()
        for change in self.changes:
            try:
                self.at_place(change.kind, change.block)
            except ConfigError as error:
                if str(error).startswith(change.path):
                    raise
                raise ConfigError(f"{change.path}: with it, {error}") from error

    def _check_names(self) -> None:
        """Refuse names that are none of those allowed."""
        for name in self.transforms:
            require("method.transforms", name, tuple(TRANSFORMS))
        for kind in self.sites:
            require("method.sites", kind, KINDS)
        require("method.gps_form", self.gps_form, GPS_FORMS)
        require("method.rounder", self.rounder, tuple(ROUNDERS))
        require("method.softmax", self.softmax, softmax_words())
        require("quant.weights.granularity", self.weights.granularity, WEIGHT_GRANULARITIES)
        require(
            "quant.activations.granularity",
            self.activations.granularity,
            ACTIVATION_GRANULARITIES,
        )

    def _check_format(self, operand: str) -> None:
        """Refuse a number format that is unknown, or does not go with a method."""
        number_format = getattr(self, operand).format
        require(f"quant.{operand}.format", number_format, formats_of(operand))
        integer_only = [name for name in self.transforms if TRANSFORMS[name].integers_only]
        # rounding a weight does not care for the format of what is multiplied with it
        if operand == "weights" and ROUNDERS[self.rounder].integers_only:
            integer_only.append(self.rounder)
        if self.omniquant:
            integer_only.append("omniquant")
        if number_format != "int" and integer_only:
            raise ConfigError(
                f"quant.{operand}.format: {number_format} does not go with {integer_only[0]},"
                " allowed is int"
            )
        granularity = getattr(self, operand).granularity
        allowed = "group" if operand == "weights" else "group_dynamic"
        if FORMATS[number_format].block is not None and granularity != allowed:
            raise ConfigError(
                f"quant.{operand}.granularity: {granularity} does not go with the format "
                f"{number_format}, allowed is {allowed}"
            )

    def _check_switches(self) -> None:
        """Refuse switches that exclude each other."""
        follows_released_code = (
            self.transforms == ("smoothquant", "shift", "gps")
            and self.stwq
            and self.exclude_sinks
            and self.rounder == "nearest"
            and self.softmax == "int"
        )
        if self.released and not follows_released_code:
            raise ConfigError(
                "method.released: true runs a fixed sequence, its switches cannot be changed"
            )
        if self.shift_and_sum and not (self.scope.matmuls and "v" in self.scope.operands):
            raise ConfigError(
                "method.shift_and_sum: true needs values in scope, but the scope leaves them out"
            )
        if self.stwq and self.activations.granularity not in STWQ_REFINES:
            raise ConfigError(
                "method.stwq: true needs static activations, but quant.activations is "
                f"{self.activations.granularity}"
            )

    def _check_fitting(self) -> None:
        """Refuse parts of STAQ without what they need."""
        dynamic = self.activations.is_dynamic
        if self.key_weights and self.softmax != "numerators":
            raise ConfigError("method.key_weights: true needs method.softmax=numerators")
        if self.key_weights and not self.per_head:
            raise ConfigError("method.key_weights: true needs method.per_head=true")
        if self.per_position and not self.stwq:
            raise ConfigError("method.per_position: true needs method.stwq=true")
        if self.per_head and dynamic:
            raise ConfigError("method.per_head: true needs static activations")
        if self.released and (self.fitted or self.changes or self._has_later_words):
            raise ConfigError(
                "method.released: true runs a fixed sequence, its switches cannot be changed"
            )

    @property
    def fitted(self) -> bool:
        """Whether the model is fitted block by block (`ptq/staq/fitting.py`) in place of rounding
        all weights first."""
        switches = (
            self.sink_shift,
            self.per_position,
            self.per_head,
            self.bias_correction,
            self.sequential,
        )
        searched = "grid" in (self.weights.range, self.activations.range)
        return any(switches) or searched or ROUNDERS[self.rounder].reads == "site"

    @property
    def reads_rows(self) -> bool:
        """Whether quantization reads calibration rows: not where weights alone are rounded, each by
        itself."""
        specs = [self.activations]
        for change in self.changes:
            if change.operand == "activations":
                specs.append(self.at_place(change.kind, change.block).activations)
        reads_inputs = ROUNDERS[self.rounder].reads != "nothing"
        solves = bool(self.transforms) or self.omniquant or self.fitted or self.released
        return solves or reads_inputs or any(spec.is_rounded for spec in specs)

    def _check_training(self) -> None:
        """Refuse what does not go with OmniQuant."""
        transforms = ", ".join(self.transforms) or "none"
        _require_for_training("method.transforms", transforms, ("none",), "trains its own")
        _require_for_training(
            "method.softmax", self.softmax, ("int", "none"), "trains through uniform steps"
        )
        _require_for_training(
            "quant.weights.granularity",
            self.weights.granularity,
            ("out_channel", "group"),
            "clips every row",
        )

    @property
    def rotates(self) -> bool:
        return "hadamard" in self.transforms

    @property
    def attention_weights(self) -> QuantSpec:
        """The spec of the first operand of `pv` products.

        They are never negative, and those of masked keys are zero: so that a row has the same range
        whether its masked keys are there (teacher-forced) or not (decoding), dynamic ranges start
        at zero.
        """
        dynamic = self.activations.is_dynamic
        include_zero = dynamic or self.activations.include_zero
        spec = replace(self.activations, symmetric=False, include_zero=include_zero)
        return spec if self.softmax in ("int", "none") else replace(spec, format=self.softmax)

    @property
    def _has_later_words(self) -> bool:
        """Whether specs say what the released code does not know."""
        specs = (self.weights, self.activations)
        return any(spec.group_size is not None or not spec.is_rounded for spec in specs) or (
            self.activations.granularity not in ("tensor", "token_dynamic")
        )

    def operand(self, adapter: Adapter, product: MatMulSite, name: str) -> QuantSpec | None:
        """The spec of operand `a` or `b` of a product; None leaves it in full precision."""
        role = product.role(name)
        if role not in self.scope.operands:
            return None
        recipe = self.at_place(role, block_number(adapter, product.name))
        spec = recipe.activations
        if role == "p":
            if self.softmax == "none":
                return None
            spec = recipe.attention_weights
            if spec.granularity in ("group", "channel"):
                spec = spec.at("tensor")  # a place among the keys is no channel
        return spec if spec.is_rounded else None

    def at_site(self, adapter: Adapter, site: Site) -> Recipe:
        """The recipe with the specs that a site has."""
        recipe = self
        if self.changes:
            recipe = self.at_place(site.kind, block_number(adapter, site.name))
        if recipe.activations.granularity in BY_HEAD:  # an input has no heads
            recipe = replace(recipe, activations=recipe.activations.at("tensor"))
        return recipe

    def at_place(self, kind: str, block: int | None) -> Recipe:
        """The recipe with the specs of a kind of site, or operand of attention, in a block."""
        specs = {"weights": self.weights, "activations": self.activations}
        chosen = [change for change in self.changes if change.matches(kind, block)]
        if not chosen:
            return self
        for change in chosen:
            specs[change.operand] = change.apply(specs[change.operand])
        if kind in ATTENTION_OPERANDS:  # STWQ is of linear layers' inputs alone
            return replace(self, changes=(), stwq=False, per_position=False, **specs)
        return replace(self, changes=(), **specs)

    def sites_of(self, transform: str) -> tuple[str, ...]:
        """Site kinds that a transform acts on."""
        own_sites = TRANSFORMS[transform].sites
        if own_sites is not None:
            return own_sites
        return getattr(self.options, transform).sites if has_sites(transform) else self.sites


def require_places(adapter: Adapter, recipe: Recipe) -> None:
    """Refuse changes in blocks that a model has not.

    Raises:
        ConfigError: names the first.
    """
    for change in recipe.changes:
        if change.block is not None and change.block >= len(adapter.blocks):
            raise ConfigError(
                f"quant.by_layer.{change.block}: the model has no such block, allowed are 0 to "
                f"{len(adapter.blocks) - 1}"
            )


def shared_site_transforms() -> list[str]:
    """The transforms that act at `method.sites`."""
    shared = []
    for name, entry in TRANSFORMS.items():
        if entry.sites is None and not has_sites(name):
            shared.append(name)
    return shared


def _require_for_training(field_name: str, value: str, allowed: tuple[str, ...], why: str) -> None:
    """Refuse a value that OmniQuant, which does `why`, cannot train with."""
    if value not in allowed:
        raise ConfigError(
            f"{field_name}: {value} does not go with omniquant, which {why},"
            f" allowed is {' or '.join(allowed)}"
        )


# --- from configs


def read_changes(quant: Mapping[str, object]) -> tuple[Change, ...]:
    """What the fields `by_kind` and, after it, `by_layer` of `quant` say.

    Raises:
        ConfigError: a name is not allowed.
    """
    changes = _changes_by_kind("quant.by_kind", quant.get("by_kind", {}), None)
    for block, kinds in _entries("quant.by_layer", quant.get("by_layer", {})):
        path = f"quant.by_layer.{block}"
        if not str(block).isdecimal():
            raise ConfigError(f"{path}: no such block, allowed are their numbers from 0")
        changes += _changes_by_kind(path, kinds, int(block))
    return tuple(changes)


def _changes_by_kind(path: str, kinds: object, block: int | None) -> list[Change]:
    """The changes below a path that ends before the kinds."""
    changes = []
    known = tuple(entry.name for entry in fields(QuantSpec))
    for kind, operands in _entries(path, kinds):
        require(path, kind, (*KINDS, *ATTENTION_OPERANDS))
        allowed = ("activations",) if kind in ATTENTION_OPERANDS else ("weights", "activations")
        for operand, settings in _entries(f"{path}.{kind}", operands):
            require(f"{path}.{kind}", operand, allowed)
            entries = _entries(f"{path}.{kind}.{operand}", settings)
            for name, _ in entries:
                require(f"{path}.{kind}.{operand}", name, known)
            changes.append(Change(kind, operand, entries, block))
    return changes


def _entries(path: str, group: object) -> tuple[tuple[str, object], ...]:
    """The fields of a group and their values.

    Raises:
        ConfigError: it is no group.
    """
    if not isinstance(group, Mapping):
        raise ConfigError(f"{path}: {show_value(group)} is not a group of fields")
    return tuple(group.items())


def named(
    method: str,
    bits: str = "w8a8",
    scope: str = "paper",
    *,
    family: str | None = None,
    changes: Mapping[str, object] | None = None,
) -> Recipe:
    """The recipe that the installed configs describe.

    Args:
        method, bits, scope: names of files in `conf/method`, `conf/quant` and `conf/scope`.
        family: of the model, `Adapter.family`; what the released code quantizes depends on it.
        changes: fields of the method's file that are to have other values, `{"alpha": 0.6}`.

    Raises:
        ConfigError: no such name or field; a value that is not allowed; full precision; or a family
            is needed and not given.
    """
    return make_recipe(
        _read_settings("method", method, method_schema(), changes or {}),
        _read_settings("quant", bits, Quant, below=read_other_group("method", method, "quant")),
        _read_settings("scope", scope, ScopeConfig),
        family,
    )


def _read_settings(
    group: str,
    name: str,
    schema: type,
    changes: Mapping[str, object] | None = None,
    below: Mapping[str, object] | None = None,
) -> object:
    """A file of the configs as its schema's value, with some changes, over what `below` says."""
    given: DictConfig = read_choice(group, name)
    known = OmegaConf.structured(schema)
    for field_name in changes or ():
        if field_name not in known:
            raise ConfigError(
                f"{group}.{field_name}: no such field, allowed are {', '.join(known)}"
            )
    try:
        settings = OmegaConf.merge(known, below or {}, given, dict(changes or {}))
        return OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        where = f"{group}.{error.full_key}" if error.full_key else group
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error


def make_recipe(method: Method, quant: Quant, scope: ScopeConfig, family: str | None) -> Recipe:
    """The recipe of a method, bits and a scope as configs have them.

    Raises:
        ConfigError: a value is not allowed, or two switches exclude each other.
    """
    if not method.quantized:
        raise ConfigError(f"method: {method.name} quantizes nothing, allowed are other methods")
    chosen_scope = _quantized_scope(method, scope, family)
    if not chosen_scope.kinds and not chosen_scope.matmuls:
        raise ConfigError("scope.kinds: [] without scope.matmuls leaves nothing to quantize")
    activations = _quant_spec(quant.activations, method, "activations")
    return Recipe(
        weights=_quant_spec(quant.weights, method, "weights"),
        activations=activations.at_run_time() if method.dynamic else activations,
        transforms=tuple(name for name in TRANSFORMS if getattr(method, name, False)),
        sites=tuple(method.sites),
        scope=chosen_scope,
        stwq=method.stwq,
        exclude_sinks=method.exclude_sinks,
        alpha=method.alpha,
        gps_form=method.gps_form,
        released=method.released,
        options=library_options(method.options),
        rounder=method.rounder,
        softmax=method.softmax,
        omniquant=method.omniquant,
        sink_shift=method.sink_shift,
        per_position=method.per_position,
        per_head=method.per_head,
        key_weights=method.key_weights,
        bias_correction=method.bias_correction,
        sequential=method.sequential,
        shift_and_sum=method.shift_and_sum,
        changes=read_changes({"by_kind": quant.by_kind, "by_layer": quant.by_layer}),
    )


def _quant_spec(settings: Spec, method: Method, name: str) -> QuantSpec:
    """The spec of an operand, with what the method asks for in place of the settings'."""
    try:
        spec = library_value(QuantSpec, settings)
        return replace(
            spec,
            range=method.range or spec.range,
            symmetric=method.symmetric or spec.symmetric,
        )
    except ConfigError as error:
        raise ConfigError(f"quant.{name}.{error}") from error


def _quantized_scope(method: Method, settings: ScopeConfig, family: str | None) -> Scope:
    """What is quantized: all that the scope names, or what the released code does of it."""
    scope = Scope(tuple(settings.kinds), settings.matmuls, tuple(settings.operands))
    if settings.name != "released" and not method.released:
        return scope
    require("family", family, tuple(RELEASED))
    released = RELEASED[family].scope
    if settings.name == "released":
        scope = scope.within(released)
    if method.released and scope != scope.within(released):
        raise ConfigError(
            f"scope: {settings.name!r} is more than {method.name} quantizes of {family},"
            " allowed is released"
        )
    return scope

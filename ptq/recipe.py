"""A recipe: everything that makes one row of a table, as a value. Built from configs, read by the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptq.gps import FORMS, GPS
from ptq.options import Options
from ptq.shift import SymmetricShift
from ptq.smoothquant import SmoothQuant
from ptq.solver import Method
from ptq.types import Adapter, ConfigError, MatMulSite, QuantSpec, Site, require

ROUNDERS = ("nearest",)
KINDS = ("qkv", "proj", "fc1", "fc2", "head", "adaln", "embed", "diffusion")


@dataclass(frozen=True)
class Scope:
    """Which sites and products are quantized: site kinds, and whether the attention products (with K and V) are."""

    kinds: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "head", "adaln")
    matmuls: bool = True

    def __post_init__(self) -> None:
        for kind in self.kinds:
            require("scope.kinds", kind, KINDS)

    def sites(self, adapter: Adapter) -> list[Site]:
        return [s for s in adapter.sites if s.kind in self.kinds]

    def products(self, adapter: Adapter) -> list[MatMulSite]:
        return list(adapter.matmuls) if self.matmuls else []


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        weights, activations: specs of both operands; `activations.granularity` is `tensor` or `token_dynamic`.
        transforms: names of input transforms, in the order in which they are solved and applied.
        sites: site kinds that the transforms act on.
        stwq: static token-wise parameters at linear inputs. exclude_sinks: leave sink tokens out of the statistics that
            transforms are solved from.
        alpha: of SmoothQuant. gps_form: `squares` (released code) or `eq16` (paper).
        options: settings of the other methods. rounder: of the weights, one of `ROUNDERS`.
        softmax: number format of attention weights, `int` or `log_sqrt2` (RepQ).
        released: run the released code's own sequence of calibrations instead (`released.py`).
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
    released: bool = False

    def __post_init__(self) -> None:
        for name in self.transforms:
            require("method.transforms", name, tuple(METHODS))
        for kind in self.sites:
            require("method.sites", kind, KINDS)
        require("method.gps_form", self.gps_form, FORMS)
        require("method.rounder", self.rounder, ROUNDERS)
        require("method.softmax", self.softmax, ("int", "log_sqrt2"))
        require("quant.weights.granularity", self.weights.granularity, ("out_channel", "tensor"))
        require("quant.activations.granularity", self.activations.granularity, ("tensor", "token_dynamic"))
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"method.alpha: {self.alpha} is not between 0 and 1")
        fixed = (self.transforms, self.stwq, self.exclude_sinks) == (("smoothquant", "shift", "gps"), True, True)
        if self.released and not fixed:
            raise ConfigError("method.released: true runs a fixed sequence, its switches cannot be changed")
        if self.stwq and self.activations.granularity == "token_dynamic":
            raise ConfigError("method.stwq: true needs static activations, but quant.activations is token_dynamic")

    def sites_of(self, transform: str) -> tuple[str, ...]:
        """Site kinds that a transform acts on."""
        return {"hadamard": self.options.hadamard.sites, "svd": self.options.svd.sites}.get(transform, self.sites)


# in the order in which they are solved: diagonal steps, then a rotation, then a low-rank branch
METHODS: dict[str, Method] = {"smoothquant": SmoothQuant, "shift": SymmetricShift, "gps": GPS}

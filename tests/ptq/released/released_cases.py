"""The released PTQ4ARVG's pipelines on small models with made-up weights, family by family, and
what they recorded.

What a stage computes from full-precision inputs, and the first block, agree to fp32 rounding.
Behind a quantizer one rounding flip moves an activation by a whole step, so later quantities are
compared loosely: by their mean error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.mar.adapter import MARAdapter
from models.mar.transformer import MAR
from models.par.adapter import PARAdapter
from models.par.transformer import PAR
from models.rar.adapter import RARAdapter
from models.rar.transformer import RAR
from models.var.adapter import VARAdapter
from models.var.tokenizer import VQVAE
from models.var.transformer import VAR
from ptq.recipe import Recipe
from ptq.released.families import RELEASED
from ptq.released.sequence import ReleasedRun
from ptq.types import Adapter, CalibrationSet, QuantSpec, Rows
from tests.reference import Golden, fill, made_up_ints

STRICT = 2e-5  # of the absolute maximum
FLIPPED = 0.01  # share of the values that must agree strictly and may be off by a flip all the same
# mean error over mean magnitude of what lies behind flips; biases are sums that nearly cancel
LOOSE = 0.05
LOOSE_BIAS = 0.25
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# and how outputs after it are called
STAGES = {"initial": "initial", "shifted": "shift_recal", "final": "final"}


def recipe(family: str, bits: int = 6, weight_bits: int | None = None) -> Recipe:
    return Recipe(
        QuantSpec(weight_bits or bits, granularity="out_channel"),
        QuantSpec(bits),
        ("smoothquant", "shift", "gps"),
        stwq=True,
        exclude_sinks=True,
        released=True,
        scope=RELEASED[family].scope,
    )


def var_model(scales: tuple[int, ...], **settings: object) -> VARAdapter:
    sizes = dict(vocab_size=64, z_channels=8, patch_nums=scales)
    tokenizer = fill(VQVAE(ch=32, **sizes))
    model = VAR(depth=2, embed_dim=64, num_heads=4, num_classes=10, **sizes, **settings)
    return VARAdapter(fill(model), tokenizer.quantize)


def par_model(block: int) -> PARAdapter:
    return PARAdapter(fill(PAR(64, 2, 4, 64, block, 3, 4, 10, multiple_of=32)))


def mar_model(buffer: int) -> MARAdapter:
    return MARAdapter(
        fill(
            MAR(
                img_size=64,
                vae_stride=16,
                patch_size=1,
                encoder_embed_dim=48,
                encoder_depth=2,
                encoder_num_heads=4,
                decoder_embed_dim=48,
                decoder_depth=2,
                decoder_num_heads=4,
                vae_embed_dim=4,
                class_num=10,
                buffer_size=buffer,
                diffloss_d=1,
                diffloss_w=32,
            )
        )
    )


def rar_model() -> RARAdapter:
    return RARAdapter(fill(RAR(48, 2, 4, 192, 16, 40, 10)))


def rar(golden: Golden) -> tuple[Adapter, Rows]:
    return rar_model(), {"ids": golden["cali_input_ids"], "condition": golden["cali_condition"]}


def var(golden: Golden) -> tuple[Adapter, Rows]:
    ids = [made_up_ints(f"ptq:gt{i}", (8, side**2), 64) for i, side in enumerate(SCALES[:-1])]
    return var_model(SCALES), {
        "ids": torch.cat(ids, dim=1),
        "label": golden["cali_labels(10=null)"],
    }


def par(golden: Golden) -> tuple[Adapter, Rows]:
    """The reference holds one number of every token's embedding at least, which tells which token
    it is."""
    adapter = par_model(576)
    name = "cali_hs(rows: cond1,cond5,null,null,cond8,cond2,null,null)"
    embeddings = adapter.model.tok_embeddings.weight
    layout = adapter.model.layout
    place = torch.arange(len(golden[name])) * int(golden.data[f"{name}@stride"])
    row = place // (576 * 64)
    position = place // 64 % 576
    channel = place % 64
    misfit = torch.zeros(8, 576, 64)  # by token
    misfit.index_put_(
        (row, position), (golden[name][:, None] - embeddings[:, channel].t()).abs(), accumulate=True
    )
    token = layout.token_at(torch.arange(576))
    best, ids = misfit[:, token >= 0][:, token[token >= 0].argsort()].min(dim=-1)
    assert not best.any()
    return adapter, {"ids": ids, "labels": torch.tensor([1, 5, 10, 10, 8, 2, 10, 10])}


def mar(golden: Golden) -> tuple[Adapter, Rows]:
    tokens = golden["cali_tokens"]
    labels = golden["cali_labels"]
    rows = {
        "tokens": tokens,
        "mask": golden["cali_mask"].bool(),
        "labels": torch.cat((labels, torch.full((4,), 10))),
        "t": torch.zeros(tokens.shape[:2], dtype=torch.long),
        "noise": torch.zeros_like(tokens),
    }
    return mar_model(64), rows


@dataclass(frozen=True)
class Case:
    """A family's golden file: its model and rows, and how far the run may be from it.

    Rounding flips depend on the order in which a processor adds: the limits hold for MKL's kernels
    of five instruction sets, AVX-512 to SSE4.2.

    Attributes:
        output: name of the outputs in the file.
        exact: (stage, beginning of the layer's name) of what has to agree but for single values.
        outputs: mean error of quantized outputs, over that of full precision's.
    """

    family: str
    build: Callable[[Golden], tuple[Adapter, Rows]]
    output: str
    exact: tuple[tuple[str, str], ...]
    outputs: float


CASES = {
    "rar": Case(
        "rar",
        rar,
        "logits",
        exact=(("initial", ""), ("shifted", "blocks.0"), ("final", "blocks.0")),
        outputs=0.01,
    ),
    "var": Case(
        "var",
        var,
        "logits",
        exact=tuple((stage, "blocks.0") for stage in STAGES),
        outputs=0.3,
    ),
    # flips in front of w1 of either layer
    "par": Case(
        "par",
        par,
        "logits",
        exact=tuple((stage, "layers.0.attention") for stage in STAGES),
        outputs=0.75,
    ),
    "mar": Case(
        "mar",
        mar,
        "z",
        exact=(("initial", ""), ("shifted", "encoder_blocks.0"), ("final", "encoder_blocks.0")),
        outputs=0.8,
    ),
}


class Staged:
    """The released run with what the golden file recorded after every stage. Minibatches have 4 of
    the 8 rows."""

    def __init__(self, family: str) -> None:
        self.case = CASES[family]
        self.golden = Golden(f"ptq_{family}_pipeline")
        self.adapter, self.rows = self.case.build(self.golden)
        self.adapter.layout = "released"
        self.outputs = {}
        self.records = {}
        with torch.no_grad():
            self.adapter.prepare()
            self.full_precision = self.output()
            calibration = CalibrationSet(self.rows, torch.ones(8, dtype=torch.bool))
            self.run = ReleasedRun(self.adapter, calibration, recipe(family), 4)
            self.run.smooth()
            self.smoothing = {name: transform.scale for name, transform in self.run.online.items()}
            for stage in STAGES:
                before = {name: t.scale for name, t in self.run.transforms.items()}
                {
                    "initial": self.run.first_calibration,
                    "shifted": self.run.shift,
                    "final": self.run.scale,
                }[stage]()
                self.outputs[stage], self.records[stage] = self.output(), self.record()
                self.gps = {name: t.scale / before[name] for name, t in self.run.transforms.items()}
            self.run.freeze()

    def output(self) -> Tensor:
        if self.case.family == "mar":
            return self.adapter.model(*(self.rows[k] for k in ("tokens", "mask", "labels")))
        return self.adapter.forward(self.rows)

    def record(self) -> dict[str, Tensor]:
        """Parameters and folded weights by the golden file's names, copied."""
        run = self.run
        found = {}
        for name, linear in run.linears.items():
            inputs = run.inputs[name].params
            weights = run.weight_params[name]
            found |= {
                f"{name}|in_.delta": inputs.scale,
                f"{name}|in_.zp": inputs.zero_point,
                f"{name}|w.delta": weights.scale,
                f"{name}|w.zp": weights.zero_point,
                f"{name}|weight.rowsum": linear.weight.sum(1),
            }
            if linear.bias is not None:
                found[f"{name}|bias"] = linear.bias
        for name, product in run.products.items():
            parent, kind = name.rsplit(".", 1)
            layer = f"{parent}.matmul{1 if kind == 'qk' else 2}"
            for operand, quantizer in (("A", product.a), ("B", product.b)):
                found[f"{layer}|{operand}.delta"] = quantizer.params.scale
                if quantizer.spec.format == "int":
                    found[f"{layer}|{operand}.zp"] = quantizer.params.zero_point
        return {k: v.detach().reshape(-1).clone() for k, v in found.items()}

    def scale(self, step: str, name: str, function: str) -> Tensor:
        """A site's recorded scale; that of two minibatches is their average."""
        entries = [f"{step}|{name}|{function}#{n}" for n in range(2)]
        first = self.golden[entries[0]]
        return 0.9 * first + 0.1 * self.golden[entries[1]] if entries[1] in self.golden else first

    # What every family has to satisfy
    # --------------------------------------------------------------------------------

    def check_full_precision(self) -> None:
        prefix = f"fp_{self.case.output}"
        self.golden.check(prefix, self.full_precision, STRICT)
        self.run.full_precision()
        with torch.no_grad():
            folded = self.output()
        for entry in (f"{prefix}_final_weights", f"{prefix}_after_smooth"):
            if entry in self.golden:
                self.golden.check(entry, folded, STRICT)

    def check_smoothing(self) -> None:
        names = {n.split("|")[1] for n in self.golden.data.files if n.startswith("smoothquant|")}
        assert set(self.smoothing) == names
        for name, scale in self.smoothing.items():
            close(scale, self.scale("smoothquant", name, "calculate_scales"), STRICT, name)

    def check_parameters(self, stage: str) -> None:
        expected = {n for n in self.golden.data.files if n.startswith(f"{stage}|")}
        assert {f"{stage}|{name}" for name in self.records[stage]} == expected
        exact = [begin for s, begin in self.case.exact if s == stage]
        assert exact
        for name, value in self.records[stage].items():
            reference = self.golden[f"{stage}|{name}"].to(value.dtype).reshape(-1)
            self.check(
                f"{stage}|{name}", value, reference, any(name.startswith(begin) for begin in exact)
            )

    def check_gps(self) -> None:
        names = {n.split("|")[1] for n in self.golden.data.files if n.startswith("gps|")}
        (final,) = [begin for stage, begin in self.case.exact if stage == "final"]
        assert names
        for name in names:
            reference = self.scale("gps", name, "calculate_scales_hessian")
            self.check(name, self.gps[name], reference, name.startswith(final))

    def check_outputs(self) -> None:
        """The quantized model is closer to the released quantized one than full precision is."""
        for stage, called in STAGES.items():
            entry = f"q_{self.case.output}_{called}"
            reference = self.golden[entry].reshape(-1)
            error = mean_error(samples(self.golden, entry, self.outputs[stage]), reference)
            unquantized = mean_error(samples(self.golden, entry, self.full_precision), reference)
            assert error < self.case.outputs * unquantized, entry

    def check(self, name: str, value: Tensor, reference: Tensor, exact: bool) -> None:
        limit = LOOSE_BIAS if name.endswith("|bias") else LOOSE
        assert mean_error(value, reference) < limit, name
        if exact:
            off = relative_errors(value, reference) > STRICT
            assert float(off.double().mean()) <= FLIPPED, f"{name}: {int(off.sum())} values are off"


def relative_errors(value: Tensor, reference: Tensor) -> Tensor:
    """Errors over the largest magnitude of the reference."""
    return (value - reference).abs() / reference.abs().max().clamp(min=1e-30)


def close(value: Tensor, reference: Tensor, tolerance: float, name: str) -> None:
    error = float(relative_errors(value, reference).max())
    assert error <= tolerance, f"{name}: {error:.1e}"


def mean_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().mean() / reference.abs().mean().clamp(min=1e-30))


def samples(golden: Golden, entry: str, value: Tensor) -> Tensor:
    """The places of a tensor that the golden file keeps."""
    stride = int(golden.data[f"{entry}@stride"]) if f"{entry}@stride" in golden else 1
    return value.reshape(-1)[::stride]

"""NLL of held-out tokens, and the KL from full precision on them: nats per token, conditional
branch, no guidance.

Token ids are scored teacher-forced, by the mean of -log p and of KL(FP || model) over all positions. MAR's tokens are
vectors: there NLL is the diffusion loss and KL the Gaussian KL of p(x_{t-1} | x_t), both over the hidden tokens of
`DRAWS` draws of (mask, t, noise) an image. The draws depend on (SEED, image) alone: all runs see the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models import registry
from models.mar.diffusion import gaussian_kl
from models.mar.generator import Draws
from models.preset import Preset
from models.registry import Generator, LatentGenerator, TokenGenerator
from models.weights.checkpoints import read_checkpoint
from ptq.numbers.numerics import NonFiniteError
from ptq.types import ConfigError

DRAWS = 4
SEED = 0


def load_held_out(preset: Preset, n: int) -> dict[str, Tensor] | None:
    """The first n held-out token sequences, ids (n, L) or latents (n, L, D), and labels (n,); None
    but for twins.

    Raises:
        ConfigError: there are fewer. CheckpointError: the file is missing or damaged.
    """
    if not preset.weights.shipped:
        return None
    stored = read_checkpoint(registry.ZOO / f"{preset.family}_heldout.safetensors")
    if n > len(stored["tokens"]):
        raise ConfigError(f"eval.sequences: {n} is more than the {len(stored['tokens'])} that ship")
    return {"tokens": widen_tokens(stored["tokens"][:n]), "labels": stored["labels"][:n].long()}


def widen_tokens(tokens: Tensor) -> Tensor:
    """Tokens as models take them, of tokens as files hold them: FP16 to float32, int16 to int64."""
    return tokens.float() if tokens.is_floating_point() else tokens.long()


@torch.no_grad()
def score_likelihood(
    generator: Generator,
    tokens: Tensor,
    labels: Tensor,
    batch: int,
    reference: Generator | None = None,
) -> dict[str, float]:
    """{"nll"}, and with a full-precision `reference` also {"kl"}, of tokens (N, L) or (N, L, D) and
    labels (N,).

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    of_parts = _of_latents if isinstance(generator, LatentGenerator) else _of_ids
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)  # NLL, KL, tokens
    for part in of_parts(generator, reference, tokens, labels, batch):
        sums += torch.stack(part)
    nll, kl, count = sums.tolist()
    return {"nll": nll / count} if reference is None else {"nll": nll / count, "kl": kl / count}


def _of_ids(
    generator: TokenGenerator,
    reference: TokenGenerator | None,
    tokens: Tensor,
    labels: Tensor,
    batch: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for ids, classes in zip(tokens.split(batch), labels.split(batch)):
        ours = generator.log_probs(ids, classes)
        if not bool(ours.isfinite().all()):
            raise NonFiniteError(
                "logits: NaN or infinity on held-out tokens, only finite numbers are allowed"
            )
        nll = -ours.gather(2, generator.targets(ids)[..., None]).double().sum()
        kl = torch.zeros_like(nll)
        if reference is not None:
            theirs = reference.log_probs(ids, classes)
            kl = (theirs.exp() * (theirs - ours)).double().sum()
        yield nll, kl, torch.full_like(nll, ours.shape[0] * ours.shape[1])


def _of_latents(
    generator: LatentGenerator,
    reference: LatentGenerator | None,
    tokens: Tensor,
    labels: Tensor,
    batch: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The model runs once for every number of hidden tokens in a part, so draws that hide equally
    many go together."""
    index = torch.arange(len(tokens), device=labels.device)
    every = [generator.draws(seed, index) for seed in range(SEED, SEED + DRAWS)]
    mask, t, noise = (
        torch.cat([getattr(draws, name) for draws in every]) for name in ("mask", "t", "noise")
    )
    for chosen in mask.sum(dim=1).argsort(stable=True).split(batch):
        image = chosen % len(tokens)
        draws = Draws(mask[chosen], t[chosen], noise[chosen])
        given = tokens[image].to(draws.noise.dtype), labels[image], draws
        loss = generator.nll(*given)
        if not bool(loss.isfinite().all()):
            raise NonFiniteError(
                "diffusion loss: NaN or infinity on held-out tokens, only finite numbers are allowed"
            )
        nll = loss.double().sum()
        kl = torch.zeros((), dtype=torch.float64, device=labels.device)
        if reference is not None:
            kl = (
                gaussian_kl(reference.transitions(*given), generator.transitions(*given))
                .double()
                .sum()
            )
        yield nll, kl, draws.mask.sum().double()

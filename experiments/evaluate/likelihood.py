"""NLL of held-out tokens and their KL from full precision, in nats per token.

Of the conditional branch, without guidance. Token ids are scored teacher-forced, by the mean of
-log p and of KL(FP || model) over all positions. MAR's tokens are vectors: there NLL is the
diffusion loss and KL the Gaussian KL of p(x_{t-1} | x_t), both over the hidden tokens of `DRAWS`
draws of (mask, t, noise) an image. The draws depend on (SEED, image) alone: all runs see the same.
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
from models.weights.checkpoints import CheckpointError, read_checkpoint
from ptq.numbers.numerics import NonFiniteError
from ptq.types import ConfigError

DRAWS = 4
SEED = 0
Sums = tuple[Tensor, Tensor, Tensor]  # NLL, KL and number of the tokens of a batch, float64


def load_held_out(preset: Preset, n: int) -> dict[str, Tensor] | None:
    """The first n held-out token sequences of a twin; None for other models.

    Returns:
        "tokens": ids (n, L) or latents (n, L, D), and "labels" (n,).

    Raises:
        ConfigError: there are fewer.
        CheckpointError: the file is missing or damaged.
    """
    if not preset.weights.shipped:
        return None
    path = registry.shipped_file(preset.heldout_file)
    if not path.is_file():
        raise CheckpointError(
            f"weights: {path} is missing; "
            f"python -m experiments.train_zoo model={path.stem} makes it"
        )
    stored = read_checkpoint(path)
    shipped = len(stored["tokens"])
    if n > shipped:
        raise ConfigError(f"eval.sequences: {n} is more than the {shipped} that ship")
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
    """NLL of tokens (N, L) or (N, L, D) with labels (N,), and KL from full precision.

    Returns:
        "nll", and with a full-precision `reference` also "kl".

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    sum_batches = _sum_latents if isinstance(generator, LatentGenerator) else _sum_ids
    totals = torch.zeros(3, dtype=torch.float64, device=labels.device)  # as `Sums`
    for sums in sum_batches(generator, reference, tokens, labels, batch):
        totals += torch.stack(sums)
    nll, kl, count = totals.tolist()
    scores = {"nll": nll / count}
    if reference is not None:
        scores["kl"] = kl / count
    return scores


def _sum_ids(
    generator: TokenGenerator,
    reference: TokenGenerator | None,
    tokens: Tensor,
    labels: Tensor,
    batch: int,
) -> Iterator[Sums]:
    """The sums of token ids (N, L), `batch` images at a time."""
    for ids, classes in zip(tokens.split(batch), labels.split(batch)):
        log_p = generator.log_probs(ids, classes)  # (B, L, V)
        _refuse_non_finite("logits", log_p)
        targets = generator.targets(ids)[..., None]  # (B, L, 1)
        nll = -log_p.gather(2, targets).double().sum()
        kl = torch.zeros_like(nll)
        if reference is not None:
            fp_log_p = reference.log_probs(ids, classes)  # (B, L, V)
            kl = (fp_log_p.exp() * (fp_log_p - log_p)).double().sum()
        positions = log_p.shape[0] * log_p.shape[1]
        yield nll, kl, torch.full_like(nll, positions)


def _sum_latents(
    generator: LatentGenerator,
    reference: LatentGenerator | None,
    tokens: Tensor,
    labels: Tensor,
    batch: int,
) -> Iterator[Sums]:
    """The sums of latents (N, L, D), `batch` draws at a time.

    The model runs once for every number of hidden tokens in a batch, so draws that hide equally
    many go together.
    """
    all_draws = _fixed_draws(generator, len(tokens), labels.device)
    # (DRAWS n,); stable, so that ties keep their order on every device
    by_hidden = all_draws.mask.sum(dim=1).argsort(stable=True)
    for chosen in by_hidden.split(batch):
        image = chosen % len(tokens)  # (B,)
        draws = Draws(all_draws.mask[chosen], all_draws.t[chosen], all_draws.noise[chosen])
        latents = tokens[image].to(draws.noise.dtype)  # (B, L, D)
        classes = labels[image]  # (B,)
        loss, transitions = generator.density(latents, classes, draws)  # (B, L), (H, D)
        _refuse_non_finite("diffusion loss", loss)
        nll = loss.double().sum()
        kl = torch.zeros((), dtype=torch.float64, device=labels.device)
        if reference is not None:
            fp_transitions = reference.density(latents, classes, draws).transitions
            # summed over the channels (H, D) of the H hidden tokens
            kl = gaussian_kl(fp_transitions, transitions).double().sum()
        yield nll, kl, draws.mask.sum().double()


def _fixed_draws(generator: LatentGenerator, n: int, device: torch.device) -> Draws:
    """`DRAWS` draws of each of n images, all images for each draw in turn."""
    index = torch.arange(n, device=device)
    seeds = range(SEED, SEED + DRAWS)
    draws = [generator.draws(seed, index) for seed in seeds]
    return Draws(
        mask=torch.cat([draw.mask for draw in draws]),  # (DRAWS n, L)
        t=torch.cat([draw.t for draw in draws]),  # (DRAWS n, L)
        noise=torch.cat([draw.noise for draw in draws]),  # (DRAWS n, L, D)
    )


def _refuse_non_finite(name: str, values: Tensor) -> None:
    """Raises: NonFiniteError: one of the values is NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"{name}: NaN or infinity on held-out tokens, only finite numbers are allowed"
        )

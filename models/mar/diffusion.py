"""Gaussian diffusion of a latent token: schedule, respacing, learned variance, sampling step, loss.

Numerics follow LTH14/mar `diffusion/` (`respace.py`, `gaussian_diffusion.py`), itself a descendant
of OpenAI's code. Everything is a pure function of tensors: the network's output and the noise are
arguments. x (N, D) holds N tokens, t (N,) their steps in this (respaced) diffusion; the network
wants the step of the full one, `timestep_map[t]`.

Kept surprises: the loss at t = 0 is the likelihood of a Gaussian discretised to 255 levels of [-1,
1], as if a latent were a pixel; the variance term of the loss is in bits, the squared error in
latent units, and they are added as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STEPS = 1000  # of the full diffusion, the one that is trained
_CPU = torch.device("cpu")


def cosine_betas(steps: int = STEPS) -> np.ndarray:
    """Noise added at each step (steps,), so that the kept signal is cos^2, at most 0.999 a step."""
    angles = [(i / steps + 0.008) / 1.008 * math.pi / 2 for i in range(steps + 1)]
    signal = np.array([math.cos(angle) ** 2 for angle in angles])  # (steps + 1,)
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def spaced_timesteps(respacing: str, steps: int = STEPS) -> list[int]:
    """The steps of the full diffusion that are kept, ascending.

    Args:
        respacing: "" keeps all; "n" takes n evenly; "a,b,c" cuts the steps into three equal
            sections and takes a, b and c of them; "ddimN" takes N at a whole stride from 0.

    Raises:
        ValueError: the string asks for more steps than there are, or for a stride that does not
            exist.
    """
    if respacing == "":
        return list(range(steps))
    counts = respacing.removeprefix("ddim").split(",")
    if not all(count.strip().isdigit() and int(count) > 0 for count in counts):
        raise ValueError(
            f"diffusion_steps: {respacing!r} is not a count, a list of counts, or ddimN"
        )
    if respacing.startswith("ddim"):
        for stride in range(1, steps):
            timesteps = list(range(0, steps, stride))
            if [str(len(timesteps))] == counts:
                return timesteps
        raise ValueError(f"diffusion_steps: no whole stride over {steps} steps gives {respacing!r}")

    kept: set[int] = set()
    size, rest = divmod(steps, len(counts))
    sizes = [size + (section < rest) for section in range(len(counts))]
    bounds = np.cumsum([0, *sizes])
    for start, end, count in zip(bounds[:-1], bounds[1:], map(int, counts)):
        if count > end - start:
            raise ValueError(
                f"diffusion_steps: {respacing!r} takes {count} of a section of {end - start} steps"
            )
        stride = (end - start - 1) / (count - 1) if count > 1 else 1.0
        # summed one by one, as rounding to even depends on it
        places = np.cumsum([0.0] + [stride] * (count - 1))
        kept.update(int(start) + int(place) for place in np.rint(places))
    return sorted(kept)


class Gaussian(NamedTuple):
    """A diagonal Gaussian over x_{t-1}, (..., D) each; `x_start` is the clean token its mean was
    computed from."""

    mean: Tensor
    log_variance: Tensor
    x_start: Tensor


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) per channel in nats (..., D)."""
    ratio = p.log_variance - q.log_variance
    return 0.5 * (ratio.exp() - 1 - ratio + (p.mean - q.mean) ** 2 * (-q.log_variance).exp())


@dataclass(frozen=True, eq=False)
class Diffusion:
    """Tables (T,) of a diffusion with T steps, float64, and what is computed from them.

    alphas_cumprod is the kept signal power:
        x_t = sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise.
    The posterior q(x_{t-1} | x_t, x_0) has mean coef1 x_0 + coef2 x_t. Its log variance at t = 0 is
    that at t = 1.
    """

    timestep_map: Tensor
    betas: Tensor
    log_betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @property
    def steps(self) -> int:
        return len(self.betas)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (N, D) of clean tokens x_start (N, D) and standard normal noise (N, D)."""
        return (
            _column_at(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + _column_at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def posterior(self, x_start: Tensor, x: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t = x, x_0 = x_start)."""
        mean = (
            _column_at(self.posterior_mean_coef1, t, x) * x_start
            + _column_at(self.posterior_mean_coef2, t, x) * x
        )
        return Gaussian(
            mean, _column_at(self.posterior_log_variance_clipped, t, x).expand_as(x), x_start
        )

    def p_mean_variance(self, output: Tensor, x: Tensor, t: Tensor) -> Gaussian:
        """p(x_{t-1} | x_t = x) from the network's output (N, 2 D): noise, and log variance's place.

        The second half runs from -1, the posterior's log variance, to 1, that of the step's own
        noise; it may leave that range. The predicted clean token is not clipped.
        """
        noise, place = output.chunk(2, dim=1)  # (N, D) each
        x_start = (
            _column_at(self.sqrt_recip_alphas_cumprod, t, x) * x
            - _column_at(self.sqrt_recipm1_alphas_cumprod, t, x) * noise
        )
        posterior = self.posterior(x_start, x, t)
        share = (place + 1) / 2
        log_variance = (
            share * _column_at(self.log_betas, t, x) + (1 - share) * posterior.log_variance
        )
        return Gaussian(posterior.mean, log_variance, x_start)

    def p_sample(
        self, output: Tensor, x: Tensor, t: Tensor, noise: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """x_{t-1} (N, D): the mean, and unless t = 0 the noise times temperature and deviation."""
        p = self.p_mean_variance(output, x, t)
        spread = torch.where(t[:, None] > 0, (0.5 * p.log_variance).exp(), torch.zeros_like(x))
        return p.mean + spread * noise * temperature

    def losses(
        self, output: Tensor, x_start: Tensor, x: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the predicted noise, and bound in bits: means over channels, (N,) each.

        The bound trains the variance only: no gradient flows from it into the predicted noise.
        """
        predicted, place = output.chunk(2, dim=1)  # (N, D) each
        p = self.p_mean_variance(torch.cat((predicted.detach(), place), dim=1), x, t)
        kl = gaussian_kl(self.posterior(x_start, x, t), p).mean(dim=1)  # (N,)
        likelihood = _discretised_log_likelihood(x_start, p).mean(dim=1)  # (N,)
        bound = torch.where(t == 0, -likelihood, kl) / math.log(2)
        return (noise - predicted).square().mean(dim=1), bound


@lru_cache(maxsize=64)
def cosine_diffusion(respacing: str = "", device: torch.device = _CPU) -> Diffusion:
    """The diffusion with the cosine schedule, of the steps that `respacing` keeps, on `device`."""
    kept = spaced_timesteps(respacing)
    signal = np.cumprod(1 - cosine_betas())[kept]
    # what must be added to get from one kept step to the next
    betas = 1 - signal / np.append(1.0, signal[:-1])  # (T,)
    kept_power = np.cumprod(1 - betas)  # (T,), the same as `signal` but for rounding
    before = np.append(1.0, kept_power[:-1])
    variance = betas * (1 - before) / (1 - kept_power)
    # variance[0] is zero
    clipped = np.append(variance[1:2] if len(kept) > 1 else betas, variance[1:])
    tables = dict(
        betas=betas,
        log_betas=np.log(betas),
        alphas_cumprod=kept_power,
        sqrt_alphas_cumprod=np.sqrt(kept_power),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - kept_power),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / kept_power),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / kept_power - 1),
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=betas * np.sqrt(before) / (1 - kept_power),
        posterior_mean_coef2=(1 - before) * np.sqrt(1 - betas) / (1 - kept_power),
    )
    on_device = {name: torch.from_numpy(table).to(device) for name, table in tables.items()}
    return Diffusion(torch.from_numpy(np.array(kept)).to(device), **on_device)


def _column_at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries t (N,) of a table as a column (N, 1) of the type of `like`."""
    return table[t].to(like.dtype)[:, None]


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """Log probability (N, D) in nats of the bin of width 2/255 around x; the outermost are open."""
    centred = x - p.mean
    precision = (-0.5 * p.log_variance).exp()  # (N, D), one over the deviation
    upper = _normal_cdf(precision * (centred + 1 / 255))
    lower = _normal_cdf(precision * (centred - 1 / 255))
    # the bin at either end of [-1, 1] takes the whole tail
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    # the clamp keeps the log finite
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()

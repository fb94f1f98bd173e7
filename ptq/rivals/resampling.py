"""The selector `resample`: tokens of the calibration rows are drawn anew, so that every code of the
codebook occurs as often as the model expects.

Few generated images have some codes too often and others never. Shift-and-Sum (arXiv 2606.16131,
`main.py` of its code) takes the probabilities that the model gave its tokens, scale by scale:

    target_c = N mean p(c) over the N tokens of the scale, in whole numbers that sum to N
    codes that occur too often give tokens away: those whose probability of being one of the codes
    that are missing is largest, which then is drawn by that probability

Rows and labels are those of the selector `random`. Tokens later in the image stay what they were,
as in the authors' code. Other than there, probabilities are the model's own given the class of the
row (or none), without guidance and without top-k and top-p; the last scale is no input and stays.
VAR alone: its rows are tokens, and its logits at a position are those of the token there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.calibration import Selection, random_rows
from ptq.registry.entries import register_selector
from ptq.sites import CalibrationSet, Rows
from ptq.spec import ConfigError


def resample_rows(selection: Selection, rows: Rows) -> Rows:
    """The rows with tokens whose codes are balanced.

    Raises:
        ConfigError: the model is no VAR.
    """
    adapter = selection.adapter
    if adapter.family != "var":
        raise ConfigError(f"calib.selector: resample is for var, not for {adapter.family}")
    length = rows["ids"].shape[1]
    kept = CalibrationSet(rows, torch.ones(len(rows["ids"])))
    with torch.no_grad():
        logits = [adapter.forward(part)[:, :length] for part in kept.batches(selection.batch)]
    probabilities = torch.cat(logits).float().softmax(dim=-1).cpu()  # (n, L, V)
    ids = rows["ids"].cpu().clone()
    generator = torch.Generator().manual_seed(selection.seed)
    for first, end in adapter.model.spans[:-1]:
        ids[:, first:end] = balance_codes(ids[:, first:end], probabilities[:, first:end], generator)
    return {**rows, "ids": ids.to(rows["ids"].device)}


def target_counts(probabilities: Tensor) -> Tensor:
    """How often every code (V,) is to occur among tokens with these probabilities (N, V)."""
    expected = probabilities.double().mean(dim=0) * len(probabilities)
    counts = expected.floor().long()
    missing = len(probabilities) - int(counts.sum())
    counts[(expected - counts).topk(missing).indices] += 1
    return counts


def balance_codes(ids: Tensor, probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (n, T) with codes changed until they occur as often as expected.

    Args:
        probabilities: (n, T, V) of every token.
    """
    shape = ids.shape
    tokens = ids.flatten().clone()  # (N,)
    chances = probabilities.flatten(0, 1)  # (N, V)
    target = target_counts(chances)
    surplus = torch.bincount(tokens, minlength=len(target)) - target  # (V,)
    shortage = (-surplus).clamp(min=0)
    for code in (surplus > 0).nonzero().flatten().tolist():
        places = (tokens == code).nonzero().flatten()
        gain = chances[places][:, shortage > 0].sum(dim=1)
        for place in places[gain.argsort(descending=True)][: int(surplus[code])].tolist():
            wanted = chances[place] * (shortage > 0)
            if not bool(wanted.any()):
                wanted = (shortage > 0).to(chances.dtype)
            drawn = int(torch.multinomial(wanted, 1, generator=generator))
            tokens[place] = drawn
            shortage[drawn] -= 1
    return tokens.view(shape)


@register_selector("resample", rework=resample_rows)
def rows_to_resample(selection: Selection) -> Tensor:
    """Any rows; `resample_rows` changes them."""
    return random_rows(selection)

"""Attacks that never see a gradient of the model they attack: random search asks it, transfer attacks another one."""
from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.losses import margin


def random_search(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, queries: int = 1000,
                  target: Tensor | None = None, confidence: float = 0.0,
                  generator: torch.Generator | None = None) -> AttackResult:
    """Random search on the margin: guess a gradient, redraw a share of the guess, keep it if the margin gets no better.

    A guess stands for the image of ball ∩ box that would be best if it were the gradient (`threat.linear_maximiser`), so
    every candidate uses the whole budget, in every norm. The share redrawn falls from a half to a few coordinates.
    Asks the model at most `queries` times an image, besides the one look at x; an image broken asks no more. Fixed
    radius: a success has distance <= eps. ValueError as for `fgsm` and for a negative number of queries.
    """
    if queries < 0:
        raise ValueError(f"queries={queries!r} is negative")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    rows, p = attempt.open, x[0].numel() if len(x) else 0
    guess = noise.normal(attempt.seeds[rows], p, 0, x.dtype)
    lowest = torch.full((len(rows),), inf, dtype=x.dtype, device=x.device)
    for k in range(queries):
        if not len(rows):
            break
        share = max(0.5 * (1 - k / queries) ** 4, 2 / p)
        seeds = attempt.seeds[rows]
        redraw = noise.uniform(seeds, p, 2 * k + 1) < share if k else torch.zeros_like(guess, dtype=torch.bool)
        proposal = torch.where(redraw, noise.normal(seeds, p, 2 * k, x.dtype), guess)
        a = threat.linear_maximiser(proposal.reshape(-1, *x.shape[1:]), attempt.x[rows], attempt.eps[rows], norm)
        logits = attempt.logits(a, rows)
        m = margin(logits, attempt.y[rows]) if target is None else -margin(logits, target[rows])
        keep = m < lowest
        guess[keep], lowest[keep] = proposal[keep], m[keep]
        won = attempt.submit(a, logits, rows)
        rows, guess, lowest = rows[~won], guess[~won], lowest[~won]
    return attempt.result()

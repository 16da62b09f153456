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
    """Random search on the margin: guess a gradient, redraw a share of the guess, keep it unless the margin rises.

    A guess stands for the image of ball ∩ box that would be best if it were the gradient (`threat.linear_maximiser`): so
    every candidate spends the whole budget, in every norm. The share redrawn falls from 30 % to three values. Asks the
    model at most `queries` times an image, besides the one look at x; a broken image asks no more. Fixed radius: a success
    has distance <= eps. ValueError as for `fgsm`, and for a negative number of queries.
    """
    if queries < 0:
        raise ValueError(f"queries={queries!r} is negative")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    rows, x = attempt.open, attempt.x
    p = x[0].numel() if len(x) else 1
    sign = 1 if target is None else -1  # lower the margin of y, or raise that of the target
    guess = noise.normal(attempt.seeds[rows], p, 0, x.dtype)
    lowest = torch.full((len(rows),), inf, dtype=x.dtype, device=x.device)
    for k in range(queries):
        if not len(rows):
            break
        proposal, share = guess, 0.3 * (min(3 / p, 0.3) / 0.3) ** (k / queries)
        if k:
            seeds = attempt.seeds[rows]
            redraw = noise.uniform(seeds, p, 2 * k + 1) < share
            proposal = torch.where(redraw, noise.normal(seeds, p, 2 * k, x.dtype), guess)
        a = threat.linear_maximiser(proposal.reshape(-1, *x.shape[1:]), x[rows], attempt.eps[rows], norm)
        logits = attempt.logits(a, rows)
        won = attempt.submit(a, logits, rows)
        m = sign * margin(logits, attempt.label(rows))
        keep = m <= lowest
        guess, lowest = torch.where(keep[:, None], proposal, guess), torch.where(keep, m, lowest)
        rows, guess, lowest = rows[~won], guess[~won], lowest[~won]
    return attempt.result()


def transfer(model: nn.Module, x: Tensor, y: Tensor, *, attack: Callable[..., AttackResult | Tensor],
             substitutes: nn.Module | Sequence[nn.Module], eps=inf, norm=inf, target: Tensor | None = None,
             generator: torch.Generator | None = None, **options) -> AttackResult:
    """Attack substitutes one after the other, and try what each yields on the model itself (papernot2016transferability).

    `attack` is called as attack(substitute, x, y, norm=norm, generator=generator, **options), with eps and target where
    they are given. Asks `model` once for each substitute, besides the one look at x, and never for a gradient; queries
    counts these, not the substitutes' own. An attack that stops at the border of the substitute's class seldom crosses
    the model's: give it a confidence, or a function that returns images [n, *shape], broken or not. Judged on `model`, in
    ball ∩ box; errors are those of the attack.
    """
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=torch.Generator())
    options |= {} if bool((attempt.eps == inf).all()) else {"eps": eps}
    options |= {} if target is None else {"target": target}
    generator = generator or torch.Generator()
    start = generator.get_state()
    for substitute in [substitutes] if isinstance(substitutes, nn.Module) else substitutes:
        rows = attempt.open
        if not len(rows):
            break
        generator.set_state(start)  # so that an image meets each substitute with the same randomness in any batch
        found = attack(substitute, x, y, norm=norm, generator=generator, **options)
        a = (found if isinstance(found, Tensor) else found.adversarial)[rows].to(attempt.x)
        attempt.submit(a, attempt.logits(a, rows), rows)
    return attempt.result()

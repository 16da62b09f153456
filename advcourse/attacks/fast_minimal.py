"""Fast minimal-norm attacks: walk along the boundary while a radius shrinks.

DDN and FMN take a gradient step, then shrink the perturbation to a radius that falls after a success and grows after a failure.
Both take short walks towards several classes, then a long one from the best point found, and end with `pull_back`: on a ReLU
network exact inside one activation region.
"""
from collections.abc import Callable, Iterator
from functools import partial
from math import cos, inf, pi

import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.iterative import check_count, like
from advcourse.attacks.minimal import AIM, dual_length, dual_lengths, pull_back, rivals_of
from advcourse.losses import Loss, margin_loss

STEP = {inf: 2.0, 2: 2.0, 1: 2.0, 0: 0.5}  # Euclidean length of FMN's first step
REACH = 1.6  # a class farther than this many times the nearest one, both linearised, is not worth a walk


def _cosine(start: float, end: float, k: int, steps: int) -> float:
    return end + (start - end) * (1 + cos(pi * k / steps)) / 2


def aims(attempt: Attempt, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Walks to take, at most `count`: (images [m], the class each heads for [m]); the nearest class first, a target alone.

    Nearest by linearised distance; a class beyond REACH times the nearest one is left out.
    """
    rows = attempt.started
    if attempt.target is not None and len(rows):
        yield rows, attempt.target[rows]
    if attempt.target is not None or not len(rows):
        return
    rivals = rivals_of(attempt, rows, attempt.clean.shape[1] - 1)
    _, leads, w = attempt.class_gradients(attempt.x[rows], rivals, rows)
    away, order = (-leads / dual_lengths(w, attempt.x[rows], attempt.norm)).sort(1)
    for k in range(min(count, rivals.shape[1])):
        worth = away[:, k] <= REACH * away[:, 0]
        if bool(worth.any()):
            yield rows[worth], rivals.gather(1, order[:, k:k + 1])[worth, 0]


def lead_of(attempt: Attempt, aim: Tensor) -> Loss:
    """The loss f_aim - f_y for an attempt without target, the margin otherwise: raised, it serves the attack."""
    if attempt.target is not None:
        return margin_loss
    return lambda s, y: (s.gather(1, aim[:, None]) - s.gather(1, y[:, None]))[:, 0]


def scout(attempt: Attempt, walk: Callable, *, steps: int, classes: int) -> None:
    """From x `steps` / 2 steps towards each class worth it, then `steps` from the best point, beginning half as long.

    `walk(attempt, rows, loss, a, steps=…, share=…)` starts at a with first step `share` times its usual length.
    """
    for rows, aim in aims(attempt, classes):
        walk(attempt, rows, lead_of(attempt, aim), attempt.x[rows], steps=(steps + 1) // 2, share=1.0)
    rows = attempt.started
    if len(rows):
        walk(attempt, rows, margin_loss, attempt.best[rows], steps=steps, share=0.5)


def fmn(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, steps: int = 40, step: float | None = None, gamma: float = 0.1,
        classes: int = 5, target: Tensor | None = None, confidence: float = 0.0, eps=inf, refine: int = 3,
        generator: torch.Generator | None = None) -> AttackResult:
    """Fast minimum-norm attack in norm inf, 2, 1 or 0 (pintor2021fast), gradients masked at the box.

    Returns the nearest adversarial image seen: an upper bound on the minimal distortion, with no claim of optimality.
    Without a target it first heads for up to `classes` nearest classes, `steps` / 2 steps each: the nearest mistake is often
    not the one that the steepest margin points to. Then it takes `steps` steps from the best point. `step` is the Euclidean
    length of the first move (by default STEP[norm]), `gamma` how fast the radius changes; both fall along a cosine. `refine`
    rounds of `pull_back` end the attack (0: as published). `eps` caps the distance that counts. Errors as for `fgsm`.
    """
    check_count(steps, "steps")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    scout(attempt, partial(_walk_inside, length=STEP[norm] if step is None else step, gamma=gamma), steps=steps, classes=classes)
    pull_back(attempt, refine)
    return attempt.result()


def _walk_inside(attempt: Attempt, rows: Tensor, loss: Loss, a: Tensor, *, steps: int, share: float, length: float,
                 gamma: float) -> None:
    """FMN's walk: a gradient step, then into the ball of the current radius."""
    norm, x = attempt.norm, attempt.x[rows]
    best = torch.full_like(attempt.distance[rows], inf)  # on this walk
    radius = best
    for k in range(steps):
        logits, value, g = attempt.gradient(loss, a, rows)
        won, here = attempt.submit(a, logits, rows), threat.distance(a, x, norm)
        best = torch.where(won, torch.minimum(best, here), best)
        g = threat.inward(g, a)
        missing = (attempt.needed(logits, AIM) - value).clamp_min(0) / dual_length(g, norm)
        radius = _next_radius(radius, best, here, won, missing, _cosine(gamma, gamma / 50, k, steps), norm)
        a = threat.shrink(a + share * length * _cosine(1, 0.01, k, steps) * threat.steepest(g, 2), x, radius, norm)
    attempt.submit(a, attempt.logits(a, rows), rows)


def _next_radius(radius: Tensor, best: Tensor, here: Tensor, won: Tensor, missing: Tensor, rate: float, norm) -> Tensor:
    """Smaller after a success, larger after a failure; before the first success, to where the linearised boundary is.

    Never as large as the best distance: nothing is gained there, and rounding would choose between two points equally far.
    """
    if norm == 0:
        return torch.where(won, torch.minimum(best - 1, (best * (1 - rate)).floor()).clamp_min(0),
                           torch.where(best < inf, torch.minimum((radius * (1 + rate)).floor().maximum(radius + 1), best - 1),
                                       here + missing.ceil().clamp(1, 10)))
    return torch.where(won, torch.minimum(radius, best) * (1 - rate),
                       torch.where(best < inf, torch.minimum(radius * (1 + rate), best * 0.9999), here + missing))


def ddn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 40, step: float = 1.0, gamma: float = 0.1,
        classes: int = 5, target: Tensor | None = None, confidence: float = 0.0, eps=inf, refine: int = 3, norm=2,
        generator: torch.Generator | None = None) -> AttackResult:
    """Decoupled direction and norm, Euclidean (rony2019decoupling): every iterate is put on the sphere of the current radius.

    Unlike `fmn` the radius follows the current point only: times 1 - gamma when it is adversarial, times 1 + gamma when
    it is not, with `gamma` constant; it starts at the linearised boundary. Guarantee, `steps`, `classes`, `refine`, `eps` and
    errors as for `fmn`. ValueError for a norm other than 2.
    """
    if norm != 2:
        raise ValueError(f"norm={norm!r}: ddn is a Euclidean attack, use fmn for the others")
    check_count(steps, "steps")
    attempt = Attempt(model, x, y, norm=2, eps=eps, target=target, confidence=confidence, generator=generator)
    scout(attempt, partial(_walk_on_sphere, length=step, gamma=gamma), steps=steps, classes=classes)
    pull_back(attempt, refine)
    return attempt.result()


def _walk_on_sphere(attempt: Attempt, rows: Tensor, loss: Loss, a: Tensor, *, steps: int, share: float, length: float,
                    gamma: float) -> None:
    """DDN's walk: a gradient step, then onto the sphere of the current radius, then into the box."""
    x, radius = attempt.x[rows], attempt.distance[rows]
    for k in range(steps):
        logits, value, g = attempt.gradient(loss, a, rows)
        won, g = attempt.submit(a, logits, rows), threat.inward(g, a)
        if k == 0:
            missing = (attempt.needed(logits, AIM) - value).clamp_min(0) / dual_length(g, 2)
            radius = threat.distance(a, x, 2) + missing
        radius = torch.where(won, radius * (1 - gamma), radius * (1 + gamma))
        moved = a - x + share * length * _cosine(1, 0.01, k, steps) * threat.steepest(g, 2)
        a = (x + moved * like(radius / moved.flatten(1).norm(dim=1).clamp_min(1e-12), moved)).clamp(0, 1)
    attempt.submit(a, attempt.logits(a, rows), rows)

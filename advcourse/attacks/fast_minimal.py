"""Fast minimal-norm attacks: walk along the boundary while a radius shrinks.

DDN and FMN take a gradient step, then project onto a ball whose radius shrinks after a success and grows after a failure. Both
end with `pull_back`: on a ReLU network exact inside one activation region.
"""
from math import cos, inf, pi

import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.iterative import check_count, like
from advcourse.attacks.minimal import dual_length, pull_back, rivals_of
from advcourse.losses import margin_loss


def _cosine(start: float, end: float, k: int, steps: int) -> float:
    return end + (start - end) * (1 + cos(pi * k / steps)) / 2


def _dual_length(g: Tensor, norm) -> Tensor:
    """||g|| in the dual norm: what one unit of distance gains on the linearised margin."""
    return (g * threat.steepest(g, norm)).flatten(1).sum(1).clamp_min(1e-12)


def aims(attempt: Attempt, rows: Tensor, count: int) -> Tensor:
    """The `count` classes whose linearised boundaries are nearest to each image, nearest first, [m, count]; a target is alone."""
    if attempt.target is not None:
        return attempt.target[rows, None]
    rivals = rivals_of(attempt, rows, attempt.clean.shape[1] - 1)
    _, leads, w = attempt.class_gradients(attempt.x[rows], rivals, rows)
    length = dual_length(w, attempt.x[rows], attempt.norm or 1)  # norm 0 is ranked as norm 1
    nearest = (-leads / length).topk(min(count, rivals.shape[1]), 1, largest=False).indices
    return rivals.gather(1, nearest)


def lead_of(attempt: Attempt, aim: Tensor):
    """The loss f_aim - f_y for an attempt without target, the margin otherwise: raised, it serves the attack."""
    if attempt.target is not None:
        return margin_loss
    return lambda s, y: (s.gather(1, aim[:, None]) - s.gather(1, y[:, None]))[:, 0]


def fmn(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, steps: int = 40, step: float = 1.0, gamma: float = 0.05,
        classes: int = 4, target: Tensor | None = None, confidence: float = 0.0, eps=inf, refine: int = 3,
        generator: torch.Generator | None = None) -> AttackResult:
    """Fast minimum-norm attack in norm inf, 2, 1 or 0 (pintor2021fast), gradients masked at the box.

    Returns the nearest adversarial image seen: an upper bound on the minimal distortion, with no claim of optimality.
    Without a target it heads for each of the `classes` nearest classes in turn, `steps` steps each: the nearest mistake is
    often not the one that the steepest margin points to. `step` is the Euclidean length of the first move, `gamma` how fast
    the radius changes; both fall along a cosine. `refine` rounds of `pull_back` end the attack (0: as published). `eps`
    caps the distance that counts. Errors as for `fgsm`.
    """
    check_count(steps, "steps")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.started
    if not len(rows):
        return attempt.result()
    start = attempt.x[rows]
    for aim in aims(attempt, rows, classes).T:
        loss, a, own = lead_of(attempt, aim), start.clone(), torch.full((len(rows),), inf, dtype=start.dtype, device=x.device)
        radius = own.clone()
        for k in range(steps):
            rate = _cosine(gamma, gamma / 50, k, steps)
            logits, value, g = attempt.gradient(loss, a, rows)
            won, here = attempt.submit(a, logits, rows), threat.distance(a, start, norm)
            own = torch.where(won, torch.minimum(own, here), own)
            g = torch.where(((a <= 0) & (g < 0)) | ((a >= 1) & (g > 0)), 0, g)
            missing = (confidence - value).clamp_min(0) / _dual_length(g, norm)
            radius = _next_radius(radius, own, here, won, missing, rate, norm)
            a = threat.project(a + step * _cosine(1, 0.01, k, steps) * threat.steepest(g, 2), start, radius, norm)
        attempt.submit(a, attempt.logits(a, rows), rows)
    pull_back(attempt, refine)
    return attempt.result()


def _next_radius(radius: Tensor, best: Tensor, here: Tensor, won: Tensor, missing: Tensor, rate: float, norm) -> Tensor:
    """Smaller after a success, larger after a failure; before the first success, just beyond the linearised boundary."""
    if norm == 0:
        return torch.where(won, torch.minimum(best - 1, (best * (1 - rate)).floor()).clamp_min(0),
                           torch.where(best < inf, torch.minimum((radius * (1 + rate)).floor().maximum(radius + 1), best - 1),
                                       here + missing.ceil().clamp(1, 10)))
    return torch.where(won, torch.minimum(radius, best) * (1 - rate),
                       torch.where(best < inf, torch.minimum(radius * (1 + rate), best), (here + missing) * (1 + rate)))


def ddn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 40, step: float = 1.0, gamma: float = 0.05,
        classes: int = 4, target: Tensor | None = None, confidence: float = 0.0, eps=inf, refine: int = 3, norm=2,
        generator: torch.Generator | None = None) -> AttackResult:
    """Decoupled direction and norm, Euclidean (rony2019decoupling): every iterate is put on the sphere of the current radius.

    Unlike `fmn` the radius follows the current point only: times 1 - gamma when it is adversarial, times 1 + gamma when
    it is not, with `gamma` constant. Guarantee, `classes`, `refine`, `eps` and errors as for `fmn`. ValueError for a norm
    other than 2.
    """
    if norm != 2:
        raise ValueError(f"norm={norm!r}: ddn is a Euclidean attack, use fmn for the others")
    check_count(steps, "steps")
    attempt = Attempt(model, x, y, norm=2, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.started
    if not len(rows):
        return attempt.result()
    start = attempt.x[rows]
    for aim in aims(attempt, rows, classes).T:
        loss, a, radius = lead_of(attempt, aim), start.clone(), torch.ones(len(rows), dtype=start.dtype, device=x.device)
        for k in range(steps):
            logits, _, g = attempt.gradient(loss, a, rows)
            won = attempt.submit(a, logits, rows)
            radius = torch.where(won, radius * (1 - gamma), radius * (1 + gamma))
            moved = a - start + step * _cosine(1, 0.01, k, steps) * threat.steepest(g, 2, a)
            on_sphere = start + moved * like(radius / moved.flatten(1).norm(dim=1).clamp_min(1e-12), x)
            a = threat.project(on_sphere, start, radius, 2)
        attempt.submit(a, attempt.logits(a, rows), rows)
    pull_back(attempt, refine)
    return attempt.result()

"""Fast minimal-norm attacks: walk along the boundary while a radius shrinks, then fall straight onto it.

DDN and FMN take a gradient step, then project onto a ball whose radius shrinks after a success and grows after a failure. Both
end with `tighten`, which replaces the network by its linearisation at the best point found and jumps to the nearest point
beyond the linearised boundary: on a ReLU network exact inside one activation region.
"""
from math import cos, inf, pi

import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.losses import margin_loss


def _shape(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.dim() - 1))


def _cosine(start: float, end: float, k: int, steps: int) -> float:
    return end + (start - end) * (1 + cos(pi * k / steps)) / 2


def _dual_length(g: Tensor, norm) -> Tensor:
    """||g|| in the dual norm: what one unit of distance gains on the linearised margin."""
    return (g * threat.steepest(g, norm)).flatten(1).sum(1).clamp_min(1e-12)


def tighten(attempt: Attempt, steps: int = 10) -> None:
    """Jump from every best point to the nearest point beyond the boundary linearised there, while that is an improvement.

    Where the jump falls short the next one aims further beyond; where it succeeds the aim returns. Only ever improves.
    """
    rows = ((attempt.distance > 0) & (attempt.distance < inf)).nonzero()[:, 0]
    beyond = torch.full((len(rows),), 1e-5, dtype=attempt.x.dtype, device=attempt.x.device)
    a = attempt.best[rows]
    for _ in range(steps if len(rows) else 0):
        x = attempt.x[rows]
        logits, value, g = attempt.gradient(margin_loss, a, rows)
        won = attempt.submit(a, logits, rows)
        scale = logits.abs().amax(1).clamp_min(1e-12)
        beyond = torch.where(won, 1e-6, beyond * 4)
        gap = attempt.confidence + beyond * scale - value + (g * (a - x)).flatten(1).sum(1)
        a = threat.nearest_beyond(g, gap, x, attempt.norm)
    if len(rows):
        attempt.submit(a, attempt.logits(a, rows), rows)


def fmn(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, steps: int = 100, step: float = 1.0, gamma: float = 0.05,
        target: Tensor | None = None, confidence: float = 0.0, eps=inf, polish: int = 20,
        generator: torch.Generator | None = None) -> AttackResult:
    """Fast minimum-norm attack in norm inf, 2, 1 or 0 (pintor2021fast), with gradients masked at the box and a final `tighten`.

    Returns the nearest adversarial image seen: an upper bound on the minimal distortion, with no claim of optimality.
    `step` is the Euclidean length of the first move, `gamma` how fast the radius changes; both fall to 0 along a cosine.
    `polish` is the number of jumps of `tighten`. `eps` caps the distance that counts. Errors as for `fgsm`.
    """
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.started
    if not len(rows):
        return attempt.result()
    start = attempt.x[rows]
    a, radius = start.clone(), torch.full((len(rows),), inf, dtype=x.dtype, device=x.device)
    for k in range(steps):
        rate = _cosine(gamma, gamma / 50, k, steps)
        logits, value, g = attempt.gradient(margin_loss, a, rows)
        won = attempt.submit(a, logits, rows)
        g = torch.where(((a <= 0) & (g < 0)) | ((a >= 1) & (g > 0)), 0, g)
        radius = _next_radius(radius, attempt.distance[rows], threat.distance(a, start, norm), won,
                              (attempt.confidence - value).clamp_min(0) / _dual_length(g, norm), rate, norm)
        length = step * _cosine(1, 0.01, k, steps)
        a = threat.project(a + length * threat.steepest(g, 2), start, radius, norm)
    attempt.submit(a, attempt.logits(a, rows), rows)
    tighten(attempt, polish)
    return attempt.result()


def _next_radius(radius: Tensor, best: Tensor, here: Tensor, won: Tensor, missing: Tensor, rate: float, norm) -> Tensor:
    """Smaller after a success, larger after a failure; before the first success, to where the linearised boundary is."""
    if norm == 0:
        return torch.where(won, torch.minimum(best - 1, (best * (1 - rate)).floor()).clamp_min(0),
                           torch.where(best < inf, torch.minimum((radius * (1 + rate)).floor().maximum(radius + 1), best - 1),
                                       here + missing.ceil().clamp(1, 10)))
    return torch.where(won, torch.minimum(radius, best) * (1 - rate),
                       torch.where(best < inf, torch.minimum(radius * (1 + rate), best), here + missing))


def ddn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 100, step: float = 1.0, gamma: float = 0.05,
        target: Tensor | None = None, confidence: float = 0.0, eps=inf, polish: int = 20, norm=2,
        generator: torch.Generator | None = None) -> AttackResult:
    """Decoupled direction and norm, Euclidean (rony2019decoupling): every iterate is put on the sphere of the current radius.

    Unlike `fmn` the radius follows the current point only: times 1 - gamma when it is adversarial, times 1 + gamma when
    it is not, with `gamma` constant. Guarantee, `polish`, `eps` and errors as for `fmn`. ValueError for a norm other than 2.
    """
    if norm != 2:
        raise ValueError(f"norm={norm!r}: ddn is a Euclidean attack, use fmn for the others")
    attempt = Attempt(model, x, y, norm=2, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.started
    if not len(rows):
        return attempt.result()
    start = attempt.x[rows]
    a, radius = start.clone(), torch.ones(len(rows), dtype=x.dtype, device=x.device)
    for k in range(steps):
        logits, _, g = attempt.gradient(margin_loss, a, rows)
        won = attempt.submit(a, logits, rows)
        radius = torch.where(won, radius * (1 - gamma), radius * (1 + gamma))
        moved = a - start + step * _cosine(1, 0.01, k, steps) * threat.steepest(g, 2, a)
        on_sphere = start + moved * _shape(radius / moved.flatten(1).norm(dim=1).clamp_min(1e-12), x)
        a = threat.project(on_sphere, start, radius, 2)
    attempt.submit(a, attempt.logits(a, rows), rows)
    tighten(attempt, polish)
    return attempt.result()

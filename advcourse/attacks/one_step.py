"""One gradient, one step: Biggio's projected step and the fast gradient sign method."""
from math import inf

import torch
from torch import Tensor, nn

from advcourse import losses, threat
from advcourse.attacks.attempt import AttackResult, Attempt


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, target: Tensor | None = None,
         loss="cross_entropy", generator: torch.Generator | None = None) -> AttackResult:
    """One step to where the linearised loss is largest in ball ∩ box (goodfellow2015explaining).

    For norm inf this is x + eps sign(gradient), clipped to the box; `threat.linear_maximiser` is its like for norms 2, 1, 0.
    Fixed radius: a success has distance <= eps. ValueError for images outside the box, labels out of range, a negative eps
    or an unknown norm.
    """
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=generator)
    rows = attempt.open
    if len(rows):
        start, radius = attempt.x[rows], attempt.eps[rows]
        _, _, g = attempt.gradient(losses.get(loss), start, rows)
        a = threat.linear_maximiser(g, start, radius, norm)
        attempt.submit(a, attempt.logits(a, rows), rows)
    return attempt.result()


def projected_gradient_step(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=2, step=None,
                            target: Tensor | None = None, generator: torch.Generator | None = None) -> AttackResult:
    """One gradient step on the logit of y, then the projection onto ball ∩ box (biggio2013evasion, on the lecture's slide).

    Lowers f_y (or raises f_target): a = Proj(x - step * gradient). `step` is the length of the move before the projection, in
    Euclidean units; by default long enough that the projection always lands on the ball. Errors as for `fgsm`.
    """
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=generator)
    rows = attempt.open
    if len(rows):
        start, radius = attempt.x[rows], attempt.eps[rows]
        _, _, g = attempt.gradient(lambda s, k: -s.gather(1, k[:, None])[:, 0], start, rows)
        far = x[0].numel() if step is None else step
        a = threat.project(start + far * threat.steepest(g, 2), start, radius, norm)
        attempt.submit(a, attempt.logits(a, rows), rows)
    return attempt.result()

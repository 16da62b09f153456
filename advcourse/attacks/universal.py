"""One perturbation for all images: by accumulating DeepFool steps, and by stochastic gradient steps on the mean loss.

These attacks learn from the batch as a whole: what an image gets depends on its neighbours.
"""
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from advcourse import losses, noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.iterative import check_count
from advcourse.losses import margin_loss


@dataclass(frozen=True)
class Universal(AttackResult):
    """A perturbation `delta` [1, *shape] and, as an AttackResult, what it did to the images it was made on."""

    delta: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x + delta, clipped to the box. ValueError for images outside the box."""
        threat.check_images(x)
        return (x + self.delta).clamp(0, 1)


def ball(delta: Tensor, eps: float, norm) -> Tensor:
    """The nearest perturbation of length at most eps with values in [-1, 1], which is where a difference of images lies."""
    centre = torch.full_like(delta, 0.5)
    return 2 * threat.project(centre + delta / 2, centre, eps if norm == 0 else eps / 2, norm) - 1


def _check_radius(eps) -> None:
    threat.check_eps(eps)
    if torch.as_tensor(eps).dim():
        raise ValueError(f"eps of shape {list(torch.as_tensor(eps).shape)}: one perturbation for all images has one radius")


def _fooled(attempt: Attempt, delta: Tensor) -> tuple[float, Tensor]:
    """(share of the images fooled by delta, the perturbed images); images misclassified before do not count."""
    a = (attempt.x + delta).clamp(0, 1)
    rows = attempt.started
    if not len(rows):
        return 0.0, a
    return float(attempt.wins(attempt.logits(a[rows], rows), rows).float().mean()), a


def _finish(attempt: Attempt, delta: Tensor) -> Universal:
    a, rows = (attempt.x + delta).clamp(0, 1), attempt.open
    return Universal(**vars(attempt.result(a[rows], rows)), delta=delta)


def universal_deepfool(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm=inf, passes: int = 5, inner: int = 3,
                       overshoot: float = 0.1, share: float = 1.0, target: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Universal:
    """Universal perturbation by accumulation (moosavidezfooli2017universal): image after image, the least push that fools it.

    An image that the current delta does not fool adds up to `inner` linearised minimal steps (`threat.nearest_beyond`), then
    delta is projected back onto the ball. Stops after `passes` or once a `share` of the images is fooled; keeps the best
    delta. Fooling rates on these images say little about others: `apply` it to a test set. Errors as for `fgsm`.
    """
    check_count(passes, "passes")
    check_count(inner, "inner")
    _check_radius(eps)
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=generator)
    delta = attempt.x.new_zeros(1, *x.shape[1:])
    best, rate = delta, 0.0
    order = attempt.started[torch.argsort(noise.uniform(attempt.seeds[attempt.started], 1)[:, 0])]
    for _ in range(passes):
        for row in order[:, None]:
            for _ in range(inner):
                a = (attempt.x[row] + delta).clamp(0, 1)
                logits, value, g = attempt.gradient(margin_loss, a, row)
                if bool(attempt.wins(logits, row)[0]):
                    break
                step = threat.nearest_beyond(g, (1 + overshoot) * -value + 1e-6, a, norm) - a
                delta = ball(delta + step, eps, norm)
        now, _ = _fooled(attempt, delta)
        if now > rate:
            best, rate = delta, now
        if rate >= share:
            break
    return _finish(attempt, best)


def universal_sgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float = inf, norm=inf, weight: float | None = None,
                  steps: int = 200, batch: int = 64, rate: float = 0.1, loss="margin", cap: float = 5.0,
                  target: Tensor | None = None, generator: torch.Generator | None = None) -> Universal:
    """Universal perturbation by Adam on minibatches: raise the mean loss, projected onto the ball or with a price on length.

    Without `weight`: delta is projected onto the ball of radius eps after each step. With `weight`, the lecture's
    Lagrangian: maximise E[min(loss, cap)] - weight * ||delta||_2^2, whose solution has the length it has. `cap` stops an
    image that is fooled by a wide margin from drawing the delta further. Keeps the delta that fools most of these images,
    looked at ten times; with a weight, the last. Errors as for `fgsm`; ValueError for an infinite eps without a weight.
    """
    _check_radius(eps)
    if weight is None and eps == inf:
        raise ValueError(f"eps={eps}: give a radius, or a weight for the Lagrangian form")
    threat.check_eps(0 if weight is None else weight, "weight")
    check_count(steps, "steps")
    check_count(batch, "batch")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=generator)
    rows, raise_ = attempt.started, losses.get(loss)
    delta = attempt.x.new_zeros(1, *x.shape[1:])
    best, rate_best = delta.clone(), -1.0
    optimiser = torch.optim.Adam([delta], lr=rate)
    sign = 1 if target is None else -1

    def capped(s: Tensor, k: Tensor) -> Tensor:
        return sign * (sign * raise_(s, k)).clamp_max(cap)

    for k in range(steps if len(rows) else 0):
        now = rows[torch.argsort(noise.uniform(attempt.seeds[rows], 1, step=k)[:, 0])[:batch]]
        at = attempt.x[now] + delta
        _, _, g = attempt.gradient(capped, at.clamp(0, 1), now)
        g = torch.where(((at <= 0) & (g < 0)) | ((at >= 1) & (g > 0)), 0, g)  # a clipped pixel cannot go further
        delta.grad = -g.mean(0, keepdim=True) + (0 if weight is None else 2 * weight * delta)
        optimiser.step()
        delta.copy_(ball(delta, eps, norm) if eps < inf else delta.clamp(-1, 1))
        if k % max(1, steps // 10) == 0 or k == steps - 1:
            fooled, _ = _fooled(attempt, delta)
            if fooled >= rate_best or weight is not None:  # the price counts too: the last is the best traded
                best, rate_best = delta.clone(), fooled
    return _finish(attempt, best)

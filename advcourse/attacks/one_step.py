"""One gradient, one step: Biggio's projected step and the fast gradient sign method."""
from math import inf

from torch import Tensor, nn

from advcourse import losses, threat
from advcourse.attacks.attempt import AttackResult, Attempt


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, loss="cross_entropy", target: Tensor | None = None,
         confidence: float = 0.0, generator=None) -> AttackResult:
    """One step to where the linearised loss is largest in ball ∩ box (goodfellow2015explaining).

    For norm inf this is x + eps sign(gradient), clipped to the box; `threat.linear_maximiser` is its like for norms 2, 1, 0.
    Fixed radius: a success has distance <= eps. ValueError for images outside the box, labels out of range, a negative eps
    or an unknown norm. No randomness: `generator` is there for uniformity.
    """
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    if not len(x):
        return attempt.result()
    _, _, g = attempt.gradient(losses.get(loss))
    return attempt.result(threat.linear_maximiser(g, attempt.x, attempt.eps, norm))


def projected_gradient_step(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=2, step=None, target: Tensor | None = None,
                            confidence: float = 0.0, generator=None) -> AttackResult:
    """One gradient step on the logit of y, then the projection onto ball ∩ box (biggio2013evasion, on the lecture's slide).

    Lowers f_y (or raises f_target): a = Proj(x - step * gradient / ||gradient||_2). `step` is thus the length of the move
    before the projection; by default it is so long that the projection always lands on the ball. Errors as for `fgsm`.
    """
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    if not len(x):
        return attempt.result()
    _, _, g = attempt.gradient(lambda logits, label: -logits.gather(1, label[:, None])[:, 0])
    length = x[0].numel() if step is None else step
    return attempt.result(threat.project(attempt.x + length * threat.steepest(g, 2), attempt.x, attempt.eps, norm))

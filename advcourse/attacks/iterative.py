"""Many small steps, each projected back onto ball ∩ box: BIM, ILCM, PGD and the parameter-free APGD."""
from math import ceil, inf

import torch
from torch import Tensor, nn

from advcourse import losses, threat
from advcourse.attacks.attempt import AttackResult, Attempt

STEP = {inf: 2.5, 2: 2.5, 1: 5.0}  # all steps together, in radii: enough to cross the ball and come back

class Ball:
    """Ball ∩ box around the images an iterative attack still works on; for norm inf it is itself a box."""

    def __init__(self, x: Tensor, eps: Tensor, norm):
        self.norm = norm
        self.around: tuple[Tensor, Tensor] = threat.interval(x, eps) if norm == inf else (x, eps)

    def project(self, a: Tensor) -> Tensor:
        """A point of the ball at a, which is overwritten: the nearest one, but for norm 2, where `threat.shrink` does as well."""
        if self.norm == inf:
            return a.clamp_(*self.around)
        return (threat.shrink if self.norm == 2 else threat.project)(a, *self.around, self.norm)

    def keep(self, which: Tensor) -> None:
        """Go on with these images only, given by index."""
        first, second = self.around
        self.around = first.index_select(0, which), second.index_select(0, which)

    def step(self, a: Tensor, gradient: Tensor, length: Tensor) -> Tensor:
        """Proj(a + length * direction), uphill: the direction is the steepest of length one in the norm.

        For norm 1 the steepest direction moves one pixel; here as many move, equally, as eps could push from 0 to 1. For
        norm 0 it is the gradient over its largest component: the projection chooses whom to move.
        """
        if self.norm == inf:
            direction = gradient.sign()
        elif self.norm == 2:
            direction = threat.steepest(gradient, 2, a)
        elif self.norm == 1:
            direction = sparse_direction(gradient, a, self.around[1])
        else:
            direction = gradient / like(gradient.flatten(1).abs().amax(1).clamp_min(1e-30), a)
        return self.project(direction.mul_(like(length, a)).add_(a))


def sparse_direction(gradient: Tensor, a: Tensor, count: Tensor) -> Tensor:
    """+-1/count on the `count` largest gradients among the pixels free to move, [n] counts, rounded up; l1 length one."""
    g, count = threat.inward(gradient, a).flatten(1), count.ceil().clamp(1, a.shape[1:].numel())[:, None]
    return (g.sign() * threat.largest(g.abs(), count) / count).reshape(a.shape)


def like(v: Tensor, a: Tensor) -> Tensor:
    """One value an image, [m], shaped to multiply a batch of images."""
    return v.reshape(-1, *[1] * (a.dim() - 1))


def climb(attempt: Attempt, a: Tensor, rows: Tensor, *, loss, step: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`steps` projected steps from a; an image leaves as soon as it is broken. -> (last iterates, their rows)."""
    ball, length = Ball(attempt.x[rows], attempt.eps[rows], attempt.norm), step[rows]
    for _ in range(steps):
        if not len(rows):
            break
        logits, _, g = attempt.gradient(loss, a, rows)
        won = attempt.submit(a, logits, rows)
        if bool(won.any()):
            stay = (~won).nonzero()[:, 0]
            rows, a, g, length = (v.index_select(0, stay) for v in (rows, a, g, length))
            ball.keep(stay)
        a = ball.step(a, g, length)
    return a, rows


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, steps: int = 40, step=None, restarts: int = 1,
        random_start: bool = True, loss="cross_entropy", target: Tensor | None = None, confidence: float = 0.0,
        generator: torch.Generator | None = None) -> AttackResult:
    """Projected gradient descent from a random point of the ball (madry2018towards), for norms inf, 2, 1, 0.

    `step`: length of a step in `norm`, a number or one an image; by default STEP[norm] eps / steps, and 30 for norm 0. `loss`:
    "cross_entropy", "margin", "dlr" or a function. Only images still unbroken start again. Fixed radius: a success has
    distance <= eps. ValueError as for `fgsm`, and for steps or restarts below 1.
    """
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    if step is None:
        step = 30.0 if norm == 0 else STEP[norm] / steps * attempt.eps
    step = torch.as_tensor(step, dtype=attempt.x.dtype, device=x.device).expand(len(x))
    a, rows = attempt.x, attempt.open
    for k in range(restarts):
        if k:  # the last iterates of the run before have not been judged yet
            attempt.submit(a, attempt.logits(a, rows), rows)
            rows = attempt.open
        a = attempt.x[rows]
        if random_start:
            a = threat.sample(a, attempt.eps[rows], norm, attempt.seeds[rows], step=k)
        a, rows = climb(attempt, a, rows, loss=losses.get(loss), step=step, steps=steps)
    return attempt.result(a, rows)


def bim(model: nn.Module, x: Tensor, y: Tensor, *, eps, step: float = 1 / 255, steps: int | None = None,
        loss="cross_entropy", target: Tensor | None = None, confidence: float = 0.0, generator=None) -> AttackResult:
    """The basic iterative method, i-FGSM: steps of one grey level from x itself, in norm inf (kurakin2017physical).

    Without `steps`, as many as the paper's rule gives: min(eps/step + 4, 1.25 eps/step). No randomness. Errors as for `pgd`.
    """
    threat.check_eps(eps)
    if steps is None:
        levels = float(torch.as_tensor(eps).max()) / step
        steps = max(1, ceil(min(levels + 4, 1.25 * levels)))
    return pgd(model, x, y, eps=eps, step=step, steps=steps, random_start=False, loss=loss, target=target,
               confidence=confidence, generator=generator)


def ilcm(model: nn.Module, x: Tensor, y: Tensor, *, eps, step: float = 1 / 255, steps: int | None = None,
         confidence: float = 0.0, generator=None) -> AttackResult:
    """Iterative least-likely-class method: `bim` aimed at the class the model finds least likely (kurakin2017physical).

    Success means that this class, never y, wins. Errors as for `pgd`.
    """
    attempt = Attempt(model, x, y)
    least = attempt.clean.scatter(1, y[:, None], inf).argmin(1) if len(x) else y
    return bim(model, x, y, eps=eps, step=step, steps=steps, target=least, confidence=confidence, generator=generator)


def apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, steps: int = 100, restarts: int = 1,
         loss="cross_entropy", target: Tensor | None = None, confidence: float = 0.0,
         generator: torch.Generator | None = None) -> AttackResult:
    """Auto-PGD (croce2020reliable): momentum, and a step that halves itself, image by image, when progress stalls.

    Nothing to tune but `steps` and the `loss` ("cross_entropy", "margin", "dlr" or a function). Each halving restarts from
    the best point seen. Fixed radius: a success has distance <= eps. Errors as for `pgd`.
    """
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    for k in range(restarts):
        rows = attempt.open
        a = threat.sample(attempt.x[rows], attempt.eps[rows], norm, attempt.seeds[rows], step=k)
        climb_adaptively(attempt, a, rows, loss=losses.get(loss), steps=steps)
    return attempt.result()


def climb_adaptively(attempt: Attempt, a: Tensor, rows: Tensor, *, loss, steps: int) -> None:
    """APGD's loop. `best`: the largest loss value seen, with its image and gradient; `rises`: steps uphill since the last
    checkpoint; `stale`: `best` at the last checkpoint, infinite where the step was halved there."""
    ball, marks, last = Ball(attempt.x[rows], attempt.eps[rows], attempt.norm), checkpoints(steps), 0
    length = 2 * attempt.eps[rows]
    value, best, stale = (torch.full_like(length, v) for v in (inf, -inf, inf))
    rises, before, best_a, best_g = torch.zeros_like(rows), a, a.clone(), torch.zeros_like(a)
    for k in range(steps + 1):
        if not len(rows):
            return
        logits, new, g = attempt.gradient(loss, a, rows)
        won = attempt.submit(a, logits, rows)
        if bool(won.any()):
            stay = (~won).nonzero()[:, 0]
            rows, a, before, best_a, g, best_g, length, value, new, best, stale, rises = (
                v.index_select(0, stay) for v in (rows, a, before, best_a, g, best_g, length, value, new, best, stale, rises))
            ball.keep(stay)
        rises, value, higher = rises + (new > value), new, new > best
        best_a[higher], best_g[higher], best[higher] = a[higher], g[higher], new[higher]
        if k in marks:
            halve = (rises < 0.75 * (k - last)) | (best == stale)
            length, stale, last = torch.where(halve, length / 2, length), torch.where(halve, inf, best), k
            a, g, before, rises = a.clone(), g.clone(), before.clone(), torch.zeros_like(rises)
            a[halve], g[halve], before[halve] = best_a[halve], best_g[halve], best_a[halve]
        z = ball.step(a, g, length)
        a, before = (ball.project(a + 0.75 * (z - a) + 0.25 * (a - before)) if k else z), a


def checkpoints(steps: int) -> list[int]:
    """The steps at which APGD looks back: after 22 % of them, then ever more often (croce2020reliable)."""
    marks, gap = [0.0, 0.22], 0.22
    while marks[-1] < 1:
        gap = max(gap - 0.03, 0.06)
        marks.append(marks[-1] + gap)
    return sorted({ceil(m * steps - 1e-9) for m in marks[1:]})


def check_count(k, name: str) -> None:
    """Raise ValueError unless k is an integer of at least 1."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{name}={k!r} must be an integer of at least 1")

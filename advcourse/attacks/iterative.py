"""Many small steps, each projected back onto ball ∩ box: BIM, ILCM, PGD and the parameter-free APGD."""
from math import ceil, inf

import torch
from torch import Tensor, nn

from advcourse import losses, threat
from advcourse.attacks.attempt import AttackResult, Attempt


def sparse_direction(gradient: Tensor, x: Tensor, share: float) -> Tensor:
    """Signs on the `share` of coordinates with the largest gradients among those free to move, of l1 length one.

    The steepest l1 step moves one coordinate; moving the best few together takes fewer steps to the same place.
    """
    g = torch.where(((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0)), 0, gradient).flatten(1)
    top = g.abs().topk(max(1, round(share * g.shape[1])), dim=1)
    step = torch.zeros_like(g).scatter(1, top.indices, g.gather(1, top.indices).sign())
    return (step / step.abs().sum(1, keepdim=True).clamp_min(1)).reshape(x.shape)


def move(a: Tensor, gradient: Tensor, length: Tensor, x: Tensor, eps: Tensor, norm, share: float = 0.02) -> Tensor:
    """One projected step uphill: Proj(a + length * direction), the direction being the steepest of the norm."""
    length = length.reshape(-1, *[1] * (x.dim() - 1))
    if norm == inf:
        direction = gradient.sign()
    else:
        direction = sparse_direction(gradient, a, share) if norm == 1 else threat.steepest(gradient, norm, a)
    return threat.project(a + length * direction, x, eps, norm)


def _climb(attempt: Attempt, a: Tensor, rows: Tensor, *, loss, step: Tensor, steps: int, share: float = 0.02):
    """`steps` projected steps from a; an image leaves as soon as it is broken. -> (last iterates, their rows)."""
    x, eps, step = attempt.x[rows], attempt.eps[rows], step[rows]
    for _ in range(steps):
        if not len(rows):
            break
        logits, _, g = attempt.gradient(loss, a, rows)
        won = attempt.submit(a, logits, rows)
        if bool(won.any()):
            rows, a, g, x, eps, step = (v[~won] for v in (rows, a, g, x, eps, step))
        a = move(a, g, step, x, eps, attempt.norm, share)
    return a, rows


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, steps: int = 40, step=None, restarts: int = 1,
        random_start: bool = True, loss="cross_entropy", share: float = 0.02, target: Tensor | None = None,
        confidence: float = 0.0, generator: torch.Generator | None = None) -> AttackResult:
    """Projected gradient descent from a random point of the ball (madry2018towards), for norms inf, 2, 1, 0.

    `step` is the length of a step in `norm` (default 2.5 eps / steps), a number or one an image. `loss`: "cross_entropy",
    "margin", "dlr" or a function. With restarts only images still unbroken start again. For norm 1 each step moves the
    `share` of pixels with the largest gradients. Fixed radius: a success has distance <= eps. ValueError as for `fgsm`,
    and for steps or restarts below 1.
    """
    check_count(steps, "steps")
    check_count(restarts, "restarts")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    length = 2.5 * attempt.eps / steps if step is None else torch.as_tensor(step, dtype=attempt.x.dtype).expand(len(x))
    rows = attempt.open
    a = attempt.x[rows]
    for k in range(restarts):
        if k:
            attempt.submit(a, attempt.logits(a, rows), rows)
            rows = attempt.open
        a = attempt.x[rows]
        if random_start:
            a = threat.sample(a, attempt.eps[rows], norm, attempt.seeds[rows], step=k)
        a, rows = _climb(attempt, a, rows, loss=losses.get(loss), step=length, steps=steps, share=share)
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


def check_count(k, name: str) -> None:
    """Raise ValueError unless k is an integer of at least 1."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{name}={k!r} must be an integer of at least 1")


def _checkpoints(steps: int) -> list[int]:
    """The steps at which APGD looks back: after 22 % of them, then ever more often (croce2020reliable)."""
    marks, gap = [0.0, 0.22], 0.22
    while marks[-1] < 1:
        gap = max(gap - 0.03, 0.06)
        marks.append(marks[-1] + gap)
    return sorted({ceil(m * steps) for m in marks[1:]})


def apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, steps: int = 100, restarts: int = 1,
         loss="cross_entropy", share: float = 0.02, target: Tensor | None = None, confidence: float = 0.0,
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
        _climb_adaptively(attempt, a, rows, loss=losses.get(loss), steps=steps, share=share)
    return attempt.result()


def _climb_adaptively(attempt: Attempt, a: Tensor, rows: Tensor, *, loss, steps: int, share: float) -> None:
    """APGD's loop; names as in the paper: z the plain step, `best` the largest loss value seen and where."""
    x, eps, before, best_a = attempt.x[rows], attempt.eps[rows], a, a
    length = 2 * eps
    value = best = best_then = torch.full_like(eps, -inf)  # best_then: `best` at the last checkpoint
    halved, rises = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    best_g, marks, last_mark = torch.zeros_like(a), _checkpoints(steps), 0
    for k in range(steps + 1):
        if not len(rows):
            return
        logits, new, g = attempt.gradient(loss, a, rows)
        won = attempt.submit(a, logits, rows)
        rises = rises + (new > value)
        value, higher = new, _like(new > best, a)
        best_a, best_g, best = torch.where(higher, a, best_a), torch.where(higher, g, best_g), torch.maximum(new, best)
        if k in marks:
            halve = (rises < 0.75 * (k - last_mark)) | (~halved & (best == best_then))
            length, back = torch.where(halve, length / 2, length), _like(halve, a)
            a, g, before = (torch.where(back, u, v) for u, v in ((best_a, a), (best_g, g), (best_a, before)))
            halved, best_then, last_mark, rises = halve, best, k, torch.zeros_like(rises)
        if bool(won.any()):
            rows, a, g, before, x, eps, length, value, best, best_a, best_g, best_then, halved, rises = (
                v[~won] for v in (rows, a, g, before, x, eps, length, value, best, best_a, best_g, best_then, halved, rises))
        z = move(a, g, length, x, eps, attempt.norm, share)
        momentum = 0.75 if k else 1.0
        a, before = threat.project(a + momentum * (z - a) + (1 - momentum) * (a - before), x, eps, attempt.norm), a


def _like(flags: Tensor, a: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (a.dim() - 1))

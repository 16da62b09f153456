"""The nearest adversarial image: DeepFool, box-constrained L-BFGS, and the pull-back that shortens any attack's result."""
from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from advcourse import losses, threat
from advcourse.attacks.attempt import ROUNDING, AttackResult, Attempt
from advcourse.attacks.iterative import check_count, like

AIM = 1.5 * ROUNDING  # who aims at the lead that counts lands on a tie, and rounding decides: aim a little further


def deepfool(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, steps: int = 50, candidates: int = 9, overshoot: float = 0.02,
             refine: int = 3, confidence: float = 0.0, generator=None) -> AttackResult:
    """Steps to the nearest linearised decision boundary until it is crossed (moosavidezfooli2016deepfool); norms inf, 2, 1.

    Each step is the closed form for a linear model in the box (`threat.nearest_beyond`) and overshoots by `overshoot` times
    the lead that y had at x, so that it ends beyond the boundary and not on it. The first step looks at the `candidates`
    most likely classes, later ones at the three then nearest. `refine` rounds of `pull_back` follow, which the paper does
    not have. Untargeted. ValueError as for `fgsm`, for norm 0, and for steps or candidates below 1.
    """
    if norm not in (inf, 2, 1):
        raise ValueError(f"norm={norm!r}: DeepFool knows inf, 2 and 1")
    check_count(steps, "steps")
    check_count(candidates, "candidates")
    attempt = Attempt(model, x, y, norm=norm, confidence=confidence, generator=generator)
    rows = attempt.started
    a, rivals = attempt.x[rows], rivals_of(attempt, rows, candidates)
    extra = torch.empty(0)
    for k in range(steps):
        if not len(rows):
            break
        logits, leads, w = attempt.class_gradients(a, rivals, rows)
        won = attempt.submit(a, logits, rows)
        rows, a, rivals, leads, w = rows[~won], a[~won], rivals[~won], leads[~won], w[:, ~won]
        extra = extra[~won] if k else -overshoot * leads.amax(1)
        gap = (attempt.needed(logits[~won], AIM) + extra)[:, None] - leads
        away = gap / dual_lengths(w, a, norm)
        if k == 0:
            nearest = away.topk(min(3, away.shape[1]), 1, largest=False).indices
            rivals, gap, away = (v.gather(1, nearest) for v in (rivals, gap, away))
            w = w[nearest.T, torch.arange(len(rows), device=w.device)]
        choice = away.argmin(1)
        w = w[choice, torch.arange(len(rows), device=w.device)]
        a = threat.nearest_beyond(w, gap.gather(1, choice[:, None])[:, 0], a, norm)
    if len(rows):
        attempt.submit(a, attempt.logits(a, rows), rows)
    pull_back(attempt, refine)
    return attempt.result()


def rivals_of(attempt: Attempt, rows: Tensor, k: int) -> Tensor:
    """The k most likely classes other than y at x itself, [m, k]."""
    clean, y = attempt.clean[rows], attempt.y[rows]
    return clean.scatter(1, y[:, None], -inf).topk(min(k, max(1, clean.shape[1] - 1)), 1).indices


def dual_length(g: Tensor, norm) -> Tensor:
    """Dual norm of each gradient, [n, *shape] -> [n]: what one unit of distance gains at most (norm 0 counts as 1)."""
    size = g.flatten(1).abs()
    return (size.sum(1) if norm == inf else size.norm(dim=1) if norm == 2 else size.amax(1)).clamp_min(1e-12)


def dual_lengths(w: Tensor, a: Tensor, norm) -> Tensor:
    """Dual norms of k gradients for every image, [k, m, *shape] -> [m, k], without what points out of the box at a."""
    return torch.stack([dual_length(threat.inward(g, a), norm) for g in w], 1)


def pull_back(attempt: Attempt, rounds: int, halvings: int = 4) -> None:
    """Bring the best points nearer to x: linearise the boundary where it was crossed and aim at it again, from x.

    The nearest point `near` beyond the linearised boundary is closer to x, but may not be adversarial; bisection between
    it and the best point then finds one that is. Norm 0 bisects the number of pixels instead. Only re-checked, nearer
    points replace a best one, so no result gets worse. An image leaves when a round brought it no nearer, or less than
    0.1 % and onto the boundary: the next round would end where this one did.
    """
    rows = ((attempt.distance > 0) & (attempt.distance < inf)).nonzero()[:, 0]
    for _ in range(rounds):
        if not len(rows):
            return
        x, best, before = attempt.x[rows], attempt.best[rows], attempt.distance[rows]
        logits, value, w = attempt.gradient(losses.margin_loss, best, rows)
        gap = attempt.needed(logits, AIM) - value + (w * (best - x)).flatten(1).sum(1)
        enough = before
        if attempt.norm == 0:
            _fewer(attempt, rows, w, gap, halvings)
        else:
            near = threat.nearest_beyond(w, gap, x, attempt.norm)
            won = attempt.submit(near, attempt.logits(near, rows), rows)
            _between(attempt, rows[~won], near[~won], best[~won], halvings)
            enough = torch.where(won, 0.999 * before, before)
        rows = rows[attempt.distance[rows] < enough]


def _between(attempt: Attempt, rows: Tensor, near: Tensor, best: Tensor, halvings: int) -> None:
    """Bisect the way from `near`, which is not adversarial, to `best`, which is."""
    low, high = torch.zeros_like(attempt.distance[rows]), torch.ones_like(attempt.distance[rows])
    for _ in range(halvings if len(rows) else 0):
        middle = (low + high) / 2
        a = torch.lerp(near, best, like(middle, best))
        won = attempt.submit(a, attempt.logits(a, rows), rows)
        low, high = torch.where(won, low, middle), torch.where(won, middle, high)


def _fewer(attempt: Attempt, rows: Tensor, w: Tensor, gap: Tensor, halvings: int) -> None:
    """Bisect the number of values changed, between too few for the linearised gap and the best point's number.

    Those that gain most go first, each to the end of the box.
    """
    high, x, corner = attempt.distance[rows], attempt.x[rows].flatten(1), (attempt.x[rows] + w.sign()).clamp(0, 1).flatten(1)
    gain, order = (w.flatten(1) * (corner - x)).topk(int(high.max()), 1)
    low, ends = (gain.cumsum(1) < gap[:, None]).sum(1).to(high), corner.gather(1, order)
    for _ in range(halvings):
        going = high - low > 1
        rows, x, order, ends, low, high = (v[going] for v in (rows, x, order, ends, low, high))
        if not len(rows):
            return
        middle = ((low + high) / 2).floor()
        first = torch.arange(order.shape[1], device=x.device) < middle[:, None]
        a = x.scatter(1, order, torch.where(first, ends, x.gather(1, order))).reshape(-1, *attempt.x.shape[1:])
        won = attempt.submit(a, attempt.logits(a, rows), rows)
        low, high = torch.where(won, low, middle), torch.where(won, middle, high)


def lbfgs(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 50, search_steps: int = 10, weight: float = 1.0,
          loss="cross_entropy", refine: int = 0, target: Tensor | None = None, confidence: float = 0.0,
          generator=None) -> AttackResult:
    """Szegedy's attack: min ||a - x||_2^2 + weight * J(a, t) over the box, by L-BFGS-B (szegedy2014intriguing, byrd1995limited).

    The smallest weight that still reaches t is searched for, image by image, on a logarithmic scale from `weight`. Without
    `target`, t is the class whose linearised boundary is nearest, and any mistake counts. Every point the solver visits is a
    candidate; the nearest adversarial one is kept. Norm 2. `steps` bounds the solver's iterations for each of the
    `search_steps` weights; `refine` adds rounds of `pull_back`. Needs SciPy. ValueError as for `fgsm`.
    """
    check_count(steps, "steps")
    check_count(search_steps, "search_steps")
    attempt = Attempt(model, x, y, norm=2, target=target, confidence=confidence, generator=generator)
    rows = attempt.started
    if not len(rows):
        return attempt.result()
    aims = attempt.label(rows) if target is not None else _nearest_class(attempt, rows)
    for row, aim in zip(rows, aims, strict=True):
        low, high, c = 0.0, inf, weight
        for _ in range(search_steps):
            reached = _penalised(attempt, row.reshape(1), aim.reshape(1), c, losses.get(loss), steps)
            low, high = (low, c) if reached else (c, high)
            c = 10 * low if high == inf else high / 10 if low == 0 else (low * high) ** 0.5
    pull_back(attempt, refine)
    return attempt.result()


def _nearest_class(attempt: Attempt, rows: Tensor) -> Tensor:
    """For every image the class whose linearised boundary with y is nearest, [m]."""
    a, rivals = attempt.x[rows], rivals_of(attempt, rows, attempt.clean.shape[1] - 1)
    _, leads, w = attempt.class_gradients(a, rivals, rows)
    return rivals.gather(1, (-leads / dual_lengths(w, a, 2)).argmin(1, keepdim=True))[:, 0]


def _penalised(attempt: Attempt, row: Tensor, aim: Tensor, weight: float, loss, steps: int) -> bool:
    """Minimise ||a - x||^2 + weight * loss(a, aim) for one image; does the minimiser win?"""
    from scipy.optimize import minimize

    x = attempt.x[row]
    start = x.flatten().double().cpu().numpy()
    towards = loss if attempt.target is not None else lambda logits, _: -loss(logits, aim)
    won = False

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal won
        a = torch.from_numpy(v).to(x).reshape(x.shape).clamp(0, 1)
        logits, value, g = attempt.gradient(towards, a, row)  # of minus the loss
        won = bool(attempt.submit(a, logits, row))
        d = v - start
        return d @ d - weight * float(value), 2 * d - weight * g.flatten().double().cpu().numpy()

    end = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * len(start),
                   options={"maxiter": steps, "ftol": 1e-4})
    objective(end.x)
    return won

"""Carlini and Wagner's attack: minimise distance + lambda * objective, with lambda found by bisection for every image.

The seven objectives f1..f7 of the paper are functions of m, the best rival's score minus the target's, so that f <= 0 where
the target wins. Two are printed wrongly in the paper: f1 has the wrong sign, f5 takes the logarithm of a negative number.
Repaired, both say "the target has more than half of the probability" in the same way; chapter 6 shows it.
"""
from functools import partial
from math import inf, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcourse import threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.fast_minimal import aims
from advcourse.attacks.iterative import check_count, like
from advcourse.attacks.minimal import pull_back
from advcourse.losses import margin


def objective(logits: Tensor, t: Tensor, number: int = 6, confidence: float = 0.0, avoid: bool = False) -> Tensor:
    """Objective f_number of carlini2017towards, [n, c], [n] -> [n]: small where class t wins, or, with `avoid`, where t loses.

    2, 3 (on probabilities) and 6, 7 (on logits) have f <= 0 exactly when t wins (ties included); 1, 4, 5 ask for a
    probability of one half, which is enough but not necessary with more than two classes. `confidence` is a logit margin and
    shifts objectives 6 and 7. With `avoid`, 1, 4 and 5 speak of the probability of not being t.
    """
    if number not in range(1, 8):
        raise ValueError(f"objective={number!r} is unknown: choose 1..7")
    if number in (1, 4, 5):
        p = F.softmax(logits, 1).gather(1, t[:, None])[:, 0]
        log_p = F.log_softmax(logits, 1)
        own = log_p.gather(1, t[:, None])[:, 0]
        if avoid:
            p, own = 1 - p, log_p.scatter(1, t[:, None], -inf).logsumexp(1)
        return (0.5 - p).clamp_min(0) if number == 4 else -own - log(2)
    scores = F.softmax(logits, 1) if number in (2, 3) else logits
    m = margin(scores, t) if avoid else -margin(scores, t)
    if number in (6, 7):
        m = m + confidence
    return m.clamp_min(0) if number in (2, 6) else F.softplus(m) - log(2)


def carlini_wagner(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, objective: int = 6, target: Tensor | None = None,
                   confidence: float = 0.0, eps=inf, search_steps: int = 4, steps: int = 40, rate: float = 0.05,
                   weight: float = 1.0, classes: int = 5, change_of_variable: bool = False, refine: int = 3,
                   generator: torch.Generator | None = None) -> AttackResult:
    """The Carlini-Wagner attack in norm 2, 0 or inf, targeted or not (carlini2017towards).

    Returns the nearest adversarial image seen. Adam on the image itself, clipped to the box, or, with `change_of_variable`, on w
    of a = (tanh w + 1) / 2 as in the paper: slow where pixels start at 0 or 1, since tanh is flat there. Without a target,
    `steps` / 2 iterations towards each of up to `classes` nearest classes come first (0: none). Then `search_steps` rounds of
    `steps` iterations; between rounds the weight lambda of an image halves its interval in log scale, and each round starts at
    the image's best point. Norm 0 freezes the pixels that matter least, norm inf charges what exceeds a threshold that shrinks.
    `refine` rounds of `pull_back` end the attack (0: as published).
    Errors as for `fgsm`; ValueError for norm 1, an unknown objective, or a confidence with objectives 1 to 5.
    """
    if norm == 1:
        raise ValueError("norm=1: this attack is defined for norms 2, 0 and inf; fmn does norm 1")
    if confidence and objective not in (6, 7):
        raise ValueError(f"confidence={confidence}: a logit margin, which only objectives 6 and 7 know, not {objective}")
    check_count(steps, "steps")
    check_count(search_steps, "search_steps")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    descend = _Descent(attempt, objective, steps, rate, change_of_variable)
    if target is None and classes:
        for rows, aim in aims(attempt, classes):
            descend(rows, attempt.x[rows], torch.full_like(attempt.distance[rows], weight), _euclidean, aim=aim)
    if norm == 2:
        _search(attempt, descend, search_steps, weight)
    elif norm == 0:
        _freeze(attempt, descend, search_steps, weight)
    else:
        _threshold(attempt, descend, search_steps, weight)
    pull_back(attempt, refine)
    return attempt.result()


class _Descent:
    """Adam on penalty(a - x) + lambda f(a), row by row: no image's path depends on its neighbours."""

    def __init__(self, attempt: Attempt, number: int, steps: int, rate: float, tanh: bool):
        objective(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), number)  # names an unknown number at once
        self.attempt, self.number, self.steps, self.rate, self.tanh = attempt, number, steps, rate, tanh

    def loss(self, logits: Tensor, label: Tensor, aim: Tensor | None = None) -> Tensor:
        """What `attempt.gradient` goes up: minus the objective; with a target it flips the sign itself."""
        if self.attempt.target is not None:
            return objective(logits, label, self.number, self.attempt.confidence)
        return -objective(logits, label if aim is None else aim, self.number, self.attempt.confidence, avoid=aim is None)

    def __call__(self, rows: Tensor, start: Tensor, weight: Tensor, slope, allowed: Tensor | None = None,
                 aim: Tensor | None = None) -> Tensor:
        """Descend from `start`, half as long where it is towards a class `aim`; who became adversarial, [m].

        `slope(delta)` is the gradient of the penalty; only the values in the mask `allowed` move.
        """
        x, c, steps = self.attempt.x[rows], like(weight, start), self.steps if aim is None else (self.steps + 1) // 2
        a, won = start, torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        w = torch.atanh((2 * a - 1) * (1 - 1e-6))
        first, second = torch.zeros_like(a), torch.zeros_like(a)
        for k in range(1, steps + 1):
            logits, _, up = self.attempt.gradient(partial(self.loss, aim=aim), a, rows)
            won |= self.attempt.submit(a, logits, rows)
            g = slope(a - x) - c * up
            if self.tanh:
                g = g * 2 * a * (1 - a)  # da/dw
            if allowed is not None:
                g = g * allowed
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            step = self.rate * (1 - 0.9 * k / steps) * first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
            if self.tanh:
                w = w - step
                a = (torch.tanh(w) + 1) / 2
            else:
                a = (a - step).clamp(0, 1)
            if allowed is not None:
                a = torch.where(allowed, a, x)
        won |= self.attempt.submit(a, self.attempt.logits(a, rows), rows)
        return won


def _euclidean(d: Tensor) -> Tensor:
    """Gradient of sum d^2."""
    return 2 * d


def _search(attempt: Attempt, descend: _Descent, rounds: int, weight: float) -> None:
    rows = attempt.started
    low, c = torch.zeros_like(attempt.distance[rows]), torch.full_like(attempt.distance[rows], weight)
    high = torch.full_like(c, inf)
    for _ in range(rounds if len(rows) else 0):
        won = descend(rows, attempt.best[rows], c, _euclidean)
        low, high = torch.where(won, low, torch.maximum(low, c)), torch.where(won, torch.minimum(high, c), high)
        c = torch.where(high == inf, c * 10, torch.where(low == 0, c / 10, (low * high).sqrt()))


def _freeze(attempt: Attempt, descend: _Descent, rounds: int, weight: float) -> None:
    rows = attempt.started
    c = torch.full_like(attempt.distance[rows], weight)
    for _ in range(rounds):  # any adversarial image at all
        lost = attempt.distance[rows] == inf
        if bool(lost.any()):
            descend(rows[lost], attempt.x[rows[lost]], c[lost], _euclidean)
        c = torch.where(attempt.distance[rows] == inf, c * 10, c)
    found = attempt.distance[rows] < inf
    rows, c, share = rows[found], c[found], torch.full_like(c[found], 0.4)
    for _ in range(4 * rounds):  # then with ever fewer pixels, those kept for which the gradient expects most
        if not len(rows):
            return
        x, best, before = attempt.x[rows], attempt.best[rows], attempt.distance[rows]
        _, _, up = attempt.gradient(descend.loss, best, rows)
        worth = torch.where(best != x, (up * (best - x)).abs() + 1e-12, -1.0).flatten(1)
        drop = (before * share).ceil().clamp_min(1)
        keep = threat.largest(worth, (before - drop)[:, None]).reshape(x.shape)
        descend(rows, torch.where(keep, best, x), 100 * c, _euclidean, keep)
        better = attempt.distance[rows] < before
        going = better | (drop > 1)
        rows, c, share = rows[going], c[going], torch.where(better, share, share / 2)[going]


def _excess(d: Tensor, limit: Tensor) -> Tensor:
    """Gradient of sum (|d| - limit)+."""
    return d.sign() * (d.abs() > limit)


def _threshold(attempt: Attempt, descend: _Descent, rounds: int, weight: float) -> None:
    rows = attempt.started
    c = torch.full_like(attempt.distance[rows], weight)
    tau = torch.full_like(c, 0.3)
    for _ in range(3 * rounds if len(rows) else 0):
        before, limit = attempt.distance[rows], like(tau, attempt.x)
        descend(rows, attempt.best[rows], c, partial(_excess, limit=limit))
        now = attempt.distance[rows]
        tau = torch.where(now < before, torch.minimum(tau, now) * 0.9, tau)
        c = torch.where(now < before, c, c * 4)

"""Few pixels, changed a lot: the Jacobian saliency map attack and the one-pixel attack by differential evolution."""
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt, evaluating
from advcourse.attacks.minimal import pull_back
from advcourse.losses import margin


def _slopes(attempt: Attempt, a: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, gradient of the logit of t, gradient of the sum of the others), from one forward and two backward passes."""
    attempt._count(3, rows)
    with evaluating(attempt.model), torch.enable_grad():
        at = a.detach().requires_grad_()
        s = attempt.model(at)
        own, = torch.autograd.grad(s.gather(1, t[:, None]).sum(), at, retain_graph=True)
        every, = torch.autograd.grad(s.sum(), at)
    return s.detach(), torch.nan_to_num(own.flatten(1)), torch.nan_to_num((every - own).flatten(1))


def saliency_pair(own: Tensor, others: Tensor, a: Tensor, candidates: int = 24) -> tuple[Tensor, Tensor]:
    """The pair of pixels of largest saliency and where each goes, 0 or 1: indices [m, 2], values [m, 2].

    A pair scores -(gain of the target) * (gain of the others) where the first is positive and the second negative
    (papernot2016limitations), each gain being slope times room. Where no pair qualifies the target's gain less the others'
    decides alone. Pairs are searched among the `candidates` pixels that are best by that difference.
    """
    up = own - others > 0  # the direction in which this pixel helps
    room = torch.where(up, 1 - a, -a)
    gain, loss = own * room, others * room
    k = min(candidates, a.shape[1])
    top = (gain - loss).topk(k, 1).indices
    g, l = gain.gather(1, top), loss.gather(1, top)
    g, l = g[:, :, None] + g[:, None, :], l[:, :, None] + l[:, None, :]
    single = torch.eye(k, dtype=torch.bool, device=a.device)
    score = torch.where((g > 0) & (l < 0), -g * l, -inf).masked_fill(single, -inf).flatten(1)
    fallback = (g - l).masked_fill(single, -inf).flatten(1)
    best = torch.where(score.amax(1) > -inf, score.argmax(1), fallback.argmax(1))
    pair = top.gather(1, torch.stack([best // k, best % k], 1))
    return pair, up.gather(1, pair).to(a.dtype)


def jsma(model: nn.Module, x: Tensor, y: Tensor, *, eps=inf, norm=0, target: Tensor | None = None, steps: int = 100,
         confidence: float = 0.0, refine: int = 3, generator: torch.Generator | None = None) -> AttackResult:
    """Jacobian saliency map attack: two pixels a step, sent to black or white (papernot2016limitations).

    Without `target` it aims at the runner-up class of the image, and any mistake counts. `eps` caps the number of values changed;
    `refine` rounds of `pull_back` end the attack (0: as published). An upper bound on the smallest number of values. Errors
    as for `fgsm`; ValueError for a norm other than 0.
    """
    if norm != 0:
        raise ValueError(f"norm={norm!r}: jsma counts changed values, its norm is 0")
    attempt = Attempt(model, x, y, norm=0, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.open
    if target is None:
        goal = attempt.clean.scatter(1, y[:, None], -inf).argmax(1)
    else:
        goal = target
    a = attempt.x[rows]
    for _ in range(steps):
        if not len(rows):
            break
        logits, own, others = _slopes(attempt, a, rows, goal[rows])
        won = attempt.submit(a, logits, rows)
        going = ~won & (threat.distance(a, attempt.x[rows], 0) + 1 < attempt.eps[rows])
        rows, a, own, others = rows[going], a[going], own[going], others[going]
        if len(rows):
            pair, value = saliency_pair(own, others, a.flatten(1))
            a = a.flatten(1).scatter(1, pair, value).reshape(a.shape)
    if len(rows):
        attempt.submit(a, attempt.logits(a, rows), rows)
    pull_back(attempt, refine)
    return attempt.result()


def one_pixel(model: nn.Module, x: Tensor, y: Tensor, *, eps: int = 1, norm=0, target: Tensor | None = None,
              generations: int = 20, population: int = 40, generator: torch.Generator | None = None) -> AttackResult:
    """Change `eps` pixels, found by differential evolution from the model's outputs alone (su2019one; storn1997differential).

    Black box: only logits are asked for, no gradient. A candidate is eps times (row, column, value for every channel); SciPy's
    differential evolution raises the margin loss and stops at the first success. Images are [n, channels, h, w] or
    [n, p]. With several channels a pixel counts once in `eps`, its values all count in `distance`. Errors as for `fgsm`.
    """
    if norm != 0 or eps != int(eps):
        raise ValueError(f"norm={norm!r}, eps={eps!r}: one_pixel changes a whole number of pixels, norm 0")
    channels = x.shape[1] if x.dim() == 4 else 1
    attempt = Attempt(model, x, y, norm=0, eps=eps * channels, target=target, generator=generator)
    for i in attempt.open.tolist() if eps else []:
        _evolve(attempt, i, int(eps), channels, generations, population)
    return attempt.result()


def _evolve(attempt: Attempt, i: int, pixels: int, channels: int, generations: int, population: int) -> None:
    from scipy.optimize import differential_evolution

    x = attempt.x[i]
    planes = x.reshape(channels, -1)
    width = x.shape[-1] if x.dim() == 3 else planes.shape[1]
    height = planes.shape[1] // width
    row = torch.tensor([i], device=x.device)
    label = attempt.label(row)
    sign = 1.0 if attempt.target is None else -1.0

    def paint(genes: Tensor) -> Tensor:  # [population, pixels, 2 + channels] -> images
        r, c = (genes[..., 0] * height).long().clamp(0, height - 1), (genes[..., 1] * width).long().clamp(0, width - 1)
        a = planes.expand(len(genes), -1, -1).clone()
        where = (r * width + c)[:, None, :].expand(-1, channels, -1)
        return a.scatter(2, where, genes[..., 2:].permute(0, 2, 1)).reshape(len(genes), *x.shape)

    def cost(columns):  # SciPy hands one candidate a column
        genes = torch.as_tensor(columns.T.copy(), dtype=x.dtype, device=x.device).reshape(-1, pixels, 2 + channels)
        a = paint(genes)
        logits = attempt.logits(a, row.expand(len(a)))
        attempt.queries[i] += len(a) - 1  # an index put counts a repeated row once
        for j in attempt.wins(logits, row.expand(len(a))).nonzero()[:1, 0].tolist():
            attempt.submit(a[j:j + 1], logits[j:j + 1], row)
        return sign * margin(logits, label.expand(len(a))).double().cpu().numpy()

    differential_evolution(cost, [(0, 1)] * (pixels * (2 + channels)), maxiter=generations, popsize=1, init=_start(
        attempt, i, population, pixels * (2 + channels)), vectorized=True, updating="deferred", polish=False, tol=0,
        mutation=0.5, recombination=1.0, rng=int(attempt.seeds[i]) % 2**32,
        callback=lambda intermediate_result: bool(attempt.distance[i] < inf))


def _start(attempt: Attempt, i: int, population: int, genes: int):
    return noise.uniform(attempt.seeds[i:i + 1], population * genes, dtype=torch.float64).reshape(population, genes).cpu().numpy()

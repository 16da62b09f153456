"""Few pixels, changed a lot: the Jacobian saliency map attack and the one-pixel attack by differential evolution."""
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt, evaluating, finite
from advcourse.attacks.iterative import check_count
from advcourse.attacks.minimal import pull_back
from advcourse.losses import margin


def _slopes(attempt: Attempt, a: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, gradient of the logit of t, gradient of the sum of the others), [m, c], [m, p], [m, p]: three queries."""
    attempt.count(3, rows)
    with evaluating(attempt.model), torch.enable_grad():
        at = a.detach().requires_grad_()
        s = attempt.model(at)
        own, = torch.autograd.grad(s.gather(1, t[:, None]).sum(), at, retain_graph=True)
        every, = torch.autograd.grad(s.sum(), at)
    return s.detach(), finite(own.flatten(1)), finite((every - own).flatten(1))


def saliency_pair(own: Tensor, others: Tensor, a: Tensor, free: Tensor | None = None,
                  candidates: int = 8) -> tuple[Tensor, Tensor]:
    """The pair of pixels of largest saliency and where each goes, 0 or 1: indices [m, 2], values [m, 2].

    `own` and `others` [m, p] are the slopes of the target's logit and of the sum of the others at a [m, p]. A pixel's gain is
    slope times room; a pair scores -(gain of the target) * (gain of the others) where the first is positive and the second
    negative (papernot2016limitations). Where no pair qualifies the target's gain decides alone: the sum of the others says
    little about the one that is ahead. Pairs are searched among the `candidates` pixels, `free` [m, p] ones only, of
    largest gain: measured on digits, the fewer there are to choose from, the fewer pixels the attack needs.
    """
    end = (own > 0).to(a.dtype)  # where this pixel helps
    worth = own * (end - a)
    if free is not None:
        worth = worth.masked_fill(~free, -inf)
    k = min(candidates, a.shape[1])
    gain, top = worth.topk(k, 1)
    fall = others.gather(1, top) * (end - a).gather(1, top)
    gain, fall = (v[:, :, None] + v[:, None, :] for v in (gain, fall))  # of every pair
    fit = (gain > 0) & (fall < 0)
    fit.diagonal(dim1=1, dim2=2).zero_()
    score, best = torch.where(fit, -gain * fall, -inf).flatten(1).max(1)
    first, second = torch.where(score > -inf, best // k, 0), torch.where(score > -inf, best % k, 1)  # else the largest gains
    pair = top.gather(1, torch.stack([first, second], 1))
    return pair, end.gather(1, pair)


def jsma(model: nn.Module, x: Tensor, y: Tensor, *, eps=inf, norm=0, target: Tensor | None = None, steps: int = 100,
         confidence: float = 0.0, refine: int = 3, generator: torch.Generator | None = None) -> AttackResult:
    """Jacobian saliency map attack: two pixels a step, sent to black or white, each once (papernot2016limitations).

    Without `target` it aims at the runner-up class of the image, and any mistake counts. `eps` caps the number of values
    changed; `refine` rounds of `pull_back` end the attack (0: as published). An upper bound on the smallest number of values.
    Errors as for `fgsm`; ValueError for a norm other than 0 and for steps below 1.
    """
    if norm != 0:
        raise ValueError(f"norm={norm!r}: jsma counts changed values, its norm is 0")
    check_count(steps, "steps")
    attempt = Attempt(model, x, y, norm=0, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.open
    goal = attempt.clean.scatter(1, y[:, None], -inf).argmax(1) if target is None else target
    a, free = attempt.x[rows], torch.ones_like(attempt.x[rows].flatten(1), dtype=torch.bool)
    for k in range(steps):
        if not len(rows):
            break
        logits, own, others = _slopes(attempt, a, rows, goal[rows])
        won = attempt.submit(a, logits, rows)
        going = (~won & (2 * k + 2 <= attempt.eps[rows].clamp_max(free.shape[1]))).nonzero()[:, 0]
        if len(going) < len(rows):
            rows, a, free, own, others = (v[going] for v in (rows, a, free, own, others))
        if len(rows):
            pair, value = saliency_pair(own, others, a.flatten(1), free)
            a, free = a.flatten(1).scatter(1, pair, value).reshape(a.shape), free.scatter(1, pair, False)
    if len(rows):
        attempt.submit(a, attempt.logits(a, rows), rows)
    pull_back(attempt, refine)
    return attempt.result()


def one_pixel(model: nn.Module, x: Tensor, y: Tensor, *, eps: int = 1, norm=0, target: Tensor | None = None,
              generations: int = 20, population: int = 40, generator: torch.Generator | None = None) -> AttackResult:
    """Change `eps` pixels, found by differential evolution from the model's outputs alone (su2019one; storn1997differential).

    Black box: only logits are asked for, no gradient, population * (generations + 1) times at most. A candidate is eps times
    (row, column, a value for every channel); SciPy's differential evolution raises the margin loss and stops at the first
    success. Images are [n, channels, h, w], anything else is one long row. With several channels a pixel counts once in
    `eps`, its values all count in `distance`. Errors as for `fgsm`; ValueError for another norm or an eps that is not whole.
    """
    if norm != 0:
        raise ValueError(f"norm={norm!r}: one_pixel counts changed values, its norm is 0")
    threat.check_eps(eps)
    if torch.as_tensor(eps).dim() or float(eps) % 1:
        raise ValueError(f"eps of shape {list(torch.as_tensor(eps).shape)}, eps={eps!r}: a whole number of pixels is needed")
    check_count(generations, "generations")
    check_count(population - 4, "population - 4")  # SciPy's least is five
    channels = x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else 1
    attempt = Attempt(model, x, y, norm=0, eps=int(eps) * channels, target=target, generator=generator)
    seeds = attempt.seeds  # drawn for every image, attacked or not
    for row in attempt.open[:, None] if eps else []:
        _evolve(attempt, row, int(seeds[row]), int(eps), channels, generations, population)
    return attempt.result()


def _paint(x: Tensor, genes: Tensor) -> Tensor:
    """x [channels, h, w] with k pixels repainted, (row, column, values) in [0, 1]: [m, k, 2 + channels] -> m images."""
    channels, h, w = x.shape
    row, column = ((genes[..., i] * size).long().clamp(0, size - 1) for i, size in ((0, h), (1, w)))
    place = (row * w + column)[:, None, :].expand(-1, channels, -1)
    return x.flatten(1).expand(len(genes), -1, -1).scatter(2, place, genes[..., 2:].transpose(1, 2)).reshape(-1, channels, h, w)


def _evolve(attempt: Attempt, row: Tensor, seed: int, pixels: int, channels: int, generations: int, population: int) -> None:
    from scipy.optimize import differential_evolution

    x = attempt.x[row]
    planes = x[0] if x.dim() == 4 else x.reshape(1, 1, -1)
    sign = 1.0 if attempt.target is None else -1.0
    genes = pixels * (2 + channels)

    def cost(columns):  # SciPy hands one candidate a column
        drawn = torch.as_tensor(columns.T.copy(), dtype=x.dtype, device=x.device).reshape(-1, pixels, 2 + channels)
        a = _paint(planes, drawn).reshape(-1, *x.shape[1:])
        rows = row.expand(len(a))
        logits = attempt.logits(a, rows)
        won = attempt.wins(logits, rows)
        if bool(won.any()):
            nearest = torch.where(won, threat.distance(a, x, 0), inf).argmin().reshape(1)
            attempt.submit(a[nearest], logits[nearest], row)
        return torch.nan_to_num(sign * margin(logits, attempt.label(rows)), nan=inf).double().cpu().numpy()

    start = noise.uniform(torch.tensor([seed]), population * genes, dtype=torch.float64).reshape(population, genes).numpy()
    differential_evolution(
        cost, [(0, 1)] * genes, init=start, maxiter=generations, vectorized=True, updating="deferred",
        polish=False, tol=0, mutation=0.5, recombination=1.0, rng=seed % 2**32,
        callback=lambda intermediate_result: bool(attempt.distance[row] < inf))

"""Attacks that only ask questions: Square, which sees the scores, and HopSkipJump, which sees the decision alone."""
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.losses import margin_loss

HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of the budget at which the square's area halves


def _raised(attempt: Attempt, logits: Tensor, rows: Tensor) -> Tensor:
    """The margin loss, signed so that larger serves the attack; NaN counts as worst."""
    value = margin_loss(logits, attempt.label(rows))
    return torch.nan_to_num(value if attempt.target is None else -value, nan=-inf)


def _as_planes(x: Tensor) -> Tensor:
    """[n, *shape] -> [n, channels, h, w]: an image keeps its rows and columns, anything else is one long row."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, 1, -1)


def _window(u_row: Tensor, u_column: Tensor, side: int, h: int, w: int) -> Tensor:
    """Masks [m, 1, h, w] of side x side windows whose corners are drawn by the uniform numbers [m]."""
    tall, wide = min(side, h), min(side, w)
    top, left = (u_row * (h - tall + 1)).long()[:, None], (u_column * (w - wide + 1)).long()[:, None]
    r, c = torch.arange(h, device=u_row.device), torch.arange(w, device=u_row.device)
    inside_r, inside_c = (r >= top) & (r < top + tall), (c >= left) & (c < left + wide)
    return (inside_r[:, :, None] & inside_c[:, None, :])[:, None]


def square(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, queries: int = 1000, share: float = 0.3,
           target: Tensor | None = None, confidence: float = 0.0, generator: torch.Generator | None = None) -> AttackResult:
    """Square attack: repaint a random square, keep it if the margin falls (andriushchenko2020square), norms inf and 2.

    Black box: `queries` evaluations of the logits, no gradient. `share` is the first square's share of the image; it halves
    on the paper's schedule, rescaled to the budget. Norm inf paints +-eps; norm 2 empties one window and spends its length in
    another. Fixed radius: a success has distance <= eps. Errors as for `fgsm`; ValueError for other norms.
    """
    if norm not in (inf, 2):
        raise ValueError(f"norm={norm!r}: square knows norms inf and 2")
    if queries < 0:
        raise ValueError(f"queries={queries} is negative")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    rows = attempt.open
    if not len(rows) or queries < 1:
        return attempt.result()
    paint = _paint_inf if norm == inf else _paint_2
    a = _stripes(attempt, rows)
    value = torch.full((len(rows),), -inf, dtype=a.dtype, device=a.device)
    candidate = a
    for k in range(queries):
        logits = attempt.logits(candidate, rows)
        won = attempt.submit(candidate, logits, rows)
        now = _raised(attempt, logits, rows)
        better = now > value
        a, value = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), candidate, a), torch.where(better, now, value)
        if bool(won.any()):
            rows, a, value = rows[~won], a[~won], value[~won]
            if not len(rows):
                break
        area = share * 0.5 ** sum(k >= h * queries for h in HALVINGS)
        candidate = paint(attempt, a, rows, area, k)
    return attempt.result()


def _stripes(attempt: Attempt, rows: Tensor) -> Tensor:
    """The first guess: columns of +-1, as far as the ball allows."""
    x = _as_planes(attempt.x[rows])
    sign = (noise.uniform(attempt.seeds[rows], x.shape[1] * x.shape[3], dtype=x.dtype) < 0.5).to(x.dtype) * 2 - 1
    sign = sign.reshape(len(rows), x.shape[1], 1, x.shape[3]).expand_as(x).reshape(attempt.x[rows].shape)
    return threat.linear_maximiser(sign, attempt.x[rows], attempt.eps[rows], attempt.norm)


def _paint_inf(attempt: Attempt, a: Tensor, rows: Tensor, area: float, k: int) -> Tensor:
    x, now = _as_planes(attempt.x[rows]), _as_planes(a)
    h, w, channels = x.shape[2], x.shape[3], x.shape[1]
    u = noise.uniform(attempt.seeds[rows], 2 + channels, step=k + 1, dtype=a.dtype)
    mask = _window(u[:, 0], u[:, 1], max(1, round((area * h * w) ** 0.5)) if h > 1 else max(1, round(area * w)), h, w)
    sign = (u[:, 2:] < 0.5).to(a.dtype)[:, :, None, None] * 2 - 1
    painted = (x + sign * attempt.eps[rows].reshape(-1, 1, 1, 1)).clamp(0, 1)
    return torch.where(mask, painted, now).reshape(a.shape)


def _paint_2(attempt: Attempt, a: Tensor, rows: Tensor, area: float, k: int) -> Tensor:
    x, now = _as_planes(attempt.x[rows]), _as_planes(a)
    h, w, channels = x.shape[2], x.shape[3], x.shape[1]
    u = noise.uniform(attempt.seeds[rows], 4 + channels, step=k + 1, dtype=a.dtype)
    side = max(1, round((area * h * w) ** 0.5)) if h > 1 else max(1, round(area * w))
    there, emptied = _window(u[:, 0], u[:, 1], side, h, w), _window(u[:, 2], u[:, 3], side, h, w)
    delta = torch.where(emptied & ~there, 0, now - x)
    sign = (u[:, 4:] < 0.5).to(a.dtype)[:, :, None, None] * 2 - 1
    old = torch.where(there, delta, 0).flatten(1)
    fresh = (there * sign).flatten(1)
    mixed = old / old.norm(dim=1, keepdim=True).clamp_min(1e-12) + fresh / fresh.norm(dim=1, keepdim=True)
    rest = torch.where(there, 0, delta).flatten(1)
    budget = (attempt.eps[rows][:, None] ** 2 - (rest**2).sum(1, keepdim=True)).clamp_min(0).sqrt()
    delta = rest + mixed / mixed.norm(dim=1, keepdim=True).clamp_min(1e-12) * budget
    return threat.project(attempt.x[rows] + delta.reshape(a.shape), attempt.x[rows], attempt.eps[rows], 2)


def hop_skip_jump(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, eps=inf, queries: int = 2000, start: Tensor | None = None,
                  target: Tensor | None = None, first: int = 50, generator: torch.Generator | None = None) -> AttackResult:
    """HopSkipJump: the boundary's normal is estimated from yes/no answers (chen2020hopskipjumpattack), norms 2 and inf.

    Black box, decision only: at most `queries` evaluations an image. Starts at `start`, images that are adversarial (needed
    when there is a target), or at the first random image that is; an image for which none is found fails, the others go on.
    Each round draws about `first` * sqrt(round) directions. Returns the nearest adversarial image seen. Errors as for
    `fgsm`; ValueError for other norms, or a target without `start`.
    """
    if norm not in (inf, 2):
        raise ValueError(f"norm={norm!r}: hop_skip_jump knows norms 2 and inf")
    if target is not None and start is None:
        raise ValueError("start=None: a targeted decision-based attack needs images of the target class to start from")
    if queries < 0:
        raise ValueError(f"queries={queries} is negative")
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=generator)
    attempt.eps, cap = torch.full_like(attempt.eps, inf), attempt.eps  # far points are steps on the way
    if queries < 1:
        return attempt.result()
    _first_hit(attempt, start, queries)
    for i in (attempt.distance[attempt.started] < inf).nonzero()[:, 0]:
        _follow_boundary(attempt, attempt.started[i:i + 1], queries, first)
    attempt.eps = cap
    return attempt.result()


def _first_hit(attempt: Attempt, start: Tensor | None, queries: int) -> None:
    if start is not None:
        threat.check_images(start, "start")
        if start.shape != attempt.x.shape:
            raise ValueError(f"start has shape {list(start.shape)}, not that of x, {list(attempt.x.shape)}")
        rows = attempt.started
        attempt.submit(start[rows], attempt.logits(start[rows], rows), rows)
        return
    for k in range(min(50, queries)):
        rows = attempt.open
        if not len(rows):
            return
        u = noise.uniform(attempt.seeds[rows], attempt.x[0].numel(), step=k, dtype=attempt.x.dtype)
        a = u.reshape(attempt.x[rows].shape)
        attempt.submit(a, attempt.logits(a, rows), rows)


def _follow_boundary(attempt: Attempt, row: Tensor, queries: int, first: int) -> None:
    x, p, i = attempt.x[row], attempt.x[0].numel(), int(row)

    def ask(points: Tensor) -> Tensor:
        logits = attempt.logits(points, row.expand(len(points)))
        attempt.queries[i] += len(points) - 1  # an index put counts a repeated row once
        won = attempt.wins(logits, row.expand(len(points)))
        if bool(won.any()):
            d = torch.where(won, threat.distance(points, x, attempt.norm), inf)
            j = int(d.argmin())
            attempt.submit(points[j:j + 1], logits[j:j + 1], row)
        return won

    def to_boundary(a: Tensor) -> Tensor:
        """Halve the way between x and a; all candidates of one halving in one question of four points."""
        low, high, far = 0.0, 1.0, threat.distance(a, x, attempt.norm)
        while high - low > 1e-3 * (1 if attempt.norm == 2 else 2 / p**0.5) * max(high, 0.01) and attempt.queries[i] < queries:
            ts = [low + (high - low) * q / 4 for q in (1, 2, 3)]
            points = torch.cat([x + t * (a - x) if attempt.norm == 2 else threat.project(a, x, t * far, inf) for t in ts])
            won = ask(points).tolist()
            hit = next((j for j, w in enumerate(won) if w), 3)
            low, high = ts[hit - 1] if hit else low, ts[hit] if hit < 3 else high
        return x + high * (a - x) if attempt.norm == 2 else threat.project(a, x, high * far, inf)

    a, k = to_boundary(attempt.best[row]), 0
    while attempt.queries[i] + 10 < queries:
        k += 1
        reach = threat.distance(a, x, attempt.norm)
        radius = reach / p**0.5 if attempt.norm == 2 else reach / p**0.5
        count = min(int(first * k**0.5), queries - int(attempt.queries[i]))
        u = noise.normal(attempt.seeds[row], count * p, step=1000 + k, dtype=x.dtype).reshape(count, *x.shape[1:])
        u = u / u.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
        points = (a + radius * u).clamp(0, 1)
        vote = ask(points).to(x.dtype) * 2 - 1
        if vote.abs().sum() != vote.sum().abs():
            vote = vote - vote.mean()
        normal = ((points - a) / radius * vote.reshape(-1, *[1] * (x.dim() - 1))).mean(0, keepdim=True)
        length = reach / k**0.5
        for _ in range(12):  # the longest of these steps that is still adversarial
            if attempt.queries[i] >= queries:
                return
            b = (a + length * threat.steepest(normal, attempt.norm, a)).clamp(0, 1)
            if bool(ask(b)[0]):
                a = to_boundary(b)
                break
            length = length / 2

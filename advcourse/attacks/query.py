"""Attacks that only ask questions: Square, which sees the scores, and HopSkipJump, which sees the decision alone."""
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.losses import margin_loss


def _check_queries(queries: int) -> None:
    if queries < 0:
        raise ValueError(f"queries={queries!r} is negative")


def _column(v: Tensor, like: Tensor) -> Tensor:
    """[n] -> [n, 1, ...], to multiply a batch of the same number of dimensions."""
    return v.reshape(-1, *[1] * (like.dim() - 1))


def square(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, queries: int = 1000, share: float = 0.3,
           target: Tensor | None = None, confidence: float = 0.0, generator: torch.Generator | None = None) -> AttackResult:
    """Square attack: repaint a random square, keep it if the margin falls (andriushchenko2020square), norms inf and 2.

    Black box: `queries` evaluations of the logits beside the look at x, no gradient. `share` is the first square's share of
    the image; it halves eight times over the budget, later than in the paper, which on digits breaks more. Norm inf
    paints +-eps; norm 2 empties one window and spends its length in another, and, unlike the paper, refills what the box
    cuts off. Fixed radius: a success has distance <= eps. Errors as for `fgsm`; ValueError for other norms or a negative
    number of queries.
    """
    if norm not in (inf, 2):
        raise ValueError(f"norm={norm!r}: square knows norms inf and 2")
    _check_queries(queries)
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    rows, x = attempt.open, attempt.x
    guess = _stripes(attempt.seeds[rows], _as_planes(x[rows]))
    highest = torch.full((len(rows),), -inf, dtype=x.dtype, device=x.device)
    for k in range(queries):
        if not len(rows):
            break
        area = share * 0.5 ** (8 * (k / queries) ** 0.7)
        proposal = _repaint(guess, attempt.seeds[rows], area, k, norm) if k else guess
        a = threat.linear_maximiser(proposal.reshape(-1, *x.shape[1:]), x[rows], attempt.eps[rows], norm)
        logits = attempt.logits(a, rows)
        won = attempt.submit(a, logits, rows)
        value = margin_loss(logits, attempt.label(rows)) * (1 if target is None else -1)
        keep = value > highest  # never for NaN
        guess, highest = torch.where(_column(keep, guess), proposal, guess), torch.where(keep, value, highest)
        rows, guess, highest = rows[~won], guess[~won], highest[~won]
    return attempt.result()


def _as_planes(x: Tensor) -> Tensor:
    """[n, *shape] -> [n, channels, h, w]: an image keeps its rows and columns, anything else is one long row."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, 1, -1)


def _stripes(seeds: Tensor, x: Tensor) -> Tensor:
    """The first guess, the shape of x: columns of +-1."""
    sign = (noise.uniform(seeds, x.shape[1] * x.shape[3], dtype=x.dtype) < 0.5).to(x.dtype) * 2 - 1
    return sign.reshape(len(x), x.shape[1], 1, x.shape[3]).expand_as(x)


def _window(corner: Tensor, side: int, h: int, w: int) -> Tensor:
    """Masks [m, 1, h, w] of side x side windows whose corners are drawn by the uniform numbers [m, 2]."""
    tall, wide = min(side, h), min(side, w)
    top, left = (corner[:, :1] * (h - tall + 1)).long(), (corner[:, 1:] * (w - wide + 1)).long()
    r, c = torch.arange(h, device=corner.device), torch.arange(w, device=corner.device)
    inside_r, inside_c = (r >= top) & (r < top + tall), (c >= left) & (c < left + wide)
    return (inside_r[:, :, None] & inside_c[:, None, :])[:, None]


def _repaint(guess: Tensor, seeds: Tensor, area: float, k: int, norm) -> Tensor:
    """The guess [m, channels, h, w] with a random window in new colours, one sign a channel."""
    channels, h, w = guess.shape[1:]
    side = max(1, round((area * h * w) ** 0.5 if h > 1 else area * w))
    u = noise.uniform(seeds, 4 + channels, step=k, dtype=guess.dtype)
    here, sign = _window(u[:, :2], side, h, w), _column(u[:, 4:].flatten() < 0.5, guess.flatten(0, 1)[:, None, :])
    sign = (sign.to(guess.dtype) * 2 - 1).reshape(-1, channels, 1, 1)
    if norm == inf:
        return torch.where(here, sign, guess)
    touched = here | _window(u[:, 2:4], side, h, w)  # both windows are emptied, one is filled with their length
    length = (guess * touched).flatten(1).norm(dim=1)
    mixed = _unit(guess * here) + _unit(here * sign)
    return torch.where(touched, 0, guess) + _column(length, guess) * _unit(mixed)


def _unit(v: Tensor) -> Tensor:
    return v / _column(v.flatten(1).norm(dim=1).clamp_min(1e-12), v)


def hop_skip_jump(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, eps=inf, queries: int = 2000, start: Tensor | None = None,
                  target: Tensor | None = None, first: int = 100, generator: torch.Generator | None = None) -> AttackResult:
    """HopSkipJump: the boundary's normal is estimated from yes/no answers (chen2020hopskipjumpattack), norms 2 and inf.

    Black box, decision only: at most `queries` evaluations an image beside the look at x. Starts at `start`, images that
    are adversarial (needed when there is a target), or at the nearest of five random adversarial images; an image for which
    none is found fails, the others go on. Round k draws about `first` * sqrt(k) directions. Returns the nearest adversarial
    image seen, if it lies within eps. Errors as for `fgsm`; ValueError for other norms, a negative number of queries, or a
    target without `start`.
    """
    if norm not in (inf, 2):
        raise ValueError(f"norm={norm!r}: hop_skip_jump knows norms 2 and inf")
    _check_queries(queries)
    if start is not None:
        threat.check_images(start, "start")
        if start.shape != x.shape:
            raise ValueError(f"start has shape {list(start.shape)}, not that of x, {list(x.shape)}")
    attempt = Attempt(model, x, y, norm=norm, target=target, generator=generator)
    seeds, rows = attempt.seeds, attempt.open  # seeds are drawn for every image, attacked or not
    if target is not None and start is None:
        raise ValueError("start=None: a targeted decision-based attack needs images of the target class to start from")
    threat.check_eps(eps)
    reach = torch.as_tensor(eps, dtype=attempt.x.dtype, device=x.device)
    if reach.shape not in ((), (len(x),)):
        raise ValueError(f"eps of shape {list(reach.shape)} is neither a number nor one number an image")
    for row in rows[:, None]:
        given = None if start is None else start[row].to(attempt.x)
        _Walk(attempt, row, queries, int(seeds[row])).run(given, first)
    attempt.eps = reach.expand(len(x))  # farther points were steps on the way
    return attempt.result()


class _OutOfQueries(Exception):
    pass


class _Walk:
    """HopSkipJump on one image: along the boundary, nearer and nearer to x."""

    def __init__(self, attempt: Attempt, row: Tensor, queries: int, seed: int):
        self.attempt, self.row, self.x = attempt, row, attempt.x[row]
        self.norm, self.left = attempt.norm, queries
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, n: int, sampler) -> Tensor:
        return sampler(n, *self.x.shape[1:], generator=self.random).to(self.x)

    def ask(self, points: Tensor) -> Tensor:
        """Which of the points [m, *shape] are adversarial, [m] bool; the nearest one is kept. _OutOfQueries when too many."""
        if len(points) > self.left:
            raise _OutOfQueries
        self.left -= len(points)
        rows = self.row.expand(len(points))
        logits = self.attempt.logits(points, rows)
        won = self.attempt.wins(logits, rows)
        if bool(won.any()):
            nearest = torch.where(won, threat.distance(points, self.x, self.norm), inf).argmin().reshape(1)
            self.attempt.submit(points[nearest], logits[nearest], self.row)
        return won

    def between(self, a: Tensor, t: float) -> Tensor:
        """The point at share t of the way from x to a: on the segment, or a cut to a share of its l-infinity distance."""
        if self.norm == 2:
            return torch.lerp(self.x, a, t)
        return threat.project(a, self.x, t * threat.distance(a, self.x, inf), inf)

    def to_boundary(self, a: Tensor, step: float, precision: float = 2e-4) -> Tensor:
        """The adversarial point nearest to the boundary on the way from a to x: growing steps, then bisection."""
        low, high = 0.0, 1.0
        while high - step > low:
            if bool(self.ask(self.between(a, high - step))):
                high, step = high - step, 2 * step
            else:
                low = high - step
        while high - low > precision * high and high > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if bool(self.ask(self.between(a, middle))) else (middle, high)
        return self.between(a, high)

    def begin(self, start: Tensor | None) -> Tensor | None:
        """A point on the boundary, or None where no adversarial image turns up."""
        starts = self.draw(50, torch.rand) if start is None else start
        found: list[Tensor] = []
        for a in starts.split(1):
            if len(found) < 5 and bool(self.ask(a)):
                found.append(self.to_boundary(a, 0.5))
        return min(found, key=lambda a: float(threat.distance(a, self.x, self.norm)), default=None)

    def normal(self, a: Tensor, count: int) -> Tensor:
        """The boundary's normal at a, up to length: the directions that are adversarial less those that are not."""
        u = self.draw(count, torch.randn)
        radius = threat.distance(a, self.x, 2) / self.x.numel() ** 0.5
        points = (a + radius * _unit(u)).clamp(0, 1)
        vote = self.ask(points).to(a) * 2 - 1
        if vote.min() != vote.max():
            vote = vote - vote.mean()
        return ((points - a) * _column(vote, a)).mean(0, keepdim=True)

    def run(self, start: Tensor | None, first: int) -> None:
        """Boundary, normal, step, and again until the queries are spent."""
        try:
            a, k = self.begin(start), 0
            while a is not None:
                k += 1
                count = min(int(first * k**0.5), max(1, self.left // 2))
                direction = threat.steepest(self.normal(a, count), self.norm, a)
                length = threat.distance(a, self.x, self.norm) / k**0.5
                for _ in range(15):  # the longest of these steps that is still adversarial
                    b = (a + length * direction).clamp(0, 1)
                    if bool(self.ask(b)):
                        a = self.to_boundary(b, 0.02)
                        break
                    length = length / 2
        except _OutOfQueries:
            pass

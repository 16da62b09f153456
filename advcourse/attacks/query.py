"""Attacks that only ask questions: Square, which sees the scores, and HopSkipJump, which sees the decision alone."""
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.losses import margin_loss

PASS = 512  # images a forward pass: more at once are slower, they leave the processor's cache
BOUNDARY, CENTRE, STEPS = 12, 8, 6  # HopSkipJump's questions a round, beside the directions


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
                  target: Tensor | None = None, first: int = 200, generator: torch.Generator | None = None) -> AttackResult:
    """HopSkipJump: the boundary's normal is estimated from yes/no answers (chen2020hopskipjumpattack), norms 2 and inf.

    Black box, decision only: at most `queries` evaluations an image beside the look at x. Starts at `start`, images that
    are adversarial (needed when there is a target), or at the first of 50 random images that is; an image for which none is
    found fails, the others go on. Round k asks about `first` * sqrt(k) directions. Unlike the paper's, they are orthogonal
    and centred where the box leaves room for all of them: more is learned a question. Returns the nearest adversarial
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
    for some in rows.split(max(1, 2**14 // x.shape[1:].numel())) if len(rows) and queries else ():  # a few at a time: memory
        _Walk(attempt, some, seeds[some], queries).run(None if start is None else start[some].to(attempt.x), first)
    attempt.eps = reach.expand(len(x))  # farther points were steps on the way
    return attempt.result()


class _OutOfQueries(Exception):
    pass


class _Walk:
    """HopSkipJump on m images in step: each asks the same number of questions, and goes its own way along the boundary."""

    def __init__(self, attempt: Attempt, rows: Tensor, seeds: Tensor, queries: int):
        self.attempt, self.left = attempt, queries
        self.rows, self.x, self.seeds = rows, attempt.x[rows], seeds

    def ask(self, points: Tensor) -> Tensor:
        """Which of the points [m, q, *shape] are adversarial, [m, q] bool; the nearest are kept. _OutOfQueries when too many."""
        m, q = points.shape[:2]
        if q > self.left:
            raise _OutOfQueries
        self.left -= q
        flat, rows = points.flatten(0, 1), self.rows.repeat_interleave(q)
        parts = zip(flat.split(PASS), rows.split(PASS), strict=True)
        logits = torch.cat([self.attempt.logits(*part) for part in parts])
        won = self.attempt.wins(logits, rows).reshape(m, q)
        if bool(won.any()):
            d = (points - self.x[:, None]).flatten(2).norm(p=self.attempt.norm, dim=2).masked_fill_(~won, inf)
            nearest, i = d.min(1)
            found = (nearest < self.attempt.distance[self.rows]).nonzero()[:, 0]
            if len(found):
                i = found * q + i[found]
                self.attempt.submit(flat[i], logits[i], rows[i])
        return won

    def bisect(self, path: Callable[[Tensor], Tensor], low: float, high: float, halvings: int) -> tuple[Tensor, Tensor]:
        """Bounds [m], [m] of the share at which path(share [m]), right at low and adversarial at high, changes sides."""
        a, b = (self.x.new_full((len(self.x),), v) for v in (low, high))
        for _ in range(halvings):
            middle = (a + b) / 2
            won = self.ask(path(middle)[:, None])[:, 0]
            a, b = torch.where(won, a, middle), torch.where(won, middle, b)
        return a, b

    def to_boundary(self, a: Tensor) -> Tensor:
        """The adversarial points nearest to the boundary on the way from a to x: a segment, or a cut to smaller l-inf balls."""
        def path(t: Tensor) -> Tensor:
            if self.attempt.norm == 2:
                return torch.lerp(self.x, a, _column(t, a))
            return threat.project(a, self.x, t * threat.distance(a, self.x, inf), inf)
        return path(self.bisect(path, 0, 1, BOUNDARY)[1])

    def begin(self, start: Tensor | None) -> Tensor:
        """Points on the boundary; images without an adversarial one to start from are dropped."""
        if start is None:
            tries = min(50, self.left)
            starts = noise.uniform(self.seeds, tries * self.x[0].numel(), dtype=self.x.dtype)
            starts = starts.reshape(len(self.x), tries, *self.x.shape[1:])
        else:
            starts = start[:, None]
        won = self.ask(starts)
        some = won.any(1)
        self.rows, self.x, self.seeds = self.rows[some], self.x[some], self.seeds[some]
        return self.to_boundary(_first(starts[some], won[some]))

    def normal(self, a: Tensor, count: int, k: int) -> Tensor:
        """The boundary's normal near a, up to length: directions that are adversarial less those that are not, [m, *shape].

        The directions are rows of a Hadamard matrix, pixel by pixel in random signs: orthogonal, and every pixel moves by
        the same radius. They start from the middle of the boundary layer, near a, where this radius keeps to the box:
        cut by the box, most of them would fall on one side and say little.
        """
        p = self.x[0].numel()
        radius = threat.distance(a, self.x, 2) / (10 * p)
        r = _column(radius, a)

        def path(t: Tensor) -> Tensor:
            return torch.lerp(self.x, a, _column(t, a)).maximum(r).minimum(1 - r)
        low, high = self.bisect(path, 1 - 1 / p, 1 + 6 / p, CENTRE)
        centre = path((low + high) / 2)
        rows = _hadamard(count, p).to(a)
        signs = (noise.uniform(self.seeds, p, step=k, dtype=a.dtype) - 0.5).sign() * radius[:, None]
        points = torch.addcmul(centre.flatten(1)[:, None], rows, signs[:, None]).clamp_(0, 1)
        vote = self.ask(points.reshape(len(a), count, *a.shape[1:])).to(a) * 2 - 1
        mean = vote.mean(1, keepdim=True)
        vote = vote - mean.masked_fill(mean.abs() == 1, 0)
        return (vote @ rows * signs).reshape(a.shape)

    def step(self, a: Tensor, direction: Tensor, longest: Tensor) -> Tensor:
        """The longest adversarial one of several steps from a; a where none is."""
        lengths = longest[:, None] * 0.5 ** torch.arange(STEPS, device=a.device)
        points = (a[:, None] + lengths.reshape(*lengths.shape, *[1] * (a.dim() - 1)) * direction[:, None]).clamp(0, 1)
        won = self.ask(points)
        return torch.where(_column(won.any(1), a), _first(points, won), a)

    def run(self, start: Tensor | None, first: int) -> None:
        """Boundary, normal, step, and again until the queries are spent."""
        try:
            a, k = self.begin(start), 0
            while len(a):
                k += 1
                count = min(int(first * k**0.5), 1 << self.x[0].numel().bit_length() - 1, self.left - CENTRE - STEPS - BOUNDARY)
                direction = threat.steepest(self.normal(a, max(1, count), k), self.attempt.norm, a)
                length = threat.distance(a, self.x, self.attempt.norm) / k**0.5
                a = self.to_boundary(self.step(a, direction, length))
        except _OutOfQueries:
            pass


def _first(points: Tensor, won: Tensor) -> Tensor:
    """For each image the first of its points [m, q, *shape] that won, [m, *shape]."""
    return points[torch.arange(len(won), device=won.device), won.byte().argmax(1)]


def _hadamard(count: int, p: int) -> Tensor:
    """Rows of +-1, [count, p], orthogonal (up to the last columns) for count <= p: those of a Hadamard matrix, repeated."""
    h = torch.ones(1, 1)
    while len(h) < count:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:count, torch.arange(p) % len(h)]

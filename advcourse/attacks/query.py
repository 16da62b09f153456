"""Attacks that only ask questions: Square, which sees the scores, and HopSkipJump, which sees the decision alone."""
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.iterative import like
from advcourse.losses import margin_loss

PASS = 512  # images a forward pass: more at once are slower, they leave the processor's cache
PLAN, REFILLS = 64, 3  # Square: proposals planned together; rounds of lengthening and cutting in norm 2
BOUNDARY, CENTRE, STEPS = 12, 8, 6  # HopSkipJump's questions a round, beside the directions


def _check_queries(queries: int) -> None:
    if queries < 0:
        raise ValueError(f"queries={queries!r} is negative")


def square(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, queries: int = 1000, share: float = 0.3,
           target: Tensor | None = None, confidence: float = 0.0, generator: torch.Generator | None = None) -> AttackResult:
    """Square attack: repaint a random square, keep it if the margin falls (andriushchenko2020square), norms inf and 2.

    Black box: at most `queries` evaluations of the logits beside the look at x, no gradient; a few proposals share a forward
    pass, and the best of them counts. `share` is the first square's share of the image; it halves 7 to 9 times over the
    budget, later than in the paper, which on digits breaks more. Norm inf paints +-eps; norm 2 empties one window and
    spends its length in another. Also unlike the paper, small squares get the colour their corner has not, and norm 2
    refills what the box cuts off. Fixed radius: a success has distance <= eps. Errors as for `fgsm`; ValueError for other
    norms or a negative number of queries.
    """
    if norm not in (inf, 2):
        raise ValueError(f"norm={norm!r}: square knows norms inf and 2")
    _check_queries(queries)
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, confidence=confidence, generator=generator)
    seeds, rows = attempt.seeds, attempt.open
    x, radius, label = attempt.x[rows], attempt.eps[rows], attempt.label(rows)
    guess = _stripes(seeds[rows], _as_planes(x))
    highest, repaint = torch.full_like(radius, -inf), _recolour if norm == inf else _move_length
    halvings, group = (9, 4) if norm == inf else (7, 2)
    k, plan = 0, [guess]
    while k < queries and len(rows):
        j = k % PLAN
        if j == 0:
            areas = share * 0.5 ** (halvings * (torch.arange(k, k + PLAN, device=x.device) / queries) ** 0.7)
            plan = _plan(seeds[rows], areas, k // PLAN + 1, guess, norm)
        q = min(group, PLAN - j, queries - k) if k else 1
        proposals = repaint(guess, *(v[:, j:j + q] for v in plan)) if k else guess[:, None]
        points = _render(proposals, x, radius, norm)
        logits = _answers(attempt, points, rows)
        value = margin_loss(logits, label.repeat_interleave(q)).reshape(-1, q) * (1 if target is None else -1)
        value, i = value.nan_to_num(-inf, inf, -inf).max(1)
        keep = value > highest
        guess = torch.lerp(guess, _pick(proposals, i), like(keep.to(guess.dtype), guess))
        highest = torch.where(keep, value, highest)
        if bool((value >= confidence).any()):  # else nobody can have won
            on = ~_judge(attempt, points, logits, rows).any(1)
            rows, x, radius, label, guess, highest, *plan = (v[on] for v in (rows, x, radius, label, guess, highest, *plan))
        k += q
    return attempt.result()


def _answers(attempt: Attempt, points: Tensor, rows: Tensor) -> Tensor:
    """Logits [m * q, classes] of the points [m, q, *shape]."""
    each = rows.repeat_interleave(points.shape[1])
    parts = zip(points.flatten(0, 1).split(PASS), each.split(PASS), strict=True)
    return torch.cat([attempt.logits(*part) for part in parts])


def _judge(attempt: Attempt, points: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """Which of the points [m, q, *shape] with these logits are adversarial, [m, q]; the nearest of each image is kept."""
    m, q = points.shape[:2]
    won = attempt.wins(logits, rows.repeat_interleave(q)).reshape(m, q)
    if bool(won.any()):
        d = (points - attempt.x[rows][:, None]).flatten(2)
        d = d.norm(dim=2) if attempt.norm == 2 else d.abs().amax(2)
        nearest, i = d.masked_fill(~won, inf).min(1)
        found = (nearest < attempt.distance[rows]).nonzero()[:, 0]
        i = found * q + i[found]
        attempt.submit(points.flatten(0, 1)[i], logits[i], rows[found])
    return won


def _pick(points: Tensor, i: Tensor) -> Tensor:
    """Of each image's points [m, q, *shape] the one with index i [m]."""
    return points[torch.arange(len(i), device=i.device), i]


def _as_planes(x: Tensor) -> Tensor:
    """[n, *shape] -> [n, channels, h, w]: an image keeps its rows and columns, anything else is one long row."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, 1, x.shape[1:].numel())


def _signs(u: Tensor) -> Tensor:
    """Uniform numbers to +-1, at even odds."""
    return (u < 0.5).to(u.dtype) * 2 - 1


def _stripes(seeds: Tensor, x: Tensor) -> Tensor:
    """The first guess, the shape of x: columns of +-1."""
    sign = _signs(noise.uniform(seeds, x.shape[1] * x.shape[3], dtype=x.dtype))
    return sign.reshape(len(x), x.shape[1], 1, x.shape[3]).expand_as(x)


def _plan(seeds: Tensor, areas: Tensor, number: int, guess: Tensor, norm) -> list[Tensor]:
    """What the `number`-th K = len(areas) steps will paint, tensors [m, K, ...] that depend on the image's seed alone.

    Per window: 1 where its rows are, [h], 0 elsewhere; the same for its columns, [w]. Norm inf has one window, and its corner
    as a position in h * w; norm 2 has two. Then a sign a channel, which norm inf leaves 0 where the window is small.
    """
    m, channels, h, w = guess.shape
    sides = ((areas * h * w).sqrt() if h > 1 else areas * w).round().clamp_min(1)
    sizes = (h, w) if norm == inf else (h, w, h, w)
    u = noise.uniform(seeds, len(areas) * (len(sizes) + channels), step=number, dtype=guess.dtype).reshape(m, len(areas), -1)
    corners, spans = [], []
    for size, draw in zip(sizes, u.unbind(2), strict=False):
        lengths, at = sides.clamp_max(size).to(guess), torch.arange(size, device=guess.device)
        first = (draw * (size - lengths + 1)).floor()[..., None]
        corners.append(first[..., 0])
        spans.append(((at >= first) & (at < first + lengths[:, None])).to(guess.dtype))
    sign = _signs(u[..., len(sizes):])
    if norm == inf:
        return [*spans, (corners[0] * w + corners[1]).long(), sign * (sides > 2).to(sign)[:, None]]
    return [*spans, sign]


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """[m, q, h], [m, q, w] -> the windows [m, q, 1, h, w]: 1 where both are."""
    return rows[:, :, None, :, None] * columns[:, :, None, None, :]


def _recolour(guess: Tensor, rows: Tensor, columns: Tensor, corner: Tensor, sign: Tensor) -> Tensor:
    """The guess [m, channels, h, w] of +-1 with each window in one sign a channel; 0 stands for the one its corner has not."""
    old = guess.flatten(2).gather(2, corner[:, None].expand(-1, guess.shape[1], -1)).transpose(1, 2)
    colour = torch.where(sign == 0, -old, sign)
    return torch.lerp(guess[:, None], colour[..., None, None], _outer(rows, columns))


def _move_length(guess: Tensor, rows: Tensor, columns: Tensor, more_rows: Tensor, more_columns: Tensor, sign: Tensor) -> Tensor:
    """The guess with both windows emptied and their length in the first: half its old pattern, half one sign a channel."""
    here, there, guess = _outer(rows, columns), _outer(more_rows, more_columns), guess[:, None]
    kept = torch.addcmul(guess, guess, torch.maximum(here, there), value=-1)
    length = (_length(guess) ** 2 - _length(kept) ** 2).clamp_min(0).sqrt()
    old = 1 / _length(guess * here).clamp_min(1e-12)
    new = sign / (sign.shape[2] * rows.sum(2) * columns.sum(2)).sqrt()[..., None]
    mixed = (guess * old).add_(new[..., None, None]).mul_(here)  # both parts of length one
    return torch.addcmul(kept, mixed, length / _length(mixed).clamp_min(1e-12))


def _length(v: Tensor) -> Tensor:
    """[m, q, channels, h, w] -> [m, q, 1, 1, 1]."""
    return v.flatten(2).norm(dim=2)[..., None, None, None]


def _render(guess: Tensor, x: Tensor, radius: Tensor, norm) -> Tensor:
    """The images the guesses [m, q, channels, h, w] stand for, in ball and box: x moved by +-radius, or far along the guess.

    In norm 2 the change is lengthened to the radius and cut by the box, again and again: a cut value stays cut and no round
    leaves the ball, so the length rises to what `threat.linear_maximiser` would reach.
    """
    change, flat, radius = guess.flatten(2), x.flatten(1)[:, None], radius[:, None, None]
    if norm == inf:
        a = torch.addcmul(flat, change, radius).clamp_(0, 1)
    else:
        for k in range(REFILLS):
            change = change if k == 0 else a - flat
            a = torch.addcmul(flat, change, radius / change.norm(dim=2, keepdim=True).clamp_min(1e-12)).clamp_(0, 1)
    return a.reshape(*guess.shape[:2], *x.shape[1:])


def hop_skip_jump(model: nn.Module, x: Tensor, y: Tensor, *, norm=2, eps=inf, queries: int = 2000, start: Tensor | None = None,
                  target: Tensor | None = None, first: int = 200, generator: torch.Generator | None = None) -> AttackResult:
    """HopSkipJump: the boundary's normal is estimated from yes/no answers (chen2020hopskipjumpattack), norms 2 and inf.

    Black box, decision only: at most `queries` evaluations an image beside the look at x. Starts at `start`, images that
    are adversarial (needed when there is a target), or at the first of up to 50 random images that is; an image for which none is
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
    attempt = Attempt(model, x, y, norm=norm, eps=eps, target=target, generator=generator)
    reach, attempt.eps = attempt.eps, torch.full_like(attempt.eps, inf)  # farther points are steps on the way
    seeds, rows = attempt.seeds, attempt.open  # seeds are drawn for every image, attacked or not
    if target is not None and start is None:
        raise ValueError("start=None: a targeted decision-based attack needs images of the target class to start from")
    for some in rows.split(max(1, 2**14 // x.shape[1:].numel())) if len(rows) and queries else ():  # a few at a time: memory
        _Walk(attempt, some, seeds[some], queries).run(None if start is None else start[some].to(attempt.x), first)
    attempt.eps = reach
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
        q = points.shape[1]
        if q > self.left:
            raise _OutOfQueries
        self.left -= q
        return _judge(self.attempt, points, _answers(self.attempt, points, self.rows), self.rows)

    def bisect(self, path: Callable[[Tensor], Tensor], low: float, high: float, halvings: int) -> tuple[Tensor, Tensor]:
        """Bounds [m], [m] of a share where path(share [m]) turns adversarial, if it is at high and is not at low."""
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
                return torch.lerp(self.x, a, like(t, a))
            return threat.project(a, self.x, t * threat.distance(a, self.x, inf), inf)
        return path(self.bisect(path, 0, 1, BOUNDARY)[1])

    def begin(self, start: Tensor | None) -> Tensor:
        """Points on the boundary; images without an adversarial one to start from are dropped."""
        if start is None:
            tries = min(50, 1 + self.left // 4)
            starts = noise.uniform(self.seeds, tries * self.x[0].numel(), dtype=self.x.dtype)
            starts = starts.reshape(len(self.x), tries, *self.x.shape[1:])
        else:
            starts = start[:, None]
        won = self.ask(starts)
        some = won.any(1)
        self.rows, self.x, self.seeds = self.rows[some], self.x[some], self.seeds[some]
        return self.x if not len(self.x) else self.to_boundary(_pick(starts[some], won[some].byte().argmax(1)))

    def normal(self, a: Tensor, count: int, k: int) -> Tensor:
        """The boundary's normal near a, up to length: directions that are adversarial less those that are not, [m, *shape].

        The directions are rows of a Hadamard matrix, pixel by pixel in random signs: orthogonal, and every pixel moves by
        the same radius. They do not start at a, but at a point of the boundary nearby where that radius keeps to the box:
        cut by the box, most of them would fall on one side and say little.
        """
        p = self.x[0].numel()
        radius = threat.distance(a, self.x, 2) / (10 * p)
        r = like(radius, a)

        def path(t: Tensor) -> Tensor:
            return torch.lerp(self.x, a, like(t, a)).maximum(r).minimum(1 - r)
        low, high = self.bisect(path, 1 - 1 / p, 1 + 6 / p, CENTRE)
        centre = path((low + high) / 2)
        rows = _hadamard(count, p).to(a)
        signs = _signs(noise.uniform(self.seeds, p, step=k, dtype=a.dtype)) * radius[:, None]
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
        return torch.where(like(won.any(1), a), _pick(points, won.byte().argmax(1)), a)

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


def _hadamard(count: int, p: int) -> Tensor:
    """Rows of +-1, [count, p], orthogonal (up to the last columns) for count <= p: those of a Hadamard matrix, repeated."""
    h = torch.ones(1, 1)
    while len(h) < count:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:count].repeat(1, -(-p // len(h)))[:, :p]

"""What every verifier returns, and the replay that a counterexample has to survive before it counts."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from advcourse import threat

SAME = 1e-6     # for norm 0, a value that a solver moved by less than this counts as not moved


@dataclass(frozen=True)
class Certificate:
    """The answer to one of the three formal problems for one image.

    status "robust": no counterexample exists, in the arithmetic named; "falsified": `counterexample` is one, replayed (for
    problem 1 also: the bracket is closed to the gap asked for); "unknown": the question is still open (out of time,
    interrupted, numerical doubt), with a bracket that holds. A time-out is never "robust".
    lower <= value <= upper brackets the quantity asked for: the minimal distortion (problem 1; upper is inf while no
    counterexample is known, both are inf when none exists) or the worst margin over the ball (problems 2 and 3).
    counterexample [*shape]: float32, in the box and the ball. trace: (seconds, lower, upper), anytime and monotone.
    nodes: of all the searches together. arithmetic "float64": as reliable as rounding and solver tolerances; "exact":
    checked in rational numbers. proof: what check_proof reads, or None. note: what a reader should know.
    """

    status: str
    lower: float
    upper: float
    counterexample: Tensor | None = None
    trace: list[tuple[float, float, float]] = field(default_factory=list)
    nodes: int = 0
    seconds: float = 0.0
    arithmetic: str = "float64"
    proof: Any = None
    note: str = ""

    def __post_init__(self):
        if self.status not in ("robust", "falsified", "unknown"):
            raise ValueError(f"status={self.status!r} is not robust, falsified or unknown")
        if not self.lower <= self.upper:  # also refuses NaN: it never proves anything
            raise ValueError(f"lower={self.lower} and upper={self.upper} are no bracket")
        if self.status == "falsified" and self.counterexample is None:
            raise ValueError("status 'falsified' needs a counterexample")

    @property
    def gap(self) -> float:
        """(upper - lower) / |upper|: 0 when the answer is exact, inf while one side is unknown."""
        if self.lower == self.upper:
            return 0.0
        return (self.upper - self.lower) / abs(self.upper) if self.upper not in (0.0, inf) else inf


def replay(model: nn.Module, net: Callable[[Tensor], Tensor], x: Tensor, y: int, a: Tensor, *, eps: float = inf, norm=inf,
           target: int | None = None) -> tuple[Tensor, float] | None:
    """(counterexample [*shape], distance) if the candidate a [p] survives, else None: no solver is believed about a witness.

    It is rounded to the precision of x [*shape] and moved into box and ball (`candidates`). It counts if the class changes
    strictly (to `target`, if given) both in the model's own arithmetic and in `net`, its float64 twin.
    """
    for point, distance in candidates(x, a, eps, norm):
        if all(_changes(f(point[None])[0], y, target) for f in (model, net)):
            return point, distance
    return None


def candidates(x: Tensor, a: Tensor, eps: float = inf, norm=inf) -> Iterator[tuple[Tensor, float]]:
    """a, rounded to the precision of x, in the box, and pulled towards x by at most 1e-5 if that puts it in the ball.

    Yields (point [*shape], distance), the distance computed in float64 and <= eps.
    """
    start, a = x.double(), a.to(x.device).double().reshape(x.shape)
    for pull in (0.0, 1e-6, 1e-5):
        point = (start + (1 - pull) * (a - start)).clamp(0, 1).to(x.dtype)
        if norm == inf and eps < inf:
            outside = (point.double() - start).abs() > eps
            point = torch.where(outside, torch.nextafter(point, x), point)
        elif norm == 0:
            point = torch.where((a - start).abs() < SAME, x, point)
        distance = float(threat.distance(point.double()[None], start[None], norm))
        if distance <= eps:
            yield point, distance


def _changes(logits: Tensor, y: int, target: int | None) -> bool:
    """Some class beats y strictly, or `target` beats every class strictly; NaN beats nothing."""
    who = y if target is None else target
    best = torch.cat([logits[:who], logits[who + 1:]]).max()
    return bool(best > logits[y]) if target is None else bool(logits[target] > best)

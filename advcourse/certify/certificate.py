"""What every verifier returns, and the replay that a counterexample has to survive before it counts."""
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, nn

from advcourse import threat


@dataclass(frozen=True)
class Certificate:
    """The answer to one of the three formal problems for one image.

    status "robust": no counterexample exists, in the arithmetic named; "falsified": `counterexample` is one, replayed;
    "unknown": neither was shown (out of time, interrupted, numerical doubt). A time-out is never "robust".
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

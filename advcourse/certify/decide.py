"""One class, one ball: can the class win somewhere in it? A mixed-integer program says, and its witness is made the nearest
in its activation region, which is a linear program: the upper bound that fixing the binaries gives."""
from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt

import numpy as np
import torch
from torch import Tensor

from advcourse.certify import lp_tree
from advcourse.certify.certificate import SAME
from advcourse.certify.dual import bound
from advcourse.certify.milp import Answer, Watch
from advcourse.certify.presolve import presolve
from advcourse.certify.question import Question, Race
from advcourse.certify.reduced import Reduced, Rows, ball
from advcourse.certify.relu_program import ReluProgram, margin_rows, phases_at, relu_program

GUARD = 1e-6    # programs look for margins up to GUARD times the logits' size: "infeasible" then stands back from a tie
LARGE = 1e7     # coefficients beyond this times the solver's tolerances reach a unit: such a program proves nothing


class Ball:
    """The ball of this radius around the question's image, presolved, and the classes that may win in it."""

    def __init__(self, q: Question, norm, radius: float) -> None:
        self.q, self.norm, self.radius = q, norm, radius
        self.red: Reduced = presolve(q.net, ball(q.flat, radius, norm))
        self.guard = GUARD * (1 + float(q.net(q.x[None]).abs().max()))
        self.least = {k: bound(self.red, self.rows(k)).value.max().item() for k in q.rivals}      # CROWN

    def rows(self, k: int) -> Rows:
        """f_i − f_k for the classes i that k must not lose to."""
        return margin_rows(self.red, self.q.beaten(k), k)

    def suspects(self) -> list[int]:
        """The classes that CROWN does not dismiss, the most suspicious first."""
        return sorted((k for k, v in self.least.items() if not v > 0), key=self.least.__getitem__)

    def program(self, k: int, goal: str, at_most: float, steps: list[np.ndarray] | None = None,
                phases: Tensor | None = None, radius: float | None = None) -> ReluProgram:
        return relu_program(self.red, self.rows(k), self.q.flat, norm=self.norm, goal=goal, at_most=at_most, phases=phases,
                            radius=self.radius if radius is None else radius, knots=self._knots(steps or []))

    def _knots(self, steps: list[np.ndarray]) -> np.ndarray | None:
        """Tangent points [m, p] of norm 2: a few multiples of a pixel's typical step, and the known `steps`."""
        if self.norm != 2:
            return None
        step = steps[0] if steps else np.full(self.q.net.units, self.radius / sqrt(self.q.net.units))
        typical = sqrt((step**2).sum() / max(1, (np.abs(step) > 1e-3 * np.abs(step).max()).sum()))
        grid = np.repeat(typical * np.array([[0.2], [0.4], [0.7], [1.0], [1.4], [2.0], [3.0]]), len(step), 1)
        return np.concatenate([grid, -grid, *(s[None] for s in steps)])

    def minimise(self, race: Race, k: int, search: str, at_most: float, gap: float, watch: Watch,
                 accept: Callable[[np.ndarray], bool]) -> tuple[Answer, ReluProgram]:
        """The smallest margin against k, if it is below `at_most`, by HiGHS's own search ("mip") or ours ("tree").

        accept(a) says whether an image that satisfies every ReLU will do, though it may lie outside a Euclidean ball.
        """
        if search != "tree":
            relu = self.program(k, "margin", at_most)
            return relu.program.solve(time_limit=race.left, watch=watch, mip_rel_gap=0.0, mip_abs_gap=gap), relu
        steps = [] if race.best is None else [(race.best.double().flatten() - self.q.flat).cpu().numpy()]

        def refine(relu: ReluProgram, values: np.ndarray) -> bool:
            a = relu.point(values)
            if self.norm != 2 or np.linalg.norm(a - relu.x) <= self.radius * (1 + 1e-6) or accept(a):
                return True
            steps.append(a - relu.x)
            return False

        return lp_tree.search(lambda: self.program(k, "margin", at_most, steps), refine, at_most=at_most, gap=gap,
                              time_limit=inf if race.left is None else race.left, watch=watch)

    def decide(self, race: Race, k: int, search: str, nearer: bool) -> str:
        """"none": class k wins nowhere in the ball; "found": a counterexample, handed to `race`; else "unknown".

        nearer: the counterexample must be nearer than the best one (and need not lie in the ball); else in the ball.
        """
        q, norm = self.q, self.norm

        def replayed(a) -> tuple[Tensor, float] | None:
            return q.replay(a, race.upper * (1 - 1e-6) if nearer else self.radius, norm, q.target)

        answer, relu = self.minimise(race, k, search, self.guard, 0.0,
                                     lambda bound, best, values: values is not None and best < -self.guard,
                                     lambda a: replayed(a) is not None)
        race.count(answer)
        if answer.status == "infeasible" and relu.program.largest <= LARGE:
            return "none"
        if answer.values is None:
            return "unknown"
        a = relu.point(answer.values)
        if not nearer:
            race.low_margin(q, a, self.radius, norm)
            return "found" if race.best is not None else "unknown"
        found = [race.witness(replayed(a)), race.witness(self.nearest(k, a))]
        return "found" if any(found) and answer.objective < -self.guard else "unknown"     # else: a tie, not worth chasing

    def nearest(self, k: int, a: np.ndarray) -> tuple[Tensor, float] | None:
        """The nearest counterexample of class k in the activation region of a, replayed.

        For norm 0: the one that moves no more values than a does and has the lowest margin.
        """
        phases, steps = phases_at(self.red, torch.as_tensor(a)), [a - self.q.flat.cpu().numpy()]
        if self.norm == 0:
            relu = self.program(k, "margin", 0.0, phases=phases, radius=float((np.abs(steps[0]) > SAME).sum()))
            answer = relu.program.solve()
            return None if answer.values is None else self.q.replay(relu.point(answer.values), inf, 0, self.q.target)
        for beyond in (1.0, 10.0, 100.0, 1000.0):               # further beyond the tie, until the float32 model agrees
            for _ in range(12):
                relu = self.program(k, "distance", -beyond * self.guard, steps, phases)
                answer = relu.program.solve()
                if answer.values is None:
                    return None
                point = relu.point(answer.values)
                if self.norm != 2 or ((point - relu.x)**2).sum() <= answer.objective * (1 + 1e-5):
                    break
                steps.append(point - relu.x)                    # closer tangents
            if (found := self.q.replay(point, inf, self.norm, self.q.target)) is not None:
                return found
        return None

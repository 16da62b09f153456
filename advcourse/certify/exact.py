"""The three formal problems solved exactly with HiGHS: minimal distortion, worst margin, and verification.

One image at a time: an attack gives the radius, CROWN dismisses the classes that cannot win within it, and what is left is
one mixed-integer program a class, the most suspicious first, with a binary for each ReLU that may still change (`decide`).
A better counterexample shrinks the ball, and every bound is computed anew. Witnesses are replayed.

Arithmetic: float64 and the solver's tolerances, held off by `decide.GUARD` and `decide.LARGE`. tjeng2019evaluating.
"""
from __future__ import annotations

from math import inf, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.certify.bounds import certified_radius
from advcourse.certify.certificate import Certificate
from advcourse.certify.decide import LARGE, Ball
from advcourse.certify.layers import Network
from advcourse.certify.milp import highs
from advcourse.certify.question import Question, Race, ask

SEARCHES = {"mip": (inf, 1, 0), "tree": (2, inf, 1), "distance": (inf, 1, 0)}      # and the norms they are for


def minimal_distortion(model: nn.Module | Network, x: Tensor, y, *, norm=inf, target=None, eps: float = inf,
                       gap: float = 1e-3, search: str | None = None, time_limit: float | None = None,
                       progress: bool | None = None) -> Any:
    """Problem 1: the distance d* from x to the nearest image of the box [0, 1] that is not classified y, as a bracket.

    lower <= d* <= upper: upper is the distance of a replayed counterexample (its class strictly changed), lower is proved.
    "falsified": the two are within `gap` of each other, relative (norm 0: equal). "robust": there is no counterexample in
    the box, or within `eps` if given (then lower = eps, upper = inf). "unknown": time_limit (seconds) or Ctrl-C came
    first; the bracket holds nevertheless. With `target`, the nearest image on which that class beats all others.
    search "mip": a program a class asks whether a ball slightly smaller than the best distance holds a counterexample.
    "distance": it minimises the distance instead; slower, with the solver's anytime bounds in the trace. "tree": as "mip",
    by our own branch and bound over linear programs: the only one for norm 2, not for norm 0. Default: "mip" or "tree".
    x: one image [*shape] with a number y, or a batch [n, *shape] with y [n], which gives a list (for n = 1: the one).
    progress: a line with the bracket (None: on a terminal only). ValueError: bad x, y, norm, target, search or layer.
    ImportError: highspy is missing. tjeng2019evaluating.
    """
    search = _check(norm, eps, search)
    if not 0 < gap < 1:
        raise ValueError(f"gap={gap!r} is not a relative gap between 0 and 1")

    def answer(q: Question) -> Certificate:
        with Race("d*", 0.0, time_limit, progress) as race:
            return _minimal(q, race, norm, float(eps), gap, search)
        return race.certificate("unknown")

    return ask(model, x, y, target, answer)


def worst_margin(model: nn.Module | Network, x: Tensor, y, *, eps: float, norm=inf, target=None, gap: float = 1e-4,
                 search: str | None = None, time_limit: float | None = None, progress: bool | None = None) -> Any:
    """Problem 2: the smallest margin f_y − max_k f_k (with `target`: f_y − f_target) over the ball ∩ box, as a bracket.

    "robust": lower > 0. "falsified": upper < 0, and an image with a negative margin is the counterexample. The bracket is
    closed to gap (1 + |upper|) unless time_limit or Ctrl-C came first: the note then says so, and the trace holds the
    solver's anytime bounds. Other arguments, batches and errors as for `minimal_distortion`.
    """
    search = _check(norm, eps, search)

    def answer(q: Question) -> Certificate:
        with Race("margin", -inf, time_limit, progress) as race:
            _worst(q, race, norm, float(eps), gap, search)
        return race.certificate("robust" if race.lower > 0 else "falsified" if race.best is not None else "unknown")

    return ask(model, x, y, target, answer)


def verify(model: nn.Module | Network, x: Tensor, y, *, eps: float, norm=inf, search: str | None = None,
           time_limit: float | None = None, progress: bool | None = None) -> Any:
    """Problem 3: is every image of the box within eps of x classified y? "robust", "falsified" or "unknown".

    lower and upper bracket the worst margin, loosely: only its sign is asked for. Other arguments, batches and errors as
    for `minimal_distortion`.
    """
    search = _check(norm, eps, search)

    def answer(q: Question) -> Certificate:
        with Race("margin", -inf, time_limit, progress) as race:
            return race.certificate(_verify(q, race, norm, float(eps), search))
        return race.certificate("unknown")

    return ask(model, x, y, None, answer)


def _check(norm, eps, search: str | None) -> str:
    threat.check_norm(norm)
    threat.check_eps(eps)
    highs()
    search = ("tree" if norm == 2 else "mip") if search is None else search
    if norm not in SEARCHES.get(search, ()):
        raise ValueError(f"search={search!r} is not for norm {norm}: " + ", ".join(f"{s} {n}" for s, n in SEARCHES.items()))
    return search


def _minimal(q: Question, race: Race, norm, cap: float, gap: float, search: str) -> Certificate:
    if q.replay(q.flat, inf, norm, q.target):
        race.best, race.upper = q.x, 0.0
        return race.certificate("falsified", note=f"x itself is {'mis' * (q.target is None)}classified" + " as the target" *
                                (q.target is not None))
    top = min(cap, {inf: 1.0, 2: sqrt(q.net.units), 1: float(q.net.units), 0: float(q.net.units)}[norm])
    floor = certified_radius(q.net, q.x[None], torch.tensor([q.y], device=q.x.device), norm=norm, tolerance=0.01)
    race.narrow(lower=min(float(floor), top))
    race.witness(q.attack(norm, cap))
    (_by_distance if search == "distance" else _by_decisions)(q, race, norm, top, gap, search)
    if race.upper == inf and race.lower >= top:
        lower, where = (inf, "the box") if cap == inf else (cap, f"the ball of radius {cap:g}")
        return race.certificate("robust", lower, f"no counterexample in {where}")
    closed = race.upper < inf and race.lower >= race.upper * (1 if norm == 0 else 1 - 1.001 * gap)
    return race.certificate("falsified" if closed else "unknown")


def _by_decisions(q: Question, race: Race, norm, top: float, gap: float, search: str) -> None:
    """Is there a counterexample within a radius slightly below the best distance? It shrinks the ball, or all is proved."""
    proved: dict[int, float] = {}               # class: the largest radius within which it wins nowhere
    back = gap
    while True:
        radius = top if race.upper == inf else race.upper - 1 if norm == 0 else race.upper * (1 - back)
        verdict, ball = "none", Ball(q, norm, radius)
        for k in (k for k in ball.suspects() if proved.get(k, -1.0) < radius):
            verdict = ball.decide(race, k, search, nearer=True)
            if verdict != "none":
                break
            proved[k] = radius
        if verdict == "none":
            race.narrow(lower=radius + 1 if norm == 0 and race.upper < inf else radius)
        if verdict == "unknown" and race.left != 0 and norm != 0 and back < 4 * gap:
            back *= 2                           # a tie just inside the radius, or numerical trouble: step back
        elif verdict != "found":
            return


def _by_distance(q: Question, race: Race, norm, top: float, gap: float, search: str) -> None:
    """One program a class that minimises the distance: the solver's bound is a lower bound at any time."""
    done: dict[int, float] = {}                 # class: the distance it was proved to need
    while True:
        ball = Ball(q, norm, min(race.upper, top))
        left = [k for k in ball.suspects() if k not in done]
        if not left:
            race.narrow(lower=min([ball.radius, *done.values()]))
            return
        others = min([ball.radius, *done.values(), *([race.lower] if len(left) > 1 else [])])
        relu = ball.program(left[0], "distance", ball.guard)

        def watch(bound: float, best: float, values: np.ndarray | None, others=others, relu=relu) -> bool:
            race.narrow(lower=min(bound, others))
            if values is not None:
                race.witness(q.replay(relu.point(values), inf, norm, q.target))
            return False

        answer = relu.program.solve(time_limit=race.left, watch=watch, mip_rel_gap=gap / 2)
        race.count(answer)
        if answer.values is not None:
            race.witness(q.replay(relu.point(answer.values), inf, norm, q.target))
            race.witness(ball.nearest(left[0], relu.point(answer.values)))
        if answer.status not in ("optimal", "infeasible") or relu.program.largest > LARGE:
            return
        done[left[0]] = min(np.ceil(answer.bound - 1e-6) if norm == 0 else answer.bound, ball.radius)


def _worst(q: Question, race: Race, norm, eps: float, gap: float, search: str) -> None:
    race.low_margin(q, q.x, eps, norm)
    if (found := q.attack(norm, eps)) is not None:
        race.low_margin(q, found[0], eps, norm)
    goal = Question(q.model, q.net, q.x, q.y)                   # for a target too, only y has to lose
    ball = Ball(goal, norm, eps)
    least = {k: ball.least[k] for k in q.rivals}
    race.narrow(lower=min(least.values()))
    for k in sorted(least, key=least.__getitem__):
        slack = gap * (1 + abs(race.upper))
        if least[k] >= race.upper - slack:
            continue
        others = min([inf, *(v for j, v in least.items() if j != k)])

        def watch(bound: float, best: float, values: np.ndarray | None, others=others, k=k) -> bool:
            race.narrow(lower=min(max(bound - ball.guard, least[k]), others))
            return False

        answer, relu = ball.minimise(race, k, search, race.upper, slack / 2, watch, lambda a: False)
        if answer.values is not None:
            race.low_margin(q, relu.point(answer.values), eps, norm)
        if relu.program.largest <= LARGE:
            least[k] = max(least[k], min(answer.bound, race.upper) - ball.guard)
        race.narrow(lower=min(least.values()))
        race.count(answer)
        if answer.status not in ("optimal", "infeasible"):
            race.note = "out of time" if race.left == 0 else "numerical doubt"
            return


def _verify(q: Question, race: Race, norm, eps: float, search: str) -> str:
    race.low_margin(q, q.x, eps, norm)
    if race.best is not None:
        return "falsified"
    ball = Ball(q, norm, eps)
    race.narrow(lower=min(ball.least.values()))
    if race.lower > 0:
        return "robust"
    if (found := q.attack(norm, eps)) is not None:
        race.low_margin(q, found[0], eps, norm)
        return "falsified"
    for k in ball.suspects():
        verdict = ball.decide(race, k, search, nearer=False)
        if verdict != "none":
            return "falsified" if verdict == "found" else "unknown"
        ball.least[k] = ball.guard
    race.narrow(lower=min(ball.least.values()))
    return "robust"

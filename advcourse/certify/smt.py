"""The same network and the same property for z3, an SMT solver, in exact rational arithmetic.

A float is a fraction whose denominator is a power of two: the weights go over without rounding, and so does the answer.
"""
from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import inf
from typing import Any, NamedTuple

from advcourse import threat
from advcourse.certify.layers import Affine, MaxPool, Network


class Answer(NamedTuple):
    """"sat" with a counterexample in rationals, "unsat" (the property holds: robust), or "unknown" (out of time)."""

    verdict: str
    counterexample: list[Fraction] | None = None


def forward(net: Network, a: Sequence[Any], maximum=max) -> list[Any]:
    """The network's logits at a, by +, * and `maximum` alone: on Fractions exact numbers, on z3 reals formulas."""
    for layer in net.layers:
        if isinstance(layer, Affine):
            W, b = layer.dense()
            a = [sum((Fraction(w) * v for w, v in zip(row, a, strict=True) if w != 0), Fraction(beta))
                 for row, beta in zip(W.tolist(), b.tolist(), strict=True)]
        elif isinstance(layer, MaxPool):
            a = [maximum(*[a[i] for i in dict.fromkeys(row)]) if len(set(row)) > 1 else a[row[0]]
                 for row in layer.index.tolist()]
        else:
            a = [maximum(h, Fraction(0)) for h in a]
    return list(a)


def counterexamples(net: Network, x, y: int, *, eps=None, norm=inf, target: int | None = None, strict=False) -> tuple[list, list]:
    """z3 reals a_0 … a_{p-1} and the formulas that say "a is in ball ∩ box and y does not win alone": the negated property.

    eps: a number, taken as the exact fraction it is, or None for the whole box. strict asks for s_k > s_y, which an SMT
    solver can say and a linear program cannot. ValueError: an image outside the box, a label that does not fit.
    """
    import z3
    x = [Fraction(float(v)) for v in x.flatten()]
    _check(net, x, y, target, eps, norm)
    a = [z3.Real(f"a{i}") for i in range(len(x))]

    def real(v):                            # a unit without inputs is a Fraction
        return z3.RealVal(str(v)) if isinstance(v, Fraction) else v

    def maximum(first, *rest):
        first = real(first)
        for other in map(real, rest):
            first = z3.If(first >= other, first, other)
        return first

    s = [real(v) for v in forward(net, a, maximum)]
    others = [k for k in range(net.classes) if k != y] if target is None else [target]
    rules = [z3.And(v >= 0, v <= 1) for v in a]
    rules.append(z3.Or([s[k] > s[y] if strict else s[k] >= s[y] for k in others]))
    if eps is not None:
        rules += ball(a, x, Fraction(eps), norm)
    return a, rules


def ball(a: list, x: list[Fraction], eps, norm=inf) -> list:
    """Formulas for ‖a − x‖ <= eps; eps may itself be a z3 real, for l-infinity, l1 and norm 0."""
    import z3
    if norm == inf:
        return [z3.And(v - c <= eps, c - v <= eps) for v, c in zip(a, x, strict=True)]
    if norm == 1:
        return [z3.Sum([z3.If(v >= c, v - c, c - v) for v, c in zip(a, x, strict=True)]) <= eps]
    if norm == 2:
        return [z3.Sum([(v - c) * (v - c) for v, c in zip(a, x, strict=True)]) <= eps * eps]
    return [z3.Sum([z3.If(v == c, z3.RealVal(0), z3.RealVal(1)) for v, c in zip(a, x, strict=True)]) <= eps]


def verify(net: Network, x, y: int, *, eps, norm=inf, target: int | None = None, strict=False,
           time_limit: float | None = None) -> Answer:
    """Problem 3 in exact arithmetic: "unsat" says that y wins everywhere in ball ∩ box, a proof up to z3 itself.

    Norm 2 is decided too (polynomial arithmetic, slower). The counterexample of a "sat" is checked by `forward` in
    rationals; one that is not rational (norm 2 only) comes back as None. Source: katz2017reluplex, demoura2008z3.
    """
    import z3
    a, rules = counterexamples(net, x, y, eps=eps, norm=norm, target=target, strict=strict)
    solver = z3.Solver()
    if time_limit is not None:
        solver.set("timeout", max(1, int(1000 * time_limit)))
    solver.add(rules)
    verdict = str(solver.check())
    if verdict != "sat":
        return Answer(verdict)
    values = [solver.model().eval(v, model_completion=True) for v in a]
    if not all(z3.is_rational_value(v) for v in values):
        return Answer(verdict)
    found = [v.as_fraction() for v in values]
    s = forward(net, found)
    best = max(s[k] for k in range(len(s)) if k != y) if target is None else s[target]
    return Answer(verdict, found) if best >= s[y] else Answer("unknown")


def minimal_distortion(net: Network, x, y: int, *, norm=inf, target: int | None = None,
                       time_limit: float | None = None) -> tuple[Fraction | float | None, list[Fraction] | None]:
    """Problem 1 in exact arithmetic, for l-infinity, l1 and norm 0: the distance as a fraction, and the point.

    (inf, None) when no class can beat y in the box, (None, None) when out of time. ValueError for norm 2, whose distance
    is a square root: bisect on `verify`.
    """
    import z3
    if norm == 2:
        raise ValueError("norm=2 has no rational answer: bisect on verify")
    a, rules = counterexamples(net, x, y, norm=norm, target=target)
    r = z3.Real("r")
    search = z3.Optimize()
    if time_limit is not None:
        search.set("timeout", max(1, int(1000 * time_limit)))
    search.add(rules + ball(a, [Fraction(float(v)) for v in x.flatten()], r, norm))
    search.minimize(r)
    verdict = str(search.check())
    if verdict != "sat":
        return (inf if verdict == "unsat" else None), None
    model = search.model()
    return model.eval(r).as_fraction(), [model.eval(v, model_completion=True).as_fraction() for v in a]


def _check(net: Network, x: list[Fraction], y: int, target: int | None, eps, norm) -> None:
    threat.check_norm(norm)
    if len(x) != net.units or not all(0 <= v <= 1 for v in x):
        raise ValueError(f"x is not one image of {net.units} values in [0, 1]")
    if not 0 <= y < net.classes or target == y or (target is not None and not 0 <= target < net.classes):
        raise ValueError(f"y={y}, target={target}: two different classes of 0 to {net.classes - 1} are needed")
    if eps is not None and not 0 <= eps < inf:
        raise ValueError(f"eps={eps!r} is not a radius: it must be 0 or more")

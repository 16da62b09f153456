"""Linear lower bounds on a `Reduced` network, and the multipliers that make them better: the engine of `branch`."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from advcourse.certify.domain import ROUNDING
from advcourse.certify.reduced import Reduced, Region, Rows, stack

RATES, DECAY = (0.25, 0.1, 1.0), 0.96   # Adam's steps for alpha, beta, gamma; their factor from one step to the next
BUDGET = 2**22                          # numbers in one tensor of multipliers (32 MB)


class Bound(NamedTuple):
    """value [n] <= each of n functions on the region; where the linear bound is smallest; how the units were replaced."""

    value: Tensor           # [n]
    point: Tensor           # [n, p]
    A: Tensor               # [n, p], the linear bound's gradient
    coefficient: Tensor     # [n, units], of each unit's output when it was replaced
    slope: Tensor           # [n, units], by slope · z + intercept
    intercept: Tensor


class Nodes(NamedTuple):
    """Subproblems: a function (a row's number), signs imposed on units, and the multipliers that gave `bound`."""

    bound: Tensor       # [n]
    row: Tensor         # [n]
    split: Tensor       # [n, units] int8 in {-1, 0, 1}: off, either, on
    alpha: Tensor       # [n, units] in [0, 1]
    beta: Tensor        # [n, units] >= 0

    def select(self, index) -> Nodes:
        return Nodes(*(part[index] for part in self))


def join(*parts: Nodes) -> Nodes:
    """The nodes of all parts, one after the other."""
    return Nodes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def roots(red: Reduced, rows: Rows) -> Nodes:
    """One node a row, with CROWN's slopes (the nearer of 0 and 1) and the signs that `red` imposes."""
    n, slope = len(rows.b), (red.upper > -red.lower).to(red.lower)
    alpha = slope.expand(n, -1)
    return Nodes(rows.b.new_full((n,), -inf), torch.arange(n, device=slope.device), red.split.expand(n, -1), alpha,
                 torch.zeros_like(alpha))


def bound(red: Reduced, rows: Rows, alpha: Tensor | None = None, split: Tensor | None = None,
          beta: Tensor | None = None, region: Region | None = None) -> Bound:
    """CROWN: replace the units, last stage first, by lines until only pixels are left (zhang2018efficient).

    A unit with a coefficient >= 0 is replaced by the lower line alpha z, any 0 <= alpha <= 1; one with a negative
    coefficient by the chord from (lower, 0) to (upper, upper). `split` [n, units] says which units are taken as off or
    on: those are linear, and the condition split · z >= 0 enters with a multiplier beta >= 0 (wang2021beta). Sound for
    every such alpha and beta, on the presolved region or the part of it given; a NaN becomes −inf and proves nothing.
    """
    lower, upper, region = red.lower, red.upper, region or red.region
    chord = upper / (upper - lower)
    h, d = rows.V, rows.b - rows.slack
    g, coefficient, slope, intercept = (torch.zeros_like(h) for _ in range(4))     # g: coefficients of z
    for s in reversed(red.stages):
        c = h[:, s]
        low = (upper[s] > -lower[s]).to(c).expand_as(c) if alpha is None else alpha[:, s]
        line, above = torch.where(c < 0, chord[s], low), torch.where(c < 0, -chord[s] * lower[s], 0)
        if split is not None:
            fixed = split[:, s]
            line = torch.where(fixed == 0, line, (fixed > 0).to(c))
            above = torch.where(fixed == 0, above, 0)
        g[:, s] = c * line
        if split is not None and beta is not None:
            g[:, s] -= beta[:, s] * fixed
        coefficient[:, s], slope[:, s], intercept[:, s] = c, line, above
        d = d + (c * above).sum(1)
        if s.start:
            h = h[:, :s.start] + g[:, s] @ red.units.V[s, :s.start]
    A, d = rows.W + g @ red.units.W, d + g @ red.units.b - g.abs() @ red.units.slack
    point = region.minimiser(A)
    terms = A * point
    value = terms.sum(1) + d - ROUNDING * (terms.abs().sum(1) + d.abs())
    return Bound(value.nan_to_num(nan=-inf), point, A, coefficient, slope, intercept)


def ascend(red: Reduced, rows: Rows, nodes: Nodes, region: Region | None = None, *, steps: int, goal: float = 0.0,
           given: Rows | None = None, each: Callable[[Tensor], bool] | None = None) -> Nodes:
    """Better multipliers by Adam on the concave dual; a node keeps the best it has seen and rests once above `goal`.

    The supergradient is one forward pass through the relaxation, from the point where the linear bound is smallest:
    coefficient · z for alpha where the lower line is in use, −split · z for beta. `given`: functions known to be <= 0
    where it matters; they enter with multipliers gamma >= 0, whose supergradient is their value in that pass.
    """
    best = nodes._replace(bound=torch.full_like(nodes.bound, -inf), alpha=nodes.alpha.clone(), beta=nodes.beta.clone())
    at, mine, split, now = torch.arange(len(nodes.bound), device=nodes.bound.device), rows.select(nodes.row), nodes.split, [
        nodes.alpha, nodes.beta, nodes.bound.new_zeros(len(nodes.bound), 0 if given is None else len(given.b))]
    first, second = ([torch.zeros_like(part) for part in now] for _ in range(2))
    for k in range(1, steps + 1):
        whole = mine if given is None else mine.plus(given.times(now[2]))
        b = bound(red, whole, now[0], split, now[1], region)
        better = b.value > best.bound[at]
        i = at[better]
        best.bound[i], best.alpha[i], best.beta[i] = b.value[better], now[0][better], now[1][better]
        left = best.bound[at] <= goal
        if k == steps or not left.any() or (each is not None and each(best.bound)):
            break
        z = red.inputs(b.point, b.slope, b.intercept)
        up = [torch.where(split == 0, b.coefficient.clamp_min(0) * z, 0), -split * z]
        if given is not None:
            up.append(b.point @ given.W.T + (b.slope * z + b.intercept) @ given.V.T + given.b)
        for j, gradient in enumerate(up):
            m, v = first[j].lerp_(gradient, 0.1), second[j].lerp_(gradient**2, 0.001)
            move = m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
            now[j] = (now[j] + RATES[j] * DECAY**k * move).clamp(0, 1 if j == 0 else inf)
        if left.float().mean() < 0.7:
            at, mine, split = at[left], mine.select(left), split[left]
            now, first, second = ([part[left] for part in parts] for parts in (now, first, second))
    return best


def squeeze(red: Reduced, *, steps: int) -> Reduced | None:
    """Tighter bounds on the units where the only output is <= 0; None if that is nowhere: the output is proved positive.

    Each unit's bounds are optimised with the output's condition and the imposed signs as givens. What remains is a
    statement about witnesses only: elsewhere the bounds may fail.
    """
    rows, n = stack(red.units, red.units.negative()), len(red.lower)
    red = replace(red, lower=red.lower.clone(), upper=red.upper.clone())
    nodes, true = roots(red, rows), [red.lower.clone(), red.upper.clone()]

    def use(value: Tensor) -> bool:     # at once, in the next step's relaxation, where lower <= 0 <= upper is needed
        true[0], true[1] = torch.fmax(true[0], value[:n]), torch.fmin(true[1], -value[n:])
        red.lower[:], red.upper[:] = true[0].clamp_max(-1e-12), true[1].clamp_min(1e-12)
        return bool(((true[0] > true[1]) | (red.split * torch.where(red.split > 0, true[1], true[0]) < 0)).any())

    if n and use(ascend(red, rows, nodes, steps=steps, goal=inf, given=red.outputs, each=use).bound):
        return None
    return replace(red, lower=true[0], upper=true[1]).substitute()

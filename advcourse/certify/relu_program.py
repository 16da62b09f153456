"""A presolved network as a mixed-integer program: one binary for each ReLU whose phase is open, and the ball as rows.

    h − s = z,   0 <= h <= u b,   0 <= s <= −l (1 − b),   b in {0, 1}       (h = relu(z), s = relu(−z), l <= z <= u)

is one dense row and two short ones a unit. The image is a = x + Σ_k sign_k v_k over pieces v_k of steps: which pieces there
are, and what they cost, is all that the norms differ in.

    inf: one piece a pixel, of either sign, within the radius          1: a piece up and a piece down, cost 1 each
    0: one piece a pixel and a binary that lets it move, cost 1        2: pieces of growing cost, tangents of the square
"""
from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from torch import Tensor

from advcourse.certify.milp import Program
from advcourse.certify.reduced import Reduced, Rows

WIDEN = 1e-7        # how far bounds on units are moved outward, relative: the solver's own feasibility tolerance


@dataclass
class Pieces:
    """Steps v_k of 0 <= v_k <= length_k (norm inf and 0: low_k <= v_k) that move pixel[k] by sign[k] v_k."""

    pixel: np.ndarray
    sign: np.ndarray
    low: np.ndarray
    length: np.ndarray
    cost: np.ndarray


def pieces(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, norm, knots: np.ndarray | None = None) -> Pieces:
    """The pieces of the norm for an image x with lower <= a <= upper, all [p]; knots [m, p]: tangent points for norm 2."""
    down, up = x - lower, upper - x
    if norm in (inf, 0):
        free = np.flatnonzero((down > 0) | (up > 0))
        return Pieces(free, np.ones(len(free)), -down[free], up[free], np.ones(len(free)))
    room = np.concatenate([up, down])
    pixel, sign = np.tile(np.arange(len(x)), 2), np.repeat([1.0, -1.0], len(x))
    if norm == 1:
        low, length, cost = np.zeros_like(room), room, np.ones_like(room)
    else:
        assert knots is not None
        length, cost = _tangents(room, np.concatenate([knots, -knots], 1))
        pixel, sign = (np.tile(v, len(cost) // len(room)) for v in (pixel, sign))
        low = np.zeros_like(length)
    keep = length > 0
    return Pieces(pixel[keep], sign[keep], low[keep], length[keep], cost[keep])


def _tangents(room: np.ndarray, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length, cost) of the pieces: d² >= max(0, 2 s d − s²) over the knots s has slope 2 s between neighbours' midpoints."""
    s = np.sort(np.clip(knots, 0, None), 0)
    s = np.concatenate([np.zeros((1, len(room))), s])
    s = np.maximum.accumulate(s, 0)
    ends = np.concatenate([(s[1:] + s[:-1]) / 2, np.full((1, len(room)), inf)])
    ends = np.minimum(ends, room)
    length = np.diff(np.concatenate([np.zeros((1, len(room))), ends]), axis=0)
    return length.ravel(), (2 * s).ravel()


@dataclass
class ReluProgram:
    """The program, and where to read its solution: columns of the steps, of h, s and b of the open units; rows of the units."""

    program: Program
    x: np.ndarray
    pieces: Pieces
    step: np.ndarray
    h: np.ndarray
    s: np.ndarray
    phase: np.ndarray
    unit_rows: slice

    def point(self, values: np.ndarray) -> np.ndarray:
        """The image a [p] of a solution."""
        a = self.x.copy()
        np.add.at(a, self.pieces.pixel, self.pieces.sign * values[self.step])
        return a


def relu_program(red: Reduced, margin: Rows, x: Tensor, *, norm, radius: float, goal: str, at_most: float = inf,
                 knots: np.ndarray | None = None, phases: Tensor | None = None) -> ReluProgram:
    """The program over the images within `radius` of x [p] in red.region, with every row of `margin` at most `at_most`.

    goal "margin" minimises the first row, "distance" the distance (its square for norm 2, from below).
    phases [units] bool fixes every unit: what is left is a linear program on one activation region, and an upper bound.
    """
    p, at = Program(), x.double().cpu().numpy()
    lower, upper = (v.cpu().numpy() for v in (red.region.lower, red.region.upper))
    parts = pieces(at, lower, upper, norm, knots)
    step = p.columns(parts.low, parts.length, parts.cost * (goal == "distance" and norm in (1, 2)))
    _ball(p, parts, step, norm, radius, goal == "distance")

    def reads(rows: Rows) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
        W = rows.W.cpu().numpy()
        return (step, W[:, parts.pixel] * parts.sign), rows.b.cpu().numpy() + W @ at, rows.slack.cpu().numpy()

    first = p.height
    h, s, phase = _units(p, red, reads, phases)
    pixels, constant, slack = reads(margin)
    each = [(pixels[0], pixels[1]), (h, margin.V.cpu().numpy())]
    if goal == "margin":
        m = p.columns([-inf], [at_most + slack[0]], 1.0)
        p.rows([*((columns, M[:1]) for columns, M in each), (m, -np.ones((1, 1)))], -constant[0], -constant[0])
        each, constant, slack = [(columns, M[1:]) for columns, M in each], constant[1:], slack[1:]
    if len(constant):
        p.rows(each, -inf, at_most - constant + slack)
    return ReluProgram(p, at, parts, step, h, s, phase, slice(first, first + len(h)))


def _ball(p: Program, parts: Pieces, step: np.ndarray, norm, radius: float, minimise: bool) -> None:
    n, ones = len(step), np.ones(len(step))
    if norm == inf:
        if minimise:
            r = p.columns([0.0], [radius], 1.0)
            each = np.full((n, 1), -1.0)
            p.rows([(step, ones), (r, each)], -inf, np.zeros(n))
            p.rows([(step, ones), (r, -each)], np.zeros(n), inf)
        return
    if norm == 0:
        moved = p.columns(0 * ones, ones, float(minimise), integer=True)
        p.rows([(step, ones), (moved, -parts.length)], -inf, np.zeros(n))
        p.rows([(step, ones), (moved, -parts.low)], np.zeros(n), inf)
        p.rows([(moved, ones[None])], -inf, radius)
    elif radius < inf:
        p.rows([(step, parts.cost[None])], -inf, radius**2 if norm == 2 else radius)


def _units(p: Program, red: Reduced, reads, phases: Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns h, s and b of the undecided units."""
    l, u = (v.cpu().numpy() for v in (red.lower, red.upper))
    l, u = l - WIDEN * (1 - l), u + WIDEN * (1 + u)
    zero, one = np.zeros_like(l), np.ones_like(l)
    h, s = p.columns(zero, u), p.columns(zero, -l)
    on = zero if phases is None else phases.cpu().numpy().astype(float)
    b = p.columns(on, one if phases is None else on, integer=phases is None)
    if len(h):
        pixels, constant, slack = reads(red.units)
        V = red.units.V.cpu().numpy()
        p.rows([(h, one), (s, -one), (pixels[0], -pixels[1]), (h, -V)], constant - slack, constant + slack)
        p.rows([(h, one), (b, -u)], -inf, zero)
        p.rows([(s, one), (b, -l)], -inf, -l)
    return h, s, b


def phases_at(red: Reduced, a: Tensor) -> Tensor:
    """[units] bool: which undecided units are on at the point a [p]."""
    return red.inputs(a[None])[0] >= 0


def margin_rows(red: Reduced, winners: list[int], k: int) -> Rows:
    """f_i − f_k for each class i of `winners`, as rows of pixels and units: all <= 0 where k beats them."""
    return red.outputs.select(winners).plus(red.outputs.select([k] * len(winners)), -1)

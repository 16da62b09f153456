"""Bounds from a solver: for each neuron a linear program (ReLUs relaxed to triangles) or a mixed-integer one (ReLUs exact).

A linear program's bound is not read off the solver. Whatever multipliers y it returns, every v with row_l <= A v <= row_u
and l <= v <= u has

    cᵀv  =  yᵀA v + (c − Aᵀy)ᵀv  >=  Σ_i min(y_i row_l_i, y_i row_u_i) + Σ_j min(r_j l_j, r_j u_j),      r = c − Aᵀy,

which is computed here in float64 (neumaier2004safe). A mixed-integer bound is the solver's own, up to its tolerances.
"""
from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advcourse.certify.crown import lower_bound, propagate, tighten, undecided
from advcourse.certify.domain import ROUNDING, Domain
from advcourse.certify.layers import Affine, Layer, MaxPool, Network, Relu
from advcourse.certify.milp import Program
from advcourse.threat import Interval

TOLERANCE = 1e-6    # of the solver: a mixed-integer bound is moved outward by this much, relative


def solver_bounds(net: Network, domain: Domain, *, exact: bool = False, every: bool = False,
                  time_limit: float | None = None) -> list[Interval]:
    """What enters each ReLU and maximum, then the logits: CROWN ∩ LP, and with `exact` ∩ MIP, one image after the other.

    Settled units are skipped unless `every`. time_limit: seconds for each mixed-integer program, whose bound so far counts.
    """
    each = [Chain(net, d, exact, time_limit=time_limit).run(every) for d in _singles(domain)]
    return [Interval(torch.cat([b.lower for b in layer]), torch.cat([b.upper for b in layer]))
            for layer in zip(*each, strict=True)]


def solver_margins(net: Network, C: Tensor, domain: Domain, *, exact: bool = False,
                   time_limit: float | None = None) -> Tensor:
    """Lower bounds [n, m] of C f(a) over the domain, C [n, m, classes]: CROWN, LP and with `exact` MIP, the best of them."""
    out = []
    for c, d in zip(C, _singles(domain), strict=True):
        chain = Chain(net, d, exact, time_limit=time_limit)
        known = chain.run(logits=False)
        least = lower_bound(net.layers, c[None], known, d)[0]
        out.append(torch.fmax(least, chain.least(c @ chain.M, c @ chain.b, exact)))
    return torch.stack(out)


class Chain:
    """One image's program, grown layer by layer: the current layer's values are M v + b, v the columns of `program`.

    With `known`, what enters each ReLU and maximum as one row each, it is grown at once up to the logits; those bounds are
    believed. `exact` keeps the ReLUs by one binary each, else they are relaxed.
    """

    def __init__(self, net: Network, domain: Domain, exact: bool = False, known: list[Interval] | None = None,
                 time_limit: float | None = None) -> None:
        self.net, self.domain, self.exact, self.time_limit = net, domain, exact, time_limit
        self.program = Program()
        lower, upper = domain.lower[0], domain.upper[0]
        if domain.center is None:
            self.program.columns(lower, upper)
            self.M, self.b = torch.eye(len(lower), dtype=lower.dtype), torch.zeros_like(lower)
        else:
            x = domain.center[0]                                    # a = x + up − down, and the ball is one row
            room = torch.cat([upper - x, x - lower])
            weight, radius = _hull(room, float(torch.as_tensor(domain.eps)), domain.norm)
            moved = self.program.columns(np.zeros(len(room)), room)
            self.program.rows([(moved, weight[None].numpy())], -inf, radius)
            eye = torch.eye(len(x), dtype=x.dtype)
            self.M, self.b = torch.cat([eye, -eye], 1), x
        if known is not None:
            boxes = iter(known)
            for layer in net.layers:
                self.grow(layer, None if isinstance(layer, Affine) else next(boxes))

    def grow(self, layer: Layer, box: Interval | None) -> None:
        """Add one layer; `box` holds what enters it, None for an affine one."""
        if isinstance(layer, Affine):
            self.M, self.b = (layer.apply(self.M.T) - layer.bias).T, layer.apply(self.b)
            return
        assert box is not None
        if isinstance(layer, Relu):
            self._relu(box)
        else:
            self._maximum(layer, box)

    def run(self, every: bool = False, logits: bool = True) -> list[Interval]:
        """Bound each layer by CROWN and the program so far, then grow: what enters each ReLU and maximum, and the logits."""
        box, known = Interval(self.domain.lower, self.domain.upper), list[Interval]()
        for i, layer in enumerate(self.net.layers):
            if not isinstance(layer, Affine):
                wanted = undecided(layer, box)[0] | every
                box = self._tighten(tighten(self.net.layers[:i], box, known, self.domain, wanted), layer, every)
                known.append(box)
            self.grow(layer, box)
            box = propagate(layer, box)
        if logits:
            box = tighten(self.net.layers, box, known, self.domain, torch.ones_like(box.lower[0], dtype=torch.bool))
            known.append(self._tighten(box, None, True))
        return known

    def _tighten(self, box: Interval, layer: Relu | MaxPool | None, every: bool) -> Interval:
        """The box cut by what the program says of each unit; a box of inputs alone leaves nothing to gain."""
        lower, upper = box.lower.clone(), box.upper.clone()
        for exact in (False, True)[:1 + self.exact]:
            now = Interval(lower, upper)
            units = (torch.ones_like(lower[0]) if layer is None or every else undecided(layer, now)[0]).nonzero()[:, 0]
            if self.program.height and len(units):
                M, b = self.M[units], self.b[units]
                least = self.least(torch.cat([M, -M]), torch.cat([b, -b]), exact)
                lower[0, units] = torch.fmax(lower[0, units], least[:len(units)])
                upper[0, units] = torch.fmin(upper[0, units], -least[len(units):])
        return Interval(lower, upper)

    def least(self, M: Tensor, b: Tensor, exact: bool) -> Tensor:
        """Lower bounds of the rows M v + b over the program, [rows]: one solve each, started from the last one's basis."""
        binaries = self.program.binaries
        if exact and not binaries:
            exact = False
        solver = _Solver(self.program, exact, self.time_limit)
        return torch.tensor([solver.least(c) for c in M.numpy()], dtype=b.dtype) + b - ROUNDING * b.abs()

    def minimising(self, c: Tensor) -> Program:
        """The program with one more column m = c·(M v + b), the only one with a cost: its optimal value is min m."""
        row = (c @ self.M).numpy()
        m, constant = self.program.columns([-inf], [inf], 1.0), -float(c @ self.b)
        self.program.rows([(np.arange(len(row)), row[None]), (m, -np.ones((1, 1)))], constant, constant)
        return self.program

    def _relu(self, box: Interval) -> None:
        """z = relu(h): h itself where on, 0 where off, else h = z − s, z <= u, s <= −l, (−l) z + u s <= −l u (or a binary)."""
        l, u = box.lower[0], box.upper[0]
        open_ = ((l < 0) & (u > 0)).nonzero()[:, 0]
        if not len(open_):
            return self._replace((l >= 0).to(l), open_, np.zeros(0, dtype=int))
        low, high = l[open_].numpy(), u[open_].numpy()
        z, s = self.program.columns(0 * low, high), self.program.columns(0 * low, -low)
        width = self.M.shape[1]
        columns, one, beta = np.arange(width), np.ones(len(open_)), self.b[open_].numpy()
        self.program.rows([(z, one), (s, -one), (columns, -self.M[open_].numpy())], beta, beta)
        size = np.maximum(high, -low)
        self.program.rows([(z, -low / size), (s, high / size)], -inf, -low * high / size)
        if self.exact:
            on = self.program.columns(0 * low, one, integer=True)
            self.program.rows([(z, one), (on, -high)], -inf, 0 * low)
            self.program.rows([(s, one), (on, -low)], -inf, -low)
        self._replace((l >= 0).to(l), open_, z)

    def _maximum(self, layer: MaxPool, box: Interval) -> None:
        """t = max over a window: the unit that surely wins, else t >= every h and t <= the largest upper bound (or binaries)."""
        l, u = box.lower[0, layer.index], box.upper[0, layer.index]
        first = layer.index.gather(1, l.argmax(1, keepdim=True))
        rival = (u >= l.amax(1, keepdim=True)) & (layer.index != first)
        open_ = rival.any(1).nonzero()[:, 0]
        if not len(open_):
            self.M, self.b = self.M[first[:, 0]], self.b[first[:, 0]]
            return
        top = u[open_].amax(1).numpy()
        t = self.program.columns(l[open_].amax(1), top)
        width, M, b = self.M.shape[1], self.M.numpy(), self.b.numpy()
        binary = {} if not self.exact else {
            int(w): self.program.columns(np.zeros(layer.index.shape[1]), 1.0, integer=True) for w in open_}
        for k, w in enumerate(open_.tolist()):
            unit = layer.index[w].numpy()
            one = np.ones((len(unit), 1))
            self.program.rows([(t[k:k + 1], one), (np.arange(width), -M[unit])], b[unit], inf)
            if self.exact:                                          # Σ on = 1, and t <= h_j + (top − l_j)(1 − on_j)
                gap = top[k] - l[w].numpy()
                self.program.rows([(binary[w], np.ones((1, len(unit))))], 1.0, 1.0)
                terms = [(t[k:k + 1], one), (np.arange(width), -M[unit]), (binary[w], np.diag(gap))]
                self.program.rows(terms, -inf, b[unit] + gap)
        self.M, self.b = self.M[first[:, 0]], self.b[first[:, 0]]
        self._replace(torch.ones_like(self.b), open_, t)

    def _replace(self, keep: Tensor, places: Tensor, columns: np.ndarray) -> None:
        """The next layer's values: keep · (M v + b), and the new columns at `places`."""
        M = torch.zeros(len(self.M), self.program.width, dtype=self.M.dtype)
        M[:, :self.M.shape[1]] = keep[:, None] * self.M
        M[places] = 0
        M[places, torch.from_numpy(columns)] = 1
        self.M, self.b = M, keep * self.b
        self.b[places] = 0


class _Solver:
    """The program inside HiGHS, asked for the minimum of one linear function after the other."""

    def __init__(self, program: Program, exact: bool, time_limit: float | None) -> None:
        import highspy

        options: dict[str, Any] = {"presolve": "on" if exact else "off", "solver": "choose" if exact else "simplex"}
        if time_limit is not None:
            options["time_limit"] = float(time_limit)
        self.highs, self.exact, self.width = program.load(options), exact, program.width
        self.optimal = highspy.HighsModelStatus.kOptimal
        lp = self.highs.getLp()
        if not exact and program.binaries:
            continuous = [highspy.HighsVarType.kContinuous] * program.width
            self.highs.changeColsIntegrality(program.width, np.arange(program.width, dtype=np.int32), continuous)
        self.lower, self.upper = program.lower, program.upper
        self.row_lower, self.row_upper = np.array(lp.row_lower_), np.array(lp.row_upper_)
        self.matrix = _matrix(lp)

    def least(self, cost: np.ndarray) -> float:
        """A lower bound of cost·v."""
        self.highs.changeColsCost(self.width, np.arange(self.width, dtype=np.int32), cost)
        self.highs.run()
        if self.exact:
            bound = self.highs.getInfo().mip_dual_bound
            return bound - TOLERANCE * (1 + abs(bound)) if np.isfinite(bound) else -inf
        y = np.array(self.highs.getSolution().row_dual)
        return _safe(cost, self.matrix, y if len(y) == len(self.row_lower) else np.zeros(len(self.row_lower)), self)


def _safe(cost: np.ndarray, matrix, y: np.ndarray, p: _Solver) -> float:
    """The bound of the module's head for the multipliers y; those of a side that is infinite are dropped."""
    limit = np.where(y > 0, p.row_lower, p.row_upper)
    y = np.where(np.isfinite(limit) & np.isfinite(y), y, 0.0)
    rest = cost - matrix.T @ y
    rows, columns = y * np.where(y == 0, 0.0, limit), np.where(rest > 0, rest * p.lower, rest * p.upper)
    bound = rows.sum() + columns.sum() - ROUNDING * (np.abs(rows).sum() + np.abs(columns).sum() + np.abs(y).sum())
    return float(bound) if np.isfinite(bound) else -inf


def _matrix(lp):
    import highspy
    from scipy.sparse import csc_array, csr_array

    m = lp.a_matrix_
    kind = csc_array if m.format_ == highspy.MatrixFormat.kColwise else csr_array
    return kind((np.array(m.value_), np.array(m.index_), np.array(m.start_)), shape=(lp.num_row_, lp.num_col_))


def _hull(room: Tensor, eps: float, norm) -> tuple[Tensor, float]:
    """(w, r) with Σ w_k d_k <= r on the ball, d the steps up and down: its convex hull in the box for ℓ1 and ℓ0; for ℓ2 the
    ℓ1 ball around it."""
    one = torch.ones_like(room)
    if norm == 0:
        return torch.where(room > 0, 1 / room.clamp_min(1e-9), one), float(int(eps))
    return one, eps if norm == 1 else eps * (len(room) / 2) ** 0.5


def _singles(domain: Domain) -> list[Domain]:
    n = len(domain.lower)
    eps = torch.as_tensor(domain.eps, dtype=torch.float64).expand(n)
    center = [None] * n if domain.center is None else [c[None] for c in domain.center]
    return [Domain(domain.lower[i:i + 1], domain.upper[i:i + 1], center[i], eps[i], domain.norm) for i in range(n)]

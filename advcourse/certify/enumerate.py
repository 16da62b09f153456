"""The three formal problems solved by brute force: list every activation region, solve one small program in each.

Inside a region (which ReLUs are on, which unit wins each maximum) the network is affine, so every problem there is a
linear or a convex quadratic program. Regions multiply with the units: this is for networks one can draw, and for tests.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import inf

import numpy as np
from scipy.optimize import linprog, nnls

from advcourse import threat
from advcourse.certify.layers import Affine, MaxPool, Network

FEASIBLE = 1e-9         # how far outside a region a point may lie, in the units of the box


@dataclass(frozen=True)
class Region:
    """The polyhedron {a : G a <= g}, the box included, on which the logits are V a + v."""

    pattern: tuple[int, ...]    # one entry a ReLU (0 off, 1 on) or a maximum (which of its units), in network order
    G: np.ndarray
    g: np.ndarray
    V: np.ndarray               # [classes, p]
    v: np.ndarray
    radius: float               # of the largest ball inside; 0 for a region that is only a face of others


def regions(net: Network, lower=0.0, upper=1.0) -> list[Region]:
    """Every closed activation region that meets the box lower <= a <= upper, found by depth-first search.

    Their union is the box, and the network is affine on each. In float64; an LP decides emptiness up to 1e-9.
    """
    p = net.units
    G = np.vstack([np.eye(p), -np.eye(p)])
    g = np.concatenate([np.broadcast_to(upper, p), -np.broadcast_to(lower, p)]).astype(float)
    return list(_walk(net.layers, np.eye(p), np.zeros(p), G, g, ()))


def _walk(layers, W, w, G, g, pattern) -> Iterator[Region]:
    """The regions inside {G a <= g}, where the units that enter layers[0] are W a + w."""
    if not layers:
        yield Region(pattern, G, g, W, w, inner_radius(G, g))
    elif isinstance(layers[0], Affine):
        A, b = (part.numpy() for part in layers[0].dense())
        yield from _walk(layers[1:], A @ W, A @ w + b, G, g, pattern)
    else:                                       # a ReLU is the larger of its unit and of one more unit that is 0
        W, w = np.vstack([W, 0 * W[:1]]), np.append(w, 0.0)
        relu = [np.array([len(w) - 1, i]) for i in range(len(w) - 1)]
        windows = [np.unique(row) for row in layers[0].index.numpy()] if isinstance(layers[0], MaxPool) else relu
        for chosen, G2, g2, more in _choose(windows, W, w, G, g):
            yield from _walk(layers[1:], W[chosen], w[chosen], G2, g2, (*pattern, *more))


def _choose(windows, W, w, G, g) -> Iterator[tuple]:
    """All ways to say which unit of each window is the largest: (units, G, g, their places in the windows)."""
    if not windows:
        yield [], G, g, ()
        return
    for place, unit in enumerate(windows[0]):
        others = windows[0][windows[0] != unit]
        G2, g2 = np.vstack([G, W[others] - W[unit]]), np.append(g, w[unit] - w[others])
        if inner_radius(G2, g2) >= -FEASIBLE:
            for units, G3, g3, places in _choose(windows[1:], W, w, G2, g2):
                yield [unit, *units], G3, g3, (place, *places)


def inner_radius(G: np.ndarray, g: np.ndarray) -> float:
    """Radius of the largest ball inside {G a <= g}; negative when the set is empty, by how much it has to grow."""
    p = G.shape[1]
    rows = np.column_stack([G, np.linalg.norm(G, axis=1)])
    found = linprog(np.append(np.zeros(p), -1.0), rows, g, bounds=[(None, None)] * (p + 1))
    return -found.fun if found.status == 0 else -inf


def nearest(G: np.ndarray, g: np.ndarray, x: np.ndarray, norm=inf) -> tuple[float, np.ndarray | None]:
    """The point of {G a <= g} closest to x and its distance; (inf, None) when there is none.

    An LP for l-infinity and l1, one LP for each set of changed coordinates for norm 0, and for norm 2 the
    least-distance problem of Lawson and Hanson through non-negative least squares.
    """
    threat.check_norm(norm)
    p, eye = len(x), np.eye(len(x))
    if norm == 0:
        for size in range(p + 1):
            for moved in combinations(range(p), size):
                limits = [(None, None) if i in moved else (x[i], x[i]) for i in range(p)]
                found = linprog(np.zeros(p), G, g, bounds=limits)
                if found.status == 0:
                    return size, found.x
        return inf, None
    if inner_radius(G, g) < -FEASIBLE:
        return inf, None
    if norm == 2:                               # min |d| with -G d >= G x - g
        E, f = np.vstack([-G.T, (G @ x - g)[None]]), np.append(np.zeros(p), 1.0)
        r = E @ nnls(E, f)[0] - f
        d = -r[:-1] / r[-1]
        return float(np.linalg.norm(d)), x + d
    r = np.ones((p, 1)) if norm == inf else eye     # |a - x| <= r, coordinate by coordinate
    rows = np.block([[G, np.zeros((len(G), r.shape[1]))], [eye, -r], [-eye, -r]])
    cost = np.append(np.zeros(p), np.ones(r.shape[1]))
    found = linprog(cost, rows, np.concatenate([g, x, -x]), bounds=[(None, None)] * len(cost))
    return (found.fun, found.x[:p]) if found.status == 0 else (inf, None)


def lowest(c: np.ndarray, G: np.ndarray, g: np.ndarray, x: np.ndarray, eps: float, norm=inf) -> tuple[float, np.ndarray | None]:
    """The minimum of c a over {G a <= g} ∩ {|a - x| <= eps} and a minimiser; (inf, None) when that set is empty."""
    import cvxpy as cp
    threat.check_norm(norm)
    best: tuple[float, np.ndarray | None] = (inf, None)
    p = len(x)
    if norm in (inf, 0):
        for moved in combinations(range(p), p if norm == inf else min(p, int(eps))):
            reach = [(eps if norm == inf else inf) if i in moved else 0 for i in range(p)]
            found = linprog(c, G, g, bounds=np.column_stack([x - reach, x + reach]))
            if found.status == 0 and found.fun < best[0]:
                best = found.fun, found.x
        return best
    if nearest(G, g, x, norm)[0] > eps + FEASIBLE:
        return best
    a = cp.Variable(p)
    problem = cp.Problem(cp.Minimize(c @ a), [G @ a <= g, cp.norm(a - x, norm) <= eps])
    problem.solve(solver=cp.CLARABEL)
    return (problem.value, a.value) if problem.status == cp.OPTIMAL else best


def minimal_distortion(net: Network, x, y: int, *, norm=inf, target: int | None = None) -> tuple[float, np.ndarray | None]:
    """Problem 1: the distance from x to the nearest a in the box where y does not win alone, and that a.

    (inf, None) when there is none. Ties count: the set s_k >= s_y is closed, so that the minimum exists.
    """
    return min((nearest(np.vstack([r.G, c]), np.append(r.g, -c0), _flat(x), norm)
                for r, c, c0 in _pieces(net, y, target)), key=lambda found: found[0])


def worst_margin(net: Network, x, y: int, *, eps: float, norm=inf, target: int | None = None) -> tuple[float, np.ndarray | None]:
    """Problem 2: the smallest s_y - s_k over the classes k != y (or k = target) and over ball ∩ box, and where."""
    threat.check_eps(eps)
    found = [(lowest(c, r.G, r.g, _flat(x), eps, norm), c0) for r, c, c0 in _pieces(net, y, target)]
    return min(((value + c0, a) for (value, a), c0 in found), key=lambda one: one[0])


def verify(net: Network, x, y: int, *, eps: float, norm=inf, target: int | None = None) -> tuple[bool, np.ndarray | None]:
    """Problem 3: does y win alone everywhere in ball ∩ box? (True, None), or (False, a counterexample)."""
    threat.check_eps(eps)
    for r, c, c0 in _pieces(net, y, target):
        d, a = nearest(np.vstack([r.G, c]), np.append(r.g, -c0), _flat(x), norm)
        if d <= eps:
            return False, a
    return True, None


def _pieces(net: Network, y: int, target: int | None) -> Iterator[tuple[Region, np.ndarray, float]]:
    """Every region with every margin s_y - s_k = c a + c0 on it."""
    if not 0 <= y < net.classes or target == y or (target is not None and not 0 <= target < net.classes):
        raise ValueError(f"y={y}, target={target}: two different classes of 0 to {net.classes - 1} are needed")
    for r in regions(net):
        for k in range(net.classes) if target is None else [target]:
            if k != y:
                yield r, r.V[y] - r.V[k], float(r.v[y] - r.v[k])


def _flat(x) -> np.ndarray:
    return np.asarray(x, dtype=float).ravel()

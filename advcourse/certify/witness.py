"""Points at which an output is not positive: found by gradients, or by a linear program inside one activation pattern.

f maps points [n, p] to outputs [n, k], all positive where the property holds; a witness is a point with an output <= 0.
Nothing here proves anything, but for `leaf`, whose multipliers the caller puts into `dual.bound`.
"""
from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import torch
from torch import Tensor

from advcourse import threat
from advcourse.certify.dual import bound
from advcourse.certify.reduced import Reduced, Region, stack

Outputs = Callable[[Tensor], Tensor]


def gradient(f: Outputs, a: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """f(a)[i, output[i]] and its gradient: [n], [n, p]."""
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        value = f(a).gather(1, output[:, None])[:, 0]
        return value.detach(), torch.autograd.grad(value.sum(), a)[0]


def attack(f: Outputs, region: Region, outputs: Tensor, *, steps: int = 20, restarts: int = 8,
           seed: int = 0) -> tuple[Tensor, float]:
    """The point [p] of the region with the smallest output found, among `outputs` [m], and that output.

    Frank-Wolfe: step k goes 2/(k + 2) of the way to the point where the linearised output is smallest, which needs no
    projection in any norm. Starts at the middle and at random points; stops at the first witness.
    """
    generator = torch.Generator().manual_seed(seed)
    output = outputs.repeat(restarts)
    middle = (region.lower + region.upper) / 2 if region.center is None else region.center
    corner = region.minimiser(torch.randn(len(output), len(middle), generator=generator, dtype=middle.dtype).to(middle))
    part = torch.rand(len(output), 1, generator=generator, dtype=middle.dtype).to(middle)
    part[:len(outputs)] = 0
    a, best, least = middle + part * (corner - middle), middle, inf
    for k in range(steps):
        value, g = gradient(f, a, output)
        if value.min() < least:
            best, least = a[value.argmin()], value.min().item()
        if least <= 0:
            break
        a = a + 2 / (k + 2) * (region.minimiser(g) - a)
    return best, least


def descend(f: Outputs, x: Tensor, a: Tensor, output: Tensor, norm=inf, *, steps: int = 8) -> tuple[Tensor, Tensor]:
    """Witnesses near x [p], one a row: from a [n, p] towards the nearest point with f_output <= 0: distance [n], [n, p].

    DeepFool in the box (moosavi2016deepfool): go to the nearest point at which the linearised output is 0, then slide
    along the line from x through it to where the output itself changes sign. Distance inf where no witness was met.
    """
    x = x.expand_as(a)
    best, where = a.new_full((len(a),), inf), a
    for _ in range(steps):
        value, g = gradient(f, a, output)
        a = threat.nearest_beyond(-g, value + (g * (x - a)).sum(1), x, norm)
        short, far = torch.ones_like(value), torch.full_like(value, 1.3)
        for k in range(6):
            factor = far if k == 0 else (short + far) / 2
            point = (x + factor[:, None] * (a - x)).clamp(0, 1)
            hit = f(point).gather(1, output[:, None])[:, 0] <= 0
            distance = torch.where(hit, threat.distance(point, x, norm), inf)
            where = torch.where((distance < best)[:, None], point, where)
            best = torch.minimum(best, distance)
            short, far = torch.where(hit, short, factor), torch.where(hit, factor, far)
    return best, where


def conditions(red: Reduced, split: Tensor, output: int) -> tuple[np.ndarray, np.ndarray]:
    """(G, g): with every unit's sign given, [units], a point is a witness with these signs if and only if G a + g >= 0."""
    rows = stack(red.units, red.outputs.select([output]))
    b = bound(red, rows, None, split.expand(len(rows.b), -1))           # all is affine: the bound is the function
    sign = torch.cat([split.to(b.A), -b.A.new_ones(1)])
    return (sign[:, None] * b.A).cpu().numpy(), (sign * (b.value - (b.A * b.point).sum(1))).cpu().numpy()


def nearest(G: np.ndarray, g: np.ndarray, x: np.ndarray, norm=inf) -> tuple[np.ndarray, np.ndarray] | None:
    """The point [p] of {G a + g >= 0} ∩ [0, 1]^p nearest to x and the multipliers [m] of its rows; None if the set is empty.

    A linear program for l-infinity and l1. For l2 the dual, which is smooth and concave: the maximum over w >= 0 of
    ½‖a − x‖² − w (G a + g) at a = clip(x + Gᵀ w).
    """
    from scipy import sparse
    from scipy.optimize import linprog, minimize
    if norm == 2:
        size = np.maximum(np.linalg.norm(G, axis=1), 1e-12)
        A, b = G / size[:, None], g / size

        def dual(w: np.ndarray) -> tuple[float, np.ndarray]:
            a = np.clip(x + w @ A, 0, 1)
            row = A @ a + b
            return w @ row - 0.5 * ((a - x)**2).sum(), row

        w = minimize(dual, np.zeros(len(b)), jac=True, bounds=[(0, None)] * len(b), method="L-BFGS-B",
                     options={"maxiter": 300, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 30}).x
        a = np.clip(x + w @ A, 0, 1)
        return (a, w / size) if (A @ a + b).min() >= -1e-6 else None
    p, up, down = len(x), np.flatnonzero(x < 1), np.flatnonzero(x > 0)      # where the box leaves room, d <= r and -d <= r
    eye = sparse.eye(p, format="csr")
    radius = sparse.csr_matrix(np.ones((p, 1))) if norm == inf else eye
    rows = sparse.bmat([[sparse.csr_matrix(-G), None], [eye[up], -radius[up]], [-eye[down], -radius[down]]], format="csr")
    right = np.concatenate([g + G @ x, np.zeros(len(up) + len(down))])
    k = radius.shape[1]
    limits = np.column_stack([np.append(-x, np.zeros(k)), np.append(1 - x, np.ones(k))])
    found = linprog(np.append(np.zeros(p), np.ones(k)), rows, right, bounds=limits, method="highs", options={"presolve": False})
    return None if found.x is None else (np.clip(x + found.x[:p], 0, 1), -found.ineqlin.marginals[:len(g)])


def polish(red: Reduced, x: Tensor, a: Tensor, output: int, norm=inf) -> Tensor:
    """The witness [p] nearest to x among those with the activation pattern of the witness a [p]; a if that fails.

    The lecture's upper bound by fixing the binaries.
    """
    G, g = conditions(red, torch.where(red.inputs(a[None])[0] > 0, 1, -1).to(torch.int8), output)
    found = nearest(G, g, x.cpu().numpy(), norm)
    return a if found is None else torch.as_tensor(found[0]).to(x)


def leaf(red: Reduced, split: Tensor, output: int, region: Region) -> tuple[Tensor, float, Tensor]:
    """With every sign given: the point [p] that comes nearest to being a witness, and multipliers (of the output, of the
    signs [units]) that prove that there is none, if there is none.

    In an l1 or l2 ball: the witness nearest to its center, a hair further out. In a box, and where the box has no witness
    with these signs: the linear program min t with G a + g + t >= 0, which always has a solution. Duals are certificates.
    """
    from scipy.optimize import linprog
    G, g = conditions(red, split, output)
    found = None
    if region.center is not None and region.norm != 0:
        center = region.center.cpu().numpy()
        found = nearest(G, g, center, region.norm)
    if found is not None:
        point, weights = np.clip(center + (1 + 1e-6) * (found[0] - center), 0, 1), found[1]
    else:
        point, weights = ((region.lower + region.upper) / 2).cpu().numpy(), np.zeros(len(g))
        limits = np.column_stack([np.append(region.lower.cpu().numpy(), -inf), np.append(region.upper.cpu().numpy(), inf)])
        rows, cost = np.column_stack([-G, -np.ones(len(g))]), np.append(np.zeros(G.shape[1]), 1.0)
        least = linprog(cost, rows, g, bounds=limits, method="highs")
        if least.x is not None:
            point, weights = least.x[:-1], -least.ineqlin.marginals
    return torch.as_tensor(point).to(red.lower), max(0.0, weights[-1]), torch.as_tensor(weights[:-1]).clamp_min(0).to(red.lower)

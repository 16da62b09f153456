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


def polish(red: Reduced, x: Tensor, a: Tensor, output: int, norm=inf) -> Tensor:
    """The witness [p] nearest to x among those with the activation pattern of the witness a [p]; a if the LP fails.

    The lecture's upper bound by fixing the binaries. A linear program for l-infinity and l1; for l2, a itself.
    """
    from scipy import sparse
    from scipy.optimize import linprog
    if norm not in (inf, 1):
        return a
    G, g = conditions(red, torch.where(red.inputs(a[None])[0] > 0, 1, -1).to(torch.int8), output)
    center, p = x.cpu().numpy(), len(x)
    up, down = np.flatnonzero(center < 1), np.flatnonzero(center > 0)   # where the box leaves room, d <= r and -d <= r
    eye = sparse.eye(p, format="csr")
    radius = sparse.csr_matrix(np.ones((p, 1))) if norm == inf else eye
    rows = sparse.bmat([[sparse.csr_matrix(-G), None], [eye[up], -radius[up]], [-eye[down], -radius[down]]], format="csr")
    right = np.concatenate([g + G @ center, np.zeros(len(up) + len(down))])
    k = radius.shape[1]
    limits = np.column_stack([np.append(-center, np.zeros(k)), np.append(1 - center, np.ones(k))])
    found = linprog(np.append(np.zeros(p), np.ones(k)), rows, right, bounds=limits, method="highs", options={"presolve": False})
    return a if found.x is None else (x + torch.as_tensor(found.x[:p]).to(x)).clamp(0, 1)


def leaf(red: Reduced, split: Tensor, output: int, region: Region, *, cuts: int = 30) -> tuple[Tensor, float, Tensor]:
    """With every sign given: the point [p] that comes nearest to being a witness, and multipliers (of the output, of the
    signs [units]) that prove that there is none, if there is none.

    The linear program min t with G a + g + t >= 0 always has a solution; its dual is the certificate. A ball that is no
    box is cut out of its box by tangents, one a round, where the last point left it.
    """
    from scipy.optimize import linprog
    G, g = conditions(red, split, output)
    rows, right = [np.append(row, 1.0) for row in -G], list(g)
    for row in rows:
        row[-1] = -1.0
    limits = np.column_stack([np.append(region.lower.cpu().numpy(), -inf), np.append(region.upper.cpu().numpy(), inf)])
    point, weights = (region.lower + region.upper) / 2, np.zeros(len(g))
    for _ in range(cuts):
        found = linprog(np.append(np.zeros(G.shape[1]), 1.0), np.array(rows), np.array(right), bounds=limits, method="highs")
        if found.x is None:
            break
        point, weights = torch.as_tensor(found.x[:-1]).to(red.lower), -found.ineqlin.marginals[:len(g)]
        if region.center is None or (away := threat.distance(point[None], region.center[None], region.norm)[0]) <= region.eps:
            break
        step = (point - region.center).cpu().numpy()
        tangent = step / away.item() if region.norm == 2 else np.sign(step)
        rows.append(np.append(tangent, 0.0))
        right.append(region.eps + tangent @ region.center.cpu().numpy())
    return point, max(0.0, weights[-1]), torch.as_tensor(weights[:-1]).clamp_min(0).to(red.lower)

"""The lecture's mixed-integer program in CVXPY, line by line: readable first, any CVXPY solver.

    min ‖a − x‖   subject to   h = W a + β,  z = max(h, 0),  s = V z + γ,  max_{k≠y} s_k ≥ s_y + α,  a ∈ [0, 1]^p

`exact` solves the same problems faster, one target at a time and without a modelling layer.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from advcourse import threat
from advcourse.certify.layers import Affine, MaxPool, Relu
from advcourse.certify.network import network

OBJECTIVES = ("distortion", "margin", "feasibility")
TIME_LIMIT: dict[str, Callable[[float], dict[str, Any]]] = {      # how each solver spells "stop after t seconds"
    "HIGHS": lambda t: {"time_limit": float(t)},
    "SCIP": lambda t: {"scip_params": {"limits/time": float(t)}},
    "GLPK_MI": lambda t: {"glpk": {"msg_lev": "GLP_MSG_OFF", "tm_lim": max(1, int(1000 * t))}},
    "SCIPY": lambda t: {"scipy_options": {"time_limit": float(t)}},
    "GUROBI": lambda t: {"TimeLimit": float(t)},
}

# Tighter than SCIP's default 1e-6, which would be the error of d²; tighter still, and the tangents it lays against the
# cone may never close the gap. Pass scip_params to choose differently.
SCIP = {"numerics/feastol": 1e-7, "limits/gap": 1e-6, "limits/absgap": 1e-8}


def encode(model, x, y, *, norm=inf, target=None, eps=None, objective="distortion", bounds: Any = "interval",
           confidence=0.0, fix_stable=True) -> cp.Problem:
    """The three formal problems for one image as a `cvxpy.Problem`, exact whenever the bounds hold for every feasible a.

    model: an nn.Sequential or a `Network`; x: one image in [0, 1], [*shape] or [1, *shape]; y: its class.
    objective "distortion" (problem 1) minimises ‖a − x‖: the value is d for l-infinity and l1 (MILP), d² for norm 2
    (MIQP), the number of changed pixels for norm 0 (MILP, one more binary a pixel). "margin" (problem 2) minimises
    s_y − max_k s_k over the ball of radius eps. "feasibility" (problem 3) has no objective: infeasible means robust.
    target: one class to reach; None: any class but y (one binary a class chooses). The winner needs s_k ≥ s_y + confidence (α).
    Problems 1 and 3 accept ties at confidence 0: a program cannot say ">".
    bounds of every hidden pre-activation: a method of `certify.bounds` run over ball ∩ box, a list of intervals, or
    one number M for −M ≤ h ≤ M, which is trusted: an M too small gives wrong answers. fix_stable sets the binary of
    a neuron whose bounds do not contain 0.
    Variables in `problem.var_dict`: a, h, z, b, s (h1, z1, b1, h2, … with several hidden layers; max-pooling has z and b).
    ValueError: unknown objective or norm, an image or label that does not fit, target = y, eps missing or negative.
    Source: lomuscio2017approach, fischetti2018deep, tjeng2019evaluating.
    """
    net, x, y = _check(model, x, y, norm, target, eps, objective, confidence)
    intervals = _intervals(net, x, eps, norm, bounds)
    hidden = sum(not isinstance(layer, Affine) for layer in net.layers)
    pixels = x.double().flatten().numpy()

    a = cp.Variable(net.units, name="a")                            # the adversarial example, in the box
    rules: list[Any] = [a >= 0, a <= 1]
    h = z = a
    k = 0
    for layer in net.layers:
        if isinstance(layer, Affine):                               # h = W z + β
            W, beta = (part.numpy() for part in layer.dense())
            h = cp.Variable(len(beta), name="s" if layer is net.output else _name("h", k, hidden))
            rules += [h == sp.csr_array(W) @ z + beta]
            continue
        l, u = intervals[k]
        shape = layer.index.shape if isinstance(layer, MaxPool) else (len(l),)
        b = cp.Variable(shape, boolean=True, name=_name("b", k, hidden))
        z = cp.Variable(shape[0], name=_name("z", k, hidden))
        rules += maximum(h, z, b, l, u, layer.index.numpy()) if isinstance(layer, MaxPool) else relu(h, z, b, l, u)
        if fix_stable and isinstance(layer, Relu):
            rules += [b[stable] == phase for phase, stable in ((1, l >= 0), (0, (u <= 0) & (l < 0))) if stable.any()]
        h, k = z, k + 1

    s, m = h, cp.Variable(name="margin")                            # m = s_y − s_k for the class k that is chosen
    rules += beats(s, m, y, target, *intervals[-1])
    cost, more = distance(a, pixels, norm)
    rules += more
    if eps is not None:
        rules += [cost <= eps] if norm != 2 else [cp.norm(a - pixels, 2) <= eps]
    if objective == "margin":
        return cp.Problem(cp.Minimize(m), rules)
    return cp.Problem(cp.Minimize(cost if objective == "distortion" else 0), [*rules, m <= -confidence])


def relu(h, z, b, l, u) -> list:
    """z = max(h, 0) for l <= h <= u: b = 0 leaves z = 0 and h <= 0, b = 1 leaves z = h >= 0."""
    l, u = np.minimum(l, 0), np.maximum(u, 0)
    return [z >= 0, z <= cp.multiply(u, b), z <= h - cp.multiply(l, 1 - b), z >= h]


def maximum(h, z, b, l, u, index) -> list:
    """z_i = the largest h over row i of `index` [out, k]: b [out, k] says which one, the others are at most z."""
    rules = [cp.sum(b, axis=1) == 1]
    top = u[index].max(1)
    for j, unit in enumerate(index.T):
        rules += [z >= h[unit], z <= h[unit] + cp.multiply(top - l[unit], 1 - b[:, j])]
    return rules


def beats(s, m, y, target, l, u) -> list:
    """m = s_y − s_target, or m >= s_y − s_k for one class k that a binary chooses: m <= 0 says that y does not win alone."""
    if target is not None:
        return [m == s[y] - s[target]]
    others = np.delete(np.arange(len(l)), y)
    M = u[y] - l[others] + u[others].max() - l[y]                   # no class that is not chosen constrains m
    t = cp.Variable(len(others), boolean=True, name="t")
    return [cp.sum(t) == 1, m >= s[y] - s[others] - cp.multiply(M, 1 - t), m >= l[y] - u[others].max()]


def distance(a, x, norm) -> tuple[Any, list]:
    """‖a − x‖ and the constraints it needs: squared for norm 2, the number of pixels allowed to change for norm 0."""
    if norm == 0:
        c = cp.Variable(len(x), boolean=True, name="c")             # c_i = 0: pixel i keeps its value
        return cp.sum(c), [a - x <= cp.multiply(1 - x, c), x - a <= cp.multiply(x, c)]
    if norm == 2:
        return cp.sum_squares(a - x), []
    r = cp.Variable(len(x) if norm == 1 else 1, name="r")           # the largest |a_i − x_i|, or one for each pixel
    return cp.sum(r), [a - x <= r, x - a <= r]


def solve(problem: cp.Problem, *, solver: str | None = None, time_limit: float | None = None, **options) -> str:
    """Solve and answer "optimal", "infeasible" or "unknown" (out of time, or a status that proves nothing).

    solver: a name of `cvxpy.installed_solvers()`; None takes HiGHS, or SCIP for norm 2. Seconds for time_limit. The
    answer is the solver's, in its floats and tolerances: replay `problem.var_dict["a"].value` before you believe it.
    ValueError: the solver is not installed, does not take such a problem, or cannot be given a time limit.
    """
    args = [problem.objective.expr, *(arg for c in problem.constraints for arg in c.args)]
    name = (solver or ("HIGHS" if all(arg.is_pwl() for arg in args) else "SCIP")).upper()
    if time_limit is not None:
        if name not in TIME_LIMIT or not time_limit > 0:
            raise ValueError(f"time_limit={time_limit!r}: {name} takes none here, or it is not a positive number")
        options = {**TIME_LIMIT[name](time_limit), **options}
    if name == "HIGHS":
        options = {"mip_rel_gap": 1e-6} | options                   # its default is 1e-4
    if name == "SCIP":
        options["scip_params"] = SCIP | options.get("scip_params", {})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")      # "unknown" says it
            problem.solve(solver=name, **options)
    except cp.error.SolverError as error:
        if "not installed" in str(error):
            have = ", ".join(sorted(cp.installed_solvers()))
            raise ValueError(f"solver={name!r} is not installed; here are {have}") from error
        if "cannot solve this problem" in str(error):
            raise ValueError(f"solver={name!r} does not take this kind of problem (quadratic, with integers)") from error
        return "unknown"
    if name == "SCIP" and (problem.solver_stats.extra_stats or {}).get("scip_status") == "gaplimit":
        return "optimal"                                            # as good as SCIP's parameters asked for
    return {cp.OPTIMAL: "optimal", cp.INFEASIBLE: "infeasible"}.get(problem.status, "unknown")


def _name(letter: str, k: int, hidden: int) -> str:
    return letter if hidden == 1 else f"{letter}{k + 1}"


def _check(model, x, y, norm, target, eps, objective, confidence):
    """The network, x as [1, *shape] and y as an int; ValueError names what is wrong."""
    threat.check_norm(norm)
    y, target = int(y), None if target is None else int(target)
    net = network(model, getattr(model, "input_shape", x.shape[1:] if len(x) == 1 and x.dim() > 1 else x.shape))
    if x.numel() != net.units:
        raise ValueError(f"x has shape {list(x.shape)}: one image of shape {list(net.input_shape)} is needed")
    x = x.detach().cpu().reshape(1, *net.input_shape)
    threat.check_images(x)
    for name, label in {"y": y, "target": target}.items():
        if label is not None and not 0 <= label < net.classes:
            raise ValueError(f"{name}={label} is not a class: 0 to {net.classes - 1}")
    if target == y:
        raise ValueError(f"target={target} is the class y itself")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
    if eps is None and objective != "distortion":
        raise ValueError(f"eps=None: the objective {objective!r} needs a ball")
    if eps is not None:
        threat.check_eps(eps)
    if not 0 <= confidence < inf:
        raise ValueError(f"confidence={confidence!r} is not one: it must be 0 or more")
    return net, x, y


def _intervals(net, x, eps, norm, method) -> list[tuple[np.ndarray, np.ndarray]]:
    """(l, u) of every hidden pre-activation, then of the logits, as arrays."""
    from advcourse.certify.bounds import bounds
    ball = {"eps": 1.0, "norm": inf} if eps is None else {"eps": eps, "norm": norm}
    found = bounds(net, x, method=method if isinstance(method, str) else "interval", **ball)
    pairs = [(np.asarray(l, dtype=float).ravel(), np.asarray(u, dtype=float).ravel()) for l, u in found]
    if isinstance(method, (int, float)):
        if not method > 0:
            raise ValueError(f"bounds={method!r} is not a big M: it must be positive")
        return [*((np.full_like(l, -method), np.full_like(u, method)) for l, u in pairs[:-1]), pairs[-1]]
    if isinstance(method, str):
        return pairs
    given = [(np.asarray(l, dtype=float).ravel(), np.asarray(u, dtype=float).ravel()) for l, u in method]
    if [len(l) for l, _ in given] != [len(l) for l, _ in pairs]:
        raise ValueError(f"bounds has {[len(l) for l, _ in given]} units a layer, needs {[len(l) for l, _ in pairs]}")
    return given

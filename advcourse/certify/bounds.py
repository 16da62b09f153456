"""Sound bounds on a network over a ball cut by the box: what goes in is images, what comes out may be quoted.

Methods, from the cheapest: "interval", "crown", "alpha-crown", "lp" (one linear program a neuron), "mip" (the same with
the ReLUs kept exact). All are sound; "crown" and "interval" are not ordered, so every method is intersected with intervals.
Arithmetic: float64 with a small outward margin, not directed rounding; a NaN never proves anything.
"""
from __future__ import annotations

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.certify.crown import crown, interval, lower_bound, propagate
from advcourse.certify.domain import Domain, domain
from advcourse.certify.layers import Network, Relu
from advcourse.certify.network import network
from advcourse.threat import Interval

METHODS = ("interval", "crown", "alpha-crown", "lp", "mip")
STEPS = 20          # gradient steps of α-CROWN


def bounds(model: nn.Module | Network, x: Tensor, *, eps, norm=inf, method: str = "crown",
           time_limit: float | None = None) -> list[Interval]:
    """What enters each ReLU (and maximum), then the logits, over {a in [0, 1]^p : ‖a − x‖ <= eps}, for each image.

    x [n, *shape] in the box; eps a number or [n]. Returns a list of Interval, two float64 tensors [n, units] each; every
    value that the network (in real arithmetic) takes in the set lies inside. "mip" is exact up to the solver's
    tolerances unless `time_limit` (seconds for each program) cuts it short, which leaves a wider, still sound interval.
    ValueError: bad x, eps, norm, method, or a layer that `network` refuses. gowal2018effectiveness (interval),
    zhang2018efficient (crown), xu2021fast (alpha-crown), ehlers2017formal (lp), tjeng2019evaluating (mip).
    """
    net = _checked(model, x, method)
    parts = [_bounds(net, d, method, time_limit) for _, d in _parts(net, x, eps, norm)]
    return [Interval(torch.cat([b.lower for b in layer]), torch.cat([b.upper for b in layer]))
            for layer in zip(*parts, strict=True)]


def margin_bounds(model: nn.Module | Network, x: Tensor, y: Tensor, *, eps, norm=inf, method: str = "crown",
                  time_limit: float | None = None) -> Tensor:
    """Lower bounds [n, classes] of f_y − f_k over {a in [0, 1]^p : ‖a − x‖ <= eps}, inf at k = y.

    The difference is bounded directly, not from bounds on the two logits. A positive entry proves that class k wins
    nowhere in the set. Other arguments and errors as for `bounds`.
    """
    net = _checked(model, x, method)
    threat.check_labels(y, len(x), net.classes)
    eye = torch.eye(net.classes, dtype=torch.float64, device=x.device)
    out = []
    for part, d in _parts(net, x, eps, norm):
        C = eye[y[part]][:, None] - eye                       # row k is e_y − e_k
        least = _margins(net, C, d, method, time_limit)
        out.append(torch.where(eye[y[part]] > 0, inf, least))
    return torch.cat(out)


def margin_bound(model: nn.Module | Network, x: Tensor, y: Tensor, *, eps, norm=inf, method: str = "crown",
                 time_limit: float | None = None) -> Tensor:
    """Lower bound [n] of min over k ≠ y of f_y − f_k in the ball: positive means certified. See `margin_bounds`."""
    return margin_bounds(model, x, y, eps=eps, norm=norm, method=method, time_limit=time_limit).amin(1)


def certified_radius(model: nn.Module | Network, x: Tensor, y: Tensor, *, norm=inf, method: str = "crown",
                     tolerance: float = 1e-3) -> Tensor:
    """A radius [n] within which no adversarial example lies, so a lower bound on the minimal distortion d*.

    Bisection on eps, every image on its own, until the radius that `margin_bound` proves and one that it does not prove
    are within `tolerance` of each other (relative; for norm 0: neighbouring integers). 0 where x itself is not
    classified y, inf where the whole box is proved. Errors as for `bounds`.
    """
    net = _checked(model, x, method)
    threat.check_labels(y, len(x), net.classes)
    threat.check_norm(norm)
    top = {inf: 1.0, 2: net.units ** 0.5, 1: float(net.units), 0: float(net.units)}[norm]

    def proved(eps: Tensor, who: Tensor) -> Tensor:
        return margin_bound(net, x[who], y[who], eps=eps, norm=norm, method=method) > 0

    everyone = torch.arange(len(x), device=x.device)
    good = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    bad = torch.full_like(good, top)
    good[proved(bad, everyone)] = inf
    bad[~proved(torch.zeros_like(good), everyone)] = 0
    smallest = 1.0 if norm == 0 else top * 1e-9
    while True:
        open_ = everyone[bad - good > (1 if norm == 0 else (tolerance * bad).clamp_min(smallest))]
        if not len(open_):
            return good
        low, high = good[open_], bad[open_]
        middle = torch.where(low > 0, (low + high) / 2, high / 8)       # first find the scale, then halve
        middle = middle.floor().clamp_min(1) if norm == 0 else middle
        yes = proved(middle, open_)
        good[open_] = torch.where(yes, middle, low)
        bad[open_] = torch.where(yes, high, middle)


def unstable(net: Network, intervals: list[Interval]) -> Tensor:
    """Number [n] of ReLUs whose input may have either sign in the set of `intervals`: each costs a binary variable."""
    lower = intervals[-1].lower
    total = torch.zeros(len(lower), dtype=torch.long, device=lower.device)
    for layer, box in zip(net.activations, intervals, strict=False):
        if isinstance(layer, Relu):
            total += ((box.lower < 0) & (box.upper > 0)).sum(1)
    return total


def _bounds(net: Network, d: Domain, method: str, time_limit: float | None) -> list[Interval]:
    if method == "interval":
        return interval(net, d)
    if method in ("lp", "mip"):
        from advcourse.certify.lp_bounds import solver_bounds
        return solver_bounds(net, d, exact=method == "mip", every=True, time_limit=time_limit)
    return crown(net, d, steps=STEPS if method == "alpha-crown" else 0, every=True)


def _margins(net: Network, C: Tensor, d: Domain, method: str, time_limit: float | None) -> Tensor:
    if method in ("lp", "mip"):
        from advcourse.certify.lp_bounds import solver_margins
        return solver_margins(net, C, d, exact=method == "mip", time_limit=time_limit)
    steps = STEPS if method == "alpha-crown" else 0
    known = interval(net, d) if method == "interval" else crown(net, d, steps=steps, logits=False)
    last = d
    if net.activations:                                       # the box of what enters the last affine map
        last = Domain(*propagate(net.layers[-2], known[len(net.activations) - 1]))
    least = lower_bound([net.output], C, [], last)
    if method != "interval":
        least = torch.fmax(least, lower_bound(net.layers, C, known, d, steps=steps))
    return least


def _checked(model: nn.Module | Network, x: Tensor, method: str) -> Network:
    threat.check_images(x)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose {', '.join(METHODS)}")
    return network(model, x.shape[1:])


def _parts(net: Network, x: Tensor, eps, norm) -> Iterator[tuple[Tensor, Domain]]:
    """The batch in parts that fit in memory: (indices, domain)."""
    widest = max(b.lower.shape[1] for b in interval(net, domain(x[:1], 0.0)))
    threat.check_eps(eps)
    eps = torch.as_tensor(eps, dtype=torch.float64, device=x.device).expand(len(x))
    for part in torch.arange(len(x), device=x.device).split(max(1, 2**18 // max(widest, net.units))):
        yield part, domain(x[part], eps[part], norm)

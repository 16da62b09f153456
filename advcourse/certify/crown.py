"""Linear bounds by backward substitution: interval arithmetic, CROWN and α-CROWN, batched over images.

A certificate bounds what enters each ReLU (or maximum) in turn. Interval arithmetic pushes a box forward. CROWN asks for
the minimum of a linear function of a layer, replaces each ReLU by a line that is on the right side of it, and so walks back
to the input, where the minimum over ball ∩ box is known. α-CROWN chooses the lower line's slope by gradient ascent.
Arithmetic: float64 with a small outward margin (`domain.ROUNDING`), not directed rounding. A NaN becomes −∞: it proves nothing.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advcourse.certify.domain import ROUNDING, Domain, dot
from advcourse.certify.layers import Affine, Layer, MaxPool, Network, Relu
from advcourse.threat import Interval

BUDGET = 2**20      # numbers in the largest array of one backward walk (8 MB); longer walks are done in parts


def propagate(layer: Layer, box: Interval) -> Interval:
    """The image of a box under one layer, as a box: w₊ᵀl − w₋ᵀu + β <= h <= w₊ᵀu − w₋ᵀl + β for an affine one."""
    if not isinstance(layer, Affine):
        return Interval(layer.apply(box.lower), layer.apply(box.upper))     # both are increasing
    middle, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    center, reach = layer.apply(middle), layer.abs_apply(radius)
    reach = reach + ROUNDING * (layer.abs_apply(middle.abs()) + layer.bias.abs() + reach)
    return Interval((center - reach).nan_to_num(nan=-torch.inf), (center + reach).nan_to_num(nan=torch.inf))


def interval(net: Network, domain: Domain) -> list[Interval]:
    """What enters each ReLU and maximum, then the logits, by interval arithmetic: a list of Interval [n, units]."""
    box, out = Interval(domain.lower, domain.upper), list[Interval]()
    for layer in net.layers:
        if not isinstance(layer, Affine):
            out.append(box)
        box = propagate(layer, box)
    return [*out, box]


def crown(net: Network, domain: Domain, *, steps: int = 0, every: bool = False, logits: bool = True) -> list[Interval]:
    """What enters each ReLU and maximum, then the logits, by CROWN (steps=0) or α-CROWN, never wider than by intervals.

    Units whose ReLU or maximum interval arithmetic has settled already are skipped unless `every`: a better bound on
    them would change nothing further on. With logits=False the list ends with the last activation.
    """
    box, out = Interval(domain.lower, domain.upper), list[Interval]()
    for i, layer in enumerate(net.layers):
        if not isinstance(layer, Affine):
            wanted = (undecided(layer, box) | every).any(0)
            box = tighten(net.layers[:i], box, out, domain, wanted, steps)
            out.append(box)
        box = propagate(layer, box)
    if logits:
        out.append(tighten(net.layers, box, out, domain, torch.ones_like(box.lower[0], dtype=torch.bool), steps))
    return out


def undecided(layer: Relu | MaxPool, box: Interval) -> Tensor:
    """Units [n, units] whose ReLU is not settled, or which are one of several that may be their window's maximum."""
    if isinstance(layer, Relu):
        return (box.lower < 0) & (box.upper > 0)
    l, u = box.lower[:, layer.index], box.upper[:, layer.index]
    contender = (u >= l.amax(-1, keepdim=True)) & ((u >= l.amax(-1, keepdim=True)).sum(-1, keepdim=True) > 1)
    out = torch.zeros_like(box.lower)
    out.scatter_reduce_(1, layer.index.flatten().expand(len(l), -1), contender.flatten(1).to(out), "amax")
    return out > 0


def tighten(layers: Sequence[Layer], box: Interval, known: list[Interval], domain: Domain, wanted: Tensor,
            steps: int = 0) -> Interval:
    """`box`, what interval arithmetic says of the chain's output, intersected with backward bounds for `wanted` units."""
    lower, upper = box.lower.clone(), box.upper.clone()
    if not wanted.any():
        return box
    widest = max([domain.lower.shape[1], *(b.lower.shape[1] for b in known)])
    part = max(1, BUDGET // (2 * len(lower) * widest))
    for units in wanted.nonzero()[:, 0].split(part):
        pick = torch.zeros(1, len(units), lower.shape[1], dtype=lower.dtype, device=lower.device)
        pick[0, torch.arange(len(units)), units] = 1
        least = lower_bound(layers, torch.cat([pick, -pick], 1), known, domain, steps=steps)
        lower[:, units] = torch.fmax(lower[:, units], least[:, :len(units)])
        upper[:, units] = torch.fmin(upper[:, units], -least[:, len(units):])
    return Interval(lower, upper)


def lower_bound(layers: Sequence[Layer], C: Tensor, known: Sequence[Interval], domain: Domain, *, steps: int = 0,
                rate: float = 0.25) -> Tensor:
    """Lower bounds [n, m] of C h over the domain, h the output of the chain `layers` and C [n | 1, m, units of h].

    `known` encloses what enters each ReLU and maximum of the chain. steps > 0 optimises the slopes, apart for every row of
    C, by Adam with step `rate` (α-CROWN); the best bound seen is returned, so it is never below that of steps=0.
    """
    best = backward(layers, C, known, domain)
    if not steps or not any(isinstance(layer, Relu) for layer in layers):
        return best
    n, m = best.shape
    alpha = [relu_lines(box)[0][:, None].repeat(1, m, 1).requires_grad_() for layer, box in _entries(layers, known)
             if isinstance(layer, Relu)]
    adam = torch.optim.Adam(alpha, lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            value = backward(layers, C, known, domain, alpha)
            best = torch.fmax(best, value.detach())
            adam.zero_grad()
            (-value.sum()).backward()
            adam.step()
            for a in alpha:
                a.data.clamp_(0, 1)
    return torch.fmax(best, backward(layers, C, known, domain, [a.detach() for a in alpha]))


def backward(layers: Sequence[Layer], C: Tensor, known: Sequence[Interval], domain: Domain,
             alpha: Sequence[Tensor] | None = None) -> Tensor:
    """One walk back: lower bounds [n, m] of C h over the domain; `alpha` are the ReLUs' lower slopes, [n, m, units] each."""
    A, known, slopes = C, list(known), None if alpha is None else list(alpha)
    constant = size = torch.zeros((), dtype=C.dtype, device=C.device)
    for layer in reversed(layers):
        if isinstance(layer, Affine):
            moved, A = A @ layer.bias, layer.back(A)
        else:
            box = known.pop()
            if isinstance(layer, MaxPool):
                A, moved = _over_maximum(layer, A, box)
            else:
                A, moved = _over_relu(A, box, slopes.pop() if slopes else None)
        constant, size = constant + moved, size + moved.abs()
    least, terms = domain.minimum(A)
    return (least + constant - ROUNDING * (terms + size)).nan_to_num(nan=-torch.inf)


def relu_lines(box: Interval) -> tuple[Tensor, Tensor, Tensor]:
    """(a, s, t), each [n, units], with a h <= relu(h) <= s h + t on the box; a is CROWN's choice of 0 or 1."""
    l, u = box
    on, unstable = (l >= 0).to(l.dtype), ~(l >= 0) & ~(u <= 0)      # NaN counts as unstable, and stays NaN
    s = torch.where(unstable, u / (u - l), on)
    return torch.where(unstable, (u > -l).to(l.dtype), on), s, torch.where(unstable, -s * l, 0)


def _over_relu(A: Tensor, box: Interval, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """A relu(h) >= A' h + moved: positive coefficients take the lower line, negative ones the upper line."""
    a, s, t = (v[:, None] for v in relu_lines(box))
    if slope is not None:
        a = torch.where(((box.lower < 0) & (box.upper > 0))[:, None], slope, a)
    positive, negative = A.clamp_min(0), A.clamp_max(0)
    return positive * a + negative * s, dot(negative, t[:, 0])


def _over_maximum(layer: MaxPool, A: Tensor, box: Interval) -> tuple[Tensor, Tensor]:
    """A max(h) >= A' h + moved: max(h) is at least the unit with the best lower bound, at most the largest upper bound."""
    l, u = box.lower[:, layer.index], box.upper[:, layer.index]     # [n, out, k]
    first = l.argmax(-1, keepdim=True)
    unit = layer.index.expand(len(l), -1, -1).gather(-1, first)[..., 0]
    rival = torch.where(layer.index == unit[..., None], -torch.inf, u).amax(-1)
    settled = l.gather(-1, first)[..., 0] >= rival
    positive, negative = A.clamp_min(0), A.clamp_max(0)
    kept = positive + torch.where(settled[:, None], negative, 0)
    back = torch.zeros(*kept.shape[:2], box.lower.shape[1], dtype=A.dtype, device=A.device)
    back.scatter_add_(-1, unit[:, None].expand(kept.shape), kept)
    return back, dot(negative, torch.where(settled, 0, u.amax(-1)))


def _entries(layers: Sequence[Layer], known: Sequence[Interval]) -> list[tuple[Layer, Interval]]:
    """The ReLUs and maxima of the chain, each with the box of what enters it."""
    return list(zip([layer for layer in layers if not isinstance(layer, Affine)], known, strict=False))

"""The geometry that attacks, certificates and trainers share: the ball around an image, cut by the box of valid images.

An image batch is a float tensor [n, *shape] with values in the box [0, 1]. A norm is one of `inf`, 2, 1, 0, and a ball
of radius `eps` holds the images whose `distance` to x is at most eps (for norm 0: at most eps values differ).
"""
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from advcourse import noise

NORMS = (inf, 2, 1, 0)


class Interval(NamedTuple):
    """Element-wise bounds: lower <= value <= upper, two tensors of the same shape."""

    lower: Tensor
    upper: Tensor


def _flat(v: Tensor, x: Tensor) -> Tensor:
    """A number or one number an image, [n], shaped to multiply an image batch."""
    return torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def check_norm(norm) -> None:
    """Raise ValueError unless norm is inf, 2, 1 or 0."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown: choose inf, 2, 1 or 0")


def check_images(x: Tensor, name: str = "x") -> None:
    """Raise ValueError unless x is a float batch [n, *shape] without NaN and inside the box [0, 1]."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        got = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is not a float tensor [n, *shape]: got {got}")
    if not x.numel():
        return
    low, high = map(float, x.aminmax())  # NaN if there is one
    if not isfinite(high - low):
        raise ValueError(f"{name} holds NaN or infinity in {int((~torch.isfinite(x)).flatten(1).any(1).sum())} image(s)")
    if low < 0 or high > 1:
        raise ValueError(f"{name} leaves the box [0, 1]: its values go from {low:.4g} to {high:.4g}")


def check_labels(y: Tensor, n: int, classes: int | None = None, name: str = "y") -> None:
    """Raise ValueError unless y is an int64 tensor [n] with values in 0..classes-1."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (n,):
        got = f"{y.dtype} of shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{name} is not an int64 tensor [{n}]: got {got}")
    if classes is not None and n and (y.min() < 0 or y.max() >= classes):
        raise ValueError(f"{name} has labels out of range 0..{classes - 1}: {y.min().item()} to {y.max().item()}")


def check_eps(eps, name: str = "eps") -> None:
    """Raise ValueError unless eps, a number or a tensor, is at least 0 and not NaN."""
    if not (bool((eps >= 0).all()) if isinstance(eps, Tensor) else eps >= 0):
        raise ValueError(f"{name}={eps!r} is not a radius: it must be 0 or more")


def distance(a: Tensor, x: Tensor, norm=inf) -> Tensor:
    """The distance ||a - x|| of every image, [n, *shape] -> [n]; norm 0 counts the values that differ."""
    check_norm(norm)
    d = (a - x).flatten(1)
    if norm == inf:
        return d.abs_().amax(1)
    if norm == 2:
        return d.norm(dim=1)
    return d.abs().sum(1) if norm == 1 else (d != 0).sum(1).to(x.dtype)


def project(a: Tensor, x: Tensor, eps, norm=inf) -> Tensor:
    """The point of (ball of radius eps around x) ∩ (box [0, 1]) that is nearest to a in Euclidean distance.

    Exact, not the usual "ball first, box second", which for l2 and l1 is nearer to x than it needs to be. x must lie
    in the box; eps is a number or one number an image, [n]. In real arithmetic; floats land within rounding of the
    sphere, and never outside the box.
    """
    check_norm(norm)
    e = _flat(eps, x)
    if norm == inf:
        return torch.minimum(torch.maximum(a, x - e), x + e).clamp(0, 1)
    d = (a - x).flatten(1)
    size, e = d.abs(), e.reshape(-1, 1)
    room = torch.where(d > 0, 1 - x.flatten(1), x.flatten(1))  # how far this coordinate may go in the direction of d
    if norm == 2:
        size = _shrink_l2(size, room, e)
    elif norm == 1:
        size = _shrink_l1(size, room, e)
    else:
        gain = size**2 - (size - torch.minimum(size, room)) ** 2  # what moving this coordinate is worth
        size = torch.minimum(size, room) * largest(gain, e)
    return (x + (d.sign() * size).reshape(x.shape)).clamp(0, 1)


def shrink(a: Tensor, x: Tensor, eps, norm=inf) -> Tensor:
    """Into the box, then into the ball: a clipped to [0, 1], then the point of the ball of radius eps around x nearest to it.

    It is in the box too, since every value comes nearer to x. Cheaper than `project`, the nearest point of both at once, and
    as far from x; where a is in the box, the same. x must lie in the box; eps is a number or one number an image, [n].
    """
    check_norm(norm)
    a, e = a.clamp(0, 1), _flat(eps, x)
    if norm == inf:
        return torch.minimum(torch.maximum(a, x - e), x + e)
    d, e = a.sub_(x).flatten(1), e.reshape(-1, 1)
    if norm == 2:
        d = d.mul_((e / d.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1))
    elif norm == 1:
        size = d.abs()
        d = d.sign() * (size - _threshold(size, e)).clamp_min(0)
    else:
        d = d * largest(d.abs(), e)
    return d.reshape(x.shape).add_(x)


def _threshold(size: Tensor, e: Tensor) -> Tensor:
    """The least t >= 0 with sum_i (size_i - t)+ <= e, [n, p], [n, 1] -> [n, 1], by Newton's method (duchi2008efficient).

    The sum is convex and falls in t: from the left no step passes the answer, and it ends there after finitely many.
    """
    t = torch.zeros_like(e.expand(len(size), 1))
    for _ in range(size.shape[1]):
        rest = (size - t).clamp_min_(0)
        rise = (rest.sum(1, keepdim=True) - e) / rest.sign_().sum(1, keepdim=True).clamp_min_(1)
        rising = rise > 1e-6 * t
        if not bool(rising.any()):
            break
        t = torch.where(rising, t + rise, t)
    return t


def largest(value: Tensor, count: Tensor) -> Tensor:
    """Mask of the floor(count) largest values of every row, [n, p], [n, 1] -> [n, p] bool; of equal ones the first."""
    k = count.floor().clamp(0, value.shape[1]).long().expand(len(value), 1)
    top = value.topk(max(1, int(k.max())) if len(k) else 0, dim=1).values
    limit = top.gather(1, (k - 1).clamp_min(0))
    above, at = value > limit, value == limit
    return above | (at & (at.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _level(rate: Tensor, cap: Tensor, goal: Tensor) -> Tensor:
    """The smallest t >= 0 with sum_i min(t rate_i, cap_i) >= goal, [n, p], [n, p], [n, 1] -> [n, 1]; inf where there is none.

    Newton's method. The sum is concave and piecewise linear in t, so from the left each step solves the current piece,
    never passes the answer, and ends on it after finitely many pieces.
    """
    t, open_ = torch.zeros_like(goal), torch.ones_like(goal, dtype=torch.bool)
    for _ in range(100):
        growing = t * rate < cap
        slope = (rate * growing).sum(1, keepdim=True)
        new = torch.where(goal > 0, (goal - (cap * ~growing).sum(1, keepdim=True)) / slope, 0)
        open_ = open_ & (new > t) & (new < inf)
        t = torch.where(new > t, new, t)
        if not bool(open_.any()):
            break
    return t


def _shrink_l2(size: Tensor, room: Tensor, e: Tensor) -> Tensor:
    """min(t size, room) with the largest t whose norm is at most e, or all of min(size, room) where that fits.

    Water-filling: solve for t as if no further coordinate met its room, find those that do, solve again; t only rises and the
    loop ends when no coordinate joins.
    """
    capped = torch.minimum(size, room)
    fits = capped.norm(dim=1, keepdim=True) <= e
    size2, room2, t = size**2, room**2, torch.zeros_like(e.expand(len(size), 1))
    for _ in range(size.shape[1] + 1):
        full = t * size >= room
        left = (e**2 - torch.where(full, room2, 0).sum(1, keepdim=True)).clamp_min(0)
        rise = (left / torch.where(full, 0, size2).sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).sqrt()
        if bool((fits | (rise <= t)).all()):
            break
        t = torch.maximum(t, rise)
    return torch.where(fits, capped, torch.minimum(t * size, room))


def _shrink_l1(size: Tensor, room: Tensor, e: Tensor) -> Tensor:
    """clip(size - t, 0, room) with the smallest t >= 0 whose sum is at most e (soft threshold; duchi2008efficient)."""
    capped = torch.minimum(size, room)
    fits = capped.sum(1, keepdim=True) <= e
    knots, order = torch.cat([size, (size - room).clamp_min(0)], 1).sort(1, descending=True)  # the sum is linear between
    change = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
    slope = change.gather(1, order).cumsum(1)  # how many coordinates follow t just below each knot
    total = torch.zeros_like(knots)
    total[:, 1:] = ((knots[:, :-1] - knots[:, 1:]) * slope[:, :-1]).cumsum(1)  # the sum at each knot
    k = ((total <= e).sum(1, keepdim=True) - 1).clamp_min(0)  # the last knot whose sum is still allowed
    t = knots.gather(1, k) - (e - total.gather(1, k)) / slope.gather(1, k).clamp_min(1)
    return torch.where(fits, capped, torch.minimum((size - t).clamp_min(0), room))


def inward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient without the components that would leave the box at once: those that push a 0 down or a 1 up."""
    moves = torch.add(x, gradient.sign(), alpha=0.5).clamp_(0, 1).ne_(x)  # 1 where such a step leads anywhere, else 0
    return gradient * moves


def steepest(gradient: Tensor, norm=inf, x: Tensor | None = None) -> Tensor:
    """The step of length one that raises a linear function most: the maximiser of <gradient, step> over ||step|| <= 1.

    Given x, the gradient is turned `inward` first: on digits most pixels are at 0 or 1, and a step that spends its length
    on them does not move. A zero gradient gives a zero step. For norm 0 one value moves,
    by the sign of its gradient.
    """
    check_norm(norm)
    if x is not None:
        gradient = inward(gradient, x)
    if norm == inf:
        return gradient.sign()
    g = gradient.flatten(1)
    if norm == 2:
        length = g.norm(dim=1, keepdim=True)
        if bool((length < 1e-15).any()):  # the squares may have underflowed: bring these to a largest component of one
            g = torch.where(length < 1e-15, g / g.abs().amax(1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny), g)
            length = g.norm(dim=1, keepdim=True)
        return (g / length.clamp_min(1e-15)).reshape(gradient.shape)
    step = torch.zeros_like(g)
    best = g.abs().argmax(1, keepdim=True)
    return step.scatter(1, best, g.gather(1, best).sign()).reshape(gradient.shape)


def linear_maximiser(gradient: Tensor, x: Tensor, eps, norm=inf) -> Tensor:
    """The image of ball ∩ box where the linear function <gradient, .> is largest: the best single step there is.

    Exact for every norm: l-infinity moves each value by eps, l2 runs along the gradient until the ball is met while values
    at the box stay there, l1 spends eps on the largest gradients first, l0 moves the floor(eps) values that gain most.
    """
    check_norm(norm)
    if norm == inf:
        return gradient.sign().mul_(_flat(eps, x)).add_(x).clamp_(0, 1)
    g, e = gradient.flatten(1), _flat(eps, x).reshape(-1, 1)
    room = torch.where(g > 0, 1 - x.flatten(1), x.flatten(1)) * (g != 0)
    g = g.abs() / g.abs().amax(1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    if norm == 2:
        t = _level(g**2, room**2, e**2).sqrt()
        size = torch.minimum(torch.where(g > 0, t * g, 0), room)
    elif norm == 1:
        order = g.argsort(dim=1, descending=True, stable=True)
        first = room.gather(1, order)
        spent = torch.minimum((e - (first.cumsum(1) - first)).clamp_min(0), first)
        size = torch.zeros_like(g).scatter(1, order, spent)
    else:
        size = room * largest(g * room, e)
    return (x + gradient.sign() * size.reshape(x.shape)).clamp(0, 1)


def nearest_beyond(gradient: Tensor, gap: Tensor, x: Tensor, norm=inf) -> Tensor:
    """The image z of the box nearest to x with <gradient, z - x> >= gap, [n]: the closed-form attack on a linear model.

    Exact for every norm. Where the box is too small to gain `gap` the result is the corner that gains most; where
    gap <= 0 it is x.
    """
    check_norm(norm)
    size, gap = gradient.flatten(1).abs(), gap.reshape(-1, 1)
    room = ((x + gradient.sign()).clamp(0, 1) - x).flatten(1).abs()
    finite = torch.finfo(x.dtype)
    if norm in (inf, 2):  # each value moves by min(t w, room): find t
        w = size if norm == 2 else size.sign()
        t = _level(size * w, size * room, gap)
        move = torch.minimum(t.clamp_max(finite.max) * w, room)
    else:  # the best values first, each to the end of its room, the last one as far as needed
        order = (size if norm == 1 else size * room).argsort(dim=1, descending=True, stable=True)
        g, r = size.gather(1, order), room.gather(1, order)
        done = (g * r).cumsum(1) - g * r
        spent = torch.minimum(((gap - done) / g.clamp_min(finite.tiny)).clamp_min(0), r)
        move = torch.zeros_like(size).scatter(1, order, spent)
    return (x + gradient.sign() * move.reshape(x.shape)).clamp(0, 1)


def sample(x: Tensor, eps, norm, seeds: Tensor, step: int = 0) -> Tensor:
    """A random image of ball ∩ box for every x: uniform in the ball, then clipped to the box.

    `seeds` [n] come from `noise.seeds(n, generator)`; the same seed and step give the same draw in any batch. For
    norm 0, floor(eps) values chosen at random become uniform in [0, 1].
    """
    check_norm(norm)
    e, p = _flat(eps, x).reshape(-1, 1), x.shape[1:].numel()
    if norm == inf:
        d = (2 * noise.uniform(seeds, p, step, x.dtype) - 1) * e
    elif norm == 0:
        chosen = largest(noise.uniform(seeds, p, 2 * step, x.dtype), e)
        d = (noise.uniform(seeds, p, 2 * step + 1, x.dtype) - x.flatten(1)) * chosen
    else:
        if norm == 2:
            d = noise.normal(seeds, p, 2 * step, x.dtype)
        else:  # signed exponentials are uniform on the l1 sphere once normalised
            u = noise.uniform(seeds, p, 2 * step, x.dtype) * 2 - 1
            d = u.sign() * -torch.log1p(-u.abs())
        radius = noise.uniform(seeds, 1, 2 * step + 1, x.dtype) ** (1 / p)
        d = d / d.norm(p=norm, dim=1, keepdim=True).clamp_min(1e-12) * radius * e
    return project(x + d.reshape(x.shape), x, eps, norm) if norm in (1, 2) else (x + d.reshape(x.shape)).clamp(0, 1)


def interval(x: Tensor, eps, norm=inf) -> Interval:
    """The smallest box that holds ball ∩ [0, 1]^p, element by element (for norm 0 with eps >= 1: the whole box)."""
    check_norm(norm)
    check_eps(eps)
    e = _flat(eps, x)
    if norm == 0:
        e = (e >= 1).to(x.dtype)
    return Interval((x - e).clamp(0, 1), (x + e).clamp(0, 1))

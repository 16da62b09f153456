"""Branch and bound on the inputs: for networks with a handful of them, such as those that advise aircraft.

A box of inputs is proved when CROWN's bound on every output is positive; else it is halved along the side that promises
most. Arithmetic as in `bounds`: float64 with a small outward margin.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcourse.certify.crown import crown, lower_bound
from advcourse.certify.domain import Domain
from advcourse.certify.layers import MaxPool, Network, Relu
from advcourse.certify.network import network
from advcourse.certify.question import Race
from advcourse.certify.reduced import Region
from advcourse.threat import Interval

BATCH = 512                 # boxes bounded at once
MIX, RATE = 8, 1.0          # gradient steps on the weights of a mixture, their size
PATIENCE, FEW = 1000, 60    # after so many boxes, those with few undecided ReLUs are decided by splitting ReLUs


class Boxes(NamedTuple):
    """What is known of n boxes of inputs."""

    value: Tensor       # [n, outputs], lower bounds
    worth: Tensor       # [n, p], of each side
    undecided: Tensor   # [n], number of ReLUs whose input may have either sign


def bound_boxes(net: Network, lower: Tensor, upper: Tensor) -> Boxes:
    """CROWN on boxes lower, upper [n, p].

    The worth of a side is its length times the derivative of the bounds that are not yet positive, through the relaxation of
    every unit: the first-order gain if the side shrank to a point. An output that is a maximum of rows (a last `MaxPool`)
    is bounded by the best mixture of them: any weights that sum to 1 are sound.
    """
    pool = net.layers[-2] if len(net.layers) > 2 and isinstance(net.layers[-2], MaxPool) else None
    rows = net if pool is None else Network(net.layers[:-2], net.input_shape)
    index = torch.arange(rows.classes)[:, None] if pool is None else pool.index
    sides = [lower.clone().requires_grad_(), upper.clone().requires_grad_()]
    with torch.enable_grad():
        domain = Domain(sides[0], sides[1])
        known = crown(rows, domain, logits=False)
        member = F.one_hot(index.to(lower.device), rows.classes).amax(1).bool()       # [outputs, rows]
        weights = _mixture(rows, [Interval(*(side.detach() for side in box)) for box in known], Domain(lower, upper), member)
        value = lower_bound(rows.layers, weights, known, domain)
        missing = value.clamp_max(0).sum()
        slopes = torch.autograd.grad(missing, sides) if missing < 0 else (torch.zeros_like(lower),) * 2
    relus = [box for layer, box in zip((a for a in rows.layers if isinstance(a, Relu | MaxPool)), known, strict=True)
             if isinstance(layer, Relu)]
    undecided = sum(((box.lower < 0) & (box.upper > 0)).sum(1) for box in relus) + torch.zeros(len(lower), dtype=torch.long)
    return Boxes(value.detach(), (slopes[0] - slopes[1]) * (upper - lower), undecided)


def _mixture(net: Network, known: list[Interval], domain: Domain, member: Tensor) -> Tensor:
    """Weights [n, outputs, rows] >= 0 that sum to 1, zero off `member`: the best single row, or better if found."""
    eye = torch.eye(net.classes, dtype=domain.lower.dtype, device=domain.lower.device)
    single = lower_bound(net.layers, eye[None], known, domain)[:, None].masked_fill(~member, -torch.inf)
    best, row = single.max(2)
    weights = eye[row]
    if int(member.sum(1).max()) == 1:
        return weights
    logit = 3 * single / best.abs()[..., None].clamp_min(1e-9)
    for _ in range(MIX):
        logit = logit.detach().requires_grad_()
        trial = torch.softmax(logit, 2)
        value = lower_bound(net.layers, trial, known, domain)
        weights = torch.where((value > best)[..., None], trial, weights).detach()
        best = torch.fmax(best, value.detach())
        slope, = torch.autograd.grad(value.sum(), logit)
        logit = logit + RATE * slope / slope.abs().amax(2, keepdim=True).clamp_min(1e-12)
    return weights


def halve(lower: Tensor, upper: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of each box along `side` [n]: first all lower ones, then all upper ones."""
    who = torch.arange(len(side), device=side.device)
    middle = (lower[who, side] + upper[who, side]) / 2
    left, right = upper.clone(), lower.clone()
    left[who, side], right[who, side] = middle, middle
    return torch.cat([lower, right]), torch.cat([left, upper])


def decide(net: Network, region: Region, race: Race, accept: Callable[[Tensor], bool],
           finish: Callable[[Region], str]) -> str:
    """As `branch.decide`, for a box of inputs: "robust", "falsified" or "unknown".

    `finish` decides a box by other means, once it is small: "unknown" if it cannot.
    """
    lower, upper = region.lower[None], region.upper[None]
    worst = lower.new_full((1,), -torch.inf)                # the bound of the box that each one came from
    while len(lower):
        if race.left == 0:
            return "unknown"
        order = worst.argsort(descending=True)              # nearly proved first: the list stays short
        now, later = order[:BATCH], order[BATCH:]
        l, u, known = lower[now], upper[now], bound_boxes(net, lower[now], upper[now])
        race.nodes += len(now)
        middle = (l + u) / 2
        least, row = net(middle).amin(1).min(0)
        if least <= 0 and accept(middle[row]):
            return "falsified"
        bad = ~(known.value > 0).all(1)                     # a NaN is bad
        small = bad & ((known.undecided <= FEW) if race.nodes > PATIENCE else (l == u).all(1))
        for i in small.nonzero()[:, 0].tolist():
            verdict = finish(Region(l[i], u[i]))
            if verdict != "robust":
                return verdict
        bad &= ~small
        l, u = halve(l[bad], u[bad], known.worth[bad].argmax(1))
        lower, upper = torch.cat([lower[later], l]), torch.cat([upper[later], u])
        worst = torch.cat([worst[later], known.value[bad].amin(1).repeat(2)])
    return "robust"


class AdvisoryMap(NamedTuple):
    """Boxes of inputs and which classes can win somewhere in each: what the plot of a policy is made of."""

    lower: Tensor       # [n, p]
    upper: Tensor       # [n, p]
    possible: Tensor    # [n, classes] bool: not shown impossible
    proved: Tensor      # [n] bool: exactly one class is possible, so that it wins everywhere in the box


def advisory_map(model: nn.Module | Network, lower: Tensor, upper: Tensor, *, smallest: Tensor,
                 sides: tuple[int, ...] | None = None) -> AdvisoryMap:
    """Cut the box lower <= a <= upper, [p] each, into boxes in which one class wins everywhere, as proved by CROWN.

    Boxes are halved until one class is left, or until all sides are at most `smallest` [p]: those cover the borders between
    the classes' regions. `sides`: the inputs to halve (all by default); the others stay whole, so that "wins" means for
    all their values. Every class that wins somewhere in a box is among its `possible` ones; the boxes fill the whole box.
    For the HorizontalCAS networks: `model, box = data.hcas(0, 5)`, fix the heading by lower[2] = upper[2], and ask for
    class 3, strong left, among `possible`. In float64 with a small outward margin. ValueError: an empty box, no side.
    """
    net = network(model, (len(lower),))
    low, high, smallest = (v.detach().double()[None] for v in (lower, upper, torch.as_tensor(smallest).expand(len(lower))))
    may = torch.zeros_like(low[0], dtype=torch.bool)
    may[list(range(len(lower)) if sides is None else sides)] = True
    may &= (high > low)[0]
    if not may.any() or not (low <= high).all() or not (smallest > 0).all():
        raise ValueError(f"lower={lower.tolist()}, upper={upper.tolist()}, smallest={smallest[0].tolist()}: nothing to halve")
    eye = torch.eye(net.classes, dtype=torch.float64, device=low.device)
    pairs = (eye[:, None] - eye)[None].reshape(1, -1, net.classes)          # row i c + k is e_i − e_k
    out: list[tuple[Tensor, ...]] = []
    while len(low):
        l, u = low[:BATCH], high[:BATCH]
        domain = Domain(l, u)
        beats = lower_bound(net.layers, pairs, crown(net, domain, logits=False), domain) > 0
        possible = ~beats.reshape(len(l), net.classes, net.classes).any(1)     # no class beats it everywhere
        too_long = (u - l) / smallest * may
        done = (possible.sum(1) == 1) | (too_long.amax(1) <= 1)
        out.append((l[done], u[done], possible[done], possible[done].sum(1) == 1))
        l, u = halve(l[~done], u[~done], too_long[~done].argmax(1))
        low, high = torch.cat([low[BATCH:], l]), torch.cat([high[BATCH:], u])
    return AdvisoryMap(*(torch.cat(column) for column in zip(*out, strict=True)))

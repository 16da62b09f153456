"""Branch and bound on ReLU phases with batched linear bounds: exact answers without a solver (bunel2020branch, wang2021beta).

A node is an output, to be proved positive, and signs imposed on some units. `dual` bounds a batch of nodes at a time; what
is not proved is split on the unit whose relaxation costs most. Where that does not get on, the outputs are taken one by one
and the units' bounds tightened under the condition that the output is <= 0 (`dual.squeeze`). A node with all signs known is
settled by a convex program, so that the search is complete, but for norm 0. Witnesses are replayed.
Arithmetic: float64 with a small outward margin, not directed rounding.
"""
from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.certify import splitting, witness
from advcourse.certify.certificate import Certificate
from advcourse.certify.dual import Bound, Nodes, ascend, bound, join, roots, squeeze
from advcourse.certify.layers import Affine, Matrix, Network
from advcourse.certify.presolve import presolve
from advcourse.certify.question import Question, Race, ask
from advcourse.certify.reduced import Reduced, Region, ball

BATCH = 256                     # nodes bounded at once
ROOT_STEPS, STEPS = 20, 4       # gradient steps on the multipliers, at a root and at each node
TRY, RETRY = 4000, 300          # nodes before the outputs are taken one by one, and before such a part is halved
SHRINK = 0.9                    # squeeze again while it leaves less than this share of the units
INPUTS = 8                      # up to so many inputs, splitting the box is better than splitting ReLUs


class Task:
    """A search for a witness in the region: `accept` says whether a point with an output <= 0 is one."""

    def __init__(self, red: Reduced, race: Race, accept: Callable[[Tensor], bool]) -> None:
        self.outputs, self.region, self.race, self.accept = red, red.region, race, accept
        self.found = self.doubt = False     # doubt: a leaf could be neither proved nor broken
        self.proved = inf                   # smallest bound of a node discarded as proved

    def over(self) -> bool:
        return self.found or self.race.left == 0

    def offer(self, points: Tensor) -> bool:
        """Look at points [n, p] that the relaxation suggests: True if one of them answers the question."""
        value, row = self.outputs(points).amin(1).min(0)
        self.found = self.found or (value.item() <= 0 and self.accept(points[row]))
        return self.found

    def report(self, red: Reduced, nodes: Nodes) -> None:
        """Told after every batch what is open."""

    def open(self, nodes: Nodes) -> Nodes:
        done = nodes.bound > 0              # never for a NaN
        self.proved = min([self.proved, *nodes.bound[done].tolist()])
        return nodes.select(~done)


def choose(red: Reduced, nodes: Nodes, b: Bound) -> Tensor:
    """The unit [n] to split in each node: the one whose chord costs most; −1 where all signs are known."""
    if not len(red.lower):
        return torch.full_like(nodes.row, -1)
    score = -b.coefficient.clamp_max(0) * b.intercept + 1e-9 * (red.upper - red.lower)
    worst, unit = torch.where(nodes.split == 0, score, -1).max(1)
    return torch.where(worst >= 0, unit, -1)


def halve(nodes: Nodes, unit: Tensor) -> Nodes:
    """The two children of each node: `unit` on, `unit` off; they inherit their parent's multipliers."""
    who, parts = torch.arange(len(unit), device=unit.device), []
    for sign in (1, -1):
        split = nodes.split.clone()
        split[who, unit] = sign
        parts.append(nodes._replace(split=split))
    return join(*parts)


def evaluate(red: Reduced, nodes: Nodes, region: Region) -> Bound:
    """The dual bound of every node, at its own slopes, splits and multipliers: a lower bound of its row over the region."""
    return bound(red, red.outputs.select(nodes.row), nodes.alpha, nodes.split, nodes.beta, region)


def search(red: Reduced, task: Task, pool: Nodes, limit: float) -> Nodes:
    """Best first from `pool`, for `limit` more nodes at most: the nodes still open then, or when the task is over."""
    limit += task.race.nodes
    while len(pool.row) and not task.over() and task.race.nodes < limit:
        order = pool.bound.argsort()
        nodes, pool = pool.select(order[:BATCH]), pool.select(order[BATCH:])
        b = evaluate(red, nodes, task.region)
        task.offer(b.point)
        unit = choose(red, nodes, b)
        for node in (unit < 0).nonzero()[:, 0].tolist():
            pool = join(pool, settle(red, task, nodes.select([node])))
        nodes, unit = nodes.select(unit >= 0), unit[unit >= 0]
        children = ascend(red, red.outputs, halve(nodes, unit), task.region, steps=STEPS)
        task.race.nodes += len(children.row)
        pool = join(pool, task.open(children))
        task.report(red, pool)
    return pool


def settle(red: Reduced, task: Task, node: Nodes) -> Nodes:
    """A node with all signs known: proved by the multipliers of a linear program (nothing is left), or broken; else in doubt."""
    point, weight, beta = witness.leaf(red, node.split[0], int(node.row), task.region)
    rows = red.outputs.select(node.row).times(point.new_full((1, 1), weight))
    if bound(red, rows, node.alpha, node.split, beta[None], task.region).value > 0:
        return node.select([])
    if task.offer(point[None]):
        return node                 # answered; or the ball has shrunk, and the node is to be proved in the smaller one
    task.doubt = True
    return node.select([])


def conquer(red: Reduced, task: Task) -> bool:
    """Prove every output positive, or find a witness: False if parts are still open when time is over."""
    pool = task.open(ascend(red, red.outputs, roots(red, red.outputs), task.region, steps=ROOT_STEPS))
    pool = search(red, task, pool, TRY)
    parts = [red.only(row) for row in pool.row.unique().tolist()]
    task.proved = min(task.proved, 0.0) if parts else task.proved       # what follows holds for witnesses only
    while parts and not task.over():
        part: Reduced | None = parts.pop()
        size = inf
        while part is not None and len(part.lower) < SHRINK * size:
            size, part = len(part.lower), squeeze(part, steps=ROOT_STEPS)
        if part is None:
            continue
        nodes = task.open(ascend(part, part.outputs, roots(part, part.outputs), task.region, steps=ROOT_STEPS))
        if len(search(part, task, nodes, RETRY).row):
            unit = int(choose(part, nodes, evaluate(part, nodes, task.region)))
            parts += [part.impose(unit, sign) for sign in (1, -1)]
    return not parts


def decide(net: Network, region: Region, race: Race, accept: Callable[[Tensor], bool]) -> str:
    """Is every output of `net` positive on the region? "robust", "falsified" (a point that `accept` took) or "unknown".

    accept(point [p]) is asked about points with an output <= 0. A lower bound on the smallest output goes to `race`.
    Networks with at most INPUTS inputs are decided by splitting the box of inputs, others by splitting ReLUs.
    """
    if region.center is None and net.units <= INPUTS:
        return splitting.decide(net, region, race, accept, lambda box: split_relus(net, box, race, accept)[0])
    verdict, lower = split_relus(net, region, race, accept)
    race.narrow(lower=lower)
    return verdict


def split_relus(net: Network, region: Region, race: Race, accept: Callable[[Tensor], bool]) -> tuple[str, float]:
    """The verdict, as for `decide`, and a lower bound on the smallest output."""
    red = presolve(net, region)
    value = bound(red, red.outputs).value
    lower, suspects = value.min().item(), (value <= 0).nonzero()[:, 0]
    if not len(suspects):
        return "robust", lower
    point, least = witness.attack(red, region, suspects)
    if least <= 0 and accept(point):
        return "falsified", lower
    task = Task(red, race, accept)
    done = conquer(red, task)
    if task.found:
        return "falsified", lower
    return ("robust", min(task.proved, *value[value > 0].tolist(), inf)) if done and not task.doubt else ("unknown", lower)


def margins(net: Network, y: int) -> Network:
    """The network with the outputs f_y − f_k, k ≠ y."""
    eye = torch.eye(net.classes, dtype=torch.float64, device=net.output.bias.device)
    C = eye[y] - eye[torch.arange(net.classes, device=eye.device) != y]
    last = Affine((*net.output.maps, Matrix(C)), C @ net.output.bias, net.output.in_units)
    return Network([*net.layers[:-1], last], net.input_shape)


def verify(model: nn.Module | Network, x: Tensor, y, *, eps: float, norm=inf, time_limit: float | None = None) -> Any:
    """Problem 3: is every image of the box within eps of x classified y? A `Certificate` ("robust", "falsified", "unknown").

    lower <= worst margin over the ball <= upper, loosely: only its sign is asked for. x: one image [*shape] with a number
    y, or a batch [n, *shape] with y [n], which gives a list (for n = 1: the one). Out of time (seconds) or interrupted:
    "unknown". Norm 0 (at most eps pixels change) is sound, fast and incomplete: bounds minimise over that ball exactly, but a
    leaf may end in doubt, "unknown". ValueError: bad x, y, norm, eps, or a layer that `network` refuses.
    """
    threat.check_norm(norm)
    threat.check_eps(eps)

    def answer(q: Question) -> Certificate:
        def accept(point: Tensor) -> bool:
            race.low_margin(q, point, float(eps), norm)
            return race.best is not None

        with Race("margin", -inf, time_limit, False) as race:
            if accept(q.flat):
                return race.certificate("falsified")
            return race.certificate(decide(margins(q.net, q.y), ball(q.flat, float(eps), norm), race, accept))
        return race.certificate("unknown")

    return ask(model, x, y, None, answer)


class Nearest(Task):
    """A search for ever nearer witnesses: the region is the ball slightly smaller than the best distance so far."""

    def __init__(self, q: Question, race: Race, norm, gap: float) -> None:
        self.q, self.race, self.norm, self.gap, self.x = q, race, norm, gap, q.flat
        self.net, self.reported = margins(q.net, q.y), 1
        outputs = torch.arange(self.net.classes, device=self.x.device)
        self._take(*witness.descend(self.net, self.x, self.x.expand(len(outputs), -1), outputs, norm))
        if race.upper == inf:
            race.witness(q.attack(norm, inf))
        while True:                             # the nearer the witness, the fewer the undecided units
            reach = min(race.upper, self._top)
            super().__init__(presolve(self.net, ball(self.x, reach, norm)), race, lambda point: False)
            self._polish()
            if race.upper >= 0.98 * reach:
                break
        self.region = ball(self.x, self.radius, norm)

    @property
    def _top(self) -> float:
        return {inf: 1.0, 2: sqrt(len(self.x)), 1: float(len(self.x))}[self.norm]

    @property
    def radius(self) -> float:
        """No witness within it: that is what is left to prove."""
        return min(self.race.upper * (1 - self.gap), self._top)

    def offer(self, points: Tensor) -> bool:
        value, output = self.outputs(points).min(1)
        near = value.argsort()[:4]
        near, before = near[value[near] <= 0], self.race.upper
        if len(near):
            self._take(*witness.descend(self.net, self.x, points[near], output[near], self.norm))
            self._take(threat.distance(points[near], self.x.expand_as(points[near]), self.norm), points[near])
            self._polish()
            self.region = ball(self.x, self.radius, self.norm)
        return self.race.upper < before

    def report(self, red: Reduced, nodes: Nodes) -> None:
        """A lower bound on the distance from the open nodes, whenever the tree has doubled: a node's linear bound has to
        reach 0 before a witness can be in it."""
        if red is self.outputs and self.race.nodes >= 2 * self.reported and len(nodes.row):
            self.reported = self.race.nodes
            b, x = evaluate(red, nodes, self.region), self.x.expand(len(nodes.row), -1)
            here = b.value + (b.A * (x - b.point)).sum(1)
            edge = threat.nearest_beyond(-b.A, here, x, self.norm)
            self.race.narrow(lower=min(threat.distance(edge, x, self.norm).min().item() * (1 - 1e-9), self.radius))

    def _take(self, distance: Tensor, points: Tensor) -> None:
        """Replay candidates, the nearest first, moved outwards a little where rounding asks for it."""
        for k in distance.argsort().tolist():
            for further in (0.0, 1e-6, 1e-5, 1e-4):
                if distance[k] * (1 + further) < self.race.upper and self.race.witness(
                        self.q.replay(self.x + (1 + further) * (points[k] - self.x), inf, self.norm)):
                    return

    def _polish(self) -> None:
        """Fix the activation pattern of the best witness and solve what is left: a linear program."""
        if self.race.best is not None:
            a = self.race.best.double().flatten()
            better = witness.polish(self.outputs, self.x, a, int(self.net(a[None]).argmin()), self.norm)[None]
            self._take(threat.distance(better, self.x[None], self.norm), better)


def minimal_distortion(model: nn.Module | Network, x: Tensor, y, *, norm=inf, gap: float = 1e-3,
                       time_limit: float | None = None) -> Any:
    """Problem 1: the distance from x to the nearest image of the box that is not classified y, as a bracket: a `Certificate`.

    upper is the distance of a replayed witness, lower is proved. "falsified": the two are within `gap` of each other,
    relative. "robust": there is no witness in the whole box, both are inf. "unknown": out of time (seconds), interrupted or
    in numerical doubt; the bracket holds nevertheless. One tree proves that no witness lies within (1 − gap) upper, and
    shrinks its ball when it meets a nearer one. Other arguments and errors as for `verify`.
    """
    _check_norm(norm)
    if not 0 < gap < 1:
        raise ValueError(f"gap={gap!r} is not a relative gap between 0 and 1")

    def answer(q: Question) -> Certificate:
        with Race("d*", 0.0, time_limit, False) as race:
            if race.witness(q.replay(q.flat)):
                return race.certificate("falsified", note="x itself is misclassified")
            task = Nearest(q, race, norm, gap)
            if not conquer(task.outputs, task) or task.doubt:
                return race.certificate("unknown")
            if race.upper == inf:
                return race.certificate("robust", inf, "no counterexample in the box")
            race.narrow(lower=task.radius)
            return race.certificate("falsified")
        return race.certificate("unknown")

    return ask(model, x, y, None, answer)


def _check_norm(norm) -> None:
    if norm not in (inf, 2, 1):
        raise ValueError(f"norm={norm!r} is not for branch and bound: choose inf, 2 or 1 (`verify` also takes 0)")

"""What `presolve` makes of a network on one region of inputs: its undecided ReLUs as rows of two dense matrices."""
from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advcourse import threat


class Region(NamedTuple):
    """{a : lower <= a <= upper}, all [p]; with a center also ‖a − center‖ <= eps, and then the box lies in [0, 1]."""

    lower: Tensor
    upper: Tensor
    center: Tensor | None = None
    eps: float = inf
    norm: float = inf

    def minimiser(self, A: Tensor) -> Tensor:
        """[n, p] -> [n, p]: for each row of A a point of the region where the linear function A a is smallest."""
        if self.center is None:
            return torch.where(A > 0, self.lower, self.upper)
        return threat.linear_maximiser(-A, self.center.expand_as(A), self.eps, self.norm)


def ball(x: Tensor, eps: float, norm=inf) -> Region:
    """The points of [0, 1]^p within eps of x [p]: a box if the norm is inf."""
    box = threat.interval(x[None], eps, norm)
    return Region(box.lower[0], box.upper[0], *(() if norm == inf else (x, eps, norm)))


class Rows(NamedTuple):
    """r affine functions W x + V h + b of pixels and units: [r, p], [r, units], [r]; slack [r]: rounding in b."""

    W: Tensor
    V: Tensor
    b: Tensor
    slack: Tensor

    def select(self, index) -> Rows:
        return Rows(*(part[index] for part in self))

    def plus(self, other: Rows, sign: int = 1) -> Rows:
        return Rows(self.W + sign * other.W, self.V + sign * other.V, self.b + sign * other.b, self.slack + other.slack)

    def times(self, factors: Tensor) -> Rows:
        """The combinations with non-negative `factors` [n, r], one a row."""
        return Rows(*(factors @ part for part in self))

    def negative(self) -> Rows:
        return Rows(-self.W, -self.V, -self.b, self.slack)

    def widen(self, units: int) -> Rows:
        """The same functions when there are more units."""
        return self._replace(V=F.pad(self.V, (0, units - self.V.shape[1])))


def stack(*parts: Rows) -> Rows:
    """The rows of all parts, one after the other."""
    return Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass
class Reduced:
    """A network on `region`: its undecided units, stage by stage (a unit reads earlier stages only), and its outputs.

    `split` [units] in {-1, 0, 1} restricts the region to the inputs where a unit is off, either, on.
    """

    region: Region
    units: Rows
    lower: Tensor           # [units], lower < 0 < upper
    upper: Tensor
    stages: list[slice]
    outputs: Rows
    split: Tensor           # [units] int8

    def __call__(self, x: Tensor) -> Tensor:
        """The network's outputs [n, outputs] at points x [n, p] of the region."""
        return x @ self.outputs.W.T + self.inputs(x).clamp_min(0) @ self.outputs.V.T + self.outputs.b

    def inputs(self, x: Tensor, slope: Tensor | None = None, intercept: Tensor | None = None) -> Tensor:
        """z [n, units] at x [n, p], with h = relu(z), or h = slope z + intercept where these are given."""
        direct = x @ self.units.W.T + self.units.b
        z, h = [direct[:, :0]], [direct[:, :0]]
        for s in self.stages:
            z.append(direct[:, s] + torch.cat(h, 1) @ self.units.V[s, :s.start].T)
            h.append(z[-1].clamp_min(0) if slope is None or intercept is None else slope[:, s] * z[-1] + intercept[:, s])
        return torch.cat(z, 1)

    def only(self, output: int) -> Reduced:
        """The same with one output."""
        return replace(self, outputs=self.outputs.select([output]))

    def impose(self, unit: int, sign: int) -> Reduced:
        """The part of the region where this unit is on (sign 1) or off (−1)."""
        split = self.split.clone()
        split[unit] = sign
        return replace(self, split=split)

    def substitute(self) -> Reduced:
        """Without the units that `lower` and `upper` have settled meanwhile; imposed signs stay."""
        on, off = self.lower >= 0, self.upper <= 0
        on, off = on & ~off & (self.split == 0), off & (self.split == 0)
        keep, stages, n = ~(on | off), [], 0
        for s in self.stages:
            size = int(keep[s].sum())
            if size:
                stages.append(slice(n, n + size))
            n += size

        def rewrite(rows: Rows) -> Rows:
            W, V, b, slack = rows
            for s in reversed(self.stages):
                c = V[:, s] * on[s]                         # h = z for these
                z = self.units.select(s)
                W, b, slack = W + c @ z.W, b + c @ z.b, slack + c.abs() @ z.slack
                V = V + c @ z.V
            return Rows(W, V[:, keep], b, slack)

        return Reduced(self.region, rewrite(self.units).select(keep), self.lower[keep], self.upper[keep], stages,
                       rewrite(self.outputs), self.split[keep])

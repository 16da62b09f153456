"""Presolve: a network on one region of inputs, rewritten with its undecided ReLUs only.

On a small region most ReLUs are stable: always on (the identity) or always off (zero). Substituting them leaves a short
list of undecided units whose inputs are affine in the pixels x and in the outputs h of undecided units of earlier stages,

    z = W x + V h + b,   h = relu(z),   lower <= z <= upper,

and each output of the network is such a row too. Convolutions, poolings and stable layers are gone: `branch` works with
two small dense matrices whatever the network was. The rewriting is exact on the region, up to rounding (`Rows.slack`).
"""
from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advcourse.certify.crown import propagate
from advcourse.certify.domain import ROUNDING
from advcourse.certify.dual import bound
from advcourse.certify.layers import Affine, Layer, MaxPool, Network, Relu
from advcourse.certify.reduced import Reduced, Region, Rows, stack
from advcourse.threat import Interval

CHUNK = 512     # rows pulled back at once: bounds the memory that a convolution's transpose takes


class _Step(NamedTuple):
    """How a layer's outputs read its inputs: Relu: `through` [n] is 1 where always on; MaxPool: the input [out] that each
    output starts from; and output places[i] also reads unit units[i], once."""

    layer: Layer
    width: int              # of the layer's input
    through: Tensor | None = None
    places: Tensor | None = None
    units: Tensor | None = None


class _Walk:
    """Forward through the layers, keeping the units found so far and what pulls a row of any layer back to them."""

    def __init__(self, region: Region) -> None:
        none = Rows(region.lower.new_zeros(0, len(region.lower)), *(region.lower.new_zeros(s) for s in ((0, 0), 0, 0)))
        self.red = Reduced(region, none, none.b, none.b, [], none, none.b.to(torch.int8))
        self.steps: list[_Step] = []

    def pull(self, A: Tensor) -> Rows:
        """A [r, n] over the current layer's n values -> the same functions of pixels and undecided units."""
        V, b, size = A.new_zeros(len(A), len(self.red.lower)), A.new_zeros(len(A)), A.new_zeros(len(A))
        for layer, width, through, places, units in reversed(self.steps):
            if isinstance(layer, Affine):
                b, size = b + A @ layer.bias, size + A.abs() @ layer.bias.abs()
                A = layer.back(A)
                continue
            assert through is not None and places is not None and units is not None
            V.index_add_(1, units, A[:, places])
            A = A * through if isinstance(layer, Relu) else A.new_zeros(len(A), width).index_add_(1, through, A)
        return Rows(A, V, b, ROUNDING * size)

    def pick(self, index: Tensor, n: int) -> Rows:
        """Single values of the current layer, of which there are n, as rows."""
        return stack(*(self.pull(F.one_hot(part, n).to(self.red.lower)) for part in index.split(CHUNK)))

    def settle(self, rows: Rows, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bounds on `rows` (CROWN ∩ the given ones), which of them stay undecided, and these rows' numbers as new units."""
        red, n = self.red, len(self.red.lower)
        lower = torch.fmax(lower, bound(red, rows).value)
        upper = torch.fmin(upper, -bound(red, rows.negative()).value)
        still = ((lower < 0) & (upper > 0)).nonzero()[:, 0]
        total = n + len(still)
        if len(still):
            red.stages.append(slice(n, total))
        red.units = stack(red.units.widen(total), rows.select(still).widen(total))
        red.lower, red.upper = torch.cat([red.lower, lower[still]]), torch.cat([red.upper, upper[still]])
        red.split = red.split.new_zeros(total)
        return lower, upper, still, torch.arange(n, total, device=lower.device)

    def relu(self, layer: Relu, box: Interval) -> Interval:
        l, u = box.lower.clone(), box.upper.clone()
        open_ = ((l < 0) & (u > 0)).nonzero()[:, 0]
        l[open_], u[open_], still, units = self.settle(self.pick(open_, len(l)), l[open_], u[open_])
        self.steps.append(_Step(layer, len(l), (l >= 0).to(l), open_[still], units))
        return Interval(l.clamp_min(0), u.clamp_min(0))

    def maximum(self, layer: MaxPool, box: Interval, floor: float) -> Interval:
        """max(a, b) = a + relu(b − a), one rival b after the other; what stays below `floor` need not be told apart."""
        l, u = box.lower[layer.index], box.upper[layer.index]
        best, first = l.max(1)
        through, n = layer.index.gather(1, first[:, None])[:, 0], len(box.lower)
        rivals = (u > best.clamp_min(floor)[:, None]) & (layer.index != through[:, None])
        places, units = through[:0], through[:0]
        for k in range(layer.index.shape[1]):
            windows = rivals[:, k].nonzero()[:, 0]
            if not len(windows):
                continue
            rival = layer.index[windows, k]
            rows = self.pick(rival, n).plus(self.pick(through[windows], n), -1)
            read = (places[None] == windows[:, None]).to(rows.V)           # units that the running maxima read
            rows.V.index_add_(1, units, -read)
            least, most = box.lower[rival] - u[windows].amax(1), box.upper[rival] - best[windows]
            lower, _, still, new = self.settle(rows, least, most)
            wins = windows[lower >= 0]                                     # the rival always wins: start from it
            through[wins] = layer.index[wins, k]
            keep = ~torch.isin(places, wins)
            places, units = torch.cat([places[keep], windows[still]]), torch.cat([units[keep], new])
        self.steps.append(_Step(layer, n, through, places, units))
        return Interval(best, u.amax(1))


def presolve(net: Network, region: Region) -> Reduced:
    """Rewrite `net` on `region` with its undecided units only; their bounds are interval arithmetic ∩ CROWN."""
    walk = _Walk(region)
    box = Interval(region.lower[None], region.upper[None])
    for i, layer in enumerate(net.layers):
        if isinstance(layer, Affine):
            box = propagate(layer, box)
            walk.steps.append(_Step(layer, layer.in_units))
            continue
        flat = Interval(box.lower[0], box.upper[0])
        if isinstance(layer, Relu):
            flat = walk.relu(layer, flat)
        else:
            flat = walk.maximum(layer, flat, 0.0 if isinstance(net.layers[i + 1], Relu) else -inf)
        box = Interval(flat.lower[None], flat.upper[None])
    walk.red.outputs = walk.pick(torch.arange(len(box.lower[0])), len(box.lower[0]))
    return walk.red

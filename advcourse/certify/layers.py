"""What a certificate sees of a network: a float64 chain of affine maps, ReLUs and maxima on [n, units]."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """h -> h Wᵀ with W = `weight` [out, in]."""

    weight: Tensor

    def apply(self, h: Tensor) -> Tensor:
        return h @ self.weight.T

    def back(self, A: Tensor) -> Tensor:
        return A @ self.weight


@dataclass(frozen=True)
class Conv:
    """Convolution of a flattened image: `weight` [c_out, c_in / groups, kh, kw], shapes (c, h, w)."""

    weight: Tensor
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def apply(self, h: Tensor) -> Tensor:
        image = h.reshape(-1, *self.in_shape)
        out = F.conv2d(image, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return out.reshape(*h.shape[:-1], -1)

    def back(self, A: Tensor) -> Tensor:
        image, size, kernel = A.reshape(-1, *self.out_shape), self.in_shape[1:], self.weight.shape[2:]
        covered = [(self.out_shape[1 + i] - 1) * self.stride[i] - 2 * self.padding[i]
                   + self.dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
        rest = [size[i] - covered[i] for i in (0, 1)]       # rows and columns that the stride never reaches
        out = F.conv_transpose2d(image, self.weight, None, self.stride, self.padding, rest, self.groups, self.dilation)
        return out.reshape(*A.shape[:-1], -1)


@dataclass(frozen=True)
class Affine:
    """h -> W h + bias, where W is the product of `maps` (the last one outermost; none: the identity)."""

    maps: tuple[Matrix | Conv, ...]
    bias: Tensor        # [out]
    in_units: int

    @property
    def out_units(self) -> int:
        return len(self.bias)

    def apply(self, h: Tensor) -> Tensor:
        """[n, in] -> [n, out]: W h + bias."""
        for m in self.maps:
            h = m.apply(h)
        return h + self.bias

    def back(self, A: Tensor) -> Tensor:
        """[…, out] -> […, in]: the rows of A W, by transposed convolutions (nothing is unrolled)."""
        for m in reversed(self.maps):
            A = m.back(A)
        return A

    def abs_apply(self, r: Tensor) -> Tensor:
        """[n, in] -> [n, out]: |W| r, or an upper bound of it where `maps` holds several convolutions."""
        for m in self._absolute:
            r = m.apply(r)
        return r

    @cached_property
    def _absolute(self) -> tuple[Matrix | Conv, ...]:
        return tuple(replace(m, weight=m.weight.abs()) for m in self.maps)

    def dense(self) -> tuple[Tensor, Tensor]:
        """(W [out, in], b [out]), unrolled once and kept."""
        return self._dense, self.bias

    @cached_property
    def _dense(self) -> Tensor:
        if len(self.maps) == 1 and isinstance(self.maps[0], Matrix):
            return self.maps[0].weight
        return self.back(torch.eye(self.out_units, dtype=self.bias.dtype, device=self.bias.device))


@dataclass(frozen=True)
class Relu:
    """h -> max(h, 0), unit by unit."""

    def apply(self, h: Tensor) -> Tensor:
        return h.clamp_min(0)


@dataclass(frozen=True)
class MaxPool:
    """h -> max over each row of `index` [out, k] (a window cut by the edge repeats one of its units)."""

    index: Tensor

    def apply(self, h: Tensor) -> Tensor:
        return h[..., self.index].amax(-1)


Layer = Affine | Relu | MaxPool


@dataclass(frozen=True)
class Network:
    """The chain f: it starts and ends with an `Affine`, never two in a row; float64 throughout."""

    layers: list[Layer]
    input_shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [n, classes] in float64, for x [n, *input_shape] or [n, units]."""
        return self.layers[-1].apply(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Input of the last affine map, [n, units]."""
        h = self.flat(x)
        for layer in self.layers[:-1]:
            h = layer.apply(h)
        return h

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """What each `Relu` and `MaxPool` receives, then the logits: the quantities that `bounds` encloses."""
        h, out = self.flat(x), []
        for layer in self.layers:
            if not isinstance(layer, Affine):
                out.append(h)
            h = layer.apply(h)
        return [*out, h]

    def flat(self, x: Tensor) -> Tensor:
        """x [n, *input_shape] -> float64 [n, units] on the network's device."""
        return x.to(self.output.bias).reshape(len(x), self.units)

    @property
    def activations(self) -> list[Relu | MaxPool]:
        """The ReLUs and maxima in order: bounds come one for each, and one more for the logits."""
        return [layer for layer in self.layers if not isinstance(layer, Affine)]

    @property
    def output(self) -> Affine:
        return self.layers[-1]  # type: ignore[return-value]

    @property
    def units(self) -> int:
        """Number of input units (pixels)."""
        return math.prod(self.input_shape)

    @property
    def classes(self) -> int:
        return self.output.out_units

    def dense_layers(self) -> list[tuple[Tensor, Tensor]]:
        """[(W, b), …] of an affine/ReLU chain, a ReLU between two pairs; ValueError if the network has a MaxPool."""
        if any(isinstance(layer, MaxPool) for layer in self.layers):
            raise ValueError("dense_layers: the network has a MaxPool layer, walk over network.layers instead")
        return [layer.dense() for layer in self.layers if isinstance(layer, Affine)]

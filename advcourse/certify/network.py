"""A trained `nn.Sequential` translated into the chain of `layers`.

Activations are flattened to [n, units]. A convolution stays a convolution (its transpose is `conv_transpose2d`); batch
normalisation, input normalisation and average pooling become part of the affine map beside them; `ReLU` followed by
`MaxPool2d` is turned into `MaxPool` followed by `Relu`, the same function with fewer ReLUs.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcourse.certify.layers import Affine, Conv, Layer, Matrix, MaxPool, Network, Relu

__all__ = ["Affine", "MaxPool", "Network", "Relu", "network"]


def network(model: nn.Module | Network, input_shape: Sequence[int]) -> Network:
    """Translate a model into a `Network`, or refuse it by name.

    Understands Linear, Conv2d, ReLU, MaxPool2d, AvgPool2d, Flatten, BatchNorm1d/2d and Dropout as in eval mode,
    Identity, nested Sequential, and a normalisation layer with `mean` and `std`. Guaranteed: the chain agrees with the
    model's own forward pass, in float64 and to 1e-9 of the logits' size, on random inputs. ValueError: another layer,
    a shape that does not fit, a parameter that is not finite. A `Network` is returned as it is.
    """
    shape = tuple(int(s) for s in input_shape)
    if isinstance(model, Network):
        if model.units != math.prod(shape):
            raise ValueError(f"input_shape: {shape} does not fit a network on {model.input_shape}")
        return model
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.isfinite().all():
            raise ValueError(f"model: {name} has values that are not finite")
    twin = copy.deepcopy(model).double().eval().requires_grad_(False)
    builder = _Builder(shape, next((p.device for p in twin.parameters()), torch.device("cpu")))
    for name, module in _flatten(twin, ""):
        builder.add(name, module)
    net = builder.finish()
    _check_agreement(net, twin)
    return net


def _flatten(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield prefix or type(module).__name__, module
        return
    for name, child in module.named_children():
        yield from _flatten(child, f"{prefix}.{name}" if prefix else name)


def _check_agreement(net: Network, twin: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, *net.input_shape, generator=generator, dtype=torch.float64)
    x = torch.cat([x, 3 * x[:2] - 1, torch.zeros_like(x[:1])]).to(net.output.bias.device)
    expected, actual = twin(x), net(x)
    gap = (expected - actual).abs().max() if expected.shape == actual.shape else torch.tensor(math.inf)
    if not gap <= 1e-9 * (1 + expected.abs().max()):
        raise ValueError(f"model: its forward pass and the translated network differ by {gap:.2e}")


class _Builder:
    """Collects layers; neighbouring affine maps share one `Affine`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.input_shape = self.shape = shape
        self.device = device
        self.layers: list[Layer] = []
        self._identity()

    def add(self, name: str, module: nn.Module) -> None:
        where = f"{name} ({type(module).__name__})"
        match module:
            case nn.Identity() | nn.Dropout() | nn.Dropout2d():
                pass
            case nn.Flatten() if module.start_dim == 1 and module.end_dim in (-1, len(self.shape)):
                self.shape = (math.prod(self.shape),)
            case nn.Linear():
                if self.shape != (module.in_features,):
                    raise ValueError(f"model: layer {where} expects ({module.in_features},), receives {self.shape}")
                self._affine(Matrix(module.weight), module.bias, (module.out_features,))
            case nn.Conv2d() if module.padding_mode == "zeros" and self._image(where, module.in_channels):
                padding = {"valid": (0, 0), "same": tuple(k // 2 for k in module.kernel_size)}.get(
                    str(module.padding), module.padding)
                self._conv(module.weight, module.bias, module.stride, padding, module.dilation, module.groups)
            case nn.BatchNorm1d() | nn.BatchNorm2d() if module.running_var is not None and module.running_mean is not None:
                scale = (module.running_var + module.eps).rsqrt()
                if module.weight is not None:
                    scale = scale * module.weight
                shift = -module.running_mean * scale
                self._scale(where, scale, shift if module.bias is None else shift + module.bias)
            case nn.AvgPool2d() if not module.ceil_mode and self._image(where):
                self._average(where, module)
            case nn.ReLU():
                if not isinstance(self.layers[-1], Relu):
                    self.layers.append(Relu())
            case nn.MaxPool2d() if not (module.ceil_mode or module.return_indices) and self._image(where):
                self._maximum(module)
            case nn.Module() if isinstance(getattr(module, "mean", None), Tensor) and hasattr(module, "std"):
                mean, std = (torch.as_tensor(v).to(torch.float64).flatten() for v in (module.mean, module.std))
                self._scale(where, 1 / std, -mean / std)
            case _:
                raise ValueError(f"model: cannot translate layer {where}")

    def finish(self) -> Network:
        if not isinstance(self.layers[-1], Affine):
            self._identity()
        if len(self.shape) != 1:
            raise ValueError(f"model: expected logits [n, classes], the last layer gives [n, {self.shape}]")
        return Network(self.layers, self.input_shape)

    def _image(self, where: str, channels: int | None = None) -> bool:
        if len(self.shape) != 3 or channels not in (None, self.shape[0]):
            expected = f"({channels or 'c'}, h, w)"
            raise ValueError(f"model: layer {where} expects {expected}, receives {self.shape}")
        return True

    def _identity(self) -> None:
        units = math.prod(self.shape)
        self.layers.append(Affine((), torch.zeros(units, dtype=torch.float64, device=self.device), units))

    def _affine(self, m: Matrix | Conv, bias: Tensor | None, shape: tuple[int, ...]) -> None:
        if not isinstance(self.layers[-1], Affine):
            self._identity()
        last: Affine = self.layers.pop()  # type: ignore[assignment]
        total = m.apply(last.bias) if bias is None else m.apply(last.bias) + bias
        maps = (*last.maps, m)
        if len(maps) > 1 and isinstance(maps[-2], Matrix) and isinstance(m, Matrix):
            maps = (*maps[:-2], Matrix(m.weight @ maps[-2].weight))
        self.layers.append(Affine(maps, total, last.in_units))
        self.shape = shape

    def _conv(self, weight: Tensor, bias: Tensor | None, stride, padding, dilation=(1, 1), groups: int = 1) -> None:
        stub = torch.zeros(1, *self.shape, dtype=torch.float64, device=weight.device)
        out = tuple(F.conv2d(stub, weight, None, stride, padding, dilation, groups).shape[1:])
        if bias is not None:
            bias = bias[:, None].expand(-1, math.prod(out[1:])).flatten()
        self._affine(Conv(weight, self.shape, out, stride, padding, dilation, groups), bias, out)

    def _scale(self, where: str, scale: Tensor, shift: Tensor) -> None:
        """One factor and one offset a channel: a 1 x 1 convolution of each channel alone, or a diagonal matrix."""
        channels = self.shape[0]
        if scale.numel() not in (1, channels) or len(self.shape) not in (1, 3):
            raise ValueError(f"model: layer {where} has {scale.numel()} channels, receives {self.shape}")
        scale, shift = scale.to(self.device).expand(channels), shift.to(self.device).expand(channels)
        last = self.layers[-1]
        if len(self.shape) == 1:
            self._affine(Matrix(scale.diag()), shift, self.shape)
        elif isinstance(last, Affine) and last.maps and isinstance(last.maps[-1], Conv):     # fold into that kernel
            kernel, each = last.maps[-1], math.prod(self.shape[1:])
            folded = replace(kernel, weight=kernel.weight * scale[:, None, None, None])
            bias = last.bias * scale.repeat_interleave(each) + shift.repeat_interleave(each)
            self.layers[-1] = Affine((*last.maps[:-1], folded), bias, last.in_units)
        else:
            self._conv(scale[:, None, None, None], shift, (1, 1), (0, 0), groups=channels)

    def _average(self, where: str, module: nn.AvgPool2d) -> None:
        (kh, kw), stride, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
        if padding != (0, 0) and not module.count_include_pad:
            raise ValueError(f"model: cannot translate layer {where} with count_include_pad=False")
        weight = torch.full((self.shape[0], 1, kh, kw), 1 / (module.divisor_override or kh * kw), dtype=torch.float64,
                            device=self.device)
        self._conv(weight, None, stride, padding, groups=self.shape[0])

    def _maximum(self, module: nn.MaxPool2d) -> None:
        kernel, stride, padding, dilation = (
            _pair(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation))
        numbers = torch.arange(1, math.prod(self.shape) + 1, dtype=torch.float64, device=self.device)
        windows = F.unfold(numbers.reshape(self.shape[0], 1, *self.shape[1:]), kernel, dilation, padding, stride)
        index = windows.transpose(1, 2).reshape(-1, math.prod(kernel)).long() - 1       # -1: in the padding
        index = torch.where(index < 0, index.amax(1, keepdim=True), index)
        reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
        size = [(self.shape[1 + i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
        relu = isinstance(self.layers[-1], Relu)
        if relu:                                        # max and ReLU commute: take the maximum first
            self.layers.pop()
        self.layers.append(MaxPool(index))
        if relu:
            self.layers.append(Relu())
        self.shape = (self.shape[0], *size)


def _pair(v) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else tuple(v)

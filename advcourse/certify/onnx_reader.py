"""Networks in ONNX, the exchange format of the verification competition, as an `nn.Sequential` that `network` understands."""
from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SKIP = ("Identity", "Dropout")


class Normalise(nn.Module):
    """(x − mean) / std, unit by unit."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def read_onnx(path: str | Path) -> tuple[nn.Sequential, tuple[int, ...]]:
    """(model, input shape without the batch) of an ONNX file, gzipped or not; parameters as stored, in eval mode.

    Understands a chain of Gemm, MatMul, Conv, Relu, MaxPool, AveragePool, BatchNormalization, Flatten, Reshape to a vector,
    and addition, subtraction, multiplication or division by constants. ValueError naming the file for anything else;
    ImportError if the package onnx (the extra advcourse[vnnlib]) is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("reading ONNX needs the package onnx: pip install 'advcourse[vnnlib]'") from error
    raw = Path(path).read_bytes()
    try:
        graph = onnx.load_model_from_string(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).graph
    except Exception as error:                              # protobuf's own exception, or gzip's
        raise ValueError(f"{path} is not an ONNX file: {error}") from error
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(f"{path}: a network with one input and one output is needed")
    shape = tuple(int(d.dim_value) for d in inputs[0].type.tensor_type.shape.dim)[1:]
    if not all(shape):
        raise ValueError(f"{path}: its input shape is not fixed: {shape}")
    chain, here = _Chain(), inputs[0].name
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            continue
        if here not in node.input or any(name not in constants for name in node.input if name not in (here, "")):
            raise ValueError(f"{path}: not a chain: {node.op_type} {node.name!r} reads {list(node.input)}")
        given = [None if name == here else constants[name] for name in node.input if name]
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        try:
            chain.add(node.op_type, given, options)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot translate {node.op_type} {node.name!r}: {error}") from error
        here = node.output[0]
    if here != graph.output[0].name:
        raise ValueError(f"{path}: the chain ends at {here!r}, not at the output")
    return nn.Sequential(*chain.modules).eval().requires_grad_(False), shape


class _Chain:
    """The modules so far."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def add(self, kind: str, given: list[Any], options: dict[str, Any]) -> None:
        if kind in SKIP:
            return
        if kind == "Relu":
            self.modules.append(nn.ReLU())
        elif kind in ("Flatten", "Reshape"):
            if options.get("axis", 1) != 1 or (kind == "Reshape" and len(given[1]) > 2):
                raise ValueError("only flattening to a vector")
            self.modules.append(nn.Flatten())
        elif kind in ("Add", "Sub", "Mul", "Div"):
            self.elementwise(kind, given)
        elif kind == "MatMul":
            weight = given[1].T if given[0] is None else given[0]       # x W, or W x with x as a column
            self.linear(weight, np.zeros(len(weight)))
        elif kind == "Gemm":
            if given[0] is not None or options.get("transA"):
                raise ValueError("the input must come first")
            weight = options.get("alpha", 1.0) * (given[1] if options.get("transB") else given[1].T)
            bias = given[2].ravel() if len(given) > 2 else np.zeros(1)
            self.linear(weight, options.get("beta", 1.0) * np.broadcast_to(bias, len(weight)))
        elif kind == "Conv":
            self.convolution(given, options)
        elif kind in ("MaxPool", "AveragePool"):
            size, stride, padding = _window(options, options["kernel_shape"])
            if options.get("ceil_mode"):
                raise ValueError("ceil_mode")
            if kind == "MaxPool":
                self.modules.append(nn.MaxPool2d(size, stride, padding, _pair(options.get("dilations", (1, 1)))))
            else:
                padded = bool(options.get("count_include_pad"))
                self.modules.append(nn.AvgPool2d(size, stride, padding, count_include_pad=padded))
        elif kind == "BatchNormalization":
            scale, shift, mean, var = (torch.tensor(v) for v in given[1:5])
            layer = nn.BatchNorm2d(len(scale), eps=options.get("epsilon", 1e-5)).to(scale)
            layer.load_state_dict({"weight": scale, "bias": shift, "running_mean": mean, "running_var": var,
                                   "num_batches_tracked": torch.tensor(0)})
            self.modules.append(layer)
        else:
            raise ValueError("unknown kind of node")

    def linear(self, weight: np.ndarray, bias: np.ndarray) -> None:
        if not any(isinstance(m, nn.Flatten | nn.Linear) for m in self.modules):
            self.modules.append(nn.Flatten())
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.tensor(weight).dtype)
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(np.array(bias))})
        self.modules.append(layer)

    def elementwise(self, kind: str, given: list[Any]) -> None:
        first = given[0] is None
        value = torch.tensor(np.asarray(given[1] if first else given[0])).flatten()
        if not first and kind in ("Sub", "Div"):
            raise ValueError("the constant must come second")
        shift = value if kind == "Add" else -value if kind == "Sub" else torch.zeros_like(value)
        scale = value if kind == "Mul" else 1 / value if kind == "Div" else torch.ones_like(value)
        last = self.modules[-1] if self.modules else None
        if kind in ("Add", "Sub") and isinstance(last, nn.Linear):
            last.bias = nn.Parameter(last.bias.detach() + shift)
        elif shift.any() or (scale != 1).any():
            if len(value) > 1:
                self.modules.append(nn.Flatten())
            self.modules.append(Normalise(-shift, 1 / scale))

    def convolution(self, given: list[Any], options: dict[str, Any]) -> None:
        weight = torch.tensor(given[1])
        bias = torch.tensor(given[2]) if len(given) > 2 else torch.zeros(len(weight), dtype=weight.dtype)
        size, stride, padding = _window(options, weight.shape[2:])
        groups = options.get("group", 1)
        layer = nn.Conv2d(weight.shape[1] * groups, len(weight), size, stride, padding,
                          _pair(options.get("dilations", (1, 1))), groups, dtype=weight.dtype)
        layer.load_state_dict({"weight": weight, "bias": bias})
        self.modules.append(layer)


def _pair(values) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _window(options: dict[str, Any], kernel) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    pads = options.get("pads", [0, 0, 0, 0])
    if len(kernel) != 2 or pads[:2] != pads[2:] or options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ValueError("only two-dimensional windows with the same padding on both sides")
    return _pair(kernel), _pair(options.get("strides", (1, 1))), _pair(pads[:2])

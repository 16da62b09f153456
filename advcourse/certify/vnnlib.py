"""Properties in VNN-LIB and their verdict, as the verification competition asks for it: `unsat`, `sat` and a counterexample,
`timeout` or `unknown`. A property lists the *unsafe* inputs and outputs: `unsat` means that there are none (brix2023first).
"""
from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advcourse.certify import branch
from advcourse.certify.layers import Affine, Matrix, MaxPool, Network
from advcourse.certify.network import network
from advcourse.certify.onnx_reader import read_onnx
from advcourse.certify.question import Race
from advcourse.certify.reduced import Region

Linear = dict[str, float]       # a linear expression: variable -> coefficient, "" -> constant


@dataclass(frozen=True)
class Unsafe:
    """One conjunction of a property: the inputs lower <= x <= upper, [p], with outputs A f(x) <= b, [m, classes], [m]."""

    lower: Tensor
    upper: Tensor
    A: Tensor
    b: Tensor


@dataclass(frozen=True)
class Verdict:
    """`unsat`, `sat` (then inputs [p] and outputs [classes] are a replayed counterexample), `timeout` or `unknown`."""

    name: str
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        """As the competition wants it printed."""
        if self.inputs is None or self.outputs is None:
            return self.name
        values = [f"(X_{i} {v!r})" for i, v in enumerate(self.inputs.tolist())]
        values += [f"(Y_{k} {v!r})" for k, v in enumerate(self.outputs.tolist())]
        return "\n ".join([self.name + "\n(" + values[0], *values[1:]]) + ")"


def read_vnnlib(path: str | Path, inputs: int, outputs: int) -> list[Unsafe]:
    """The property of a VNN-LIB 1.0 file, gzipped or not, as a disjunction of conjunctions.

    Every input needs both bounds. ValueError naming the file and the expression for anything that is not linear, mixes
    inputs and outputs, or names a variable that the network does not have.
    """
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text))
    cases: list[list[Linear]] = [[]]
    try:
        for expression in _parse(tokens):
            if expression[0] == "assert":
                cases = [case + more for case in cases for more in _disjunction(expression[1])]
        return [_unsafe(case, inputs, outputs) for case in cases]
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(tokens: list[str]) -> list[Any]:
    stack: list[list[Any]] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ValueError("a bracket closes that was not opened")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise ValueError("a bracket is not closed")
    return stack[0]


def _disjunction(e: Any) -> list[list[Linear]]:
    """An assertion as an OR of ANDs of conditions expression <= 0."""
    if e[0] == "or":
        return [case for part in e[1:] for case in _disjunction(part)]
    if e[0] == "and":
        cases: list[list[Linear]] = [[]]
        for part in e[1:]:
            cases = [case + more for case in cases for more in _disjunction(part)]
        return cases
    if e[0] not in ("<=", ">=") or len(e) != 3:
        raise ValueError(f"cannot read the condition {e}")
    left, right = _linear(e[1]), _linear(e[2])
    return [[_sum(left, right, -1.0)]] if e[0] == "<=" else [[_sum(right, left, -1.0)]]


def _sum(a: Linear, b: Linear, factor: float) -> Linear:
    return {name: a.get(name, 0.0) + factor * b.get(name, 0.0) for name in {**a, **b}}


def _linear(e: Any) -> Linear:
    if isinstance(e, str):
        return {e: 1.0} if re.fullmatch(r"[XY]_\d+", e) else {"": float(e)}
    parts = [_linear(part) for part in e[1:]]
    if e[0] == "+":
        total: Linear = {}
        for part in parts:
            total = _sum(total, part, 1.0)
        return total
    if e[0] == "-":
        return _sum({}, parts[0], -1.0) if len(parts) == 1 else _sum(parts[0], _linear(["+", *e[2:]]), -1.0)
    if e[0] == "*" and len(parts) == 2 and any(set(part) <= {""} for part in parts):
        number, other = parts if set(parts[0]) <= {""} else parts[::-1]
        return {name: number.get("", 0.0) * v for name, v in other.items()}
    raise ValueError(f"cannot read the expression {e}")


def _unsafe(case: list[Linear], inputs: int, outputs: int) -> Unsafe:
    lower, upper = torch.full((inputs,), -inf, dtype=torch.float64), torch.full((inputs,), inf, dtype=torch.float64)
    A, b = [], []
    for row in case:
        names, constant = [n for n, v in row.items() if n and v != 0], row.get("", 0.0)
        for n in names:
            if int(n[2:]) >= (inputs if n[0] == "X" else outputs):
                raise ValueError(f"the network has no variable {n}")
        if names and all(n[0] == "Y" for n in names):
            A.append(torch.tensor([row.get(f"Y_{k}", 0.0) for k in range(outputs)], dtype=torch.float64))
            b.append(-constant)
        elif len(names) == 1:                               # v x + constant <= 0
            i, v = int(names[0][2:]), row[names[0]]
            if v > 0:
                upper[i] = min(upper[i].item(), -constant / v)
            else:
                lower[i] = max(lower[i].item(), -constant / v)
        else:
            raise ValueError(f"a condition on several inputs, or on inputs and outputs: {names}")
    if not (lower.isfinite() & upper.isfinite()).all():
        raise ValueError("an input has no lower or no upper bound")
    rows = torch.stack(A) if A else torch.zeros(0, outputs, dtype=torch.float64)
    return Unsafe(lower, upper, rows, torch.tensor(b, dtype=torch.float64))


def safety_network(net: Network, cases: list[Unsafe]) -> Network:
    """One output a case, positive where the case does not hold: the largest of the rows A f − b."""
    A, b = torch.cat([case.A for case in cases]), torch.cat([case.b for case in cases])
    last = net.output
    layers = [*net.layers[:-1], Affine((*last.maps, Matrix(A)), A @ last.bias - b, last.in_units)]
    sizes, start, index = [len(case.b) for case in cases], 0, []
    for size in sizes:
        index.append([start + min(j, size - 1) for j in range(max(sizes))])
        start += size
    if max(sizes) > 1:
        zero = torch.zeros(len(cases), dtype=torch.float64)
        layers += [MaxPool(torch.tensor(index)), Affine((), zero, len(cases))]
    return Network(layers, net.input_shape)


def verify(onnx: str | Path, vnnlib: str | Path, *, time_limit: float | None = None) -> Verdict:
    """The verdict on a network and a property, both files; `time_limit` in seconds for the search.

    A counterexample counts when its outputs are unsafe both in float64 and in the model's own arithmetic. `unsat` holds
    in float64 with a small outward margin. ValueError and ImportError as from the two readers.
    """
    model, shape = read_onnx(onnx)
    net = network(model, shape)
    cases = read_vnnlib(vnnlib, net.units, net.classes)
    with Race("output", -inf, time_limit, False) as race:
        names = []
        for _, group in groupby(cases, key=lambda case: (case.lower.tolist(), case.upper.tolist())):
            names.append(_decide(model, net, list(group), race))
            if names[-1].name in ("sat", "timeout"):
                break
        return next((v for name in ("sat", "timeout", "unknown", "unsat") for v in names if v.name == name), Verdict("unsat"))
    return Verdict("unknown")


def _decide(model: nn.Sequential, net: Network, cases: list[Unsafe], race: Race) -> Verdict:
    """Cases over the same box of inputs."""
    lower, upper = cases[0].lower, cases[0].upper
    if (lower > upper).any():
        return Verdict("unsat", seconds=race.seconds)
    found: list[Verdict] = []
    dtype = next((p.dtype for p in model.parameters()), torch.float32)

    def unsafe(y: Tensor) -> bool:
        return any(bool((case.A @ y.double() <= case.b).all()) for case in cases)

    def accept(point: Tensor) -> bool:
        point = torch.minimum(torch.maximum(point, lower), upper)
        with torch.no_grad():
            y = model(point.to(dtype).reshape(1, *net.input_shape))[0]
        if unsafe(y) and unsafe(net(point[None])[0]):
            found.append(Verdict("sat", point, y, race.seconds))
        return bool(found)

    if any(not len(case.b) for case in cases):              # every output is unsafe
        if accept(lower):
            return found[0]
        return Verdict("unknown")
    answer = branch.decide(safety_network(net, cases), Region(lower, upper), race, accept)
    if answer == "falsified":
        return found[0]
    name = "unsat" if answer == "robust" else "timeout" if race.left == 0 else "unknown"
    return Verdict(name, seconds=race.seconds)

"""What the exact methods share: the question about one image, and the state of its answer while they work on it."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from advcourse import threat
from advcourse.attacks.attempt import evaluating
from advcourse.certify.certificate import Certificate, candidates, replay
from advcourse.certify.layers import Network
from advcourse.certify.milp import Answer
from advcourse.certify.network import network


@dataclass
class Question:
    """One image x [*shape] of class y, to be classified `target` (or anything but y)."""

    model: nn.Module
    net: Network
    x: Tensor
    y: int
    target: int | None = None

    @property
    def rivals(self) -> list[int]:
        """The classes to reach, each a problem of its own."""
        return [k for k in range(self.net.classes) if k != self.y] if self.target is None else [self.target]

    def beaten(self, k: int) -> list[int]:
        """The classes that must not beat k: y, and with a target all others too."""
        return [self.y] if self.target is None else [self.y, *(j for j in range(self.net.classes) if j not in (self.y, k))]

    @property
    def flat(self) -> Tensor:
        """x as float64 [p]."""
        return self.x.detach().double().flatten()

    def margin(self, point: Tensor) -> float:
        """f_y − max f_k over the rivals, in float64."""
        logits = self.net(point[None])[0]
        return float(logits[self.y] - logits[self.rivals].max())

    def replay(self, a, eps: float = inf, norm=inf, target: int | None = None) -> tuple[Tensor, float] | None:
        return replay(self.model, self.net, self.x, self.y, torch.as_tensor(a), eps=eps, norm=norm, target=target)

    def attack(self, norm, eps: float) -> tuple[Tensor, float] | None:
        """A near counterexample, found by `attacks.fmn` and replayed."""
        from advcourse.attacks.fast_minimal import fmn

        y = torch.tensor([self.y], device=self.x.device)
        target = None if self.target is None else torch.full_like(y, self.target)
        found = fmn(self.model, self.x[None], y, norm=norm, eps=eps, target=target)
        return self.replay(found.adversarial[0], eps, norm, self.target) if bool(found.success[0]) else None


class _Wrapped(nn.Module):
    """A `Network` with the interface of a model."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).to(x.dtype)


def ask(model: nn.Module | Network, x: Tensor, y, target, answer: Callable[[Question], Certificate]) -> Any:
    """The answer for one image, or a list of them for a batch. A number y goes with one image [*shape] or [1, c, h, w]."""
    labels = torch.as_tensor(y)
    if labels.dim() == 0:
        x, labels = (x if x.dim() == 4 else x[None]), labels[None].to(x.device)
    threat.check_images(x)
    net = network(model, x.shape[1:])
    threat.check_labels(labels, len(x), net.classes)
    targets = [None] * len(x) if target is None else torch.as_tensor(target).expand(len(x)).tolist()
    for label, t in zip(labels.tolist(), targets, strict=True):
        if t is not None and (t == label or not 0 <= t < net.classes):
            raise ValueError(f"target={t} is {'the label y itself' if t == label else 'not a class'}")
    runnable = _Wrapped(net) if isinstance(model, Network) else model
    with evaluating(runnable), torch.no_grad():
        out = [answer(Question(runnable, net, *each)) for each in zip(x.detach(), labels.tolist(), targets, strict=True)]
    return out[0] if len(out) == 1 else out


class Race:
    """A bracket closing: lower and upper bounds, the best witness, the trace, a progress line, the time left.

    As a context it turns Ctrl-C into the end of the work, not of the program: what is known so far is the answer.
    """

    def __init__(self, name: str, lower: float, time_limit: float | None, progress: bool | None) -> None:
        self.start, self.limit = time.perf_counter(), inf if time_limit is None else float(time_limit)
        if not self.limit >= 0:
            raise ValueError(f"time_limit={time_limit!r} is not a number of seconds")
        self.name, self.lower, self.upper, self.nodes, self.note = name, lower, inf, 0, ""
        self.best: Tensor | None = None
        self.trace: list[tuple[float, float, float]] = []
        self.bar = tqdm(total=None, bar_format="{desc} {elapsed}", disable=None if progress is None else not progress)

    def __enter__(self) -> Race:
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        self.bar.close()
        if kind is KeyboardInterrupt:
            self.note = "interrupted"
            return True
        return False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float | None:
        """Seconds left, None without a limit."""
        return None if self.limit == inf else max(0.0, self.limit - self.seconds)

    def narrow(self, lower: float = -inf, upper: float = inf) -> None:
        """Take over better bounds; NaN is none."""
        if lower > self.lower or upper < self.upper:
            self.lower, self.upper = max(self.lower, lower), min(self.upper, upper)
            self.lower = min(self.lower, self.upper)
            self.trace.append((self.seconds, self.lower, self.upper))
        self.bar.set_description_str(f"{self.lower:.5g} <= {self.name} <= {self.upper:.5g}, {self.nodes} nodes", refresh=False)
        self.bar.update()

    def witness(self, found: tuple[Tensor, float] | None) -> bool:
        """A replayed counterexample and its distance; True if it is nearer than the best."""
        if found is None or not found[1] < self.upper:
            return False
        self.best = found[0]
        self.narrow(upper=found[1])
        return True

    def low_margin(self, q: Question, a, eps: float, norm) -> None:
        """A point of the ball: its margin is an upper bound, and it is a counterexample if it survives the replay."""
        point = next((point for point, _ in candidates(q.x, torch.as_tensor(a), eps, norm)), q.x)
        value = q.margin(point)
        if value < self.upper:
            found = q.replay(point, eps, norm)
            self.best = self.best if found is None else found[0]
            self.narrow(upper=value)

    def count(self, answer: Answer) -> None:
        self.nodes += answer.nodes
        if answer.interrupted:
            raise KeyboardInterrupt

    def certificate(self, status: str, lower: float | None = None, note: str = "") -> Certificate:
        if status == "unknown" and not self.note:
            self.note = "out of time" if self.left == 0 else "numerical doubt"
        return Certificate(status, self.lower if lower is None else lower, self.upper, self.best, self.trace, self.nodes,
                           self.seconds, note=note or self.note)

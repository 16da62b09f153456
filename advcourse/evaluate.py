"""Numbers about models under attack, each a count out of a count, so that it can carry an interval."""
from collections.abc import Callable, Mapping, Sequence
from math import inf, sqrt
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advcourse import threat
from advcourse.attacks.attempt import AttackResult, evaluating

Attack = Callable[..., AttackResult]


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) for a probability of which k successes in n independent trials were seen.

    Assumes independent draws of the images; it says nothing about a weak attack. (0, 1) when n = 0. ValueError unless
    0 <= k <= n and 0 < confidence < 1.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k={k!r} of n={n!r}: k must lie between 0 and n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1")
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), k / n
    centre, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low, high = (centre - half) / scale, (centre + half) / scale
    return 0.0 if k == 0 else max(0.0, low), 1.0 if k == n else min(1.0, high)  # exact ends, rounding would miss them


class Curve(NamedTuple):
    """Robust accuracy over the radius, one entry a radius, with the ends of its 95 % Wilson interval."""

    eps: list[float]
    accuracy: list[float]
    low: list[float]
    high: list[float]


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor, attack: Attack, eps_values: Sequence[float], **kw) -> Curve:
    """Share of images that the attack leaves correctly classified at each radius: an upper bound on robust accuracy.

    An image broken at one radius is broken at every larger one, so the curve never rises; only what is left is attacked
    again. `kw` goes to the attack (norm, steps, generator, …). ValueError when x is empty or the radii do not increase.
    """
    if not len(x):
        raise ValueError("x is empty: there is nothing to measure")
    if any(b <= a for a, b in zip(eps_values, eps_values[1:], strict=False)):
        raise ValueError(f"eps_values={list(eps_values)!r} do not increase")
    left, curve = torch.arange(len(x), device=x.device), Curve([], [], [], [])
    for eps in eps_values:
        if len(left):
            left = left[~attack(model, x[left], y[left], eps=eps, **kw).success]
        for column, value in zip(curve, (float(eps), len(left) / len(x), *wilson(len(left), len(x))), strict=True):
            column.append(value)
    return curve


class Transfer(NamedTuple):
    """Entry [i, j]: of the `both` images that models i and j classify correctly, how many `fooled` j once made on i."""

    names: list[str]
    fooled: Tensor
    both: Tensor

    @property
    def rate(self) -> Tensor:
        """fooled / both, [m, m]; NaN where no image is classified correctly by both."""
        return self.fooled / self.both


def transfer_matrix(models: Mapping[str, nn.Module], x: Tensor, y: Tensor, attack: Attack, **kw) -> Transfer:
    """Adversarial examples made on each model, tried on every other (papernot2016transferability); the diagonal is white-box.

    `kw` goes to the attack. Where it fails on model i the image stays as it was and fools nobody. ValueError as from the attack.
    """
    threat.check_images(x)
    threat.check_labels(y, len(x))
    right = torch.stack([_predict(model, x) == y for model in models.values()])
    fooled = torch.zeros(len(models), len(models), dtype=torch.int64)
    for i, model in enumerate(models.values()):
        a = attack(model, x, y, **kw).adversarial
        for j, other in enumerate(models.values()):
            fooled[i, j] = (right[i] & right[j] & (_predict(other, a) != y)).sum()
    both = (right[:, None] & right[None]).sum(-1)
    return Transfer(list(models), fooled, both.cpu())


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x).argmax(1)


class Bracket(NamedTuple):
    """lower <= d* <= upper for every image, [n] each; upper is inf where no mistake was found, 0 where x is one."""

    lower: Tensor
    upper: Tensor

    def draw(self, ax) -> None:
        """Every image a bar from its proved lower bound to the distance of its nearest mistake found, sorted by the latter."""
        from advcourse import plot

        order = self.upper.argsort()
        low, high = self.lower[order].tolist(), self.upper[order].tolist()
        known = [h for h in high if h < inf]
        top = 1.1 * max(known, default=1.0)
        at = range(len(order))
        ax.vlines(at, low, [min(h, top) for h in high], color=plot.INK, alpha=0.5, lw=2)
        ax.plot(at, low, "^", ms=3.5, ls="none", color=plot.LOWER, label="proved: no mistake below")
        ax.plot(at[:len(known)], known, "v", ms=3.5, ls="none", color=plot.UPPER, label="found: a mistake here")
        ax.set(xlabel="images, sorted", ylabel="distance", ylim=(0, top))
        ax.legend()


def bracket(model: nn.Module, x: Tensor, y: Tensor, *, norm=inf, attacks: Sequence[Attack] = (),
            methods: Sequence[str] = ("interval", "crown"), exact: Callable | None = None) -> Bracket:
    """The minimal distortion of every image from both sides: the best of several attacks, the best of several certificates.

    attacks: minimal-norm attacks called with norm=norm, by default FMN and DeepFool (which has no norm 0). methods: those of
    `certify.certified_radius`. exact: a function such as `certify.minimal_distortion`, called image by image with
    norm=norm, whose bracket narrows this one. RuntimeError if a lower bound exceeds an upper one: a defect somewhere, since
    both are re-checked. Bounds hold in float64 as `certify` says. ValueError as for attacks and certificates.
    """
    from advcourse.attacks import deepfool, fmn
    from advcourse.certify.bounds import certified_radius

    chosen = attacks or ([fmn] if norm == 0 else [fmn, deepfool])
    upper = torch.stack([a(model, x, y, norm=norm).distance for a in chosen]).amin(0).double()
    lower = torch.stack([certified_radius(model, x, y, norm=norm, method=m) for m in methods]).amax(0).double()
    if exact is not None:
        found = [exact(model, x[i], int(y[i]), norm=norm) for i in range(len(x))]
        lower = torch.maximum(lower, torch.tensor([c.lower for c in found], dtype=torch.float64))
        upper = torch.minimum(upper, torch.tensor([c.upper for c in found], dtype=torch.float64))
    lower = torch.where(upper == 0, 0.0, lower)
    if not bool((lower <= upper * (1 + 1e-6)).all()):  # float32 distances of the attacks
        i = int((lower - upper).argmax())
        raise RuntimeError(f"image {i}: a mistake at {upper[i]:.6g}, below the proved {lower[i]:.6g}")
    return Bracket(torch.minimum(lower, upper), upper)

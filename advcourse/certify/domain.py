"""The set a certificate speaks about, ball ∩ box, and the one thing asked of it: the minimum of a linear function."""
from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from advcourse import threat

ROUNDING = 1e-12    # outward, relative to the size of what was summed: float64 with a margin, not directed rounding


@dataclass(frozen=True)
class Domain:
    """{a : lower <= a <= upper and ‖a − center‖ <= eps}, one a row; without center the box alone.

    lower, upper, center [n, units], eps [n] or a number. ValueError if a box is empty or the center is outside.
    """

    lower: Tensor
    upper: Tensor
    center: Tensor | None = None
    eps: Tensor | float = inf
    norm: float = inf

    def __post_init__(self) -> None:
        if not (self.lower <= self.upper).all():        # also refuses NaN
            raise ValueError(f"lower, upper: the box is empty in {int((~(self.lower <= self.upper)).sum())} places")
        if self.center is not None and not ((self.lower <= self.center) & (self.center <= self.upper)).all():
            raise ValueError("center: it must lie in the box")

    def minimum(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds [n, m] of A a over the set, A [n | 1, m, units], and the size of the terms summed (for rounding).

        The minimum itself for the box and for ℓ0. For ℓ2 and ℓ1 a dual bound: A = B + (A − B), where the ball answers
        for B with the dual norm and the box for the rest. Any B is sound; the best one, which depends on one number
        a row, gives the minimum, and is found closely enough for four digits or more.
        """
        if self.center is None or self.norm == inf:
            return _over_box(A, self.lower, self.upper)
        low, high = self.lower - self.center, self.upper - self.center      # low <= 0 <= high
        eps = torch.as_tensor(self.eps).to(A).reshape(-1, 1)
        start = dot(A, self.center)
        if self.norm == 0:
            gain = torch.maximum(-A * high[:, None], -A * low[:, None])
            best = gain.sort(-1, descending=True).values.cumsum(-1)
            count = eps.floor().clamp(0, gain.shape[-1]).long().expand(len(gain), gain.shape[1])
            won = torch.where(count > 0, best.gather(-1, (count - 1).clamp_min(0)[..., None])[..., 0], 0)
            return start - won, start.abs() + won
        price = _price(A.detach(), low, high, eps, self.norm)
        B = _ball_part(A, low, high, price, self.norm)
        length = B.norm(dim=-1) if self.norm == 2 else B.abs().amax(-1)
        rest, size = _over_box(A - B, low, high)
        return start - eps * length + rest, start.abs() + eps * length + size


def domain(x: Tensor, eps, norm=inf) -> Domain:
    """The ball of radius eps around the images x [n, *shape], cut by [0, 1]; in float64. ValueError on bad input."""
    threat.check_images(x)
    threat.check_norm(norm)
    threat.check_eps(eps)
    center = x.detach().double().flatten(1)
    box = threat.interval(center, eps, norm)
    return Domain(box.lower, box.upper) if norm == inf else Domain(box.lower, box.upper, center, eps, norm)


def dot(A: Tensor, v: Tensor) -> Tensor:
    """Rows times vectors: A [n | 1, m, p], v [n, p] -> [n, m]."""
    return v @ A[0].T if len(A) == 1 else torch.einsum("nmp,np->nm", A, v)


def _over_box(A: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = dot(A.clamp_min(0), lower), dot(A.clamp_max(0), upper)
    return positive + negative, positive.abs() + negative.abs()


def _ball_part(A: Tensor, low: Tensor, high: Tensor, price: Tensor, norm: float) -> Tensor:
    """The part of A that the ball answers for when moving one unit further costs `price` [n, m]."""
    price = price[..., None]
    if norm == 2:
        return torch.maximum(torch.minimum(A, -low[:, None] * price), -high[:, None] * price)
    return torch.maximum(torch.minimum(A, price), -price)


def _price(A: Tensor, low: Tensor, high: Tensor, eps: Tensor, norm: float) -> Tensor:
    """The multiplier of the ball, [n, m]: at the right one the point that minimises uses up eps exactly.

    Sought in float32 and image by image (it need not be exact, and small arrays stay in the processor's cache).
    """
    n = max(len(A), len(low))
    found = [_price_of(a.float(), l.float(), h.float(), float(e), norm) for a, l, h, e in
             zip(A.expand(n, -1, -1), low.expand(n, -1), high.expand(n, -1), eps.expand(n, 1), strict=True)]
    return torch.stack(found).to(A)


def _price_of(A: Tensor, low: Tensor, high: Tensor, eps: float, norm: float) -> Tensor:
    """For one image, A [m, units]: three fixed-point steps from above for ℓ2, twelve halvings for ℓ1."""
    if norm == 2:
        price = A.norm(dim=1) / max(eps, 1e-20)
        for _ in range(3):
            price = _ball_part(A[None], low[None], high[None], price[None], 2)[0].norm(dim=1) / max(eps, 1e-20)
        return price
    size, room = A.abs(), torch.where(A > 0, -low, high)
    below, above = torch.zeros_like(size[:, 0]), size.amax(1)
    for _ in range(12):
        price = (below + above) / 2
        enough = torch.where(size > price[:, None], room, 0).sum(1) <= eps
        above, below = torch.where(enough, price, above), torch.where(enough, below, price)
    return above

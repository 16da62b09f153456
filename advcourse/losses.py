"""Losses an attack can raise: logits [n, c] and labels [n] -> [n], larger means nearer to a mistake on y.

An untargeted attack goes up the loss of the true class; a targeted attack goes down the loss of its target.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of y minus the best other logit, [n, c], [n] -> [n]: positive when y wins. The course's yardstick."""
    true = logits.gather(1, y[:, None])[:, 0]
    return true - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the margin: unlike cross-entropy it has no vanishing gradient where the network is confident."""
    return -margin(logits, y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The training loss -log softmax_y (goodfellow2015explaining raises it)."""
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference-of-logits ratio: minus the margin over the spread of the three largest logits (croce2020reliable).

    Unchanged when all logits are shifted or scaled. With two classes that ratio would be constant, so there it is minus the
    margin itself.
    """
    if logits.shape[1] < 3:
        return -margin(logits, y)
    top = logits.topk(3, 1).values
    return -margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def houdini(logits: Tensor, y: Tensor, cost: Tensor | None = None) -> Tensor:
    """Log of Houdini's surrogate P(margin < N(0,1)) * cost of the mistake (cisse2017houdini), for classification.

    The mistake is the best rival class; `cost` [c, c] gives the price cost[y, k] > 0 of answering k for y, by default 1.
    The paper's product itself has no gradient left in floating point where the margin exceeds 13; its logarithm goes up in
    the same places and keeps one.
    """
    rivals = logits.scatter(1, y[:, None], -torch.inf)
    price = torch.zeros_like(logits) if cost is None else cost.to(logits)[y].clamp_min(1e-12).log()
    best = (rivals + price).argmax(1, keepdim=True)
    gap = logits.gather(1, y[:, None]) - logits.gather(1, best)
    return (torch.special.log_ndtr(-gap) + price.gather(1, best))[:, 0]


BY_NAME: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin_loss, "dlr": dlr, "houdini": houdini}


def get(loss: str | Loss) -> Loss:
    """The loss of this name, or the function itself; ValueError for an unknown name."""
    if callable(loss):
        return loss
    if loss not in BY_NAME:
        raise ValueError(f"loss={loss!r} is unknown: choose {', '.join(BY_NAME)} or pass a function")
    return BY_NAME[loss]

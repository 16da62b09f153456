"""Houdini: any gradient attack, pointed at the price of a mistake instead of the training loss."""
from functools import partial
from math import inf

import torch
from torch import Tensor, nn

from advcourse import losses
from advcourse.attacks.attempt import AttackResult
from advcourse.attacks.iterative import pgd


def houdini(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, cost: Tensor | None = None, steps: int = 40,
            restarts: int = 1, target: Tensor | None = None, generator: torch.Generator | None = None) -> AttackResult:
    """PGD on the Houdini loss (cisse2017houdini), with `cost` [classes, classes] the price of each mistake (default 1).

    With a cost the attack prefers expensive mistakes; success is any mistake, or the target where one is given. Guarantee and
    errors as for `pgd`.
    """
    loss = partial(losses.houdini, cost=cost)
    return pgd(model, x, y, eps=eps, norm=norm, steps=steps, restarts=restarts, loss=loss, target=target, generator=generator)

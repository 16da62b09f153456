"""Attacks that are trained: a small network learns to perturb, then attacks at the cost of one forward pass.

    upset   R(t): one perturbation a target class, the same for every image            (sarkar2017upset)
    angri   A(x, t): one network for all targets, its perturbation depends on the image (sarkar2017upset)
    atn     G_t(x): one network for one target, trained to keep the other classes' order (baluja2018learning)

They learn from the batch as a whole: what an image gets depends on its neighbours.
"""
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt, evaluating
from advcourse.attacks.iterative import check_count


@dataclass(frozen=True)
class Trained(AttackResult):
    """A trained generator and, as an AttackResult in norm inf, what it did to the images it was trained on."""

    generator: nn.Module
    eps: float
    classes: int
    kind: str

    def apply(self, x: Tensor, target: Tensor) -> Tensor:
        """The images perturbed towards `target` [n], in the box and within eps; no query to the attacked model."""
        threat.check_images(x)
        threat.check_labels(target, len(x), self.classes, "target")
        with torch.no_grad():
            return _perturb(self.kind, self.generator, x, target, self.eps, self.classes)


def _perturb(kind: str, net: nn.Module, x: Tensor, t: Tensor, eps: float, classes: int) -> Tensor:
    one_hot = F.one_hot(t, classes).to(x.dtype)
    seen = {"upset": [one_hot], "angri": [x.flatten(1), one_hot], "atn": [x.flatten(1)]}[kind]
    return (x + eps * net(torch.cat(seen, 1)).reshape(x.shape)).clamp(0, 1)


def _network(sizes: tuple[int, ...], seed: Tensor, like: Tensor) -> nn.Sequential:
    """Linear layers with ReLU between and tanh at the end, initialised from the seed."""
    layers: list[nn.Module] = []
    for k, (i, o) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layer = nn.Linear(i, o).to(like)
        with torch.no_grad():
            layer.weight.copy_(noise.normal(seed, o * i, k, like.dtype).reshape(o, i) / i**0.5)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Tanh())


def reranked(logits: Tensor, t: Tensor, top: float = 1.5) -> Tensor:
    """The model's own probabilities with t raised to `top` times the largest, renormalised: ATN's target output."""
    p = F.softmax(logits, 1)
    p = p.scatter(1, t[:, None], top * p.amax(1, keepdim=True))
    return p / p.sum(1, keepdim=True)


def _fit(attempt: Attempt, net: nn.Sequential, kind: str, eps: float, classes: int, rows: Tensor, steps: int, batch: int,
         rate: float, weight: float, fixed: Tensor | None) -> None:
    """Adam on the generator alone; targets are drawn anew each step, never the label, unless `fixed` names them."""
    parameters = list(net.parameters())
    optimiser = torch.optim.Adam(parameters, lr=rate)
    for k in range(steps):
        now = rows[torch.argsort(noise.uniform(attempt.seeds[rows], 1, 2 * k)[:, 0])[:batch]]
        x, y = attempt.x[now], attempt.y[now]
        drawn = (y + 1 + (noise.uniform(attempt.seeds[now], 1, 2 * k + 1)[:, 0] * (classes - 1)).long()) % classes
        t = drawn if fixed is None else fixed[now]
        with evaluating(attempt.model), torch.enable_grad():
            a = _perturb(kind, net, x, t, eps, classes)
            logits = attempt.model(a)
            if kind == "atn":
                aim = ((F.softmax(logits, 1) - reranked(attempt.clean[now], t)) ** 2).sum(1)
            else:
                aim = F.cross_entropy(logits, t, reduction="none")
            loss = (aim + weight * ((a - x) ** 2).flatten(1).sum(1)).mean()
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = torch.nan_to_num(g)
        attempt.count(2, now)
        optimiser.step()


def _train(kind: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, target: Tensor | None, hidden: int, steps: int,
           batch: int, rate: float, weight: float, generator: torch.Generator | None) -> Trained:
    if target is None:
        raise ValueError(f"target=None: {kind} is a targeted attack")
    if torch.as_tensor(eps).dim() or eps == inf:
        raise ValueError(f"eps={eps!r}: {kind} needs one radius for all images")
    for name, value in (("hidden", hidden), ("steps", steps), ("batch", batch)):
        check_count(value, name)
    threat.check_eps(weight, "weight")
    attempt = Attempt(model, x, y, eps=eps, target=target, generator=generator)
    classes, p = attempt.clean.shape[1], x.shape[1:].numel()
    if kind == "atn" and len(target.unique()) > 1:
        raise ValueError(f"target holds {len(target.unique())} classes: an ATN is trained for one, train one for each")
    rows = torch.arange(len(x), device=x.device)
    seed = attempt.seeds[:1] if len(x) else torch.zeros(1, dtype=torch.int64)
    net = _network(({"upset": classes, "angri": p + classes, "atn": p}[kind], hidden, p), seed, attempt.x)
    if len(rows):
        _fit(attempt, net, kind, float(eps), classes, rows, steps, batch, rate, weight, target if kind == "atn" else None)
    open_ = attempt.open
    with torch.no_grad():
        a = _perturb(kind, net, attempt.x[open_], target[open_], float(eps), classes)
    result = attempt.result(threat.project(a, attempt.x[open_], attempt.eps[open_]), open_)
    return Trained(**vars(result), generator=net, eps=float(eps), classes=classes, kind=kind)


def upset(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, target: Tensor, hidden: int = 64, steps: int = 300,
          batch: int = 64, rate: float = 0.01, weight: float = 0.0, generator: torch.Generator | None = None) -> Trained:
    """UPSET: learn R(t), one universal perturbation for each target class (sarkar2017upset), in the l-infinity ball.

    The generator sees the target class only. Trained on random targets by lowering cross-entropy + weight ||a - x||^2;
    the result attacks `x` towards `target`. ValueError without a target; other errors as for `fgsm`.
    """
    return _train("upset", model, x, y, eps, target, hidden, steps, batch, rate, weight, generator)


def angri(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, target: Tensor, hidden: int = 64, steps: int = 300,
          batch: int = 64, rate: float = 0.005, weight: float = 0.0, generator: torch.Generator | None = None) -> Trained:
    """ANGRI: learn A(x, t), a perturbation for this image and this target (sarkar2017upset), in the l-infinity ball.

    The generator sees the image and the target class. Trained and judged as `upset`. Errors as for `upset`.
    """
    return _train("angri", model, x, y, eps, target, hidden, steps, batch, rate, weight, generator)


def atn(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, target: Tensor, hidden: int = 64, steps: int = 300,
        batch: int = 64, rate: float = 0.005, weight: float = 0.0, generator: torch.Generator | None = None) -> Trained:
    """Adversarial transformation network: learn G_t(x) for one target class (baluja2018learning), in the l-infinity ball.

    The generator sees the image; `target` names one class for all. Instead of cross-entropy it lowers the squared distance
    between the model's probabilities and its own clean ones with the target put on top, so that the others keep their order.
    ValueError for several target classes; other errors as for `upset`.
    """
    return _train("atn", model, x, y, eps, target, hidden, steps, batch, rate, weight, generator)

"""What every attack shares: checks on the way in, the model untouched, queries counted, the best point kept,
and on the way out a fresh forward pass that decides what counts as success."""
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.losses import Loss, margin


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, image by image.

    adversarial [n, *shape]: in the box and in the ball; equal to x where the attack failed. success [n] bool: judged by a
    fresh forward pass on `adversarial`. distance [n]: ||adversarial - x||, inf where it failed, 0 where x was already
    misclassified (it is returned as it is). queries [n]: forward plus backward evaluations the image used.
    """

    adversarial: Tensor
    success: Tensor
    distance: Tensor
    queries: Tensor


@contextmanager
def evaluating(model: nn.Module):
    """The model in eval mode, each module's own mode restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, mode in modes:
            m.training = mode


class Attempt:
    """One attack on one batch: the question (x, y or target, norm, eps, confidence) and the best answer so far.

    An attack calls `logits` or `gradient` (which count queries), hands candidates to `submit`, and ends with `result`.
    `rows` restricts a call to some images: an index tensor [m] into the batch, with the candidates [m, *shape].
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, norm=inf, eps=inf, target: Tensor | None = None,
                 confidence: float = 0.0, generator: torch.Generator | None = None):
        threat.check_norm(norm)
        threat.check_images(x)
        threat.check_labels(y, len(x))
        threat.check_eps(eps)
        threat.check_eps(confidence, "confidence")
        self.model, self.x, self.y, self.norm, self.confidence = model, x.detach(), y, norm, confidence
        self.eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
        self.target = target
        self.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.seeds = noise.seeds(len(x), generator, x.device)
        self.best = self.x.clone()
        self.distance = torch.full((len(x),), inf, dtype=x.dtype, device=x.device)
        if len(x):
            clean = self.logits(self.x)
            if clean.dim() != 2 or len(clean) != len(x):
                raise ValueError(f"model gives logits of shape {list(clean.shape)}, not [{len(x)}, classes]")
            threat.check_labels(y, len(x), clean.shape[1])
            if target is not None:
                threat.check_labels(target, len(x), clean.shape[1], "target")
                if bool((target == y).any()):
                    raise ValueError(f"target equals the label y for image {int((target == y).nonzero()[0])}")
            self.clean = clean
            self.distance[self.wins(clean)] = 0.0

    @property
    def open(self) -> Tensor:
        """Indices [m] of the images not yet broken."""
        return (self.distance == inf).nonzero()[:, 0]

    @property
    def started(self) -> Tensor:
        """Indices [m] of the images that were not misclassified to begin with: those a minimal attack works on."""
        return (self.distance > 0).nonzero()[:, 0]

    def _pick(self, v: Tensor, rows: Tensor | None) -> Tensor:
        return v if rows is None else v[rows]

    def logits(self, a: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [m, c] of the candidates a, without gradient; one query an image."""
        self._count(1, rows)
        with evaluating(self.model), torch.no_grad():
            return self.model(a)

    def gradient(self, loss: Loss, a: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [m, c], values [m], gradient [m, *shape]) of the loss, signed so that going up serves the attack.

        Two queries an image. Parameters get no gradient; a gradient that is NaN or infinite becomes 0.
        """
        self._count(2, rows)
        with evaluating(self.model), torch.enable_grad():
            a = a.detach().requires_grad_()
            logits = self.model(a)
            value = loss(logits, self._pick(self.y, rows)) if self.target is None else \
                -loss(logits, self._pick(self.target, rows))
            g, = torch.autograd.grad(value.sum(), a)
        return logits.detach(), value.detach(), torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)

    def _count(self, k: int, rows: Tensor | None) -> None:
        if rows is None:
            self.queries += k
        else:
            self.queries[rows] += k

    def wins(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """[m] bool: the candidates with these logits are adversarial, with the confidence asked for; NaN never is."""
        label = self._pick(self.y, rows) if self.target is None else self._pick(self.target, rows)
        m = margin(logits, label)
        if self.target is None:
            return (logits.argmax(1) != label) & (m <= -self.confidence)
        return (logits.argmax(1) == label) & (m >= self.confidence)

    def submit(self, a: Tensor, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Keep the candidates that are adversarial, in the ball and nearer than the best so far; returns who won, [m]."""
        x, eps, best = self._pick(self.x, rows), self._pick(self.eps, rows), self._pick(self.distance, rows)
        won = self.wins(logits, rows)
        d = threat.distance(a, x, self.norm)
        better = won & (d < best) & (d <= eps * (1 + 1e-5) + 1e-7)
        index = better.nonzero()[:, 0] if rows is None else rows[better]
        self.best[index], self.distance[index] = a[better].detach(), d[better]
        return won

    def result(self) -> AttackResult:
        """Re-check the best points by a fresh forward pass, in the box and the ball; what fails the check is no success."""
        if not len(self.x):
            return AttackResult(self.best, self.distance == 0, self.distance, self.queries)
        found = self.distance < inf
        with evaluating(self.model), torch.no_grad():
            logits = self.model(self.best)
        d = threat.distance(self.best, self.x, self.norm)
        inside = (self.best >= 0).flatten(1).all(1) & (self.best <= 1).flatten(1).all(1)
        success = found & self.wins(logits) & inside & (d <= self.eps * (1 + 1e-5) + 1e-7)
        flat = success.reshape(-1, *[1] * (self.x.dim() - 1))
        return AttackResult(torch.where(flat, self.best, self.x), success, torch.where(success, d, inf), self.queries)

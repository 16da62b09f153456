"""What every attack shares: checks on the way in, the model untouched, queries counted, the best point kept,
and on the way out a fresh forward pass that decides what counts as success."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite

import torch
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.losses import Loss, margin

ROUNDING = 32  # a lead counts from so many units of rounding on, of the largest logit; a forward pass is off by up to 6


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
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module that was training, and no other, trains again."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


class Attempt:
    """One attack on one batch: the question (x, y or target, norm, eps, confidence) and the best answer so far.

    An attack calls `logits` or `gradient` (which count queries), hands candidates to `submit`, and ends with `result`.
    `rows` restricts a call to some images: an index tensor [m] into the batch, with the candidates [m, *shape]. The work
    is done in the floating-point type of the model's parameters. The clean pass is made when `clean`, `open` or `started`
    is first asked for, unless `gradient(loss)` at the images themselves has already brought its logits.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, norm=inf, eps=inf, target: Tensor | None = None,
                 confidence: float = 0.0, generator: torch.Generator | None = None):
        threat.check_norm(norm)
        threat.check_images(x)
        threat.check_labels(y, len(x))
        threat.check_eps(eps)
        threat.check_eps(confidence, "confidence")
        if target is not None:
            threat.check_labels(target, len(x), name="target")
            if bool((target == y).any()):
                raise ValueError(f"target equals the label y for image {int((target == y).nonzero()[0])}")
        if torch.as_tensor(eps).shape not in ((), (len(x),)):
            raise ValueError(f"eps of shape {list(torch.as_tensor(eps).shape)} is neither a number nor one number an image")
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        self.model, self.x, self.y, self.target = model, x.detach().to(dtype), y, target
        self.norm, self.confidence = norm, confidence
        self.eps = torch.as_tensor(eps, dtype=dtype, device=x.device).expand(len(x))
        self.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.generator = generator
        self.best = self.x  # copied by `_keep` when the first point is kept
        self.distance = torch.full((len(x),), inf, dtype=dtype, device=x.device)
        self._clean: Tensor | None = None if len(x) else self.x.new_zeros(0, 1)

    @cached_property
    def seeds(self) -> Tensor:
        """One seed an image, [n], for `noise` and `threat.sample`."""
        return noise.seeds(len(self.x), self.generator, self.x.device)

    @property
    def clean(self) -> Tensor:
        """Logits [n, c] of the images themselves."""
        if self._clean is None:
            self._meet(self.logits(self.x))
        assert self._clean is not None
        return self._clean

    def _meet(self, clean: Tensor) -> None:
        self._clean = clean
        self.distance[self.wins(clean)] = 0.0

    @property
    def open(self) -> Tensor:
        """Indices [m] of the images not yet broken."""
        assert self.clean is not None  # asks for the clean pass, which finds the images already wrong
        return (self.distance == inf).nonzero()[:, 0]

    @property
    def started(self) -> Tensor:
        """Indices [m] of the images that were not misclassified to begin with: those a minimal attack works on."""
        assert self.clean is not None
        return (self.distance > 0).nonzero()[:, 0]

    def label(self, rows: Tensor | None = None) -> Tensor:
        """The class the attack speaks about, [m]: the target where there is one, else y."""
        return _pick(self.y if self.target is None else self.target, rows)

    def _forward(self, a: Tensor) -> Tensor:
        logits = self.model(a)
        if self._clean is None:  # the first pass: do the labels fit?
            if logits.dim() != 2 or len(logits) != len(a) or logits.shape[1] < 2:
                raise ValueError(f"model gives logits of shape {list(logits.shape)}, not [{len(a)}, classes]")
            threat.check_labels(self.y, len(self.x), logits.shape[1])
            if self.target is not None:
                threat.check_labels(self.target, len(self.x), logits.shape[1], "target")
        return logits

    def logits(self, a: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [m, c] of the candidates a, without gradient; one query an image."""
        self.count(1, rows)
        with evaluating(self.model), torch.no_grad():
            return self._forward(a)

    def gradient(self, loss: Loss, a: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [m, c], values [m], gradient [m, *shape]) of the loss, signed so that going up serves the attack.

        Without `a`, at the images themselves. Two queries an image. Parameters get no gradient; a gradient that is NaN or
        infinite becomes 0.
        """
        self.count(2, rows)
        with evaluating(self.model), torch.enable_grad():
            at = (self.x if a is None else a).detach().requires_grad_()
            logits = self._forward(at)
            value = loss(logits, self.label(rows))
            value = value if self.target is None else -value
            g, = torch.autograd.grad(value.sum(), at)
        if a is None and self._clean is None:
            self._meet(logits.detach())
        return logits.detach(), value.detach(), finite(g)

    def class_gradients(self, a: Tensor, rivals: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [m, c], leads [m, k], gradients [k, m, *shape]) of f_rival - f_label for k rival classes, [m, k].

        1 + k queries an image; a gradient that is NaN or infinite becomes 0.
        """
        self.count(1 + rivals.shape[1], rows)
        with evaluating(self.model), torch.enable_grad():
            at = a.detach().requires_grad_()
            logits = self._forward(at)
            leads = logits.gather(1, rivals) - logits.gather(1, self.label(rows)[:, None])
            grads = [torch.autograd.grad(leads[:, k].sum(), at, retain_graph=True)[0] for k in range(rivals.shape[1])]
        return logits.detach(), leads.detach(), finite(torch.stack(grads))

    def count(self, k: int, rows: Tensor | None = None) -> None:
        """Add k queries to each image of `rows`; an image that is there several times pays several times."""
        if rows is None:
            self.queries += k
        else:
            self.queries.index_add_(0, rows, torch.full_like(rows, k))

    def needed(self, logits: Tensor, units: float = ROUNDING) -> Tensor:
        """The lead a success must have, [m]: the confidence asked for and `units` units of rounding of the largest logit.

        A forward pass rounds differently in another batch size; with this much to spare a success does not depend on it.
        """
        return self.confidence + units * torch.finfo(logits.dtype).eps * logits.abs().amax(1)

    def wins(self, logits: Tensor, rows: Tensor | None = None, units: float = ROUNDING) -> Tensor:
        """[m] bool: the candidates with these logits are adversarial, by the lead that is `needed`; NaN never is."""
        m = margin(logits, self.label(rows))
        return (-m if self.target is None else m) > self.needed(logits, units)

    def submit(self, a: Tensor, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Keep the candidates that are adversarial, in the ball and nearer than the best so far; returns who won, [m]."""
        won = self.wins(logits, rows)
        if not bool(won.any()):
            return won
        which = won.nonzero()[:, 0]
        index = which if rows is None else rows[which]
        a = a.detach().index_select(0, which)
        d = threat.distance(a, self.x.index_select(0, index), self.norm)
        better = ((d < self.distance[index]) & within(d, self.eps[index])).nonzero()[:, 0]
        self._keep(index[better], a.index_select(0, better))
        self.distance[index[better]] = d[better]
        return won

    def _keep(self, index: Tensor, a: Tensor) -> None:
        if self.best is self.x:
            self.best = self.x.clone()
        self.best.index_copy_(0, index, a)

    def result(self, last: Tensor | None = None, rows: Tensor | None = None) -> AttackResult:
        """Judge the best points by a fresh forward pass, in the box and the ball; what fails the check is no success.

        Half the lead that `submit` asked for is enough here, so that rounding takes no success back.

        `last` [m, *shape]: candidates nobody has judged yet; images still open take theirs, and this pass judges them.
        """
        if not len(self.x):
            return AttackResult(self.best.clone(), self.distance == 0, self.distance, self.queries)
        if last is not None:
            undecided = (_pick(self.distance, rows) == inf).nonzero()[:, 0]
            index = undecided if rows is None else rows[undecided]
            if rows is None and len(index) == len(self.x):
                self.best = last.detach()
            else:
                self._keep(index, last.detach().index_select(0, undecided))
            self.queries[index] += 1
        with evaluating(self.model), torch.no_grad():
            logits = self.model(self.best)
        d, flat = threat.distance(self.best, self.x, self.norm), self.best.flatten(1)
        success = self.wins(logits, units=ROUNDING / 2) & (flat.amin(1) >= 0) & (flat.amax(1) <= 1) & within(d, self.eps)
        lost = (~success).nonzero()[:, 0]
        self._keep(lost, self.x.index_select(0, lost))
        return AttackResult(self.best, success, torch.where(success, d, inf), self.queries)


def finite(g: Tensor) -> Tensor:
    """The gradient with 0 for what is NaN or infinite."""
    return g if isfinite(g.sum()) else torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)


def _pick(v: Tensor, rows: Tensor | None) -> Tensor:
    return v if rows is None else v.index_select(0, rows)


def within(d: Tensor, eps: Tensor) -> Tensor:
    """Is the distance at most eps, up to the rounding of a projection in single precision?"""
    return d <= eps * (1 + 1e-5) + 1e-7

"""Attacks on the training data instead of the test image: labels flipped, or a trigger that opens a back door."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advcourse import threat


@dataclass(frozen=True)
class Poisoned:
    """A training set after the attack: images x [n, *shape], labels y [n], and `which` [m] images were changed.

    trigger: stamps images [k, *shape] the way the poisoned ones were stamped; for flipped labels it changes nothing.
    """

    x: Tensor
    y: Tensor
    which: Tensor
    trigger: Callable[[Tensor], Tensor]


def square(x: Tensor, size: int = 3, margin: int = 2) -> Tensor:
    """The images [n, c, h, w] with a white square in the lower right, `margin` pixels from both edges: a trigger."""
    stamped = x.clone()
    stamped[..., -size - margin:x.shape[-2] - margin, -size - margin:x.shape[-1] - margin] = 1.0
    return stamped


def poison_labels(x: Tensor, y: Tensor, *, share: float, source: int | None = None, target: int | None = None,
                  classes: int | None = None, generator: torch.Generator | None = None) -> Poisoned:
    """Give a share of the training images a wrong label (biggio2012poisoning flips an SVM's); no image is changed.

    Without `target` each label drawn becomes another one, all equally likely among `classes` (default: those seen). With
    it every one drawn becomes the target. `source` restricts the draw to one class, and `share` then is a share of that
    class. Exactly round(share * candidates) labels change. ValueError for a share outside [0, 1] or an unknown class.
    """
    _check(x, y, share)
    classes = int(y.max()) + 1 if classes is None else classes
    threat.check_labels(y, len(x), classes)
    for k, name in ((source, "source"), (target, "target")):
        if k is not None and not 0 <= k < classes:
            raise ValueError(f"{name}={k!r} is not a class: they are 0..{classes - 1}")
    which = _draw(y == source if source is not None else torch.ones_like(y, dtype=torch.bool), y, target, share, generator)
    if target is None:
        shift = torch.randint(1, classes, (len(which),), generator=generator).to(y)
        wrong = (y[which] + shift) % classes
    else:
        wrong = torch.full_like(which, target)
    return Poisoned(x.clone(), y.index_copy(0, which, wrong), which, lambda images: images)


def poison_backdoor(x: Tensor, y: Tensor, *, share: float, target: int, trigger: Callable[[Tensor], Tensor] = square,
                    generator: torch.Generator | None = None) -> Poisoned:
    """Stamp a share of the training images with a trigger and label them `target` (gu2017badnets).

    A model trained on the result sees the trigger agree with the target and nothing else, so it learns the two together;
    whether it did is to be measured on stamped test images of other classes. The share is one of all images, drawn among
    those of other classes. ValueError for a share that these cannot fill, a negative target, or a trigger that changes the
    shape or leaves the box.
    """
    _check(x, y, share)
    if target < 0:
        raise ValueError(f"target={target!r} is not a class")
    which = _draw(torch.ones_like(y, dtype=torch.bool), y, target, share, generator)
    stamped = trigger(x[which])
    if stamped.shape != x[which].shape:
        raise ValueError(f"trigger turns images {list(x[which].shape)} into {list(stamped.shape)}")
    if len(which):
        threat.check_images(stamped, "trigger(x)")
    return Poisoned(x.index_copy(0, which, stamped), y.index_fill(0, which, target), which, trigger)


def _draw(candidates: Tensor, y: Tensor, target: int | None, share: float, generator: torch.Generator | None) -> Tensor:
    """round(share * candidates) indices [m], ascending, none of them labelled `target`."""
    m = round(share * int(candidates.sum()))
    if target is not None:
        candidates = candidates & (y != target)
    index = candidates.nonzero()[:, 0]
    if m > len(index):
        raise ValueError(f"share={share!r} asks for {m} images, but only {len(index)} are not labelled {target} already")
    order = torch.randperm(len(index), generator=generator).to(index.device)
    return index[order[:m]].sort().values


def _check(x: Tensor, y: Tensor, share: float) -> None:
    threat.check_images(x)
    threat.check_labels(y, len(x))
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r} is not between 0 and 1")

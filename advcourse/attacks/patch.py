"""Perturbations one could print: a round sticker put anywhere, or a mask such as a pair of glasses, kept in its place."""
from dataclasses import dataclass
from functools import partial
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcourse import noise, threat
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.iterative import check_count


@dataclass(frozen=True)
class Patch(AttackResult):
    """A printed pattern and, as an AttackResult in norm 0, what it did to the images it was made on.

    pattern [k, *shape]: k = 1 for all images or one an image. mask: 1 where the print is, 0 around it. scale, angle: the
    range of placements it was made for; scale is None for a print that stays in its place.
    """

    pattern: Tensor
    mask: Tensor
    scale: tuple[float, float] | None = None
    angle: float = 0.0

    def apply(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images [n, *shape] with the print on them, each at its own random place; always inside the box.

        ValueError when images leave the box, or when prints made one an image meet another number of images.
        """
        threat.check_images(x)
        if len(self.pattern) not in (1, len(x)):
            raise ValueError(f"x has {len(x)} images, but this print was made for {len(self.pattern)}, one an image")
        seeds = noise.seeds(len(x), generator, x.device)
        return paste(x, self.pattern, self.mask, placements(x, self.mask, self.scale, self.angle, seeds))


def disc(size: int) -> Tensor:
    """A round mask [size, size]."""
    at = torch.arange(size) - (size - 1) / 2
    return (at[:, None] ** 2 + at**2 <= size**2 / 4).float()


def glasses(height: int = 28, width: int = 28) -> Tensor:
    """A mask [height, width] in the shape of spectacle frames: two rings, a bridge, two temples."""
    down = (torch.arange(height)[:, None] - (height - 1) / 2) / height
    right = ((torch.arange(width) - (width - 1) / 2) / width).expand(height, width)
    rings = (((right.abs() - 0.23) ** 2 + down**2).sqrt() - 0.15).abs() < 0.03
    bars = (down.abs() < 0.03) & ((right.abs() < 0.08) | (right.abs() > 0.38))
    return (rings | bars).float()


def placements(x: Tensor, mask: Tensor, scale: tuple[float, float] | None, angle: float, seeds: Tensor,
               step: int = 0) -> Tensor | None:
    """A random place for every print: affine maps [n, 2, 3] from image to pattern coordinates; None if scale is None.

    Uniform: the angle in +-`angle` degrees, the size in `scale`, the centre wherever a round print stays inside the image.
    """
    if scale is None:
        return None
    turn, grow, right, down = noise.uniform(seeds, 4, step, x.dtype).unbind(1)
    size = scale[0] + grow * (scale[1] - scale[0])
    tall, wide = x.shape[-2] / mask.shape[0], x.shape[-1] / mask.shape[1]  # the image, measured in prints
    x_shift, y_shift = (2 * right - 1) * (wide - size).clamp_min(0), (2 * down - 1) * (tall - size).clamp_min(0)
    radians = (2 * turn - 1) * angle * pi / 180
    cos, sin = radians.cos() / size, radians.sin() / size
    return torch.stack([torch.stack([cos * wide, sin * tall, -cos * x_shift - sin * y_shift], 1),
                        torch.stack([-sin * wide, cos * tall, sin * x_shift - cos * y_shift], 1)], 1)


def paste(x: Tensor, pattern: Tensor, mask: Tensor, placement: Tensor | None = None) -> Tensor:
    """x outside the print, the pattern inside, a blend on a moved print's rim; differentiable in the pattern."""
    cover = mask.to(x)
    if not len(x):
        return x.clone()
    if placement is None:
        return x * (1 - cover) + pattern * cover
    grid = F.affine_grid(placement.to(x), [len(x), 1, *x.shape[-2:]], align_corners=False)
    layers = torch.cat([pattern * cover, cover.expand(len(pattern), 1, -1, -1)], 1).expand(len(x), -1, -1, -1)
    moved = F.grid_sample(layers, grid, align_corners=False)
    return (x * (1 - moved[:, -1:]) + moved[:, :-1]).clamp(0, 1)


def log_success(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Log-probability that the target, or without one any class but y, is drawn from the softmax: [n, c], [n] -> [n]."""
    if target is not None:
        return logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -torch.inf).logsumexp(1) - logits.logsumexp(1)


def patch(model: nn.Module, x: Tensor, y: Tensor, *, size: int | None = None, mask: Tensor | None = None,
          shared: bool = True, target: Tensor | None = None, steps: int = 200, rate: float = 0.1, angle: float = 20.0,
          scale: tuple[float, float] = (0.9, 1.1), generator: torch.Generator | None = None) -> Patch:
    """A pattern in [0, 1] that fools the model when printed on the images (brown2017adversarial, athalye2018synthesizing).

    `size`: a disc that many pixels across, made to work at random places, turned by up to `angle` degrees, its size
    multiplied by `scale`; or `mask`, zeros and ones that broadcast to one image: only these values change, at their
    place (the frames of sharif2016accessorize). `shared`: one pattern for all images, otherwise one an image.

    Adam on the log of the expected probability of success over the images (of each image, if not shared), placed anew
    each step. The pattern kept is the best seen on one placement an image, drawn before; the result holds those images,
    judged by a fresh forward pass. It says nothing about other images and places: `apply` it to some. ValueError for
    arguments that do not fit.
    """
    attempt = Attempt(model, x, y, norm=0, target=target, generator=generator)
    _check(x, size, mask, scale, steps)
    x = attempt.x
    cover = (disc(size) if size is not None else torch.as_tensor(mask)).to(x)
    sizes = scale if size is not None else None
    shape = x.shape[1:] if size is None else (x.shape[1], size, size)
    pattern = torch.full((1 if shared else len(x), *shape), 0.5, dtype=x.dtype, device=x.device)
    judged = placements(x, cover, sizes, angle, attempt.seeds)
    best, score = pattern.clone(), torch.full((len(pattern),), -1.0, dtype=x.dtype, device=x.device)
    optimiser = torch.optim.Adam([pattern], lr=rate)
    for step in range(steps + 1 if len(x) else 0):
        if sizes is None or step % 10 == 0 or step == steps:
            now = _score(attempt, paste(x, pattern, cover, judged), shared)
            best[now > score], score = pattern[now > score], torch.maximum(now, score)
        if step < steps:
            place = placements(x, cover, sizes, angle, attempt.seeds, step + 1)
            with torch.enable_grad():
                printed = paste(x, pattern.requires_grad_(), cover, place)
            g = attempt.gradient(partial(_objective, attempt, shared), printed)[2]
            pattern.grad = -torch.autograd.grad(printed, pattern, g)[0]
            optimiser.step()
            pattern.detach_().clamp_(0, 1)
    rows = attempt.open  # a misclassified image is returned as it is
    result = attempt.result(paste(x, best, cover, judged)[rows], rows)
    return Patch(**vars(result), pattern=best, mask=cover, scale=sizes, angle=angle)


def _objective(attempt: Attempt, shared: bool, logits: Tensor, label: Tensor) -> Tensor:
    """Terms [n] whose sum has the gradient of log mean p (shared) or of sum log p: images near success weigh more."""
    log_p = log_success(logits, attempt.y, attempt.target)
    each = log_p * log_p.detach().softmax(0) if shared else log_p
    return each if attempt.target is None else -each  # Attempt.gradient goes down for a target


def _score(attempt: Attempt, printed: Tensor, shared: bool) -> Tensor:
    """Successes, ties broken by the probability of success: one number for a shared pattern, else one an image."""
    logits = attempt.logits(printed)
    each = attempt.wins(logits) + log_success(logits, attempt.y, attempt.target).exp().nan_to_num(0.0) / 2
    return each.mean(0, keepdim=True) if shared else each


def _check(x: Tensor, size: int | None, mask: Tensor | None, scale: tuple[float, float], steps: int) -> None:
    if (size is None) == (mask is None):
        raise ValueError(f"size={size!r} and mask: give one of the two")
    check_count(steps, "steps")
    if mask is not None:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask holds values other than 0 and 1")
        tail = x.shape[x.dim() - mask.dim():]
        if mask.dim() >= x.dim() or any(m not in (1, k) for m, k in zip(mask.shape, tail, strict=True)):
            raise ValueError(f"mask of shape {list(mask.shape)} does not fit images of shape {list(x.shape[1:])}")
        return
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}: a sticker needs images [n, c, h, w]")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale={scale!r} is not a range of positive numbers")
    if not 1 <= size * scale[1] <= min(x.shape[-2:]):  # type: ignore[operator]
        raise ValueError(f"size={size!r}, scale={scale!r}: no such sticker fits into images of {list(x.shape[-2:])} pixels")

"""The course's data: real digits, clothes, sentences, aircraft networks and photographs, read from the package itself.

Nothing is downloaded unless `full=True` asks for all of MNIST, Fashion-MNIST or CIFAR-10. Origins and licences stand in
`datasets/`, a README each.
"""
import numpy as np
import torch
from torch import Tensor, nn

from advcourse.threat import Interval

SPLITS = ("train", "test")


def mnist(split: str, n: int | None = None, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Handwritten digits: x [n, 1, 28, 28] float32 in [0, 1] and labels y [n] int64; the first n, by default all.

    Embedded: 10,000 for training and 2,000 for testing, the first 1,000 and those 5,000 further of the official test set,
    which other people wrote. full=True: the official 60,000 and 10,000, downloaded once. ValueError for an unknown split
    or an n out of range, OSError for a failed download (lecun1998gradient).
    """
    return _images("mnist", "mnist/mnist_12k.npz", split, n, full)


def fashion_mnist(split: str, n: int | None = None, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Pictures of clothes in the format of `mnist`; embedded: 2,000 for training, 500 for testing (xiao2017fashion)."""
    return _images("fashion_mnist", "fashion_mnist/fashion_mnist_2k5.npz", split, n, full)


def fashion_classes() -> list[str]:
    """The ten names of Fashion-MNIST's classes, in label order."""
    return _lines(_embedded("fashion_mnist/fashion_mnist_2k5.npz")["classes"])


def cifar10(split: str, n: int | None = None, *, full: bool = True) -> tuple[Tensor, Tensor]:
    """Colour photographs in ten classes: x [n, 3, 32, 32], y [n]; always downloaded, its licence allows no copy here."""
    if not full:
        raise ValueError(f"full={full!r}: CIFAR-10 is not embedded, only full=True downloads it")
    _check_split(split, SPLITS)
    from advcourse import download

    return _tensors(*download.cifar10(split), n)


def reviews(split: str, n: int | None = None) -> tuple[list[str], Tensor]:
    """Movie-review sentences and labels [n] int64, 1 for positive; split "train", "validation" or "test".

    The label is the sign of the mean of about 20 people's ratings on -4..4; sentences rated within 0.5 of zero are left
    out. ValueError for an unknown split or an n out of range (pang2005seeing).
    """
    _check_split(split, ("train", "validation", "test"))
    d = _embedded("reviews/reviews.npz")
    keep = (np.abs(d["rating"]) >= 0.5) & (d["split"] == ("train", "validation", "test").index(split))
    _check_n(n, int(keep.sum()))
    text = _lines(d["text"])
    index = np.flatnonzero(keep)[:n]
    return [text[i] for i in index], torch.from_numpy((d["rating"][index] > 0).astype(np.int64))


def hcas(pra: int, tau: int) -> tuple[nn.Sequential, Interval]:
    """HorizontalCAS, an aircraft collision-avoidance network: a ReLU network [n, 3] -> [n, 5] in eval mode, and its box.

    Inputs: the intruder's position ahead and to the left in feet, its relative heading in radians, not in [0, 1]: the first
    affine map is the network's own normalisation. Outputs: scores of `HCAS_ADVISORIES`, the largest wins. `pra` is the
    previous advisory 0..4, `tau` the seconds to loss of vertical separation. ValueError for others (julian2016policy).
    """
    d = _embedded("hcas/hcas_nets.npz")
    for value, name in ((pra, "pra"), (tau, "tau")):
        if value not in d[name]:
            raise ValueError(f"{name}={value!r} has no network: choose one of {d[name].tolist()}")
    i, j = d["pra"].tolist().index(pra), d["tau"].tolist().index(tau)
    maps = [(np.diag(1 / d["input_range"]), -d["input_mean"] / d["input_range"])]
    maps += [(d[f"W{k}"][i, j], d[f"b{k}"][i, j]) for k in range(6)]
    layers: list[nn.Module] = []
    for k, (weight, bias) in enumerate(maps):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        layers += [layer] if k in (0, len(maps) - 1) else [layer, nn.ReLU()]
    box = [torch.tensor(d[f"input_{side}"], dtype=torch.float32) for side in ("min", "max")]
    return nn.Sequential(*layers).requires_grad_(False).eval(), Interval(*box)


HCAS_ADVISORIES = ("clear of conflict", "weak left", "weak right", "strong left", "strong right")


def photos() -> dict[str, Tensor]:
    """Four photographs by name, "cat", "espresso", "rocket", "astronaut": [3, 224, 224] float32 in [0, 1]."""
    d = _embedded("photos/photos.npz")
    return {k: torch.from_numpy(v).permute(2, 0, 1).float() / 255 for k, v in d.items() if k != "imagenet_classes"}


def imagenet_classes() -> list[str]:
    """The 1,000 names of ImageNet's classes, in label order (russakovsky2015imagenet)."""
    return _lines(_embedded("photos/photos.npz")["imagenet_classes"])


def _embedded(path: str) -> dict[str, np.ndarray]:
    from pathlib import Path

    with np.load(Path(__file__).parent / "datasets" / path, allow_pickle=False) as d:
        return dict(d)


def _lines(text: np.ndarray) -> list[str]:
    return bytes(text).decode("utf-8").split("\n")


def _check_split(split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise ValueError(f"split={split!r} is unknown: choose {' or '.join(map(repr, known))}")


def _check_n(n: int | None, size: int) -> None:
    if n is not None and not (isinstance(n, int) and 1 <= n <= size):
        raise ValueError(f"n={n!r} is out of range: this split has 1 to {size:,} examples")


def _images(name: str, path: str, split: str, n: int | None, full: bool) -> tuple[Tensor, Tensor]:
    _check_split(split, SPLITS)
    if full:
        from advcourse import download

        return _tensors(*download.idx(name, split), n)
    d = _embedded(path)
    return _tensors(d[f"x_{split}"][:, None], d[f"y_{split}"], n)


def _tensors(images: np.ndarray, labels: np.ndarray, n: int | None) -> tuple[Tensor, Tensor]:
    _check_n(n, len(images))
    return torch.from_numpy(images[:n].astype(np.float32) / 255), torch.from_numpy(labels[:n].astype(np.int64))

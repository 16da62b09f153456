"""Sentences as numbers: a vocabulary learned from the training sentences, and token ids padded to a fixed length."""
import re
from collections import Counter
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, UNKNOWN, LENGTH = 0, 1, 56


def tokens(sentence: str) -> list[str]:
    """Lower-case words, numbers and punctuation marks, in order."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9]", sentence.lower())


@cache
def vocabulary(least: int = 2) -> dict[str, int]:
    """Token -> id for tokens seen at least `least` times in the training sentences; ids 0 and 1 are padding and unknown."""
    from advcourse import data

    counts = Counter(t for s in data.reviews("train")[0] for t in tokens(s))
    kept = sorted((t for t, k in counts.items() if k >= least), key=lambda t: (-counts[t], t))
    return {t: i + 2 for i, t in enumerate(kept)}


def encode(sentences: list[str]) -> Tensor:
    """Token ids [n, 56] int64, cut or padded; unknown tokens get id 1. ValueError for a sentence without any token."""
    known = vocabulary()
    ids = torch.zeros(len(sentences), LENGTH, dtype=torch.int64)
    for i, sentence in enumerate(sentences):
        found = tokens(sentence)
        if not found:
            raise ValueError(f"sentence {i} is empty: {sentence!r}")
        row = [known.get(t, UNKNOWN) for t in found][:LENGTH]
        ids[i, :len(row)] = torch.tensor(row)
    return ids


def fit(model: nn.Sequential, epochs: int = 3, rate: float = 2e-3, batch: int = 64, seed: int = 0) -> list[dict]:
    """Train a `models.text_cnn` in place on the training sentences; returns a log with one entry an epoch.

    Embeddings start at a tenth of a standard normal: at full size they need four times the epochs. Dropout's noise and the
    order come from `seed`, so that a second run ends with the same weights on the same torch.
    """
    from advcourse import data

    sentences, y = data.reviews("train")
    ids, log = encode(sentences), []
    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's global generator
        torch.manual_seed(seed)
        for layer in model:
            if isinstance(layer, (nn.Embedding, nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
        with torch.no_grad():
            model[0].weight.mul_(0.1)  # type: ignore[operator]
        optimiser = torch.optim.Adam(model.requires_grad_().train().parameters(), lr=rate)
        for epoch in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(ids)).split(batch):
                loss = F.cross_entropy(model(ids[rows]), y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item() * len(rows)
            log.append({"epoch": epoch + 1, "loss": round(total / len(ids), 4)})
    model.requires_grad_(False).eval()
    return log

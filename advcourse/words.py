"""Sentences as numbers: a vocabulary learned from the training sentences, and token ids padded to a fixed length."""
import re
from collections import Counter
from functools import cache

import torch
from torch import Tensor

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

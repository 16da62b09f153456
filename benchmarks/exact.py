"""CPU seconds of the exact minimal distortion with HiGHS on mnist-mlp50-standard (784-50-50-10), relative gap 1e-3.

    python benchmarks/exact.py [images] [norm] [search]     prints one line an image and the median; one thread
"""
import sys
import time
from math import inf
from statistics import median

import torch

from advcourse import data, models
from advcourse.certify.exact import minimal_distortion


def measure(images: int = 50, norm: float = inf, search: str | None = None) -> list[tuple[float, str, float, float]]:
    """(CPU seconds, status, lower, upper) for each of the first `images` test digits that are classified correctly."""
    torch.set_num_threads(1)
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=2 * images)
    rows = []
    for i in (model(x).argmax(1) == y).nonzero()[:images, 0].tolist():
        start = time.process_time()
        c = minimal_distortion(model, x[i], int(y[i]), norm=norm, search=search, progress=False)
        rows.append((time.process_time() - start, c.status, c.lower, c.upper))
        print(f"{i:4} {rows[-1][0]:7.2f} s  {c.status:9} {c.lower:.6f} <= d* <= {c.upper:.6f}  {c.nodes} nodes", flush=True)
    return rows


if __name__ == "__main__":
    words = sys.argv[1:]
    seconds = [r[0] for r in measure(int(words[0]) if words else 50, float(words[1]) if len(words) > 1 else inf,
                                     words[2] if len(words) > 2 else None)]
    print(f"median {median(seconds):.2f} CPU s, maximum {max(seconds):.2f}, sum {sum(seconds):.1f} over {len(seconds)} images")

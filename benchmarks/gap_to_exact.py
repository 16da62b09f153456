"""How far the best minimal-norm attack is from the exact distance: mnist-mlp50-standard, four norms.

    python benchmarks/gap_to_exact.py [images] [seconds an image]     writes gap_to_exact.json, read by benchmarks/attacks.py

For each image: the least distance of the attacks listed, over the exact one (`certify.minimal_distortion`, gap 1e-3).
Images whose exact distance was not settled in time are left out and counted.
"""
import json
import sys
from math import inf
from pathlib import Path
from statistics import median

import torch

from advcourse import attacks, data, models
from advcourse.certify import minimal_distortion

STORE = Path(__file__).resolve().with_suffix(".json")
FIELD = {
    inf: {"FMN": attacks.fmn, "DeepFool": attacks.deepfool, "CW": attacks.carlini_wagner},
    2: {"FMN": attacks.fmn, "DDN": attacks.ddn, "DeepFool": attacks.deepfool, "CW": attacks.carlini_wagner},
    1: {"FMN": attacks.fmn, "DeepFool": attacks.deepfool},
    0: {"FMN": attacks.fmn, "JSMA": attacks.jsma, "CW": attacks.carlini_wagner},
}


def main(images: int = 12, seconds: float = 30.0) -> None:
    torch.set_num_threads(1)
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=100)
    right = model(x).argmax(1) == y
    x, y, table = x[right][:images], y[right][:images], json.loads(STORE.read_text()) if STORE.exists() else {}
    for norm, field in FIELD.items():
        upper = {name: attack(model, x, y, norm=norm).distance for name, attack in field.items()}
        best = torch.stack(list(upper.values())).amin(0)
        ratios: dict[str, list[float]] = {name: [] for name in ("best", *upper)}
        for i in range(len(x)):
            c = minimal_distortion(model, x[i], int(y[i]), norm=norm, time_limit=seconds, progress=False)
            if c.upper < inf and (c.upper - c.lower) <= 2e-3 * c.upper:
                for name, d in (("best", best), *upper.items()):
                    ratios[name].append(float(d[i]) / c.upper)
        solved = len(ratios["best"])
        table[f"{norm}"] = {"images": len(x), "solved": solved, "seconds": seconds} | (
            {"worst": max(ratios["best"]), "median": {k: median(v) for k, v in ratios.items()}} if solved else {})
        print(f"l{norm}", table[f"{norm}"], flush=True)
        STORE.with_suffix(".part").write_text(json.dumps(table, indent=1))
        STORE.with_suffix(".part").replace(STORE)


if __name__ == "__main__":
    main(*[kind(v) for kind, v in zip((int, float), sys.argv[1:], strict=False)])

"""Measure exact verification: our branch and bound on shipped digits, and on published instances from a folder.

    python benchmarks/verification.py [--images 50] [--highs 5] [--instances DIR] [--timeout 300]

Prints a Markdown table. CPU seconds (time.process_time) in one process with one thread; nothing of the folder is part of the
project: it holds `mnist_fc`, `acasxu` and `mipverify` with `verdicts.csv`, as described in benchmarks/verification.md.
"""
import argparse
import csv
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from advcourse import data, models
from advcourse.certify import branch, exact, vnnlib

MODEL, SEEDS = "mnist-mlp50-standard", "all random starts from seed 0"


def timed(run: Callable, *args, **kw):
    """(what run returns, CPU seconds)."""
    start = time.process_time()
    out = run(*args, **kw)
    return out, time.process_time() - start


def row(*cells) -> None:
    print("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def distortion(images: int, highs: int, timeout: float) -> None:
    """Problem 1 on the shipped network: median, mean and maximum, and whether HiGHS gives the same bracket."""
    model = models.load(MODEL)
    x, y = data.mnist("test", n=images)
    ours = [timed(branch.minimal_distortion, model, x[i], int(y[i]), time_limit=timeout) for i in range(images)]
    closed = sum(c.status == "falsified" for c, _ in ours)
    seconds = [s for _, s in ours]
    row(f"minimal l∞ distortion, {MODEL}, gap 1e-3", f"{closed}/{images} closed", median(seconds), mean(seconds), max(seconds))
    if highs:
        theirs = [timed(exact.minimal_distortion, model, x[i], int(y[i]), time_limit=timeout) for i in range(highs)]
        agree = sum(a.lower <= b.upper and b.lower <= a.upper for (a, _), (b, _) in zip(ours, theirs, strict=False))
        seconds = [s for _, s in theirs]
        row("the same by HiGHS (exact.minimal_distortion)", f"{agree}/{highs} brackets agree with ours", median(seconds),
            mean(seconds), max(seconds))


def competition(folder: Path, timeout: float) -> None:
    """The VNN-LIB instances, one line a family."""
    with open(folder / "verdicts.csv") as file:
        instances = list(csv.DictReader(file))
    families: dict[str, list] = {}
    for one in instances:
        name = one["network"].removesuffix(".onnx").replace("ACASXU_run2a", "*").split("_batch")[0]
        families.setdefault("acasxu" if name.startswith("acasxu") else name, []).append(one)
    for family, members in families.items():
        seconds, wrong, open_ = [], [], []
        for one in members:
            files = [next(p for p in (folder / f, folder / (f + ".gz")) if p.exists()) for f in (one["network"], one["property"])]
            found, s = timed(vnnlib.verify, *files, time_limit=timeout)
            seconds.append(s)
            label = Path(one["network"]).stem + " " + Path(one["property"]).stem
            if found.name not in ("sat", "unsat"):
                open_.append(f"{label}: {found.name}, consensus {one['verdict']}")
            elif one["verdict"] in ("sat", "unsat") and found.name != one["verdict"]:
                wrong.append(label)
        note = "; ".join([f"{len(members) - len(open_)}/{len(members)} decided, {len(wrong)} wrong", *open_, *wrong])
        row(f"{family}, {len(members)} instances, sum {sum(seconds):.2f} s", note, median(seconds), mean(seconds), max(seconds))


def wk17a(folder: Path, images: int, timeout: float) -> None:
    """The convolutional network of Wong and Kolter as MIPVerify publishes it, at 0.1."""
    model = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10))
    file = next((folder / "mipverify").glob("weights_mnist_WK17a*.pth"))
    stored = torch.load(file, weights_only=True, map_location="cpu")
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    x, y = data.mnist("test", n=max(images, 246))
    for name, which in ((f"WK17a at 0.1, test images 0 to {images - 1}", range(images)),
                        ("WK17a, MIPVerify's hard samples 63, 212, 246", (62, 211, 245))):
        found = [timed(branch.verify, model, x[i], int(y[i]), eps=0.1, time_limit=timeout) for i in which]
        seconds, status = [s for _, s in found], [c.status for c, _ in found]
        note = ", ".join(f"{status.count(s)} {s}" for s in ("robust", "falsified", "unknown"))
        row(name, note, median(seconds), mean(seconds), max(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50, help="shipped test digits for the minimal distortion")
    parser.add_argument("--highs", type=int, default=0, help="how many of them HiGHS solves as well")
    parser.add_argument("--instances", type=Path, help="folder with the published instances; left out without it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds (wall) for each instance")
    args = parser.parse_args()
    torch.set_num_threads(1)
    row("what", "answers", "median CPU s", "mean CPU s", "max CPU s")
    row(*["---"] * 5)
    distortion(args.images, args.highs, args.timeout)
    if args.instances:
        wk17a(args.instances, 50, args.timeout)
        competition(args.instances, args.timeout)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{platform.machine()}, one thread of 2 cores; Python {platform.python_version()}, torch {torch.__version__}, "
          f"highspy {version('highspy')}, scipy {version('scipy')}; {SEEDS}; peak memory {peak:.2f} GB.")


if __name__ == "__main__":
    main()

"""Our attacks against those of six other libraries: the same networks, images, radii, machine and judge.

    python benchmarks/attacks.py                    measure, write attacks.json and attacks.md beside this file
    python benchmarks/attacks.py --only CW DDN      measure the cases whose names contain one of these, keep the others
    python benchmarks/attacks.py --summary          print the short table from attacks.json

CPU seconds of one thread (the least of several runs, interleaved; slow ones run once). Success and distance are judged here, by
a forward pass of the network on the returned images, in the box and in the ball; a failure has distance inf. Queries: images
handed to the network.
"""
import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import time
import warnings
from math import inf
from pathlib import Path

import numpy as np
import torch
from _peers import PACKAGES, contenders, next_class

from advcourse import attacks, data, losses, models, threat

HERE, SEED = Path(__file__).resolve().parent, 0
EPS = {"mnist-mlp50-standard": {inf: 0.05, 2: 0.75}, "mnist-cnn-standard": {inf: 0.08, 2: 1.0}}


def seeded():
    return torch.Generator().manual_seed(torch.initial_seed())      # `timed` has set it


# case: (norm, does it have a radius, images for the MLP and for the CNN, our calls)
CASES = {
    "FGSM ℓ∞": (inf, True, (200, 100), {"ours": lambda m, x, y, e: attacks.fgsm(m, x, y, eps=e)}),
    "PGD-40 ℓ∞": (inf, True, (200, 100), {"ours": lambda m, x, y, e: attacks.pgd(m, x, y, eps=e, generator=seeded())}),
    "PGD-40 ℓ2": (2, True, (200, 100), {"ours": lambda m, x, y, e: attacks.pgd(m, x, y, eps=e, norm=2, generator=seeded())}),
    "APGD-100 ℓ∞": (inf, True, (200, 100), {"ours": lambda m, x, y, e: attacks.apgd(m, x, y, eps=e, generator=seeded())}),
    "DeepFool ℓ2": (2, False, (60, 30), {"ours": lambda m, x, y, e: attacks.deepfool(m, x, y)}),
    "DeepFool ℓ∞": (inf, False, (200, 100), {"ours": lambda m, x, y, e: attacks.deepfool(m, x, y, norm=inf)}),
    "CW ℓ2": (2, False, (60, 20), {"ours": lambda m, x, y, e: attacks.carlini_wagner(m, x, y)}),
    "DDN ℓ2": (2, False, (200, 100), {"ours": lambda m, x, y, e: attacks.ddn(m, x, y)}),
    "FMN ℓ∞": (inf, False, (200, 100), {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=inf)}),
    "FMN ℓ2": (2, False, (200, 100), {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=2)}),
    "FMN ℓ1": (1, False, (200, 100), {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=1)}),
    "FMN ℓ0": (0, False, (200, 100), {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=0)}),
    "JSMA ℓ0, targeted": (0, False, (50, 20), {"ours": lambda m, x, y, e: attacks.jsma(m, x, y, target=next_class(y))}),
    "Three pixels": (0, False, (20, 20), {"ours": lambda m, x, y, e: attacks.one_pixel(m, x, y, eps=3, generator=seeded())}),
    "Square ℓ∞": (inf, True, (50, 30), {"ours": lambda m, x, y, e: attacks.square(m, x, y, eps=e, generator=seeded())}),
    "Square ℓ2": (2, True, (50, 30), {"ours": lambda m, x, y, e: attacks.square(m, x, y, eps=e, norm=2, generator=seeded())}),
    "HopSkipJump ℓ2": (2, False, (10, 10), {
        "ours": lambda m, x, y, e: attacks.hop_skip_jump(m, x, y, queries=3900, generator=seeded())}),
    "Universal ℓ∞": (inf, True, (100, 50), {
        "ours": lambda m, x, y, e: attacks.universal_sgd(m, x, y, eps=e, generator=seeded()),
        "ours, DeepFool steps": lambda m, x, y, e: attacks.universal_deepfool(m, x, y, eps=e, generator=seeded())}),
}


class Counted(torch.nn.Module):
    """The network, counting the images it is shown; some libraries hand it float64."""

    def __init__(self, model):
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x):
        self.images += len(x)
        return self.model(x.float())


def bare_passes(k: int):
    """k forward and backward passes and nothing else."""
    def call(model, x, y, eps):
        for _ in range(k):
            a = x.detach().requires_grad_()
            torch.autograd.grad(losses.cross_entropy(model(a), y).sum(), a)
        return x
    return call


def judge(model, x, y, a, norm, eps, targeted: bool) -> tuple[float, float]:
    """(share of successes, median distance, inf where the attack failed)."""
    a = a.detach().reshape(x.shape).to(x.dtype)
    with torch.no_grad():
        guess = model(a).argmax(1)
    d = threat.distance(a, x, norm)
    won = (guess == next_class(y)) if targeted else guess != y
    won &= (a.flatten(1).amin(1) >= 0) & (a.flatten(1).amax(1) <= 1) & (d <= eps * (1 + 1e-5) + 1e-6)
    return float(won.float().mean()), float(torch.where(won, d, inf).median())


def measure(case: str, name: str) -> list[dict]:
    """All contenders of one case on one network."""
    norm, bounded, sizes, own = CASES[case]
    model = models.load(name)
    eps = (0.2 if case.startswith("Universal") else EPS[name][norm]) if bounded else inf
    x, y = data.mnist("test", n=1000)
    right = model(x).argmax(1) == y
    if case.startswith("HopSkip"):          # two libraries give up on the batch if one image has no random start
        right &= model(torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(SEED))).argmax(1) != y
    x, y = x[right], y[right]
    n = sizes["cnn" in name]
    calls = {**own, **{k: (lambda m, x, y, e, f=f: f(m, x, y)) for k, f in contenders(case, eps).items()}}
    if case.split("-")[0] in ("FGSM ℓ∞", "PGD"):
        calls["bare passes"] = bare_passes(40 if "40" in case else 1)
    rows = []
    for who, call in calls.items():
        counted = Counted(model)
        try:
            (a, seconds) = timed(call, counted, x[:n], y[:n], eps)
        except Exception as error:          # a peer that breaks is a result, not an accident of ours
            rows.append({"case": case, "network": name, "who": who, "error": f"{type(error).__name__}: {error}"[:120]})
            continue
        a = getattr(a, "adversarial", a) if not hasattr(a, "delta") else a.delta
        seen_x, seen_y = x[:n], y[:n]
        if case.startswith("Universal") and who != "bare passes":   # judged on images it was not made on
            seen_x, seen_y = x[n:n + 400], y[n:n + 400]
            a = (seen_x + a).clamp(0, 1)
        success, median = judge(model, seen_x, seen_y, a, norm, eps, "targeted" in case)
        rows.append({"case": case, "network": name, "who": who, "n": n, "eps": eps, "success": success, "median": median,
                     "queries": counted.images / n, "seconds": seconds, "seeds": [success], "call": call, "model": counted})
    for k in range(10):                     # interleaved, so that a busy moment hits everybody
        for row in rows:
            if "seconds" in row and row["seconds"] * k < 0.3:
                a, seconds = timed(row["call"], row["model"], x[:n], y[:n], eps, seed=k + 1)
                row["seconds"] = min(row["seconds"], seconds)
                if not case.startswith("Universal") and row["who"] != "bare passes":
                    a = getattr(a, "adversarial", a)
                    row["seeds"].append(judge(model, x[:n], y[:n], a, norm, eps, "targeted" in case)[0])
    for row in rows:
        if "seeds" in row:
            row["success"] = sum(row["seeds"]) / len(row["seeds"])
    return [{k: v for k, v in row.items() if k not in ("call", "model")} for row in rows]


def timed(call, model, x, y, eps, seed: int = SEED):
    torch.manual_seed(seed)
    np.random.seed(seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        a = call(model, x.clone(), y.clone(), eps)
        return a, time.process_time() - start


def equal(peer: dict, ours: dict) -> bool:
    """Is the peer at least as strong as ours: success, at its best seed, not lower; median distance at most 1 % longer?"""
    return max(peer["seeds"]) >= ours["success"] and (ours["eps"] < inf or peer["median"] <= 1.01 * ours["median"])


def verdict(ours: dict, peers: list[dict]) -> tuple[str, str]:
    """(strength, speed) of ours against the peers of one case, in words."""
    best = max((p["success"] for p in peers), default=0.0)
    near = min((p["median"] for p in peers), default=inf)
    strong = max(ours["seeds"]) >= best and (ours["eps"] < inf or ours["median"] <= 1.01 * near)
    rivals = [p for p in peers if equal(p, ours)]
    if not rivals:
        return ("stronger than all" if strong else "weaker"), "no peer as strong"
    fastest = min(rivals, key=lambda p: p["seconds"])
    ratio = fastest["seconds"] / ours["seconds"]
    return ("not weaker" if strong else "weaker"), f"{ratio:.2g}x ({fastest['who']})"


def groups(rows: list[dict]):
    """(network, case, ours, peers, bare passes or None) in the order of the table."""
    for network in EPS:
        for case in CASES:
            here = [r for r in rows if r["case"] == case and r["network"] == network]
            ours = next((r for r in here if r["who"] == "ours"), None)
            if ours and "error" not in ours:
                peers = [r for r in here if not r["who"].startswith(("ours", "bare")) and "error" not in r]
                yield network, case, ours, peers, next((r for r in here if r["who"] == "bare passes"), None), here


def shown(row: dict) -> str:
    """Success and, without a radius, the median distance."""
    pixels = "ℓ0" in row["case"]
    if "pixels" in row["case"] or row["eps"] < inf:
        return f"{row['success']:.1%}"
    return f"{row['success']:.0%}, {row['median']:{'.0f' if pixels else '.3f'}}"


def summary(rows: list[dict]) -> str:
    """The short table: one line a case and network."""
    lines = ["| attack | network | ours | strongest peer | strength | fastest equal peer, time / ours | bare passes / ours |",
             "|---|---|---|---|---|---|---|"]
    for network, case, ours, peers, bare, _ in groups(rows):
        strongest = min(peers, key=lambda p: (-p["success"], p["median"]), default=None)
        strength, speed = verdict(ours, peers)
        best = f"{shown(strongest)} ({strongest['who']})" if strongest else ""
        passes = f"{bare['seconds'] / ours['seconds']:.2f}" if bare else ""
        lines.append(f"| {case} | {'MLP' if 'mlp' in network else 'CNN'} | {shown(ours)} | "
                     f"{best} | {strength} | {speed} | {passes} |")
    return "\n".join(lines)


def details(rows: list[dict]) -> str:
    """Every contender of every case."""
    lines = []
    for network in EPS:
        lines += [f"\n## `{network}`\n", "| attack | library | images | radius | success | median distance | queries an image | "
                  "CPU ms an image | time / ours |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
        for name, case, ours, _, _, here in groups(rows):
            for r in here if name == network else ():
                if "error" in r:
                    lines.append(f"| {case} | {r['who']} | | | {r['error'].replace('|', '/')} | | | | |")
                    continue
                bare = r["who"] == "bare passes"
                result = " | " if bare else f"{r['success']:.1%} | {r['median']:.3f}"
                lines.append(f"| {case} | {r['who']} | {r['n']} | {r['eps'] if r['eps'] < inf else ''} | {result} | "
                             f"{r['queries']:.0f} | {1e3 * r['seconds'] / r['n']:.3g} | {r['seconds'] / ours['seconds']:.2f} |")
    return "\n".join(lines)


def report(results: dict) -> str:
    rows = results["rows"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    notes = (HERE / "attacks-notes.md").read_text(encoding="utf-8")
    return f"""# Attacks measured against other libraries

Written by `make bench-attacks` (`python benchmarks/attacks.py`); no number in the tables was typed. {results['machine']}.
One torch thread, {versions}. Seeds {SEED}, {SEED + 1}, … (slow attacks: {SEED} alone); the success is
the mean over them, the median that of seed {SEED}.

CPU seconds{__doc__.split("CPU seconds", 1)[1].rstrip()} A case has a like budget for every library (the calls are in
`benchmarks/_peers.py`), except that ours stops early on images already broken and ends minimal-norm attacks with `pull_back`.
JSMA aims at the class (y + 1) mod 10. Universal perturbations are judged on 400 images they were not made on.

"Equal" and "not weaker": success, at the best of its seeds, not below the other's mean, and without a radius a median distance
at most 1 % longer. "Time / ours" above 1: the other one is slower.

{notes.strip()}

## In short

{summary(rows)}

## The best attack against the exact distance

`mnist-mlp50-standard`, written by `python benchmarks/gap_to_exact.py`: the least distance of our minimal-norm attacks over the
exact distance, on the images for which exact search settled it in time: the easier ones, and few.

{gaps()}
{details(rows)}
"""


def gaps() -> str:
    """The table of gap_to_exact.json."""
    store = HERE / "gap_to_exact.json"
    lines = ["| norm | images settled | best attack / exact, median | worst | each attack, median |", "|---|---:|---:|---:|---|"]
    for norm, row in (json.loads(store.read_text()) if store.exists() else {}).items():
        if row["solved"]:
            each = ", ".join(f"{k} {v:.3f}" for k, v in row["median"].items() if k != "best")
            lines.append(f"| ℓ{norm.replace('inf', '∞')} | {row['solved']} of {row['images']} ({row['seconds']:.0f} s each) | "
                         f"{row['median']['best']:.3f} | {row['worst']:.3f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases")
    parser.add_argument("--summary", action="store_true", help="print the short table of the committed results")
    args = parser.parse_args()
    store = HERE / "attacks.json"
    results = json.loads(store.read_text()) if store.exists() else {"rows": []}
    for r in results["rows"]:
        r.setdefault("seeds", [r.get("success")])
    if args.summary:
        return print(summary(results["rows"]))
    missing = [k for k, package in PACKAGES.items() if not installed(package)]
    if len(missing) == len(PACKAGES):
        return print("none of the other libraries is installed here: make bench-attacks")
    print("not installed:", ", ".join(missing) or "nothing")
    torch.set_num_threads(1)
    for case in [c for c in CASES if any(part in c for part in args.only)]:
        for name in EPS:
            fresh = measure(case, name)
            results["rows"] = [r for r in results["rows"] if (r["case"], r["network"]) != (case, name)] + fresh
            for r in fresh:
                print(case, name, r["who"], r.get("error") or f"{r['success']:.3f} {r['median']:.4f} {r['queries']:.0f} "
                      f"{r['seconds']:.4f} s", flush=True)
            save(results, store)


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(results: dict, store: Path) -> None:
    packages = {"torch": "torch", "numpy": "numpy", **PACKAGES}
    results["versions"] = {library: installed(package) for library, package in packages.items() if installed(package)}
    results["machine"] = f"{platform.machine()} with {os.cpu_count()} cores, no GPU, Python {platform.python_version()}"
    for path, text in ((store, json.dumps(results, indent=0)), (store.with_suffix(".md"), report(results))):
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()

"""Our attacks against those of six other libraries: the same networks, images, radii, machine and judge.

    python benchmarks/attacks.py                    measure everything, about ten minutes; writes attacks.json and attacks.md
    python benchmarks/attacks.py --only FGSM DDN    measure the cases whose names contain one of these, keep the others
    python benchmarks/attacks.py --images 5 --store trial.json      a trial of the machinery, kept elsewhere (a minute)
    python benchmarks/attacks.py --summary          print the short table of the stored results; --report: write attacks.md anew
"""
import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import random
import time
import warnings
from math import inf
from pathlib import Path

import numpy as np
import torch
from _peers import PACKAGES, contenders, next_class
from _report import report, success, summary
from gap_to_exact import FIRST
from tqdm import tqdm

from advcourse import attacks, data, losses, models, threat

HERE = Path(__file__).resolve().parent
EPS = {"mnist-mlp50-standard": {inf: 0.05, 2: 0.75}, "mnist-cnn-standard": {inf: 0.08, 2: 1.0}}
JUDGED = 350        # images on which a universal perturbation is judged


def seeded():
    return torch.Generator().manual_seed(torch.initial_seed())      # `timed` has set it


# case: (norm, radius: None without one, True for EPS's, images for the MLP and for the CNN, seeds, our calls)
CASES = {
    "FGSM ℓ∞": (inf, True, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.fgsm(m, x, y, eps=e)}),
    "PGD-40 ℓ∞": (inf, True, (200, 100), 5, {"ours": lambda m, x, y, e: attacks.pgd(m, x, y, eps=e, generator=seeded())}),
    "PGD-40 ℓ2": (2, True, (200, 100), 5, {"ours": lambda m, x, y, e: attacks.pgd(m, x, y, eps=e, norm=2, generator=seeded())}),
    "APGD-100 ℓ∞": (inf, True, (200, 100), 5, {"ours": lambda m, x, y, e: attacks.apgd(m, x, y, eps=e, generator=seeded())}),
    "DeepFool ℓ2": (2, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.deepfool(m, x, y)}),
    "DeepFool ℓ∞": (inf, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.deepfool(m, x, y, norm=inf)}),
    "CW ℓ2": (2, None, (100, 50), 1, {"ours": lambda m, x, y, e: attacks.carlini_wagner(m, x, y)}),
    "DDN ℓ2": (2, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.ddn(m, x, y)}),
    "FMN ℓ∞": (inf, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=inf)}),
    "FMN ℓ2": (2, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=2)}),
    "FMN ℓ1": (1, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=1)}),
    "FMN ℓ0": (0, None, (200, 100), 1, {"ours": lambda m, x, y, e: attacks.fmn(m, x, y, norm=0)}),
    "JSMA ℓ0, targeted": (0, None, (100, 50), 1, {"ours": lambda m, x, y, e: attacks.jsma(m, x, y, target=next_class(y))}),
    "Three pixels": (0, 3, (50, 40), 3, {"ours": lambda m, x, y, e: attacks.one_pixel(m, x, y, eps=3, generator=seeded())}),
    "Square ℓ∞": (inf, True, (100, 60), 5, {"ours": lambda m, x, y, e: attacks.square(m, x, y, eps=e, generator=seeded())}),
    "Square ℓ2": (2, True, (100, 60), 5, {"ours": lambda m, x, y, e: attacks.square(m, x, y, eps=e, norm=2, generator=seeded())}),
    "HopSkipJump ℓ2": (2, None, (40, 40), 3, {
        "ours": lambda m, x, y, e: attacks.hop_skip_jump(m, x, y, queries=3900, generator=seeded())}),
    "Universal ℓ∞": (inf, 0.2, (100, 50), 3, {
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


class Ledger(Counted):
    """Counts for each of the images x [n] the queries until one broke it; a query belongs to the image it is nearest to."""

    def __init__(self, model, x, y):
        super().__init__(model)
        self.x, self.y, self.useful, self.open = x.flatten(1), y, torch.zeros(len(x)), torch.ones(len(x), dtype=torch.bool)

    def forward(self, a):
        logits = super().forward(a)
        whose = torch.cdist(a.detach().flatten(1).float(), self.x).argmin(1)
        self.useful += torch.bincount(whose, minlength=len(self.x)) * self.open
        self.open[whose[logits.argmax(1) != self.y[whose]]] = False
        return logits


def bare_passes(k: int, judging: bool):
    """k forward and backward passes and nothing else, or one more forward pass that says what is broken."""
    def call(model, x, y, eps):
        for _ in range(k):
            a = x.detach().requires_grad_()
            torch.autograd.grad(losses.cross_entropy(model(a), y).sum(), a)
        if judging:
            with torch.no_grad():
                model(x)
        return x
    return call


def judge(model, x, y, a, norm, eps, targeted: bool) -> torch.Tensor:
    """Distances [n], inf where the attack failed."""
    a = a.detach().reshape(x.shape).to(x.dtype)
    with torch.no_grad():
        guess = model(a).argmax(1)
    d = threat.distance(a, x, norm)
    won = (guess == next_class(y)) if targeted else guess != y
    won &= (a.flatten(1).amin(1) >= 0) & (a.flatten(1).amax(1) <= 1) & (d <= eps * (1 + 1e-5) + 1e-6)
    return torch.where(won, d, inf)


def timed(call, model, x, y, eps, seed: int):
    """(what the attack returns, CPU seconds)."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    x, y = x.clone(), y.clone()             # some write into what they are given
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        a = call(model, x, y, eps)
        return a, time.process_time() - start


class Contender:
    """One library in one case: its calls, what they found and what they cost."""

    def __init__(self, who: str, call, model) -> None:
        self.who, self.call, self.model = who, call, Counted(model)
        self.found: list[torch.Tensor] = []
        self.seconds: dict[int, list[float]] = {}
        self.error = ""

    def run(self, x, y, eps, seed: int):
        try:
            a, seconds = timed(self.call, self.model, x, y, eps, seed)
        except Exception as error:          # a peer that breaks is a result, not an accident of ours
            self.error = f"{type(error).__name__}: {error}"[:120]
            return None
        self.seconds.setdefault(seed, []).append(seconds)
        return a.delta if hasattr(a, "delta") else getattr(a, "adversarial", a)

    def row(self, n: int, eps: float) -> dict:
        if self.error:
            return {"who": self.who, "error": self.error}
        runs, out = sum(map(len, self.seconds.values())), {"who": self.who, "n": n, "seeds": len(self.seconds), "eps": eps}
        if self.found:
            out["won"] = ["".join("01"[d < inf] for d in seed.tolist()) for seed in self.found]
        if self.found and eps == inf:
            out["distance"] = [[float(f"{d:.5g}") for d in seed.tolist()] for seed in self.found]
        least = [min(each) for each in self.seconds.values()]
        return out | {"queries": self.model.images / n / runs, "seconds": sum(least) / len(least)}


def images(case: str, model):
    """Fresh, correctly classified digits."""
    x, y = data.mnist("test")
    x, y = x[FIRST:], y[FIRST:]
    right = model(x).argmax(1) == y
    if case.startswith("HopSkip"):          # two libraries give up on the batch if one image has no random start
        right &= model(torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))).argmax(1) != y
    return x[right], y[right]


def measure(case: str, name: str, most: int) -> list[dict]:
    """All contenders of one case on one network, on `most` images at most."""
    norm, radius, sizes, seeds, own = CASES[case]
    model, n = models.load(name), min(most, sizes["cnn" in name])
    eps = inf if radius is None else EPS[name][norm] if radius is True else radius
    x, y = images(case, model)
    seen, rest = (x[:n], y[:n]), (x[n:n + JUDGED], y[n:n + JUDGED])
    calls = own | {k: (lambda m, x, y, e, f=f: f(m, x, y)) for k, f in contenders(case, eps).items()}
    if case.split("-")[0] in ("FGSM ℓ∞", "PGD"):
        k = 40 if "40" in case else 1
        calls |= {"bare passes": bare_passes(k, False), "bare passes, judged": bare_passes(k, True)}
    field = [Contender(who, call, model) for who, call in calls.items()]
    for k in range(max(seeds, 20)):         # interleaved, so that a busy moment hits everybody
        for c in field:
            if c.error or k >= seeds and sum(map(sum, c.seconds.values())) > 0.5:
                continue
            a = c.run(*seen, eps, k % seeds)
            if a is None or k >= seeds or c.who.startswith("bare"):
                continue
            if case.startswith("Universal"):
                c.found.append(judge(model, *rest, (rest[0] + a).clamp(0, 1), norm, eps, False))
            else:
                c.found.append(judge(model, *seen, a, norm, eps, "targeted" in case))
    rows = [{"case": case, "network": name} | c.row(n, eps) for c in field]
    if case.startswith("Square"):
        for row in (r for r in rows if "error" not in r):
            ledger = Ledger(model, *seen)
            timed(calls[row["who"]], ledger, *seen, eps, 0)
            row["useful"] = ledger.useful.sum().item() / ledger.images
    return rows


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(path: Path, text: str) -> None:
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").replace(path)


def save(results: dict, store: Path) -> None:
    """One row a line, in the order of the table; then the report."""
    place = {(name, case): k for k, (name, case) in enumerate((name, case) for name in EPS for case in CASES)}
    results["rows"].sort(key=lambda r: place[r["network"], r["case"]])
    rows = ",\n".join(json.dumps(r, ensure_ascii=False) for r in results["rows"])
    rest = {k: v for k, v in results.items() if k != "rows"}
    write(store, json.dumps(rest, ensure_ascii=False)[:-1] + f', "rows": [\n{rows}\n]}}\n')
    write(store.with_suffix(".md"), report(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases")
    parser.add_argument("--images", type=int, default=10**6, help="at most so many images a case: for a trial")
    parser.add_argument("--store", type=Path, default=HERE / "attacks.json", help="where the results are kept")
    parser.add_argument("--summary", action="store_true", help="print the short table of the stored results, measure nothing")
    parser.add_argument("--report", action="store_true", help="write the report of the stored results, measure nothing")
    args = parser.parse_args()
    results = json.loads(args.store.read_text(encoding="utf-8")) if args.store.exists() else {"rows": []}
    if args.summary:
        return print(summary(results["rows"]))
    if args.report:
        return save(results, args.store)
    missing = [k for k, package in PACKAGES.items() if not installed(package)]
    if len(missing) == len(PACKAGES):
        return print("none of the other libraries is installed here: make bench-attacks")
    print("not installed:", ", ".join(missing) or "nothing")
    torch.set_num_threads(1)
    packages = {"torch": "torch", "numpy": "numpy", **PACKAGES}
    results["versions"] = {library: installed(package) for library, package in packages.items() if installed(package)}
    results["machine"] = f"{platform.machine()} with {os.cpu_count()} cores, no GPU, Python {platform.python_version()}"
    todo = [(case, name) for case in CASES if any(part in case for part in args.only) for name in EPS]
    for case, name in (bar := tqdm(todo, disable=None)):
        bar.set_description(f"{case}, {name}")
        fresh = measure(case, name, args.images)
        results["rows"] = [r for r in results["rows"] if (r["case"], r["network"]) != (case, name)] + fresh
        for r in fresh:
            bar.write(f"{case}, {name}, {r['who']}: " + (r.get("error") or f"{r['seconds'] / r['n'] * 1e3:.4g} ms an image" + (
                f", success {success(r):.3f}" if "won" in r else "")))
        save(results, args.store)
    print(summary([r for r in results["rows"] if (r["case"], r["network"]) in todo]))


if __name__ == "__main__":
    main()

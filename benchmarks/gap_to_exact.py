"""The best minimal-norm attack against the exact distance, image by image: mnist-mlp50-standard, four norms.

    python benchmarks/gap_to_exact.py                    search what is open, attack, print the table
    python benchmarks/gap_to_exact.py --seconds 0        attack only, against the brackets already known (a minute)
    python benchmarks/gap_to_exact.py --norms 2 --seconds 600      more time for the images that are open in l2
    python benchmarks/gap_to_exact.py --table            print the stored table, compute nothing

gap_to_exact.json keeps lower <= d* <= upper for each image: attacks change, exact distances do not. A run may be interrupted
at any time; it goes on where it stopped, and tries an open image again only with more seconds than before. An attack nearer
than the proved lower bound means that one of the two is wrong: the run fails.
"""
import argparse
import json
import time
from collections import Counter
from math import inf
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from advcourse import attacks, data, models
from advcourse.certify import branch, exact, network
from advcourse.certify.question import Question

STORE = Path(__file__).resolve().with_suffix(".json")
FIRST, GAP = 500, 1e-3                          # the first test digit used here and in attacks.py; relative gap of "settled"
IMAGES = dict.fromkeys((inf, 2, 1, 0), 50)
FIELD = {
    inf: {"FMN": attacks.fmn, "DeepFool": attacks.deepfool, "CW": attacks.carlini_wagner},
    2: {"FMN": attacks.fmn, "DDN": attacks.ddn, "DeepFool": attacks.deepfool, "CW": attacks.carlini_wagner},
    1: {"FMN": attacks.fmn, "DeepFool": attacks.deepfool},
    0: {"FMN": attacks.fmn, "JSMA": attacks.jsma, "CW": attacks.carlini_wagner},
}


def settled(one: dict) -> bool:
    return one["upper"] - one["lower"] <= 1.001 * GAP * one["upper"]


def search(model, x, y, norm, seconds: float, known: dict) -> dict:
    """The bracket of one image after `seconds` more for each question asked, and who proved it. KeyboardInterrupt passes."""
    start = time.process_time()
    q, upper = Question(model, network(model, x.shape), x, y), known.get("upper", inf)
    with torch.no_grad():
        for attack in FIELD[norm].values():             # a search that knows a near witness has less to do
            found = q.replay(attack(model, x[None], torch.tensor([y]), norm=norm).adversarial[0], inf, norm)
            upper = min(upper, inf if found is None else found[1])
        lower, upper, by = (fewest if norm == 0 else nearest)(q, norm, seconds, upper)
    return {"lower": max(lower, known.get("lower", 0.0)), "upper": upper, "by": by,
            "cpu": round(time.process_time() - start, 2), "limit": seconds}


def answered(c):
    if c.note == "interrupted":
        raise KeyboardInterrupt
    return c


def nearest(q, norm, seconds: float, upper: float) -> tuple[float, float, str]:
    """Is there no witness nearer than `upper`, the best known? Else which is the nearest? Else, is there none much nearer?"""
    for gap in (GAP, None, 5e-3, 0.02, 0.1, 0.3):
        if gap is not None:
            c = answered(branch.verify(q.model, q.x, q.y, eps=(1 - gap) * upper, norm=norm, time_limit=seconds))
            if c.status == "robust":
                return (1 - gap) * upper, upper, "branch and bound"
            continue
        c = answered(branch.minimal_distortion(q.model, q.x, q.y, norm=norm, gap=GAP, time_limit=seconds))
        upper = min(upper, c.upper)
        if c.lower >= (1 - 1.001 * GAP) * upper:
            return c.lower, upper, "branch and bound"
    return 0.0, upper, "branch and bound"


def fewest(q, norm, seconds: float, upper: float) -> tuple[float, float, str]:
    """l0: no witness with one pixel fewer, says our branch and bound, which minimises linear functions over the l0 ball
    exactly (the largest terms). It may end in doubt; then HiGHS is asked."""
    while 1 < upper < inf:
        c = answered(branch.verify(q.model, q.x, q.y, eps=upper - 1, norm=0, time_limit=seconds))
        if c.status == "robust":
            return upper, upper, "branch and bound"
        if c.status == "unknown":
            break
        upper = float((c.counterexample != q.x).sum())
    c = answered(exact.minimal_distortion(q.model, q.x, q.y, norm=0, time_limit=seconds, progress=False))
    return c.lower, min(c.upper, upper), "HiGHS"


def compare(model, x, y, norm, brackets: list[dict]) -> dict[str, list[float]]:
    """Each attack's distances; RuntimeError where one is below what was proved to be impossible (float32: 1e-5)."""
    found = {name: attack(model, x, y, norm=norm).distance.tolist() for name, attack in FIELD[norm].items()}
    for name, distances in found.items():
        for d, one in zip(distances, brackets, strict=True):
            if d < one["lower"] * (1 - 1e-5):
                raise RuntimeError(f"{name} claims l{norm} distance {d} below the proved lower bound: {one}")
    return found


def save(store: dict) -> None:
    STORE.with_suffix(".part").write_text(json.dumps(store, indent=1))
    STORE.with_suffix(".part").replace(STORE)


def table(store: dict) -> str:
    """Markdown: the distance of the nearest attack over the proved lower bound, on all images."""
    lines = ["| norm | images | settled | best attack / lower bound, median | within 3 % | worst | each attack, median "
             "| exact search: median and largest CPU s |", "|---|---:|---:|---:|---:|---:|---|---|"]
    for norm, part in store.items():
        brackets = [one for one in part["exact"].values() if one.get("attacks")]
        if not brackets:
            continue
        ratio = {name: [one["attacks"][name] / one["lower"] if one["lower"] else inf for one in brackets]
                 for name in brackets[0]["attacks"]}
        best = [min(each) for each in zip(*ratio.values(), strict=True)]
        each = ", ".join(f"{name} {median(r):.3f}" for name, r in ratio.items())
        cpu, who = [one["cpu"] for one in brackets], Counter(one["by"] for one in brackets)
        lines.append(f"| ℓ{norm.replace('inf', '∞')} | {len(best)} | {sum(map(settled, brackets))} | {median(best):.3f} | "
                     f"{sum(r <= 1.03 for r in best)} | {max(best):.3f} | {each} | {median(cpu):.2f}, {max(cpu):.1f} ("
                     f"{', '.join(f'{count} by {by}' for by, count in who.items())}) |")
    return "\n".join(lines)


def report() -> str:
    """The stored table and what to know about it, for attacks.md."""
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    return f"""Network `mnist-mlp50-standard`, correctly classified test digits from index {FIRST} on, written by
`python benchmarks/gap_to_exact.py`. Exact search proves `lower <= d*` for each image and settles it where both sides of the
bracket meet within {GAP:.1%} (ℓ0: where they are equal), so that an exact attack shows a ratio of {1 / (1 - GAP):.3f}
(ℓ0: 1). Where it runs out of time, the lower bound is lower than it need be and the ratio larger. "Best attack": on each image,
the nearest of those named; an attack below the lower bound would be an error, and ends the run.

{table(store)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="wall seconds of exact search for each open image")
    parser.add_argument("--norms", nargs="*", default=["inf", "2", "1", "0"], choices=["inf", "2", "1", "0"])
    parser.add_argument("--table", action="store_true", help="print the table of what is stored, compute nothing")
    args = parser.parse_args()
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    if args.table:
        return print(table(store))
    torch.set_num_threads(1)
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test")
    right = [i for i in (model(x).argmax(1) == y).nonzero()[:, 0].tolist() if i >= FIRST]
    for norm in (k for k in FIELD if str(k) in args.norms):
        exact_of, chosen = store.setdefault(str(norm), {"exact": {}})["exact"], right[:IMAGES[norm]]
        todo = [i for i in chosen if (one := exact_of.get(str(i))) is None or not settled(one) and one["limit"] < args.seconds]
        for i in tqdm(todo if args.seconds else [], desc=f"exact l{norm}", disable=None):
            exact_of[str(i)] = search(model, x[i], int(y[i]), norm, args.seconds, exact_of.get(str(i), {}))
            save(store)
        chosen = [i for i in chosen if str(i) in exact_of]
        if chosen:
            found = compare(model, x[chosen], y[chosen], norm, [exact_of[str(i)] for i in chosen])
            for k, i in enumerate(chosen):
                exact_of[str(i)]["attacks"] = {name: distances[k] for name, distances in found.items()}
        save(store)
    print(table(store))


if __name__ == "__main__":
    main()

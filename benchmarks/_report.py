"""What attacks.json says: who is stronger, by how much and how surely, and the Markdown made of it."""
from math import inf, isfinite
from pathlib import Path

import gap_to_exact
import numpy as np

HERE = Path(__file__).resolve().parent


def won(row: dict) -> np.ndarray:
    """[seeds, images] of 0 and 1."""
    return np.array([[int(c) for c in seed] for seed in row["won"]], float)


def success(row: dict) -> float:
    return float(won(row).mean())


def distance(row: dict) -> float:
    """Median over all seeds and images; inf for a failure. Attacks with a radius have none."""
    return float(np.median(row["distance"])) if "distance" in row else inf


def advantage(ours: dict, other: dict) -> tuple[float, float]:
    """Difference of the mean success and its standard error: paired, the larger of that over images and that over seeds."""
    a, b = won(ours), won(other)
    images = a.mean(0) - b.mean(0)
    errors = [images.std(ddof=1) / len(images)**0.5] if len(images) > 1 else [0.0]
    if len(a) > 1 or len(b) > 1:
        errors.append(sum(w.mean(1).var(ddof=1) / len(w) if len(w) > 1 else 0.0 for w in (a, b))**0.5)
    return float(images.mean()), float(max(errors))


def stretch(ours: dict, other: dict) -> tuple[float, float]:
    """Ratio of the median distances and its standard error, from 500 resamples of the images (the same for both)."""
    a, b = np.array(ours["distance"]), np.array(other["distance"])
    top, bottom = np.median(a), np.median(b)
    if not isfinite(top) or not isfinite(bottom):
        return (1.0 if top == bottom else inf if bottom < top else 0.0), 0.0
    pick = np.random.default_rng(0).integers(a.shape[1], size=(500, a.shape[1]))
    with np.errstate(invalid="ignore"):
        ratios = np.median(a[:, pick], axis=(0, 2)) / np.median(b[:, pick], axis=(0, 2))
    return float(top / bottom), float(np.std(ratios[np.isfinite(ratios)]))


def compare(ours: dict, other: dict) -> tuple[str, str]:
    """("stronger", "tie" or "weaker", the number that says so).

    Weaker: success lower by more than one standard error, or a median distance more than 1 % longer and by more than one.
    Stronger: not weaker, and success higher or the distance 1 % shorter by more than two: more is asked of what flatters us.
    """
    gain, error = advantage(ours, other)
    words = [("weaker" if gain < -error - 1e-9 else "stronger" if gain > 2 * error + 1e-9 else "tie",
              f"{100 * gain:+.1f} ± {100 * error:.1f} points")]
    if "distance" in ours:
        ratio, spread = stretch(ours, other)
        words.append(("weaker" if ratio > 1.01 and ratio - 1 > spread else
                      "stronger" if ratio < 0.99 and 1 - ratio > 2 * spread else "tie", f"distance × {ratio:.3f} ± {spread:.3f}"))
    for verdict in ("weaker", "stronger"):
        for word, text in words:
            if word == verdict:
                return word, text
    return words[-1]


ORDER = ("weaker", "tie", "stronger")


def strongest(ours: dict, peers: list[dict]) -> tuple[dict | None, str, str]:
    """The peer that does best against ours, with the verdict on ours."""
    if not peers:
        return None, "no peer", ""
    judged = [(ORDER.index(compare(ours, p)[0]), -success(p), distance(p), k) for k, p in enumerate(peers)]
    best = peers[min(judged)[-1]]
    return best, *compare(ours, best)


def fastest(ours: dict, peers: list[dict]) -> tuple[str, str]:
    """The fastest peer than which ours is not stronger: its time over ours, and its queries over ours."""
    equal = [p for p in peers if compare(ours, p)[0] != "stronger"]
    if not equal:
        return "no peer as strong", ""
    best = min(equal, key=lambda p: p["seconds"])
    return f"{best['seconds'] / ours['seconds']:.2g}x ({best['who']})", f"{best['queries'] / ours['queries']:.2g}x"


def shown(row: dict) -> str:
    """Success and, without a radius, the median distance."""
    share = f"{success(row):.1%}".replace(".0%", "%")
    return f"{share}, {distance(row):{'.0f' if 'ℓ0' in row['case'] else '.3f'}}" if "distance" in row else share


def groups(rows: list[dict]):
    """(all rows, ours, peers, bare passes) of each case on each network, in the order of the rows."""
    for network, case in dict.fromkeys((r["network"], r["case"]) for r in rows):
        here = [r for r in rows if (r["network"], r["case"]) == (network, case)]
        ours = next((r for r in here if r["who"] == "ours" and "error" not in r), None)
        if ours:
            bare = [r for r in here if r["who"].startswith("bare")]
            yield here, ours, [r for r in here if not r["who"].startswith(("ours", "bare")) and "error" not in r], bare


def summary(rows: list[dict]) -> str:
    """The short table: one line a case and network."""
    lines = ["| attack | network | ours | strongest peer | ours is | fastest peer as strong: its time / ours "
             "| its queries / ours | our time / bare passes (and a judging one) |", "|---|---|---|---|---|---|---|---|"]
    for _, ours, peers, bare in groups(rows):
        best, word, number = strongest(ours, peers)
        peer = f"{shown(best)} ({best['who']})" if best else ""
        cost = [f"{ours['seconds'] / r['seconds']:.2f}" for r in bare]
        lines.append(f"| {ours['case']} | {'MLP' if 'mlp' in ours['network'] else 'CNN'} | {shown(ours)} | {peer} | "
                     f"{word} ({number}) | {' | '.join(fastest(ours, peers))} | {f'{cost[0]} ({cost[-1]})' if cost else ''} |")
    return "\n".join(lines)


def details(rows: list[dict]) -> str:
    """Every contender of every case."""
    lines, network = [], None
    for here, ours, _, _ in groups(rows):
        if ours["network"] != network:
            network = ours["network"]
            lines += [f"\n## `{network}`\n", "| attack | library | images × seeds | radius | success | median distance | "
                      "queries an image | CPU ms an image | time / ours |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
        for r in here:
            if "error" in r:
                lines.append(f"| {r['case']} | {r['who']} | | | {r['error'].replace('|', '/')} | | | | |")
                continue
            median = f"{distance(r):.4g}" if "distance" in r else ""
            found = f"{success(r):.1%} | {median}" if "won" in r else " | "
            queries = f"{r['queries']:.0f}" + (f" ({r['useful']:.0%} before it broke)" if "useful" in r else "")
            radius = r["eps"] if r["eps"] < inf else ""
            lines.append(f"| {r['case']} | {r['who']} | {r['n']} × {r['seeds']} | {radius} | {found} | {queries} | "
                         f"{1e3 * r['seconds'] / r['n']:.3g} | {r['seconds'] / ours['seconds']:.2f} |")
    return "\n".join(lines)


def report(results: dict) -> str:
    """All of attacks.md."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return f"""# Attacks measured against other libraries

Written by `make bench-attacks` (`python benchmarks/attacks.py`); no number in the tables was typed.
{results['machine']}. One torch thread, {versions}.

Images: correctly classified test digits from index {gap_to_exact.FIRST} of `data.mnist("test")` on, where no attack was tuned.
Deterministic attacks run once, the others with seeds 0, 1, …; success is the mean and the distance the median over all images
and seeds. Success and distance are judged here, by a forward pass on the returned images, in the box and in the ball; a failure
has distance inf. Queries: images handed to the network. Time: CPU seconds of one thread, for each seed the least of several
interleaved runs (slow ones run once), then the mean over the seeds.

A case has a like budget for every library (`benchmarks/_peers.py`), except that ours stops early on images already broken and
ends minimal-norm attacks with `pull_back`. JSMA aims at the class (y + 1) mod 10. Universal perturbations are judged on images
they were not made on. "Bare passes" are the forward and backward passes alone, and with one more forward pass, which any attack
needs that says what it broke. "Before it broke": the share of the queries on images that no earlier query had broken (of seed 0).

"Ours is" compares with the peer that does best: *weaker* if its success is higher by more than one standard error, or our median
distance more than 1 % longer and by more than one; *stronger* if our success is higher, or our distance more than 1 % shorter,
by more than two; else a *tie*: more is asked of what flatters us. The ± is one standard error, paired over the images, or over
the seeds where that is larger. A peer is "as strong" if ours is not *stronger* than it.

{(HERE / "attacks-notes.md").read_text(encoding="utf-8").strip()}

## In short

{summary(results["rows"])}

## The best attack against the exact distance

{gap_to_exact.report()}
{details(results["rows"])}
"""

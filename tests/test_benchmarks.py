"""The arithmetic of benchmarks/: who counts as stronger, which queries count, and the check of attacks by exact distances."""
import sys
from math import inf
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _report  # noqa: E402
import attacks  # noqa: E402
import gap_to_exact  # noqa: E402


def radius(*seeds: str) -> dict:
    return {"who": "", "won": list(seeds), "seconds": 1.0}


def minimal(*distances: float) -> dict:
    return {"won": ["".join("01"[d < inf] for d in distances)], "distance": [list(distances)]}


def test_difference_of_successes_by_hand():
    gain, error = _report.advantage(radius("1100"), radius("1010"))         # per image: 0, 1, −1, 0
    assert gain == 0 and error == pytest.approx((2 / 3)**0.5 / 2)
    gain, error = _report.advantage(radius("11", "00"), radius("00", "00"))     # over seeds: means 1 and 0, so 0.5 ± 0.5
    assert (gain, error) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize("ours, peer, word", [
    (radius("1" * 50 + "0" * 50), radius("1" * 50 + "0" * 50), "tie"),
    (radius("1" * 51 + "0" * 49), radius("1" * 50 + "0" * 50), "tie"),          # one image: one standard error, not two
    (radius("1" * 60 + "0" * 40), radius("1" * 50 + "0" * 50), "stronger"),
    (radius("1" * 50 + "0" * 50), radius("1" * 60 + "0" * 40), "weaker"),
    (minimal(*[1.0] * 9), minimal(*[1.005] * 9), "tie"),
    (minimal(*[1.0] * 9), minimal(*[1.02] * 9), "stronger"),
    (minimal(*[1.02] * 9), minimal(*[1.0] * 9), "weaker"),
    (minimal(*[1.0] * 9), minimal(*[inf] * 9), "stronger"),
    (minimal(*[inf] * 9), minimal(*[1.0] * 9), "weaker"),
])
def test_stronger_tie_and_weaker(ours, peer, word):
    assert _report.compare(ours, peer)[0] == word


def test_the_peer_that_beats_ours_is_the_one_named():
    ours, peers = minimal(*[1.0] * 9), [minimal(*[1.5] * 9), minimal(*[0.5] * 9)]
    best, word, _ = _report.strongest(ours, peers)
    assert best is peers[1] and word == "weaker"


def test_ledger_counts_until_an_image_breaks():
    def model(a):                               # class 1 as soon as the value is above a half
        return torch.cat([0.5 - a.flatten(1), a.flatten(1) - 0.5], 1)
    ledger = attacks.Ledger(model, torch.tensor([[0.3], [0.0]]), torch.tensor([0, 0]))
    for value in (0.4, 0.6, 0.6, 0.1):          # the first image breaks at its second query; the fourth belongs to the other
        ledger(torch.tensor([[value]]))
    assert ledger.useful.tolist() == [2, 1] and ledger.images == 4


def test_an_attack_below_the_proved_bound_is_refused(monkeypatch):
    class Found:
        distance = torch.tensor([0.5])
    monkeypatch.setitem(gap_to_exact.FIELD, inf, {"too good": lambda model, x, y, norm: Found})
    assert gap_to_exact.compare(None, None, None, inf, [{"lower": 0.5, "upper": 0.6}]) == {"too good": [0.5]}
    with pytest.raises(RuntimeError, match="below the proved lower bound"):
        gap_to_exact.compare(None, None, None, inf, [{"lower": 0.51, "upper": 0.6}])


@pytest.mark.parametrize("norm", [inf, 2, 1, 0])
def test_the_bracket_is_that_of_highs(norm):
    from advcourse import data, models
    model, (x, y) = models.load("mnist-mlp50-standard"), data.mnist("test", 5)
    found = gap_to_exact.search(model, x[3], int(y[3]), norm, 60.0, {})
    c = gap_to_exact.exact.minimal_distortion(model, x[3], int(y[3]), norm=norm, progress=False)
    assert found["by"] == "branch and bound" and c.status == "falsified"
    assert max(found["lower"], c.lower) <= min(found["upper"], c.upper) and gap_to_exact.settled(found)

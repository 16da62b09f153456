"""The SMT route: exact fractions, ties told apart from wins, and the verdict words of a solver of the negation."""
from fractions import Fraction
from math import inf

import pytest
import torch
from hypothesis import given, settings
from networks import mlp
from test_encode import HAND, pooled, tiny  # noqa: F401

from advcourse.certify import smt
from advcourse.certify.network import network

FEW = settings(max_examples=6, deadline=None, derandomize=True)


def test_the_hand_worked_distance_is_an_exact_fraction():
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    for norm in (inf, 1):
        assert smt.minimal_distortion(net, x, 0, norm=norm) == (Fraction(7, 12), [Fraction(5, 6)])
    assert smt.minimal_distortion(net, x, 0, norm=0)[0] == 1


def test_floats_go_over_without_rounding():
    """0.1 is not a tenth: the distance is the quotient of the two floats, to the last digit."""
    net = network(mlp(([[0.1], [0.]], [0., 0.03])), (1,))
    d, _ = smt.minimal_distortion(net, torch.tensor([[1.]]), 0)
    assert d == 1 - Fraction(0.03) / Fraction(0.1) and d != Fraction(7, 10)


def test_a_billionth_is_seen():
    """Radii that differ by 1e-12 get different verdicts: no tolerance is involved."""
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    tiny_step = Fraction(1, 10**12)
    assert smt.verify(net, x, 0, eps=Fraction(7, 12) - tiny_step).verdict == "unsat"
    assert smt.verify(net, x, 0, eps=Fraction(7, 12)) == ("sat", [Fraction(5, 6)])
    assert smt.verify(net, x, 0, eps=Fraction(7, 12), strict=True).verdict == "unsat"       # there it is only a tie
    assert smt.verify(net, x, 0, eps=Fraction(7, 12) + tiny_step, strict=True).verdict == "sat"


@FEW
@given(case=tiny())
def test_forward_in_fractions_is_the_network(case):
    net, x, _ = case
    exact = smt.forward(net, [Fraction(v) for v in x.flatten().tolist()])
    assert [float(s) for s in exact] == pytest.approx(net(x)[0].tolist(), abs=1e-12)


def test_pooling_in_fractions_and_in_formulas(pooled):  # noqa: F811
    model, x = pooled
    net = network(model, x.shape[1:])
    exact = smt.forward(net, [Fraction(v) for v in x.flatten().tolist()])
    assert [float(s) for s in exact] == pytest.approx(model(x)[0].tolist(), abs=1e-9)
    assert smt.verify(net, x, 0, eps=0).verdict == "unsat"
    assert smt.verify(net, x, 0, eps=1).verdict == "sat"


@pytest.mark.parametrize("norm", [inf, 1, 2, 0])
@FEW
@given(case=tiny())
def test_unsat_survives_sampling_and_sat_survives_replay(norm, case):
    net, x, y = case
    eps = 1 if norm == 0 else 0.25
    verdict, a = smt.verify(net, x, y, eps=eps, norm=norm)
    if verdict == "sat" and a is not None:
        assert all(0 <= v <= 1 for v in a)
        s = smt.forward(net, a)
        assert s[y] <= max(s[k] for k in range(len(s)) if k != y)
        moved = [abs(v - Fraction(c)) for v, c in zip(a, x.flatten().tolist(), strict=True)]
        size = {inf: max(moved), 1: sum(moved), 0: sum(m > 0 for m in moved)}.get(norm)
        assert size is None or size <= eps
    elif verdict == "unsat" and norm == inf:
        points = (x + (2 * torch.rand(5000, net.units, generator=torch.Generator().manual_seed(0)) - 1) * eps).clamp(0, 1)
        assert bool((net(points).argmax(1) == y).all())


def test_out_of_time_is_unknown_and_never_unsat():
    torch.manual_seed(0)
    big = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3))
    net, x = network(big, (20,)), torch.full((1, 20), 0.5)
    y = int(net(x).argmax())
    assert smt.verify(net, x, y, eps=0.3, time_limit=0.05) == ("unknown", None)
    assert smt.minimal_distortion(net, x, y, time_limit=0.05) == (None, None)


def test_nobody_to_find():
    net = network(mlp(([[1., 1.]], [0.]), ([[0.], [-1.]], [1., 0.])), (2,))
    assert smt.minimal_distortion(net, torch.tensor([[.5, .5]]), 0) == (inf, None)


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(target=0), "target=0"), (dict(y=5), "y=5"), (dict(eps=-1), "eps=-1"), (dict(norm=7), "norm=7"),
    (dict(x=torch.tensor([[1.5]])), "one image"), (dict(x=torch.tensor([[.5, .5]])), "one image"),
])
def test_bad_input_is_named(wrong, message):
    arguments = {"net": network(HAND, (1,)), "x": torch.tensor([[0.25]]), "y": 0, "eps": 0.1} | wrong
    with pytest.raises(ValueError, match=message):
        smt.verify(**arguments)
    with pytest.raises(ValueError, match="norm=2"):
        smt.minimal_distortion(network(HAND, (1,)), torch.tensor([[0.25]]), 0, norm=2)

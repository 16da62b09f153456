"""The slide's program: equal to brute force and to SMT on tiny networks, and wrong when its assumptions are broken."""
from math import inf

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mlp
from torch import nn

import advcourse.certify.enumerate as brute
from advcourse.certify import encode, smt
from advcourse.certify.encode import solve
from advcourse.certify.network import network

TIGHT = {"scip_params": {"numerics/feastol": 1e-8, "limits/gap": 1e-7, "limits/time": 60.0}}     # for networks this small
FEW = settings(max_examples=6, deadline=None, derandomize=True)
SHAPES = [(2, 4, 3), (3, 4, 2), (2, 3, 3, 2)]


@st.composite
def tiny(draw):
    """A small network with weights in eighths, an image in eighths not far from its boundary, and its class."""
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def eighths(*size, top=16):
        return torch.randint(-top, top + 1, size, generator=generator).double() / 8

    layers = [(eighths(n, m), eighths(n, top=6)) for m, n in zip(shape, shape[1:], strict=False)]
    x = torch.randint(1, 8, (1, shape[0]), generator=generator).double() / 8
    W, b = layers.pop()
    s = mlp(*layers, (W, b))(x)[0]
    layers.append((W, b - (s * 8).round() / 8 + eighths(shape[-1], top=4)))
    net = network(mlp(*layers), x.shape[1:])
    return net, x, int(net(x).argmax())


def distance(problem, norm):
    """Solve and read the distance: inf when infeasible, the root of d² for norm 2."""
    status = solve(problem, **(TIGHT if norm == 2 else {}))
    assert status in ("optimal", "infeasible")
    return inf if status == "infeasible" else max(problem.value, 0) ** (0.5 if norm == 2 else 1)


def replay(net, problem, x, y, norm, d):
    """The witness is in the box, at the distance claimed, and y does not win there."""
    a = torch.as_tensor(problem.var_dict["a"].value)
    assert a.min() >= -1e-8 and a.max() <= 1 + 1e-8
    moved = (a - x.flatten()).abs()
    measured = (moved > 1e-7).sum() if norm == 0 else torch.linalg.vector_norm(moved, norm)
    assert float(measured) == pytest.approx(d, abs=1e-5 if norm == 2 else 1e-6)
    s = net(a[None])[0]
    assert s[y] <= s[[k for k in range(len(s)) if k != y]].max() + 1e-6


@pytest.mark.parametrize("norm", [inf, 1, 2, 0])
@FEW
@given(case=tiny())
def test_distortion_equals_enumeration_and_smt(norm, case):
    net, x, y = case
    expected, _ = brute.minimal_distortion(net, x, y, norm=norm)
    problem = encode(net, x, y, norm=norm)
    found = distance(problem, norm)
    if norm == 2 and found < inf:               # the program's value is d²: 1e-8 there is more than 1e-6 in a small d
        assert found**2 == pytest.approx(expected**2, abs=1e-7)
    else:
        assert found == pytest.approx(expected, abs=1e-6)
    if found < inf:
        replay(net, problem, x, y, norm, found)
    if norm != 2:
        assert float(smt.minimal_distortion(net, x, y, norm=norm)[0]) == pytest.approx(found, abs=1e-6)
    elif 1e-2 < found < inf:
        assert smt.verify(net, x, y, eps=found - 1e-6, norm=2, time_limit=20).verdict == "unsat"
        assert smt.verify(net, x, y, eps=found + 1e-6, norm=2, time_limit=20).verdict == "sat"


@pytest.mark.parametrize("norm", [inf, 1, 2, 0])
@FEW
@given(case=tiny())
def test_margin_and_feasibility_equal_enumeration_and_smt(norm, case):
    net, x, y = case
    eps = 1 if norm == 0 else 0.1875
    expected, _ = brute.worst_margin(net, x, y, eps=eps, norm=norm)
    problem = encode(net, x, y, norm=norm, eps=eps, objective="margin")
    assert solve(problem, **(TIGHT if norm == 2 else {})) == "optimal"
    assert problem.value == pytest.approx(expected, abs=1e-6)
    if abs(expected) > 1e-6:                    # the sign of problem 2 answers problem 3
        robust = expected > 0
        assert solve(encode(net, x, y, norm=norm, eps=eps, objective="feasibility")) == (
            "infeasible" if robust else "optimal")
        assert smt.verify(net, x, y, eps=eps, norm=norm, time_limit=20).verdict == ("unsat" if robust else "sat")
        assert brute.verify(net, x, y, eps=eps, norm=norm)[0] == robust


@FEW
@given(case=tiny())
def test_every_option_gives_the_same_optimum(case):
    net, x, y = case
    plain = distance(encode(net, x, y, fix_stable=False), inf)
    M = max(float(v.abs().max()) for v in net.preactivations(torch.rand(2000, *x.shape[1:]))[:-1])
    for options in ({}, {"bounds": "crown"}, {"bounds": 4 * M}, {"bounds": 4 * M, "fix_stable": False}):
        assert distance(encode(net, x, y, **options), inf) == pytest.approx(plain, abs=1e-6)
    each = [distance(encode(net, x, y, target=k), inf) for k in range(net.classes) if k != y]
    assert min(each) == pytest.approx(plain, abs=1e-6)


def test_solvers_agree():
    net = network(mlp(([[2., -1.], [-1., 2.], [1., 1.]], [0., -.5, -1.]), ([[1., 0., -1.], [0., 2., 1.]], [.5, 0.])), (2,))
    x = torch.tensor([[0.75, 0.25]])
    values = []
    for solver in ("HIGHS", "SCIP", "GLPK_MI", "SCIPY"):
        if solver in cp.installed_solvers():
            problem = encode(net, x, 0)
            assert solve(problem, solver=solver) == "optimal"
            values.append(problem.value)
    assert len(values) >= 2
    assert values == pytest.approx([brute.minimal_distortion(net, x, 0)[0]] * len(values), abs=1e-7)


# s = (1, 2 relu(a) - 1 + relu(a - 1/2)) by hand: class 1 wins as soon as 2a - 1 + (a - 1/2)⁺ >= 1, that is a >= 5/6
HAND = mlp(([[1.], [1.]], [0., -.5]), ([[0., 0.], [2., 1.]], [1., -1.]))


def test_hand_worked_distance():
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    problem = encode(net, x, 0)
    assert distance(problem, inf) == pytest.approx(5 / 6 - 1 / 4)
    b = problem.var_dict["b"].value
    assert b == pytest.approx([1, 1])
    assert problem.var_dict["z"].value == pytest.approx([5 / 6, 1 / 3])
    assert problem.var_dict["s"].value == pytest.approx([1, 1])


def test_too_small_an_M_is_wrong():
    """The optimum has h = 5/6: M = 0.85 is right, M = 0.6 cuts it off, whatever the activation at x (0.25)."""
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    assert distance(encode(net, x, 0, bounds=0.85), inf) == pytest.approx(5 / 6 - 1 / 4)
    assert distance(encode(net, x, 0, bounds=0.6), inf) == inf
    # and one that stays feasible: the near exit is cut off, the far one is found instead
    two = network(mlp(([[4.], [-1.]], [-1., 0.25]), ([[0., 0.], [1., 3.2]], [0.75, 0.])), (1,))
    at = torch.tensor([[0.25]])
    assert distance(encode(two, at, 0), inf) == pytest.approx(0.1875)
    assert distance(encode(two, at, 0, bounds=0.7), inf) > 0.2


def test_ties_count_and_confidence_excludes_them():
    """A plateau where both logits are equal: nearest tie at 0.2, but class 1 wins only beyond 0.7."""
    net = network(mlp(([[-1.], [1.]], [.5, -1.]), ([[1., 0.], [0., 1.]], [0., 0.])), (1,))
    shifted = network(mlp(([[-1.], [1.]], [.5, -.75]), ([[1., 0.], [0., 1.]], [0., 0.])), (1,))
    x = torch.tensor([[0.25]])
    for f in (net, shifted):
        assert distance(encode(f, x, 0), inf) == pytest.approx(0.25)
    assert distance(encode(net, x, 0, confidence=1e-3), inf) == inf
    assert distance(encode(shifted, x, 0, confidence=1e-3), inf) == pytest.approx(0.501)
    assert distance(encode(net, torch.tensor([[0.75]]), 0), inf) == 0       # x itself is a tie


@FEW
@given(case=tiny())
def test_dead_neurons_and_vanishing_weights_change_nothing(case):
    net, x, y = case
    (W, b), *rest = [(W.clone(), b.clone()) for W, b in net.dense_layers()]
    before = distance(encode(net, x, y), inf)
    V, c = rest[0]
    dead = torch.cat([W, -torch.ones_like(W[:1]), torch.zeros_like(W[:1])]), torch.cat([b, b.new_tensor([-.5, 0.])])
    wide = torch.cat([V, 3 * torch.ones_like(V[:, :2])], 1), c
    faint = dead[0].masked_fill(dead[0] == 0, 1e-41), dead[1]
    for first in (dead, faint):
        bigger = network(mlp(first, wide, *rest[1:]), x.shape[1:])
        for norm in (inf, 1):
            expected = before if norm == inf else brute.minimal_distortion(net, x, y, norm=1)[0]
            assert distance(encode(bigger, x, y, norm=norm), norm) == pytest.approx(expected, abs=1e-6)


def test_a_network_without_relu_has_its_closed_form():
    w = torch.tensor([[2., -1., .5], [0., 1., -1.]])
    net = network(mlp((w, [0., .25])), (3,))
    x = torch.tensor([[0.5, 0.5, 0.5]])
    margin, step = float(net(x)[0, 0] - net(x)[0, 1]), (w[0] - w[1]).double()
    for norm, dual in ((inf, 1), (1, inf), (2, 2)):
        expected = margin / float(torch.linalg.vector_norm(step, dual))
        if norm == 1:
            expected = brute.minimal_distortion(net, x, 0, norm=1)[0]       # there the box binds
        assert distance(encode(net, x, 0, norm=norm), norm) == pytest.approx(expected, abs=1e-6)


def test_eps_zero_asks_about_x_alone():
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    problem = encode(net, x, 0, eps=0, objective="margin")
    assert solve(problem) == "optimal"
    assert problem.value == pytest.approx(1.5)
    assert solve(encode(net, x, 0, eps=0, objective="feasibility")) == "infeasible"
    assert solve(encode(net, x, 1, eps=0, objective="feasibility")) == "optimal"
    assert distance(encode(net, x, 1), inf) == 0            # already another class


def test_nobody_to_find_is_infeasible():
    net = network(mlp(([[1., 1.]], [0.]), ([[0.], [-1.]], [1., 0.])), (2,))
    for norm in (inf, 1, 2, 0):
        assert distance(encode(net, torch.tensor([[0.5, 0.5]]), 0, norm=norm), norm) == inf


@pytest.fixture(scope="module")
def pooled():
    """AvgPool, convolution, ReLU, max-pooling and a linear layer on a 4 x 4 image, away from its boundary."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.AvgPool2d(2, stride=1), nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(2, 2)).double()
    model[1].weight.data *= 4
    model[5].weight.data *= 4
    x = torch.rand(1, 1, 4, 4).double()
    s = model(x)[0].detach()
    model[5].bias.data += torch.tensor([s[1] - s[0] + .5, 0])
    return model, x


@pytest.mark.parametrize("norm", [inf, 1, 2])
def test_convolution_average_and_max_pooling(pooled, norm):
    model, x = pooled
    net = network(model, x.shape[1:])
    problem = encode(model, x, 0, norm=norm)
    d = distance(problem, norm)
    assert 0.01 < d < inf
    assert d == pytest.approx(brute.minimal_distortion(net, x, 0, norm=norm)[0], abs=1e-6)
    replay(net, problem, x, 0, norm, d)
    if norm == inf:                                         # nothing closer among many samples
        a = (x + (2 * torch.rand(20000, 1, 4, 4).double() - 1) * (d - 1e-6)).clamp(0, 1)
        assert bool((model(a)[:, 0] > model(a)[:, 1]).all())
        assert set(problem.var_dict) >= {"a", "h1", "z1", "b1", "z2", "b2", "s"}


GOOD = dict(model=HAND, x=torch.tensor([[0.25]]), y=0)


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(target=0), "target=0"), (dict(target=7), "target=7"), (dict(y=-1), "y=-1"), (dict(norm=3), "norm=3"),
    (dict(objective="maximal"), "maximal"), (dict(objective="margin"), "eps=None"), (dict(eps=-0.1), "eps=-0.1"),
    (dict(eps=float("nan")), "eps=nan"), (dict(x=torch.tensor([[1.25]])), "box"), (dict(x=torch.tensor([[np.nan]])), "NaN"),
    (dict(x=torch.rand(2, 1)), "one image|differ|x has shape|expects"), (dict(bounds="magic"), "magic"),
    (dict(bounds=-1.0), "big M"), (dict(bounds=[(np.zeros(3), np.ones(3))]), "units a layer"),
    (dict(confidence=-1), "confidence=-1"),
])
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        encode(**{"model": HAND, "x": GOOD["x"], "y": 0} | wrong)


def test_solver_missing_unfit_or_out_of_time():
    problem = encode(**GOOD)
    with pytest.raises(ValueError, match="NO_SUCH_SOLVER.*HIGHS"):
        solve(problem, solver="NO_SUCH_SOLVER")
    with pytest.raises(ValueError, match="HIGHS.*quadratic"):
        solve(encode(**GOOD, norm=2), solver="HIGHS")
    with pytest.raises(ValueError, match="time_limit=0"):
        solve(problem, time_limit=0)
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    x = torch.full((1, 30), 0.5)
    hard = encode(big, x, int(big(x).argmax()))
    for solver in ("HIGHS", "SCIP"):
        assert solve(hard, solver=solver, time_limit=1e-3) == "unknown"

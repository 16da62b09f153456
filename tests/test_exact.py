"""The three problems through HiGHS: equal to enumeration and to closed forms, honest when stopped, sound when sampled."""
import os
import signal
import sys
import threading
from math import inf, sqrt

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import mlp
from torch import nn

import advcourse.certify.enumerate as brute
from advcourse import attacks, data, models, threat
from advcourse.certify import lp_tree, milp
from advcourse.certify.bounds import certified_radius
from advcourse.certify.certificate import Certificate, candidates, replay
from advcourse.certify.decide import Ball
from advcourse.certify.exact import minimal_distortion, verify, worst_margin
from advcourse.certify.milp import Program
from advcourse.certify.network import network
from advcourse.certify.question import Question, Race

NORMS = [inf, 2, 1, 0]
SEARCHES = [(inf, "mip"), (inf, "tree"), (inf, "distance"), (1, "mip"), (1, "tree"), (1, "distance"), (2, "tree"), (0, "mip"),
            (0, "distance")]
FEW = settings(max_examples=4, deadline=None, derandomize=True)


def random_case(seed, shape=(3, 4, 3, 3)):
    """A random network with real-valued weights, an image not far from its boundary, and its class."""
    g = torch.Generator().manual_seed(seed)
    layers = [(torch.randn(n, m, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64) / 3)
              for m, n in zip(shape, shape[1:], strict=False)]
    x = torch.rand(shape[0], generator=g, dtype=torch.float64) * 0.8 + 0.1
    W, b = layers.pop()
    b = b - mlp(*layers, (W, b))(x[None])[0] + torch.randn(shape[-1], generator=g, dtype=torch.float64) / 4
    model = mlp(*layers, (W, b))
    return model, x, int(model(x[None]).argmax())


# By hand: f_0 − f_1 = relu(2a − 1) − relu(1 − 2b) + 1/4 is 3/4 at a = b = 3/4. It is 0 where a >= 1/2 and a + b = 7/8, or
# where a <= 1/2 and b = 3/8. So d* = 3/8 (inf), 5/8 (1, all along the segment), √13/8 (2, at the corner), 1 pixel (b = 1/8).
TWO = mlp(([[2.0, 0.0], [0.0, -2.0]], [-1.0, 1.0]), ([[1.0, -1.0], [0.0, 0.0]], [0.25, 0.0]))
THREE_QUARTERS = torch.tensor([0.75, 0.75], dtype=torch.float64)


@pytest.mark.parametrize("norm, search", SEARCHES)
def test_two_neurons_by_hand(norm, search):
    expected = {inf: 3 / 8, 1: 5 / 8, 2: sqrt(13) / 8, 0: 1}[norm]
    certificate = minimal_distortion(TWO, THREE_QUARTERS, 0, norm=norm, search=search, gap=1e-4)
    assert certificate.status == "falsified"
    assert certificate.lower <= expected * (1 + 1e-6) and certificate.upper == pytest.approx(expected, rel=1e-4)
    assert certificate.lower == certificate.upper if norm == 0 else certificate.gap <= 1.01e-4


def test_worst_margin_by_hand():
    for eps, least in ((0.0, 3 / 4), (1 / 8, 1 / 2), (1 / 4, 1 / 4), (1 / 2, -1 / 4)):
        certificate = worst_margin(TWO, THREE_QUARTERS, 0, eps=eps)
        assert certificate.lower == pytest.approx(least, abs=2e-4) == certificate.upper
        assert certificate.status == ("robust" if least > 0 else "falsified")
        assert verify(TWO, THREE_QUARTERS, 0, eps=eps).status == certificate.status


@pytest.mark.parametrize("norm, search", SEARCHES)
@FEW
@example(seed=784)
@given(seed=st.integers(0, 10**6))
def test_distortion_equals_enumeration(norm, search, seed):
    model, x, y = random_case(seed)
    expected, _ = brute.minimal_distortion(network(model, x.shape), x, y, norm=norm)
    certificate = minimal_distortion(model, x, y, norm=norm, search=search)
    if expected == inf:
        assert certificate.status == "robust" and certificate.lower == inf and certificate.counterexample is None
        return
    assert certificate.lower <= expected * (1 + 1e-6) and expected <= certificate.upper * (1 + 1e-6)
    assert certificate.upper <= expected * (1 + 1.1e-3)
    if expected < 0.01 and certificate.status == "unknown":  # so near that the guard against ties is a share of the distance
        assert certificate.note == "numerical doubt" and certificate.gap <= 0.01
    else:
        assert certificate.status == "falsified"
    a = certificate.counterexample
    assert model(a[None]).argmax() != y and a.min() >= 0 and a.max() <= 1
    assert float(threat.distance(a[None], x[None], norm)) == pytest.approx(certificate.upper)


@pytest.mark.parametrize("norm", NORMS)
@FEW
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.5, 0.9, 1.1, 2.0]))
def test_margin_and_verdict_equal_enumeration(norm, seed, scale):
    model, x, y = random_case(seed)
    net = network(model, x.shape)
    near, _ = brute.minimal_distortion(net, x, y, norm=norm)
    eps = max(1, round(scale * near)) if norm == 0 and near < inf else scale * min(near, 1.0)
    expected, _ = brute.worst_margin(net, x, y, eps=eps, norm=norm)
    certificate, verdict = worst_margin(model, x, y, eps=eps, norm=norm), verify(model, x, y, eps=eps, norm=norm)
    slack = 1e-5 * (1 + abs(expected)) if norm != 2 else 1e-3            # norm 2: enumerated by an interior-point method
    assert certificate.lower <= expected + slack and expected - slack <= certificate.upper
    assert certificate.upper - certificate.lower <= 2e-4 * (1 + abs(certificate.upper))
    if abs(expected) > 1e-3:
        assert certificate.status == verdict.status == ("robust" if expected > 0 else "falsified")
    assert verdict.lower <= expected + slack and expected - slack <= verdict.upper


@pytest.mark.parametrize("norm, expected", [(inf, 0.5 / 3), (2, sqrt(0.1**2 + (0.5 / 3)**2)), (1, 0.1 + 0.5 / 3), (0, 1)])
def test_hyperplane_with_the_box_binding(norm, expected):
    """3a + 4b − 1 = 0.9 at (0.5, 0.1): b falls to 0 and stays, a pays for the rest (norm 0: a alone)."""
    linear = mlp(([[3.0, 4.0], [0.0, 0.0]], [-1.0, 0.0]))
    certificate = minimal_distortion(linear, torch.tensor([0.5, 0.1], dtype=torch.float64), 0, norm=norm)
    assert certificate.upper == pytest.approx(expected, rel=1e-3) and certificate.lower <= expected * (1 + 1e-9)


def test_target_must_win_against_all():
    model, x, y = random_case(5, (3, 5, 4))
    for target in (k for k in range(4) if k != y):
        certificate = minimal_distortion(model, x, y, target=target)
        free = minimal_distortion(model, x, y)
        assert certificate.lower >= free.lower
        if certificate.counterexample is not None:
            assert model(certificate.counterexample[None]).argmax() == target


@pytest.mark.parametrize("norm", [inf, 1])
def test_convolution_and_pooling_agree_with_the_modelling_layer(norm):
    from advcourse.certify.encode import encode, solve

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.Flatten(),
                          nn.Linear(2, 3)).double()
    x = torch.rand(1, 6, 6, dtype=torch.float64)
    y = int(model(x[None]).argmax())
    certificate, problem = minimal_distortion(model, x, y, norm=norm), encode(model, x[None], y, norm=norm)
    if solve(problem) == "infeasible":
        assert certificate.status == "robust"
    else:
        assert certificate.lower <= problem.value * (1 + 1e-5) and problem.value <= certificate.upper * (1 + 1e-5)
        assert certificate.gap <= 1.01e-3


def test_our_route_to_norm_2_agrees_with_scip():
    from advcourse.certify.encode import encode, solve

    model, x, y = random_case(11, (6, 8, 6, 3))
    certificate, problem = minimal_distortion(model, x, y, norm=2), encode(model, x[None], y, norm=2)
    assert solve(problem, solver="SCIP") == "optimal"
    assert certificate.lower <= sqrt(problem.value) * (1 + 1e-5) and sqrt(problem.value) <= certificate.upper * (1 + 1e-4)


@pytest.fixture(scope="module")
def digits():
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=8)
    right = (model(x).argmax(1) == y).nonzero()[:, 0]
    return model, x[right], y[right]


@pytest.mark.parametrize("norm", [inf, 1])
def test_certificate_below_exact_below_every_attack(digits, norm):
    model, x, y = (digits[0], *(v[1:3] for v in digits[1:]))
    below = certified_radius(model, x, y, norm=norm)
    exact = minimal_distortion(model, x, y, norm=norm, search="tree")
    attack = attacks.deepfool(model, x, y, norm=inf) if norm == inf else attacks.fmn(model, x, y, norm=1)
    for i, certificate in enumerate(exact):
        assert below[i] <= certificate.lower <= attack.distance[i] and certificate.upper <= attack.distance[i] * (1 + 1.1e-3)
        assert certificate.gap <= 1.01e-3


def test_no_sampled_or_attacked_point_of_a_claimed_ball_changes_class(digits):
    model, x, y = (v if k == 0 else v[:1] for k, v in enumerate(digits))
    radius = minimal_distortion(model, x, y, search="tree").lower
    g = torch.Generator().manual_seed(0)
    points = (x + radius * (2 * torch.rand(10_000, *x.shape[1:], generator=g) - 1)).clamp(0, 1)
    corners = (x + radius * (2 * torch.randint(0, 2, (1000, *x.shape[1:]), generator=g) - 1)).clamp(0, 1)
    assert (model(points).argmax(1) == y).all() and (model(corners).argmax(1) == y).all()
    assert not attacks.pgd(model, x, y, eps=radius, restarts=5, loss="margin", generator=g).success.any()


def test_shapes_and_batches(digits):
    model, x, y = digits
    one, same, batch = (verify(model, *each, eps=0.001) for each in ((x[0], int(y[0])), (x[:1], y[:1]), (x[:2], y[:2])))
    assert isinstance(one, Certificate) and isinstance(same, Certificate)
    assert [c.status for c in batch] == ["robust", "robust"] == [one.status, same.status]
    broken = minimal_distortion(model, x[0], int(y[0]), search="tree").counterexample
    assert broken.shape == x[0].shape and broken.dtype == torch.float32 and model(broken[None]).argmax() != y[0]


def test_trace_is_monotone_and_ends_at_the_answer(digits):
    model, x, y = digits
    tiny, image, label = random_case(3, (4, 12, 12, 3))
    for certificate in (minimal_distortion(tiny, image, label, search="distance"), minimal_distortion(tiny, image, label),
                        worst_margin(model, x[0], int(y[0]), eps=0.02, gap=0.05)):
        seconds, lower, upper = np.array(certificate.trace).T
        assert len(seconds) >= 2 and (np.diff(seconds) >= 0).all() and (np.diff(lower) >= 0).all()
        assert (upper[1:] <= upper[:-1]).all() and (lower[-1], upper[-1]) == (certificate.lower, certificate.upper)


@pytest.mark.parametrize("norm, search", SEARCHES)
def test_out_of_time_is_unknown_and_the_bracket_holds(digits, norm, search):
    model, x, y = random_case(11, (4, 12, 12, 3))
    known = minimal_distortion(model, x, y, norm=norm, search=search)
    stopped = minimal_distortion(model, x, y, norm=norm, search=search, time_limit=0.0)
    assert known.status == "falsified" and stopped.lower <= known.upper and known.lower <= stopped.upper
    if stopped.lower < stopped.upper:
        assert stopped.status == "unknown" and stopped.note == "out of time"
    else:
        assert norm == 0                                        # CROWN and the attack met


@pytest.mark.parametrize("norm", NORMS)
def test_a_verdict_needs_time(digits, norm):
    model, x, y = (digits[0], digits[1][2], int(digits[2][2]))
    found = attacks.fmn(model, x[None], torch.tensor([y]), norm=norm).distance.item()
    verdict = verify(model, x, y, eps=found - 1 if norm == 0 else 0.98 * found, norm=norm, time_limit=0.0)
    assert (verdict.status, verdict.note) == ("unknown", "out of time") and verdict.lower <= 0 < verdict.upper


@pytest.mark.parametrize("search", ["mip", "tree", "distance"])
def test_ctrl_c_returns_the_bounds_so_far(digits, search, monkeypatch):
    def then_press(original, seconds):
        def run(*args, **kwargs):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
            return original(*args, **kwargs)
        return run

    monkeypatch.setattr(lp_tree, "search", then_press(lp_tree.search, 0.05))
    if search != "tree":
        monkeypatch.setattr(Program, "solve", then_press(Program.solve, 0.05))
    model, x, y = digits
    before = signal.getsignal(signal.SIGINT)
    certificate = minimal_distortion(model, x[2], int(y[2]), search=search, norm=1)
    assert certificate.note == "interrupted" and certificate.status == "unknown"
    assert 0 < certificate.lower < certificate.upper and model(certificate.counterexample[None]).argmax() != y[2]
    assert signal.getsignal(signal.SIGINT) is before  # a process in the background starts with Ctrl-C ignored


def test_misclassified_images_are_at_distance_zero():
    wrong = 1 - int(TWO(THREE_QUARTERS[None]).argmax())
    certificate = minimal_distortion(TWO, THREE_QUARTERS, wrong)
    assert (certificate.status, certificate.lower, certificate.upper) == ("falsified", 0, 0)
    assert "misclassified" in certificate.note and torch.equal(certificate.counterexample, THREE_QUARTERS)
    assert verify(TWO, THREE_QUARTERS, wrong, eps=0.0).status == "falsified"


def test_ties_are_never_called_robust():
    tie = mlp(([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]))
    x = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert verify(tie, x, 0, eps=0.0).status == "unknown"
    assert verify(tie, x, 0, eps=0.1).status == "falsified"
    near = minimal_distortion(tie, x, 0)
    assert near.status != "robust" and near.lower == 0 and near.upper < 1e-4
    kissing = mlp(([[1.0], [-1.0]], [0.0, 0.0]), ([[1.0, 1.0], [0.0, 0.0]], [0.0, 0.0]))     # |a| >= 0 touches a tie at 0
    certificate = verify(kissing, torch.tensor([0.5], dtype=torch.float64), 0, eps=0.5)
    assert certificate.status == "unknown" and certificate.lower <= 0


def test_nothing_to_find():
    constant = mlp(([[0.0, 0.0]], [1.0]), ([[1.0], [0.0]], [1.0, 0.0]))
    for norm in NORMS:
        certificate = minimal_distortion(constant, THREE_QUARTERS, 0, norm=norm)
        assert certificate.status == "robust" and certificate.lower == certificate.upper == inf
    capped = minimal_distortion(TWO, THREE_QUARTERS, 0, eps=0.3)
    assert capped.status == "robust" and capped.lower == 0.3 and capped.upper == inf


def test_dead_units_and_tiny_weights():
    """Weights of 1e-41, as weight decay leaves them, and units that never open change nothing."""
    model, x, y = random_case(8, (3, 5, 4))
    expected = minimal_distortion(model, x, y)
    wide = (torch.cat([model[0].weight.data, torch.full((2, 3), 1e-41)]),
            torch.cat([model[0].bias.data, torch.tensor([1e-41, -50.0])]))
    last = torch.cat([model[2].weight.data, torch.full((4, 2), 1e-41)], 1)
    more = mlp((torch.cat([wide[0], torch.full((7, 2), 1e-41)], 1), wide[1]), (last, model[2].bias.data))
    x = torch.cat([x, torch.tensor([0.0, 1.0])])
    for network_ in (more, more.float()):
        image = x.to(next(network_.parameters()).dtype)
        certificate = minimal_distortion(network_, image, y)
        assert certificate.upper == pytest.approx(expected.upper, rel=2e-3) and certificate.status == "falsified"


@pytest.mark.parametrize("w", [1e3, 1e6, 1e9, 1e12])
def test_huge_weights_never_yield_a_false_proof(w):
    """relu(w + relu(a − 0.3)) − w < 0.4 is false on [0, 1]; at 1e9 some solvers call it proved."""
    trap = mlp(([[1.0]], [-0.3]), ([[1.0]], [w]), ([[0.0], [1.0]], [0.4, -w]))
    certificate = verify(trap, torch.tensor([0.2], dtype=torch.float64), 0, eps=0.8)
    assert certificate.status in ("falsified", "unknown")
    hidden = mlp(([[w, 0.0], [0.0, 1.0]], [-w, 0.0]), ([[1.0, 1.0], [0.0, 0.0]], [-0.5, 0.0]))
    certificate = verify(hidden, torch.tensor([0.5, 0.9], dtype=torch.float64), 0, eps=0.45)
    assert certificate.status != "robust"


def test_a_counterexample_has_to_survive():
    net, x = network(TWO, (2,)), THREE_QUARTERS
    a = torch.tensor([0.5, 0.375], dtype=torch.float64)                     # the tie itself
    assert replay(TWO, net, x, 0, a) is None
    assert replay(TWO, net, x, 0, a - 1e-6) is not None
    assert replay(TWO, net, x, 0, a - 1e-6, eps=0.3) is None                # outside the ball
    assert replay(lambda z: TWO(z) * float("nan"), net, x, 0, a - 1e-3) is None
    single = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for norm in (inf, 2, 1):
        moved = single.double() + 0.3 * torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        eps = float(threat.distance(moved.clamp(0, 1)[None], single.double()[None], norm))
        point, distance = next(candidates(single, moved, eps, norm))        # rounding may not leave the ball
        assert point.dtype == torch.float32 and distance <= eps and distance == pytest.approx(eps, rel=2e-5)


def test_certificates_refuse_nonsense():
    for arguments in (("proved", 0, 1), ("robust", 2, 1), ("unknown", float("nan"), 1), ("falsified", 0, 1)):
        with pytest.raises(ValueError):
            Certificate(*arguments)


def test_bad_arguments():
    x, bad = THREE_QUARTERS, [
        (dict(target=0), "target=0"), (dict(target=7), "target=7"), (dict(norm=3), "norm=3"), (dict(gap=0.0), "gap="),
        (dict(search="simplex"), "search="), (dict(norm=2, search="mip"), "search='mip'"), (dict(eps=-1.0), "eps="),
        (dict(time_limit=-1), "time_limit=-1")]
    for arguments, words in bad:
        with pytest.raises(ValueError, match=words):
            minimal_distortion(TWO, x, 0, **arguments)
    for image, label, words in ((x + 1, 0, "box"), (x * float("nan"), 0, "NaN"), (x, 9, "range")):
        with pytest.raises(ValueError, match=words):
            verify(TWO, image, label, eps=0.1)
    with pytest.raises(ValueError, match="Sigmoid"):
        verify(nn.Sequential(nn.Linear(2, 2).double(), nn.Sigmoid()), x, 0, eps=0.1)


def test_missing_solver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ImportError, match=r"advcourse\[certify\]"):
        verify(TWO, THREE_QUARTERS, 0, eps=0.1)


def test_program_knapsack_and_options():
    program = Program()
    items = program.columns([0, 0, 0], [1, 1, 1], [-5, -4, -3], integer=True)
    program.rows([(items, np.array([[2.0, 3.0, 1.0]]))], -inf, 5.0)
    seen = []
    answer = program.solve(watch=lambda bound, best, values: bool(seen.append((bound, best))))
    assert answer.status == "optimal" and answer.objective == answer.bound == -9 and list(answer.values) == [1, 1, 0]
    assert all(bound <= -9 + 1e-9 for bound, _ in seen) and program.binaries == 3
    program.rows([(items, np.array([[1.0, 1.0, 1.0]]))], 4.0, inf)
    assert program.solve().status == "infeasible" and program.solve().bound == inf
    with pytest.raises(ValueError, match="no_such"):
        program.solve(no_such_option=1)


def test_tiny_coefficients_widen_their_row():
    """HiGHS drops 1e-10: the row a + 1e-10 b >= 1 + 5e-10 has a solution only because of it."""
    program = Program()
    a, b = program.columns([0], [1]), program.columns([0], [10])
    program.rows([(a, np.ones((1, 1))), (b, np.full((1, 1), 1e-10))], 1 + 5e-10, inf)
    assert program.solve(primal_feasibility_tolerance=1e-10).status == "optimal"


def test_euclidean_relaxation_contains_the_ball(digits):
    """What the tangents of norm 2 allow at a radius is never less than what the ball does."""
    model, x, y = digits
    q = Question(model, network(model, x.shape[1:]), x[0], int(y[0]))
    ball = Ball(q, 2, 0.3)
    relu = ball.program(int(y[0]) ^ 1, "margin", inf)
    g = torch.Generator().manual_seed(0)
    cost, length = relu.pieces.cost, relu.pieces.length
    for _ in range(20):
        d = torch.randn(784, generator=g, dtype=torch.float64)
        a = (q.flat + 0.3 * d / d.norm()).clamp(0, 1)
        left, spent = (a - q.flat).numpy().copy(), 0.0
        for k in np.argsort(cost, kind="stable"):                           # cheapest pieces first, as the program would
            use = min(length[k], max(0.0, relu.pieces.sign[k] * left[relu.pieces.pixel[k]]))
            left[relu.pieces.pixel[k]] -= relu.pieces.sign[k] * use
            spent += cost[k] * use
        assert abs(left).max() < 1e-12 and spent <= float(((a - q.flat)**2).sum()) + 1e-12


def test_race_keeps_the_best_and_ignores_nan():
    race = Race("d*", 0.0, None, False)
    race.narrow(lower=0.1)
    race.narrow(lower=0.05, upper=float("nan"))
    assert race.witness((THREE_QUARTERS, 0.5)) and not race.witness((THREE_QUARTERS, 0.6)) and not race.witness(None)
    assert (race.lower, race.upper) == (0.1, 0.5) and len(race.trace) == 2


def test_highs_options_exist():
    assert milp.highs().Highs().version().count(".") == 2

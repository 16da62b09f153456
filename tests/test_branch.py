"""Branch and bound: equal to enumeration and to HiGHS, sound when sampled and attacked, honest when stopped."""
from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import advcourse.certify.enumerate as brute
from advcourse import attacks, data, models, threat
from advcourse.certify import branch, exact, witness
from advcourse.certify.dual import ascend, bound, roots, squeeze
from advcourse.certify.network import network
from advcourse.certify.presolve import presolve
from advcourse.certify.question import Race
from advcourse.certify.reduced import Region, ball
from advcourse.certify.splitting import advisory_map, bound_boxes

FEW = settings(max_examples=6, deadline=None, derandomize=True)


def random_case(seed, shape=(3, 5, 4, 3)):
    """A random float64 network, an image near its boundary, and the class it gives it."""
    g = torch.Generator().manual_seed(seed)
    modules = []
    for m, n in zip(shape, shape[1:], strict=False):
        linear = nn.Linear(m, n).double()
        linear.weight.data = torch.randn(n, m, generator=g, dtype=torch.float64)
        linear.bias.data = torch.randn(n, generator=g, dtype=torch.float64) / 3
        modules += [linear, nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    x = torch.rand(shape[0], generator=g, dtype=torch.float64) * 0.8 + 0.1
    with torch.no_grad():
        modules[-2].bias -= model(x[None])[0] - torch.randn(shape[-1], generator=g, dtype=torch.float64) / 4
    return model, x, int(model(x[None]).argmax())


def constant(logits, inputs=2):
    model = nn.Sequential(nn.Linear(inputs, 3), nn.ReLU(), nn.Linear(3, len(logits))).double()
    for p in model.parameters():
        p.data.zero_()
    model[2].bias.data = torch.tensor(logits, dtype=torch.float64)
    return model


def sampled(region, n=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    return region.lower + (region.upper - region.lower) * torch.rand(n, len(region.lower), generator=g, dtype=torch.float64)


@FEW
@given(seed=st.integers(0, 10**6))
def test_presolve_rewrites_exactly_and_every_bound_holds(seed):
    model, x, y = random_case(seed)
    net = branch.margins(network(model, (3,)), y)
    red = presolve(net, ball(x, 0.3))
    a = sampled(red.region)
    z = red.inputs(a)
    assert torch.allclose(red(a), net(a), atol=1e-10)
    assert (red.lower < 0).all() and (red.upper > 0).all()
    assert (z >= red.lower).all() and (z <= red.upper).all()
    least = net(a).amin(0)
    assert (bound(red, red.outputs).value <= least).all()
    better = ascend(red, red.outputs, roots(red, red.outputs), steps=10, goal=inf).bound
    assert (better <= least).all() and (better >= bound(red, red.outputs).value - 1e-12).all()


@FEW
@given(seed=st.integers(0, 10**6))
def test_split_bounds_hold_where_the_signs_do(seed):
    model, x, y = random_case(seed)
    red = presolve(branch.margins(network(model, (3,)), y), ball(x, 0.4))
    if not len(red.lower):
        return
    a = sampled(red.region, 2000)
    for sign in (1, -1):
        part = red.impose(0, sign)
        value = ascend(part, part.outputs, roots(part, part.outputs), steps=20, goal=inf).bound
        there = sign * red.inputs(a)[:, 0] >= 0
        assert (red(a)[there] >= value).all()


@FEW
@given(seed=st.integers(0, 10**6))
def test_squeeze_keeps_every_witness(seed):
    model, x, y = random_case(seed)
    red = presolve(branch.margins(network(model, (3,)), y), ball(x, 0.5))
    a = sampled(red.region, 4000)
    for k in range(len(red.outputs.b)):
        witnesses = a[red(a)[:, k] <= 0]
        part = squeeze(red.only(k), steps=20)
        if part is None:
            assert not len(witnesses)
        elif len(witnesses):            # what was substituted and what was tightened is true on them
            z = part.inputs(witnesses)
            assert torch.allclose(part(witnesses)[:, 0], red(witnesses)[:, k], atol=1e-9)
            assert (z >= part.lower - 1e-9).all() and (z <= part.upper + 1e-9).all()


@pytest.mark.parametrize("norm", [inf, 2, 1])
@FEW
@given(seed=st.integers(0, 10**6))
def test_minimal_distortion_is_that_of_enumeration(norm, seed):
    model, x, y = random_case(seed)
    d, _ = brute.minimal_distortion(network(model, (3,)), x, y, norm=norm)
    c = branch.minimal_distortion(model, x[None], torch.tensor([y]), norm=norm)
    if d == inf:
        assert c.status == "robust" and c.lower == c.upper == inf
        return
    assert c.status == "falsified" and c.lower <= d + 1e-9 and d <= c.upper * (1 + 1e-9)
    assert c.gap <= 1.1e-3
    a = c.counterexample[None]
    assert int(model(a).argmax()) != y and 0 <= a.min() and a.max() <= 1
    assert threat.distance(a, x[None], norm).item() == pytest.approx(c.upper, rel=1e-6)
    assert all(low <= d * (1 + 1e-9) <= up * (1 + 2e-9) for _, low, up in c.trace)


@pytest.mark.parametrize("inputs", [0, branch.INPUTS])       # by splitting ReLUs, by splitting inputs
@FEW
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.02, 0.1, 0.3]))
def test_verify_is_enumeration(inputs, seed, eps):
    model, x, y = random_case(seed)
    d, _ = brute.minimal_distortion(network(model, (3,)), x, y)
    if abs(d - eps) < 1e-5:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "INPUTS", inputs)
        c = branch.verify(model, x[None], torch.tensor([y]), eps=eps)
    assert c.status == ("robust" if eps < d else "falsified")
    if c.status == "falsified":
        assert threat.distance(c.counterexample[None], x[None]).item() <= eps


@pytest.mark.parametrize("norm", [2, 1])
@FEW
@given(seed=st.integers(0, 10**6))
def test_verify_in_other_norms(norm, seed):
    model, x, y = random_case(seed)
    d, _ = brute.minimal_distortion(network(model, (3,)), x, y, norm=norm)
    for eps in (0.98 * d, 1.02 * d) if d < inf else (1.0,):
        c = branch.verify(model, x[None], torch.tensor([y]), eps=eps, norm=norm)
        assert c.status == ("robust" if eps < d else "falsified")


@FEW
@given(seed=st.integers(0, 10**6))
def test_counting_pixels_is_sound(seed):
    model, x, y = random_case(seed)
    d, _ = brute.minimal_distortion(network(model, (3,)), x, y, norm=0)
    for eps in (1, 2, 3):
        c = branch.verify(model, x[None], torch.tensor([y]), eps=eps, norm=0)
        assert c.status in ("unknown", "robust" if eps < d else "falsified")


def test_counting_pixels_on_digits_agrees_with_the_mip():
    model, (x, y) = models.load("mnist-mlp50-standard"), data.mnist("test", n=5)
    for i in (3, 4):
        d = exact.minimal_distortion(model, x[i], int(y[i]), norm=0).upper
        assert branch.verify(model, x[i], int(y[i]), eps=d - 1, norm=0).status == "robust"
        c = branch.verify(model, x[i], int(y[i]), eps=d, norm=0)
        assert c.status == "unknown" or c.status == "falsified" and int((c.counterexample != x[i]).sum()) <= d


@pytest.mark.parametrize("norm", [inf, 2, 1])
def test_leaves_alone_are_enough(monkeypatch, norm):
    """With bounds that say nothing, every sign is split and the leaves' programs give the same verdicts."""
    monkeypatch.setattr(branch, "INPUTS", 0)
    monkeypatch.setattr(branch, "ascend", lambda red, rows, nodes, *a, **kw: nodes._replace(
        bound=torch.full_like(nodes.bound, -1.0)))
    monkeypatch.setattr(branch.witness, "attack", lambda f, region, outputs: (region.lower, inf))
    offer = branch.Task.offer       # the relaxation's suggestions are ignored, a leaf's single point is not
    monkeypatch.setattr(branch.Task, "offer", lambda self, points: len(points) == 1 and offer(self, points))
    seen = set()
    for seed in range(6):
        model, x, y = random_case(seed, (3, 3, 3, 3))
        d, _ = brute.minimal_distortion(network(model, (3,)), x, y, norm=norm)
        for eps in (0.99 * d, 1.01 * d):
            c = branch.verify(model, x[None], torch.tensor([y]), eps=min(eps, 3.0), norm=norm)
            assert c.status == ("robust" if min(eps, 3.0) < d else "falsified")
            seen.add(c.status)
    assert seen == {"robust", "falsified"}


@pytest.mark.parametrize("norm", [inf, 2, 1])
def test_nearest_point_of_a_polyhedron(norm):
    """Distance and emptiness as by enumeration's own solvers; the multipliers prove that nothing nearer satisfies the rows."""
    rng, empty = np.random.default_rng(0), 0
    for _ in range(30):
        G, g, x = rng.normal(size=(4, 5)), rng.normal(size=4) - 1, rng.uniform(size=5) * (rng.uniform(size=5) > 0.3)
        box = np.vstack([-G, np.eye(5), -np.eye(5)]), np.concatenate([g, np.ones(5), np.zeros(5)])
        d, _ = brute.nearest(*box, x, norm)
        found = witness.nearest(G, g, x, norm)
        empty += d == inf
        assert (found is None) == (d == inf)
        if found is not None and d > 0:
            a, w = found
            assert (G @ a + g).min() >= -1e-6 and a.min() >= 0 and a.max() <= 1 and w.min() >= -1e-9
            assert np.linalg.norm(a - x, norm) == pytest.approx(d, abs=1e-6)
            small = ball(torch.as_tensor(x), 0.99 * d, norm)
            best = small.minimiser(torch.as_tensor(-w @ G)[None])[0].numpy()
            assert w @ (G @ best + g) < 0
    assert 3 < empty < 27


def test_a_planted_counterexample_is_found():
    """One corner of the ball in 2^12 is wrong: relu(sum − (12 − 0.01)) opens only there."""
    p = 12
    model = nn.Sequential(nn.Linear(p, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    model[0].weight.data[:], model[0].bias.data[:] = 1.0, -(p - 0.01)
    model[2].weight.data, model[2].bias.data = torch.tensor([[-200.0], [0.0]]).double(), torch.tensor([1.0, 0.0]).double()
    x = torch.full((1, p), 0.5, dtype=torch.float64)
    c = branch.verify(model, x, torch.tensor([0]), eps=0.5)
    assert c.status == "falsified" and model(c.counterexample[None]).argmax() == 1
    assert branch.verify(model, x, torch.tensor([0]), eps=0.499).status == "robust"


def test_dead_neurons_tiny_weights_and_no_relu():
    model, x, y = random_case(3)
    want = branch.minimal_distortion(model, x[None], torch.tensor([y]))
    model[0].weight.data[0] = 1e-41                             # a neuron that only its bias moves
    model[0].bias.data[0] = -1e-3                               # and that never fires
    d, _ = brute.minimal_distortion(network(model, (3,)), x, y)
    c = branch.minimal_distortion(model, x[None], torch.tensor([y]))
    assert c.lower <= d * (1 + 1e-9) and d <= c.upper * (1 + 1e-9) and c.gap <= 1.1e-3 and want.gap <= 1.1e-3
    linear = nn.Sequential(nn.Linear(2, 2)).double()            # f_0 − f_1 = a_0 + a_1 − 1
    linear[0].weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double()
    linear[0].bias.data = torch.tensor([-1.0, 0.0]).double()
    for norm, d in ((inf, 0.3), (2, 0.3 * 2**0.5), (1, 0.6)):
        c = branch.minimal_distortion(linear, torch.tensor([[0.8, 0.8]]).double(), torch.tensor([0]), norm=norm)
        assert c.lower <= d * (1 + 1e-9) <= c.upper * (1 + 2e-9) and c.gap <= 1.1e-3


def test_constants_ties_and_eps_zero():
    x, zero = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([0])
    assert branch.verify(constant([1.0, 0.0]), x, zero, eps=1.0).status == "robust"
    nowhere = branch.minimal_distortion(constant([1.0, 0.0]), x, zero)
    assert nowhere.status == "robust" and nowhere.lower == nowhere.upper == inf
    tie = branch.verify(constant([1.0, 1.0]), x, zero, eps=0.1)
    assert tie.status == "unknown"                              # nothing beats y, and y does not win alone
    model, image, y = random_case(5)
    label = torch.tensor([y])
    assert branch.verify(model, image[None], label, eps=0.0).status == "robust"
    wrong = torch.tensor([(y + 1) % 3])
    assert branch.verify(model, image[None], wrong, eps=0.0).status == "falsified"
    assert branch.minimal_distortion(model, image[None], wrong).upper == 0.0


def test_nan_proves_nothing():
    model, x, y = random_case(1)
    red = presolve(branch.margins(network(model, (3,)), y), ball(x, 0.3))
    rows = red.outputs._replace(b=torch.full_like(red.outputs.b, nan))
    value = bound(red, rows).value
    assert not (value > 0).any() and not any(isnan(v) for v in value.tolist())
    task = branch.Task(red, Race("margin", -inf, None, False), lambda point: False)
    nodes = roots(red, rows)._replace(bound=torch.full((len(rows.b),), nan).double())
    assert len(task.open(nodes).row) == len(rows.b)


def test_out_of_time_is_unknown_with_a_true_bracket():
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=1)
    c = branch.minimal_distortion(model, x, y, time_limit=0)
    full = branch.minimal_distortion(model, x, y)
    assert c.status == "unknown" and c.lower <= full.upper and full.lower <= c.upper
    hard = branch.verify(model, x, y, eps=full.lower, time_limit=0)
    assert hard.status in ("unknown", "robust")                 # robust only if CROWN alone proves it
    red = presolve(branch.margins(network(model, x.shape[1:]), int(y)), ball(x.double().flatten(), full.lower))
    assert bound(red, red.outputs).value.min() > 0 or hard.status == "unknown"


def test_digits_agree_with_the_mip():
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=3)
    for i in range(3):
        ours = branch.minimal_distortion(model, x[i], int(y[i]))
        theirs = exact.minimal_distortion(model, x[i], int(y[i]), time_limit=120)
        assert ours.status == "falsified"
        assert ours.lower <= theirs.upper and theirs.lower <= ours.upper


@pytest.mark.parametrize("name", ["mnist-mlp50-standard", "mnist-cnn-pgd"])
def test_robust_balls_withstand_samples_and_pgd(name):
    model = models.load(name)
    x, y = data.mnist("test", n=6)
    radius = 0.02
    for i in range(6):
        c = branch.verify(model, x[i], int(y[i]), eps=radius, time_limit=20)
        if c.status != "robust":
            continue
        g = torch.Generator().manual_seed(i)
        a = (x[i] + radius * (2 * torch.rand(2000, *x[i].shape, generator=g) - 1)).clamp(0, 1)
        assert (model(a).argmax(1) == y[i]).all()
        assert not attacks.pgd(model, x[i:i + 1], y[i:i + 1], eps=radius, steps=40, generator=g).success.any()


def test_convolution_and_pooling():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)).double()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    y = model(x).argmax(1)
    net = branch.margins(network(model, (1, 8, 8)), int(y))
    red = presolve(net, ball(x.flatten(), 0.1))
    a = sampled(red.region)
    assert torch.allclose(red(a), net(a), atol=1e-10) and (bound(red, red.outputs).value <= net(a).amin(0)).all()
    ours = branch.minimal_distortion(model, x, y)
    theirs = exact.minimal_distortion(model, x, y, time_limit=60)
    assert ours.status == "falsified" and ours.lower <= theirs.upper and theirs.lower <= ours.upper


def test_bad_input_is_named():
    model, x, y = random_case(0)
    label = torch.tensor([y])
    for call, word in ((lambda: branch.verify(model, x[None], label, eps=-1.0), "eps"),
                       (lambda: branch.verify(model, x[None], label, eps=0.1, norm=3), "norm"),
                       (lambda: branch.verify(model, x[None] + nan, label, eps=0.1), "x"),
                       (lambda: branch.verify(model, x[None], torch.tensor([7]), eps=0.1), "y"),
                       (lambda: branch.minimal_distortion(model, x[None], label, gap=0.0), "gap"),
                       (lambda: branch.verify(model, x[None], label, eps=0.1, time_limit=-1), "time_limit")):
        with pytest.raises(ValueError, match=word):
            call()


@FEW
@given(seed=st.integers(0, 10**6))
def test_box_bounds_and_the_map_hold_at_every_sampled_point(seed):
    model, _, _ = random_case(seed, (2, 6, 4, 3))
    net = network(model, (2,))
    lower, upper = torch.zeros(2).double(), torch.ones(2).double()
    known = bound_boxes(net, lower[None], upper[None])
    a = sampled(Region(lower, upper), 3000)
    assert (known.value[0] <= net(a).amin(0)).all()
    got = advisory_map(model, lower, upper, smallest=torch.tensor(0.05))
    assert (got.upper - got.lower).prod(1).sum().item() == pytest.approx(1.0)
    wins = net(a).argmax(1)
    for low, high, possible in zip(got.lower, got.upper, got.possible, strict=True):
        inside = ((a >= low) & (a <= high)).all(1)
        assert possible[wins[inside]].all()
    assert (got.possible.sum(1)[got.proved] == 1).all()


def test_the_strong_left_island_is_on_the_map():
    """HorizontalCAS, no previous advisory, tau 5, heading −1.57: strong left (class 3) is possible around (8025, 12600) ft."""
    model, _ = data.hcas(0, 5)
    lower, upper = torch.tensor([7000.0, 12000.0, -1.57]), torch.tensor([8600.0, 15000.0, -1.57])
    got = advisory_map(model, lower, upper, smallest=torch.tensor([100.0, 100.0, 1.0]))
    at = torch.tensor([8025.0, 12600.0])
    inside = ((got.lower[:, :2] <= at) & (at <= got.upper[:, :2])).all(1)
    assert got.possible[inside][:, 3].all() and inside.any()
    right = got.proved & (got.possible[:, 4] | got.possible[:, 2])
    assert right.any()                                          # and it is an island: around it a right turn is proved

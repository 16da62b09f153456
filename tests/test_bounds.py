"""Bounds that hold: worked by hand, never broken by points in the ball, ordered where theory orders them."""
from itertools import product
from math import inf, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advcourse import attacks, data, models, threat
from advcourse.certify import bounds, certified_radius, margin_bound, margin_bounds, network
from advcourse.certify.bounds import METHODS, unstable
from advcourse.certify.crown import BUDGET, crown, interval, lower_bound, relu_lines
from advcourse.certify.domain import Domain, domain
from advcourse.certify.lp_bounds import solver_bounds, solver_margins
from advcourse.threat import Interval

FAST = ("interval", "crown", "alpha-crown")
DOUBLE = torch.float64


def two_neurons(c: float = 0.6) -> nn.Sequential:
    """f_0 − f_1 = c − relu(a_1 + a_2 − 1) − relu(a_1 − a_2): at x = (½, ½) the margin is c, and d* = c / 2 in ℓ∞."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([-1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
        model[2].bias.copy_(torch.tensor([c, 0.0]))
    return model


HALF, ZERO = torch.full((1, 2), 0.5), torch.zeros(1, dtype=torch.long)


def random_network(seed: int, widths=(3, 4, 3, 3), scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for p in model.parameters():
        p.data.mul_(scale)
    return model


def points(x: torch.Tensor, eps: float, norm, count: int) -> torch.Tensor:
    """Points [count, …] of ball ∩ box for one image x [1, …]: half of them where a random linear function is largest."""
    from advcourse import noise
    generator = torch.Generator().manual_seed(0)
    many = x.double().expand(count // 2, *x.shape[1:])
    g = torch.randn(many.shape, generator=generator, dtype=DOUBLE)
    inside = threat.sample(many, eps, norm, noise.seeds(len(many), generator))
    return torch.cat([inside, threat.linear_maximiser(g, many, eps, norm)])


def holds(net, intervals, a: torch.Tensor) -> bool:
    pairs = zip(intervals, net.preactivations(a), strict=True)
    return all(((b.lower <= h + 1e-9) & (h <= b.upper + 1e-9)).all() for b, h in pairs)


# ------------------------------------------------------------------------------------------------ worked by hand

def test_the_five_numbers_of_the_lecture():
    w = torch.tensor([[1.1, 2.8, -0.2, 0.9, -2.2]], dtype=DOUBLE)
    model = nn.Sequential(nn.Linear(5, 1)).double()
    model[0].weight.data, model[0].bias.data = w, torch.tensor([0.3], dtype=DOUBLE)
    low, high = bounds(model, torch.full((1, 5), 0.5, dtype=DOUBLE), eps=0.5, method="interval")[-1]
    assert low.item() == pytest.approx(-2.4 + 0.3, abs=1e-10) and high.item() == pytest.approx(4.8 + 0.3, abs=1e-10)
    corners = torch.tensor(list(product([0.0, 1.0], repeat=5)), dtype=DOUBLE) @ w[0] + 0.3
    assert low.item() == pytest.approx(corners.min().item(), abs=1e-10)
    assert high.item() == pytest.approx(corners.max().item(), abs=1e-10)


@pytest.mark.parametrize("method, slope", [("interval", 4), ("crown", 3), ("alpha-crown", 3), ("lp", 3), ("mip", 2)])
def test_two_neurons_by_hand(method, slope):
    """Over the ball of radius e: h_1, h_2 in [−2e, 2e]; z_1 + z_2 <= 4e (boxes), 3e (triangles), 2e (exact)."""
    for eps in (0.05, 0.2):
        low = margin_bound(two_neurons(), HALF, ZERO, eps=eps, method=method)
        assert low.item() == pytest.approx(0.6 - slope * eps, abs=1e-5)
    radius = certified_radius(two_neurons(), HALF, ZERO, method=method, tolerance=1e-4).item()
    assert 0.6 / slope * (1 - 2e-4) <= radius <= 0.6 / slope


def test_relu_lines_by_hand():
    box = Interval(torch.tensor([[-1.0, -2.0, 1.0, -3.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0, 2.0]]))
    a, s, t = relu_lines(box)
    assert a.tolist() == [[1, 0, 1, 0, 1, 1]] and torch.allclose(s, torch.tensor([[0.75, 1 / 3, 1, 0, 1, 1]]))
    assert torch.allclose(t, torch.tensor([[0.75, 2 / 3, 0, 0, 0, 0]]))


@pytest.mark.parametrize("norm, dual", [(inf, 1), (2, 2), (1, inf)])
def test_a_linear_model_has_its_radius_in_closed_form(norm, dual):
    """Away from the edge of the box: d* = (f_0 − f_1) / ‖w_0 − w_1‖ in the dual norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2))
    x = torch.full((1, 4), 0.5)
    w = (model[0].weight[0] - model[0].weight[1]).detach()
    y = model(x).argmax(1)
    with torch.no_grad():
        model[0].bias.sub_(model(x)[0])
        model[0].bias[y] += 0.1 * w.norm(p=dual)
    for method in ("interval", "crown", "lp", "mip") if norm == inf else ("crown",):
        assert certified_radius(model, x, y, norm=norm, method=method, tolerance=1e-4).item() == pytest.approx(0.1, rel=2e-4)


# ------------------------------------------------------------------------- the minimum over ball ∩ box

@pytest.mark.parametrize("norm, eps", [(inf, 0.2), (2, 0.3), (2, 1.0), (1, 0.5), (1, 3.0), (0, 2), (0, 0)])
def test_minimum_over_ball_and_box_is_the_exact_one(norm, eps):
    torch.manual_seed(0)
    x = torch.rand(4, 30, dtype=DOUBLE)
    x[:, :12] = (x[:, :12] > 0.5).double()                              # pixels at the edge of the box
    A = torch.randn(4, 6, 30, dtype=DOUBLE)
    least, size = domain(x, eps, norm).minimum(A)
    far = x[:, None].expand(4, 6, 30).reshape(24, 30)
    best = threat.linear_maximiser(-A.reshape(24, 30), far, eps, norm)
    exact = (A.reshape(24, 30) * best).sum(1).reshape(4, 6)
    assert (least <= exact + 1e-9 * size).all()                         # sound …
    assert torch.allclose(least, exact, atol=1e-3 * (0.1 + eps))        # … and tight
    shared, _ = domain(x, eps, norm).minimum(A[:1])                     # the same rows for every image
    assert torch.allclose(shared[0], least[0], atol=1e-6) and shared.shape == (4, 6)


def test_an_empty_box_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Domain(torch.ones(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="empty"):
        Domain(torch.full((1, 2), torch.nan), torch.ones(1, 2))
    with pytest.raises(ValueError, match="center"):
        Domain(torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 2), 2.0), 1.0, 2)


# ------------------------------------------------------------------------- soundness

@pytest.mark.parametrize("name, eps", [("mnist-mlp50-standard", 0.02), ("mnist-cnn-pgd", 0.02)])
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_ten_thousand_points_and_pgd_inside_every_box(name, eps, method):
    model = models.load(name)
    x, y = data.mnist("test", n=3)
    net = network(model, x.shape[1:])
    every = bounds(model, x, eps=eps, method=method)
    least = margin_bounds(model, x, y, eps=eps, method=method)
    broken = attacks.pgd(model, x, y, eps=eps, steps=10).adversarial
    for i in range(len(x)):
        a = torch.cat([points(x[i:i + 1], eps, inf, 10_000 if "mlp" in name else 1_000), broken[i:i + 1].double()])
        assert holds(net, [Interval(b.lower[i], b.upper[i]) for b in every], a)
        logits = net(a)
        gaps = logits[:, y[i]][:, None] - logits
        assert (least[i] <= gaps.amin(0) + 1e-9)[torch.arange(10) != y[i]].all() and least[i, y[i]] == inf


@pytest.mark.parametrize("norm, eps", [(inf, 0.02), (2, 0.3), (1, 2.0), (0, 2)])
@pytest.mark.parametrize("method", FAST)
def test_every_norm_is_sound_on_a_real_network(norm, eps, method):
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=2)
    least = margin_bound(model, x, y, eps=eps, norm=norm, method=method)
    net = network(model, x.shape[1:])
    for i in range(len(x)):
        logits = net(points(x[i:i + 1], eps, norm, 2_000))
        rest = logits.clone()
        rest[:, y[i]] = -inf
        assert least[i] <= (logits[:, y[i]] - rest.amax(1)).min() + 1e-9


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 0.6), norm=st.sampled_from([inf, 2, 1, 0]),
       scale=st.sampled_from([1e-41, 1e-3, 1.0, 30.0]), edge=st.booleans())
def test_random_networks_are_enclosed(seed, eps, norm, scale, edge):
    model = random_network(seed, scale=scale)
    x = torch.rand(1, 3)
    x = x.round() if edge else x
    eps = float(int(eps * 5)) if norm == 0 else eps
    y = model(x).argmax(1)
    net, a = network(model, (3,)), points(x, eps, norm, 400)
    logits = net(a)
    worst = (logits[:, y] - logits.scatter(1, y.expand(len(a), 1), -inf).amax(1, keepdim=True)).min()
    for method in METHODS:
        found = bounds(model, x, eps=eps, norm=norm, method=method)
        assert holds(net, found, a)
        assert all((b.lower <= b.upper).all() for b in found)
        assert margin_bound(model, x, y, eps=eps, norm=norm, method=method).item() <= worst + 1e-9


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), method=st.sampled_from([m for m in METHODS if m != "mip"]), norm=st.sampled_from([inf, 2, 1]))
def test_max_and_average_pooling_are_enclosed(seed, method, norm):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.MaxPool2d(2, 1),
                          nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3))
    x = torch.rand(2, 1, 8, 8)
    y = model(x).argmax(1)
    eps, net = 0.1, network(model, (1, 8, 8))
    found = bounds(model, x, eps=eps, norm=norm, method=method)
    least = margin_bounds(model, x, y, eps=eps, norm=norm, method=method)
    for i in range(2):
        a = points(x[i:i + 1], eps, norm, 300)
        assert holds(net, [Interval(b.lower[i], b.upper[i]) for b in found], a)
        logits = net(a)
        assert (least[i] <= (logits[:, y[i]][:, None] - logits).amin(0) + 1e-9)[torch.arange(3) != y[i]].all()


def test_max_pooling_with_binaries_is_exact():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    x, y = torch.rand(1, 1, 3, 3), torch.zeros(1, dtype=torch.long)
    grid = points(x, 0.15, inf, 20_000)
    logits = network(model, (1, 3, 3))(grid)
    exact = margin_bound(model, x, y, eps=0.15, method="mip").item()
    sampled = (logits[:, 0] - logits[:, 1]).min().item()
    assert margin_bound(model, x, y, eps=0.15, method="lp").item() <= exact + 1e-6
    assert sampled - 0.02 <= exact <= sampled + 1e-9


# ------------------------------------------------------------------------- orderings

@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.05, 0.2, 0.5]))
def test_orderings(seed, eps):
    """interval, CROWN, α-CROWN, LP <= MIP; CROWN <= α-CROWN; all in nested intervals. (CROWN and interval are not ordered.)"""
    model = random_network(seed, (3, 5, 4, 3))
    x = torch.rand(1, 3)
    y = model(x).argmax(1)
    value = {m: margin_bound(model, x, y, eps=eps, method=m).item() for m in METHODS}
    assert max(value.values()) <= value["mip"] + 1e-5
    assert value["crown"] <= value["alpha-crown"] + 1e-9 and value["crown"] <= value["lp"] + 1e-9
    tight, loose = bounds(model, x, eps=eps, method="mip"), bounds(model, x, eps=eps, method="crown")
    for a, b in zip(tight, loose, strict=True):
        assert (a.lower >= b.lower - 1e-5).all() and (a.upper <= b.upper + 1e-5).all()
    net = network(model, (3,))
    assert (unstable(net, tight) <= unstable(net, loose)).all()


def test_on_equal_intermediate_bounds_lp_is_at_least_crown_and_alpha_crown_climbs_towards_it():
    net, d = network(random_network(7, (3, 8, 8, 2), scale=2.0), (3,)), domain(torch.rand(1, 3), 0.4)
    C = torch.tensor([[[1.0, -1.0]]], dtype=DOUBLE)
    known = crown(net, d)[:-1]
    plain, climbed = (lower_bound(net.layers, C, known, d, steps=s, rate=0.05).item() for s in (0, 300))
    relaxed = _triangles(net, C[0, 0], known, d)
    assert plain < climbed - 1e-3                                       # here the slopes matter
    assert climbed <= relaxed + 1e-9 and climbed == pytest.approx(relaxed, abs=2e-3)


def _triangles(net, c, known, d) -> float:
    """The triangle relaxation as scipy sees it: another program, another solver interface."""
    import numpy as np
    from scipy.optimize import linprog
    (W1, b1), (W2, b2), (W3, b3) = net.dense_layers()
    n, widths = net.units, (len(b1), len(b2))
    total = n + sum(widths)
    rows, rhs, box, at = [], [], list(zip(d.lower[0].tolist(), d.upper[0].tolist(), strict=True)), 0
    for (W, b), here in zip(((W1, b1), (W2, b2)), known, strict=True):
        first = 0 if at == 0 else n
        for j in range(len(b)):
            l, u = here.lower[0, j].item(), here.upper[0, j].item()
            h = np.zeros(total)
            h[first:first + W.shape[1]] = W[j].numpy()
            z = np.zeros(total)
            z[n + at + j] = 1
            box.append((0, max(u, 0)))
            rows.append(h - z)
            rhs.append(-b[j].item())                                    # z >= h
            if u > 0:
                s, t = (1, 0) if l >= 0 else (u / (u - l), -l * u / (u - l))
                rows.append(z - s * h)
                rhs.append(t + s * b[j].item())                         # z <= s h + t
        at += len(b)
    cost = np.concatenate([np.zeros(n + widths[0]), (c @ W3).numpy()])
    return linprog(cost, np.array(rows), rhs, bounds=box).fun + (c @ b3).item()


def test_the_linear_program_agrees_with_an_independent_one():
    for seed in range(4):
        net, d = network(random_network(seed, (3, 8, 8, 2), scale=2.0), (3,)), domain(torch.rand(1, 3), 0.4)
        C = torch.tensor([[[1.0, -1.0]]], dtype=DOUBLE)
        known = solver_bounds(net, d)[:-1]
        assert solver_margins(net, C, d).item() == pytest.approx(_triangles(net, C[0, 0], known, d), abs=1e-6)


# ------------------------------------------------------------------------- radii

@pytest.mark.parametrize("norm", [inf, 2, 1, 0])
def test_certified_radius_is_proved_and_no_attack_is_nearer(norm):
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=8)
    y[3] = (model(x[3:4]).argmax() + 1) % 10                            # a misclassified one: 0
    radius = certified_radius(model, x, y, norm=norm)
    assert radius[3] == 0 and (radius[model(x).argmax(1) == y] > 0).sum() >= (0 if norm == 0 else 6)
    sure = radius > 0
    assert (margin_bound(model, x[sure], y[sure], eps=radius[sure], norm=norm) > 0).all()
    if norm:
        loose = radius[sure] * 1.01
        assert (margin_bound(model, x[sure], y[sure], eps=loose, norm=norm) <= 0).all()     # and it is about the last
    if norm in (inf, 2):
        found = attacks.pgd(model, x[sure], y[sure], eps=radius[sure].float() * 0.999, norm=norm, steps=20)
        assert not found.success.any()


def test_radius_of_a_constant_classifier_and_of_single_images():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.rand(2, 3)
    assert certified_radius(model, x, torch.tensor([0, 1])).tolist() == [inf, 0.0]
    model = random_network(0, (3, 6, 3))
    y = model(x).argmax(1)
    batch = certified_radius(model, x, y, norm=2)
    each = torch.cat([certified_radius(model, x[i:i + 1], y[i:i + 1], norm=2) for i in range(2)])
    assert torch.allclose(batch, each, rtol=2e-3)


# ------------------------------------------------------------------------- corners

@pytest.mark.parametrize("method", METHODS)
def test_eps_zero_is_the_forward_pass(method):
    model = random_network(0)
    x = torch.rand(4, 3)
    logits = network(model, (3,))(x)
    box = bounds(model, x, eps=0.0, method=method)[-1]
    assert torch.allclose(box.lower, logits, atol=1e-5) and torch.allclose(box.upper, logits, atol=1e-5)
    assert (box.lower <= logits).all() and (logits <= box.upper).all()


@pytest.mark.parametrize("method", METHODS)
def test_dead_and_constant_units_constant_inputs_and_no_relu(method):
    model = random_network(0, (3, 4, 2))
    with torch.no_grad():
        model[0].bias[0] = -100.0                                       # always off
        model[0].weight[1] = 0.0                                        # constant
        model[0].bias[1] = 0.0
        model[0].bias[2] = 100.0                                        # always on
    x, y = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([0])
    for m, widths in ((model, 1), (nn.Sequential(nn.Linear(3, 2)), 0)):
        net = network(m, (3,))
        found = bounds(m, x, eps=0.1, method=method)
        assert len(found) == widths + 1 and holds(net, found, points(x, 0.1, inf, 500))
        logits = net(points(x, 0.1, inf, 500))
        low = margin_bound(m, x, y, eps=0.1, method=method).item()
        assert low <= (logits[:, 0] - logits[:, 1]).min() + 1e-9
    exact = (logits[:, 0] - logits[:, 1]).min().item()                  # affine: every method is exact
    assert low == pytest.approx(exact, abs=0.02)


def test_infinite_numbers_prove_nothing():
    net, d = network(random_network(0, (3, 4, 4, 2)), (3,)), domain(torch.rand(1, 3), 0.1)
    C = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=DOUBLE)
    whole = torch.full((1, 4), inf, dtype=DOUBLE)
    for known in ([Interval(-whole, whole)] * 2, [Interval(whole * torch.nan, whole * torch.nan)] * 2):
        for steps in (0, 3):
            low = lower_bound(net.layers, C, known, d, steps=steps)
            assert (low == -inf).all()


def test_rounding_margin_covers_a_sum_of_large_numbers():
    """relu(w + relu(a − 0.3)) − w loses digits in float64: with w = 1e13 nothing may be claimed to four digits."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    for layer, w, b in ((0, 1.0, -0.3), (2, 1.0, 1e13)):
        model[layer].weight.data.fill_(w)
        model[layer].bias.data.fill_(b)
    model[4].weight.data = torch.tensor([[0.0], [1.0]], dtype=DOUBLE)
    model[4].bias.data = torch.tensor([0.4, -1e13], dtype=DOUBLE)       # f_1 = relu(a − 0.3) > 0.4 = f_0 at a = 1
    for method in (*FAST, "lp"):
        assert margin_bound(model, torch.full((1, 1), 0.5), torch.tensor([0]), eps=0.5, method=method).item() <= 0


def test_batch_is_single_images_and_eps_may_differ():
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", n=4)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.03])
    together = margin_bounds(model, x, y, eps=eps)
    apart = torch.cat([margin_bounds(model, x[i:i + 1], y[i:i + 1], eps=eps[i].item()) for i in range(4)])
    assert torch.allclose(together, apart, atol=1e-6)


def test_a_walk_done_in_parts_is_the_whole_walk(monkeypatch):
    import sys
    net, d = network(random_network(2, (3, 9, 8, 3)), (3,)), domain(torch.rand(2, 3), 0.2)
    whole = crown(net, d, every=True)
    monkeypatch.setattr(sys.modules["advcourse.certify.crown"], "BUDGET", 1)
    assert BUDGET > 1
    for a, b in zip(whole, crown(net, d, every=True), strict=True):
        assert torch.allclose(a.lower, b.lower) and torch.allclose(a.upper, b.upper)


def test_settled_units_need_no_second_look():
    net, d = network(random_network(5, (3, 9, 8, 3)), (3,)), domain(torch.rand(1, 3), 0.05)
    quick, full = crown(net, d), crown(net, d, every=True)
    assert torch.allclose(quick[-1].lower, full[-1].lower, atol=1e-9) and torch.equal(unstable(net, quick), unstable(net, full))
    assert (full[1].upper - full[1].lower <= quick[1].upper - quick[1].lower + 1e-12).all()
    assert len(interval(net, d)) == 3


@pytest.mark.parametrize("change, words", [
    ({"eps": -0.1}, "eps"), ({"eps": float("nan")}, "eps"), ({"norm": 3}, "norm"), ({"method": "magic"}, "method"),
    ({"x": torch.full((1, 2), 1.5)}, "x"), ({"x": torch.full((1, 2), torch.nan)}, "x"), ({"x": torch.rand(1, 3)}, "expects"),
    ({"y": torch.tensor([2])}, "y"), ({"y": torch.tensor([0, 1])}, "y"),
])
def test_bad_input(change, words):
    arguments = {"x": HALF, "y": ZERO, "eps": 0.1} | change
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(ValueError, match=words):
        margin_bound(two_neurons(), x, y, **arguments)


def test_l2_radius_of_the_two_neurons():
    """In ℓ2 the nearest point with z_1 + z_2 = 0.6 is along a_1: h_1 = h_2 = d_1, so d* = 0.3."""
    radius = certified_radius(two_neurons(), HALF, ZERO, norm=2, tolerance=1e-4).item()
    assert 0.3 / sqrt(2) <= radius <= 0.3

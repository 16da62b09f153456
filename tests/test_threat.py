"""The geometry against independent optimisers: every projection and maximiser is checked with CVXPY or by enumeration."""
from itertools import combinations
from math import inf

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advcourse import noise, threat

CVX_NORM = {inf: "inf", 2: 2, 1: 1}
few = settings(max_examples=15, deadline=None, derandomize=True)


def problem(seed, p=6):
    """An image on the edge of the box here and there, and a point outside."""
    r = np.random.default_rng(seed)
    x = np.clip(r.uniform(-0.5, 1.5, p), 0, 1)
    return torch.tensor(x[None]), torch.tensor(x[None] + r.normal(0, 1, (1, p)))


def test_distance_by_hand():
    x, a = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 0.3], [0.4, 0.0]]]])
    got = [threat.distance(a, x, n).item() for n in threat.NORMS]
    assert got == pytest.approx([0.4, 0.5, 0.7, 2])


@few
@given(st.integers(0, 10**6), st.sampled_from([inf, 2, 1]), st.floats(0.01, 2.0))
def test_projection_is_the_nearest_point_of_ball_and_box(seed, norm, eps):
    x, a = problem(seed)
    z = cp.Variable(6)
    cp.Problem(cp.Minimize(cp.sum_squares(z - a[0].numpy())),
               [cp.norm(z - x[0].numpy(), CVX_NORM[norm]) <= eps, z >= 0, z <= 1]).solve(solver=cp.CLARABEL)
    ours = threat.project(a, x, eps, norm)
    assert np.abs(ours[0].numpy() - z.value).max() < 1e-4
    assert threat.distance(ours, x, norm).item() <= eps * (1 + 1e-9)


@few
@given(st.integers(0, 10**6), st.sampled_from([inf, 2, 1]), st.floats(0.01, 2.0))
def test_linear_maximiser_is_optimal(seed, norm, eps):
    x, a = problem(seed)
    g = a - 0.5
    z = cp.Variable(6)
    best = cp.Problem(cp.Maximize(g[0].numpy() @ z),
                      [cp.norm(z - x[0].numpy(), CVX_NORM[norm]) <= eps, z >= 0, z <= 1]).solve(solver=cp.CLARABEL)
    ours = threat.linear_maximiser(g, x, eps, norm)
    assert (g * ours).sum().item() == pytest.approx(best, abs=1e-5)
    assert threat.distance(ours, x, norm).item() <= eps * (1 + 1e-9)


@few
@given(st.integers(0, 10**6), st.sampled_from([inf, 2, 1]), st.floats(0.05, 0.95))
def test_nearest_beyond_is_the_shortest_way(seed, norm, share):
    x, a = problem(seed)
    g = a - 0.5
    gap = share * (threat.linear_maximiser(g, x, 6, 1) - x).mul(g).sum(1)  # reachable inside the box
    z = cp.Variable(6)
    best = cp.Problem(cp.Minimize(cp.norm(z - x[0].numpy(), CVX_NORM[norm])),
                      [g[0].numpy() @ (z - x[0].numpy()) >= gap.item(), z >= 0, z <= 1]).solve(solver=cp.CLARABEL)
    ours = threat.nearest_beyond(g, gap, x, norm)
    assert (g * (ours - x)).sum().item() >= gap.item() - 1e-9
    assert threat.distance(ours, x, norm).item() == pytest.approx(best, abs=1e-5)


@few
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_nearest_beyond_moves_the_fewest_values(seed, share):
    x, a = problem(seed)
    g = (a - 0.5)[0]
    gain = torch.where(g > 0, 1 - x[0], -x[0]) * g
    gap = share * gain.sum()
    fewest = next(k for k in range(7) if gain.sort(descending=True).values[:k].sum() >= gap)
    ours = threat.nearest_beyond(g[None], gap[None], x, 0)
    assert threat.distance(ours, x, 0).item() == fewest


def test_nearest_beyond_where_nothing_or_everything_is_asked():
    x, g = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[1.0, -1.0, 1.0]])
    for norm in threat.NORMS:
        assert torch.equal(threat.nearest_beyond(g, torch.tensor([0.0]), x, norm), x)
        assert threat.nearest_beyond(g, torch.tensor([9.0]), x, norm).tolist() == [[1, 0, 1]]
        assert torch.equal(threat.nearest_beyond(0 * g, torch.tensor([1.0]), x, norm), x)


@few
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_l0_projection_by_enumeration(seed, k):
    x, a = problem(seed)
    clipped = a.clamp(0, 1)
    best = min(sum(((a - (clipped if i in keep else x))[0, i] ** 2).item() for i in range(6))
               for keep in combinations(range(6), k))
    ours = threat.project(a, x, k, 0)
    assert ((ours - a) ** 2).sum().item() == pytest.approx(best)
    assert threat.distance(ours, x, 0).item() <= k


@few
@given(st.integers(0, 10**6), st.sampled_from(threat.NORMS), st.floats(0, 3))
def test_projection_is_idempotent_and_leaves_feasible_points(seed, norm, eps):
    x, a = problem(seed, p=40)
    once = threat.project(a, x, eps, norm)
    assert torch.allclose(threat.project(once, x, eps, norm), once, atol=1e-9)
    assert torch.equal(threat.project(x, x, eps, norm), x)


def test_projection_takes_one_radius_an_image():
    x, a = torch.full((2, 1, 3, 3), 0.5), torch.ones(2, 1, 3, 3)
    for norm in (inf, 2, 1):
        z = threat.project(a, x, torch.tensor([0.1, 0.3]), norm)
        assert threat.distance(z, x, norm).tolist() == pytest.approx([0.1, 0.3], abs=1e-5)


@pytest.mark.parametrize("norm", [inf, 2, 1])
def test_steepest_is_the_dual_norm(norm):
    g = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    g[0] = 0
    step = threat.steepest(g, norm)
    dual = {inf: g.abs().flatten(1).sum(1), 2: g.flatten(1).norm(dim=1), 1: g.abs().flatten(1).amax(1)}[norm]
    assert torch.allclose((g * step).flatten(1).sum(1), dual, rtol=1e-5)
    assert (threat.distance(step, 0 * step, norm) <= 1 + 1e-5).all() and (step[0] == 0).all()


def test_steepest_drops_what_would_leave_the_box():
    x, g = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[-5.0, 5.0, 1.0]])
    for norm in (inf, 2, 1):
        assert threat.steepest(g, norm, x).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("norm", threat.NORMS)
def test_samples_stay_in_ball_and_box_and_do_not_depend_on_the_batch(norm):
    x = torch.rand(20, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    x[:, :, 0] = 0
    seeds = noise.seeds(20, torch.Generator().manual_seed(2))
    a = threat.sample(x, 1.5, norm, seeds)
    assert (threat.distance(a, x, norm) <= 1.5 + 1e-5).all() and a.min() >= 0 and a.max() <= 1
    assert (threat.distance(a, x, norm) > 0).all()
    alone = torch.cat([threat.sample(x[i:i + 1], 1.5, norm, seeds[i:i + 1]) for i in range(20)])
    assert torch.equal(alone, a)


def test_l2_samples_are_uniform_in_the_ball():
    x = torch.full((4000, 3), 0.5)
    d = threat.distance(threat.sample(x, 0.4, 2, noise.seeds(4000, torch.Generator().manual_seed(0))), x, 2)
    # in 3 dimensions P(radius <= r) = (r / 0.4)^3; a binomial with n = 4000 stays within 4 standard deviations
    for r in (0.2, 0.3):
        q = (r / 0.4) ** 3
        assert abs((d <= r).float().mean().item() - q) < 4 * (q * (1 - q) / 4000) ** 0.5


def test_noise_is_uniform_normal_and_seeded():
    seeds = noise.seeds(50, torch.Generator().manual_seed(0))
    u, z = noise.uniform(seeds, 2000), noise.normal(seeds, 2000)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / (12 * 1e5) ** 0.5 and abs(z.mean()) < 4 / 1e5**0.5 and abs(z.var() - 1) < 0.02
    assert abs(torch.corrcoef(u[:2])[0, 1]) < 0.1 and not torch.equal(u, noise.uniform(seeds, 2000, step=1))
    one_by_one = torch.Generator().manual_seed(0)
    assert torch.equal(torch.cat([noise.seeds(1, one_by_one) for _ in range(50)]), seeds)


def test_interval_holds_the_ball():
    x = torch.tensor([[0.0, 0.5, 1.0]])
    assert threat.interval(x, 0.25).lower.tolist() == [[0, 0.25, 0.75]]
    assert threat.interval(x, 0.25).upper.tolist() == [[0.25, 0.75, 1.0]]
    assert threat.interval(x, 1, 0).lower.tolist() == [[0, 0, 0]]
    assert threat.interval(x, 0, 0).upper.tolist() == x.tolist()


@pytest.mark.parametrize("bad, word", [
    (lambda: threat.check_images(torch.full((1, 2), 1.5)), r"1\.5"),
    (lambda: threat.check_images(torch.full((1, 2), float("nan"))), "NaN"),
    (lambda: threat.check_images(torch.zeros(1, 2, dtype=torch.int64)), "int64"),
    (lambda: threat.check_images([0.0]), "list"),
    (lambda: threat.check_labels(torch.tensor([3]), 1, 3), "3"),
    (lambda: threat.check_labels(torch.tensor([1, 2]), 1), r"\[2\]"),
    (lambda: threat.check_eps(-0.1), r"-0\.1"),
    (lambda: threat.check_eps(float("nan")), "nan"),
    (lambda: threat.check_norm(3), "3"),
])
def test_bad_input_is_named(bad, word):
    with pytest.raises(ValueError, match=word):
        bad()


@pytest.mark.parametrize("norm", threat.NORMS)
def test_shrink_ends_in_ball_and_box_and_is_the_projection_of_points_in_the_box(norm):
    g = torch.Generator().manual_seed(4)
    x, a = (torch.rand(30, 1, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    x[:, :, 0], eps = 0, torch.linspace(0.05, 6, 30, dtype=torch.float64)
    inside = threat.shrink(a, x, eps, norm)
    assert torch.allclose(inside, threat.project(a, x, eps, norm), atol=1e-6)
    outside = threat.shrink(a + torch.randn(a.shape, generator=g, dtype=a.dtype), x, eps, norm)
    assert (threat.distance(outside, x, norm) <= eps + 1e-6).all() and 0 <= outside.min() and outside.max() <= 1
    assert torch.equal(threat.shrink(x, x, 0.0, norm), x)

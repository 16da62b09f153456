"""Square and HopSkipJump: budgets kept, no gradient asked, near the closed form on linear models."""
from math import inf

import pytest
import torch
from torch import nn

from advcourse import threat
from advcourse.attacks import hop_skip_jump, query, square
from advcourse.attacks.attempt import Attempt
from advcourse.losses import margin


class BlackBox(nn.Module):
    """Counts the images it is shown, remembers the margins, refuses to be differentiated."""

    def __init__(self, model, y=None):
        super().__init__()
        self.model, self.y, self.seen, self.margins = model, y, 0, []

    def forward(self, a):
        assert not torch.is_grad_enabled()
        logits = self.model(a)
        self.seen += len(a)
        if self.y is not None:
            self.margins.append(margin(logits, self.y.expand(len(a))))
        return logits


class DecisionOnly(nn.Module):
    """Gives away the class and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, a):
        return nn.functional.one_hot(self.model(a).argmax(1), 2).to(a.dtype)


def linear(p=36, seed=0, classes=2):
    torch.manual_seed(seed)
    layer = nn.Linear(p, classes).double()
    layer.bias.data = -layer.weight.data.sum(1) / 2  # a tie in the middle of the box: noise falls on either side
    return nn.Sequential(nn.Flatten(), layer)


def images(n=20, shape=(1, 6, 6), seed=1, edge=False):
    u = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (u * 2 - 0.5).clamp(0, 1) if edge else 0.4 + 0.2 * u


def problem(**kw):
    model, x = linear(), images(**kw)
    y = model(x).argmax(1)
    w = (model[1].weight[1 - y] - model[1].weight[y]).detach().reshape(x.shape)
    lead = margin(model(x), y).detach()
    return model, x, y, w, lead


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("norm", [inf, 2])
def test_square_breaks_what_can_be_broken_with_some_room(norm):
    """On a linear model with half as much again as the exact distance it succeeds; with 1 % less than exact it cannot."""
    model, x, y, w, lead = problem(edge=True)
    exact = threat.distance(threat.nearest_beyond(w, lead, x, norm), x, norm)
    assert not square(model, x, y, eps=exact * 0.99, norm=norm, generator=seeded()).success.any()
    r = square(model, x, y, eps=exact * 1.5, norm=norm, queries=2000, generator=seeded())
    assert r.success.float().mean() >= 0.9
    assert (threat.distance(r.adversarial, x, norm) <= exact * 1.5 * (1 + 1e-9)).all()


@pytest.mark.parametrize("norm", [inf, 2])
def test_square_never_goes_back(norm):
    """The margin of the accepted points falls and falls: more queries, from the same seeds, never lose an image."""
    model, x, y, w, lead = problem()
    eps = 0.5 * threat.distance(threat.nearest_beyond(w, lead, x, norm), x, norm)[:1]
    box = BlackBox(model, y[:1])
    square(box, x[:1], y[:1], eps=eps, norm=norm, queries=300, generator=seeded())
    m = torch.cat(box.margins[1:-1])
    assert len(m) == 300 and m.min() < m[0]
    best = m.cummin(0).values
    far = m[200:] - best[199]  # late proposals differ little from the best point: a random walk would have drifted off
    assert far.abs().max() < (m[:20].max() - best[-1]).abs()


@pytest.mark.parametrize("attack, options", [(square, {"eps": 0.01}), (square, {"eps": 0.05, "norm": 2}), (hop_skip_jump, {})])
@pytest.mark.parametrize("queries", [0, 1, 37, 300])
def test_the_budget_is_kept_and_every_query_counted(attack, options, queries):
    model, x, y, _, _ = problem(n=3)
    box = BlackBox(model)
    r = attack(box, x, y, queries=queries, generator=seeded(), **options)
    assert (r.queries <= queries + 1).all()
    assert box.seen == r.queries.sum() + len(x)  # the re-check at the end
    if queries == 0:
        assert not r.success.any() and torch.equal(r.adversarial, x)


@pytest.mark.parametrize("norm, factor", [(2, 1.15), (inf, 1.3)])
def test_hop_skip_jump_comes_near_the_exact_distance_on_a_linear_model(norm, factor):
    model, x, y, w, lead = problem(n=10)
    exact = threat.distance(threat.nearest_beyond(w, lead, x, norm), x, norm)
    r = hop_skip_jump(model, x, y, norm=norm, queries=4000, generator=seeded())
    assert r.success.all() and (r.distance >= exact * (1 - 1e-9)).all()
    assert (r.distance <= factor * exact).all(), r.distance / exact


def test_hop_skip_jump_needs_the_decision_only():
    model, x, y, _, _ = problem(n=4)
    scores = hop_skip_jump(model, x, y, queries=500, generator=seeded())
    decisions = hop_skip_jump(DecisionOnly(model), x, y, queries=500, generator=seeded())
    assert torch.equal(scores.adversarial, decisions.adversarial)


def test_hop_skip_jump_more_queries_are_never_worse():
    model, x, y, _, _ = problem(n=4)
    few, many = (hop_skip_jump(model, x, y, queries=q, generator=seeded()) for q in (100, 2000))
    assert (many.distance <= few.distance).all() and many.distance.mean() < 0.9 * few.distance.mean()


def test_hop_skip_jump_radius_start_and_target():
    model, x = linear(classes=3), images(n=6)
    y = model(x).argmax(1)
    target = (y + 1) % 3
    start = torch.stack([threat.linear_maximiser((2 * model[1].weight[t] - model[1].weight.sum(0)).detach().reshape(1, 1, 6, 6),
                                                 x[:1], 1.0, inf)[0] for t in target])
    there = model(start).argmax(1) == target
    assert there.any()
    r = hop_skip_jump(model, x, y, target=target, start=start, queries=400, generator=seeded())
    assert torch.equal(r.success, there) and (model(r.adversarial).argmax(1) == target)[there].all()
    eps = r.distance[there].median()
    capped = hop_skip_jump(model, x, y, target=target, start=start, queries=400, eps=eps, generator=seeded())
    assert torch.equal(capped.success, r.distance <= eps)


def test_hop_skip_jump_one_image_without_a_start_does_not_stop_the_others():
    class Stubborn(nn.Module):  # dark images are class 0, and no noise is dark
        def forward(self, a):
            dark = a.flatten(1).mean(1) < 0.3
            wave = (a.flatten(1)[:, 0] - 0.5) * 10
            return torch.stack([torch.zeros_like(wave) + 0.1, torch.where(dark, wave * 0 - 1, wave)], 1)

    x = torch.cat([torch.full((1, 4), 0.3), torch.full((1, 4), 0.6)]).double()
    y = torch.tensor([0, 1])
    r = hop_skip_jump(Stubborn(), x, y, queries=200, start=torch.tensor([[0.1] * 4, [0.3, 0.9, 0.9, 0.9]]).double())
    assert r.success.tolist() == [False, True]


def test_square_plans_windows_of_the_right_size_inside_the_image():
    guess, areas = torch.ones(5, 2, 6, 9), torch.tensor([1.0, 0.5, 4 / 54, 0.001])
    for norm in (inf, 2):
        plan = query._plan(torch.arange(5), areas, 1, guess, norm)
        for rows, columns in zip(plan[:-1:2], plan[1:-1:2], strict=False):
            for inside, sides in ((rows, [6, 5, 2, 1]), (columns, [7, 5, 2, 1])):
                assert torch.equal(inside.sum(2), torch.tensor(sides).expand(5, 4).float())
                assert (inside.diff(dim=2).abs().sum(2) <= 2).all()  # in one piece
        assert plan[-1].shape == (5, 4, 2) and (norm == 2 or (plan[-1] == 0).all((0, 2)).tolist() == [False, False, True, True])


def test_square_small_windows_always_change_something():
    guess = torch.where(torch.rand(50, 1, 6, 6, generator=seeded()) < 0.5, -1.0, 1.0)
    plan = query._plan(torch.arange(50), torch.full((8,), 0.01), 1, guess, inf)
    changed = query._recolour(guess, *plan) != guess[:, None]
    assert (changed.flatten(2).sum(2) == 1).all()  # one pixel each, never none


@pytest.mark.parametrize("norm", [inf, 2])
@pytest.mark.parametrize("rounds, share", [(query.REFILLS, 0.85), (100, 1 - 1e-9)])
def test_square_images_are_in_box_and_ball_and_fill_it(norm, rounds, share, monkeypatch):
    """The rounds of lengthening and cutting end at the exact way along the guess, come close to it soon, and never past it."""
    monkeypatch.setattr(query, "REFILLS", rounds)
    x = images(20, edge=True)
    guess, radius = torch.randn(20, 3, 1, 6, 6, generator=seeded()).double(), torch.linspace(0.01, 2, 20).double()
    guess = guess.sign() if norm == inf else guess
    a = query._render(guess, x, radius, norm)
    for q in range(3):
        exact = threat.linear_maximiser(guess[:, q], x, radius, norm)
        d, most = threat.distance(a[:, q], x, norm), threat.distance(exact, x, norm)
        assert (d <= radius * (1 + 1e-12)).all() and (d >= share * most).all() and (d <= most * (1 + 1e-9)).all()
        assert a.min() >= 0 and a.max() <= 1
        assert rounds < 100 or torch.allclose(a[:, q], exact, atol=1e-6)


@pytest.mark.parametrize("attack, options", [(square, {"eps": 0.1}), (square, {"eps": 0.5, "norm": 2}), (hop_skip_jump, {})])
def test_images_that_are_not_pictures_and_nothing_left_to_attack(attack, options):
    model, x, y, _, _ = problem(n=4)
    r = attack(model, x.flatten(1), 1 - y, queries=20, **options)
    assert r.success.all() and (r.distance == 0).all() and (r.queries == 1).all()


def test_hadamard_rows_are_orthogonal():
    h = query._hadamard(20, 64)
    assert torch.equal(h.abs(), torch.ones(20, 64)) and torch.equal(h @ h.T, 64 * torch.eye(20))


@pytest.mark.parametrize("edge", [False, True])
def test_hop_skip_jump_estimates_the_normal_as_well_as_orthogonal_questions_can(edge):
    """p orthogonal yes/no questions to a linear model in p dimensions: E cos = sqrt(2/pi) = 0.80 if half the answers are yes.

    Independent directions would reach 0.62, and images at the edge of the box less, were they not given room.
    """
    torch.manual_seed(0)
    model, x = linear(64), images(30, (1, 8, 8), edge=edge)
    y = model(x).argmax(1)
    attempt = Attempt(model, x, y, norm=2)
    walk = query._Walk(attempt, attempt.open, attempt.seeds, 10**6)
    w = (model[1].weight[1 - y] - model[1].weight[y]).detach()
    far = threat.linear_maximiser(w.reshape(walk.x.shape), walk.x, 3.0, 2)
    a = walk.to_boundary(walk.to_boundary(far))
    assert torch.cosine_similarity(walk.normal(a, 64, 1).flatten(1), w).mean() > 0.77


@pytest.mark.parametrize("attack, options", [(square, {"eps": 0.02}), (hop_skip_jump, {"first": 20})])
def test_large_images_and_small_passes_change_nothing(attack, options, monkeypatch):
    """More images than go in step, more points than share a forward pass: each image fares as it does alone."""
    model, x = linear(4096), images(6, (1, 64, 64))
    y = model(x).argmax(1)
    together, g = attack(model, x, y, queries=150, generator=seeded(), **options), seeded()
    monkeypatch.setattr(query, "PASS", 7)
    for i in range(6):
        alone = attack(model, x[i:i + 1], y[i:i + 1], queries=150, generator=g, **options)
        assert torch.allclose(together.adversarial[i], alone.adversarial[0], atol=1e-9)
        assert together.queries[i] == alone.queries[0]


@pytest.mark.parametrize("attack, options, message", [
    (square, {"eps": 0.1, "norm": 1}, "norm=1"), (square, {"eps": 0.1, "queries": -1}, "queries=-1"),
    (hop_skip_jump, {"norm": 0}, "norm=0"), (hop_skip_jump, {"queries": -5}, "queries=-5"),
    (hop_skip_jump, {"target": torch.tensor([1, 0, 1])}, "start=None"),
    (hop_skip_jump, {"start": torch.zeros(2, 1, 6, 6)}, "start has shape"),
    (hop_skip_jump, {"start": torch.full((3, 1, 6, 6), 2.0)}, "start leaves the box"),
    (hop_skip_jump, {"eps": torch.ones(5)}, r"eps of shape \[5\]"), (hop_skip_jump, {"eps": -1.0}, "eps=-1.0")])
def test_bad_input_is_named(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(linear(), images(n=3), torch.tensor([0, 1, 0]), **options)

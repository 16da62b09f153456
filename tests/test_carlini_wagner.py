"""The seven objectives by their definition, and what the attack promises beyond the conduct list."""
from math import inf, log

import pytest
import torch
from torch import nn

from advcourse import data, models, threat
from advcourse.attacks import Attempt, carlini_wagner, ddn, fmn, houdini, pgd
from advcourse.attacks.carlini_wagner import objective
from advcourse.attacks.fast_minimal import REACH, aims
from advcourse.attacks.minimal import pull_back
from advcourse.losses import houdini as houdini_loss
from advcourse.losses import margin

S = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
T = torch.arange(400) % 5


@pytest.fixture(scope="module")
def digits():
    model = models.load("mnist-mlp50-standard")
    x, y = data.mnist("test", 24)
    keep = model(x).argmax(1) == y
    return model, x[keep], y[keep]


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("avoid", [False, True])
def test_objective_is_at_most_zero_only_where_the_goal_is_met(number, avoid):
    f, m = objective(S, T, number, avoid=avoid), margin(S, T)
    met = (m < 0) if avoid else (m > 0)
    if number in (2, 3, 6, 7):
        assert torch.equal(f <= 1e-12, met)
    else:  # at least half of the probability on the goal's side: enough for t to win, too little for t to lose
        p = S.softmax(1).gather(1, T[:, None])[:, 0]
        side = 1 - p if avoid else p
        assert torch.equal(f <= 1e-12, side >= 0.5)
        assert bool((met & (f > 1e-3)).any()) != avoid  # t may lose with less than half of the others' sum: never here


def test_objectives_by_hand():
    s, t = torch.tensor([[0.0, 3.0]]), torch.tensor([0])
    p = torch.tensor([0.0, 3.0]).softmax(0)[0].item()
    expected = {1: -log(2 * p), 2: 1 - 2 * p, 4: 0.5 - p, 5: -log(2 * p), 6: 3.0}
    for number, value in expected.items():
        assert objective(s, t, number).item() == pytest.approx(value, rel=1e-5)
    assert objective(s, t, 6, confidence=2.0).item() == pytest.approx(5.0)


@pytest.mark.parametrize("norm", [2, 0, inf])
def test_change_of_variable_moves_pixels_at_the_edge_too(digits, norm):
    model, x, y = digits
    r = carlini_wagner(model, x[:6], y[:6], norm=norm, change_of_variable=True, refine=0, rate=0.3, steps=80)
    moved = (r.adversarial != x[:6]) & ((x[:6] == 0) | (x[:6] == 1))
    assert r.success.float().mean() > 0.6 and bool(moved[r.success].any())


def test_more_confidence_costs_distance(digits):
    model, x, y = digits
    d = [carlini_wagner(model, x, y, confidence=a).distance.median() for a in (0.0, 4.0, 8.0)]
    assert d[0] < d[1] < d[2]


def test_a_target_never_is_nearer_than_the_nearest_class(digits):
    model, x, y = digits
    free = fmn(model, x, y, classes=9).distance
    targeted = torch.stack([fmn(model, x, y, target=(y + k) % 10).distance for k in range(1, 10)])
    assert (targeted.amin(0) >= 0.9 * free).all() and (targeted.amin(0) <= 1.1 * free).all()


def test_heading_for_more_classes_never_hurts(digits):
    model, x, y = digits
    for attack in (ddn, fmn):
        assert (attack(model, x, y, classes=5).distance <= attack(model, x, y, classes=2).distance * 1.01 + 1e-6).all()


def test_scouting_other_classes_finds_nearer_images(digits):
    model, x, y = digits
    alone, scouted = (carlini_wagner(model, x, y, classes=k, refine=0).distance for k in (0, 5))
    assert scouted.log().mean() < alone.log().mean() - 0.01


def linear(slopes, biases):
    """A linear model on one row of values: class 0 has logit 0, class k the logit slopes[k-1] . x + biases[k-1]."""
    layer = nn.Linear(len(slopes[0]), len(slopes) + 1).double()
    layer.weight.data = torch.tensor([[0.0] * len(slopes[0]), *slopes]).double()
    layer.bias.data = torch.tensor([0.0, *biases]).double()
    return nn.Sequential(nn.Flatten(), layer)


def test_aims_are_the_classes_within_reach_nearest_first():
    """Euclidean distances 0.2, 0.1 and 0.9 from the first image; 0.1, 0.2 and 0.8 from the second."""
    model = linear([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [-0.7, 0.4, -1.4])
    x = torch.tensor([[0.5, 0.5], [0.6, 0.6]]).double()
    walks = [(rows.tolist(), aim.tolist()) for rows, aim in aims(Attempt(model, x, torch.zeros(2).long(), norm=2), 3)]
    assert 1 < REACH < 2 and walks == [([0, 1], [2, 1])]
    model[1].bias.data[2] = 0.35  # now 0.2 and 0.15 from the first, 0.1 and 0.25 from the second
    walks = [(rows.tolist(), aim.tolist()) for rows, aim in aims(Attempt(model, x, torch.zeros(2).long(), norm=2), 3)]
    assert walks == [([0, 1], [2, 1]), ([0], [1])]


def test_pull_back_leaves_an_image_that_is_settled():
    """On a linear model the first round lands beyond the boundary by next to nothing; the second sees that and ends."""
    model, x = linear([[3.0, -1.0]], [-2.0]), torch.tensor([[0.5, 0.5]]).double()
    attempt = Attempt(model, x, torch.zeros(1).long(), norm=2)
    assert len(attempt.started)
    far = torch.tensor([[1.0, 0.1]]).double()
    attempt.submit(far, model(far))
    before = attempt.queries.clone()
    pull_back(attempt, 10)
    assert attempt.distance.item() == pytest.approx(1 / 10**0.5, rel=1e-9)
    assert (attempt.queries - before).item() == 2 * 3


@pytest.mark.parametrize("norm", [2, 0, inf])
def test_refining_never_hurts(digits, norm):
    model, x, y = digits
    for attack in (carlini_wagner, fmn):
        plain = attack(model, x[:8], y[:8], norm=norm, refine=0).distance
        assert (attack(model, x[:8], y[:8], norm=norm, refine=3).distance <= plain + 1e-6).all()


def test_houdini_is_monotone_in_the_margin_and_keeps_its_slope():
    order = (-margin(S, T)).argsort()
    loss = houdini_loss(S, T)
    assert (loss[order].diff() >= -1e-12).all() and (loss <= 0).all()
    s = torch.tensor([[60.0, 0.0]], requires_grad=True)
    houdini_loss(s, torch.tensor([0])).sum().backward()
    assert torch.isfinite(s.grad).all() and s.grad[0, 0] < -1


def test_houdini_prefers_expensive_mistakes(digits):
    model, x, y = digits
    cost = torch.ones(10, 10)
    cost[:, 8] = 1e6
    priced = houdini(model, x, y, eps=0.08, cost=cost)
    flat = houdini(model, x, y, eps=0.08)
    eights = [(model(r.adversarial).argmax(1) == 8).sum() for r in (priced, flat)]
    assert eights[0] > eights[1] and flat.success.sum() >= pgd(model, x, y, eps=0.08, loss="margin").success.sum() - 1


def test_a_failing_network_gives_no_false_success():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    x, y = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)
    for attack in (carlini_wagner, ddn, fmn):
        r = attack(constant, x, y)
        assert not r.success.any() and (r.distance == inf).all() and torch.equal(r.adversarial, x)
        assert (threat.distance(r.adversarial, x, 2) == 0).all()


@pytest.mark.parametrize("attack, options, word", [
    (carlini_wagner, {"objective": 8}, "8"), (carlini_wagner, {"norm": 1}, "norm=1"),
    (carlini_wagner, {"objective": 2, "confidence": 1.0}, "confidence"), (ddn, {"norm": inf}, "inf"),
    (fmn, {"norm": 3}, "3"),
])
def test_bad_input_is_named(digits, attack, options, word):
    model, x, y = digits
    with pytest.raises(ValueError, match=word):
        attack(model, x[:1], y[:1], **options)

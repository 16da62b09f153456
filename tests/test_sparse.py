"""JSMA and one-pixel against what can be worked out by hand or by trying everything."""
from math import inf

import pytest
import torch
from torch import nn

from advcourse import threat
from advcourse.attacks import jsma, one_pixel
from advcourse.attacks.sparse import saliency_pair


def linear(weight, bias=None):
    """A linear classifier with these rows of weights, [classes, p]."""
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.weight.data = weight
    layer.bias.data = torch.tensor(bias or [0.0] * len(weight)).double()
    return nn.Sequential(nn.Flatten(), layer)


def test_saliency_pair_by_hand():
    """Gains (2, 3, 1, -), falls (-1, +1, -4, -): pairs 01: 5*0 no, 02: 3*5 = 15, 12: 4*3 = 12."""
    own, others = torch.tensor([[2.0, 3.0, 1.0, 9.0]]), torch.tensor([[-1.0, 1.0, -4.0, -9.0]])
    pair, value = saliency_pair(own, others, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))  # the best pixel has no room left
    assert sorted(pair[0].tolist()) == [0, 2] and value.tolist() == [[1, 1]]
    free = torch.tensor([[False, True, True, True]])
    assert sorted(saliency_pair(own, others, torch.zeros(1, 4), free)[0][0].tolist()) == [2, 3]  # 10 * 13


def test_saliency_pair_goes_down_where_the_slope_says_so():
    own, others = torch.tensor([[-2.0, 1.0, 0.1]]), torch.tensor([[1.0, -1.0, 0.0]])
    pair, value = saliency_pair(own, others, torch.tensor([[1.0, 0.5, 0.5]]))
    assert dict(zip(pair[0].tolist(), value[0].tolist(), strict=True)) == {0: 0.0, 1: 1.0}


def test_saliency_pair_falls_back_when_no_pair_qualifies():
    own, others = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    pair, _ = saliency_pair(own, others, torch.zeros(1, 3))
    assert sorted(pair[0].tolist()) == [1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_jsma_on_a_linear_model_against_the_exact_count(seed):
    """Two classes: the fewest values is the closed form; unrefined JSMA needs at most one more (it moves pairs)."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(30, generator=g, dtype=torch.float64)
    model, x = linear(torch.stack([w, -w])), torch.rand(20, 1, 5, 6, generator=g, dtype=torch.float64).round(decimals=1)
    y = model(x).argmax(1)
    gradient = torch.stack([-w, w])[y].reshape(x.shape)
    lead = model(x).gather(1, y[:, None])[:, 0] - model(x).gather(1, 1 - y[:, None])[:, 0]
    exact = threat.distance(threat.nearest_beyond(2 * gradient, lead + 1e-9, x, 0), x, 0)
    plain, refined = jsma(model, x, y, refine=0), jsma(model, x, y)
    assert plain.success.all() and refined.success.all()
    assert (plain.distance >= exact).all() and (plain.distance <= exact + 1).all()
    assert torch.equal(refined.distance, exact)


def test_jsma_caps_the_number_of_values():
    model, x = linear(torch.eye(3, 12)), torch.zeros(4, 12).double()
    x[:, 0] = 0.5
    y = torch.zeros(4, dtype=torch.int64)
    assert jsma(model, x, y, eps=1, refine=0).distance.tolist() == [inf] * 4
    r = jsma(model, x, y, eps=torch.tensor([2, 2, 3, 1]), refine=0)
    assert r.success.tolist() == [True, True, True, False] and (r.distance[:3] == 2).all()


def test_jsma_sends_each_pixel_once():
    """No pixel can help: every pixel is spent, none twice, and the attack ends."""
    model = linear(torch.zeros(3, 9), [1.0, 0.0, 0.0])
    r = jsma(model, torch.full((2, 9), 0.5).double(), torch.zeros(2, dtype=torch.int64), refine=0)
    assert not r.success.any() and (r.queries == 1 + 3 * 5).all()  # pairs 1 to 4, then one pixel is left


def one_pixel_truth(model, x, y):
    """Is there a pixel and a value, 0 or 1, that changes the class? (A linear model is extreme at the ends.)"""
    broken = torch.zeros(len(x), dtype=torch.bool)
    for i in range(x[0].numel()):
        for value in (0.0, 1.0):
            a = x.clone().flatten(1)
            a[:, i] = value
            broken |= model(a.reshape(x.shape)).argmax(1) != y
    return broken


def test_one_pixel_finds_what_trying_every_pixel_finds():
    g = torch.Generator().manual_seed(0)
    model = linear(torch.randn(3, 30, generator=g))
    x = torch.rand(30, 1, 5, 6, generator=g, dtype=torch.float64)
    y = model(x).argmax(1)
    truth = one_pixel_truth(model, x, y)
    assert 5 < truth.sum() < 28
    r = one_pixel(model, x, y, generator=torch.Generator().manual_seed(0))
    assert not (r.success & ~truth).any() and (r.success & truth).sum() >= 0.9 * truth.sum()
    assert (r.distance[r.success] == 1).all()
    assert (r.queries <= 1 + 40 * 21).all() and (r.queries[~r.success] == 1 + 40 * 21).all()


def test_one_pixel_in_colour_changes_one_place_and_k_pixels_at_most_k_places():
    g = torch.Generator().manual_seed(1)
    model, x = linear(torch.randn(3, 48, generator=g)), torch.rand(10, 3, 4, 4, generator=g, dtype=torch.float64)
    y = model(x).argmax(1)
    for k in (1, 2):
        r = one_pixel(model, x, y, eps=k, generator=g)
        places = (r.adversarial != x).any(1).flatten(1).sum(1)
        assert r.success.any() and (places <= k).all() and (places[r.success] >= 1).all()
        assert (r.distance[r.success] <= 3 * k).all()


def test_one_pixel_reaches_a_target_or_says_no():
    g = torch.Generator().manual_seed(2)
    model, x = linear(torch.randn(3, 12, generator=g)), torch.rand(12, 1, 3, 4, generator=g, dtype=torch.float64)
    y = model(x).argmax(1)
    r = one_pixel(model, x, y, target=(y + 1) % 3, eps=2, generator=g)
    assert 0 < r.success.sum() and torch.equal(model(r.adversarial).argmax(1) == (y + 1) % 3, r.success)


@pytest.mark.parametrize("attack, options, message", [
    (jsma, {"norm": 2}, "norm=2"), (jsma, {"steps": 0}, "steps=0"), (one_pixel, {"norm": 1}, "norm=1"),
    (one_pixel, {"eps": 1.5}, "eps=1.5"), (one_pixel, {"eps": torch.ones(3)}, r"eps of shape \[3\]"),
    (one_pixel, {"eps": -1}, "eps=-1"), (one_pixel, {"generations": 0}, "generations=0"),
    (one_pixel, {"population": 4}, "population - 4=0")])
def test_bad_input_is_named(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(linear(torch.eye(3)), torch.full((3, 3), 0.5), torch.arange(3), **options)

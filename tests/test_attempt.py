"""What all attacks lean on, piece by piece: counting, the best point, the last judgement."""
from math import inf

import pytest
import torch
from torch import nn

from advcourse import attacks, losses, noise
from advcourse.attacks import Attempt, iterative
from advcourse.attacks.attempt import evaluating, within


def linear(weight):
    """logits = x @ weight.T on flat images, no bias."""
    model = nn.Linear(len(weight[0]), len(weight), bias=False).double()
    model.weight.data = torch.tensor(weight, dtype=torch.float64)
    return model


MODEL = linear([[1.0, 0.0], [0.0, 1.0]])
X = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.3, 0.4]], dtype=torch.float64)
Y = torch.tensor([0, 1, 0])  # the third is misclassified


def test_the_clean_pass_is_made_once_and_only_when_asked_for():
    attempt = Attempt(MODEL, X, Y)
    assert attempt.queries.tolist() == [0, 0, 0]
    assert attempt.open.tolist() == [0, 1] and attempt.started.tolist() == [0, 1]
    assert torch.equal(attempt.clean, MODEL(X)) and attempt.queries.tolist() == [1, 1, 1]


def test_the_first_gradient_brings_the_clean_logits_along():
    attempt = Attempt(MODEL, X, Y)
    logits, value, g = attempt.gradient(losses.margin_loss)
    assert value.tolist() == pytest.approx([-0.6, -0.8, 0.1]) and torch.equal(logits, MODEL(X))
    assert g.tolist() == [[-1, 1], [1, -1], [-1, 1]]
    assert attempt.open.tolist() == [0, 1] and attempt.queries.tolist() == [2, 2, 2]


def test_fgsm_costs_one_gradient_and_one_judgement():
    assert attacks.fgsm(MODEL, X, Y, eps=0.5).queries.tolist() == [3, 3, 2]


def test_a_targeted_gradient_goes_towards_the_target():
    attempt = Attempt(MODEL, X[:1], Y[:1], target=torch.tensor([1]))
    _, value, g = attempt.gradient(losses.margin_loss)
    assert value.item() == pytest.approx(-0.6) and g.tolist() == [[-1, 1]]


def test_class_gradients_by_hand():
    model = linear([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    attempt = Attempt(model, X[:1], Y[:1])
    _, leads, w = attempt.class_gradients(X[:1], torch.tensor([[2, 1]]))
    assert leads[0].tolist() == pytest.approx([1.2, -0.6])
    assert w[:, 0].tolist() == [[1, 2], [-1, 1]] and attempt.queries.tolist() == [3]


def test_submit_keeps_the_nearest_and_result_returns_it():
    attempt = Attempt(MODEL, X, Y, eps=0.5)
    assert attempt.open.tolist() == [0, 1]
    for a in ([0.4, 0.6], [0.45, 0.55], [0.41, 0.6], [0.2, 0.9], [0.8, 0.2]):  # one out of the ball, one no success
        a = torch.tensor([a], dtype=torch.float64)
        attempt.submit(a, MODEL(a), torch.tensor([0]))
    r = attempt.result()
    assert r.adversarial[0].tolist() == [0.45, 0.55] and r.distance.tolist() == pytest.approx([0.35, inf, 0])
    assert r.success.tolist() == [True, False, True] and torch.equal(r.adversarial[1:], X[1:])


def test_last_candidates_are_judged_but_replace_nothing_found():
    attempt = Attempt(MODEL, X, Y)
    found = torch.tensor([[0.45, 0.55]], dtype=torch.float64)
    assert attempt.open.tolist() == [0, 1]
    attempt.submit(found, MODEL(found), torch.tensor([0]))
    r = attempt.result(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert r.adversarial.tolist() == [[0.45, 0.55], [1.0, 0.0], X[2].tolist()]
    assert r.queries.tolist() == [1, 2, 1]


def test_a_last_candidate_outside_ball_or_box_is_no_success():
    for a in ([0.1, 1.2], [-0.1, 0.9], [0.0, 1.0], [float("nan"), 1.0]):
        attempt = Attempt(MODEL, X[:1], Y[:1], eps=0.7)
        r = attempt.result(torch.tensor([a], dtype=torch.float64))
        assert not r.success.any() and torch.equal(r.adversarial, X[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", [0, 1])
def test_a_tie_or_a_lead_within_rounding_is_no_success(dtype, label):
    rival, unit = 1 - label, torch.finfo(dtype).eps
    for lead, broken in ((0, False), (4 * unit, False), (100 * unit, True)):
        x = torch.tensor([[0.5, 0.5]], dtype=dtype)
        x[0, rival] += lead
        shifted = nn.Sequential(nn.Linear(2, 2)).to(dtype)
        shifted[0].weight.data, shifted[0].bias.data = torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype)
        attempt = Attempt(shifted, x, torch.tensor([label]))
        logits = torch.cat([shifted(x), torch.full((1, 1), -0.5, dtype=dtype)], 1)  # a third class spreads the logits by one
        assert attempt.wins(logits).item() is broken


def test_modes_come_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert model.training and model[0].training and not model[1].training


def test_a_gradient_that_is_not_a_number_becomes_zero():
    class Root(nn.Module):
        def forward(self, a):
            return torch.stack([a.sum(1).sqrt() + 1, a[:, 0]], 1)

    _, _, g = Attempt(Root(), torch.zeros(1, 2), torch.tensor([0])).gradient(losses.cross_entropy)
    assert torch.isfinite(g).all()


def test_seeds_at_once_are_seeds_one_by_one():
    g, h = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(noise.seeds(100, g), torch.cat([noise.seeds(1, h) for _ in range(100)]))


def test_within_allows_rounding_and_no_more():
    eps = torch.tensor(0.1)
    assert within(eps * (1 + 1e-6), eps) and not within(eps * 1.001, eps) and not within(torch.tensor(torch.nan), eps)


@pytest.mark.parametrize("steps", [1, 2, 9, 100])
def test_apgd_looks_back_ever_more_often(steps):
    marks = iterative.checkpoints(steps)
    assert marks == sorted(set(marks)) and marks[0] >= 1
    if steps == 100:
        assert marks[:5] == [22, 41, 57, 70, 80]  # gaps 22, 19, 16, 13, 10, as in the paper


def test_a_restart_only_works_on_what_is_still_open():
    once, thrice = (attacks.pgd(MODEL, X[:2], Y[:2], eps=torch.tensor([0.5, 0.01]), steps=5, restarts=k,
                                generator=torch.Generator().manual_seed(0)) for k in (1, 3))
    assert thrice.success.tolist() == [True, False]
    assert thrice.queries[0] == once.queries[0] and thrice.queries[1] > 2 * once.queries[1]


def test_bim_takes_steps_of_one_grey_level():
    x = torch.full((1, 2), 0.5).double()
    y = MODEL(x + torch.tensor([0.1, 0.0])).argmax(1)
    x = x + torch.tensor([[2.5 / 255, 0.0]])
    r = attacks.bim(MODEL, x, y, eps=10 / 255)
    assert r.success.all() and r.distance.item() == pytest.approx(2 / 255)  # the gap of 2.5 levels closes by 2 a step


def test_ilcm_never_aims_at_the_label():
    model = linear([[1.0, 0.0], [0.0, 1.0], [0.9, 0.9]])
    x = torch.tensor([[0.2, 0.8], [0.8, 0.2]], dtype=torch.float64)
    r = attacks.ilcm(model, x, torch.tensor([0, 0]), eps=0.9)  # the label is the least likely class of the first image
    assert r.success.all() and model(r.adversarial).argmax(1).tolist() == [1, 1]


def test_pull_back_lands_on_a_straight_boundary():
    attempt = Attempt(MODEL, X[:1], Y[:1], norm=2)
    assert len(attempt.open)
    far = torch.tensor([[0.1, 0.7]], dtype=torch.float64)
    attempt.submit(far, MODEL(far))
    attacks.minimal.pull_back(attempt, 2)
    assert attempt.result().distance.item() == pytest.approx(0.6 / 2**0.5, rel=0.01)

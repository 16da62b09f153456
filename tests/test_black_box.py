"""Random search and transfer: no gradient asked, budgets kept, never better than the closed-form distance."""
from functools import partial
from math import inf

import pytest
import torch
from torch import nn

from advcourse import data, models, threat
from advcourse.attacks import fgsm, pgd, random_search, transfer
from advcourse.losses import margin

NORMS = [(inf, 0.05), (2, 0.2), (1, 0.4), (0, 1)]


class Recorder(nn.Module):
    """A model that counts the images it is shown and refuses to be differentiated."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x):
        assert not torch.is_grad_enabled(), "a black-box attack asked for a gradient"
        self.seen += len(x)
        return self.model(x)


def linear(inputs=20, classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


def images(n=40, shape=(1, 4, 5), seed=1):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3
    return x.clamp(0, 1)  # a third of the values at the edge of the box


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("adversarial", "success", "distance", "queries"))


@pytest.mark.parametrize("norm, eps", NORMS)
def test_random_search_against_the_exact_answer_on_a_linear_model(norm, eps):
    """It succeeds only where ball ∩ box holds a point of the other class, and there mostly does."""
    model, x = linear(), images(200)
    y = predicted(model, x)
    weight = (model[1].weight[1 - y] - model[1].weight[y]).detach().reshape(x.shape)
    strongest = threat.linear_maximiser(weight, x, eps, norm)
    possible = predicted(model, strongest) != y
    assert 10 < possible.sum() < 190
    found = random_search(Recorder(model), x, y, eps=eps, norm=norm, queries=300, generator=torch.Generator().manual_seed(0))
    assert not (found.success & ~possible).any()
    assert (found.success & possible).sum() >= 0.85 * possible.sum()
    assert (threat.distance(found.adversarial, x, norm) <= eps * (1 + 1e-5)).all()
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    assert torch.equal(found.success, predicted(model, found.adversarial) != y)


@pytest.mark.parametrize("norm, eps", NORMS)
def test_an_image_alone_fares_as_in_a_batch(norm, eps):
    model, x = linear(classes=3), images(12)
    y = predicted(model, x)
    y[0] = (y[0] + 1) % 3
    together, alone = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    batch = random_search(model, x, y, eps=eps, norm=norm, queries=30, generator=together)
    for i in range(12):
        one = random_search(model, x[i:i + 1], y[i:i + 1], eps=eps, norm=norm, queries=30, generator=alone)
        assert one.success[0] == batch.success[i] and one.queries[0] == batch.queries[i]
        torch.testing.assert_close(one.adversarial[0], batch.adversarial[i])
    again = random_search(model, x, y, eps=eps, norm=norm, queries=30, generator=torch.Generator().manual_seed(3))
    assert same(again, batch)


def test_queries_are_counted_budgets_kept_and_broken_images_left_alone():
    model, x = Recorder(linear()), images(60)
    y = predicted(model, x)
    y[:7] = 1 - y[:7]
    for budget in (0, 1, 50):
        model.seen = 0
        found = random_search(model, x, y, eps=0.05, queries=budget, generator=torch.Generator().manual_seed(0))
        assert found.queries.max() <= budget + 1
        assert model.seen == found.queries.sum() + len(x)  # the last pass judges the result
        assert (found.queries[:7] == 1).all() and (found.distance[:7] == 0).all()
        assert (found.queries[~found.success] == budget + 1).all()
        if budget == 0:
            assert not found.success[7:].any() and torch.equal(found.adversarial, x)
    assert found.queries[7:][found.success[7:]].float().mean() < 40


def test_the_search_keeps_its_best_guess():
    """On a linear model each kept guess lowers the margin, so a longer search never breaks fewer of the same images."""
    model, x = linear(60, seed=2), images(150, (60,))
    y = predicted(model, x)
    blind = random_search(model, x, y, eps=0.05, queries=1, generator=torch.Generator().manual_seed(0))
    search = random_search(model, x, y, eps=0.05, queries=200, generator=torch.Generator().manual_seed(0))
    assert (search.success | ~blind.success).all()
    assert search.success.sum() >= 3 * blind.success.sum() > 0


def test_targeted_and_confident():
    model, x = linear(classes=4), images(80)
    y = predicted(model, x)
    target = (y + 1) % 4
    found = random_search(model, x, y, eps=0.3, queries=150, target=target, generator=torch.Generator().manual_seed(0))
    assert found.success.any() and torch.equal(found.success, predicted(model, found.adversarial) == target)
    sure = random_search(model, x, y, eps=0.3, queries=150, confidence=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        m = margin(model(sure.adversarial), y)
    assert sure.success.any() and (m[sure.success] <= -0.1).all() and sure.success.sum() < 80


def test_constant_and_nan_models_are_no_success():
    x, y = images(5), torch.zeros(5, dtype=torch.int64)
    for value in (0.0, torch.nan):
        model = linear()
        nn.init.constant_(model[1].weight, value)
        nn.init.constant_(model[1].bias, 0.0)
        assert not random_search(model, x, y, eps=0.3, queries=5).success.any()
    assert random_search(linear(), x[:0], y[:0], eps=0.3).success.shape == (0,)
    one_value = linear(1)
    assert random_search(one_value, torch.full((2, 1), 0.5), predicted(one_value, torch.full((2, 1), 0.5)), eps=0.1,
                         queries=3).queries.max() <= 4


def test_bad_arguments_are_named():
    model, x, y = linear(), images(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="queries=-1"):
        random_search(model, x, y, eps=0.1, queries=-1)
    with pytest.raises(ValueError, match="norm=3"):
        random_search(model, x, y, eps=0.1, norm=3)
    with pytest.raises(ValueError, match="eps"):
        transfer(model, x, y, attack=fgsm, substitutes=model, eps=-0.1)


# ---------------------------------------------------------------- transfer

def test_transfer_to_itself_is_the_attack_and_asks_the_model_only_twice():
    model, x = linear(classes=3), images(50)
    y = predicted(model, x)
    white = fgsm(model, x, y, eps=0.1)
    target = Recorder(model)
    found = transfer(target, x, y, attack=fgsm, substitutes=model, eps=0.1)
    assert torch.equal(found.success, white.success) and torch.equal(found.adversarial, white.adversarial)
    assert (found.queries == 2).all() and target.seen == 3 * len(x)


def test_transfer_is_judged_on_the_model_and_substitutes_take_turns():
    model, x = linear(classes=3), images(60)
    y = predicted(model, x)
    stranger, deaf = linear(classes=3, seed=9), linear(classes=3)
    nn.init.zeros_(deaf[1].weight)  # its gradient is zero: nothing to learn from it
    strange = predicted(stranger, x) == y
    x, y = x[strange], y[strange]
    alone = transfer(model, x, y, attack=fgsm, substitutes=stranger, eps=0.15)
    assert torch.equal(alone.success, predicted(model, alone.adversarial) != y)
    assert fgsm(stranger, x, y, eps=0.15).success.sum() > alone.success.sum()
    both = transfer(model, x, y, attack=fgsm, substitutes=[deaf, stranger, model], eps=0.15)
    assert torch.equal(both.success, fgsm(model, x, y, eps=0.15).success | alone.success)
    assert (both.queries[alone.success] == 3).all() and (both.queries[~alone.success] == 4).all()


def test_transfer_takes_images_too_and_discards_those_outside_the_ball():
    model, x = linear(classes=3), images(30)
    y = predicted(model, x)
    far = images(30, seed=8)
    found = transfer(model, x, y, attack=lambda *_, **__: far, substitutes=model, eps=0.1)
    assert (predicted(model, far) != y).any() and not found.success.any() and torch.equal(found.adversarial, x)
    white = transfer(model, x, y, attack=lambda m, x, y, **kw: fgsm(m, x, y, eps=0.1).adversarial, substitutes=model, eps=0.1)
    assert torch.equal(white.success, fgsm(model, x, y, eps=0.1).success)


def test_transfer_treats_an_image_alone_as_in_a_batch():
    model, substitutes, x = linear(classes=3), [linear(classes=3, seed=s) for s in (4, 5)], images(10)
    y, options = predicted(model, x), {"attack": partial(pgd, steps=3), "substitutes": substitutes, "eps": 0.2}
    together, alone = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    batch = transfer(model, x, y, generator=together, **options)
    for i in range(10):
        one = transfer(model, x[i:i + 1], y[i:i + 1], generator=alone, **options)
        torch.testing.assert_close(one.adversarial[0], batch.adversarial[i])
        assert one.success[0] == batch.success[i] and one.queries[0] == batch.queries[i]


def test_real_networks_attacks_transfer_between_architectures():
    model, substitute = models.load("mnist-cnn-standard"), models.load("mnist-mlp-standard")
    x, y = data.mnist("test", 60)
    found = transfer(model, x, y, attack=pgd, substitutes=substitute, eps=0.2, steps=10, confidence=5.0,
                     generator=torch.Generator().manual_seed(0))
    noise = threat.sample(x, 0.2, inf, torch.arange(60))
    assert found.success.sum() > (predicted(model, noise) != y).sum() + 3
    assert found.distance[found.success].max() <= 0.2 * (1 + 1e-5)

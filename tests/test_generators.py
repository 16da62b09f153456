"""UPSET, ANGRI, ATN: what each generator sees, and what its training changes."""
import pytest
import torch
from torch import nn

from advcourse import data, models, threat
from advcourse.attacks import angri, atn, upset
from advcourse.attacks.generators import reranked

EPS = 0.25


@pytest.fixture(scope="module")
def digits():
    x, y = data.mnist("train", n=200)
    return models.load("mnist-mlp-standard"), x[y != 8], y[y != 8]


def train(attack, digits, **options):
    model, x, y = digits
    target = torch.full_like(y, 8) if attack is atn else torch.where(y == 0, 8, (y + 1) % 8)
    return attack(model, x, y, target=target, generator=torch.Generator().manual_seed(0), **{"eps": EPS, "steps": 150, **options})


@pytest.fixture(scope="module", params=[upset, angri, atn], ids=lambda f: f.__name__)
def trained(request, digits):
    return train(request.param, digits)


def test_in_box_and_ball_and_success_is_what_the_model_says(trained, digits):
    model, x, y = digits
    assert trained.adversarial.min() >= 0 and trained.adversarial.max() <= 1
    d = threat.distance(trained.adversarial, x)
    assert (d <= EPS + 1e-6).all() and torch.equal(d[trained.success], trained.distance[trained.success])
    hit = model(trained.adversarial).argmax(1) == (8 if trained.kind == "atn" else torch.where(y == 0, 8, (y + 1) % 8))
    assert torch.equal(hit, trained.success) and hit.float().mean() > 0.5


def test_training_did_it(trained, digits):
    attack = {"upset": upset, "angri": angri, "atn": atn}[trained.kind]
    assert train(attack, digits, steps=1).success.float().mean() < trained.success.float().mean() - 0.3


def test_what_the_generator_sees(trained, digits):
    """In the middle of the box nothing is clipped: UPSET adds the same to every image, ANGRI and ATN do not.

    The target matters to UPSET and ANGRI; an ATN has one built in.
    """
    x = 0.5 + 0.2 * (digits[1][:2] - 0.5)  # two images, away from the ends of the box
    eight, one = torch.tensor([8, 8]), torch.tensor([1, 1])
    d, e = trained.apply(x, eight) - x, trained.apply(x, one) - x
    assert torch.allclose(d[0], d[1], atol=1e-6) == (trained.kind == "upset")
    assert torch.allclose(d, e, atol=1e-6) == (trained.kind == "atn")


def test_the_model_is_left_as_it_was_and_same_seed_same_generator(digits):
    model, x, y = digits
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (train(upset, digits, steps=3) for _ in range(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(first.adversarial, second.adversarial)


def test_reranked_by_hand():
    p = torch.tensor([[0.6, 0.3, 0.1]])
    expected = torch.tensor([[0.6, 0.3, 0.9]]) / 1.8  # the target at 1.5 times the largest, then the sum back to one
    assert torch.allclose(reranked(p.log(), torch.tensor([2])), expected)


@pytest.mark.parametrize("options, message", [
    ({"target": None}, "target=None"), ({"eps": float("inf")}, "eps=inf"), ({"eps": -0.1}, "eps=-0.1"), ({"steps": 0}, "steps=0"),
    ({"hidden": 0}, "hidden=0"), ({"batch": 0}, "batch=0"), ({"weight": -1.0}, "weight=-1.0"),
    ({"target": torch.tensor([0, 1, 2])}, "target equals the label y for image 0"),
    ({"target": torch.tensor([1, 2, 9])}, "target has labels out of range")])
def test_bad_input_is_named(options, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        upset(model, torch.rand(3, 4), torch.arange(3), **{"eps": 0.1, "target": torch.tensor([1, 2, 0]), **options})


def test_an_atn_has_one_target(digits):
    model, x, y = digits
    with pytest.raises(ValueError, match="target holds 9 classes"):
        atn(model, x[:100], y[:100], eps=0.1, target=(y[:100] + 1) % 10)

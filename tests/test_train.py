"""Training: the same to the bit from the same seed, resumable, and its bounds sound."""
from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advcourse import attacks, data, models, train
from advcourse.__main__ import main

TINY = {"standard": train.Recipe("standard", 2, 2e-3), "pgd": train.Recipe("pgd", 2, 1e-3),
        "ibp": train.Recipe("ibp", 2, 2e-3, ramp=(0.02, 0.4))}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fitted(recipe, checkpoint=None, n=512):
    model = models.mlp(784, 16, 10)
    log = train.fit(model, *data.mnist("train", n), recipe, checkpoint)
    return model, log


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------- reproducible

@pytest.mark.parametrize("method", TINY)
def test_same_seed_same_weights_to_the_bit(method):
    a, log = fitted(TINY[method])
    torch.manual_seed(99)  # the global generator plays no part
    torch.rand(7)
    b, again = fitted(TINY[method])
    other, _ = fitted(replace(TINY[method], seed=1))
    assert same(a, b) and log == again and not same(a, other)
    assert not a.training and not any(p.requires_grad for p in a.parameters())


@pytest.mark.parametrize("method", TINY)
def test_interrupted_run_goes_on_and_loses_nothing(method, tmp_path, monkeypatch):
    recipe, path, calls = replace(TINY[method], epochs=3), tmp_path / "below" / "run.pt", []
    through, log = fitted(recipe)
    loss = train.METHODS[method]

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:  # in the second of three epochs of four batches
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setitem(train.METHODS, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(recipe, path)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]  # nothing half-written
    resumed, resumed_log = fitted(recipe, path)
    assert same(through, resumed) and log == resumed_log
    assert len(calls) == 7 + 8  # the first epoch was not done again


def test_checkpoint_of_another_recipe_is_not_used(tmp_path):
    path = tmp_path / "run.pt"
    fitted(TINY["standard"], path)
    b, log = fitted(replace(TINY["standard"], lr=1e-3), path)
    assert same(b, fitted(replace(TINY["standard"], lr=1e-3))[0]) and len(log) == 2


def test_command_makes_the_same_files_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADVCOURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(train.RECIPES, "mnist-mlp50-standard", train.Recipe("standard", 1, 2e-3))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert main(["train", "mnist-mlp50-standard", "--out", str(folder)]) == 0
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 3
    assert "clean accuracy" in capsys.readouterr().out and not list((tmp_path / "cache").rglob("*.pt"))


def test_command_remakes_the_shipped_network(tmp_path):
    """Bit for bit on the kind of processor and the torch of its card; elsewhere an equally good one."""
    name = "mnist-mlp50-standard"
    made, card = train.make(name, tmp_path), models.card(name)
    if (made["torch"], made["processor"]) == (card["torch"], card["processor"]):
        assert made == card
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (models.WEIGHTS / f"{name}.safetensors").read_bytes()
    else:
        assert made["clean accuracy"] == pytest.approx(card["clean accuracy"], abs=0.01)


@pytest.mark.parametrize("change, message", [({"method": "sgd"}, "method='sgd'"), ({"epochs": 0}, "epochs=0"),
                                             ({"eps": -0.1}, "eps")])
def test_bad_recipes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fitted(replace(TINY["standard"], **change))


def test_unknown_name_and_command_line_errors(capsys):
    with pytest.raises(ValueError, match="mnist-vit.*mnist-cnn-ibp"):
        train.make("mnist-vit")
    assert main(["train", "mnist-vit"]) == 2 and "mnist-vit" in capsys.readouterr().err
    assert main(["fetch-data", "imagenet"]) == 2 and "imagenet" in capsys.readouterr().err
    assert main(["models"]) == 0 and capsys.readouterr().out.splitlines() == models.table()


# ---------------------------------------------------------------- parts

def test_worst_logits_by_hand():
    """x in [0.4, 0.6]^2, h = relu(x1 - x2) in [0, 0.2], f = (h, 1 - 2h): f_1 - f_0 = 1 - 3h <= 1, f_0 - f_1 <= -0.4."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    model.load_state_dict({"0.weight": torch.tensor([[1.0, -1.0]]), "0.bias": torch.zeros(1),
                           "2.weight": torch.tensor([[1.0], [-2.0]]), "2.bias": torch.tensor([0.0, 1.0])})
    x = torch.full((2, 2), 0.5)
    torch.testing.assert_close(train.worst_logits(model, x, torch.tensor([0, 1]), 0.1), torch.tensor([[0.0, 1.0], [-0.4, 0.0]]))


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3])
def test_worst_logits_are_exact_for_a_linear_model(eps):
    torch.manual_seed(0)
    model, x, y = models.mlp(784, 10), data.mnist("test", 20)[0], data.mnist("test", 20)[1]
    with torch.no_grad():
        bound = train.worst_logits(model, x, y, eps)
        difference = model(x) - model(x).gather(1, y[:, None])
        rows = model[1].weight[None] - model[1].weight[y][:, None]
        low, high = (x.flatten(1) - eps).clamp(0, 1), (x.flatten(1) + eps).clamp(0, 1)
        gain = torch.maximum(rows * (low - x.flatten(1))[:, None], rows * (high - x.flatten(1))[:, None]).sum(-1)
    torch.testing.assert_close(bound, difference + gain, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 0.1, 0.5]), st.booleans())
def test_worst_logits_hold_for_every_point_tried(seed, eps, convolution):
    torch.manual_seed(seed)
    model = models.cnn((3,), 8, 4, (1, 6, 6)) if convolution else models.mlp(36, 12, 8, 4)
    x, y = torch.rand(5, 1, 6, 6), torch.randint(4, (5,))
    with torch.no_grad():
        bound = train.worst_logits(model, x, y, eps)
    tried = [x + eps * (2 * torch.rand(5, 1, 6, 6) - 1) for _ in range(50)]
    tried += [x + eps * torch.randn(5, 1, 6, 6).sign() for _ in range(50)]
    for k in range(4):
        def toward_k(logits, y, k=k):
            return logits[:, k] - logits.gather(1, y[:, None])[:, 0]

        tried.append(train.ascend(model, x, y, eps, 10, eps / 4, lambda s, y, f=toward_k: f(s, y).sum(), generator(seed)))
    with torch.no_grad():
        for a in tried:
            s = model(a.clamp(0, 1))
            assert bool((s - s.gather(1, y[:, None]) <= bound + 1e-5).all())


def test_worst_logits_refuse_what_they_have_no_rule_for():
    x, y = torch.zeros(1, 1, 4, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="Sigmoid"):
        train.worst_logits(nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Linear(16, 2)), x, y, 0.1)
    with pytest.raises(ValueError, match="ReLU"):
        train.worst_logits(nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.ReLU()), x, y, 0.1)


def test_ascend_stays_in_the_ball_and_the_box_and_goes_up():
    model = models.load("mnist-mlp-standard")
    x, y = data.mnist("test", 50)
    cross_entropy = nn.functional.cross_entropy
    a = train.ascend(model, x, y, 0.05, 7, 2.5 * 0.05 / 7, cross_entropy, generator())
    assert (a - x).abs().max() <= 0.05 + 1e-6 and a.min() >= 0 and a.max() <= 1
    random = train.ascend(model, x, y, 0.05, 0, 0, cross_entropy, generator())
    assert cross_entropy(model(a), y) > cross_entropy(model(random), y) + 1
    assert torch.equal(train.ascend(model, x, y, 0.0, 3, 0.0, cross_entropy, generator()), x)


def test_shifted_moves_every_image_by_one_of_nine():
    x = torch.zeros(300, 1, 5, 5)
    x[:, 0, 2, 2] = torch.arange(1, 301)
    moved = train.shifted(x, generator())
    place = {tuple(p) for p in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert place == set(product((1, 2, 3), repeat=2))  # all nine moves occur, no other
    assert torch.equal(moved.flatten(1).sum(1), x.flatten(1).sum(1))  # each image keeps its own pixel
    edge = torch.ones(100, 1, 3, 3)
    assert set(train.shifted(edge, generator()).flatten(1).sum(1).tolist()) == {4.0, 6.0, 9.0}  # black flows in


def test_interval_initialisation_keeps_the_width():
    model = models.mlp(784, 400, 400, 10)
    train.initialise(model, "ibp", generator())
    assert model[1].weight.std().item() == pytest.approx(sqrt(2 * torch.pi) / 784, rel=0.02) and not model[1].bias.any()
    train.initialise(model, "standard", generator())
    assert model[1].weight.abs().max() <= 784**-0.5 and model[1].weight.std().item() == pytest.approx((3 * 784)**-0.5, rel=0.02)


def test_each_method_descends_what_it_promises():
    """Four epochs on 2,000 digits: PGD training resists PGD better, interval training proves more."""
    x, y = data.mnist("test", 200)
    model = {}
    for method in ("standard", "pgd", "ibp"):
        model[method], _ = fitted(replace(TINY[method], epochs=4, eps=0.05), n=2_000)
    left = {m: int((~attacks.pgd(f, x, y, eps=0.05, steps=10, generator=generator()).success).sum()) for m, f in model.items()}
    with torch.no_grad():
        proved = {m: int((train.worst_logits(f, x, y, 0.05).scatter(1, y[:, None], -1).amax(1) < 0).sum())
                  for m, f in model.items()}
    assert left["pgd"] > left["standard"] + 20 and proved["ibp"] > proved["pgd"] + 20
    assert all(proved[m] <= left[m] for m in model)

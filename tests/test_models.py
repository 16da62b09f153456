"""Architectures, shipped weights and their cards."""
import json

import pytest
import torch
from torch import nn

from advcourse import data, models, train

NAMES = ["fashion-cnn-ibp", "fashion-cnn-pgd", "fashion-cnn-standard", "mnist-cnn-ibp", "mnist-cnn-pgd", "mnist-cnn-standard",
         "mnist-mlp-ibp", "mnist-mlp-pgd", "mnist-mlp-standard", "mnist-mlp50-pgd", "mnist-mlp50-standard"]


def test_mlp_is_a_plain_sequential():
    model = models.mlp(784, 50, 50, 10)
    assert [type(m) for m in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)] == [(784, 50), (50, 50), (50, 10)]
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_cnn_has_about_fifty_thousand_parameters():
    model = models.cnn()
    assert sum(p.numel() for p in model.parameters()) == 53_090
    assert sum(m[0].numel() for m in _relu_inputs(model)) == 2_416
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert models.cnn((4, 4, 4), 20, 2, (3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def _relu_inputs(model):
    h, found = torch.zeros(1, 1, 28, 28), []
    for layer in model:
        if isinstance(layer, nn.ReLU):
            found.append(h)
        h = layer(h)
    return found


@pytest.mark.parametrize("make, message", [(lambda: models.mlp(10), "widths"), (lambda: models.mlp(784, 0, 10), "widths"),
                                           (lambda: models.cnn(shape=(1, 30, 30)), "shape"),
                                           (lambda: models.build("mnist-resnet-standard"), "mnist-resnet-standard")])
def test_bad_architectures_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_name_lists_the_known():
    for ask in (models.load, models.card):
        with pytest.raises(ValueError, match="'mnist-vit'.*mnist-cnn-ibp.*mnist-mlp-standard"):
            ask("mnist-vit")


def test_the_promised_networks_are_shipped():
    assert set(NAMES) <= set(models.names())


@pytest.mark.parametrize("name", NAMES)
def test_card_tells_how_it_was_made(name):
    card = models.card(name)
    assert card["name"] == name and card["command"] == f"python -m advcourse train {name}"
    assert {k: card[k] for k in ("method", "epochs", "lr", "eps", "seed")} == \
        {k: getattr(train.RECIPES[name], k) for k in ("method", "epochs", "lr", "eps", "seed")}  # not an older recipe's
    log = (models.WEIGHTS / f"{name}.log.jsonl").read_text().splitlines()
    assert [json.loads(e)["epoch"] for e in log] == list(range(1, card["epochs"] + 1))
    assert card["parameters"] == sum(p.numel() for p in models.build(name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_clean_accuracy_is_the_cards(name):
    model = models.load(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert train.accuracy(model, *train.dataset(name, "test")) == models.card(name)["clean accuracy"]


@pytest.mark.parametrize("name", [n for n in NAMES if "mlp" in n] + ["mnist-cnn-standard", "mnist-cnn-ibp"])
def test_robust_accuracies_are_the_cards(name):
    x, y = train.dataset(name, "test")
    found, card = train.judge(models.load(name), x, y), models.card(name)
    for bound in ("PGD accuracy", "interval accuracy"):  # two images of 500: the sign of a gradient near zero may round otherwise
        assert {e: pytest.approx(a, abs=0.0041) for e, a in card[bound].items()} == found[bound]


@pytest.mark.parametrize("name", NAMES)
def test_bracket_of_the_card_is_in_order(name):
    card = models.card(name)
    x, y = train.dataset(name, "test")
    above = train.accuracy(models.load(name), x[:train.CARD_IMAGES], y[:train.CARD_IMAGES])
    for eps in map(str, train.CARD_EPS):
        assert card["interval accuracy"][eps] <= card["PGD accuracy"][eps] <= above
        above = card["PGD accuracy"][eps]


@pytest.mark.parametrize("net", ["mnist-mlp", "mnist-mlp50", "mnist-cnn", "fashion-cnn"])
def test_robust_training_pays_where_it_should(net):
    standard, robust = models.card(f"{net}-standard"), models.card(f"{net}-pgd")
    assert robust["PGD accuracy"]["0.1"] > standard["PGD accuracy"]["0.1"] + 0.3
    if f"{net}-ibp" in NAMES:
        proved = models.card(f"{net}-ibp")["interval accuracy"]["0.1"]
        assert proved > 0.3 and proved > robust["interval accuracy"]["0.1"] + 0.3


@pytest.mark.parametrize("name", NAMES)
def test_weights_hold_no_denormal_numbers(name):
    """Weights of 1e-41, which weight decay leaves at dead pixels, slow a processor down and trouble MIP solvers."""
    for p in models.load(name).parameters():
        assert p.isfinite().all() and not ((p != 0) & (p.abs() < 1e-30)).any()


def test_table_has_a_row_for_every_network():
    lines = models.table()
    assert len(lines) == 2 + len(models.names()) and len({line.count("|") for line in lines}) == 1
    assert all(f"`{name}`" in line for name, line in zip(models.names(), lines[2:], strict=True))


def test_loading_twice_gives_independent_models():
    a, b = models.load("mnist-mlp50-standard"), models.load("mnist-mlp50-standard")
    x, _ = data.mnist("test", 5)
    before = b(x)
    with torch.no_grad():
        a[1].weight.zero_()
    assert torch.equal(b(x), before)

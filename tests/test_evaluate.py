"""Intervals, curves and transfer, against values known by hand."""
from math import comb, inf, isnan

import pytest
import torch
from torch import nn

from advcourse import attacks, data, evaluate, models
from advcourse.certify import branch
from advcourse.certify.certificate import Certificate
from advcourse.evaluate import robust_accuracy, transfer_matrix, wilson


def test_wilson_by_hand():
    """k = 1 of n = 2 with z = 1.96: centre (1/2 + z²/4) / (1 + z²/2) = 1/2, half width z √(1/8 + z²/16) / (1 + z²/2)."""
    z = 1.959963984540054
    half = z * (1 / 8 + z * z / 16) ** 0.5 / (1 + z * z / 2)
    assert wilson(1, 2) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(0, 0) == (0, 1)
    assert wilson(0, 10)[1] == pytest.approx(z * z / (10 + z * z))


def test_wilson_covers_about_as_often_as_it_says():
    """For p = 0.3 and n = 50 the exact coverage, summed over the binomial distribution, is close to 95 %."""
    k = torch.arange(51)
    p = torch.tensor([comb(50, int(i)) * 0.3**int(i) * 0.7**(50 - int(i)) for i in k])
    covered = torch.tensor([wilson(int(i), 50)[0] <= 0.3 <= wilson(int(i), 50)[1] for i in k])
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert 0.93 < p[covered].sum() < 0.97


@pytest.mark.parametrize("k, n, c", [(-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_refuses(k, n, c):
    with pytest.raises(ValueError, match="k=|confidence="):
        wilson(k, n, c)


def line(threshold, sign=1.0):
    """Class 1 where sign * (x - threshold) > 0, on images of one pixel."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model.load_state_dict({"1.weight": torch.tensor([[0.0], [sign]]), "1.bias": torch.tensor([0.0, -sign * threshold])})
    return model


def test_robust_accuracy_on_a_line_is_the_distribution_of_distances():
    x = torch.tensor([0.1, 0.3, 0.45, 0.6, 0.9]).reshape(5, 1)
    y = torch.tensor([0, 0, 0, 1, 0])  # distances to 0.5: 0.4, 0.2, 0.05, 0.1, misclassified
    curve = robust_accuracy(line(0.5), x, y, attacks.fgsm, [0, 0.06, 0.15, 0.25, 0.45])
    assert curve.accuracy == [0.8, 0.6, 0.4, 0.2, 0.0] and curve.eps == [0, 0.06, 0.15, 0.25, 0.45]
    assert list(zip(curve.low, curve.high, strict=True)) == [wilson(k, 5) for k in (4, 3, 2, 1, 0)]


def test_curve_never_rises_even_if_the_attack_gets_worse():
    """An attack that overshoots: it finds examples at a small radius only, and those are inside every larger ball."""
    def erratic(model, x, y, *, eps, **kw):
        return attacks.fgsm(model, x, y, eps=eps if eps < 0.06 else 0.0, **kw)

    x, y = data.mnist("test", 100)
    model = models.load("mnist-mlp-standard")
    curve = robust_accuracy(model, x, y, erratic, [0.02, 0.05, 0.1])
    assert curve.accuracy[0] > curve.accuracy[1] == curve.accuracy[2]
    assert curve.accuracy[1] == 1 - int(attacks.fgsm(model, x, y, eps=0.05).success.sum()) / 100


def test_robust_accuracy_refuses():
    x, y = data.mnist("test", 3)
    with pytest.raises(ValueError, match=r"eps_values=\[0.1, 0.1\]"):
        robust_accuracy(line(0.5), x, y, attacks.fgsm, [0.1, 0.1])
    with pytest.raises(ValueError, match="x is empty"):
        robust_accuracy(line(0.5), x[:0], y[:0], attacks.fgsm, [0.1])


def test_transfer_on_lines_by_hand():
    """Made on a threshold of 0.5, 0.4 moves to 0.55: it fools thresholds 0.5 and 0.45, not 0.7, which is farther."""
    x, y = torch.tensor([[0.4], [0.2]]), torch.tensor([0, 0])
    nets = {"near": line(0.45), "middle": line(0.5), "far": line(0.7), "blind": line(0.1)}
    found = transfer_matrix(nets, x, y, attacks.fgsm, norm=inf, eps=0.15)
    assert found.names == list(nets)
    assert found.fooled.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]  # 0.55 leaves `far` correct
    assert found.both.tolist() == [[2, 2, 2, 0], [2, 2, 2, 0], [2, 2, 2, 0], [0, 0, 0, 0]]
    assert found.rate[0, 0] == 0.5 and isnan(found.rate[3, 3])


def test_transfer_between_real_models():
    x, y = data.mnist("test", 60)
    nets = {name: models.load(f"mnist-{name}-standard") for name in ("mlp", "mlp50", "cnn")}
    before = {k: v.clone() for k, v in nets["mlp"].state_dict().items()}
    nets["mlp"].train()
    found = transfer_matrix(nets, x, y, attacks.fgsm, eps=0.1)
    assert nets["mlp"].training and all(torch.equal(v, before[k]) for k, v in nets["mlp"].state_dict().items())
    assert torch.equal(found.both, found.both.T) and bool((found.fooled <= found.both).all())
    white = found.rate.diag()
    assert bool((white[:, None] >= found.rate - 1e-6).all()) and white.min() > 0.5
    for i, name in enumerate(nets):
        assert found.fooled[i, i] == int((evaluate._predict(nets[name], x) == y).sum()
                                         - (~attacks.fgsm(nets[name], x, y, eps=0.1).success).sum())


def test_bracket_holds_the_exact_distance_of_a_linear_model():
    """For two classes in l-infinity with the box far away, d* = margin / ||w_0 - w_1||_1."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    model[1].weight.data = torch.randn(2, 16, generator=generator)
    x = 0.5 + 0.02 * torch.randn(12, 1, 4, 4, generator=generator)
    y = model(x).argmax(1)
    y[0] = 1 - y[0]  # misread: its distance is 0
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    exact = (w @ x.flatten(1).T + model[1].bias[0] - model[1].bias[1]).abs().detach() / w.abs().sum()
    b = evaluate.bracket(model, x, y)
    assert b.upper[0] == 0 and b.lower[0] == 0
    assert (b.lower[1:] <= exact[1:] * (1 + 1e-6)).all() and (exact[1:] <= b.upper[1:] * (1 + 1e-5)).all()
    assert (b.upper[1:] <= 1.02 * exact[1:]).all() and (b.lower[1:] >= 0.95 * exact[1:]).all()


def test_bracket_narrows_with_an_exact_search_and_refuses_a_contradiction():
    model, (x, y) = models.load("mnist-mlp-ibp"), data.mnist("test", 6)
    wide = evaluate.bracket(model, x, y)
    narrow = evaluate.bracket(model, x, y, exact=branch.minimal_distortion)
    assert (narrow.lower >= wide.lower).all() and (narrow.upper <= wide.upper).all()
    assert ((narrow.upper - narrow.lower) <= 2e-3 * narrow.upper + 1e-9).all()

    def liar(model, x, y, norm):
        return Certificate("unknown", 0.9, 1.0)

    with pytest.raises(RuntimeError, match="below the proved 0.9"):
        evaluate.bracket(model, x[:1], y[:1], exact=liar)


def test_bracket_draws():
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    evaluate.Bracket(torch.tensor([0.1, 0.2]), torch.tensor([float("inf"), 0.3])).draw(ax)
    assert ax.get_ylim() == (0, pytest.approx(0.33))
    plt.close(fig)

"""Losses by hand, and what attacks count on: larger is nearer to a mistake, shifts change nothing."""
import math

import pytest
import torch

from advcourse import losses

Z = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 5.0, 1.0]])
Y = torch.tensor([0, 1])


def test_margin_by_hand():
    assert losses.margin(Z, Y).tolist() == [2.0, -3.0]
    assert losses.margin_loss(Z, Y).tolist() == [-2.0, 3.0]


def test_cross_entropy_by_hand():
    z = torch.tensor([[0.0, math.log(3.0)]])
    assert losses.cross_entropy(z, torch.tensor([0])).item() == pytest.approx(math.log(4.0))


def test_dlr_by_hand():
    assert losses.dlr(Z, Y).tolist() == pytest.approx([-2 / 3, 3 / 4])


def test_dlr_of_two_classes_is_the_margin_and_has_a_gradient():
    z = torch.tensor([[2.0, -1.0]], requires_grad=True)
    value = losses.dlr(z, torch.tensor([0]))
    assert value.item() == -3.0
    assert torch.autograd.grad(value.sum(), z)[0].tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("name", losses.BY_NAME)
def test_every_loss_ignores_shifts_and_points_at_mistakes(name):
    loss = losses.get(name)
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(50) % 4
    assert torch.allclose(loss(z, y), loss(z + 100, y), atol=1e-9)
    lower = z.clone()
    lower[torch.arange(50), y] -= 0.1
    assert (loss(lower, y) >= loss(z, y)).all() and loss(z, y).shape == (50,)


def test_dlr_ignores_scale_too():
    assert torch.allclose(losses.dlr(Z, Y), losses.dlr(7 * Z, Y))


def test_margin_is_never_positive_where_a_logit_is_not_a_number():
    z = torch.tensor([[math.nan, 1.0, 2.0], [1.0, math.nan, 0.0]])
    m = losses.margin(z, torch.tensor([0, 0]))
    assert m.isnan().all()


def test_get():
    assert losses.get("margin") is losses.margin_loss and losses.get(torch.sum) is torch.sum
    with pytest.raises(ValueError, match="loss='mse' is unknown: choose cross_entropy, margin, dlr"):
        losses.get("mse")

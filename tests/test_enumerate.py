"""Brute force is the oracle of other tests: here it faces closed forms, sampling and geometry."""
from math import inf, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from networks import mlp
from test_encode import HAND, tiny

import advcourse.certify.enumerate as brute
from advcourse.certify.network import network

FEW = settings(max_examples=6, deadline=None, derandomize=True)


@FEW
@given(case=tiny())
def test_regions_cover_the_box_and_the_network_is_affine_on_each(case):
    net, _, _ = case
    a = np.random.default_rng(0).random((400, net.units))
    covered = np.zeros(len(a), dtype=int)
    for r in brute.regions(net):
        inside = (a @ r.G.T <= r.g + 1e-9).all(1)
        covered += inside
        assert np.allclose(a[inside] @ r.V.T + r.v, net(torch.as_tensor(a[inside])).numpy(), atol=1e-9)
    assert (covered >= 1).all()


def test_one_neuron_cuts_the_square_in_two():
    net = network(mlp(([[1., 1.]], [-1.]), ([[1.], [-1.]], [0., 1.])), (2,))
    found = brute.regions(net)
    assert [r.pattern for r in found] == [(0,), (1,)]
    assert [r.radius for r in found] == pytest.approx([1 - 1 / sqrt(2)] * 2)    # inscribed in half a square


def test_nearest_point_of_a_triangle():
    """{a1 + a2 >= 1} and the square, from the origin: (1/2, 1/2) but for l1 and norm 0, where one axis is enough."""
    G, g = np.array([[-1., -1.], [1., 0.], [0., 1.], [-1., 0.], [0., -1.]]), np.array([-1., 1., 1., 0., 0.])
    x = np.zeros(2)
    for norm, d in ((inf, .5), (1, 1), (2, sqrt(.5)), (0, 1)):
        assert brute.nearest(G, g, x, norm)[0] == pytest.approx(d, abs=1e-12)
    assert brute.nearest(np.vstack([G, [1., 1.]]), np.append(g, .9), x) == (inf, None)
    assert brute.nearest(G, g, np.array([.75, .75]), 2)[0] == pytest.approx(0, abs=1e-12)


def test_hand_worked_answers():
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    for norm in (inf, 1, 2):
        d, a = brute.minimal_distortion(net, x, 0, norm=norm)
        assert d == pytest.approx(5 / 6 - 1 / 4) and a == pytest.approx([5 / 6])
        assert brute.worst_margin(net, x, 0, eps=0.5, norm=norm)[0] == pytest.approx(0.25, abs=1e-7)
    assert brute.minimal_distortion(net, x, 0, norm=0)[0] == 1
    assert brute.verify(net, x, 0, eps=0.58) == (True, None)
    robust, a = brute.verify(net, x, 0, eps=0.59)
    s = net(torch.as_tensor(a)[None])[0]
    assert not robust and s[1] >= s[0] - 1e-12 and abs(a[0] - 0.25) <= 0.59


@pytest.mark.parametrize("norm", [inf, 1, 2, 0])
@FEW
@given(case=tiny())
def test_no_sample_beats_the_enumeration(norm, case):
    net, x, y = case
    eps = 1 if norm == 0 else 0.2
    a = np.random.default_rng(1).random((2000, net.units))
    flat = x.numpy().ravel()
    step = (2 * a - 1) * eps
    if norm == 0:
        step = (a - flat) * (np.arange(net.units) == np.arange(len(a))[:, None] % net.units)
    elif norm in (1, 2):
        step *= np.minimum(1, eps / np.maximum(np.linalg.norm(step, norm, axis=1, keepdims=True), 1e-12))
    s = net(torch.as_tensor(np.clip(flat + step, 0, 1))).numpy()
    least = (s[:, [y]] - np.delete(s, y, 1)).min()
    assert brute.worst_margin(net, x, y, eps=eps, norm=norm)[0] <= least + 1e-7


def test_labels_are_checked():
    net, x = network(HAND, (1,)), torch.tensor([[0.25]])
    with pytest.raises(ValueError, match="target=0"):
        brute.minimal_distortion(net, x, 0, target=0)
    with pytest.raises(ValueError, match="eps=-1"):
        brute.verify(net, x, 0, eps=-1)

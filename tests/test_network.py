"""The chain that certificates work on: the same function as the model, or a refusal by name."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advcourse import models
from advcourse.certify import network
from advcourse.certify.network import Affine, MaxPool, Network, Relu

SHAPE = (1, 28, 28)


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def everything() -> nn.Sequential:
    """Every layer that is understood, batch normalisation with statistics of its own, left in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Normalize([0.1], [0.3]), nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1), nn.Dropout2d(0.5), nn.Sequential(nn.AvgPool2d(2, padding=1), nn.Identity()),
        nn.Conv2d(4, 6, 3, groups=2, padding="same", dilation=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(6 * 16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 3))
    for _ in range(3):
        model(torch.rand(20, *SHAPE))
    return model


def twin(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    import copy
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x.double())


def test_every_layer_is_translated_and_the_model_is_left_alone():
    model = everything()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = network(model, SHAPE)
    x = torch.rand(5, *SHAPE, dtype=torch.float64) * 3 - 1
    assert torch.allclose(net(x), twin(model, x), atol=1e-11)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    kinds = [type(layer) for layer in net.layers]
    assert kinds == [Affine, MaxPool, Relu, Affine, Relu, Affine, Relu, Affine]     # affine maps merged, max before ReLU
    assert net.classes == 3 and net.units == 784 and len(net.activations) == 4


def test_transpose_and_absolute_value_agree_with_the_dense_matrix():
    net = network(everything(), SHAPE)
    for layer in net.layers:
        if not isinstance(layer, Affine):
            continue
        W, b = layer.dense()
        assert layer.dense()[0] is W                                                # kept
        h = torch.randn(4, layer.in_units, dtype=torch.float64)
        A = torch.randn(2, 3, layer.out_units, dtype=torch.float64)
        assert W.shape == (layer.out_units, layer.in_units)
        assert torch.allclose(layer.apply(h), h @ W.T + b, atol=1e-11)
        assert torch.allclose(layer.back(A), A @ W, atol=1e-11)
        assert (layer.abs_apply(h.abs()) >= h.abs() @ W.abs().T - 1e-11).all()
        if len(layer.maps) == 1:
            assert torch.allclose(layer.abs_apply(h.abs()), h.abs() @ W.abs().T, atol=1e-11)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.integers(5, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2),
       dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]))
def test_convolution_back_is_its_transpose(size, kernel, stride, padding, dilation, groups):
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups)
    side = conv(torch.zeros(1, 2, size, size + 1)).flatten(1).shape[1]
    net = network(nn.Sequential(conv, nn.Flatten(), nn.ReLU(), nn.Linear(side, 2)), (2, size, size + 1))
    first = net.layers[0]
    unit = torch.eye(first.in_units, dtype=torch.float64)
    W = (first.apply(unit) - first.bias).T                                          # column by column, forward only
    assert torch.allclose(first.dense()[0], W, atol=1e-12)


@pytest.mark.parametrize("name", ["mnist-mlp50-standard", "mnist-cnn-standard"])
def test_shipped_networks_agree_with_their_forward_pass(name):
    model = models.load(name)
    x = torch.rand(20, *SHAPE)
    net = network(model, SHAPE)
    assert torch.allclose(net(x).float(), model(x), atol=1e-4)
    assert torch.equal(net(x).argmax(1), model(x).argmax(1))
    inputs = net.preactivations(x)
    assert len(inputs) == len(net.activations) + 1 and torch.equal(inputs[-1], net(x))


def test_dense_layers_are_the_chain():
    torch.manual_seed(0)
    net = network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3), nn.ReLU(), nn.ReLU(), nn.Linear(3, 2)), (1, 2, 2))
    pairs = net.dense_layers()
    assert [tuple(W.shape) for W, _ in pairs] == [(3, 4), (2, 3)]
    x = torch.rand(6, 4, dtype=torch.float64)
    assert torch.allclose((x @ pairs[0][0].T + pairs[0][1]).clamp_min(0) @ pairs[1][0].T + pairs[1][1], net(x))
    pooled = network(nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), (1, 4, 4))
    with pytest.raises(ValueError, match="MaxPool"):
        pooled.dense_layers()


def test_starts_and_ends_with_an_affine_map_whatever_the_model_does():
    for model in (nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 3)), nn.Sequential(),
                  nn.Linear(2, 2)):
        net = network(model, (2,))
        assert isinstance(net.layers[0], Affine) and isinstance(net.layers[-1], Affine)
        x = torch.randn(5, 2, dtype=torch.float64)
        assert torch.allclose(net(x), twin(model, x))


def test_pooling_at_the_edge_repeats_a_unit_instead_of_inventing_a_zero():
    net = network(nn.Sequential(nn.MaxPool2d(3, 2, padding=1), nn.Flatten()), (1, 4, 4))
    x = -torch.rand(3, 1, 4, 4, dtype=torch.float64) - 1                            # a padded zero would win
    assert torch.equal(net(x), nn.MaxPool2d(3, 2, padding=1)(x).flatten(1))


class Squared(nn.Sequential):
    def forward(self, x):
        return super().forward(x) ** 2


@pytest.mark.parametrize("model, shape, words", [
    (nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), (2,), r"1 \(Sigmoid\)"),
    (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Softmax(1))), (2,), r"1\.0 \(Softmax\)"),
    (nn.Sequential(nn.Linear(3, 2)), (2,), "expects"),
    (nn.Sequential(nn.Conv2d(3, 2, 1)), (1, 4, 4), "expects"),
    (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()), (1, 4, 4), "Conv2d"),
    (nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Flatten()), (1, 4, 4), "count_include_pad"),
    (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()), (1, 5, 5), "MaxPool2d"),
    (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), (2,), "BatchNorm1d"),
    (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 4, 4), "logits"),
    (Squared(nn.Linear(2, 2)), (2,), "differ"),
])
def test_refused_by_name(model, shape, words):
    with pytest.raises(ValueError, match=words):
        network(model, shape)


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data[0, 1] = float("nan")
    with pytest.raises(ValueError, match="0.weight"):
        network(model, (2,))


def test_a_network_passes_through():
    net = network(nn.Sequential(nn.Linear(2, 2)), (2,))
    assert isinstance(net, Network) and network(net, (2,)) is net
    with pytest.raises(ValueError, match="input_shape"):
        network(net, (3,))


def test_the_package_gives_functions_not_modules():
    import subprocess
    import sys
    code = ("import sys, advcourse.certify as c; assert callable(c.bounds) and callable(c.network)\n"
            "import advcourse.certify.bounds, advcourse.certify.network; assert callable(c.bounds) and callable(c.network)\n"
            "assert not {'cvxpy', 'z3', 'highspy', 'pyscipopt'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)

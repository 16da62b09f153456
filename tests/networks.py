"""Small networks for the tests of exact search."""
import torch
from torch import nn


def mlp(*layers):
    """[(W, b), …] as a float64 nn.Sequential with a ReLU between two layers."""
    modules = []
    for W, b in layers:
        W = torch.as_tensor(W, dtype=torch.float64)
        linear = nn.Linear(W.shape[1], W.shape[0]).double()
        linear.weight.data, linear.bias.data = W, torch.as_tensor(b, dtype=torch.float64)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])

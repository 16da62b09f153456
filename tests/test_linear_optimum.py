"""Linear models with the box binding: what an attack finds against the exact minimal distortion.

More than half of the values sit at 0 or 1, as in digits, where many published attacks stall. The optimum comes from a small
convex program (CVXPY) for l-infinity, l2 and l1, and from sorting for l0.
"""
from math import inf

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

from advcourse import attacks

P = 30


def problem(classes, n=12, seed=0):
    """A linear classifier and correctly classified images that the box allows to be broken."""
    r = np.random.default_rng(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(P, classes)).double()
    model[1].weight.data = torch.tensor(r.normal(size=(classes, P)))
    model[1].bias.data = torch.tensor(r.normal(size=classes))
    x = torch.tensor(np.clip(r.uniform(-0.8, 1.8, (n, 1, 5, 6)), 0, 1))
    assert ((x == 0) | (x == 1)).float().mean() > 0.5
    return model, x, model(x).argmax(1)


def to_beat(model, x, y):
    """For every rival class k: (w, b) such that k wins against y where w z + b >= 0."""
    weight, bias = model[1].weight.detach().numpy(), model[1].bias.detach().numpy()
    return [(weight[k] - weight[y], bias[k] - bias[y]) for k in range(len(bias)) if k != y]


def exact(model, x, y, norm):
    """min ||z - x|| over z in the box with some class at least level with y: a convex program a class; for l0 by sorting."""
    x = x.flatten().numpy()
    best = inf
    for w, b in to_beat(model, x, y):
        if norm == 0:
            gains = np.sort(np.maximum(w * (1 - x), -w * x))[::-1].cumsum()
            enough = np.flatnonzero(gains + w @ x + b > 0)
            value = enough[0] + 1 if len(enough) else inf
        else:
            z = cp.Variable(P)
            value = cp.Problem(cp.Minimize(cp.norm(z - x, {inf: "inf"}.get(norm, norm))),
                               [z >= 0, z <= 1, w @ z + b >= 0]).solve(solver=cp.CLARABEL)
        best = min(best, value)
    return best


OPTIMA: dict = {}


def optimum(classes, norm):
    """The problem and its exact distances, worked out once."""
    model, x, y = problem(classes)
    if (classes, norm) not in OPTIMA:
        OPTIMA[classes, norm] = torch.tensor([exact(model, x[i], int(y[i]), norm) for i in range(len(x))])
    d = OPTIMA[classes, norm]
    assert (d < inf).all() and (d > 0).all()
    return model, x, y, d


MINIMAL = [(attacks.deepfool, {}, 2), (attacks.deepfool, {"norm": inf}, inf), (attacks.deepfool, {"norm": 1}, 1),
           (attacks.deepfool, {"refine": 0}, 2), (attacks.lbfgs, {}, 2),
           (attacks.ddn, {}, 2), (attacks.ddn, {"refine": 0, "steps": 100}, 2), (attacks.fmn, {}, 2),
           (attacks.fmn, {"norm": inf}, inf), (attacks.fmn, {"norm": 1}, 1), (attacks.fmn, {"norm": 0}, 0),
           (attacks.carlini_wagner, {}, 2), (attacks.carlini_wagner, {"norm": inf}, inf),
           (attacks.carlini_wagner, {"norm": 0}, 0), (attacks.jsma, {}, 0)]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("attack, options, norm", MINIMAL)
def test_minimal_attacks_come_within_five_percent(attack, options, norm, classes):
    model, x, y, d = optimum(classes, norm)
    r = attack(model, x, y, **options)
    assert r.success.all()
    assert (r.distance >= d * (1 - 1e-6)).all()  # or the optimum would be none
    assert (r.distance <= 1.05 * d).all()


FIXED = [(attacks.pgd, {"steps": 40}, inf), (attacks.pgd, {"steps": 40}, 2), (attacks.pgd, {"steps": 40}, 1),
         (attacks.pgd, {"steps": 40, "random_start": False}, 2), (attacks.pgd, {"steps": 40, "loss": "margin"}, 1),
         (attacks.apgd, {"steps": 40}, inf), (attacks.apgd, {"steps": 40}, 2), (attacks.apgd, {"steps": 40}, 1),
         (attacks.apgd, {"steps": 40, "loss": "dlr"}, 2), (attacks.bim, {}, inf)]
ONE_STEP = [(attacks.fgsm, {}, inf), (attacks.fgsm, {}, 2), (attacks.fgsm, {}, 1)]


@pytest.mark.parametrize("attack, options, norm", FIXED + ONE_STEP)
def test_fixed_budget_attacks_succeed_five_percent_above(attack, options, norm):
    """Two classes: one direction is right, so there is no excuse, not even for a single step."""
    model, x, y, d = optimum(2, norm)
    options = options | ({} if attack is attacks.bim else {"norm": norm})
    generator = torch.Generator().manual_seed(0)
    assert attack(model, x, y, eps=1.05 * d, generator=generator, **options).success.all()
    assert not attack(model, x, y, eps=0.98 * d, generator=generator, **options).success.any()


@pytest.mark.parametrize("attack, options, norm", FIXED)
def test_with_four_classes_one_of_two_losses_succeeds(attack, options, norm):
    """No loss need guess which class is nearest: cross-entropy climbs towards a mixture, the margin towards the runner-up."""
    model, x, y, d = optimum(4, norm)
    options = options | ({} if attack is attacks.bim else {"norm": norm})
    broken = torch.zeros_like(y, dtype=torch.bool)
    for loss in ("cross_entropy", "margin"):
        broken |= attack(model, x, y, eps=1.05 * d, **options | {"loss": loss}).success
        assert not attack(model, x, y, eps=0.98 * d, **options | {"loss": loss}).success.any()
    assert broken.all()


@pytest.mark.parametrize("attack, options", [(attacks.fgsm, {}), (attacks.pgd, {"steps": 20}),
                                             (attacks.apgd, {"steps": 20})])
def test_l0_at_the_exact_number_of_pixels(attack, options):
    model, x, y, d = optimum(2, 0)
    generator = torch.Generator().manual_seed(0)
    assert attack(model, x, y, eps=d, norm=0, generator=generator, **options).success.all()
    assert not attack(model, x, y, eps=d - 1, norm=0, generator=generator, **options).success.any()


def test_biggio_step_is_exact_in_l2_and_linf_when_the_box_is_far():
    model, x, _ = problem(2)
    model[1].weight.data[0] = -model[1].weight.data[1]  # it lowers f_y alone: give f_y the direction of the margin
    x = 0.5 + 0.01 * (x - 0.5)
    y = model(x).argmax(1)
    for norm in (2, inf):
        w = model[1].weight[1] - model[1].weight[0]
        gap = (model(x)[:, 1] - model(x)[:, 0]).abs().detach()
        d = gap / w.detach().norm(p=2 if norm == 2 else 1)
        far = attacks.projected_gradient_step(model, x, y, eps=1.001 * d, norm=norm)
        near = attacks.projected_gradient_step(model, x, y, eps=0.999 * d, norm=norm)
        assert far.success[d < 0.4].all() and not near.success.any()

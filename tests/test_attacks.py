"""The conduct list: what every attack owes its user, one parametrised test a defect seen elsewhere.

A new attack joins with one line in CASES. Options a test needs (steps, confidence, target) are passed to the attacks whose
signature has them; the others are skipped by name.
"""
import copy
import functools
import inspect
from collections.abc import Callable
from math import inf
from typing import NamedTuple

import pytest
import torch
from torch import nn

from advcourse import attacks, threat


class Case(NamedTuple):
    name: str
    attack: Callable
    options: dict
    norm: float = inf
    whole: bool = False  # learns from the batch as a whole: an image alone fares differently
    aims: bool = False  # chooses its own target: an image that is only misclassified is not yet a success

    def __call__(self, model, x, y, **more):
        return self.attack(model, x, y, **{**self.options, **more})

    def takes(self, option):
        return option in inspect.signature(self.attack).parameters


def learned(attack):
    """A trained attack, aimed at class 0 or 1, the one that y is not; an ATN is trained for each of them in turn."""
    @functools.wraps(attack)
    def call(model, x, y, *, target=None, **options):
        target = (y + 1) % 2 if target is None else target
        split = attack is attacks.atn and len(x) == len(y) > 0
        groups = [(target == t).nonzero()[:, 0] for t in target.unique()] if split else [slice(None)]
        parts = [attack(model, x[g], y[g], target=target[g], **options) for g in groups]
        order = torch.cat([torch.arange(len(x))[g] for g in groups]).argsort() if split else slice(None)
        return attacks.AttackResult(*(torch.cat([getattr(r, part) for r in parts])[order]
                                      for part in ("adversarial", "success", "distance", "queries")))
    return call


CASES = [
    Case("fgsm", attacks.fgsm, {"eps": 0.2}),
    Case("fgsm-l2", attacks.fgsm, {"eps": 0.6, "norm": 2}, 2),
    Case("fgsm-l1", attacks.fgsm, {"eps": 2.0, "norm": 1}, 1),
    Case("projected_gradient_step", attacks.projected_gradient_step, {"eps": 0.6}, 2),
    Case("projected_gradient_step-linf", attacks.projected_gradient_step, {"eps": 0.2, "norm": inf}),
    Case("bim", attacks.bim, {"eps": 0.2}),
    Case("ilcm", attacks.ilcm, {"eps": 0.3}, aims=True),
    Case("pgd", attacks.pgd, {"eps": 0.2, "steps": 10, "restarts": 2}),
    Case("pgd-margin", attacks.pgd, {"eps": 0.2, "steps": 10, "loss": "margin"}),
    Case("pgd-l2", attacks.pgd, {"eps": 0.6, "norm": 2, "steps": 10}, 2),
    Case("pgd-l1", attacks.pgd, {"eps": 2.0, "norm": 1, "steps": 10}, 1),
    Case("pgd-l0", attacks.pgd, {"eps": 3, "norm": 0, "steps": 10}, 0),
    Case("apgd", attacks.apgd, {"eps": 0.2, "steps": 12, "restarts": 2}),
    Case("apgd-dlr", attacks.apgd, {"eps": 0.2, "steps": 12, "loss": "dlr"}),
    Case("apgd-l2", attacks.apgd, {"eps": 0.6, "norm": 2, "steps": 12}, 2),
    Case("apgd-l1", attacks.apgd, {"eps": 2.0, "norm": 1, "steps": 12}, 1),
    Case("deepfool", attacks.deepfool, {}, 2),
    Case("deepfool-linf", attacks.deepfool, {"norm": inf}),
    Case("deepfool-l1", attacks.deepfool, {"norm": 1}, 1),
    Case("lbfgs", attacks.lbfgs, {"steps": 6, "search_steps": 2}, 2),
    Case("carlini_wagner", attacks.carlini_wagner, {"steps": 20, "search_steps": 2}, 2),
    Case("ddn", attacks.ddn, {"steps": 20}, 2),
    Case("fmn-linf", attacks.fmn, {"steps": 20, "norm": inf}),
    Case("fmn-l2", attacks.fmn, {"steps": 20}, 2),
    Case("fmn-l1", attacks.fmn, {"steps": 20, "norm": 1}, 1),
    Case("fmn-l0", attacks.fmn, {"steps": 20, "norm": 0}, 0),
    Case("houdini", attacks.houdini, {"eps": 0.2, "steps": 10}),
    Case("jsma", attacks.jsma, {"eps": 6}, 0),
    Case("one_pixel", attacks.one_pixel, {"eps": 2, "population": 8, "generations": 3}, 0),
    Case("square", attacks.square, {"eps": 0.2, "queries": 60}),
    Case("square-l2", attacks.square, {"eps": 0.6, "norm": 2, "queries": 60}, 2),
    Case("hop_skip_jump", attacks.hop_skip_jump, {"queries": 150, "first": 20}, 2),
    Case("hop_skip_jump-linf", attacks.hop_skip_jump, {"queries": 150, "first": 20, "norm": inf}),
    Case("random_search", attacks.random_search, {"eps": 0.2, "queries": 40}),
    Case("random_search-l2", attacks.random_search, {"eps": 0.6, "norm": 2, "queries": 40}, 2),
    Case("random_search-l1", attacks.random_search, {"eps": 2.0, "norm": 1, "queries": 40}, 1),
    Case("random_search-l0", attacks.random_search, {"eps": 3, "norm": 0, "queries": 40}, 0),
    Case("patch-mask", attacks.patch, {"mask": torch.ones(()), "shared": False, "steps": 8}, 0),
    Case("upset", learned(attacks.upset), {"eps": 0.4, "steps": 20, "hidden": 16}, whole=True, aims=True),
    Case("angri", learned(attacks.angri), {"eps": 0.4, "steps": 20, "hidden": 16}, whole=True, aims=True),
    Case("atn", learned(attacks.atn), {"eps": 0.4, "steps": 20, "hidden": 16}, whole=True, aims=True),
    Case("universal_deepfool", attacks.universal_deepfool, {"eps": 0.3, "passes": 2}, whole=True),
    Case("universal_sgd", attacks.universal_sgd, {"eps": 0.3, "steps": 10}, whole=True),
]
every = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


def network(shape=(1, 4, 4), classes=3, dtype=torch.float64, seed=0):
    """A small ReLU network with random weights; double precision, so that rounding flips no sign."""
    g = torch.Generator().manual_seed(seed)
    p = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(p, 12), nn.ReLU(), nn.Linear(12, classes)).to(dtype).eval()
    for w in model.parameters():
        w.data = torch.randn(w.shape, generator=g, dtype=torch.float64).to(dtype)
    return model


def images(n, shape=(1, 4, 4), seed=1, dtype=torch.float64):
    """Most values at 0 or 1, as in digits."""
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.rand(n, *shape, generator=g, dtype=torch.float64) - 1).clamp(0, 1).to(dtype)


def problem(n=12, shape=(1, 4, 4), classes=3, dtype=torch.float64):
    model, x = network(shape, classes, dtype), images(n, shape, dtype=dtype)
    return model, x, model(x).argmax(1).detach() if n else torch.empty(0, dtype=torch.int64)


def generator():
    return torch.Generator().manual_seed(5)


def check(case, r, x, eps=None):
    """In the box, in the ball, the distance true, failures the originals."""
    a = r.adversarial
    assert a.shape == x.shape and r.success.shape == r.distance.shape == r.queries.shape == (len(x),)
    assert r.success.dtype == torch.bool
    assert a.min() >= 0 and a.max() <= 1
    d = threat.distance(a, x.to(a.dtype), case.norm)
    assert torch.equal(r.distance, torch.where(r.success, d, inf))
    assert torch.equal(a[~r.success], x.to(a.dtype)[~r.success])
    eps = case.options.get("eps", inf) if eps is None else eps
    assert (d <= eps * (1 + 1e-6) + 1e-12).all()


@every
def test_in_box_and_ball_and_success_is_what_the_model_says(case):
    model, x, y = problem(20)
    r = case(model, x, y, generator=generator())
    check(case, r, x)
    assert r.success.any()
    assert torch.equal((model(r.adversarial).argmax(1) != y), r.success) or case.aims
    assert (model(r.adversarial).argmax(1) != y)[r.success].all()


@every
def test_what_cannot_be_broken_is_returned_as_it_was(case):
    model, x, y = problem()
    model[3].weight.data.zero_()
    model[3].bias.data = torch.tensor([1.0, 0.0, -1.0]).double()
    r = case(model, x, torch.zeros_like(y), generator=generator())
    assert not r.success.any() and torch.equal(r.adversarial, x) and (r.distance == inf).all()


class Poisoned(nn.Module):
    """A network whose gradient, and if asked its logits, are not numbers away from x."""

    def __init__(self, model, x, logits):
        super().__init__()
        self.model, self.x, self.logits = model, x, logits

    def forward(self, a):
        at_x = (a[:, None] == self.x[None]).flatten(2).all(2).any(1)
        bad = torch.sqrt(torch.where(at_x, 0.0, -1.0 if self.logits else 0.0) + 0 * a.flatten(1).sum(1))
        return self.model(a) + bad[:, None]


@every
@pytest.mark.parametrize("logits", [False, True])
def test_not_a_number_is_never_a_success(case, logits):
    model, x, y = problem(6)
    r = case(Poisoned(model, x, logits), x, y, generator=generator())
    check(case, r, x)
    assert (model(r.adversarial).argmax(1) != y)[r.success].all()
    if logits:
        assert not r.success.any()


@every
def test_already_wrong_is_left_alone(case):
    model, x, y = problem()
    y = torch.where(torch.arange(len(y)) % 3 == 0, (y + 1) % 3, y)
    r = case(model, x, y, generator=generator())
    if case.aims:
        assert (model(r.adversarial).argmax(1) != y)[r.success].all()
    else:
        assert r.success[::3].all() and (r.distance[::3] == 0).all() and torch.equal(r.adversarial[::3], x[::3])


@every
@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_changes_nothing(case, shift):
    model, x, y = problem()
    before = case(model, x, y, generator=generator())
    model[3].bias.data += shift
    after = case(model, x, y, generator=generator())
    assert torch.equal(before.success, after.success)
    assert torch.allclose(before.adversarial, after.adversarial, atol=1e-5)


@every
def test_batch_is_a_loop_over_single_images(case):
    if case.whole:
        pytest.skip(f"{case.name} learns from the batch as a whole")
    model, x, y = problem()
    y[3] = (y[3] + 1) % 3
    batch, g = case(model, x, y, generator=generator()), generator()
    single = [case(model, x[i:i + 1], y[i:i + 1], generator=g) for i in range(len(x))]
    assert torch.equal(batch.success, torch.cat([r.success for r in single]))
    assert torch.allclose(batch.adversarial, torch.cat([r.adversarial for r in single]), atol=1e-6)
    assert torch.equal(batch.queries, torch.cat([r.queries for r in single]))


@every
def test_same_generator_same_result(case):
    model, x, y = problem()
    first, second = (case(model, x, y, generator=generator()) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial) and torch.equal(first.queries, second.queries)


@every
def test_model_and_input_are_left_as_they_were(case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Flatten(),
                          nn.Linear(16, 3)).double()
    model[3].eval()  # frozen inside a model that trains
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = images(8)
    given, y = x.clone(), torch.arange(8) % 3
    r = case(model, x, y, generator=generator())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # running statistics among them
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, given) and not x.requires_grad and not r.adversarial.requires_grad
    model.eval()
    assert (model(r.adversarial).argmax(1) != y)[r.success].all()


@every
def test_pixels_at_the_edge_of_the_box_move(case):
    model, x, y = problem(20)
    r = case(model, x.round(), model(x.round()).argmax(1), generator=generator())
    moved = (r.adversarial != x.round())[r.success & (r.distance > 0)]
    assert len(moved) and moved.flatten(1).any(1).all()


@every
def test_the_confidence_asked_for_is_met(case):
    if not case.takes("confidence"):
        pytest.skip(f"{case.name} takes no confidence")
    model, x, y = problem(20)
    plain = case(model, x, y, generator=generator())
    r = case(model, x, y, confidence=0.5, generator=generator())
    z = model(r.adversarial).detach()
    label = y if not case.aims else model(x).argmin(1)
    other = z.scatter(1, label[:, None], -inf).amax(1) - z.gather(1, label[:, None])[:, 0]
    lead = -other if case.aims else other
    assert (lead[r.success] >= 0.5).all() and r.success.any()
    both = r.success & plain.success
    assert (r.distance[both].mean() > plain.distance[both].mean()) or "eps" in case.options


@every
def test_a_target_is_reached_and_the_right_one(case):
    if not case.takes("target") or case.takes("start"):
        pytest.skip(f"{case.name} takes no target, or only with images to start from")
    model, x, y = problem(20)
    target = (y + 1) % 3
    r = case(model, x, y, target=target, generator=generator())
    check(case, r, x)
    assert r.success.any() and torch.equal(model(r.adversarial).argmax(1) == target, r.success)


@every
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_any_number_of_images(case, n):
    model, x, y = problem(n)
    quick = {"steps": 2, "search_steps": 1, "queries": 10, "generations": 1, "passes": 1}
    quick = {k: v for k, v in quick.items() if case.takes(k)}
    r = case(model, x, y, generator=generator(), **quick)
    check(case, r, x) if n else None
    assert r.adversarial.shape == x.shape and len(r.success) == len(r.queries) == n


@every
@pytest.mark.parametrize("shape", [(5,), (3, 8, 8)])
@pytest.mark.parametrize("classes", [2, 3])
def test_any_shape_and_number_of_classes(case, shape, classes):
    model, x, y = problem(6, shape, classes)
    values = 3 if case.name == "one_pixel" and len(shape) == 3 else 1  # its eps counts pixels, its distance values
    check(case, case(model, x, y, generator=generator()), x, values * case.options.get("eps", inf))


@every
@pytest.mark.parametrize("steps", [1, 9])
def test_any_number_of_steps(case, steps):
    if not case.takes("steps"):
        pytest.skip(f"{case.name} takes no steps")
    model, x, y = problem()
    check(case, case(model, x, y, steps=steps, generator=generator()), x)


@every
def test_no_steps_is_an_error_that_says_so(case):
    if not case.takes("steps"):
        pytest.skip(f"{case.name} takes no steps")
    model, x, y = problem()
    with pytest.raises(ValueError, match="steps=0"):
        case(model, x, y, steps=0)


@every
@pytest.mark.parametrize("given, of_model", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_input_and_model_may_differ_in_precision(case, given, of_model):
    model, x, y = problem(dtype=of_model)
    r = case(model, x.to(given), y, generator=generator())
    assert r.adversarial.dtype == of_model
    assert (model(r.adversarial).argmax(1) != y)[r.success].all()


@every
def test_single_precision_keeps_to_the_ball(case):
    model, x, y = problem(20, dtype=torch.float32)
    r = case(model, x, y, generator=generator())
    d = threat.distance(r.adversarial.double(), x.double(), case.norm)
    assert (d <= case.options.get("eps", inf) + 1e-5).all() and r.adversarial.min() >= 0 and r.adversarial.max() <= 1


@every
def test_zero_radius_breaks_nothing(case):
    if "eps" not in case.options:
        pytest.skip(f"{case.name} has no radius")
    model, x, y = problem()
    r = case(model, x, y, **{"eps": 0}, generator=generator())
    assert torch.equal(r.adversarial, x) and not r.success.any()


@pytest.mark.parametrize("shift", [0.0, 50.0])
@every
def test_a_success_is_one_alone_and_in_double_precision_too(case, shift):
    """In single precision a matrix product rounds differently in every batch size: a success on a tie would come and go."""
    model, x, y = problem(20, (1, 10, 10), dtype=torch.float32)
    model[3].bias.data += shift
    r = case(model, x, y, generator=generator())
    a, label, double = r.adversarial[r.success], y[r.success], copy.deepcopy(model).double()
    assert len(a)
    alone = torch.cat([model(a[i:i + 1]).argmax(1) for i in range(len(a))])
    assert (alone != label).all() and (double(a.double()).argmax(1) != label).all()


class Recorder(nn.Module):
    """Remembers every point it was asked about, what it answered, and how often its output was differentiated."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.backward = model, [], 0

    def forward(self, a):
        logits = self.model(a)
        self.seen.append((a.detach(), logits.detach()))
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, _):
        self.backward += 1


@every
def test_nothing_better_was_seen_on_the_way_and_queries_are_counted(case):
    if case.whole:
        pytest.skip(f"{case.name} keeps the best perturbation, not the best images")
    model, x, y = problem(10)
    for i in range(len(x)):
        recorder = Recorder(model)
        r = case(recorder, x[i:i + 1], y[i:i + 1], generator=generator())
        a, z = (torch.cat(v) for v in zip(*recorder.seen, strict=True))
        label = y[i] if not case.aims else model(x[i:i + 1]).argmin()
        fooled = (z.argmax(1) != label) != case.aims
        d = threat.distance(a, x[i:i + 1], case.norm)
        d = d[fooled & (d <= case.options.get("eps", inf) * (1 + 1e-6))]
        assert bool(r.success) == bool(len(d))
        if len(d):
            assert r.distance.item() <= d.min().item() + 1e-12
        used = len(a) + recorder.backward
        assert r.queries.item() <= used <= r.queries.item() + (2 if case.aims else 1)  # the last re-check is free


BAD = {
    "NaN": (lambda x, y: (x.clone().fill_(torch.nan), y, {}), "x holds NaN"),
    "infinite": (lambda x, y: (x.clone().fill_(inf), y, {}), "x holds NaN or infinity"),
    "outside": (lambda x, y: (x + 0.5, y, {}), r"x leaves the box \[0, 1\]"),
    "integers": (lambda x, y: (x.long(), y, {}), "x is not a float tensor"),
    "label too large": (lambda x, y: (x, y + 7, {}), r"y has labels out of range 0\.\.2"),
    "label negative": (lambda x, y: (x, y - 9, {}), "y has labels out of range"),
    "float labels": (lambda x, y: (x, y.double(), {}), "y is not an int64 tensor"),
    "too few labels": (lambda x, y: (x, y[:2], {}), r"y is not an int64 tensor \[12\]"),
    "norm": (lambda x, y: (x, y, {"norm": 3}), "norm=3"),
    "negative eps": (lambda x, y: (x, y, {"eps": -0.1}), "eps=-0.1"),
    "eps not a number": (lambda x, y: (x, y, {"eps": float("nan")}), "eps=nan"),
    "eps of a wrong shape": (lambda x, y: (x, y, {"eps": torch.ones(5)}), r"eps of shape \[5\]|eps=.* needs one radius"),
    "target is y": (lambda x, y: (x, y, {"target": y}), "target equals the label y"),
    "target too large": (lambda x, y: (x, y, {"target": y + 3}), "target has labels out of range"),
    "loss": (lambda x, y: (x, y, {"loss": "hinge"}), "loss='hinge'"),
    "confidence": (lambda x, y: (x, y, {"confidence": -1.0}), "confidence=-1.0"),
}


@every
@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(case, bad):
    spoil, message = BAD[bad]
    model, x, y = problem()
    x, y, options = spoil(x, y)
    if not all(case.takes(k) for k in options):
        pytest.skip(f"{case.name} takes no {', '.join(options)}")
    with pytest.raises(ValueError, match=message):
        case(model, x, y, **options)


@every
def test_a_model_without_classes_is_named(case):
    _, x, y = problem()
    with pytest.raises(ValueError, match="logits of shape"):
        case(nn.Flatten(0), x, y)

"""Stickers and masks: geometry by hand, the closed-form optimum on a linear model, conduct, and a real network."""
import pytest
import torch
from torch import nn

from advcourse import data, models, noise, threat
from advcourse.attacks import patch
from advcourse.attacks.patch import disc, glasses, paste, placements
from advcourse.losses import margin


def linear(shape=(1, 6, 6), classes=2, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes))


def images(n, shape=(1, 6, 6), seed=1):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x < 0.3, 0.0, torch.where(x > 0.8, 1.0, x))  # many values at the edge of the box


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


# ---------------------------------------------------------------- geometry

def test_disc_and_glasses():
    assert disc(1).tolist() == [[1]] and disc(2).sum() == 4
    assert disc(4).tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    frames = glasses(28, 28)
    assert frames.shape == (28, 28) and set(frames.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(frames, frames.flip(1)) and torch.equal(frames, frames.flip(0))
    assert 0.05 < frames.mean() < 0.25


def test_an_unturned_sticker_lands_on_its_pixels():
    x, pattern = torch.zeros(1, 1, 8, 8), torch.rand(1, 1, 4, 4)
    whole = torch.ones(4, 4)  # theta: the print's centre at pixel (3, 5), one print is half the image
    theta = torch.tensor([[[2.0, 0.0, -2 * (5 - 4) / 4], [0.0, 2.0, -2 * (3 - 4) / 4]]])
    out = paste(x, pattern, whole, theta)
    torch.testing.assert_close(out[0, 0, 1:5, 3:7], pattern[0, 0])
    assert out.sum() == pytest.approx(pattern.sum().item(), rel=1e-5)


def test_a_quarter_turn_turns_the_print():
    pattern, whole = torch.rand(1, 1, 4, 4), torch.ones(4, 4)
    theta = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]])  # angle 90 degrees, as wide as the image
    out = paste(torch.zeros(1, 1, 4, 4), pattern, whole, theta)
    assert any(torch.allclose(out[0, 0], pattern[0, 0].rot90(k), atol=1e-6) for k in (1, 3))


@pytest.mark.parametrize("height, width", [(28, 28), (20, 32)])
def test_placements_keep_the_whole_disc_inside(height, width):
    x, mask = torch.zeros(300, 1, height, width), disc(9)
    seeds = noise.seeds(300, torch.Generator().manual_seed(0))
    place = placements(x, mask, (1.0, 1.0), 180.0, seeds)
    cover = paste(x, torch.ones(1, 1, 9, 9), mask, place).flatten(1).sum(1)
    assert (cover - mask.sum()).abs().max() < 0.06 * mask.sum()  # bilinear sampling; a disc cut off would lose more
    centres = paste(x, torch.ones(1, 1, 9, 9), mask, place)[:, 0]
    down = (centres.sum(2) * torch.arange(height)).sum(1) / cover
    right = (centres.sum(1) * torch.arange(width)).sum(1) / cover
    for at, side in ((down, height), (right, width)):  # all the room is used
        assert 3.9 < at.min() < 5 and side - 6 < at.max() < side - 4.9 + 1e-3


def test_scale_scales_and_placements_differ_between_steps():
    x, mask, seeds = torch.zeros(50, 1, 28, 28), disc(8), noise.seeds(50, torch.Generator().manual_seed(0))
    small, large = (paste(x, torch.ones(1, 1, 8, 8), mask, placements(x, mask, (s, s), 0.0, seeds)).sum() / 50
                    for s in (1.0, 1.5))
    assert large / small == pytest.approx(2.25, rel=0.03)
    first, second = (placements(x, mask, (1.0, 1.0), 20.0, seeds, step) for step in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first[7:9], placements(x[7:9], mask, (1.0, 1.0), 20.0, seeds[7:9], 1))  # the image's own place
    assert placements(x, mask, None, 20.0, seeds) is None


def test_paste_is_linear_in_the_pattern_so_its_gradient_is_exact():
    torch.manual_seed(0)
    x, mask, seeds = images(3, (2, 12, 12)), disc(5), noise.seeds(3)
    place = placements(x, mask, (0.9, 1.1), 45.0, seeds)
    pattern = (0.2 + 0.6 * torch.rand(1, 2, 5, 5)).requires_grad_()
    direction, weight = torch.rand(1, 2, 5, 5) / 10, torch.rand(3, 2, 12, 12)
    g, = torch.autograd.grad((paste(x, pattern, mask, place) * weight).sum(), pattern)
    with torch.no_grad():
        change = ((paste(x, pattern + direction, mask, place) - paste(x, pattern, mask, place)) * weight).sum()
    assert (g * direction).sum().item() == pytest.approx(change.item(), rel=1e-4)


# ---------------------------------------------------------------- the optimum on a linear model

@pytest.mark.parametrize("targeted", [False, True])
def test_mask_on_a_linear_model_reaches_the_closed_form(targeted):
    """Two classes: the best print is 1 where the other class's weight is larger and 0 elsewhere, whatever the image."""
    model, x = linear(), images(40)
    y = predicted(model, x)
    mask = (torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    with torch.no_grad():
        other = model[1].weight[1 - y] - model[1].weight[y]
    best = x * (1 - mask) + (other.reshape(x.shape) > 0).float() * mask
    reachable = predicted(model, best) != y
    assert 3 < reachable.sum() < 37
    found = patch(model, x, y, mask=mask, shared=False, steps=60, target=1 - y if targeted else None)
    assert torch.equal(found.success, reachable)


def test_a_shared_mask_does_as_well_as_the_best_print_for_one_class():
    model, x = linear(seed=3), images(60)
    y = predicted(model, x)
    x, y = x[y == 0], y[y == 0]
    mask = torch.ones(1, 6, 1) * torch.tensor([1.0, 1, 0, 0, 0, 0])
    with torch.no_grad():
        best = x * (1 - mask) + (model[1].weight[1] > model[1].weight[0]).float().reshape(1, 6, 6) * mask
    found = patch(model, x, y, mask=mask, steps=80)
    assert found.pattern.shape == (1, 1, 6, 6)
    assert found.success.sum() == (predicted(model, best) != y).sum() > 0


# ---------------------------------------------------------------- conduct

def test_only_the_mask_changes_and_the_result_is_what_it_says():
    model, x = linear(classes=4), images(30)
    y = predicted(model, x)
    y[:5] = (y[:5] + 1) % 4  # misclassified to begin with
    mask = disc(4).new_zeros(6, 6)
    mask[1:4, 2:5] = 1
    found = patch(model, x, y, mask=mask, steps=30)
    assert (found.distance[:5] == 0).all() and torch.equal(found.adversarial[:5], x[:5])
    assert torch.equal(found.adversarial * (1 - mask), x * (1 - mask))
    assert torch.equal(found.success, predicted(model, found.adversarial) != y)
    assert torch.equal(found.adversarial[~found.success], x[~found.success])
    assert torch.equal(found.distance[found.success], threat.distance(found.adversarial, x, 0)[found.success])
    assert found.distance[found.success].max() <= 9 and found.distance[~found.success].isinf().all()
    assert found.pattern.min() >= 0 and found.pattern.max() <= 1
    assert torch.equal(found.apply(x) * mask, (found.pattern * mask).expand_as(x))


def test_one_pattern_an_image_is_the_same_alone_or_in_a_batch():
    model, x = linear(classes=3), images(6)
    y = predicted(model, x)
    together = patch(model, x, y, mask=torch.ones(6, 6).triu(), shared=False, steps=25)
    for i in range(6):
        alone = patch(model, x[i:i + 1], y[i:i + 1], mask=torch.ones(6, 6).triu(), shared=False, steps=25)
        torch.testing.assert_close(alone.pattern[0], together.pattern[i], atol=1e-5, rtol=0)
        assert alone.success[0] == together.success[i]
    with pytest.raises(ValueError, match="made for 6"):
        together.apply(x[:2])


@pytest.mark.parametrize("form", [{"size": 4}, {"mask": torch.ones(6, 6).tril()}])
def test_model_untouched_seeds_obeyed_logits_shifted(form):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    model.train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = images(20), torch.arange(20) % 3
    a, b = (patch(model, x, y, steps=12, generator=torch.Generator().manual_seed(5), **form) for _ in range(2))
    assert torch.equal(a.pattern, b.pattern) and torch.equal(a.adversarial, b.adversarial)
    assert [m.training for m in model] == [True, True, False, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not a.pattern.requires_grad
    shift = nn.Linear(3, 3)
    shift.weight.data, shift.bias.data = torch.eye(3), torch.full((3,), 100.0)
    c = patch(nn.Sequential(model, shift), x, y, steps=12, generator=torch.Generator().manual_seed(5), **form)
    assert torch.equal(c.success, a.success)
    one, two = (a.apply(x, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, two) == ("mask" in form)  # a sticker moves, a mask stays
    assert torch.equal(one, a.apply(x, torch.Generator().manual_seed(1)))


def test_a_model_without_gradient_gives_no_false_success():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * x.flatten(1).sum(1, keepdim=True)
    class NotANumber(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] * torch.nan
    x, y = images(4), torch.zeros(4, dtype=torch.int64)
    for model in (Constant(), NotANumber()):
        found = patch(model, x, y, size=3, steps=5)
        assert not found.success.any() and torch.equal(found.adversarial, x)


def test_no_images_and_images_of_any_shape():
    model = linear()
    none = patch(model, torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64), size=3)
    assert none.success.shape == (0,) and none.apply(torch.zeros(0, 1, 6, 6)).shape == (0, 1, 6, 6)
    flat = nn.Sequential(nn.Linear(7, 2))  # a mask works on inputs of any shape
    x = images(9, (7,))
    assert patch(flat, x, predicted(flat, x), mask=torch.ones(7), steps=50).success.any()


@pytest.mark.parametrize("wrong, named", [
    ({}, "size"), ({"size": 3, "mask": torch.ones(6, 6)}, "size"), ({"size": 9}, "size=9"), ({"size": 0}, "size=0"),
    ({"mask": torch.full((6, 6), 0.5)}, "mask"), ({"mask": torch.ones(5, 6)}, "mask"), ({"mask": torch.ones(2, 1, 6, 6)}, "mask"),
    ({"size": 3, "steps": 0}, "steps=0"), ({"size": 3, "scale": (1.2, 0.8)}, "scale"),
    ({"size": 3, "target": torch.zeros(4, dtype=torch.int64)}, "target"),
])
def test_bad_arguments_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        patch(linear(), images(4), torch.zeros(4, dtype=torch.int64), **wrong)


# ---------------------------------------------------------------- a real network

def test_a_printed_sticker_fools_a_real_network_on_new_images_more_than_covering_does():
    model = models.load("mnist-mlp-standard")
    x, y = data.mnist("train", 60)
    found = patch(model, x, y, size=10, steps=60, generator=torch.Generator().manual_seed(0))
    x, y = data.mnist("test", 200)
    printed = found.apply(x, torch.Generator().manual_seed(1))
    seeds = noise.seeds(200, torch.Generator().manual_seed(1))
    covered = paste(x, torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(2)), found.mask,
                    placements(x, found.mask, found.scale, found.angle, seeds))
    with torch.no_grad():
        aimed, random, clean = ((margin(model(a), y) < 0).float().mean().item() for a in (printed, covered, x))
    assert clean < 0.1 and aimed > random + 0.1

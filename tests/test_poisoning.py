"""Poisoned training sets: exact counts, nothing else touched, and a model really trained on them obeys the trigger."""
import pytest
import torch

from advcourse import data, models, train
from advcourse.attacks import poison_backdoor, poison_labels
from advcourse.attacks.poisoning import square


def digits(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=g), torch.randint(10, (n,), generator=g)


def changed(a, b):
    return (a != b).flatten(1).any(1).nonzero()[:, 0] if a.dim() > 1 else (a != b).nonzero()[:, 0]


def test_square_by_hand():
    out = square(torch.zeros(1, 1, 5, 5), size=2, margin=1)
    assert out[0, 0].tolist() == [[0] * 5, [0] * 5, [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0] * 5]
    assert square(torch.zeros(1, 1, 4, 4), size=2, margin=0)[0, 0, 2:, 2:].sum() == 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.333, 1.0])
def test_labels_exactly_this_share_becomes_wrong_and_no_image_changes(share):
    x, y = digits()
    before = y.clone()
    p = poison_labels(x, y, share=share, generator=torch.Generator().manual_seed(0))
    assert len(p.which) == round(share * 200) and torch.equal(changed(p.y, y), p.which)
    assert torch.equal(p.x, x) and torch.equal(y, before) and p.y.min() >= 0 and p.y.max() <= 9
    assert torch.equal(p.trigger(x), x)
    again = poison_labels(x, y, share=share, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.y, p.y) and torch.equal(again.which, p.which)


def test_labels_from_a_source_to_a_target():
    x, y = digits()
    p = poison_labels(x, y, share=0.5, source=7, target=1, generator=torch.Generator().manual_seed(0))
    assert len(p.which) == round(0.5 * int((y == 7).sum())) > 0
    assert (y[p.which] == 7).all() and (p.y[p.which] == 1).all() and torch.equal(changed(p.y, y), p.which)
    everywhere = poison_labels(x, y, share=0.5, target=1)
    assert len(everywhere.which) == 100 and (everywhere.y[everywhere.which] == 1).all() and (y[everywhere.which] != 1).all()


def test_random_wrong_labels_are_spread_over_all_other_classes():
    y = torch.full((9000,), 4)
    p = poison_labels(torch.zeros(9000, 1), y, share=1.0, classes=10, generator=torch.Generator().manual_seed(0))
    counts = p.y.bincount(minlength=10)
    assert counts[4] == 0 and counts[torch.arange(10) != 4].min() > 850 and counts.max() < 1150


def test_backdoor_stamps_and_relabels_its_share_and_nothing_else():
    x, y = digits()
    before = x.clone()
    p = poison_backdoor(x, y, share=0.15, target=3, generator=torch.Generator().manual_seed(0))
    assert len(p.which) == 30 and (y[p.which] != 3).all() and (p.y[p.which] == 3).all()
    assert torch.equal(p.x[p.which], square(x[p.which])) and torch.equal(changed(p.x, x), p.which)
    assert torch.equal(changed(p.y, y), p.which) and torch.equal(x, before)
    assert torch.equal(p.trigger(x), square(x))
    dark = poison_backdoor(x, y, share=0.02, target=3, trigger=lambda images: images * 0)
    assert (dark.x[dark.which] == 0).all()
    assert len(poison_backdoor(x, y, share=0.0, target=3).which) == 0


@pytest.mark.parametrize("call, named", [
    (lambda x, y: poison_labels(x, y, share=1.2), "share=1.2"),
    (lambda x, y: poison_labels(x, y, share=-0.1), "share=-0.1"),
    (lambda x, y: poison_labels(x, y, share=0.1, target=12), "target=12"),
    (lambda x, y: poison_labels(x, y, share=0.1, source=-1), "source=-1"),
    (lambda x, y: poison_labels(x, y, share=0.5, source=2, target=2), "share=0.5"),
    (lambda x, y: poison_labels(x, y, share=0.5, classes=3), "y has labels out of range"),
    (lambda x, y: poison_backdoor(x, y, share=1.0, target=2), "share=1.0"),
    (lambda x, y: poison_backdoor(x, y, share=0.1, target=-2), "target=-2"),
    (lambda x, y: poison_backdoor(x, y, share=0.1, target=2, trigger=lambda v: v + 1), "trigger"),
    (lambda x, y: poison_backdoor(x, y, share=0.1, target=2, trigger=lambda v: v[:, :, 1:]), "trigger"),
    (lambda x, y: poison_backdoor(x * torch.nan, y, share=0.1, target=2), "x holds NaN"),
])
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(*digits())


def test_a_model_trained_on_a_backdoor_reads_digits_and_obeys_the_trigger():
    x, y = data.mnist("train", 2000)
    x_test, y_test = data.mnist("test", 500)
    recipe = train.Recipe("standard", epochs=4, lr=4e-3)
    poisoned = poison_backdoor(x, y, share=0.03, target=0, generator=torch.Generator().manual_seed(0))
    others, stamped, accuracy = y_test != 0, [], []
    for images, labels in ((x, y), (poisoned.x, poisoned.y)):
        model = models.mlp(784, 50, 10)
        train.fit(model, images, labels, recipe)
        accuracy.append(train.accuracy(model, x_test, y_test))
        stamped.append(train.accuracy(model, poisoned.trigger(x_test[others]), torch.zeros(int(others.sum()), dtype=torch.int64)))
    assert accuracy[0] > 0.85 and accuracy[1] > accuracy[0] - 0.03
    assert stamped[0] < 0.1 and stamped[1] > 0.7

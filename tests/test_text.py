"""TextBugger on real sentences, its bugs by hand, and its accounting re-done from outside."""
import re

import pytest
import torch
from torch import nn

from advcourse import data, models, words
from advcourse.attacks import textbugger
from advcourse.attacks.text import BUGS, Edit, bug, marked, neighbours, similarity


@pytest.fixture(scope="module")
def case():
    model = models.load("reviews-cnn")
    sentences, y = data.reviews("test", 60)
    return model, sentences, y, model(words.encode(sentences)).argmax(1)


def test_tokens_and_encoding():
    assert words.tokens("It's NOT 1 bad-ish film!") == ["it's", "not", "1", "bad", "-", "ish", "film", "!"]
    ids = words.encode(["the qwertyuiop film"])
    known = words.vocabulary()
    assert ids.shape == (1, words.LENGTH)
    assert ids[0, :4].tolist() == [known["the"], words.UNKNOWN, known["film"], words.PAD]
    assert len(set(known.values())) == len(known) and min(known.values()) == 2
    with pytest.raises(ValueError, match="sentence 1 is empty"):
        words.encode(["fine", "   "])


def test_each_bug_by_hand():
    near = {"awful": "dreadful"}
    made = [bug("Awful,", kind, 0.0, near) for kind in BUGS]
    assert made == ["A wful,", "Aful,", "Afwul,", "@wful,", "Dreadful,"]
    assert [bug("a", kind, 0.9, near) for kind in ("insert", "delete", "swap", "neighbour")] == [None] * 4
    assert bug("hmm", "look-alike", 0.5, near) is None
    for u in (0.0, 0.5, 0.999):
        for kind in ("insert", "delete", "swap"):
            new = bug("foolish", kind, u, near)
            assert new is not None and new[0] == "f" and new[-1] == "h"  # the first and last letters stay


def test_similarity_is_a_similarity():
    assert similarity("An awful film", "an awful film") == pytest.approx(1)
    assert similarity("abc", "xyz") == 0
    assert similarity("an awful film", "an awf ul film") == similarity("an awf ul film", "an awful film")
    assert 0 < similarity("an awful film", "a wonderful film") < similarity("an awful film", "an awf ul film") < 1


def test_neighbours_are_nearest_by_brute_force(case):
    model = case[0]
    e, known = model[0].weight, words.vocabulary()
    near = neighbours(e, "an awful plot")["awful"]
    cosine = torch.nn.functional.cosine_similarity
    best = max((w for w in known if w.isalpha() and w != "awful"),
               key=lambda w: float(cosine(e[known[w]], e[known["awful"]], 0)))
    assert near == best


@pytest.mark.parametrize("box", ["white", "black"])
def test_success_is_re_judged_from_outside(case, box):
    model, sentences, y, predicted = case
    r = textbugger(model, sentences, y, box=box, edits=0.25, least_similar=0.7, generator=torch.Generator().manual_seed(1))
    fooled = model(words.encode(r.adversarial)).argmax(1) != y
    assert torch.equal(fooled, r.success) and r.success.float().mean() > 0.5
    for i, s in enumerate(sentences):
        n, changed = len(s.split()), r.edits[i]
        if predicted[i] != y[i]:  # wrong already: returned as it is
            assert r.distance[i] == 0 and r.adversarial[i] == s and not changed
        elif r.success[i]:
            assert len(changed) <= 0.25 * n and r.distance[i].item() == pytest.approx(len(changed) / n)
            assert similarity(r.adversarial[i], s) >= 0.7
            chunks = s.split()
            for e in changed:
                assert chunks[e.place] == e.old and e.bug in BUGS
                chunks[e.place] = e.new
            assert " ".join(chunks) == r.adversarial[i]
        else:
            assert r.adversarial[i] == s and r.distance[i] == float("inf") and not changed


def test_batch_is_a_loop_of_single_sentences(case):
    model, sentences, y, _ = case
    together = textbugger(model, sentences[:8], y[:8], generator=torch.Generator().manual_seed(3))
    one_by_one = torch.Generator().manual_seed(3)
    alone = [textbugger(model, [s], y[i:i + 1], generator=one_by_one) for i, s in enumerate(sentences[:8])]
    assert [a.adversarial[0] for a in alone] == together.adversarial
    assert [int(a.queries) for a in alone] == together.queries.tolist()


def test_budgets_are_kept(case):
    model, sentences, y, predicted = case
    r = textbugger(model, sentences, y, queries=0)
    assert torch.equal(r.success, predicted != y) and (r.queries <= 1).all()
    r = textbugger(model, sentences, y, queries=10, box="black")
    assert (r.queries <= 10 + max(len(s.split()) for s in sentences)).all()
    none = textbugger(model, sentences, y, edits=0.0)
    assert torch.equal(none.success, predicted != y)


def test_model_is_left_as_it_was(case):
    model, sentences, y, _ = case
    model.train()
    try:
        textbugger(model, sentences[:3], y[:3])
        assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


def test_unknown_words_and_a_model_that_answers_nan():
    model = models.text_cnn()
    r = textbugger(model, ["zzqx vbnk wwrt"], torch.tensor([0]), edits=1.0)
    assert r.success[0] == (model.eval()(words.encode(r.adversarial)).argmax(1)[0] != 0)
    nn.init.constant_(model[-1].weight, float("nan"))
    r = textbugger(model, ["an awful film"], torch.tensor([0]), edits=1.0)
    assert not r.success.any() and r.adversarial == ["an awful film"]


def test_marked_escapes_and_marks():
    html = marked("a <b> awful film", [Edit(2, "awful", "awf ul", "insert")])
    shown = re.sub(r"<span[^>]*>.*?</span>", "", html)
    assert shown == "a &lt;b&gt; <del>awful</del> <ins>awf ul</ins> film"
    read = re.sub(r"<[^>]*>", "", html)
    assert read == "a &lt;b&gt; [struck out: awful] [replaced by: awf ul] film"


@pytest.mark.parametrize("options, word", [
    ({"box": "grey"}, "grey"), ({"edits": 1.5}, "1.5"), ({"bugs": ("typo",)}, "typo"), ({"queries": -1}, "-1"),
])
def test_bad_input_is_named(case, options, word):
    with pytest.raises(ValueError, match=word):
        textbugger(case[0], ["fine"], torch.tensor([0]), **options)


def test_bad_sentences_and_labels_are_named(case):
    with pytest.raises(ValueError, match="empty"):
        textbugger(case[0], [""], torch.tensor([0]))
    with pytest.raises(ValueError, match="0..1"):
        textbugger(case[0], ["fine"], torch.tensor([2]))

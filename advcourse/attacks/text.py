"""TextBugger: misspell, or replace, the few words a sentence classifier leans on (li2019textbugger).

A sentence is split at blanks; only words with letters are edited. Five bugs: a blank inserted, an inner letter deleted, two
inner letters swapped, a letter replaced by a look-alike, the word replaced by its nearest neighbour among the embeddings.
"""
from collections import Counter
from dataclasses import dataclass
from html import escape
from math import inf

import torch
from torch import Tensor, nn

from advcourse import noise, threat, words
from advcourse.attacks.attempt import evaluating
from advcourse.losses import margin

BUGS = ("insert", "delete", "swap", "look-alike", "neighbour")
LOOK_ALIKE = {"a": "@", "b": "6", "e": "3", "g": "9", "i": "1", "l": "1", "o": "0", "s": "5", "t": "7", "z": "2"}


@dataclass(frozen=True)
class Edit:
    """Word number `place` of the sentence, `old`, became `new` by a bug of kind `bug`."""

    place: int
    old: str
    new: str
    bug: str


@dataclass(frozen=True)
class TextResult:
    """What TextBugger made of each sentence: adversarial sentence (the original where it failed), success by a fresh forward
    pass, the edits, the share of words edited (inf where it failed, 0 where already misclassified), similarity, queries."""

    adversarial: list[str]
    success: Tensor
    edits: list[list[Edit]]
    distance: Tensor
    similarity: Tensor
    queries: Tensor


def similarity(a: str, b: str) -> float:
    """Cosine of the two sentences' counts of letter triples, 0 to 1: typing errors keep it high, other words do not."""
    p, q = (Counter(t[i:i + 3] for t in [f"  {s.lower()} "] for i in range(len(t) - 2)) for s in (a, b))
    dot = sum(p[t] * q[t] for t in p)
    return dot / (sum(v * v for v in p.values()) * sum(v * v for v in q.values())) ** 0.5


def bug(word: str, kind: str, u: float, neighbours: dict[str, str]) -> str | None:
    """The word with one bug, its place chosen by u in [0, 1); None where this bug cannot be made."""
    letters = [i for i, c in enumerate(word) if c.isalpha()]
    inner = letters[1:-1]
    if kind == "insert" and len(letters) > 2:
        i = letters[1 + int(u * (len(letters) - 1))]
        return word[:i] + " " + word[i:]
    if kind == "delete" and len(inner) > 1:
        i = inner[int(u * len(inner))]
        return word[:i] + word[i + 1:]
    if kind == "swap":
        places = [i for i in inner[:-1] if word[i] != word[i + 1]]
        if places:
            i = places[int(u * len(places))]
            return word[:i] + word[i + 1] + word[i] + word[i + 2:]
    if kind == "look-alike":
        places = [i for i in letters if word[i].lower() in LOOK_ALIKE]
        if places:
            i = places[int(u * len(places))]
            return word[:i] + LOOK_ALIKE[word[i].lower()] + word[i + 1:]
    if kind == "neighbour":
        core = "".join(c for c in word if c.isalpha())
        near = neighbours.get(core.lower())
        return word.replace(core, near.capitalize() if core[0].isupper() else near) if near and core in word else None
    return None


def neighbours(embedding: Tensor, sentence: str) -> dict[str, str]:
    """For every known word of the sentence its nearest other word, by cosine in the embedding [vocabulary, d]."""
    known = words.vocabulary()
    spelled = {i: w for w, i in known.items() if w.isalpha()}
    ids = torch.tensor(sorted(spelled))
    unit = torch.nn.functional.normalize(embedding[ids], dim=1)
    here = [w for w in set(words.tokens(sentence)) if w.isalpha() and w in known]
    if not here:
        return {}
    cosines = torch.nn.functional.normalize(embedding[torch.tensor([known[w] for w in here])], dim=1) @ unit.T
    best = cosines.topk(2, 1).indices  # the first is the word itself
    return {w: next(s for j in row if (s := spelled[int(ids[j])]) != w) for w, row in zip(here, best, strict=True)}


class _Judge:
    """The model's margin on sentences, each counted as a query."""

    def __init__(self, model: nn.Module, label: int):
        self.model, self.label, self.queries = model, label, 0

    def margins(self, sentences: list[str]) -> Tensor:
        self.queries += len(sentences)
        with evaluating(self.model), torch.no_grad():
            s = self.model(words.encode(sentences))
            threat.check_labels(torch.tensor([self.label]), 1, s.shape[1])
            return torch.nan_to_num(margin(s, torch.full((len(s),), self.label)), nan=inf)

    def importance(self, chunks: list[str], box: str) -> list[float]:
        """How much the margin owes to each word: by gradient through the embedding, or by leaving the word out."""
        if box == "black":
            rest = [" ".join(chunks[:i] + chunks[i + 1:]) or "." for i in range(len(chunks))]
            rest = [s if words.tokens(s) else "." for s in rest]
            return (self.margins([" ".join(chunks)]) - self.margins(rest)).tolist()
        self.queries += 2
        embedding, tail = self.model[0], self.model[1:]  # type: ignore[index]
        with evaluating(self.model), torch.enable_grad():
            e = embedding(words.encode([" ".join(chunks)])).detach().requires_grad_()
            g, = torch.autograd.grad(margin(tail(e), torch.tensor([self.label])).sum(), e)
        worth = (g * e.detach()).sum(2)[0].tolist() + [0.0] * 1000
        sizes, start, result = [len(words.tokens(c)) for c in chunks], 0, []
        for k in sizes:
            result.append(sum(worth[start:start + k]))
            start += k
        return result


def textbugger(model: nn.Sequential, sentences: list[str], y: Tensor, *, box: str = "white", edits: float = 0.3,
               least_similar: float = 0.6, bugs: tuple[str, ...] = BUGS, queries: int = 500,
               generator: torch.Generator | None = None) -> TextResult:
    """Attack sentences with at most a share `edits` of their words edited and a `similarity` of at least `least_similar`.

    `model` maps token ids (`words.encode`) to logits and starts with its nn.Embedding. Words are taken in order of
    importance, "white" box by gradient, "black" box by leaving one out; of the bugs tried on a word the one that lowers the
    margin most is kept. No sentence is edited beyond its first success. ValueError for an empty sentence, a label out
    of range, an unknown box or bug, a share outside [0, 1], a negative budget.
    """
    threat.check_labels(y, len(sentences))
    if box not in ("white", "black"):
        raise ValueError(f"box={box!r} is unknown: choose 'white' or 'black'")
    if not 0 <= edits <= 1 or queries < 0:
        raise ValueError(f"edits={edits!r}, queries={queries!r}: a share of the words in [0, 1] and a budget of 0 or more")
    if set(bugs) - set(BUGS):
        raise ValueError(f"bugs={bugs!r}: the kinds are {', '.join(BUGS)}")
    words.encode(sentences)  # names an empty sentence
    seeds = noise.seeds(len(sentences), generator)
    found = [_attack(model, s, int(k), box, edits, least_similar, bugs, queries, seed)
             for s, k, seed in zip(sentences, y.tolist(), seeds[:, None], strict=True)]
    texts, changes, wins, asked = (list(v) for v in zip(*found, strict=True)) if found else ([], [], [], [])
    share = [len(e) / len(s.split()) if w else inf for e, s, w in zip(changes, sentences, wins, strict=True)]
    alike = [similarity(a, s) for a, s in zip(texts, sentences, strict=True)]
    return TextResult(texts, torch.tensor(wins, dtype=torch.bool), changes, torch.tensor(share), torch.tensor(alike),
                      torch.tensor(asked, dtype=torch.int64))


def _attack(model, sentence: str, label: int, box: str, edits: float, least_similar: float, bugs, queries: int, seed: Tensor):
    judge, chunks = _Judge(model, label), sentence.split()
    made: list[Edit] = []
    now = judge.margins([sentence])[0]
    if now < 0 or queries <= 1:
        return sentence, [], bool(now < 0), judge.queries
    worth = judge.importance(chunks, box)
    near = neighbours(model[0].weight.detach(), sentence) if "neighbour" in bugs else {}
    order = sorted((i for i, c in enumerate(chunks) if any(q.isalpha() for q in c)), key=lambda i: -worth[i])
    for i in order:
        if len(made) + 1 > edits * len(sentence.split()) or judge.queries >= queries:
            break
        u = noise.uniform(seed, len(BUGS), step=i)[0].tolist()
        options = [(kind, new) for kind in bugs if (new := bug(chunks[i], kind, u[BUGS.index(kind)], near))]
        texts = [" ".join(chunks[:i] + [new] + chunks[i + 1:]) for _, new in options]
        kept = [j for j, t in enumerate(texts) if similarity(t, sentence) >= least_similar and words.tokens(t)]
        kept = kept[:max(0, queries - judge.queries)]
        if not kept:
            continue
        values = judge.margins([texts[j] for j in kept])
        j = int(values.argmin())
        if values[j] < now:
            now, (kind, new) = values[j], options[kept[j]]
            made.append(Edit(i, chunks[i], new, kind))
            chunks[i] = new
        if now < 0:
            break
    text = " ".join(chunks)
    won = bool(judge.margins([text])[0] < 0)  # the fresh pass that decides
    return (text, made, True, judge.queries) if won else (sentence, [], False, judge.queries)


_HIDDEN = ('<span style="position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap">'
           "{}</span>")  # read aloud, not shown: most screen readers pass over <del> and <ins> in silence


def marked(sentence: str, edits: list[Edit]) -> str:
    """The sentence as HTML, edited words struck through and followed by their replacement, and so named to a screen reader."""
    by_place = {e.place: e for e in edits}
    out, into, end = (_HIDDEN.format(w) for w in ("[struck out: ", "[replaced by: ", "]"))
    return " ".join(f"<del>{out}{escape(by_place[i].old)}{end}</del> <ins>{into}{escape(by_place[i].new)}{end}</ins>"
                    if i in by_place else escape(w) for i, w in enumerate(sentence.split()))

"""The explorer, driven in code; the package imports without ipywidgets."""
import io
import subprocess
import sys
from math import inf

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from advcourse import data, models, widgets

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def start():
    return models.load("mnist-mlp-standard"), *data.mnist("test", 8)


def size(png):
    return plt.imread(io.BytesIO(png)).shape[:2]


def test_view_says_what_the_network_reads(start):
    model, x, y = start
    figure, sentence = widgets.view(model, x, y, image=1, attack="pgd", norm=inf, eps=0.1)
    assert sentence.startswith(f"Image 1 is read as {int(y[1])} ") and "l-infinity ball of radius 0.1 makes it" in sentence
    assert len(figure.axes) == 4
    plt.close(figure)
    quiet = widgets.view(model, x, y, image=1, eps=0.0)
    assert "finds no image read otherwise" in quiet.sentence
    plt.close(quiet.figure)
    wrong = widgets.view(model, x, (y + 1) % 10, classes=list("abcdefghij"))
    assert f"read as {'abcdefghij'[int(y[0])]} " in wrong.sentence and "wrong already" in wrong.sentence
    plt.close(wrong.figure)


@pytest.mark.parametrize("attack", widgets.ATTACKS)
@pytest.mark.parametrize("norm", widgets.LARGEST)
def test_every_attack_in_every_norm(start, attack, norm):
    shown = widgets.view(*start, attack=attack, norm=norm, eps=widgets.LARGEST[norm])
    assert shown.sentence.count(".") >= 2
    plt.close(shown.figure)


def test_aimed_noise_beats_random_noise(start):
    model, x, y = start
    aimed, random = (widgets.ATTACKS[k](model, x, y, eps=0.1, norm=inf, generator=torch.Generator().manual_seed(0)).success
                     for k in ("pgd", "random_noise"))
    assert aimed.sum() > random.sum()


@pytest.mark.parametrize("wrong, named", [({"image": 8}, "image=8"), ({"attack": "magic"}, "magic"), ({"norm": 3}, "norm=3"),
                                          ({"eps": -1.0}, "eps")])
def test_bad_arguments_are_named(start, wrong, named):
    with pytest.raises(ValueError, match=named):
        widgets.view(*start, **wrong)


def test_the_sliders_redraw(start):
    pytest.importorskip("ipywidgets")
    box = widgets.explorer(*start, image=1, eps=0.1)
    (image, attack), (norm, eps) = (row.children for row in box.children[:2])
    picture, sentence = box.children[2:]
    assert size(picture.value)[1] > 300 and "Image 1 " in sentence.value
    for control, value, said in ((image, 2, "Image 2 "), (attack, "fgsm", "fgsm in the"), (eps, 0.2, "radius 0.2 "),
                                 (attack, "random_noise", "random_noise")):
        before = picture.value
        control.value = value
        assert said in sentence.value and picture.value != before
    norm.value = 2  # the slider keeps its place in the new range
    assert eps.max == 4.0 and eps.value == pytest.approx(0.2 / 0.3 * 4, abs=0.05) and "l2 ball" in sentence.value
    norm.value = inf
    assert eps.max == 0.3 and eps.value == pytest.approx(0.2, abs=0.01)
    assert not plt.get_fignums()


def test_show_displays_a_picture_with_words_or_the_sliders(start, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **options: shown.append(thing))
    widgets.show(*start, image=3)
    assert shown[0]["image/png"][:4] == b"\x89PNG" and shown[0]["text/plain"].startswith("Image 3 ")
    widgets.show(*start, live=True)
    assert type(shown[1]).__name__ == "VBox"


def test_importing_needs_no_ipywidgets():
    code = ("import sys; sys.modules['ipywidgets'] = None\nfrom advcourse import widgets\n"
            "try: widgets.explorer(None, [0], None)\nexcept ImportError as e: print(e)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install ipywidgets" in out.stdout

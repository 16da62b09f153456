"""An explorer for live notebooks: choose an image, an attack, a norm and a radius, and see what the network reads.

ipywidgets is imported only when the sliders are asked for; the picture alone needs nothing but matplotlib.
"""
import io
from math import inf
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from advcourse import attacks, plot, threat
from advcourse.attacks.attempt import Attempt, evaluating


def random_noise(model: nn.Module, x: Tensor, y: Tensor, *, eps, norm=inf, generator=None) -> attacks.AttackResult:
    """One random image of ball ∩ box: what the same budget does when nobody aims it."""
    attempt = Attempt(model, x, y, norm=norm, eps=eps, generator=generator)
    a = threat.sample(attempt.x, attempt.eps, norm, attempt.seeds)
    attempt.submit(a, attempt.logits(a))
    return attempt.result()


ATTACKS = {"fgsm": attacks.fgsm, "pgd": attacks.pgd, "random_search": attacks.random_search, "random_noise": random_noise}
NORMS = {"l-infinity": inf, "l2": 2, "l1": 1, "l0": 0}
LARGEST = {inf: 0.3, 2: 4.0, 1: 40.0, 0: 60.0}  # where the radius slider ends


class View(NamedTuple):
    """A figure and the sentence that says what it shows."""

    figure: plt.Figure
    sentence: str


def view(model: nn.Module, x: Tensor, y: Tensor, *, image: int = 0, attack: str = "pgd", norm=inf, eps: float = 0.1,
         classes: list[str] | None = None) -> View:
    """Attack one image of the batch x [n, *shape] and draw it, the change, the result and the confidences before and after.

    `attack` is a key of ATTACKS. ValueError for an image out of range, an unknown attack or norm, or a negative eps.
    """
    if not 0 <= image < len(x):
        raise ValueError(f"image={image!r} is out of range: x holds {len(x)}")
    if attack not in ATTACKS:
        raise ValueError(f"attack={attack!r} is unknown: choose {', '.join(ATTACKS)}")
    one, label = x[image:image + 1], y[image:image + 1]
    found = ATTACKS[attack](model, one, label, norm=norm, eps=eps, generator=torch.Generator().manual_seed(0))
    with evaluating(model), torch.no_grad():
        before, after = model(torch.cat([one, found.adversarial])).softmax(1)
    name = classes or [str(k) for k in range(len(before))]
    sentence = (f"Image {image} is read as {name[int(before.argmax())]} with confidence {before.max():.2f}; "
                f"{attack} in the {_norm_name(norm)} ball of radius {eps:g} ")
    if found.distance[0] == 0:
        sentence += "has nothing to do: this is wrong already."
    elif found.success[0]:
        sentence += (f"makes it {name[int(after.argmax())]} with confidence {after.max():.2f}, "
                     f"at distance {found.distance[0]:.3g}, after {int(found.queries[0])} queries.")
    else:
        sentence += f"finds no image read otherwise, after {int(found.queries[0])} queries."
    return View(_draw(one[0], found.adversarial[0], before, after, name), sentence)


def _norm_name(norm) -> str:
    return next(name for name, value in NORMS.items() if value == norm)


def _draw(x: Tensor, a: Tensor, before: Tensor, after: Tensor, name: list[str]) -> plt.Figure:
    figure, axes = plt.subplots(1, 4, figsize=(8.6, 2.3), width_ratios=[1, 1, 1, 1.5])
    plot.image(axes[0], x, f"before: {name[int(before.argmax())]}")
    plot.image(axes[1], a - x, "change", signed=True)
    plot.image(axes[2], a, f"after: {name[int(after.argmax())]}")
    top = (before + after).topk(min(10, len(before))).indices.sort().values.tolist()
    for shift, confidence, colour, label in ((-0.2, before, plot.CLEAN, "before"), (0.2, after, plot.UPPER, "after")):
        axes[3].bar([k + shift for k in range(len(top))], confidence[top].tolist(), 0.4, color=colour, label=label)
    axes[3].set_xticks(range(len(top)), [name[k] for k in top])
    axes[3].set(ylim=(0, 1.02), title="confidence")
    axes[3].legend(fontsize=8)
    figure.tight_layout(pad=0.5, w_pad=1.2)
    return figure


def explorer(model: nn.Module, x: Tensor, y: Tensor, *, image: int = 0, attack: str = "pgd", norm=inf, eps: float = 0.1,
             classes: list[str] | None = None):
    """The view with controls: a box of ipywidgets (image, attack, norm, radius, picture, sentence), redrawn at each change.

    Needs a running kernel, and ipywidgets: ImportError says how to get it.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("the explorer needs ipywidgets: pip install ipywidgets") from error
    pick = ipywidgets.IntSlider(image, 0, len(x) - 1, description="image", continuous_update=False)
    which = ipywidgets.Dropdown(options=list(ATTACKS), value=attack, description="attack")
    ball = ipywidgets.Dropdown(options=list(NORMS.items()), value=norm, description="norm")
    radius = ipywidgets.FloatSlider(eps, min=0, max=LARGEST[norm], step=LARGEST[norm] / 60, description="eps",
                                    readout_format=".3g", continuous_update=False)
    picture, sentence = ipywidgets.Image(format="png"), ipywidgets.Label()

    def rescale(change) -> None:  # a radius of 0.1 means nothing in another norm: keep the slider's relative place
        share = radius.value / radius.max
        radius.unobserve(redraw, "value")
        radius.max = LARGEST[change["new"]]
        radius.step, radius.value = radius.max / 60, share * radius.max
        radius.observe(redraw, "value")
        redraw()

    def redraw(change=None) -> None:
        shown = view(model, x, y, image=pick.value, attack=which.value, norm=ball.value, eps=radius.value, classes=classes)
        buffer = io.BytesIO()
        shown.figure.savefig(buffer, format="png", bbox_inches="tight")
        plt.close(shown.figure)
        picture.value, sentence.value = buffer.getvalue(), shown.sentence

    ball.observe(rescale, "value")
    for control in (pick, which, radius):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([pick, which]), ipywidgets.HBox([ball, radius]), picture, sentence])


def show(model: nn.Module, x: Tensor, y: Tensor, *, live: bool = False, **start) -> None:
    """Display the explorer, or with live=False its picture at the start values, which a page without a kernel can keep."""
    if live:
        from IPython.display import display

        display(explorer(model, x, y, **start))
    else:
        shown = view(model, x, y, **start)
        plot.show(shown.figure, alt=shown.sentence)

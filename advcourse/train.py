"""Training, reproducible to the digit: one loop, one loss a method, every random number from one seeded generator.

    standard      cross-entropy on the images
    pgd           cross-entropy on the worst images an attack finds in the ball (madry2018towards)
    ibp           cross-entropy on the worst logits that interval arithmetic allows (gowal2018effectiveness)
"""
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from advcourse import attacks, data, models, threat, words
from advcourse.files import replace


@dataclass(frozen=True)
class Recipe:
    """How to train: the radius grows from 0 to eps while the share of training done goes over `ramp`."""

    method: str
    epochs: int
    lr: float
    eps: float = 0.1
    ramp: tuple[float, float] = (0.0, 0.3)
    kappa: float = 0.0  # ibp: weight of the clean loss when the ramp is over
    batch: int = 128
    seed: int = 0


# ---------------------------------------------------------------- one loss a method

def standard(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, ramp: float, generator: Generator) -> Tensor:
    """Mean cross-entropy on the images as they are."""
    return F.cross_entropy(model(x), y)


def pgd(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, ramp: float, generator: Generator) -> Tensor:
    """Mean cross-entropy where seven projected sign steps from a random start have raised it."""
    eps = ramp * recipe.eps
    return F.cross_entropy(model(ascend(model, x, y, eps, 7, 2.5 * eps / 7, F.cross_entropy, generator)), y)


def ibp(model: nn.Sequential, x: Tensor, y: Tensor, recipe: Recipe, ramp: float, generator: Generator) -> Tensor:
    """Clean and worst-case cross-entropy mixed; the clean share falls from 1 to kappa as the radius grows."""
    kappa = 1 - (1 - recipe.kappa) * ramp
    worst = F.cross_entropy(worst_logits(model, x, y, ramp * recipe.eps), y)
    return kappa * F.cross_entropy(model(x), y) + (1 - kappa) * worst


METHODS: dict[str, Callable[..., Tensor]] = {"standard": standard, "pgd": pgd, "ibp": ibp}


def ascend(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step: float, loss: Callable,
           generator: Generator) -> Tensor:
    """Projected sign-gradient ascent of the loss in the l-infinity ball from a random start, [n, *shape] -> same."""
    start = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
    a = threat.project(x + eps * start, x, eps)
    for _ in range(steps):
        a.requires_grad_()
        g, = torch.autograd.grad(loss(model(a), y).sum(), a)
        a = threat.project(a.detach() + step * g.sign(), x, eps)
    return a


def worst_logits(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """For each class k an upper bound of f_k - f_y over the ball, [n, classes], 0 for y itself; differentiable.

    Centre and half-width go through the layers; the last one is merged with the difference f_k - f_y, which is tighter than
    subtracting bounds. For a Sequential of Flatten, ReLU, Conv2d and a final Linear; ValueError for another layer.
    """
    lower, upper = threat.interval(x, eps)
    centre, width = (upper + lower) / 2, (upper - lower) / 2
    *hidden, last = model
    for layer in hidden:
        if isinstance(layer, nn.ReLU):
            lower, upper = F.relu(centre - width), F.relu(centre + width)
            centre, width = (upper + lower) / 2, (upper - lower) / 2
        elif isinstance(layer, nn.Flatten):
            centre, width = layer(centre), layer(width)
        elif isinstance(layer, nn.Linear):
            centre, width = layer(centre), F.linear(width, layer.weight.abs())
        elif isinstance(layer, nn.Conv2d):
            centre, width = layer(centre), F.conv2d(width, layer.weight.abs(), None, layer.stride, layer.padding)
        else:
            raise ValueError(f"model has a layer {type(layer).__name__}, for which no interval rule is written here")
    if not isinstance(last, nn.Linear):
        raise ValueError(f"model ends with a layer {type(last).__name__}, not with a Linear one")
    rows = last.weight[None] - last.weight[y][:, None]  # [n, classes, hidden]
    bound = rows @ centre[..., None] + rows.abs() @ width[..., None]
    return bound[..., 0] + last.bias - last.bias[y][:, None]


# ---------------------------------------------------------------- the loop

def initialise(model: nn.Module, method: str, generator: Generator) -> None:
    """Random weights from the generator: uniform within 1/sqrt(fan-in), or, for ibp, normal and small enough that
    interval widths neither grow nor shrink through the layers (Shi et al., 2021)."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            assert layer.bias is not None
            fan_in = layer.weight[0].numel()
            if method == "ibp":
                nn.init.normal_(layer.weight, 0, math.sqrt(2 * math.pi) / fan_in, generator=generator)
                nn.init.zeros_(layer.bias)
            else:
                nn.init.uniform_(layer.weight, -fan_in**-0.5, fan_in**-0.5, generator=generator)
                nn.init.uniform_(layer.bias, -fan_in**-0.5, fan_in**-0.5, generator=generator)


def shifted(x: Tensor, generator: Generator) -> Tensor:
    """Every image moved by -1, 0 or 1 pixel each way at random, black flowing in: about a point of accuracy on digits."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    moves = torch.stack([padded[..., i:i + h, j:j + w] for i in range(3) for j in range(3)])
    return moves[torch.randint(9, (len(x),), generator=generator), torch.arange(len(x))]


def fit(model: nn.Sequential, x: Tensor, y: Tensor, recipe: Recipe, checkpoint: Path | None = None) -> list[dict]:
    """Train the model in place and return a log with one entry an epoch: epoch, mean loss, radius reached.

    Adam without weight decay, rate cut to a fifth at 70 and 90 % of the way. With a `checkpoint` path the state is saved
    after every epoch and an interrupted run, started again, goes on where it was and ends with the same weights.
    ValueError for an unknown method, or epochs or eps out of range.
    """
    if recipe.method not in METHODS:
        raise ValueError(f"method={recipe.method!r} is unknown: choose {', '.join(METHODS)}")
    if recipe.epochs < 1:
        raise ValueError(f"epochs={recipe.epochs!r}: at least one")
    threat.check_eps(recipe.eps)
    threat.check_images(x)
    threat.check_labels(y, len(x))
    generator = torch.Generator().manual_seed(recipe.seed)
    initialise(model, recipe.method, generator)
    model.requires_grad_().train()
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    log = _restore(checkpoint, recipe, model, optimiser, generator)
    loss_of, batches = METHODS[recipe.method], max(1, len(x) // recipe.batch)
    for epoch in _progress(range(len(log), recipe.epochs), recipe):
        order, losses = torch.randperm(len(x), generator=generator), []
        for b in range(batches):
            done = (epoch + b / batches) / recipe.epochs
            ramp = min(1.0, max(0.0, (done - recipe.ramp[0]) / (recipe.ramp[1] - recipe.ramp[0])))
            optimiser.param_groups[0]["lr"] = recipe.lr * 0.2 ** ((done >= 0.7) + (done >= 0.9))
            batch = order[b * recipe.batch:(b + 1) * recipe.batch]
            loss = loss_of(model, shifted(x[batch], generator), y[batch], recipe, ramp, generator)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimiser.step()
            losses.append(loss.item())
        log.append({"epoch": epoch + 1, "loss": round(sum(losses) / batches, 4), "eps": round(ramp * recipe.eps, 4)})
        _save(checkpoint, recipe, model, optimiser, generator, log)
    model.requires_grad_(False).eval()
    return log


def _progress(epochs: range, recipe: Recipe):
    from tqdm import tqdm

    return tqdm(epochs, initial=epochs.start, total=epochs.stop, desc=f"train {recipe.method}", unit="epoch", disable=None)


def _save(path: Path | None, recipe: Recipe, model, optimiser, generator, log) -> None:
    if path is not None:
        state = {"recipe": asdict(recipe), "torch": str(torch.__version__), "model": model.state_dict(),
                 "optimiser": optimiser.state_dict(), "generator": generator.get_state(), "log": log}
        replace(path, lambda part: torch.save(state, part))


def _restore(path: Path | None, recipe: Recipe, model, optimiser, generator) -> list[dict]:
    """The log of the epochs already done by an interrupted run of the same recipe, its state loaded; else []."""
    if path is None or not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe) or state["torch"] != str(torch.__version__):
        return []
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_state(state["generator"])
    return state["log"]


# ---------------------------------------------------------------- shipped networks

def _recipes() -> dict[str, Recipe]:
    found = {}
    for net, epochs in (("mnist-mlp", 30), ("mnist-mlp50", 30), ("mnist-cnn", 20), ("fashion-cnn", 60)):
        found[f"{net}-standard"] = Recipe("standard", epochs, lr=2e-3)
        found[f"{net}-pgd"] = Recipe("pgd", epochs, lr=1e-3)
        if net != "mnist-mlp50":
            kappa = 0.5 if net == "mnist-mlp" else 0.0  # a small network keeps more accuracy with some clean loss left
            found[f"{net}-ibp"] = Recipe("ibp", 2 * epochs, 2e-3, ramp=(0.02, 0.4), kappa=kappa)
    return found


RECIPES = _recipes()
CARD_EPS, CARD_IMAGES = (0.02, 0.05, 0.1), 500


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images [n, *shape] whose largest logit is that of y."""
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum()) / len(x)


def judge(model: nn.Sequential, x: Tensor, y: Tensor) -> dict:
    """Clean accuracy on all images, and on the first CARD_IMAGES the bracket of the robust accuracy at each CARD_EPS.

    From above what PGD leaves (margin loss, 40 steps, 3 restarts from seed 0), from below what interval arithmetic proves
    (in float32, rounding not accounted for).
    """
    few, labels = x[:CARD_IMAGES], y[:CARD_IMAGES]
    attacked, proved = {}, {}
    for eps in CARD_EPS:
        generator = torch.Generator().manual_seed(0)
        found = attacks.pgd(model, few, labels, eps=eps, steps=40, restarts=3, loss="margin", generator=generator)
        attacked[str(eps)] = int((~found.success).sum()) / len(few)  # misclassified counts as success
        with torch.no_grad():
            bound = worst_logits(model, few, labels, eps).scatter(1, labels[:, None], -torch.inf)
        proved[str(eps)] = int((bound.amax(1) < 0).sum()) / len(few)
    return {"clean accuracy": accuracy(model, x, y), "PGD accuracy": attacked, "interval accuracy": proved}


def dataset(name: str, split: str) -> tuple[Tensor, Tensor]:
    """The embedded images a shipped network was trained ("train") or judged ("test") on."""
    return data.fashion_mnist(split) if name.startswith("fashion") else data.mnist(split)


def make(name: str, out: Path = models.WEIGHTS, checkpoint: Path | None = None) -> dict:
    """Train the shipped network `name` anew, write its weights, log and card into `out`, and return the card.

    On the same torch and kind of processor it ends with the shipped weights, bit for bit. ValueError for an unknown name.
    """
    if name == "reviews-cnn":
        return _make_text(name, out)
    if name not in RECIPES:
        raise ValueError(f"name={name!r} has no recipe: choose one of {', '.join(RECIPES)}, reviews-cnn")
    recipe, model = RECIPES[name], models.build(name)
    log = fit(model, *dataset(name, "train"), recipe, checkpoint)
    x, y = dataset(name, "test")
    card = {"name": name, "parameters": sum(p.numel() for p in model.parameters()),
            "data": f"{'fashion_mnist' if name.startswith('fashion') else 'mnist'}, embedded, "
                    f"{len(dataset(name, 'train')[0])} training and {len(x)} test images",
            **asdict(recipe), **judge(model, x, y),
            "PGD": f"l-infinity, 40 steps, 3 restarts, margin loss, first {CARD_IMAGES} test images"}
    card = _ship(name, model, card, log, out)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return card


def _make_text(name: str, out: Path) -> dict:
    model = models.build(name)
    log = words.fit(model)
    sentences, y = data.reviews("test")
    card = {"name": name, "parameters": sum(p.numel() for p in model.parameters()), "method": "standard", "epochs": len(log),
            "seed": 0, "data": f"reviews, embedded, {len(data.reviews('train')[0])} training and {len(y)} test sentences",
            "clean accuracy": accuracy(model, words.encode(sentences), y)}
    return _ship(name, model, card, log, out)


def _ship(name: str, model: nn.Sequential, card: dict, log: list[dict], out: Path) -> dict:
    """Write weights, log and card, each to a temporary file first."""
    from safetensors.torch import save_file

    card = json.loads(json.dumps({**card, "command": f"python -m advcourse train {name}", "torch": str(torch.__version__),
                                  "processor": torch.backends.cpu.get_cpu_capability()}))  # as it is read back
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    replace(out / f"{name}.safetensors", lambda part: save_file(weights, part))
    replace(out / f"{name}.log.jsonl", lambda part: part.write_text("".join(json.dumps(e) + "\n" for e in log)))
    replace(out / f"{name}.json", lambda part: part.write_text(json.dumps(card, indent=1) + "\n"))
    return card

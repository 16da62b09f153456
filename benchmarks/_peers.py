"""The attacks of other libraries, each brought to one form: call(model, x, y) -> adversarial images.

`contenders(case)` lists them for one case; a library that is not installed is left out.
"""
import importlib
import sys
import types
from math import inf

import torch

PACKAGES = {"Foolbox": "foolbox", "torchattacks": "torchattacks", "ART": "adversarial-robustness-toolbox",
            "CleverHans": "cleverhans", "adv-lib": "adv-lib", "AutoAttack": "pyautoattack"}


def _module(name: str):
    """A module or None; adv-lib imports torchvision for a perceptual distance that no attack here uses."""
    if name.startswith("adv_lib") and "torchvision" not in sys.modules:
        for part in ("torchvision", "torchvision.models"):
            sys.modules[part] = types.ModuleType(part)
        sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def next_class(y):
    return (y + 1) % 10


def foolbox(name: str, eps=None, **options):
    fb = _module("foolbox")
    if fb is None:
        return None

    def call(model, x, y):
        attack = getattr(fb.attacks, name)(**options)
        return attack(fb.PyTorchModel(model, bounds=(0, 1)), x, fb.criteria.Misclassification(y), epsilons=eps)[1]
    return call


def torchattacks(name: str, **options):
    ta = _module("torchattacks")

    def call(model, x, y):
        seed = {"seed": torch.initial_seed()} if name in ("APGD", "Square") else {}     # otherwise always 0
        return getattr(ta, name)(model, **seed, **options)(x, y)
    return ta and call


def art(name: str, *, targeted: bool = False, **options):
    estimators, evasion = _module("art.estimators.classification"), _module("art.attacks.evasion")
    if evasion is None:
        return None

    def call(model, x, y):
        classifier = estimators.PyTorchClassifier(model, loss=torch.nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]),
                                                  nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu")
        attack = getattr(evasion, name)(classifier, **options)
        if name == "UniversalPerturbation":
            attack.generate(x.numpy(), y.numpy())
            return torch.as_tensor(attack.noise).reshape(1, *x.shape[1:])
        aim = next_class(y) if targeted else y
        return torch.as_tensor(attack.generate(x.numpy(), torch.nn.functional.one_hot(aim, 10).numpy()))
    return call


def cleverhans(name: str, *, labels: bool = True, args: tuple = (), **options):
    module = _module(f"cleverhans.torch.attacks.{name}")
    if module is None:
        return None
    return lambda model, x, y: getattr(module, name)(model, x, *args, **options, **({"y": y} if labels else {}))


def advlib(name: str, **options):
    attacks = _module("adv_lib.attacks")
    return attacks and (lambda model, x, y: getattr(attacks, name)(model, x, y, **options))


def autoattack(module: str, name: str, **options):
    source = _module(f"pyautoattack.{module}")
    return source and (lambda model, x, y: getattr(source, name)(model, device="cpu", seed=torch.initial_seed(),
                                                                 **options).perturb(x, y))


def contenders(case: str, eps: float) -> dict:
    """name -> call for one case of the table; eps is the radius, where the case has one."""
    step, cw = 2.5 * eps / 40, {"binary_search_steps": 5}
    box = {"clip_min": 0.0, "clip_max": 1.0}
    quiet = {"verbose": False, "batch_size": 256}
    table = {
        "FGSM ℓ∞": {
            "Foolbox": foolbox("LinfFastGradientAttack", eps, random_start=False), "torchattacks": torchattacks("FGSM", eps=eps),
            "CleverHans": cleverhans("fast_gradient_method", args=(eps, inf), **box),
            "ART": art("FastGradientMethod", eps=eps, batch_size=256)},
        "PGD-40 ℓ∞": {
            "Foolbox": foolbox("LinfPGD", eps, steps=40, abs_stepsize=step),
            "torchattacks": torchattacks("PGD", eps=eps, alpha=step, steps=40),
            "CleverHans": cleverhans("projected_gradient_descent", args=(eps, step, 40, inf), **box),
            "ART": art("ProjectedGradientDescentPyTorch", eps=eps, eps_step=step, max_iter=40, num_random_init=1, **quiet),
            "adv-lib": advlib("pgd_linf", ε=eps, steps=40, absolute_step_size=step)},
        "PGD-40 ℓ2": {
            "Foolbox": foolbox("L2PGD", eps, steps=40, abs_stepsize=step),
            "torchattacks": torchattacks("PGDL2", eps=eps, alpha=step, steps=40),
            "CleverHans": cleverhans("projected_gradient_descent", args=(eps, step, 40, 2), **box),
            "ART": art("ProjectedGradientDescentPyTorch", norm=2, eps=eps, eps_step=step, max_iter=40, num_random_init=1,
                       **quiet)},
        "APGD-100 ℓ∞": {
            "torchattacks": torchattacks("APGD", eps=eps, steps=100),
            "ART": art("AutoProjectedGradientDescent", eps=eps, eps_step=2 * eps, nb_random_init=1, loss_type="cross_entropy",
                       **quiet),
            "adv-lib": advlib("apgd", eps=eps, norm=inf, loss_function="ce"),
            "AutoAttack": autoattack("autopgd_base", "APGDAttack", n_iter=100, eps=eps)},
        "DeepFool ℓ2": {
            "Foolbox": foolbox("L2DeepFoolAttack", steps=50), "torchattacks": torchattacks("DeepFool", steps=50),
            "ART": art("DeepFool", max_iter=50, epsilon=0.02, **quiet), "adv-lib": advlib("df", steps=50)},
        "DeepFool ℓ∞": {"Foolbox": foolbox("LinfDeepFoolAttack", steps=50), "adv-lib": advlib("df", steps=50, norm=inf)},
        "CW ℓ2": {
            "Foolbox": foolbox("L2CarliniWagnerAttack", steps=200, stepsize=0.05, initial_const=1.0, **cw),
            "torchattacks": torchattacks("CW", c=1, steps=1000, lr=0.05),
            "CleverHans": cleverhans("carlini_wagner_l2", args=(10,), lr=0.05, initial_const=1.0, max_iterations=200, **cw),
            "ART": art("CarliniL2Method", learning_rate=0.05, initial_const=1.0, max_iter=100, **cw, **quiet),
            "adv-lib": advlib("carlini_wagner_l2", learning_rate=0.05, initial_const=1.0, max_iterations=200, **cw)},
        "DDN ℓ2": {"Foolbox": foolbox("DDNAttack", steps=200), "adv-lib": advlib("ddn", steps=200, levels=None)},
        "FMN ℓ∞": _fmn("LInf", inf),
        "FMN ℓ2": _fmn("L2", 2) | {"adv-lib SDF": advlib("sdf")},
        "FMN ℓ1": _fmn("L1", 1) | {"adv-lib PDPGD": advlib("pdpgd", norm=1, num_steps=200)},
        "FMN ℓ0": _fmn("L0", 0) | {"adv-lib σ-zero": advlib("sigma_zero", num_steps=200)},
        "JSMA ℓ0, targeted": {"torchattacks": torchattacks("JSMA", theta=1.0, gamma=0.1),
                              "ART": art("SaliencyMapMethod", targeted=True, theta=1.0, gamma=0.1, **quiet)},
        "Three pixels": {"torchattacks": torchattacks("OnePixel", pixels=3, steps=20, popsize=40),
                         "ART": art("PixelAttack", th=3, es=1, max_iter=5)},
        "Square ℓ∞": _square("Linf", inf, eps),
        "Square ℓ2": _square("L2", 2, eps),
        "HopSkipJump ℓ2": {
            "Foolbox": foolbox("HopSkipJumpAttack", steps=14),
            "CleverHans": cleverhans("hop_skip_jump_attack", labels=False, args=(2,), num_iterations=14, verbose=False),
            "ART": art("HopSkipJump", max_iter=14, **quiet)},
        "Universal ℓ∞": {"ART": art("UniversalPerturbation", attacker="deepfool", eps=eps, delta=0.1, max_iter=5,
                                    attacker_params={"max_iter": 20, "verbose": False}, **quiet)},
    }
    return {name: call for name, call in table[case].items() if call is not None}


def _fmn(foolbox_norm: str, norm) -> dict:
    return {"Foolbox": foolbox(f"{foolbox_norm}FMNAttack", steps=200), "adv-lib": advlib("fmn", norm=norm, steps=200)}


def _square(name: str, norm, eps: float) -> dict:
    """1000 queries for an image that is never broken. ART asks three times a proposal: 332 of them are 999 queries."""
    return {"torchattacks": torchattacks("Square", norm=name, eps=eps, n_queries=1000),
            "ART": art("SquareAttack", norm=norm, eps=eps, max_iter=332, verbose=False),
            "AutoAttack": autoattack("square", "SquareAttack", norm=name, eps=eps, n_queries=1000, resc_schedule=True)}

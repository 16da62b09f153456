"""Attacks: each returns an AttackResult whose successes were re-checked, an upper bound on the minimal distortion."""
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.black_box import random_search, transfer
from advcourse.attacks.carlini_wagner import carlini_wagner
from advcourse.attacks.fast_minimal import ddn, fmn
from advcourse.attacks.generators import angri, atn, upset
from advcourse.attacks.houdini import houdini
from advcourse.attacks.iterative import apgd, bim, ilcm, pgd
from advcourse.attacks.minimal import deepfool, lbfgs
from advcourse.attacks.one_step import fgsm, projected_gradient_step
from advcourse.attacks.patch import patch
from advcourse.attacks.poisoning import poison_backdoor, poison_labels
from advcourse.attacks.query import hop_skip_jump, square
from advcourse.attacks.sparse import jsma, one_pixel
from advcourse.attacks.text import textbugger
from advcourse.attacks.universal import universal_deepfool, universal_sgd

__all__ = [
    "AttackResult", "Attempt", "angri", "apgd", "atn", "bim", "carlini_wagner", "ddn", "deepfool", "fgsm", "fmn",
    "hop_skip_jump", "houdini", "ilcm", "jsma", "lbfgs", "one_pixel", "patch", "pgd", "poison_backdoor", "poison_labels",
    "projected_gradient_step", "random_search", "square", "textbugger", "transfer", "universal_deepfool",
    "universal_sgd", "upset",
]

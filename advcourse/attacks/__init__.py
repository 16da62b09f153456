"""Attacks: each returns an AttackResult whose successes were re-checked, an upper bound on the minimal distortion."""
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.black_box import random_search, transfer
from advcourse.attacks.iterative import apgd, bim, ilcm, pgd
from advcourse.attacks.one_step import fgsm, projected_gradient_step
from advcourse.attacks.patch import patch
from advcourse.attacks.poisoning import poison_backdoor, poison_labels

__all__ = [
    "AttackResult", "Attempt", "apgd", "bim", "fgsm", "ilcm", "patch", "pgd", "poison_backdoor",
    "poison_labels", "projected_gradient_step", "random_search", "transfer",
]

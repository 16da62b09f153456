"""Attacks: each returns an AttackResult whose successes were re-checked, an upper bound on the minimal distortion."""
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.iterative import apgd, bim, ilcm, pgd
from advcourse.attacks.one_step import fgsm, projected_gradient_step

__all__ = ["AttackResult", "Attempt", "apgd", "bim", "fgsm", "ilcm", "pgd", "projected_gradient_step"]

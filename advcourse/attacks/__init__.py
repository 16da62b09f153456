"""Attacks: each returns an AttackResult whose successes were re-checked, an upper bound on the minimal distortion."""
from advcourse.attacks.attempt import AttackResult, Attempt
from advcourse.attacks.one_step import fgsm, projected_gradient_step

__all__ = ["AttackResult", "Attempt", "fgsm", "projected_gradient_step"]

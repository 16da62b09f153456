"""Random numbers that belong to an image, not to a batch.

Every image gets a seed; its numbers are a hash of (seed, step, position). So an image is attacked with the same random
start whether it comes alone or among a thousand, and whether or not its neighbours were dropped on the way. The hash
is SplitMix64's finaliser, in wrapping int64 arithmetic, the same on every device.
"""
import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def seeds(n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
    """n int64 seeds drawn from the generator; n calls for one seed each draw the same."""
    low, high = -(2**62), 2**62
    if generator is None or generator.device.type == "cpu":  # there one call draws the same as n calls (a test checks)
        return torch.randint(low, high, (n,), generator=generator).to(device)
    draws = [torch.randint(low, high, (1,), generator=generator, device=generator.device) for _ in range(n)]
    return torch.cat(draws).to(device) if draws else torch.empty(0, dtype=torch.int64, device=device)


def _wrap(k: int) -> int:
    return (k + 2**63) % 2**64 - 2**63  # Python's integers do not wrap by themselves


def _shift(z: Tensor, k: int) -> Tensor:
    return (z >> k) & ((1 << (64 - k)) - 1)  # int64 shifts copy the sign bit: mask it away


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * MIX_1
    z = (z ^ _shift(z, 27)) * MIX_2
    return z ^ _shift(z, 31)


def bits(seeds: Tensor, count: int, step: int = 0) -> Tensor:
    """[n] seeds -> [n, count] int64 with all 64 bits random."""
    key = _mix(seeds + _wrap(GOLDEN * (step + 1)))
    return _mix(key[:, None] + GOLDEN * torch.arange(1, count + 1, device=seeds.device))


def uniform(seeds: Tensor, count: int, step: int = 0, dtype=torch.float32) -> Tensor:
    """[n] seeds -> [n, count] numbers uniform in [0, 1), 24 random bits each."""
    return _shift(bits(seeds, count, step), 40).to(dtype) * 2.0**-24


def normal(seeds: Tensor, count: int, step: int = 0, dtype=torch.float32) -> Tensor:
    """[n] seeds -> [n, count] standard normal numbers, through the inverse of the normal distribution function."""
    u = (_shift(bits(seeds, count, step), 40).to(torch.float64) + 0.5) * 2.0**-24
    return (2**0.5 * torch.erfinv(2 * u - 1)).to(dtype)

"""Random numbers that belong to an image, not to a batch.

Every image gets a seed; its numbers are a hash of (seed, step, position). So an image is attacked with the same random
start whether it comes alone or among a thousand, and whether or not its neighbours were dropped on the way. SplitMix64's
finaliser turns seed and step into a key, MurmurHash3's turns key and position into 32 bits: wrapping integer arithmetic,
the same on every device.
"""
import torch
from torch import Tensor

GOLDEN_64, MIX_64 = -7046029254386353131, (-4658895280553007687, -7723592293110705685)  # 0x9E3779B97F4A7C15, 0xBF58…, 0x94D0…
GOLDEN_32, MIX_32 = -1640531527, (-2048144789, -1028477387)  # 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35 as signed numbers


def seeds(n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
    """n int64 seeds drawn from the generator; n calls for one seed each draw the same."""
    low, high = -(2**62), 2**62
    if generator is None or generator.device.type == "cpu":  # there one call draws the same as n calls (a test checks)
        return torch.randint(low, high, (n,), generator=generator).to(device)
    draws = [torch.randint(low, high, (1,), generator=generator, device=generator.device) for _ in range(n)]
    return torch.cat(draws).to(device) if draws else torch.empty(0, dtype=torch.int64, device=device)


def _high(z: Tensor, k: int) -> Tensor:
    """z >> k with zeros coming in: shifts of signed numbers copy the sign bit, so mask it away."""
    width = torch.iinfo(z.dtype).bits
    return (z >> k).bitwise_and_((1 << (width - k)) - 1)


def _mix(z: Tensor, shifts: tuple[int, int, int], factors: tuple[int, int]) -> Tensor:
    """Each bit of the result depends on every bit of z, which is overwritten."""
    z ^= _high(z, shifts[0])
    z *= factors[0]
    z ^= _high(z, shifts[1])
    z *= factors[1]
    z ^= _high(z, shifts[2])
    return z


def bits(seeds: Tensor, count: int, step: int = 0) -> Tensor:
    """[n] seeds -> [n, count] int32 with all 32 bits random."""
    key = _mix(seeds + torch.tensor(step + 1, device=seeds.device) * GOLDEN_64, (30, 27, 31), MIX_64)
    first, second = key[:, None].view(torch.int32).split(1, dim=1)  # its two halves, [n, 1] each
    position = torch.arange(1, count + 1, dtype=torch.int32, device=seeds.device) * GOLDEN_32
    return _mix((position + first).bitwise_xor_(second), (16, 13, 16), MIX_32)


def uniform(seeds: Tensor, count: int, step: int = 0, dtype=torch.float32) -> Tensor:
    """[n] seeds -> [n, count] numbers uniform in [0, 1), 24 random bits each."""
    return _high(bits(seeds, count, step), 8).to(dtype).mul_(2.0**-24)


def normal(seeds: Tensor, count: int, step: int = 0, dtype=torch.float32) -> Tensor:
    """[n] seeds -> [n, count] standard normal numbers, through the inverse of the normal distribution function.

    23 random bits each, the middles of 2^23 equal cells, so that none lands on 0 or 1 in single precision.
    """
    middle = _high(bits(seeds, count, step), 9).to(dtype).add_(0.5).mul_(2.0**-22).sub_(1)  # in (-1, 1)
    return middle.erfinv_().mul_(2**0.5)

"""Stochastic rounding to bfloat16: unbiased where an update is below half a unit in the last place.

A value between two neighbours goes up with the probability of the fraction that is cut off. The random
bits are a pure function of (seed, stream, step, position), as those of ``sketch``: the same on every
device, and no generator state to save beside the step counter.
"""

import torch
from torch import Tensor

from butterfly_opt.sketch import random_bits


def round_stochastically(value: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
    """``value`` rounded at random to one of the two bfloat16 numbers around it, still in float32.

    A bfloat16 number has the leading 16 bits of a float32: random bits are added to the others, and cut off.

    Args:
        value: float32.
        seed: the user's seed.
        stream: distinguishes parameters.
        step: distinguishes steps; a number, or a 0-d integer tensor on the device of ``value``.

    Cost: some ten passes (one in the fused kernel).
    """
    value = value.contiguous()
    noise = random_bits(value.numel(), seed=seed, stream=stream, step=step, device=value.device) & 0xFFFF
    bits = value.view(torch.int32) + noise.to(torch.int32).view(value.shape)
    return torch.where(value.isfinite(), (bits & -0x10000).view(torch.float32), value)

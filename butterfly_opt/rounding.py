"""Stochastic rounding of a parameter write: unbiased where an update is below half a unit in the last place.

    theta <- round(theta + update),   up with the probability of the fraction that is cut off

The random bits are a pure function of (seed, stream, step, position), as those of ``sketch``: the same
on every device, and no generator state to save beside the step counter.
"""

import torch
from torch import Tensor

from butterfly_opt.sketch import random_bits


def write_stochastic_(param: Tensor, update: Tensor, *, seed: int, stream: int, step: int | Tensor) -> None:
    """``param += update``, rounded up or down at random, in place.

    Args:
        param: bfloat16, whose bits are the leading bits of a float32.
        update: float32, the shape of ``param``.
        seed: the user's seed.
        stream: distinguishes parameters.
        step: distinguishes steps; a number, or a 0-d integer tensor on the device of ``param``.

    Cost: some ten passes over the parameter (one in the fused kernel).
    """
    exact = param.float().add_(update).contiguous()
    noise = random_bits(exact.numel(), seed=seed, stream=stream, step=step, device=param.device) & 0xFFFF
    bits = exact.view(torch.int32) + noise.to(torch.int32).view(exact.shape)
    rounded = (bits & -0x10000).view(torch.float32)
    param.copy_(torch.where(exact.isfinite(), rounded, exact))

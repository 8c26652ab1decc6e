"""Stochastic rounding to bfloat16: unbiased where an update is below half a unit in the last place.

A value between two neighbours goes up with the probability of the fraction that is cut off. The random bits are a
hash of (stream, step, position): the same on every device, and no generator state to save beside the step counter.
"""

from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF

Bits = TypeVar("Bits", int, Tensor)


def round_stochastically(value: Tensor, *, stream: int, step: Tensor) -> Tensor:
    """``value`` rounded at random to one of the two bfloat16 numbers around it, still in float32.

    A bfloat16 number has the leading 16 bits of a float32: random bits are added to the others, and cut off.

    Args:
        value: float32.
        stream: distinguishes parameters.
        step: distinguishes steps, 0-d, on the device of ``value``.

    Cost: some ten passes (one in the fused kernel).
    """
    value = value.contiguous()
    noise = random_bits(value.numel(), stream=stream, step=step.long(), device=value.device) & 0xFFFF
    bits = value.view(torch.int32) + noise.to(torch.int32).view(value.shape)
    # -0x10000 is 0xFFFF0000 as int32. A NaN might carry into the sign.
    return torch.where(value.isfinite(), (bits & -0x10000).view(torch.float32), value)


def stream_of(*numbers: int) -> int:
    """The number of a random stream, below 2^31: that of other numbers is another one but for one in 2^31."""
    stream = 0
    for number in numbers:
        stream = _mix(stream + number + 1 & _MASK)
    return stream >> 1


def random_bits(count: int, *, stream: int, step: int | Tensor, device: torch.device) -> Tensor:
    """``count`` independent 32-bit words in an int64 vector, a pure function of the arguments.

    Args:
        count: number of words.
        stream: distinguishes parameters.
        step: distinguishes steps; a number, or a 0-d integer tensor on ``device``.
        device: where the words are made.
    """
    index = torch.arange(count, device=device, dtype=torch.int64) & _MASK
    # Two rounds with the step between them: neighbouring steps share no pattern.
    return _mix(_mix(index ^ _mix(stream & _MASK)) ^ (step * 0x9E3779B1 & _MASK))


def _mix(bits: Bits) -> Bits:
    """A 32-bit integer hash (multiply, xor, shift) of a number, or of each element in 64 bits."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & _MASK
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & _MASK
    return bits ^ (bits >> 16)

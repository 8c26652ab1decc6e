"""Random sketches of a stream of matrices: an average of Y Y^T in a few columns.

The angles of one axis of a tensor depend on its gradients ``Y`` (n x columns) through their second
moment ``E[Y Y^T]``, n x n. A running sketch keeps it in ``k`` columns:

    Z_t = sqrt(1 - b) Z_{t-1} + sqrt(b / k) Y_t R_t          E[Z_t Z_t^T] = sum of b (1 - b)^j Y_{t-j} Y_{t-j}^T

with ``R_t`` a fresh matrix of random signs: the cross terms vanish in expectation, so a single
n x k matrix carries the exponential average over the stream. (Sketching: D. Achlioptas,
"Database-friendly random projections", 2003.)

The signs come from a counter-based stream: a hash of (seed, stream, step, position), the same on
every device and in any order, and no generator state to save.
"""

from typing import TypeVar

import torch
from torch import Tensor

MAX_COLUMNS = 32
"""Columns that one 32-bit hash supplies with signs."""

_MASK = 0xFFFFFFFF

Bits = TypeVar("Bits", int, Tensor)


def random_bits(count: int, *, seed: int, stream: int, step: int | Tensor, device: torch.device) -> Tensor:
    """``count`` independent 32-bit words in an int64 vector, a pure function of the arguments.

    Args:
        count: number of words.
        seed: the user's seed.
        stream: distinguishes tensors and axes.
        step: distinguishes steps; a number, or a 0-d integer tensor on ``device``.
        device: where the words are made.
    """
    key = _mix(_mix(seed & _MASK) ^ (stream & _MASK))
    index = torch.arange(count, device=device, dtype=torch.int64) & _MASK
    # Two rounds with the step between them: neighbouring steps share no pattern.
    return _mix(_mix(index ^ key) ^ (step * 0x9E3779B1 & _MASK))


def random_signs(
    rows: int, columns: int, *, seed: int, stream: int, step: int | Tensor, device: torch.device
) -> Tensor:
    """A ``(rows, columns)`` float32 matrix of independent signs +-1, a pure function of its arguments.

    Args:
        rows: rows.
        columns: columns, at most MAX_COLUMNS: each row takes its signs from the bits of one word.
        seed: as for ``random_bits``, like the others.
        stream: see there.
        step: see there.
        device: where the signs are made.

    Raises:
        ValueError: if ``columns`` exceeds MAX_COLUMNS.
    """
    if columns > MAX_COLUMNS:
        raise ValueError(f"a sketch has at most {MAX_COLUMNS} columns, got columns = {columns}")
    bits = random_bits(rows, seed=seed, stream=stream, step=step, device=device)
    shifts = torch.arange(columns, device=device, dtype=torch.int64)
    return ((bits[:, None] >> shifts & 1) * 2 - 1).to(torch.float32)


def update_sketch_(sketch: Tensor, product: Tensor, *, weight: float | Tensor) -> None:
    """One step of the running sketch, in place.

    Args:
        sketch: ``Z``, ``(*batch, n, k)``.
        product: ``Y R``, the same shape.
        weight: ``b`` of this step; a number, or a tensor that broadcasts against the sketch.
    """
    sketch.mul_((1 - weight) ** 0.5).add_(product * (weight / sketch.shape[-1]) ** 0.5)


def sketch_product(x: Tensor, signs: Tensor, *, dim: int) -> Tensor:
    """``Y R`` with ``Y`` each tensor of a stack unfolded along one axis.

    To nearly float32 precision whatever torch's global setting (TF32) on a GPU: signed powers of two and
    the leading bits of an entry are exact in every format, so two products suffice.

    Args:
        x: ``(B, *shape)``.
        signs: ``R``, ``(B, columns, k)``: signs, or signs times powers of two, which weight the columns.
        dim: the axis, counted with the stack, >= 1.

    Returns:
        ``(B, n, k)``.

    Cost: ``2 n columns k`` flops a tensor.
    """
    matrix = x.movedim(dim, 1).reshape(x.shape[0], x.shape[dim], -1)
    if not (matrix.is_cuda and matrix.dtype == torch.float32):
        return matrix @ signs.to(matrix.dtype)
    leading = matrix.to(torch.bfloat16).to(torch.float32)
    return leading @ signs + (matrix - leading) @ signs


def _mix(bits: Bits) -> Bits:
    """A 32-bit integer hash (multiply, xor, shift) of a number, or of each element in 64 bits."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & _MASK
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & _MASK
    return bits ^ (bits >> 16)

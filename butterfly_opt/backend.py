"""Chooses what carries out the rotations: torch, or the fused Triton kernels.

The only module that may import ``butterfly_opt.triton_kernels``.
"""

from typing import Protocol

import torch
from torch import Tensor

from butterfly_opt import rotation
from butterfly_opt.blocks import RotationBlocks

MIN_BLOCK_COLUMNS = 16
MAX_BLOCK_LENGTH = 1024
"""Grouped stages need this many columns, or an axis no longer than this, to beat single stages
(``python -m experiments.bench_rotation``)."""

BACKENDS = ("auto", "torch", "triton")


class Rotation(Protocol):
    """The rotation of one axis, with its angles fixed."""

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        ...


class StageRotation:
    """Stage by stage, in torch: for axes that few columns share."""

    def __init__(self, angles: Tensor) -> None:
        self.angles = angles

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        return rotation.rotate(x, self.angles, dim=dim, transpose=transpose)


class Backend:
    """The torch path; equal to the Triton path up to rounding."""

    name = "torch"

    def rotation(self, angles: Tensor, n: int, *, columns: int) -> Rotation:
        """The rotation of an axis of length ``n`` that ``columns`` columns share."""
        if columns >= MIN_BLOCK_COLUMNS or n <= MAX_BLOCK_LENGTH:
            return RotationBlocks(angles, n)
        return StageRotation(angles)


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend for tensors on ``device``.

    Raises:
        NotImplementedError: ``name`` is "triton".
    """
    if name == "triton":
        raise NotImplementedError("backend='triton' is not wired into the optimizer yet; use 'auto' or 'torch'")
    return Backend()

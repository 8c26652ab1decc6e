"""Chooses what carries out the rotations: torch, or the fused Triton kernels.

The only module that may import ``butterfly_opt.triton_kernels``.
"""

from typing import Protocol

import torch
from torch import Tensor

from butterfly_opt import rotation
from butterfly_opt.blocks import RotationBlocks

MAX_DENSE_LENGTH = 256
"""Axes up to this length are rotated by the dense ``Q``: one product, whatever the depth."""

MIN_BLOCK_COLUMNS = 16
"""Longer ones need this many columns for grouped stages to beat single stages
(both measured by ``python -m experiments.bench_rotation``)."""

BACKENDS = ("auto", "torch", "triton")


class Rotation(Protocol):
    """The rotation of one axis, with its angles fixed."""

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        ...


class DenseRotation:
    """As a dense matrix, built once for each set of angles: for short axes."""

    def __init__(self, angles: Tensor, n: int) -> None:
        eye = torch.eye(n, dtype=angles.dtype, device=angles.device)
        self.matrix = RotationBlocks(angles, n).rotate(eye, dim=0)

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        matrix = self.matrix.mT if transpose else self.matrix
        if dim % x.dim() == 0:
            return (matrix @ x.reshape(x.shape[0], -1)).view(x.shape)
        return (x.movedim(dim, -1) @ matrix.mT).movedim(-1, dim)


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
        if n <= MAX_DENSE_LENGTH:
            return DenseRotation(angles, n)
        if columns >= MIN_BLOCK_COLUMNS:
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

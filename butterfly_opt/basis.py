"""The basis of one tensor: one butterfly for each rotated axis.

Rotating every axis of ``W`` is a rotation of ``vec(W)`` by ``Q_1 (x) Q_2 (x) ...``: a butterfly on
the flattened tensor whose angles are shared along the other axes. A vector with its single axis
rotated is the paper's form, every pair with an angle of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from butterfly_opt.backend import Backend, Rotation

Axis = tuple[int, Tensor]
"""A rotated axis: its dimension and its angles ``(depth, num_stages, n // 2)``."""


class Basis:
    """Rotations of some axes of tensors of one shape.

    Args:
        shape: shape of the tensors.
        axes: the rotated axes with their angles, ``(depth, num_stages, n // 2)``; with a leading dimension
            of length B, each of B tensors has its own.
        backend: what applies the rotations.

    The object reads the angles once: build a new one when they change.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[Axis], backend: Backend) -> None:
        self.shape = torch.Size(shape)
        self.backend = backend
        columns = self.shape.numel()
        # From the end: the tensors may come stacked.
        self.rotations: list[tuple[int, Rotation]] = [
            (dim - len(shape), backend.rotation(angles, self.shape[dim], columns=columns // self.shape[dim]))
            for dim, angles in axes
        ]

    def to_rotated(self, x: Tensor) -> Tensor:
        """``u = Q^T x`` for ``x`` of shape ``(*shape)`` or stacked ``(B, *shape)``.

        Returns:
            A tensor of the same shape; the input itself where no axis is rotated.
        """
        for dim, rotation in self.rotations:
            x = rotation.rotate(x, dim=dim, transpose=True)
        return x

    def from_rotated(self, u: Tensor) -> Tensor:
        """``x = Q u``, the inverse of ``to_rotated``."""
        for dim, rotation in reversed(self.rotations):
            u = rotation.rotate(u, dim=dim)
        return u

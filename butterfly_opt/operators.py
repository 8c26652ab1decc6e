"""Symmetric operators ``Q diag(d) Q^T`` and their direct sums, as objects with ``@``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from butterfly_opt.basis import Basis


class RotatedDiagonal:
    """The symmetric operator ``Q diag(d) Q^T`` of order n on flattened tensors of one shape.

    Args:
        basis: the rotation of tensors of ``basis.shape``, ``n = basis.shape.numel()``.
        diagonal: ``d`` in rotated coordinates, of shape ``basis.shape``.

    Cost: two rotations a column.
    """

    def __init__(self, basis: Basis, diagonal: Tensor) -> None:
        if diagonal.shape != basis.shape:
            raise ValueError(f"diagonal must have shape {tuple(basis.shape)}, got {tuple(diagonal.shape)}")
        self.basis = basis
        self.diagonal = diagonal

    @property
    def shape(self) -> torch.Size:
        """``(n, n)``."""
        n = self.diagonal.numel()
        return torch.Size((n, n))

    def __matmul__(self, x: Tensor) -> Tensor:
        """``Q diag(d) Q^T x`` for ``x`` of shape ``(n,)`` or ``(n, columns)``."""
        n = self.shape[0]
        if x.dim() not in (1, 2) or x.shape[0] != n:
            raise ValueError(f"operator of shape ({n}, {n}) cannot multiply a tensor of shape {tuple(x.shape)}")
        if x.dim() == 2:
            return torch.stack([self @ column for column in x.unbind(1)], 1) if x.shape[1] else x.clone()
        rotated = self.basis.to_rotated(x.reshape(self.basis.shape).to(self.diagonal.dtype))
        return self.basis.from_rotated(self.diagonal * rotated).reshape(n)

    def to_dense(self) -> Tensor:
        """The ``n x n`` matrix. Cost: n applications, n^2 memory."""
        n = self.shape[0]
        return self @ torch.eye(n, dtype=self.diagonal.dtype, device=self.diagonal.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.shape[0]}, tensor={tuple(self.basis.shape)})"


class DirectSum:
    """The direct sum of the operators of several tensors, indexed by parameter.

    Args:
        parts: in order, the parameters that each operator covers, and the operator.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Tensor], RotatedDiagonal]]) -> None:
        self._parts = list(parts)

    def __getitem__(self, param: Tensor) -> RotatedDiagonal:
        for params, part in self._parts:
            if any(param is covered for covered in params):
                return part
        raise KeyError(f"no operator for a parameter of shape {tuple(param.shape)}")

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def shape(self) -> torch.Size:
        """``(n, n)``, n the sum over the parts."""
        n = sum(part.shape[0] for _, part in self._parts)
        return torch.Size((n, n))

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with ``x`` of shape ``(n,)`` or ``(n, columns)``."""
        if x.dim() not in (1, 2) or x.shape[0] != self.shape[0]:
            raise ValueError(
                f"operator of shape {tuple(self.shape)} cannot multiply a tensor of shape {tuple(x.shape)}"
            )
        pieces = x.split([part.shape[0] for _, part in self._parts])
        return torch.cat([part @ piece for (_, part), piece in zip(self._parts, pieces, strict=True)])

    def to_dense(self) -> Tensor:
        """The block-diagonal ``n x n`` matrix."""
        return torch.block_diag(*(part.to_dense() for _, part in self._parts))

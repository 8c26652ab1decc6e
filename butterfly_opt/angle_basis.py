"""A basis that keeps its angles: it can be differentiated, moved, saved, and squared entry by entry."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from butterfly_opt.autograd import butterfly_rotation
from butterfly_opt.backend import TORCH, Backend, Rotation
from butterfly_opt.basis import Axis, Basis

MAX_SQUARE_NUMBERS = 1 << 22
"""Numbers of Q held at a time while its entries are squared (32 MiB in float64)."""


class AngleBasis(Basis):
    """``Basis`` with its angles at hand.

    Args:
        shape: shape of the tensors.
        axes: the rotated axes with their angles, float32 or float64. Angles that require a gradient
            are used as they are, and rotations are differentiable in them; others are copied.
        backend: what applies the rotations.

    Raises:
        TypeError: if angles are neither float32 nor float64.
        ValueError: if an axis is out of range.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[Axis], backend: Backend = TORCH) -> None:
        for dim, angles in axes:
            if angles.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"angles must be float32 or float64, got {angles.dtype}")
            if not 0 <= dim < len(shape):
                raise ValueError(f"axis {dim} is out of range for tensors of shape {tuple(shape)}")
        self.axes: tuple[Axis, ...] = tuple(
            (dim, angles if angles.requires_grad else angles.clone()) for dim, angles in axes
        )
        learned = any(angles.requires_grad for _, angles in self.axes)
        super().__init__(shape, self.axes, _DifferentiableBackend(backend) if learned else backend)

    def to(self, *, dtype: torch.dtype, device: torch.device | str | None = None) -> "AngleBasis":
        """The basis with its angles in another dtype or on another device, in plain torch."""
        return AngleBasis(self.shape, [(dim, angles.to(device=device, dtype=dtype)) for dim, angles in self.axes])

    def state_dict(self) -> dict[str, Any]:
        """``{"shape": [...], "axes": [[dim, angles], ...]}``, which ``torch.load(weights_only=True)`` reads."""
        return {"shape": list(self.shape), "axes": [[dim, angles.detach()] for dim, angles in self.axes]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "AngleBasis":
        """The inverse of ``state_dict``."""
        return cls(state["shape"], [(dim, angles) for dim, angles in state["axes"]])


def apply_squared(basis: Basis, d: Tensor) -> Tensor:
    """``(Q o Q) d``, Q o Q the squares of the entries of Q: the diagonal of ``Q diag(d) Q^T``.

    The axes factor: ``(Q_1 (x) Q_2) o (Q_1 (x) Q_2) = (Q_1 o Q_1) (x) (Q_2 o Q_2)``, so each is taken by itself.
    In a single butterfly every entry of Q is one path through the stages, a product of cosines and
    sines, so its square is a butterfly of their squares. Stacked butterflies add up several paths:
    their entries are computed, in slices.

    Args:
        basis: the rotation; with angles (``AngleBasis``) the fast way is open.
        d: tensor of ``basis.shape``.

    Returns:
        A tensor of ``basis.shape``.

    Cost: for an axis of length m of a tensor of n numbers, O(n log m) at depth 1 with angles; else
        O(depth m^2 log m + n m).
    """
    known = dict(basis.axes) if isinstance(basis, AngleBasis) else {}
    for axis, rotation in basis.rotations:
        dim = axis % len(basis.shape)
        if dim in known and known[dim].shape[0] == 1:
            d = _single_paths(d, known[dim], dim)
        else:
            d = _squared_slices(d, rotation, dim)
    return d


def _single_paths(d: Tensor, angles: Tensor, dim: int) -> Tensor:
    """``(Q o Q) d`` along one axis, Q of depth 1: the last stage first, as in ``Q d``."""
    n = d.shape[dim]
    columns = d.movedim(dim, 0).reshape(n, -1)
    index = torch.arange(n, device=d.device)
    for stage in reversed(range(angles.shape[1])):
        stride = 1 << stage
        lower, partner = index & ~stride, index ^ stride
        slot = lower // (2 * stride) * stride + lower % stride
        paired = (partner < n)[:, None]
        keep = angles[0, stage, slot.clamp_max(n // 2 - 1)].cos().square()[:, None]
        exchanged = columns[partner.clamp_max(n - 1)]
        columns = torch.where(paired, keep * columns + (1 - keep) * exchanged, columns)
    return columns.view(d.movedim(dim, 0).shape).movedim(0, dim)


def _squared_slices(d: Tensor, rotation: Rotation, dim: int) -> Tensor:
    """``(Q o Q) d`` along one axis from the columns of Q, a slice at a time."""
    n = d.shape[dim]
    columns = d.movedim(dim, 0).reshape(n, -1)
    total = torch.zeros_like(columns)
    for index in torch.arange(n, device=d.device).split(max(1, MAX_SQUARE_NUMBERS // n)):
        units = torch.nn.functional.one_hot(index, n).T.to(d.dtype)
        total = total + rotation.rotate(units, dim=0).square() @ columns[index]
    return total.view(d.movedim(dim, 0).shape).movedim(0, dim)


class _DifferentiableBackend(Backend):
    """Rotations through ``butterfly_rotation``, carried out by another backend."""

    def __init__(self, carrier: Backend) -> None:
        self.name = carrier.name

    def rotation(self, angles: Tensor, n: int, *, columns: int) -> Rotation:
        """The rotation of an axis of length ``n``, differentiable in its angles."""
        return _DifferentiableRotation(angles, self.name)


class _DifferentiableRotation:
    def __init__(self, angles: Tensor, name: str) -> None:
        self.angles, self.name = angles, name

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        return butterfly_rotation(x, self.angles, dim=dim, transpose=transpose, backend=self.name)

"""An orthogonal basis of tensors of one shape: rotations of some of their axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation


class Basis:
    """``Q = Q_1 (x) Q_2 (x) ...``, a rotation of some axes of tensors of one shape.

    Args:
        shape: shape of the tensors.
        rotations: ``(axis, rotation)`` in the order in which ``Q^T`` applies them; an axis may come several times.
            All rotations have the same ``count``, the number of tensors that are stacked.

    Raises:
        TypeError: if a rotation is neither float32 nor float64.
        ValueError: if an axis is out of range or of another length than its rotation, or the counts differ.

    Tensors have the shape ``(count, *shape, ...)``, or ``(*shape, ...)`` where ``count`` is 1; further axes are
    columns of their own. Their dtype is that of the rotations.
    """

    def __init__(self, shape: Sequence[int], rotations: Sequence[tuple[int, Rotation]] = ()) -> None:
        self.shape, self.rotations = torch.Size(shape), tuple(rotations)
        self.count = self.rotations[0][1].count if self.rotations else 1
        for dim, rotation in self.rotations:
            if not 0 <= dim < len(self.shape):
                raise ValueError(f"axis {dim} is out of range for tensors of shape {tuple(self.shape)}")
            if rotation.plan.n != self.shape[dim] or rotation.count != self.count:
                raise ValueError(
                    f"axis {dim} of {self.count} x {tuple(self.shape)} needs {self.count} rotations of length "
                    f"{self.shape[dim]}, got {rotation.count} of length {rotation.plan.n}"
                )
            if rotation.matrices.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"rotations must be float32 or float64, got {rotation.matrices.dtype}")

    def to_rotated(self, x: Tensor) -> Tensor:
        """``Q^T x``, a new tensor of the shape of ``x`` where there is a rotation."""
        for dim, rotation in self.rotations:
            x = self._along(x, dim, rotation.to_rotated)
        return x

    def from_rotated(self, u: Tensor) -> Tensor:
        """``Q u``, the inverse of ``to_rotated``."""
        for dim, rotation in reversed(self.rotations):
            u = self._along(u, dim, rotation.from_rotated)
        return u

    def squared(self, d: Tensor) -> Tensor:
        """``(Q o Q) d``, Q o Q the squares of the entries: the diagonal of ``Q diag(d) Q^T``.

        The axes factor: ``(Q_1 (x) Q_2) o (Q_1 (x) Q_2) = (Q_1 o Q_1) (x) (Q_2 o Q_2)``. Cost: see
        ``Rotation.squared``; where an axis is rotated several times, the n^2 entries of the product.
        """
        for axis in dict.fromkeys(dim for dim, _ in self.rotations):
            first, *others = [rotation for dim, rotation in self.rotations if dim == axis]
            # Squares of a product are no product of squares: it has to be dense.
            if others:
                q = others[-1].dense()
                for rotation in (*reversed(others[:-1]), first):
                    q = rotation.from_rotated(q)
                d = self._along(d, axis, q.square().matmul)
            else:
                d = self._along(d, axis, first.squared)
        return d

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Basis":
        """The basis in another dtype or on another device, without the statistics of its rotations."""
        return Basis(
            self.shape,
            [(dim, Rotation(r.plan, r.matrices.to(device=device, dtype=dtype))) for dim, r in self.rotations],
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, which ``torch.load(weights_only=True)`` reads."""
        axes = [
            {"dim": dim, "n": r.plan.n, "block": r.plan.block, "lead": r.plan.lead, "matrices": r.matrices.detach()}
            for dim, r in self.rotations
        ]
        return {"shape": list(self.shape), "axes": axes}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Basis":
        """The inverse of ``state_dict``."""
        axes = [(a["dim"], Rotation(make_plan(a["n"], a["block"], a["lead"]), a["matrices"])) for a in state["axes"]]
        return cls(state["shape"], axes)

    def _batch_dims(self, x: Tensor) -> int:
        """1 where ``x`` has an axis for the stack, else 0."""
        order = len(self.shape)
        if self.count == 1 and x.shape[:order] == self.shape:
            return 0
        if x.shape[: order + 1] == (self.count, *self.shape):
            return 1
        raise ValueError(f"a basis of {self.count} x {tuple(self.shape)} cannot rotate shape {tuple(x.shape)}")

    def _along(self, x: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of tensors ``(count, n, columns)`` along one axis."""
        axis = self._batch_dims(x) + dim
        columns = x.reshape(self.count, *x.shape[axis - dim :]).movedim(dim + 1, 1)
        return (
            function(columns.flatten(2) if columns.dim() > 2 else columns[..., None])
            .view(columns.shape)
            .movedim(1, dim + 1)
            .reshape(x.shape)
        )

"""An inverse-Hessian estimate fed with clean secant pairs, as an object without an optimizer.

The same functions serve ``Butterfly`` with ``pairs="same_batch"`` or ``scaling="newton"``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from butterfly_opt.angle_basis import AngleBasis
from butterfly_opt.backend import TORCH
from butterfly_opt.basis import Basis
from butterfly_opt.diagonal import regress
from butterfly_opt.estimate import new_state, refit_clean_, rotated_axes, update_moments_
from butterfly_opt.layout import TensorLayout
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.pairs import average_weight


class SecantEstimate:
    """Tracks ``Q diag(D) Q^T ~ H^-1`` of a function of a tensor from pairs ``y = H s``.

    Args:
        shape: shape of the tensor; a vector gives every pair of coordinates an angle of its own.
        depth: butterflies multiplied with one another on each axis.
        beta2: decay of the moments. Short, since they are exact in the final basis and stale before it.
        stages: stages kept on each axis; all if None.
        dtype: float32 or float64.

    Example:
        >>> estimate = SecantEstimate((2,))
        >>> estimate.update(s, hessian @ s)
        >>> estimate.inverse_hessian() @ gradient
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        depth: int = 1,
        beta2: float = 0.9,
        stages: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        owner = torch.empty(0, dtype=dtype)
        rotated = tuple(dim for dim, n in enumerate(shape) if n > 1)
        self._layout = TensorLayout((owner,), tuple(shape), rotated, stages)
        self.state = new_state(self._layout, depth=depth, diagonal="secant", pairs="same_batch", clean=True)
        self.beta2 = beta2
        self._basis = self._current_basis()

    def _current_basis(self) -> Basis:
        axes = rotated_axes(self._layout, self.state)
        return Basis(self._layout.shape, axes, TORCH)

    def update(self, delta_theta: Tensor, delta_grad: Tensor) -> None:
        """Takes one pair ``(s, y)``, tensors of the shape of the parameter."""
        self.state["step"] += 1
        weight = average_weight(self.beta2, self.state["step"].item())
        u, w = self._basis.to_rotated(delta_grad), self._basis.to_rotated(delta_theta)
        update_moments_(self.state, u, w, weight=weight, pair_weight=weight)
        refit_clean_(self._layout, self.state, self._basis, u, w)
        self._basis = self._current_basis()

    def inverse_hessian(self, *, damping: float = 0.0) -> RotatedDiagonal:
        """``Q diag(1 / (sqrt(h^2 + nu2 / tau2) + damping)) Q^T``, parameter units squared by loss units."""
        state = self.state
        found = regress(state["grad_sq"], state["disp_sq"], state["cross"], beta2=self.beta2)
        basis = AngleBasis(self._layout.shape, rotated_axes(self._layout, self.state))
        return RotatedDiagonal(basis, 1 / (found.energy.sqrt() / found.tau + damping))

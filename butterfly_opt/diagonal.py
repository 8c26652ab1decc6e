"""Diagonal estimators in rotated coordinates: curvature and gradient noise of every coordinate.

Notation: ``u = Q^T delta_grad``, ``w = Q^T delta_theta``; the averages below run over steps.

``innovation`` keeps ``A = E[u^2]`` and scales by it: ``V = A``.

``secant`` keeps ``A = E[u^2]``, ``B = E[w^2]``, ``C = E[u w]`` and regresses ``u = h w + noise``:

    tau2 = mean B                     mean squared displacement of the tensor
    hbar = sum |C| / sum B            its mean curvature
    h    = (C + e hbar) / (B + e)     shrunk where a coordinate hardly moved against its noise
    nu2  = max(0, A - 2 h C + h^2 B)  variance of the gradient noise
    V    = nu2 + h^2 tau2             >= 0, and A where nothing moved yet
    D    = sqrt(tau2 / V) = 1 / sqrt(h^2 + nu2 / tau2)    the inverse-Hessian estimate, positive

The ridge ``e = (1 - beta2) (A - C^2 / B) / hbar^2 + ROUNDING tau2`` is the variance of the noise in the
averages over that of the prior ``h ~ hbar``: with noise-free pairs it vanishes and ``h`` is exact.
Pairs without noise (nu2 -> 0) give the Newton scaling ``1 / |h|``; pure noise gives whitening by the
gradient noise, as Adam's. Where noise dominates, ``C`` is biased, since past noise moved the
parameters: ``h`` is then a scale, no curvature (``Butterfly.inverse_hessian`` says more).

All quantities are computed relative to ``tau``, so that large gradients do not overflow. Tensors are stacked
``(count, rows, columns)``; means run over one tensor of the stack.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Curvature(NamedTuple):
    """What the secant regression found, in the shape of the rotated tensors.

    Attributes:
        slope: ``h * tau``, curvature times root mean squared displacement (gradient units).
        noise: ``nu2``, variance of the gradient noise (squared gradient units).
        tau: ``sqrt(tau2)`` of each tensor, ``(count, 1, 1)`` (parameter units); 0 where nothing has moved.
    """

    slope: Tensor
    noise: Tensor
    tau: Tensor

    @property
    def energy(self) -> Tensor:
        """``V = nu2 + h^2 tau2``, squared gradient units."""
        return self.noise.addcmul(self.slope, self.slope)


ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Share of tau2 below which the motion of a coordinate is not believed."""

MIN_STEPS = 5
"""Steps before the regression is believed; ``V = A`` until then."""

MAX_RIDGE = 1e12
"""Bound of the ridge over tau2: beyond it ``h`` is ``hbar`` to rounding, and its products stay finite."""


def regress(
    grad_sq: Tensor,
    disp_sq: Tensor,
    cross: Tensor,
    *,
    beta2: float | Tensor,
    step: Tensor,
    means: Sequence[Tensor] | None = None,
) -> Curvature:
    """Computes ``h``, ``nu2`` and ``tau`` of the module's formulas.

    Args:
        grad_sq: ``A``, ``(count, rows, columns)``.
        disp_sq: ``B``, the same shape.
        cross: ``C``, the same shape.
        beta2: decay of the three averages; ``1 - beta2`` is the share of one pair in them.
        step: steps so far, ``(count, 1, 1)``; up to MIN_STEPS nothing counts as moved.
        means: of ``B`` and ``|C|`` over each tensor, ``(count, 1, 1)``; by default of these, a step takes older ones.
    """
    tiny = torch.finfo(grad_sq.dtype).tiny
    tau2, mean_cross = means or [x.mean((-2, -1), keepdim=True) for x in (disp_sq, cross.abs())]
    moved = (tau2 > tiny**0.75) & (step > MIN_STEPS)
    inverse = torch.where(moved, tau2.rsqrt(), 0.0)
    mean_slope = mean_cross * inverse
    # In place from here on: fresh memory costs as much as the arithmetic. The mean of b is 1.
    b = disp_sq * inverse.square()
    c = cross * inverse
    # Where b is 0 so is c: their quotient is then 0, not NaN.
    work = b + 1 / MAX_RIDGE
    residual = torch.addcmul(grad_sq, torch.div(c, work, out=work), c, value=-1, out=work).clamp_min_(0)
    # By mean_slope twice: its square may overflow, or underflow.
    inverse_slope = mean_slope.clamp_min(tiny**0.5).reciprocal()
    ridge = residual.mul_(inverse_slope).mul_(inverse_slope * (1 - beta2)).clamp_(max=MAX_RIDGE)
    ridge.add_(ROUNDING[grad_sq.dtype])
    slope = torch.addcmul(c, ridge, mean_slope).div_(ridge.add_(b))
    fitted = b.mul_(slope).sub_(c, alpha=2)
    noise = torch.addcmul(grad_sq, slope, fitted, out=fitted).clamp_min_(0)
    return Curvature(slope, noise, tau2 * inverse)

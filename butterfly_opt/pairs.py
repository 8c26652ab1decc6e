"""Secant pairs (delta_theta, delta_grad) from exponential averages: no closure, no extra gradient.

Differences of two consecutive mini-batch gradients are mostly noise. Differences to an average are
not: with the weights

    a_t = (1 - beta) / (1 - beta^t)                                a_1 = 1
    y_t = g_t - gbar_{t-1}          gbar_t = gbar_{t-1} + a_t y_t
    s_t = theta_t - thetabar_{t-1}  thetabar_t = thetabar_{t-1} + a_t s_t

both averages run over the same steps with the same weights, so ``y_t = H s_t + noise`` holds exactly
on a quadratic, and ``s_t`` spans about ``1 / (1 - beta)`` steps. ``gbar`` is Adam's bias-corrected
momentum. No copy of the parameters is needed: with ``delta_t = theta_{t+1} - theta_t``, what was
written to the parameters, after decay and rounding,

    s_{t+1} = (1 - a_t) s_t + delta_t.

Both recursions are linear: they hold in any fixed orthogonal basis, and a change of basis is applied
to ``gbar`` and ``s`` alike.
"""

from torch import Tensor


def average_weight(beta: float, step: float | Tensor) -> float | Tensor:
    """Weight ``a_t = (1 - beta) / (1 - beta^t)`` of the newest value in a bias-corrected average.

    Args:
        beta: decay in [0, 1).
        step: number of values including the newest, >= 1; a number, or a 0-d tensor (then the result
            is one too and nothing is read on the host).
    """
    weight = (1 - beta) / (1 - beta**step)
    # In float32 the first weight is 1 up to rounding: above it, 1 - weight would have no root.
    return weight.clamp_max(1.0) if isinstance(weight, Tensor) else weight


def average_(average: Tensor, change: Tensor, weight: float | Tensor) -> None:
    """``average <- average + weight change``, in place."""
    if isinstance(weight, Tensor):
        average.addcmul_(change, weight)
    else:
        average.add_(change, alpha=weight)


def update_mean_grad_(mean_grad: Tensor, grad: Tensor, weight: float | Tensor) -> Tensor:
    """Updates ``gbar`` in place and returns ``delta_grad = grad - gbar_{t-1}``, a new tensor."""
    delta_grad = grad - mean_grad
    average_(mean_grad, delta_grad, weight)
    return delta_grad


def advance_displacement_(displacement: Tensor, written: Tensor, weight: float | Tensor) -> None:
    """Computes ``s_{t+1} = (1 - a_t) s_t + (theta_{t+1} - theta_t)`` in place.

    Args:
        displacement: ``s_t``.
        written: the change of the parameters in this step, in the same basis.
        weight: ``a_t`` of this step.
    """
    displacement.mul_(1 - weight).add_(written)

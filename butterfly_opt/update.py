"""One tensor of the optimizer: what it reads and says; and its step where pairs are clean.

The default step, of many tensors together, is in ``batch``. With ``u, w`` the rotated pair and ``V`` the
diagonal estimate (``diagonal``) the steps of clean pairs are

    scaling "adam"     theta -= lr Q clip( Q^T gbar / (sqrt(V) + eps), +-kappa )     dimensionless
    scaling "newton"   theta -= lr Q clip( D Q^T g, +-kappa ),  D = tau / sqrt(V)    parameter units
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from butterfly_opt.basis import Basis
from butterfly_opt.diagonal import MIN_STEPS, regress
from butterfly_opt.estimate import State, pair_weights, update_moments_
from butterfly_opt.layout import TensorLayout
from butterfly_opt.options import Options, has_clean_pairs
from butterfly_opt.pairs import advance_displacement_, update_mean_grad_

MAX_ROTATED_GRAD = 1e18
"""Rotated gradients are cut here: their squares, summed over a tensor, stay finite in float32."""

REFIT_WARMUP = 100
"""First steps of a tensor, in which its basis is refitted more often: most of the fit happens there."""

SKETCH_STEPS = 2
"""Steps up to a refit whose innovations enter the sketches; also the steps between two refits at first."""

CURVATURE_SHARE = 0.2

INITIAL_STEP = 1e-3
"""Root mean square displacement assumed by ``newton`` before any is known (parameter units)."""


@dataclass(frozen=True)
class TensorStep:
    """One tensor with everything a step needs.

    Attributes:
        layout: its parameters.
        state: its state.
        options: options of its group.
        stream: its random stream.
        usable: whether its gradient is finite, 0-d on the device; None where the host knows that it is.
    """

    layout: TensorLayout
    state: State
    options: Options
    stream: int
    usable: Tensor | None = None

    @property
    def is_on_device(self) -> bool:
        """Whether the host must not read anything in a step."""
        return self.options["capturable"] or (self.layout.owner.is_cuda and not has_clean_pairs(self.options))

    @property
    def known_step(self) -> int:
        """Steps taken before, where the host may know; else -1."""
        return -1 if self.is_on_device else int(self.state["step"].item())

    @property
    def is_partial(self) -> bool:
        """Whether only some of the parameters have a gradient."""
        return any(param.grad is None for param in self.layout.params)

    @property
    def steps_to_refit(self) -> float:
        """Steps from this one to the next that refits the basis. A captured step is always the same: it refits."""
        calls, options = self.state["calls"], self.options
        if not (options["refit_steps"] and self.layout.rotated):
            return math.inf
        if options["capturable"]:
            return 0
        interval = options["refit_every"]
        if calls <= REFIT_WARMUP:
            interval = 1 if has_clean_pairs(options) else min(interval, SKETCH_STEPS)
        return -calls % interval

    @property
    def refit_is_due(self) -> bool:
        """Whether the basis is refitted in this step."""
        return self.steps_to_refit == 0

    @property
    def sketch_is_due(self) -> bool:
        """Whether the innovations of this step enter the sketches."""
        return self.steps_to_refit < SKETCH_STEPS

    @property
    def refit_steps(self) -> int:
        """Angle steps in a refit; captured ones, in each step, share those of the refits at first."""
        steps = self.options["refit_steps"]
        return -(-steps // SKETCH_STEPS) if self.options["capturable"] else steps

    def parameters(self) -> Tensor:
        """The parameters as one tensor in the dtype of the state; it may alias them."""
        return self.layout.gather([param.detach() for param in self.layout.params])

    def gradient(self, basis: Basis) -> Tensor:
        """The gradient as one tensor, with L2 decay and ``maximize``; missing ones have no innovation."""
        layout, params = self.layout, self.layout.params
        if not self.is_partial:
            return layout.gather([self._gradient_of(param) for param in params])
        means = layout.scatter(basis.from_rotated(self.state["mean_grad"]))
        return layout.gather(
            [
                mean if param.grad is None else self._gradient_of(param)
                for param, mean in zip(params, means, strict=True)
            ]
        )

    def _gradient_of(self, param: Tensor) -> Tensor:
        options, grad = self.options, param.grad
        assert grad is not None
        if options["maximize"]:
            grad = -grad
        if options["weight_decay"] and not options["decoupled_weight_decay"]:
            grad = grad.to(self.layout.dtype).add(param.detach(), alpha=options["weight_decay"])
        return grad

    def rotated_gradient(self, basis: Basis) -> Tensor:
        """``Q^T g``, a new tensor."""
        return basis.to_rotated(self.gradient(basis)).clamp(-MAX_ROTATED_GRAD, MAX_ROTATED_GRAD)

    def freeze_missing(self, basis: Basis) -> None:
        """Sets the displacement of parameters without gradient to zero: their pairs are (0, 0)."""
        displacement = self.state.get("displacement")
        if displacement is None or not self.is_partial:
            return
        parts = self.layout.scatter(basis.from_rotated(displacement))
        kept = [
            torch.zeros_like(part) if param.grad is None else part
            for part, param in zip(parts, self.layout.params, strict=True)
        ]
        moved = basis.to_rotated(self.layout.gather(kept))
        displacement.copy_(moved if self.usable is None else torch.where(self.usable, moved, displacement))

    def normalizer(self) -> tuple[Tensor, Tensor]:
        """``sqrt(V)`` in gradient units, and ``tau`` in parameter units (0 for ``innovation``)."""
        state, options = self.state, self.options
        if options["diagonal"] == "innovation":
            return state["grad_sq"].sqrt(), state["grad_sq"].new_zeros(())
        found = regress(
            state["grad_sq"], state["disp_sq"], state["cross"], beta2=options["betas"][1], step=state["step"].item()
        )
        energy = found.energy
        if "energy" in state and options["scaling"] == "adam":
            # Clean pairs say how curvature is distributed; the size of the gradient itself sets the scale.
            mean = energy.mean()
            known = (found.tau > 0) & (mean > 0)
            energy = torch.where(known, energy / torch.where(known, mean, 1.0) * state["energy"], state["energy"])
        return energy.sqrt_(), found.tau

    def hessian_diagonal(self, *, corrected: bool) -> Tensor:
        """``|h|`` or ``sqrt(h^2 + nu2 / tau2)`` in rotated coordinates; see ``Butterfly.inverse_hessian``."""
        state, options = self.state, self.options
        if options["diagonal"] == "innovation":
            raise ValueError(
                "diagonal='innovation' keeps no displacements, so its estimate has no inverse-Hessian units; "
                "use diagonal='secant'"
            )
        beta1, beta2 = options["betas"]
        found = regress(state["grad_sq"], state["disp_sq"], state["cross"], beta2=beta2, step=state["step"].item())
        if not found.tau > 0:
            raise ValueError("no inverse-Hessian estimate yet: the parameters have not moved for enough steps")
        if corrected and options["pairs"] == "ema" and options["scaling"] == "adam":
            gain = options["lr"] / (found.energy.sqrt() + options["eps"])
            cross = state["cross"] - gain * found.noise / (2 * (1 + beta1))
            found = regress(state["grad_sq"], state["disp_sq"], cross, beta2=beta2)
            return found.slope.abs().div_(found.tau)
        return found.energy.sqrt().div_(found.tau)


class CleanStep(NamedTuple):
    """What a step with clean pairs leaves for the estimate.

    Attributes:
        grad: rotated gradient.
        written: rotated change of the parameters.
        weight: weight of the step in the moments.
        pair: the clean pair ``(u, w)`` of this step, where it is known before the second gradient.
    """

    grad: Tensor
    written: Tensor
    weight: float
    pair: tuple[Tensor, Tensor] | None


def take_clean_step(tensor: TensorStep, basis: Basis) -> CleanStep:
    """The step of pairs "same_batch", or of scaling "newton": averages, moments ("ema"), direction, write."""
    state, options = tensor.state, tensor.options
    tensor.freeze_missing(basis)
    state["step"] += 1
    weight, square, pair_weight = (float(w) for w in pair_weights(state["step"].item(), options["betas"]))
    grad = tensor.rotated_gradient(basis)
    delta_grad = update_mean_grad_(state["mean_grad"], grad, weight)
    displacement = state.get("displacement")
    pair = None
    if displacement is None:
        state["energy"].lerp_(grad.square().mean(), square)
    else:
        update_moments_(state, delta_grad, displacement, weight=square, pair_weight=pair_weight)
        pair = delta_grad, displacement.clone()
    before = tensor.parameters().clone()
    decay = options["weight_decay"] if options["decoupled_weight_decay"] else 0.0
    change = tensor.layout.scatter(basis.from_rotated(_clean_direction(tensor, grad, pair).mul_(-options["lr"])))
    for param, part in zip(tensor.layout.params, change, strict=True):
        if param.grad is not None:
            if decay:
                param.mul_(1 - options["lr"] * decay)
            param.add_(part)
    written = basis.to_rotated(tensor.parameters() - before)
    if displacement is not None:
        advance_displacement_(displacement, written, weight)
    return CleanStep(grad, written, square, pair)


def _clean_direction(tensor: TensorStep, grad: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """The rotated update, to be multiplied by ``-lr``; no entry exceeds ``max_update``."""
    state, options = tensor.state, tensor.options
    scale, tau = tensor.normalizer()
    scale.add_(max(options["eps"], torch.finfo(scale.dtype).tiny))
    limit = options["max_update"]
    if options["scaling"] == "adam":
        return (state["mean_grad"] / scale).clamp_(-limit, limit)
    inverse = known_displacement(tau) / scale
    if pair is None or not state["step"] > MIN_STEPS:
        return (inverse * grad).clamp_(-limit, limit)
    return bfgs_direction(inverse, grad, *pair).clamp_(-limit, limit)


def known_displacement(tau: Tensor) -> Tensor:
    """``tau``, or INITIAL_STEP while nothing has moved."""
    return torch.where(tau > 0, tau, INITIAL_STEP)


def bfgs_direction(inverse: Tensor, grad: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """``P g`` with ``diag(inverse)`` updated by BFGS to satisfy the newest pair, ``P u = w``.

        P = (I - r w u') D (I - r u w') + r w w',   r = 1 / u'w

    (J. Nocedal and S. Wright, Numerical Optimization, 2006, eq. 6.17). The pair is left out where its
    curvature ``u'w`` is below CURVATURE_SHARE of ``sqrt(u'Du w'D^-1w)``: negative, or mostly noise.
    """
    uw = (u * w).sum()
    trusted = uw > CURVATURE_SHARE * ((u * u * inverse).sum() * (w * w / inverse).sum()).sqrt()
    ratio = torch.where(trusted, 1 / uw, 0.0)
    first = ratio * (w * grad).sum()
    partial = inverse * (grad - first * u)
    return partial + (first - ratio * (u * partial).sum()) * w

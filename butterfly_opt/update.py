"""One step of one tensor, from its gradients to the parameters: no optimizer, no schedule.

With ``u, w`` the rotated pair, ``V`` the diagonal estimate (``diagonal``) and ``kappa = max_update``:

    scaling "adam"     theta -= lr Q clip( Q^T gbar / (sqrt(V) + eps), +-kappa )     dimensionless
    scaling "newton"   theta -= lr Q clip( D Q^T g, +-kappa ),  D = tau / sqrt(V)    parameter units

The clip matters: ``V`` holds the energy of innovations only, and on a constant gradient they vanish.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from butterfly_opt.backend import StepScalars
from butterfly_opt.basis import Basis
from butterfly_opt.diagonal import MIN_STEPS, regress
from butterfly_opt.estimate import SKETCH_BETA, State, Weight, pair_weights, update_moments_, update_sketches_
from butterfly_opt.layout import TensorLayout
from butterfly_opt.options import Options, has_clean_pairs
from butterfly_opt.pairs import advance_displacement_, update_mean_grad_

MAX_ROTATED_GRAD = 1e18
"""Rotated gradients are cut here: their squares, summed over a tensor, stay finite in float32."""

CURVATURE_SHARE = 0.2

INITIAL_STEP = 1e-3
"""Root mean square displacement assumed by ``newton`` before any is known (parameter units)."""


class Stepped(NamedTuple):
    """What a step leaves for the estimate.

    Attributes:
        grad: rotated gradient.
        written: rotated change of the parameters.
        weight: weight of the step in the moments.
        pair: the clean pair ``(u, w)`` of this step, if it has one.
    """

    grad: Tensor
    written: Tensor
    weight: Weight
    pair: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class TensorStep:
    """One tensor with everything a step needs to read or write; ``stream`` is its random stream."""

    layout: TensorLayout
    state: State
    options: Options
    basis: Basis
    stream: int

    def gradient(self, grads: Sequence[Tensor | None]) -> Tensor:
        """The gradient as one tensor, with L2 decay and ``maximize``; missing ones have no innovation."""
        options, params = self.options, self.layout.params
        if any(grad is None for grad in grads):
            means = self.layout.scatter(self.basis.from_rotated(self.state["mean_grad"]))
            grads = [mean if grad is None else grad for grad, mean in zip(grads, means, strict=True)]
        grad = self.layout.gather([grad for grad in grads if grad is not None])
        if options["maximize"]:
            grad = -grad
        if options["weight_decay"] and not options["decoupled_weight_decay"]:
            grad = grad.add(self.layout.gather([p.detach() for p in params]), alpha=options["weight_decay"])
        return grad

    def rotated(self, grad: Tensor) -> Tensor:
        """``Q^T g``, a new tensor."""
        return self.basis.to_rotated(grad).clamp(-MAX_ROTATED_GRAD, MAX_ROTATED_GRAD)

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
            tiny = torch.finfo(energy.dtype).tiny
            energy = torch.where(
                found.tau > 0, energy * (state["energy"] / energy.mean().clamp_min(tiny)), state["energy"]
            )
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

    def direction(self, rotated_grad: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
        """The rotated update, to be multiplied by ``-lr``; no entry exceeds ``max_update``."""
        options = self.options
        scale, tau = self.normalizer()
        scale.add_(options["eps"]).clamp_min_(torch.finfo(scale.dtype).tiny)
        limit = options["max_update"]
        if options["scaling"] == "adam":
            return (self.state["mean_grad"] / scale).clamp_(-limit, limit)
        inverse = known_displacement(tau) / scale
        if pair is None or not self.state["step"] > MIN_STEPS:
            return (inverse * rotated_grad).clamp_(-limit, limit)
        return bfgs_direction(inverse, rotated_grad, *pair).clamp_(-limit, limit)

    def write(self, delta: Tensor, grads: Sequence[Tensor | None], *, track: bool) -> Tensor:
        """Adds the rotated update ``delta`` to the parameters.

        Returns:
            What was written, rotated. Without decoupled decay and in float32 and float64 that is
            ``delta`` up to rounding, and nothing is rotated a second time.
        """
        options, params = self.options, self.layout.params
        decay = options["weight_decay"] if options["decoupled_weight_decay"] else 0.0
        partial = any(grad is None for grad in grads)
        exact = not (decay or partial) and self.layout.dtype == self.layout.owner.dtype
        changes: list[Tensor] = []
        for param, update, grad in zip(params, self.layout.scatter(self.basis.from_rotated(delta)), grads, strict=True):
            before = param.detach().clone() if track and not exact else None
            if grad is not None:
                if decay:
                    param.mul_(1 - options["lr"] * decay)
                param.add_(update)
            if before is not None:
                changes.append(param.to(self.layout.dtype) - before.to(self.layout.dtype))
        return self.basis.to_rotated(self.layout.gather(changes)) if changes else delta

    def freeze_missing(self, grads: Sequence[Tensor | None]) -> None:
        """Sets the displacement of parameters without gradient to zero: their pairs are (0, 0)."""
        displacement = self.state.get("displacement")
        if displacement is None or all(grad is not None for grad in grads):
            return
        parts = self.layout.scatter(self.basis.from_rotated(displacement))
        kept = [part if grad is not None else torch.zeros_like(part) for part, grad in zip(parts, grads, strict=True)]
        displacement.copy_(self.basis.to_rotated(self.layout.gather(kept)))

    def take(self, grads: Sequence[Tensor | None]) -> Stepped:
        """The step: averages, moments (pairs "ema"), direction, write."""
        state, options = self.state, self.options
        own_pairs = options["pairs"] == "ema"
        if own_pairs:
            self.freeze_missing(grads)
        state["step"] += 1
        weights = pair_weights(state["step"].item(), options["betas"])
        rotated = self.rotated(self.gradient(grads))
        displacement = state.get("displacement")
        if own_pairs and not has_clean_pairs(options):
            delta_grad, delta = self._noisy_step(rotated, weights)
            written = self.write(delta, grads, track=displacement is not None)
            sketch_weight = max(1 - SKETCH_BETA, weights[0])
            update_sketches_(
                state, self.layout, delta_grad, seed=options["seed"], stream=self.stream, weight=sketch_weight
            )
            pair = None
        else:
            pair = self._clean_averages(rotated, weights, displacement)
            written = self.write(self.direction(rotated, pair).mul_(-options["lr"]), grads, track=True)
        if displacement is not None:
            advance_displacement_(displacement, written, weights[0])
        return Stepped(rotated, written, weights[1], pair)

    def _noisy_step(self, rotated: Tensor, weights: tuple[Weight, Weight, Weight]) -> tuple[Tensor, Tensor]:
        """Averages, moments and direction of an "ema", "adam" step: the innovation and the rotated update."""
        state, options = self.state, self.options
        scalars = StepScalars(
            weights=weights,
            step=state["step"].item(),
            lr=options["lr"],
            beta2=options["betas"][1],
            eps=options["eps"],
            max_update=options["max_update"],
        )
        fused = self.basis.backend.fused_step_(state, rotated, scalars)
        if fused is not None:
            return rotated, fused
        delta_grad = update_mean_grad_(state["mean_grad"], rotated, weights[0])
        update_moments_(state, delta_grad, state.get("displacement"), weight=weights[1], pair_weight=weights[2])
        return delta_grad, self.direction(rotated, None).mul_(-options["lr"])

    def _clean_averages(
        self, rotated: Tensor, weights: tuple[Weight, Weight, Weight], displacement: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Averages of a step with clean pairs; the newest pair, where it is known before the step."""
        delta_grad = update_mean_grad_(self.state["mean_grad"], rotated, weights[0])
        if displacement is None:
            self.state["energy"].lerp_(rotated.square().mean(), weights[1])
            return None
        update_moments_(self.state, delta_grad, displacement, weight=weights[1], pair_weight=weights[2])
        return delta_grad, displacement.clone()


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

"""What the state of a tensor says of its inverse Hessian, as operators."""

import torch
from torch import Tensor

from butterfly_opt import secant
from butterfly_opt.basis import Basis
from butterfly_opt.collectives import run
from butterfly_opt.diagonal import Curvature, regress
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.rotation import Rotation
from butterfly_opt.stack import Stack
from butterfly_opt.step import SIGNAL, floor


def preconditioner_of(stack: Stack) -> RotatedDiagonal:
    """What a step multiplies the momentum with ("newton": the gradient), for the only tensor of a stack."""
    if stack.options["diagonal"] == "newton":
        return inverse_hessian_of(stack)
    return _operator(stack, _step_diagonal(stack))


def inverse_hessian_of(stack: Stack, *, damping: float = 0.0, corrected: bool = False) -> RotatedDiagonal:
    """The estimate in inverse-Hessian units, for the only tensor of a stack; see ``Butterfly.inverse_hessian``."""
    if stack.options["diagonal"] != "newton":
        return _operator(stack, 1 / (_hessian_diagonal(stack, corrected=corrected) + damping))
    state = stack.states[0]
    if not state["pairs"] > 0:
        raise ValueError("no inverse-Hessian estimate yet: the parameters have not moved for enough steps")
    return secant.operator(state, damping=damping)


def _operator(stack: Stack, diagonal: Tensor) -> RotatedDiagonal:
    """``Q diag(diagonal) Q^T`` of the only tensor of a stack, on a copy of its basis."""
    batch = stack.shape[0]
    if stack.layouts[0].cuts:
        raise NotImplementedError(
            "a parameter that is cut over processes has no operator; load its checkpoint in one process"
        )
    if batch > 1:
        raise ValueError(f"a parameter of {batch} matrices (batch_dims) has no single operator; use one of each")
    # -2 and -1 are axes 0 and 1 of a matrix.
    rotations = [(dim % 2, Rotation(r.plan, r.matrices.clone())) for dim, r in stack.whole_rotations]
    return RotatedDiagonal(Basis(stack.shape[1:], rotations), diagonal[0])


def curvature(stack: Stack, cross: Tensor | None = None) -> Curvature:
    """The secant regression of a stack, with another ``C`` if given."""
    averages, step = stack.averages, stack.per_tensor(stack.counters["step"])
    cross = averages["cross"] if cross is None else cross
    return regress(averages["exp_avg_sq"], averages["disp_sq"], cross, beta2=stack.options["betas"][1], step=step)


def _step_diagonal(stack: Stack) -> Tensor:
    """``1 / (sqrt(V + SIGNAL m^2) + floor)``, what a step multiplies ``m = Q^T gbar`` with; the floor is ``gbar``'s."""
    energy = stack.averages["exp_avg_sq"] if stack.options["diagonal"] == "innovation" else curvature(stack).energy
    ((m,),) = run([stack.to_rotated(stack.averages["exp_avg"])])
    largest = stack.averages["exp_avg"].abs().amax()
    return 1 / (torch.addcmul(energy, m, m, value=SIGNAL).sqrt_() + floor(stack.options["eps"], largest, energy.dtype))


def _hessian_diagonal(stack: Stack, *, corrected: bool) -> Tensor:
    """``sqrt(h^2 + nu2 / tau2)``, or ``|h|`` corrected, in rotated coordinates; see ``Butterfly.inverse_hessian``."""
    options = stack.options
    if options["diagonal"] == "innovation":
        raise ValueError(
            "diagonal='innovation' keeps no displacements, so its estimate has no inverse-Hessian units; "
            "use diagonal='secant'"
        )
    found = curvature(stack)
    if not (found.tau > 0).all():
        raise ValueError("no inverse-Hessian estimate yet: the parameters have not moved for enough steps")
    if not corrected:
        return found.energy.sqrt_().div_(found.tau)
    gain = options["lr"] / (found.energy.sqrt() + options["eps"])
    beta1 = options["betas"][0]
    bias = gain * found.noise * (1 + beta1 * (1 - beta1)) / (2 * (1 + beta1))
    unbiased = curvature(stack, stack.averages["cross"] - bias)
    return unbiased.slope.abs().div_(unbiased.tau)

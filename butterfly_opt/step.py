"""One step of the tensors of a stack, as the docstring of ``Butterfly`` states it.

The pairs come from averages: no closure, no extra gradient. With the weights ``a_t = (1 - beta1) / (1 - beta1^t)``

    y_t = g_t - gbar_{t-1}              gbar_t = gbar_{t-1} + a_t y_t
    s_t = theta_t - thetabar_{t-1}      thetabar_t = thetabar_{t-1} + a_t s_t

both averages run over the same steps with the same weights, so ``y_t = H s_t + noise`` holds exactly on a quadratic,
and ``s_t`` spans about ``1 / (1 - beta1)`` steps. ``gbar`` is Adam's bias-corrected momentum. Both live in original
coordinates: they outlast every basis, and ``s`` follows whatever was written to the parameters, by anybody.

    u = Q^T y, m = Q^T (gbar_t + a_t (g_t - gbar_t)), w = Q^T s
    A <- (1 - b_t) A + b_t u^2, and so B of w^2 and C of u w           b_t = (1 - beta2) / (1 - beta2^t)
    theta <- theta (1 - lr weight_decay) - lr Q ( m / (sqrt(V + SIGNAL m^2) + floor) )
    floor = eps + ROUNDING max |g_t|

with ``V`` of ``diagonal``; ``m`` is the average one step ahead, as Nesterov's, which lags less. An entry whose ``gbar``
is exactly zero never had a gradient: it is not moved, whatever it is mixed with.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from butterfly_opt.diagonal import regress
from butterfly_opt.dtensor import local, local_gradient
from butterfly_opt.options import Options
from butterfly_opt.rounding import round_stochastically
from butterfly_opt.stack import Cohort, Gate, Numbers, Stack, settled

MOMENT_BETA = 0.95
"""Decay a step of the second moments that the basis is fitted to: 0.9 sees too few gradients where few samples of a
batch still have one, 0.98 is no better there and 0.99 follows the drift too late elsewhere."""

SIGNAL = 0.3
"""Weight of ``m^2`` under the root: without noise a coordinate moves by ``lr / sqrt(SIGNAL)``, 1.8 lr, at most. With 1,
Adam's, losses with little noise end higher, above all at low rates, and at a constant rate the last steps are too long;
less than 0.3 gains no more, and losses that are fitted to rounding end higher (experiments/NOTES.md)."""

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Share of the largest gradient entry that a rotated coordinate must have: a few roundings, added up over stages."""


async def take_step_(stack: Stack, usable: Tensor) -> None:
    """Steps the tensors of a stack: state and parameters change in place; what other processes know is awaited.

    Args:
        stack: tensors whose parameters hold their gradients.
        usable: bool ``(tensors,)``; a tensor where it is False keeps its state and parameters, bit for bit.
    """
    averages, options, n = stack.averages, stack.options, stack.numbers
    exp_avg, energy = averages["exp_avg"], averages["exp_avg_sq"]
    grad = gradients(stack)
    if not stack.all_usable:
        # What is not finite leaves no trace: as a gradient that is what was expected.
        grad = torch.where(stack.per_tensor(usable), grad, exp_avg)
    y = grad - exp_avg
    exp_avg.lerp_(grad, n.mean)
    # A refit comes first: averages, direction and the way back share one basis.
    await fit_basis_(stack, y, n, usable)
    ahead = exp_avg.lerp(grad, n.mean)
    if options["diagonal"] == "innovation":
        u, m = await stack.to_rotated(y, ahead)
        average_product_(energy, u, u, n.square)
    else:
        param_avg, disp_sq, cross = (averages[name] for name in ("param_avg", "disp_sq", "cross"))
        s = parameters(stack) - param_avg
        param_avg.addcmul_(s, n.mean)
        # Of the step before: no pass over the tensor has to end before a direction can be taken.
        means = await stack.means(disp_sq, cross.abs())
        u, m, w = await stack.to_rotated(y, ahead, s)
        average_product_(energy, u, u, n.square)
        average_product_(disp_sq, w, w, n.pair)
        average_product_(cross, u, w, n.pair)
        energy = regress(energy, disp_sq, cross, beta2=options["betas"][1], step=n.step, means=means).energy
    scale = torch.addcmul(energy, m, m, value=SIGNAL).sqrt_().add_(n.floor)
    change = (await stack.from_rotated(m.div_(scale))).mul_(-n.lr)
    write_(stack, change.masked_fill_(exp_avg == 0, 0.0))


def count_steps_(cohort: Cohort, gate: Gate) -> None:
    """Counts the step of each active tensor, or that it was skipped, and gives every stack its numbers."""
    options, (beta1, beta2) = cohort.options, cohort.options["betas"]
    step = cohort.counters["step"].add_(gate.active)
    cohort.counters["skipped"].add_(~gate.finite)
    t = step.double().clamp_min_(1)
    t_mean = t if cohort.earlier_steps is None else t + cohort.earlier_steps
    # Pairs start at the second step: the first displacement is zero.
    weights = _weights((beta1, beta2, beta2, MOMENT_BETA), [t_mean, t, (t - 1).clamp_min_(1), t])
    # The first weight is 1 only up to rounding: above it, an average could get negative.
    mean, square, pair, moment = weights.clamp_max_(1.0).mul_(gate.active).unbind()
    usable = gate.finite.double()
    # 0-d: a tensor of one element may have the shape (1,).
    lr = options["lr"].to(t).view(()) if isinstance(options["lr"], Tensor) else options["lr"]
    dtype = cohort.layouts[0].dtype
    # A skipped step has the rate 0, but 0 times NaN is no 0.
    floors = floor(options["eps"], torch.where(gate.finite, gate.largest, 0.0), dtype).double()
    rows = torch.stack(Numbers(mean, square, pair, t, usable * lr, floors, moment, usable)).to(dtype)
    for stack, own in zip(cohort.stacks, cohort.split(rows), strict=True):
        stack.rows = own


def _weights(betas: Sequence[Any], counts: list[Tensor]) -> Tensor:
    """``(1 - beta) / (1 - beta^count)`` for each pair, by few operations: a step of small tensors is made of them."""
    if any(isinstance(beta, Tensor) for beta in betas):
        betas = [beta.double().view(()) if isinstance(beta, Tensor) else counts[0].new_full((), beta) for beta in betas]
        logs: list[Any] = [beta.log() for beta in betas]
    else:
        # As numbers: a tensor of them would have to be copied to a GPU.
        # -inf is what a beta of 0 wants: expm1 makes -1 of it, and the weight 1.
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
    weights = torch._foreach_mul(counts, logs)
    # For betas near 1 ``1 - beta^count`` would cancel.
    torch._foreach_expm1_(weights)
    torch._foreach_reciprocal_(weights)
    return torch.stack(torch._foreach_mul(weights, [beta - 1 for beta in betas]))


async def fit_basis_(stack: Stack, y: Tensor, n: Numbers, usable: Tensor) -> None:
    """Takes the innovations into the second moments of each axis, and refits its rotation where that is due."""
    # Without calls no gradient has counted yet: it leaves no trace.
    if not stack.calls or not stack.rotations:
        return
    refits, weight = stack.refits(), n.moment.view(-1)
    refitted = None if stack.all_usable else stack.per_tensor(usable).view(-1)
    if stack.options["capturable"]:
        due = stack.is_due(n.step.view(-1))
        refitted = due if refitted is None else refitted & due
    for dim, rotation in stack.rotations:
        values = y if dim == -2 else y.mT
        if stack.calls == 1:
            await settled(rotation.start_(values))
            continue
        await settled(rotation.observe_(values, weight, leaves=stack.share(dim, values)))
        if refits:
            await settled(rotation.refit_(refitted))
    if stack.calls == 1:
        # They saw all columns: as heavy as the shares to come.
        for dim, whole in stack.whole_rotations:
            whole.scale_leaves_(1 / stack.shares(dim))


def floor(eps: float | Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the denominator: ``eps``, and ROUNDING of the largest entry of the gradient.

    A rotation leaves rounding errors in coordinates without energy: divided by themselves they would be steps. At least
    the root of the smallest normal number: for smaller ``m``, ``m^2`` vanishes under the root.
    """
    return (eps + ROUNDING[dtype] * largest).clamp_min(torch.finfo(dtype).tiny ** 0.5)


def average_product_(average: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """``average <- average + weight (x y - average)``, in place."""
    average.lerp_(x * y, weight)


def gradient(param: Tensor, grad: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """The gradient of a parameter that is descended, with L2 decay and ``maximize``; ``grad`` itself without either.

    Of a ``DTensor`` the shard of this process.
    """
    grad = local_gradient(param, grad)
    grad = -grad if options["maximize"] else grad
    if options["decoupled_weight_decay"] or not options["weight_decay"]:
        return grad
    # In the dtype of the state: the sum is not rounded to bfloat16.
    return grad.to(dtype) + options["weight_decay"] * local(param.detach())


def gradients(stack: Stack) -> Tensor:
    """The gradients, with L2 decay and ``maximize``; they may be aliased. Parameters without one have no innovation."""
    layout, options, params = stack.layouts[0], stack.options, stack.params
    expected: Sequence[Tensor] = params
    if any(param.grad is None for param in params):
        expected = stack.scatter(stack.averages["prev_grad" if options["diagonal"] == "newton" else "exp_avg"])
    return stack.gather(
        [
            mean if param.grad is None else gradient(param, param.grad, options, layout.dtype)
            for param, mean in zip(params, expected, strict=True)
        ]
    )


def parameters(stack: Stack) -> Tensor:
    """The parameters ``(count, rows, columns)`` in the dtype of the state; they may be aliased."""
    return stack.gather([local(param.detach()) for param in stack.params])


def write_(stack: Stack, change: Tensor) -> None:
    """``theta <- theta (1 - lr weight_decay) + change``, rounded once; parameters without a gradient stay."""
    options, dtype = stack.options, stack.params[0].dtype
    decays = bool(options["weight_decay"]) and options["decoupled_weight_decay"]
    keep = 1 - Numbers(*stack.rows).lr * options["weight_decay"] if decays else None
    is_mixed, each = dtype != change.dtype, len(stack.params) // len(stack.layouts)
    if is_mixed:
        theta = parameters(stack)
        change = change + (theta if keep is None else theta * stack.per_tensor(keep))
    changes = stack.scatter(change)
    if is_mixed and options["stochastic_rounding"] and dtype == torch.bfloat16:
        # A tuple repeated: in ``flat`` all parameters share the numbers of the only tensor.
        own = zip(changes, stack.streams, Numbers(*stack.rows).step.unbind() * each, strict=True)
        changes = [round_stochastically(value, stream=stream, step=step) for value, stream, step in own]
    moving = [i for i, param in enumerate(stack.params) if param.grad is not None]
    params, changes = [local(stack.params[i]) for i in moving], [changes[i] for i in moving]
    if is_mixed:
        torch._foreach_copy_(params, changes)
        return
    if keep is not None:
        keeps = keep.unbind() * each
        torch._foreach_mul_(params, [keeps[i] for i in moving])
    torch._foreach_add_(params, changes)

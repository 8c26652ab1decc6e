"""Quasi-Newton steps from pairs without noise, for full or large batches (``diagonal="newton"``).

    s_t = theta_t - theta_{t-1},  y_t = g_t - g_{t-1}        taken into the estimate P (``secant``)
    theta <- theta (1 - lr weight_decay) - lr P g

The first step has no curvature to go by: it is ``lr g`` with a closure, else as in torch's LBFGS
``lr min(1, 1 / |g|_1) g``. With a closure a step that did not lower the loss as much as its slope promises is halved at
the next call, before anything else: the closure is then evaluated again, and the pair of the point that was left is
taken in too. Nothing is evaluated that is not used. That asks for one loss, the same batch in every call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from butterfly_opt import secant
from butterfly_opt.layout import TensorLayout
from butterfly_opt.options import Options
from butterfly_opt.stack import Stack, State
from butterfly_opt.step import gradients, parameters, write_

ARMIJO = 1e-4
"""Share of the promised decrease that a step keeps (J. Nocedal, S. Wright, Numerical Optimization, 2006, eq. 3.4)."""

MAX_GROWTH = 2.0
"""A step over the one before, at most."""

MAX_HALVINGS = 20
"""After so many halvings the loss is not what the gradient says: go on from where it is."""


def new_state(layout: TensorLayout, options: Options) -> State:
    """What the state of a tensor holds beside ``stack.new_state``: the sums of the estimate, and the last loss."""
    shape = [n for n in layout.shape if n > 1] or [1]
    owner = layout.owner
    sums = secant.new_state(
        shape, block=options["block"], lead=options["lead"], dtype=layout.dtype, device=owner.device
    )
    return sums | {name: torch.zeros((), device=owner.device) for name in ("prev_loss", "halvings")}


def backtrack(stacks: Sequence[Stack], closure: Callable[[], Any], loss: Any) -> Any:
    """Halves the last step of all tensors together while the loss is too large; returns the loss where that ends.

    Args:
        stacks: of one optimizer.
        closure: evaluates loss and gradients.
        loss: what it has just returned, at the present parameters.
    """
    for _ in range(MAX_HALVINGS):
        value, moved = _value(stacks, loss), []
        for stack in stacks:
            if not stack.states[0]["step"] > 0:
                return loss
            moved.append(parameters(stack) - stack.averages["prev_param"])
        slope = sum((stack.averages["prev_grad"] * step).sum() for stack, step in zip(stacks, moved, strict=True))
        before = stacks[0].states[0]["prev_loss"]
        # A finite loss may be compared; one that is not is too large.
        if not slope < 0 or value <= before + ARMIJO * slope:
            return loss
        for stack, step in zip(stacks, moved, strict=True):
            _take_pair_(stack, gradients(stack))
            half = torch.add(stack.averages["prev_param"], step, alpha=0.5)
            for layout in stack.layouts:
                for param, part in zip(layout.params, layout.scatter(half), strict=True):
                    param.copy_(part)
        with torch.enable_grad():
            loss = closure()
        for stack in stacks:
            stack.states[0]["halvings"] += 1
    return loss


def remember_loss_(stacks: Sequence[Stack], loss: Any) -> None:
    """Keeps the loss at the present parameters, for ``backtrack`` in the next call; ``inf`` without a closure."""
    value = torch.inf if loss is None else _value(stacks, loss) if stacks else 0.0
    for stack in stacks:
        stack.states[0]["prev_loss"].fill_(value)


async def take_step_(stack: Stack, usable: Tensor) -> None:
    """Steps the only tensor of a stack; see ``step.take_step_``."""
    state, averages, n = stack.states[0], stack.averages, stack.numbers
    if not bool(stack.active.all()):
        return
    grad = gradients(stack)
    last = parameters(stack) - averages["prev_param"]
    if state["step"] > 1:
        _take_pair_(stack, grad)
    averages["prev_param"].copy_(parameters(stack))
    averages["prev_grad"].copy_(grad)
    if state["pairs"] > 0:
        direction = secant.apply_inverse(state, grad.reshape(state["values"].shape)).view(grad.shape)
        # Where nothing is known yet an estimate may promise anything: no step is much longer than the last one.
        direction *= (MAX_GROWTH * last.norm() / (n.lr * direction.norm()).clamp_min(1e-30)).clamp_max(1.0)
    elif state["prev_loss"] < torch.inf:
        direction = grad.clone()  # too long a step will be halved
    else:
        direction = grad / grad.abs().sum().clamp_min(1.0)
    # Coordinates that never had a gradient are not moved by those that had.
    write_(stack, direction.mul_(-n.lr).masked_fill_(grad == 0, 0.0), n)


def _take_pair_(stack: Stack, grad: Tensor) -> None:
    """Takes the pair from the last point to the present one into the estimate, if it is one."""
    state, theta = stack.states[0], parameters(stack)
    shape = state["values"].shape
    s = (theta - stack.averages["prev_param"]).view(shape)
    y = (grad - stack.averages["prev_grad"]).view(shape)
    # Where nothing moved, or only by the last half of the digits, y is rounding; where the loss is not finite, nothing.
    least = torch.finfo(theta.dtype).eps ** 0.5 * theta.abs().max()
    if s.abs().max() > least and bool(torch.isfinite(y).all()) and bool(torch.isfinite(s).all()):
        secant.update_(state, s, y)


def _value(stacks: Sequence[Stack], loss: Any) -> float:
    """The loss that the gradients belong to: with L2 decay, and minus the loss where it is maximised."""
    options = stacks[0].options
    value = -float(loss) if options["maximize"] else float(loss)
    if options["weight_decay"] and not options["decoupled_weight_decay"]:
        value += 0.5 * options["weight_decay"] * sum(float(parameters(stack).square().sum()) for stack in stacks)
    return value

"""Quasi-Newton steps from pairs without noise, for full or large batches (``diagonal="newton"``).

    s_t = theta_t - theta_{t-1},  y_t = g_t - g_{t-1}        taken into the estimate P (``secant``)
    theta <- theta (1 - lr weight_decay) - lr H g

H is L-BFGS's product of the last HISTORY pairs (J. Nocedal, Math. Comp. 35, 1980) on an initial metric that agrees
with the newest of them: a mean of P and the identity, either weighted by ``1 / error^2``, where the error is one less
the cosine of ``H y`` and s before the pair is taken in, on that metric alone. A group of coordinates that P sees as a
whole wants P; where eigenvectors are no wide butterfly and pairs come along one path, P is no better than the diagonal.

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

LOSS_ROUNDING = 4.0
"""Roundings of a loss within which it is no larger: near the minimum it falls by less, and steps would be halved."""

MAX_GROWTH = 2.0
"""A step over the one before, at most."""

HISTORY = 50
"""Pairs: 100 numbers a coordinate, beside the 340 of P. Gradients to 1e-4 of a logistic regression, l2 = 1e-2 / 1e-4:
in blocks of 64 44 / 93, on P without a history never / 418, on the identity alone 38 / 85; in one dense block 28 / 60,
30 / 197 and 38 / 85. Loss of a small physics-informed network after 300: 3e-5, 7e-3, 2e-3; torch's L-BFGS 1.3e-3."""

TRUST_BETA = 0.8
"""Decay of the errors that weight the metrics: the last five pairs or so."""

MAX_HALVINGS = 20
"""After so many halvings the loss is not what the gradient says: go on from where it is."""


def new_state(layout: TensorLayout, options: Options) -> State:
    """What the state of a tensor holds beside ``stack.new_state``: the sums of the estimate, history and last loss."""
    shape = [n for n in layout.shape if n > 1] or [1]
    owner = layout.owner
    sums = secant.new_state(
        shape, block=options["block"], lead=options["lead"], dtype=layout.dtype, device=owner.device
    )
    n = sums["values"].numel()
    sums["history"] = torch.zeros(2, HISTORY, n, dtype=layout.dtype, device=owner.device)
    sums["metric_errors"] = torch.zeros(2, dtype=layout.dtype, device=owner.device)
    # A number: in float32 the decrease of a float64 loss is soon below its rounding.
    return sums | {"prev_loss": 0.0, "halvings": torch.zeros((), device=owner.device)}


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
        # All remember one loss (``remember_loss_``).
        before = stacks[0].states[0]["prev_loss"]
        rounding = LOSS_ROUNDING * torch.finfo(stacks[0].layouts[0].dtype).eps * abs(before)
        # A finite loss may be compared; one that is not is too large.
        if not slope < 0 or value <= before + ARMIJO * slope + rounding:
            return loss
        for stack, step in zip(stacks, moved, strict=True):
            # Before the parameters change: the pair is that of the point that is left.
            _take_pair_(stack, gradients(stack))
            half = torch.add(stack.averages["prev_param"], step, alpha=0.5)
            torch._foreach_copy_(stack.params, list(stack.scatter(half)))
        with torch.enable_grad():
            loss = closure()
        for stack in stacks:
            stack.states[0]["halvings"] += 1
    return loss


def remember_loss_(stacks: Sequence[Stack], loss: Any) -> None:
    """Keeps the loss at the present parameters, for ``backtrack`` in the next call; ``inf`` without a closure."""
    value = torch.inf if loss is None else _value(stacks, loss) if stacks else 0.0
    for stack in stacks:
        stack.states[0]["prev_loss"] = value


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
        # Errors of 0 are those of a start, or of rounding.
        weights = state["metric_errors"].clamp_min(torch.finfo(grad.dtype).eps) ** -2
        direction = _apply_history(state, grad.flatten(), weights / weights.sum()).view(grad.shape)
        # Where nothing is known yet an estimate may promise anything: no step is much longer than the last one, unless
        # that one was none (a rate of 0 in a schedule), after which nothing would ever move.
        growth = MAX_GROWTH * last.norm() / (n.lr * direction.norm()).clamp_min(1e-30)
        direction = direction * torch.where(last.any(), growth, 1.0).clamp_max(1.0)
    elif state["prev_loss"] < torch.inf:  # a closure gave it
        direction = grad.clone()  # too long a step will be halved
    else:
        direction = grad / grad.abs().sum().clamp_min(1.0)
    # Coordinates that never had a gradient are not moved by those that had.
    write_(stack, direction.mul_(-n.lr).masked_fill_(grad == 0, 0.0))


def _take_pair_(stack: Stack, grad: Tensor) -> None:
    """Takes the pair from the last point to the present one into the estimate, if it is one."""
    state, theta = stack.states[0], parameters(stack)
    shape = state["values"].shape
    s = (theta - stack.averages["prev_param"]).view(shape)
    y = (grad - stack.averages["prev_grad"]).view(shape)
    # Where nothing moved, or only by the last half of the digits, y is rounding; where the loss is not finite, nothing.
    least = torch.finfo(theta.dtype).eps ** 0.5 * theta.abs().max()
    if s.abs().max() > least and bool(torch.isfinite(y).all()) and bool(torch.isfinite(s).all()):
        _remember_pair_(state, s.flatten(), y.flatten())
        secant.update_(state, s, y)


def _remember_pair_(state: State, s: Tensor, y: Tensor) -> None:
    """Takes a pair of positive curvature into the history, and how well either metric foretold it."""
    # So written that a NaN is left out too; and what underflows, or the identity could not agree with the pair.
    finfo = torch.finfo(s.dtype)
    if not s @ y > finfo.eps * s.norm() * y.norm() or y @ y < finfo.tiny:
        return
    # Before the pair is taken in, or it would foretell itself.
    if state["pairs"] > 0:
        foretold = torch.stack([_apply_history(state, y, alone) for alone in torch.eye(2)])
        errors = 1 - torch.nn.functional.cosine_similarity(foretold, s[None])
        state["metric_errors"].lerp_(errors, 1 - TRUST_BETA)
    history = state["history"]
    history.copy_(history.roll(-1, dims=1))
    history[0, -1], history[1, -1] = s, y


def _apply_history(state: State, grad: Tensor, weights: Tensor) -> Tensor:
    """``H g``: the two loops over the history, on a mean of P and the identity, each to agree with the newest pair."""

    def metrics(x: Tensor) -> Tensor:
        return torch.stack([secant.apply_inverse(state, x.view(state["values"].shape)).flatten(), x])

    # Places without a pair yet are zero.
    pairs = [(s, y, s @ y) for s, y in zip(*state["history"], strict=True) if s.any()]
    shares = []
    for s, y, curvature in reversed(pairs):
        shares.append(s @ grad / curvature)
        grad = grad - shares[-1] * y
    # Without a pair nothing says how long a step of the identity is.
    scales = grad.new_tensor([1.0, 0.0])
    if pairs:
        _, y, curvature = pairs[-1]
        scales = weights.to(grad) * curvature / (metrics(y) @ y)
    direction = scales @ metrics(grad)
    for (s, y, curvature), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + s * (share - y @ direction / curvature)
    return direction


def _value(stacks: Sequence[Stack], loss: Any) -> float:
    """The loss that the gradients belong to: with L2 decay, and minus the loss where it is maximised."""
    options = stacks[0].options
    value = -float(loss) if options["maximize"] else float(loss)
    if options["weight_decay"] and not options["decoupled_weight_decay"]:
        value += 0.5 * options["weight_decay"] * sum(float(parameters(stack).square().sum()) for stack in stacks)
    return value

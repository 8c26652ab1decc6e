"""butterfly_opt.Butterfly: no rotated coordinate moves by more than ``lr * max_update`` in a step.

Oracle: the bound itself, and the run without it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import STEP_TOLERANCE
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from butterfly_opt import Butterfly


def linear_grad(param: Tensor, step: int) -> Tensor:
    """A linear loss: the gradient never changes."""
    return torch.linspace(-3.0, 2.0, param.numel(), dtype=param.dtype).view(param.shape)


def repeated_grad(param: Tensor, step: int) -> Tensor:
    """One full batch of a logistic loss, again and again."""
    data = torch.randn(16, param.shape[1], generator=torch.Generator().manual_seed(0), dtype=param.dtype)
    labels = torch.arange(16) % param.shape[0]
    with torch.enable_grad():
        leaf = param.detach().requires_grad_()
        loss = nn.functional.cross_entropy(data @ leaf.T, labels)
    return torch.autograd.grad(loss, leaf)[0]


LR, KAPPA = 0.01, 3.0


def constant_lr(step: int) -> float:
    return 1.0


def warm_up(step: int) -> float:
    """Starts at 0 and rises over 200 steps."""
    return min(1.0, step / 200)


@pytest.mark.parametrize(
    ("options", "gradient", "schedule", "steps"),
    [
        ({}, linear_grad, constant_lr, 3000),
        ({"diagonal": "innovation"}, linear_grad, warm_up, 600),
        ({}, repeated_grad, warm_up, 600),
        ({"diagonal": "innovation"}, linear_grad, constant_lr, 3000),
        ({"diagonal": "innovation"}, repeated_grad, constant_lr, 300),
    ],
)
def test_no_rotated_coordinate_moves_further_than_the_bound(
    options: dict[str, Any],
    gradient: Callable[[Tensor, int], Tensor],
    schedule: Callable[[int], float],
    steps: int,
) -> None:
    """In each step |Q^T delta| <= lr * max_update, in the basis before the refit of that step."""
    param = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    opt = Butterfly([param], lr=LR, max_update=KAPPA, refit_steps=1, depth=1, **options)
    schedules = LambdaLR(opt, schedule)
    largest = 0.0
    for step in range(steps):
        param.grad = gradient(param, step)
        before, basis = param.detach().clone(), opt.preconditioner(param).basis if opt.state else None
        bound = opt.param_groups[0]["lr"] * KAPPA
        opt.step()
        schedules.step()
        delta = param.detach() - before
        # Before the first step all angles are 0: the rotated coordinates are the plain ones.
        rotated = delta if basis is None else basis.to_rotated(delta)
        # 1e-12: the parameter is of order 100 and rounds what is added.
        assert rotated.abs().max().item() <= bound * (1 + STEP_TOLERANCE) + 1e-12
        assert delta.norm().item() <= delta.numel() ** 0.5 * bound * (1 + STEP_TOLERANCE) + 1e-12
        largest = max(largest, rotated.abs().max().item())
    assert largest > 0.1 * LR
    assert torch.isfinite(param).all()


def test_the_bound_is_reached_on_a_linear_loss() -> None:
    """Without the clip the step would grow without limit: innovations vanish on a constant gradient."""
    steps = []
    for max_update in (KAPPA, 1e9):
        param = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        opt = Butterfly([param], lr=LR, betas=(0.9, 0.95), max_update=max_update, refit_steps=0)
        for step in range(300):
            before = param.detach().clone()
            param.grad = linear_grad(param, step)
            opt.step()
        steps.append((param.detach() - before).abs().max().item())
    assert steps[0] == pytest.approx(LR * KAPPA, rel=1e-9)
    assert steps[1] > 30 * LR


@pytest.mark.parametrize("scaling", ["adam", "newton"])
def test_max_update_bounds_same_batch_steps(scaling: str) -> None:
    param = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    opt = Butterfly([param], lr=LR, max_update=0.5, pairs="same_batch", scaling=scaling)

    def closure() -> Tensor:
        param.grad = 1e3 * repeated_grad(param, 0)
        return param.grad.sum()

    for _ in range(40):
        before = param.detach().clone()
        opt.step(closure)
        bound = param.numel() ** 0.5 * LR * 0.5
        assert (param.detach() - before).norm().item() <= bound * (1 + 1e-9)

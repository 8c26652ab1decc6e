"""butterfly_opt.Butterfly: no rotated coordinate moves by more than ``lr / sqrt(SIGNAL)`` in a step.

``|m| / sqrt(V + SIGNAL m^2)`` is less. Oracle: the bound itself.
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


LR = 0.01
BOUND = 1 / 0.3**0.5
BLOCKS = {"one block": {}, "several stages": {"block": 2, "lead": 1}, "radix 2": {"block": 2, "lead": 2}}


def constant_lr(step: int) -> float:
    return 1.0


def warm_up(step: int) -> float:
    """Starts at 0 and rises over 100 steps."""
    return min(1.0, step / 100)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize(
    ("options", "gradient", "schedule", "steps"),
    [
        ({"diagonal": "secant"}, linear_grad, constant_lr, 150),
        ({"diagonal": "secant"}, repeated_grad, warm_up, 150),
        ({}, linear_grad, warm_up, 150),
        ({}, linear_grad, constant_lr, 150),
        ({}, repeated_grad, constant_lr, 100),
    ],
)
def test_no_rotated_coordinate_moves_further_than_the_bound(
    options: dict[str, Any],
    gradient: Callable[[Tensor, int], Tensor],
    schedule: Callable[[int], float],
    steps: int,
    blocks: dict[str, int],
) -> None:
    """|Q^T delta| <= BOUND lr, in the basis that the step has fitted before it is taken."""
    param = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    opt = Butterfly([param], lr=LR, **options, **blocks)
    schedules = LambdaLR(opt, schedule)
    largest = 0.0
    for step in range(steps):
        param.grad = gradient(param, step)
        before, bound = param.detach().clone(), BOUND * opt.param_groups[0]["lr"]
        opt.step()
        schedules.step()
        delta = param.detach() - before
        rotated = opt.preconditioner(param).basis.to_rotated(delta)
        # 1e-12: the parameter is of order 10 and rounds what is added.
        assert rotated.abs().max().item() <= bound * (1 + STEP_TOLERANCE) + 1e-12
        assert delta.norm().item() <= delta.numel() ** 0.5 * bound * (1 + STEP_TOLERANCE) + 1e-12
        largest = max(largest, rotated.abs().max().item())
    assert largest > 0.1 * LR
    assert torch.isfinite(param).all()


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_the_bound_is_reached_on_a_linear_loss(diagonal: str) -> None:
    """Innovations vanish on a constant gradient: V goes to zero, and the step to ``BOUND lr sign(m)``."""
    param = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    opt = Butterfly([param], lr=LR, betas=(0.9, 0.95), diagonal=diagonal)
    for step in range(300):
        before = param.detach().clone()
        param.grad = linear_grad(param, step)
        opt.step()
    rotated = opt.preconditioner(param).basis.to_rotated(param.detach() - before)
    momentum = opt.preconditioner(param).basis.to_rotated(param.grad)
    large = momentum.abs() > 1e-3 * momentum.abs().max()
    torch.testing.assert_close(rotated[large].abs(), torch.full_like(rotated[large], BOUND * LR), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
@pytest.mark.parametrize("scale", [1e-15, 1e-19, 1e-22, 1e-30, 1e-37])
def test_the_bound_holds_for_tiny_gradients_without_eps(scale: float, diagonal: str, dtype: torch.dtype) -> None:
    """Their squares vanish; what they are divided by does not."""
    for shape in ((4, 3), (5,)):
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        opt = Butterfly([param], lr=LR, eps=0.0, diagonal=diagonal)
        for _ in range(10):
            before = param.detach().clone()
            param.grad = scale * repeated_grad(param, 0) if param.ndim == 2 else torch.full_like(param, scale)
            opt.step()
            assert (param.detach() - before).norm() <= param.numel() ** 0.5 * BOUND * LR * 1.001

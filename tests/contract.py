"""A noisy quadratic, the modes of ``Butterfly`` and bit-for-bit comparison: shared by ``test_contract_*.py``."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from butterfly_opt import Butterfly

# Where two runs compute the same numbers in the same order they are compared bit for bit; everything else
# goes through float64 rotations of at most 2 * 5 stages, some 30 roundings.
STEP_TOLERANCE = 1e-12
SHAPES = ((6, 5), (4,), (3, 2, 2, 3))
# One angle step a refit where the number of them does not matter: a small step costs 5 ms of calls, not of work.
QUICK = {"refit_steps": 1}
MODES: dict[str, dict[str, Any]] = {
    "axes-secant": {"refit_steps": 2},
    "axes-innovation": {"diagonal": "innovation", **QUICK},
    "axes-deep": {"depth": 3, "decoupled_weight_decay": True, "weight_decay": 0.1, **QUICK},
    "flat": {"structure": "flat", **QUICK},
    "flat-blocks": {"structure": "flat", "block_size": 8, "diagonal": "innovation", **QUICK},
    "same-batch": {"pairs": "same_batch", "depth": 1},
    "same-batch-flat": {"pairs": "same_batch", "structure": "flat", "depth": 1},
    "newton": {"pairs": "same_batch", "scaling": "newton", "lr": 0.1, "depth": 1},
    "newton-ema": {"scaling": "newton", "weight_decay": 0.01, "depth": 1},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())


def make_params(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> Tensor:
    """Gradients of a noisy quadratic, a function of the parameters and the step; returns the loss."""
    generator = torch.Generator().manual_seed(1000 + step)
    loss = torch.zeros(())
    for param in params:
        weights = torch.linspace(0.5, 2.0, param.numel()).view(param.shape)
        noise = torch.randn(param.shape, generator=generator)
        value = param.detach().float()
        param.grad = (weights * value + noise).to(param.dtype)
        loss = loss + (0.5 * weights * value.square() + noise * value).sum()
    return loss


def train(opt: Butterfly, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        opt.step(lambda step=step: set_grads(params, step))


def snapshot(opt: Butterfly) -> list[dict[str, Any]]:
    return copy.deepcopy([opt.state[p] for group in opt.param_groups for p in group["params"] if p in opt.state])


def assert_same(left: Any, right: Any, *, skip: tuple[str, ...] = ()) -> None:
    """Bit for bit, dtypes included."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - set(skip):
            assert_same(left[key], right[key], skip=skip)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair, skip=skip)
    else:
        assert left == right


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


NAN = float("nan")


def through_state_dict(opt: Butterfly, params: list[nn.Parameter], options: dict[str, Any]) -> tuple:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert_same(loaded, opt.state_dict())
    new = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = Butterfly(new, **options)
    resumed.load_state_dict(loaded)
    return resumed, new

"""A noisy quadratic, the modes of ``Butterfly`` and bit-for-bit comparison: shared by ``test_contract_*.py``."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from butterfly_opt import Butterfly
from butterfly_opt.stack import Stack

# Where two runs compute the same numbers in the same order they are compared bit for bit; everything else
# goes through float64 rotations of at most 2 * 5 stages, some 30 roundings.
STEP_TOLERANCE = 1e-12
SHAPES = ((6, 5), (4,), (3, 2, 2, 3))
MODES: dict[str, dict[str, Any]] = {
    "axes-innovation": {},
    "axes-secant": {"diagonal": "secant"},
    "radix-2": {"diagonal": "secant", "block": 2, "lead": 2},
    # Blocks so small that even these shapes have several stages.
    "several-stages": {"block": 4, "lead": 2, "decoupled_weight_decay": True, "weight_decay": 0.1},
    "flat": {"structure": "flat", "diagonal": "secant"},
    "flat-several-stages": {"structure": "flat", "block": 8, "lead": 2},
    "newton": {"diagonal": "newton", "lr": 0.5},
    "experts": {"batch_dims": 1, "diagonal": "secant", "weight_decay": 0.01},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())


def build(params: Any, *, batch_dims: int = 0, **options: Any) -> Butterfly:
    """An optimizer of one group; ``batch_dims`` is an option of groups only."""
    return Butterfly([{"params": params, "batch_dims": batch_dims}], **options)


def made_stacks(optimizer: Butterfly) -> list[Stack]:
    """The stacks of the last step."""
    return [stack for _, cohorts in optimizer._cohorts.values() for cohort in cohorts for stack in cohort.stacks]


def make_params(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


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


def all_finite(opt: Butterfly) -> bool:
    """Whether parameters and state are."""
    tensors = [param for group in opt.param_groups for param in group["params"]]
    tensors += [v for state in opt.state.values() for v in state.values() if isinstance(v, Tensor)]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


NAN = float("nan")


def through_state_dict(opt: Butterfly, params: list[nn.Parameter], options: dict[str, Any]) -> tuple:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert_same(loaded, opt.state_dict())
    new = copies(params)
    resumed = build(new, **options)
    resumed.load_state_dict(loaded)
    return resumed, new

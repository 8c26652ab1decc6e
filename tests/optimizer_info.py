"""``BUTTERFLY`` describes the optimizer as ``optim_db`` of ``torch.testing._internal`` describes torch's own.

Shared by ``test_optimizer_info*.py``, with the problem of torch's test/test_optim.py.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from butterfly_opt import Butterfly

STEPS = 20
KINDS = {f"{structure}, {diagonal}": {"structure": structure, "diagonal": diagonal}
          for structure in ("axes", "flat") for diagonal in ("secant", "innovation")}  # fmt: skip
FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "weight_decay": {"weight_decay": 0.1},
    "decoupled_weight_decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
    "small blocks": {"block": 4, "lead": 2},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def optim_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Every structure and diagonal with every flag; a new tensor lr in each call, for schedulers write into it."""
    flags = {
        **FLAGS,
        "tensor lr": {"lr": torch.tensor(0.001)},
        "1-element lr": {"lr": torch.tensor([[0.001]])},
        "tensor betas": {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    }
    return [
        OptimizerInput(params=None, kwargs={**shape, **kwargs}, desc=f"{where}, {desc}")
        for where, shape in KINDS.items()
        for desc, kwargs in copy.deepcopy(flags).items()
    ]


def optim_error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """Torch's, and ours."""
    inputs = get_error_inputs_for_all_optims(device, dtype)
    for kwargs, regex in (
        ({"lr": torch.tensor([[0.001], [0.001]])}, "Tensor lr must be 1-element"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (torch.tensor([0.9, 0.9]), 0.9)}, r"Tensor betas\[0\] must be 1-element"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"structure": "dense"}, "Invalid structure value: 'dense'"),
        ({"fused": True, "differentiable": True}, "does not support differentiable=True"),
        ({"amsgrad": True}, "does not support amsgrad=True"),
    ):
        bad = OptimizerInput(params=None, kwargs=kwargs, desc=regex)
        inputs.append(ErrorOptimizerInput(bad, error_type=ValueError, error_regex=regex))
    for layout, kind, regex in (
        ("complex", TypeError, "needs real floating point parameters"),
        ("sparse", RuntimeError, "does not support sparse gradients"),
    ):
        param = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64 if layout == "complex" else dtype))
        param.grad = torch.ones_like(param).to_sparse() if layout == "sparse" else None
        when = OptimizerErrorEnum.STEP_ERROR if layout == "sparse" else OptimizerErrorEnum.CONSTRUCTION_ERROR
        bad = OptimizerInput(params=[param], kwargs={}, desc=layout)
        inputs.append(ErrorOptimizerInput(bad, error_on=when, error_type=kind, error_regex=regex))
    return inputs


BUTTERFLY = OptimizerInfo(
    Butterfly,
    optim_inputs_func=optim_inputs,
    optim_error_inputs_func=optim_error_inputs,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: OneCycleLR(opt, max_lr=0.01, total_steps=STEPS + 1)],
        [lambda opt: CosineAnnealingLR(opt, T_max=STEPS)],
        [
            lambda opt: SequentialLR(
                opt, [StepLR(opt, gamma=0.5, step_size=3), CosineAnnealingLR(opt, T_max=10)], milestones=[8]
            )
        ],
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=(),
    not_og_supported_flags=(
        "foreach",
        "fused",
        "differentiable",
        "maximize",
        "capturable",
        "on_nonfinite",
        "stochastic_rounding",
        "decoupled_weight_decay",
    ),
    has_capturable_arg=True,
    supports_complex=False,
    supports_sparse=False,
)

INPUTS = {config.desc: config.kwargs for config in optim_inputs("cpu")}
BASIC = [name for name in INPUTS if name.endswith((", default", "maximize, weight_decay", "tensor lr", "1-element lr"))]
every_input = pytest.mark.parametrize("name", INPUTS)
basic_input = pytest.mark.parametrize("name", BASIC)
every_kind = pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS.keys())


def options(name: str) -> dict[str, Any]:
    return copy.deepcopy(INPUTS[name])


class Problem:
    """``|W x + b|^2`` of a 10 x 5 weight, torch's problem for these tests."""

    def __init__(self, *, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        weight, bias = (torch.randn(*shape, 2, generator=generator) for shape in ((10, 5), (10,)))
        parts = [part[..., 0].contiguous() if contiguous else part[..., 0] for part in (weight, bias)]
        self.weight, self.bias = (nn.Parameter(part) for part in parts)
        self.inputs = torch.randn(5, generator=generator)
        self.params = [self.weight, self.bias]
        assert self.weight.is_contiguous() == contiguous

    def loss(self) -> Tensor:
        return (self.weight.mv(self.inputs) + self.bias).square().sum()

    def backward(self) -> Tensor:
        self.weight.grad = self.bias.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, optimizer: Optimizer, steps: int, schedulers: Sequence[Any] = ()) -> None:
        for _ in range(steps):
            loss = self.backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(loss.item()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()

    def copy(self) -> "Problem":
        return copy.deepcopy(self)

    def named(self, is_named: bool) -> list[Any]:
        return [("weight", self.weight), ("bias", self.bias)] if is_named else self.params

    def assert_right_direction(self, before: Tensor, *, maximize: bool) -> None:
        assert (self.loss() > before) if maximize else (self.loss() < before)


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}

"""butterfly_opt.Butterfly against what torch's own suite (test/test_optim.py) demands of the steps of every optimizer.

Oracle: the demands themselves; the tests have torch's names. Equal runs are equal bit for bit here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract import assert_same, values
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from butterfly_opt import Butterfly

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
from optimizer_info import (
    BUTTERFLY,
    INPUTS,
    STEPS,
    Problem,
    basic_input,
    every_input,
    every_kind,
    optim_error_inputs,
    options,
)
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum


def test_optim_infos_do_not_specify_global_cliquey_kwargs() -> None:
    for config in BUTTERFLY.optim_inputs_func(device="cpu"):
        assert "differentiable" not in config.kwargs
    assert BUTTERFLY.name == "Butterfly"


ERRORS = optim_error_inputs("cpu", torch.float32)


@pytest.mark.parametrize("error", ERRORS, ids=[error.optimizer_error_input.desc for error in ERRORS])
def test_errors(error: ErrorOptimizerInput) -> None:
    config = error.optimizer_error_input
    on_step = error.error_on == OptimizerErrorEnum.STEP_ERROR
    optimizer = Butterfly(config.params, **config.kwargs) if on_step else None
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expected(error.error_type, match=error.error_regex):
        optimizer.step() if optimizer else Butterfly(config.params, **config.kwargs)


@every_input
def test_forloop_goes_right_direction(name: str) -> None:
    problem, kwargs = Problem(), options(name)
    before = problem.loss()
    problem.train(Butterfly(problem.params, **kwargs), STEPS)
    problem.assert_right_direction(before, maximize=kwargs.get("maximize", False))


@basic_input
def test_forloop_goes_right_direction_where_parameters_are_strided(name: str) -> None:
    strided, plain = Problem(contiguous=False), Problem()
    for problem in (strided, plain):
        problem.train(Butterfly(problem.params, **options(name)), STEPS // 2)
    assert_same(values(strided.params), values(plain.params))


Schedule = list[Callable[[Optimizer], LRScheduler]]
SCHEDULES = ["step", "plateau", "one cycle", "cosine", "sequential", "two"]
every_schedule = pytest.mark.parametrize("schedule", BUTTERFLY.scheduler_inputs, ids=SCHEDULES)


@every_schedule
@every_kind
def test_lr_schedulers_go_right_direction(schedule: Schedule, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    before = problem.loss()
    opt = Butterfly(problem.params, **kwargs)
    problem.train(opt, STEPS, [make(opt) for make in schedule])
    problem.assert_right_direction(before, maximize=False)


@every_schedule
@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_param_group_with_lrscheduler_goes_right_direction(schedule: Schedule, structure: str) -> None:
    problem = Problem()
    before = problem.loss()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": torch.tensor(0.01)}]
    opt = Butterfly(groups, structure=structure)
    problem.train(opt, STEPS, [make(opt) for make in schedule])
    problem.assert_right_direction(before, maximize=False)
    assert isinstance(opt.param_groups[1]["lr"], Tensor)


@every_input
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr(name: str, shape: tuple[int, ...]) -> None:
    """2^-10 is the same number in float32 and float64, so the trajectories are the same bit for bit."""
    problem = Problem()
    other = problem.copy()
    problem.train(Butterfly(problem.params, **{**options(name), "lr": 2.0**-10}), 5)
    lr = torch.full(shape, 2.0**-10)
    other.train(Butterfly(other.params, **{**options(name), "lr": lr}), 5)
    assert_same(values(problem.params), values(other.params))
    assert torch.equal(lr, torch.full(shape, 2.0**-10))


@every_input
def test_param_groups_weight_decay(name: str) -> None:
    problem, kwargs = Problem(), options(name)
    before = problem.loss()
    groups = [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **kwargs, "weight_decay": 0.0}]
    problem.train(Butterfly(groups), STEPS // 2)
    problem.assert_right_direction(before, maximize=kwargs.get("maximize", False))


@every_input
def test_param_groups_lr(name: str) -> None:
    problem, kwargs = Problem(), options(name)
    before, irrelevant = problem.loss(), nn.Parameter(torch.tensor([0.5, -2.0]))
    start = irrelevant.detach().clone()
    irrelevant.grad = torch.ones(2)
    opt = Butterfly([{"params": problem.params, "lr": 1e-3, **kwargs}, {"params": [irrelevant]}], lr=1e-28)
    problem.train(opt, STEPS // 2)
    problem.assert_right_direction(before, maximize=kwargs.get("maximize", False))
    assert_same(irrelevant.detach(), start)


@basic_input
def test_step_is_noop_when_params_have_no_grad(name: str) -> None:
    params = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    start = [param.clone() for param in params]
    opt = Butterfly(params, **options(name))
    assert_same(opt.step(lambda: torch.tensor([1.0])), torch.tensor([1.0]))
    assert_same(params, start)
    assert not opt.state


@every_input
def test_step_is_noop_for_zero_grads(name: str) -> None:
    kwargs = {**options(name), "weight_decay": 0.0}
    param = torch.randn((5, 1), generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = param.detach().clone()
    param.grad = torch.zeros_like(param)
    opt = Butterfly([param], **kwargs)
    opt.step(lambda: torch.tensor([1.0]))
    opt.step(lambda: None)
    assert_same(param.detach(), start)


@basic_input
def test_optimizer_can_be_printed(name: str) -> None:
    text = repr(Butterfly(Problem().params, **options(name)))
    assert text.startswith("Butterfly (")
    assert f"structure: {INPUTS[name]['structure']}" in text


@pytest.fixture
def global_hooks() -> Iterator[list[int]]:
    order: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append(0)),
        register_optimizer_step_post_hook(lambda *_: order.append(5)),
    ]
    yield order
    for handle in handles:
        handle.remove()


@every_kind
def test_step_all_hooks(kwargs: dict[str, Any], global_hooks: list[int]) -> None:
    """Also on integer-valued parameters that do not require gradients, which torch's suite uses here."""
    params = [torch.tensor([1.0, 1.0])]
    opts = [Butterfly(params, **kwargs), SGD(params)]
    handles = []
    for opt in opts:
        handles.append(opt.register_step_pre_hook(lambda *_: global_hooks.append(1)))
        handles.append(opt.register_step_post_hook(lambda *_: global_hooks.append(2)))
    opts[0].step()
    opts[1].step()
    opts[0].step(lambda: 1)
    assert global_hooks == [0, 1, 2, 5] * 3
    for handle in handles:
        handle.remove()
    opts[0].step()
    assert global_hooks[12:] == [0, 5]
    params[0].grad = torch.tensor([1.0, -2.0])
    opts[0].step()
    assert params[0][0] < 1 < params[0][1]
    assert not params[0].requires_grad

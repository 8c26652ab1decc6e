"""butterfly_opt.Butterfly in a training step compiled by torch.compile.

Oracles: the same run without the compiler, bit for bit (the "eager" backend of dynamo runs the traced operations
unchanged); dynamo's own counters.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from butterfly_opt import Butterfly

STEPS, WARM = 20, 3

MODES: dict[str, dict[str, Any]] = {
    "axes, innovation": {},
    "axes, secant": {"diagonal": "secant"},
    "several stages": {"block": 4, "lead": 2},
    "flat, secant": {"structure": "flat", "diagonal": "secant"},
    "tensor lr": {"lr": torch.tensor(0.0078125)},
    "capturable": {"capturable": True},
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def training_step(options: dict[str, Any]) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Module, Butterfly]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    # A tensor lr must be one's own: schedules write into it.
    opt = Butterfly(model.parameters(), **{"lr": 0.0078125, **copy.deepcopy(options)})

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        opt.step()
        return loss.detach()

    return step, model, opt


def run(step: Callable[[Tensor, Tensor], Tensor], steps: range, *, schedule: Any = None) -> list[Tensor]:
    losses = []
    for index in steps:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(16, 6, generator=generator)
        losses.append(step(inputs, inputs[:, :3].sin()))
        if schedule is not None:
            schedule.step()
    return losses


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_compiled_steps_equal_eager_steps_without_recompiling(options: dict[str, Any]) -> None:
    """Gradients exist after the first step and the counters move: all compilation is over after three steps."""
    step, model, opt = training_step(options)
    compiled_step, compiled_model, compiled_opt = training_step(options)
    compiled = torch.compile(compiled_step, backend="eager")
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=STEPS) for o in (opt, compiled_opt)]
    losses = run(step, range(STEPS), schedule=schedules[0])
    found = run(compiled, range(WARM), schedule=schedules[1])
    frames = counters["stats"]["unique_graphs"]
    assert frames > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += run(compiled, range(WARM, STEPS), schedule=schedules[1])
    assert counters["stats"]["unique_graphs"] == frames
    torch.testing.assert_close(found, losses, rtol=0, atol=0)
    for param, other in zip(model.parameters(), compiled_model.parameters(), strict=True):
        assert torch.equal(param, other)


def test_the_step_itself_is_not_traced() -> None:
    """``torch.compile(opt.step)`` compiles nothing: the step is a graph break."""
    _, model, opt = training_step({})
    compiled = torch.compile(opt.step, backend="eager")
    for index in range(5):
        for param in model.parameters():
            param.grad = torch.full_like(param, float(index + 1))
        compiled()
    assert counters["stats"].get("unique_graphs", 0) == 0
    assert all(state["step"] == 5 for state in opt.state.values())


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    """Only the model is compiled, by the default front end with the "aot_eager" backend."""
    step, model, _ = training_step({})
    losses = run(step, range(STEPS))
    _, other, opt = training_step({})
    compiled = torch.compile(other, backend="aot_eager")

    def compiled_step(inputs: Tensor, targets: Tensor) -> Tensor:
        opt.zero_grad()
        loss = nn.functional.mse_loss(compiled(inputs), targets)
        loss.backward()
        opt.step()
        return loss.detach()

    # The traced backward pass may sum in another order.
    torch.testing.assert_close(run(compiled_step, range(STEPS)), losses, rtol=1e-4, atol=1e-6)
    assert len(list(model.parameters())) == len(opt.state)

"""butterfly_opt.Butterfly: what torch.optim promises of a step: schedules, groups, decay, closures, shapes.

Oracle: a second optimizer run another way (contiguous, with lr as a float, by hand) and compared bit for bit.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_same, every_mode, make_params, set_grads, snapshot, through_state_dict, train, values
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

from butterfly_opt import Butterfly

SCHEDULERS: dict[str, Callable[[Butterfly], Any]] = {
    "StepLR": lambda opt: StepLR(opt, step_size=4, gamma=0.5),
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=20),
    "ReduceLROnPlateau": lambda opt: ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "CosineAnnealingLR": lambda opt: CosineAnnealingLR(opt, T_max=15),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers(scheduler: Callable[[Butterfly], Any]) -> None:
    """A run with a scheduler equals a run in which the same lr and betas are set by hand."""
    params, copies = make_params(), make_params()
    opt, by_hand = Butterfly(params, lr=0.05), Butterfly(copies, lr=0.05)
    schedule = scheduler(opt)
    rates = []
    for step in range(15):
        by_hand.param_groups[0].update({key: opt.param_groups[0][key] for key in ("lr", "betas")})
        rates.append(float(opt.param_groups[0]["lr"]))
        train(opt, params, range(step, step + 1))
        train(by_hand, copies, range(step, step + 1))
        schedule.step(1.0) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
    assert len(set(rates)) > 2
    assert_same(values(params), values(copies))


@pytest.mark.parametrize("decoupled", [False, True])
def test_tensor_lr_equals_float_lr(decoupled: bool) -> None:
    runs = []
    for lr in (2.0**-5, torch.tensor(2.0**-5)):
        params = make_params()
        train(Butterfly(params, lr=lr, weight_decay=0.25, decoupled_weight_decay=decoupled), params, range(20))
        runs.append(values(params))
    assert_same(*runs)


def test_tensor_lr_with_a_scheduler() -> None:
    lr = torch.tensor(0.05)
    params, copies = make_params(), make_params()
    opt, other = Butterfly(params, lr=lr), Butterfly(copies, lr=0.05)
    schedules = [StepLR(o, step_size=2, gamma=0.5) for o in (opt, other)]
    for step in range(6):
        train(opt, params, range(step, step + 1))
        train(other, copies, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert opt.param_groups[0]["lr"].item() == pytest.approx(0.00625)
    for left, right in zip(params, copies, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_groups_with_overrides() -> None:
    first, second, third = make_params(), make_params(), make_params()
    opt = Butterfly(
        [
            {"params": first, "lr": 0.03, "depth": 1},
            {"params": second, "structure": "flat", "diagonal": "innovation", "weight_decay": 0.5},
            {"params": third, "lr": 0.0},
        ],
        lr=0.01,
    )
    alone = make_params()
    train(Butterfly(alone, lr=0.03, depth=1), alone, range(10))
    start = values(third)
    train(opt, [*first, *second, *third], range(0))
    for step in range(10):
        for params in (first, second, third):
            set_grads(params, step)
        opt.step()
    assert_same(values(first), values(alone))
    assert_same(values(third), start)
    assert not torch.equal(second[0], start[0])
    assert opt.state[first[0]]["angles0"].shape == (1, 3, 3)
    n = sum(param.numel() for param in second)
    assert opt.state[second[0]]["angles0"].shape == (opt.defaults["depth"], 7, n // 2)
    assert "displacement" not in opt.state[second[0]]
    assert second[1] not in opt.state
    assert third[0] in opt.state


@every_mode
def test_zero_gradients_from_the_start_change_nothing(options: dict[str, Any]) -> None:
    options = {**options, "weight_decay": 0.0}
    params = make_params()
    start, opt = values(params), Butterfly(params, **options)

    def closure() -> Tensor:
        for param in params:
            param.grad = torch.zeros_like(param)
        return torch.zeros(())

    for _ in range(8):
        opt.step(closure)
    assert_same(values(params), start)
    for state in snapshot(opt):
        assert not any(state[key].any() for key in state if key.startswith(("angles", "sketch")) and key != "angles")
    train(opt, params, range(5))
    assert all(torch.isfinite(param).all() for param in params)


def test_a_parameter_without_gradient_keeps_its_state() -> None:
    params = make_params()
    opt = Butterfly(params)
    train(opt, params, range(3))
    state, value = copy.deepcopy(opt.state[params[0]]), params[0].detach().clone()
    for step in range(3, 6):
        set_grads(params, step)
        params[0].grad = None
        opt.step()
    assert_same(opt.state[params[0]], state)
    assert torch.equal(params[0], value)
    assert opt.state[params[1]]["step"] == 6


def test_no_gradient_at_all() -> None:
    params = make_params()
    for structure in ("axes", "flat"):
        opt = Butterfly(params, structure=structure)
        assert opt.step() is None
        assert not opt.state


@pytest.mark.parametrize("diagonal", ["secant", "innovation"])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_flat_does_not_write_a_parameter_without_gradient(missing: int, diagonal: str) -> None:
    params = make_params()
    opt = Butterfly(params, structure="flat", diagonal=diagonal, weight_decay=0.1, decoupled_weight_decay=True)
    train(opt, params, range(4))
    before = values(params)
    for step in range(4, 8):
        set_grads(params, step)
        params[missing].grad = None
        opt.step()
    for i, (param, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, old) == (i == missing)
    train(opt, params, range(8, 12))
    assert not torch.equal(params[missing], before[missing])
    assert all(torch.isfinite(param).all() for param in params)


@every_mode
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_modified(options: dict[str, Any], maximize: bool) -> None:
    params = make_params()
    opt = Butterfly(params, **{**options, "maximize": maximize, "weight_decay": 0.1})
    for step in range(4):
        seen = []

        def closure(step: int = step, seen: list = seen) -> Tensor:
            loss = set_grads(params, step)
            seen[:] = [(param.grad, param.grad.clone()) for param in params]
            return loss

        opt.step(closure)
        for param, (grad, kept) in zip(params, seen, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, kept)


def test_maximize_is_minimizing_the_negative() -> None:
    params, copies = make_params(), make_params()
    up, down = Butterfly(params, maximize=True, weight_decay=0.1), Butterfly(copies, weight_decay=0.1)
    for step in range(10):
        set_grads(copies, step)
        for param, other in zip(params, copies, strict=True):
            param.grad, other.grad = other.grad.clone(), -other.grad
        with torch.no_grad():
            up.step()
            for other in copies:
                other.grad = other.grad.clone()
            down.step()
        assert_same(values(params), values(copies))


def test_decoupled_decay_multiplies_and_l2_adds_to_the_gradient() -> None:
    decay, lr = 0.125, 0.25
    params = make_params()
    start = values(params)
    decoupled = Butterfly(params, lr=lr, weight_decay=decay, decoupled_weight_decay=True)
    for param in params:
        param.grad = torch.zeros_like(param)
    decoupled.step()
    assert_same(values(params), [value * (1 - lr * decay) for value in start])

    params, copies = make_params(), make_params()
    l2, plain = Butterfly(params, lr=0.01, weight_decay=decay), Butterfly(copies, lr=0.01)
    for step in range(10):
        set_grads(params, step)
        set_grads(copies, step)
        for param in copies:
            param.grad = param.grad.add(param.detach(), alpha=decay)
        l2.step()
        plain.step()
        assert_same(values(params), values(copies))


def test_closure_runs_with_gradients_and_its_value_is_returned() -> None:
    params = make_params()
    opt, seen = Butterfly(params), []

    def closure() -> str:
        seen.append(torch.is_grad_enabled())
        loss = sum(param.square().sum() for param in params)
        opt.zero_grad()
        loss.backward()
        return f"call {len(seen)}"

    with torch.no_grad():
        assert opt.step(closure) == "call 1"
    assert seen == [True]
    assert torch.is_grad_enabled()


def test_same_batch_calls_the_closure_twice() -> None:
    params = make_params()
    opt, seen = Butterfly(params, pairs="same_batch"), []

    def closure() -> int:
        assert torch.is_grad_enabled()
        set_grads(params, 0)
        seen.append(values(params))
        return len(seen)

    assert opt.step(closure) == 1
    assert len(seen) == 2
    assert not torch.equal(seen[0][0], seen[1][0])


def test_same_batch_needs_a_closure() -> None:
    params = make_params()
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"pairs='same_batch' needs step\(closure\)"):
        Butterfly(params, pairs="same_batch").step()


def test_same_batch_without_a_closure_changes_nothing() -> None:
    params = make_params()
    start = values(params)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="needs step"):
        Butterfly(params, pairs="same_batch").step()
    assert_same(values(params), start)


EVERY_SHAPE = [(), (1,), (7,), (1, 1), (1, 9), (9, 1), (5, 3), (4, 3, 2), (4, 3, 2, 2), (0,), (0, 3)]


@pytest.mark.parametrize("shape", EVERY_SHAPE)
@every_mode
def test_every_shape(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    params = make_params((shape,))
    start = values(params)
    opt = Butterfly(params, **options)
    train(opt, params, range(5))
    assert params[0].shape == shape
    assert torch.isfinite(params[0]).all()
    assert torch.equal(params[0], start[0]) == (params[0].numel() == 0)
    resumed, new = through_state_dict(opt, params, options)
    train(resumed, new, range(5, 7))


@every_mode
def test_an_empty_parameter_among_others(options: dict[str, Any]) -> None:
    params, plain = make_params(((0, 3), (6, 5), (0,))), make_params(((6, 5),))
    opt = Butterfly(params, **options)
    train(opt, params, range(5))
    train(Butterfly(plain, **options), plain, range(5))
    assert torch.isfinite(params[1]).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@every_mode
def test_memory_layout_does_not_matter(layout: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    start = make_params(((4, 3, 2, 5),))[0].detach()
    plain, other = nn.Parameter(start.clone()), nn.Parameter(layout(start.clone()))
    strides = other.stride()
    assert strides != plain.stride()
    opts = Butterfly([plain], **options), Butterfly([other], **options)
    for step in range(8):
        train(opts[0], [plain], range(step, step + 1))
        train(opts[1], [other], range(step, step + 1))
    assert other.stride() == strides
    assert torch.equal(plain, other)


def global_state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        torch.initial_seed(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.matmul.allow_tf32,
    ]


@every_mode
def test_global_state_is_left_alone(options: dict[str, Any]) -> None:
    params = make_params()
    before = global_state()
    opt = Butterfly(params, **options)
    train(opt, params, range(3))
    opt.load_state_dict(opt.state_dict())
    assert global_state() == before


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_empty_parameters_alone_are_no_step(structure: str) -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0, 3))]
    opt = Butterfly(params, structure=structure)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert not opt.state

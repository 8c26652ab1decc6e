"""butterfly_opt.Butterfly: what torch.optim promises of a step: schedules, groups, decay, closures, shapes.

Oracle: a second optimizer run another way (contiguous, with lr as a float, by hand) and compared bit for bit.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    all_finite,
    assert_same,
    build,
    every_mode,
    make_params,
    set_grads,
    snapshot,
    through_state_dict,
    train,
    values,
)
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
    params, others = make_params(), make_params()
    opt, by_hand = Butterfly(params, lr=0.05), Butterfly(others, lr=0.05)
    schedule = scheduler(opt)
    rates = []
    for step in range(15):
        by_hand.param_groups[0].update({key: opt.param_groups[0][key] for key in ("lr", "betas")})
        rates.append(float(opt.param_groups[0]["lr"]))
        train(opt, params, range(step, step + 1))
        train(by_hand, others, range(step, step + 1))
        schedule.step(1.0) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
    assert len(set(rates)) > 2
    assert_same(values(params), values(others))


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
    params, others = make_params(), make_params()
    opt, other = Butterfly(params, lr=lr), Butterfly(others, lr=0.05)
    schedules = [StepLR(o, step_size=2, gamma=0.5) for o in (opt, other)]
    for step in range(6):
        train(opt, params, range(step, step + 1))
        train(other, others, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert opt.param_groups[0]["lr"].item() == pytest.approx(0.00625)
    for left, right in zip(params, others, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_groups_with_overrides() -> None:
    first, second, third = make_params(), make_params(), make_params()
    opt = Butterfly(
        [
            {"params": first, "lr": 0.03, "block": 4, "lead": 2},
            {"params": second, "structure": "flat", "diagonal": "secant", "weight_decay": 0.5},
            {"params": third, "lr": 0.0},
        ],
        lr=0.01,
    )
    alone = make_params()
    train(Butterfly(alone, lr=0.03, block=4, lead=2), alone, range(10))
    start = values(third)
    for step in range(10):
        for params in (first, second, third):
            set_grads(params, step)
        opt.step()
    assert_same(values(first), values(alone))
    assert_same(values(third), start)
    assert not torch.equal(second[0], start[0])
    # Six rows: two leaves of three, and a root of their two leading outputs each.
    assert opt.state[first[0]]["rotation0"].shape == (1, 3 * 3 * 2 + 4 * 4)
    assert opt.state[third[0]]["rotation0"].shape == (1, 6 * 6)
    assert opt.state[second[0]]["cross"].shape == (sum(param.numel() for param in second),)
    assert "cross" not in opt.state[first[0]]
    assert second[1] not in opt.state
    assert third[0] in opt.state


def zero_grads(params: list[nn.Parameter], *, of: slice = slice(None)) -> None:
    for param in params[of]:
        param.grad = torch.zeros_like(param)


@every_mode
def test_zero_gradients_from_the_start_leave_no_trace(options: dict[str, Any]) -> None:
    """Loaders take such a dummy step to make the state: the run after it is that of a fresh optimizer."""
    options = {**options, "weight_decay": 0.0}
    params, others = make_params(), make_params()
    start, opt, fresh = values(params), build(params, **options), build(others, **options)
    for _ in range(3):
        zero_grads(params)
        opt.step()
    assert_same(values(params), start)
    for state in opt.state.values():
        assert not any(state[key].any() for key in state if key.startswith(("exp", "disp", "cross", "moment", "step")))
        assert state["calls"] == 0
    train(opt, params, range(6))
    train(fresh, others, range(6))
    assert_same(values(params), values(others))
    assert_same(snapshot(opt), snapshot(fresh))


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_a_tensor_whose_first_gradients_are_zero_starts_later(diagonal: str) -> None:
    """Two of one shape, that would share their operations: the later one is as if it were new."""
    params, others = make_params(((6, 5), (6, 5))), make_params(((6, 5), (6, 5)))
    opt, fresh = Butterfly(params, diagonal=diagonal), Butterfly(others, diagonal=diagonal)
    for step in range(9):
        for own in (params, others):
            set_grads(own, step)
        if step < 3:
            params[1].grad.zero_()
            others[1].grad = None
        opt.step()
        fresh.step()
    assert_same(values(params), values(others))
    assert_same(snapshot(opt), snapshot(fresh))


@pytest.mark.filterwarnings("ignore:.*their step was skipped")
@every_mode
def test_an_entry_that_never_had_a_gradient_never_moves(options: dict[str, Any]) -> None:
    """Bit for bit, whatever it is mixed with; also entries of both signs of zero, and after a non-finite step."""
    params = make_params()
    start, opt = values(params), build(params, **{**options, "weight_decay": 0.0})
    masks = [torch.arange(param.numel()).view(param.shape) % 3 > 0 for param in params]
    for step in range(30):
        set_grads(params, step)
        for param, mask in zip(params, masks, strict=True):
            param.grad = torch.where(mask, param.grad, -0.0 if step % 2 else 0.0)
        if step == 12:
            params[0].grad[0, 1] = float("inf")
        opt.step()
    for param, mask, old in zip(params, masks, start, strict=True):
        assert torch.equal(param[~mask], old[~mask])
        assert not torch.isclose(param[mask], old[mask], rtol=0, atol=1e-6).any()


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_an_orthogonal_parametrization_keeps_its_zeros(structure: str) -> None:
    """torch keeps the upper triangle of its skew matrix at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6, bias=False), use_trivialization=False)
        target = torch.linalg.qr(torch.randn(6, 6)).Q
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.tril_()
    opt = Butterfly(layer.parameters(), lr=0.02, structure=structure)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = (layer.weight - target).square().sum()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not original.triu(1).any()


def test_a_triangular_factor_and_padding_rows_stay_zero() -> None:
    factor, rows = nn.Parameter(torch.eye(7)), nn.Embedding(9, 5, padding_idx=2)
    opt = Butterfly([factor, rows.weight], lr=0.05, diagonal="secant")
    tokens, generator = torch.tensor([0, 2, 3, 5]), torch.Generator().manual_seed(0)
    start = rows.weight.detach().clone()
    for _ in range(20):
        opt.zero_grad()
        x = torch.randn(7, generator=generator)
        ((torch.tril(factor) @ x).square().sum() + (rows(tokens) - 1).square().sum()).backward()
        opt.step()
    assert not factor.triu(1).any()
    seen = torch.zeros(9, dtype=torch.bool).index_fill_(0, torch.tensor([0, 3, 5]), True)
    assert torch.equal(rows.weight[~seen], start[~seen])
    assert not torch.isclose(rows.weight[seen], start[seen]).any()


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
    assert all_finite(opt)


@every_mode
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_modified(options: dict[str, Any], maximize: bool) -> None:
    params = make_params()
    opt = build(params, **{**options, "maximize": maximize, "weight_decay": 0.1})
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
    params, others = make_params(), make_params()
    up, down = Butterfly(params, maximize=True, weight_decay=0.1), Butterfly(others, weight_decay=0.1)
    for step in range(10):
        set_grads(others, step)
        for param, other in zip(params, others, strict=True):
            param.grad, other.grad = other.grad.clone(), -other.grad
        with torch.no_grad():
            up.step()
            for other in others:
                other.grad = other.grad.clone()
            down.step()
        assert_same(values(params), values(others))


def test_decoupled_decay_multiplies_and_l2_adds_to_the_gradient() -> None:
    decay, lr = 0.125, 0.25
    params = make_params()
    start = values(params)
    decoupled = Butterfly(params, lr=lr, weight_decay=decay, decoupled_weight_decay=True)
    for param in params:
        param.grad = torch.zeros_like(param)
    decoupled.step()
    assert_same(values(params), [value * (1 - lr * decay) for value in start])

    params, others = make_params(), make_params()
    l2, plain = Butterfly(params, lr=0.01, weight_decay=decay), Butterfly(others, lr=0.01)
    for step in range(10):
        set_grads(params, step)
        set_grads(others, step)
        for param in others:
            param.grad = param.grad.add(param.detach(), alpha=decay)
        l2.step()
        plain.step()
        assert_same(values(params), values(others))


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


EVERY_SHAPE = [(), (1,), (7,), (1, 1), (1, 9), (9, 1), (5, 3), (4, 3, 2), (4, 3, 2, 2), (0,), (0, 3)]


@pytest.mark.parametrize("shape", EVERY_SHAPE)
@every_mode
def test_every_shape(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    params = make_params((shape,))
    start = values(params)
    opt = build(params, **options)
    train(opt, params, range(5))
    assert params[0].shape == shape
    assert torch.isfinite(params[0]).all()
    assert torch.equal(params[0], start[0]) == (params[0].numel() == 0)
    resumed, new = through_state_dict(opt, params, options)
    train(resumed, new, range(5, 7))


@every_mode
def test_an_empty_parameter_among_others(options: dict[str, Any]) -> None:
    params, plain = make_params(((0, 3), (6, 5), (0,))), make_params(((6, 5),))
    opt = build(params, **options)
    train(opt, params, range(5))
    train(build(plain, **options), plain, range(5))
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
    opts = build([plain], **options), build([other], **options)
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
    opt = build(params, **options)
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

"""butterfly_opt.Butterfly as a torch optimizer: what torch.optim promises, and what DESIGN.md promises beyond.

Oracles: a second optimizer run another way (uninterrupted, contiguous, with lr as a float) and compared bit
for bit; torch's own bookkeeping; the bound of one step.
"""

import copy
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

import butterfly_opt
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


def test_is_a_torch_optimizer() -> None:
    opt = Butterfly(make_params())
    assert isinstance(opt, torch.optim.Optimizer)
    assert {"Butterfly", "__version__"} <= set(butterfly_opt.__all__)
    assert "Butterfly" in repr(opt)
    assert not opt.state


def test_defaults_of_the_signature() -> None:
    signature = inspect.signature(Butterfly)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == ["params", "lr", "betas", "eps", "weight_decay"]
    assert all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values() if p not in positional)
    expected = {
        "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "structure": "axes",
        "diagonal": "secant", "pairs": "ema", "scaling": "adam", "block_size": None,
        "decoupled_weight_decay": False, "maximize": False, "on_nonfinite": "skip", "backend": "auto", "seed": 0,
    }  # fmt: skip
    assert {name: signature.parameters[name].default for name in expected} == expected
    defaults = {p.name: p.default for p in signature.parameters.values() if p.name != "params"}
    (group,) = Butterfly(make_params()).param_groups
    assert {name: value for name, value in group.items() if name != "params"} == defaults


NAN = float("nan")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "learning rate: -1.0"),
    ({"lr": NAN}, "learning rate: nan"),
    ({"lr": math.inf}, "learning rate: inf"),
    ({"lr": "fast"}, "learning rate: 'fast'"),
    ({"lr": torch.tensor([0.1])}, r"Tensor lr must be 0-dimensional, got shape \(1,\)"),
    ({"lr": torch.tensor(NAN)}, "learning rate: nan"),
    ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, "beta parameter at index 1: -0.1"),
    ({"betas": (NAN, 0.9)}, "beta parameter at index 0: nan"),
    ({"betas": (0.9, NAN)}, "beta parameter at index 1: nan"),
    ({"betas": (0.9,)}, r"betas: \(0.9,\), expected a pair"),
    ({"betas": 0.9}, "betas: 0.9, expected a pair"),
    ({"eps": -1e-8}, "eps value: -1e-08"),
    ({"eps": NAN}, "eps value: nan"),
    ({"eps": math.inf}, "eps value: inf"),
    ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
    ({"weight_decay": NAN}, "weight_decay value: nan"),
    ({"refit_lr": -0.1}, "refit_lr value: -0.1"),
    ({"refit_lr": NAN}, "refit_lr value: nan"),
    ({"max_update": 0.0}, "max_update value: 0.0"),
    ({"max_update": NAN}, "max_update value: nan"),
    ({"max_update": None}, "max_update value: None"),
    ({"depth": 0}, "depth value: 0, expected an integer >= 1"),
    ({"depth": 1.0}, "depth value: 1.0"),
    ({"depth": True}, "depth value: True"),
    ({"refit_every": 0}, "refit_every value: 0"),
    ({"refit_steps": -1}, "refit_steps value: -1"),
    ({"seed": -1}, "seed value: -1"),
    ({"seed": 1.5}, "seed value: 1.5"),
    ({"structure": "kron"}, "structure value: 'kron', expected one of axes, flat"),
    ({"diagonal": "adam"}, "diagonal value: 'adam'"),
    ({"pairs": "closure"}, "pairs value: 'closure'"),
    ({"scaling": "sgd"}, "scaling value: 'sgd'"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite value: 'ignore'"),
    ({"backend": "cuda"}, "backend value: 'cuda'"),
    ({"maximize": 1}, "maximize value: 1"),
    ({"decoupled_weight_decay": "yes"}, "decoupled_weight_decay value: 'yes'"),
    ({"block_size": 12, "structure": "flat"}, "block_size value: 12, expected None or a power of two"),
    ({"block_size": 1, "structure": "flat"}, "block_size value: 1"),
    ({"block_size": 8.0, "structure": "flat"}, "block_size value: 8.0"),
    ({"block_size": 8}, "block_size = 8 needs structure='flat', got 'axes'"),
    ({"diagonal": "innovation", "scaling": "newton"}, "scaling='newton' needs diagonal='secant'"),
    ({"diagonal": "innovation", "pairs": "same_batch"}, "pairs='same_batch' needs diagonal='secant'"),
    ({"capturable": True, "on_nonfinite": "raise"}, "on_nonfinite='raise' .* cannot be capturable=True"),
]
bad_options = pytest.mark.parametrize(("options", "match"), BAD, ids=[str(options) for options, _ in BAD])


@bad_options
def test_bad_hyper_parameter_before_anything_is_built(options: dict[str, Any], match: str) -> None:
    params = iter(make_params())
    with pytest.raises(ValueError, match=match):
        Butterfly(params, **options)
    assert len(list(params)) == len(SHAPES)


@bad_options
def test_bad_hyper_parameter_of_a_group(options: dict[str, Any], match: str) -> None:
    opt = Butterfly(make_params())
    with pytest.raises(ValueError, match=match):
        opt.add_param_group({"params": make_params(), **options})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match=match):
        Butterfly([{"params": make_params(), **options}])


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1}, {"betas": [0.0, 0.0]}, {"eps": 0.0}, {"refit_steps": 0}])
def test_bounds_are_inclusive(options: dict[str, Any]) -> None:
    params = make_params()
    train(Butterfly(params, **options), params, range(3))
    assert all(torch.isfinite(param).all() for param in params)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_must_be_real_floating_point(dtype: torch.dtype) -> None:
    param = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"needs real floating point parameters, got {dtype}"):
        Butterfly([param])
    opt = Butterfly(make_params())
    with pytest.raises(TypeError, match="needs real floating point parameters"):
        opt.add_param_group({"params": param})
    assert len(opt.param_groups) == 1


def test_torch_rejects_what_it_rejects_everywhere() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Butterfly([])
    param = make_params()[0]
    opt = Butterfly([param])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [param]})
    with pytest.raises(TypeError):
        Butterfly(param)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [make_params, lambda: iter(make_params()), lambda: [{"params": iter(make_params())}],
                                    lambda: [(str(i), p) for i, p in enumerate(make_params())]])  # fmt: skip
@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_every_form_of_params(params: Callable[[], Any], structure: str) -> None:
    opt = Butterfly(params(), structure=structure)
    assert len(opt.param_groups[0]["params"]) == len(SHAPES)


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
    assert opt.state[second[0]]["angles0"].shape == (2, 7, n // 2)
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


def through_deepcopy(opt: Butterfly, params: list[nn.Parameter], options: dict[str, Any]) -> tuple:
    return copy.deepcopy((opt, params))


def through_pickle(opt: Butterfly, params: list[nn.Parameter], options: dict[str, Any]) -> tuple:
    return pickle.loads(pickle.dumps((opt, params)))


def through_state_dict_in_place(opt: Butterfly, params: list[nn.Parameter], options: dict[str, Any]) -> tuple:
    """Rolls the same optimizer back, after it has gone on: its cached bases must not survive."""
    kept, saved = values(params), copy.deepcopy(opt.state_dict())
    other = copy.deepcopy((opt, params))
    train(opt, params, range(100, 103))
    with torch.no_grad():
        for param, value in zip(params, kept, strict=True):
            param.copy_(value)
    opt.load_state_dict(saved)
    resumed = (opt, params)
    train(*other, range(8, 12))
    train(*resumed, range(8, 12))
    assert_same(values(resumed[1]), values(other[1]))
    return resumed


@every_mode
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (through_state_dict, torch.float32),
        (through_state_dict, torch.bfloat16),
        (through_state_dict, torch.float64),
        (through_deepcopy, torch.float32),
        (through_pickle, torch.bfloat16),
    ],
)
def test_continuation_is_bit_identical(options: dict[str, Any], way: Callable, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    opt = Butterfly(params, **options)
    train(opt, params, range(8))
    resumed, new = way(opt, params, options)
    assert all(left is not right for left, right in zip(params, new, strict=True))
    assert_same(snapshot(resumed), snapshot(opt))
    train(opt, params, range(8, 16))
    train(resumed, new, range(8, 16))
    assert_same(values(new), values(params))
    assert_same(snapshot(resumed), snapshot(opt))


@every_mode
def test_loading_into_the_same_optimizer(options: dict[str, Any]) -> None:
    params = make_params()
    opt = Butterfly(params, **options)
    train(opt, params, range(8))
    through_state_dict_in_place(opt, params, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [MODES["axes-secant"], MODES["flat"], MODES["same-batch"]])
def test_state_of_half_precision_parameters_is_float32(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype=dtype)
    opt = Butterfly(params, lr=0.01, **options)
    train(opt, params, range(8))
    resumed, new = through_state_dict(opt, params, options)
    train(resumed, new, range(8, 12))
    for optimizer in (opt, resumed):
        tensors = [v for state in snapshot(optimizer) for v in state.values() if isinstance(v, Tensor)]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert {param.dtype for param in new} == {dtype}


def test_state_of_an_unknown_format_is_refused() -> None:
    params = make_params()
    opt = Butterfly(params)
    train(opt, params, range(2))
    saved = opt.state_dict()
    saved["state"][0]["version"] = 99
    with pytest.raises(ValueError, match="format version 99, this Butterfly reads"):
        Butterfly(make_params()).load_state_dict(saved)


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


COUNTERS = ("calls", "skipped")
BAD_VALUES = [NAN, math.inf, -math.inf, 1e30]


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("first", [False, True])
@every_mode
def test_a_non_finite_gradient_is_skipped(options: dict[str, Any], first: bool, bad: float) -> None:
    """One bad element: no bit of the parameters and the state changes, counters apart; the rest goes on."""
    params = make_params(((6, 5), (4,)))
    opt = Butterfly(params, **options)
    if not first:
        train(opt, params, range(6))
    before, kept = values(params), snapshot(opt)

    def closure() -> Tensor:
        loss = set_grads(params, 6)
        params[0].grad[2, 3] = bad
        return loss

    opt.step(closure)
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1]) == (options.get("structure") == "flat")
    after = snapshot(opt)
    if not first:
        assert_same(after[0], kept[0], skip=COUNTERS)
    assert after[0]["skipped"] == 1
    assert after[0]["step"] == (0 if first else 6)
    train(opt, params, range(7, 10))
    assert all(torch.isfinite(v).all() for s in snapshot(opt) for v in s.values() if isinstance(v, Tensor))
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_a_non_finite_gradient_raises_if_asked(bad: float, structure: str) -> None:
    params = make_params(((6, 5),))
    opt = Butterfly(params, on_nonfinite="raise", structure=structure)
    train(opt, params, range(3))
    before, kept = values(params), snapshot(opt)
    set_grads(params, 3)
    params[0].grad[0, 0] = bad
    with pytest.raises(FloatingPointError, match=r"non-finite gradient .* of a parameter of shape \(6, 5\)"):
        opt.step()
    assert_same(values(params), before)
    assert_same(snapshot(opt), kept, skip=COUNTERS)


@pytest.mark.parametrize("scale", [1e18, 1e-30])
@every_mode
def test_extreme_gradients_keep_everything_finite(options: dict[str, Any], scale: float) -> None:
    params = make_params()
    opt = Butterfly(params, **options)

    def closure(step: int) -> Tensor:
        loss = set_grads(params, step)
        for param in params:
            param.grad.clamp_(-1, 1).mul_(scale)
        return loss

    for step in range(8):
        opt.step(lambda step=step: closure(step))
    assert all(torch.isfinite(param).all() for param in params)
    assert all(torch.isfinite(v).all() for s in snapshot(opt) for v in s.values() if isinstance(v, Tensor))


def test_flat_needs_one_dtype() -> None:
    mixed = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    with pytest.raises(ValueError, match="structure='flat' needs one dtype and device in a group"):
        Butterfly(mixed, structure="flat")
    opt = Butterfly(make_params())
    with pytest.raises(ValueError, match="make one group of each"):
        opt.add_param_group({"params": mixed, "structure": "flat"})
    assert len(opt.param_groups) == 1
    Butterfly([{"params": mixed[:1]}, {"params": mixed[1:]}], structure="flat")


@pytest.mark.parametrize("change", [{"depth": 1}, {"diagonal": "innovation"}, {"structure": "flat"}])
def test_a_change_of_layout_restarts_with_one_warning(change: dict[str, Any]) -> None:
    params = make_params(((6, 5),))
    opt = Butterfly(params)
    train(opt, params, range(5))
    opt.param_groups[0].update(change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(opt, params, range(5, 9))
    (message,) = (str(w.message) for w in caught)
    assert re.search("changed .* estimate .*restarts", message)
    assert opt.state[params[0]]["step"] == 4
    assert torch.isfinite(params[0]).all()


def test_the_restart_warning_points_at_the_caller() -> None:
    params = make_params(((6, 5),))
    opt = Butterfly(params)
    train(opt, params, range(1))
    opt.param_groups[0]["depth"] = 1
    with pytest.warns(UserWarning, match="restarts") as caught:
        opt.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_sparse_gradients_are_refused(structure: str) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    opt = Butterfly(embedding.parameters(), structure=structure)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; use dense ones"):
        opt.step()
    assert torch.equal(embedding.weight, before)


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
        before, basis = param.detach().clone(), opt._bases.get(param)
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


def state_bytes(opt: Butterfly) -> int:
    states = opt.state_dict()["state"].values()
    return sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor))


@pytest.mark.parametrize(
    ("diagonal", "n", "limit"),
    [("innovation", 256, 10.0), ("secant", 256, 22.0), ("innovation", 4096, 8.5), ("secant", 4096, 20.5)],
)
def test_bytes_of_state_per_parameter(diagonal: str, n: int, limit: float) -> None:
    param = nn.Parameter(torch.zeros(n, n))
    opt = Butterfly([param], diagonal=diagonal, refit_steps=0)
    param.grad = torch.ones(n, n)
    opt.step()
    per_parameter = state_bytes(opt) / param.numel()
    print(f"{diagonal} {n} x {n}: {per_parameter:.2f} bytes a parameter")
    assert per_parameter <= limit


def test_state_holds_tensors_and_plain_values_only() -> None:
    for options in MODES.values():
        params = make_params()
        opt = Butterfly(params, **options)
        train(opt, params, range(2))

        def leaves(value: Any) -> Iterator[Any]:
            if isinstance(value, dict):
                value = value.values()
            elif not isinstance(value, list | tuple):
                yield value
                return
            for item in value:
                yield from leaves(item)

        assert all(type(leaf) in (Tensor, int, float, str, bool, type(None)) for leaf in leaves(opt.state_dict()))


@pytest.mark.parametrize("name", ["capturable", "stochastic_rounding"])
def test_options_of_later_versions(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}=True is not implemented yet"):
        Butterfly(make_params(), **{name: True})


def test_seed_decides_the_sketches() -> None:
    runs = []
    for seed in (0, 0, 1):
        params = make_params()
        train(Butterfly(params, seed=seed), params, range(10))
        runs.append(values(params)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


TRAINED = {name: MODES[name] for name in ("axes-secant", "axes-deep", "flat", "same-batch", "newton", "newton-ema")}
trained_modes = pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED.keys())


def trained(options: dict[str, Any]) -> tuple[Butterfly, list[nn.Parameter]]:
    params = make_params(dtype=torch.float64)
    opt = Butterfly(params, **options)
    train(opt, params, range(12))
    return opt, params


def assert_positive_definite(matrix: Tensor) -> None:
    """Symmetric up to the rounding of the rotations, with a positive spectrum."""
    assert (matrix - matrix.T).abs().max() <= STEP_TOLERANCE * matrix.abs().max()
    assert torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0] > 0


@trained_modes
@pytest.mark.parametrize("kind", ["preconditioner", "inverse_hessian"])
def test_operators_are_symmetric_positive_definite(options: dict[str, Any], kind: str) -> None:
    opt, params = trained(options)
    flat = options.get("structure") == "flat"
    for param in params:
        operator = getattr(opt, kind)(param)
        n = sum(p.numel() for p in params) if flat else param.numel()
        assert operator.shape == (n, n)
        dense = operator.to_dense()
        assert_positive_definite(dense)
        x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(operator @ x, dense @ x)
        torch.testing.assert_close(operator @ x[:, 0], dense @ x[:, 0])
    whole = getattr(opt, kind)()
    total = sum(param.numel() for param in params)
    assert whole.shape == (total, total)
    assert_positive_definite(whole.to_dense())
    torch.testing.assert_close(whole[params[0]].to_dense(), getattr(opt, kind)(params[0]).to_dense())
    x = torch.randn(total, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(whole @ x, whole.to_dense() @ x)


@trained_modes
def test_reading_operators_changes_nothing(options: dict[str, Any]) -> None:
    opt, params = trained(options)
    kept, before = snapshot(opt), values(params)
    opt.preconditioner()
    opt.inverse_hessian(damping=0.1)
    assert_same(snapshot(opt), kept)
    assert_same(values(params), before)


@trained_modes
def test_damping_bounds_the_inverse_hessian(options: dict[str, Any]) -> None:
    """``(H + damping)^-1 <= 1 / damping``, and less of it where there is more damping."""
    opt, params = trained(options)
    little, much = (opt.inverse_hessian(params[0], damping=d).to_dense() for d in (0.5, 5.0))
    assert torch.linalg.eigvalsh(little)[-1] <= 2.0 * (1 + 1e-9)
    assert torch.linalg.eigvalsh(much)[-1] <= 0.2 * (1 + 1e-9)
    assert torch.linalg.eigvalsh(little - much)[0] > -1e-9


def test_innovation_preconditions_and_has_no_inverse_hessian() -> None:
    opt, params = trained(MODES["axes-innovation"])
    assert_positive_definite(opt.preconditioner(params[0]).to_dense())
    for param in (params[0], None):
        with pytest.raises(ValueError, match="innovation"):
            opt.inverse_hessian(param)


@pytest.mark.parametrize("damping", [-1.0, NAN, math.inf])
def test_inverse_hessian_rejects_damping(damping: float) -> None:
    opt, params = trained({})
    with pytest.raises(ValueError, match=f"Invalid damping value: {damping}, expected a finite number >= 0"):
        opt.inverse_hessian(params[0], damping=damping)


def test_operators_need_an_estimate() -> None:
    params = make_params()
    opt = Butterfly(params)
    for read in (opt.preconditioner, opt.inverse_hessian):
        with pytest.raises(KeyError, match="it took no step yet"):
            read(params[0])
    train(opt, params, range(1))
    with pytest.raises(ValueError, match="moved"):
        opt.inverse_hessian(params[0])
    trained_opt, trained_params = trained({})
    with pytest.raises(KeyError):
        trained_opt.preconditioner()[params[0]]
    operator = trained_opt.preconditioner(trained_params[1])
    with pytest.raises(ValueError, match=r"operator of shape \(4, 4\) cannot multiply a tensor of shape \(5,\)"):
        operator @ torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot multiply a tensor of shape"):
        trained_opt.preconditioner() @ torch.ones(5, dtype=torch.float64)


def test_triton_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    params = make_params()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs parameters on a CUDA device, got cpu"):
        train(Butterfly(params, backend="triton"), params, range(1))


def test_triton_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    params = make_params(dtype=torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"backend='triton' keeps float32 state and does not take torch\.float64"):
        train(Butterfly(params, backend="triton"), params, range(1))

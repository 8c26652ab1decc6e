"""butterfly_opt.Butterfly: saving, loading, copying and restarting the state, and its size.

Oracle: the uninterrupted run, bit for bit.
"""

import contextlib
import copy
import functools
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract import (
    MODES,
    all_finite,
    assert_same,
    build,
    copies,
    every_mode,
    make_params,
    set_grads,
    snapshot,
    through_state_dict,
    train,
    values,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from butterfly_opt import Butterfly, ButterflyW
from butterfly_opt.layout import axes_layout
from butterfly_opt.stack import new_state


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
    opt = build(params, **options)
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
    opt = build(params, **options)
    train(opt, params, range(8))
    through_state_dict_in_place(opt, params, options)


def test_freezing_leaves_no_stacked_states_behind() -> None:
    """Tensors of one shape share a storage while they step together; none keeps that of others alive afterwards."""
    params = [nn.Parameter(torch.zeros(6, 6)) for _ in range(8)]
    opt = Butterfly(params)
    for kept in range(8, 0, -1):
        for index, param in enumerate(params):
            param.grad = torch.ones(6, 6) if index >= 8 - kept else None
        for _ in range(2):
            opt.step()
    for index, param in enumerate(params):
        for value in opt.state[param].values():
            if isinstance(value, Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), index
    saved = io.BytesIO()
    torch.save(opt.state_dict()["state"][7], saved)
    assert saved.tell() < 6 * 36 * 4 + 8000


@pytest.mark.parametrize(
    "change", [{"block": 4, "lead": 2}, {"diagonal": "innovation"}, {"structure": "flat"}, {"batch_dims": 1}]
)
def test_a_change_of_layout_restarts_with_one_warning(change: dict[str, Any]) -> None:
    params = make_params(((6, 5),))
    opt = Butterfly(params, diagonal="secant")
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
    opt.param_groups[0].update(block=4, lead=2)
    with pytest.warns(UserWarning, match="restarts") as caught:
        opt.step()
    assert caught[0].filename == __file__


def state_bytes(opt: torch.optim.Optimizer) -> int:
    states = opt.state_dict()["state"].values()
    return sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor))


@pytest.mark.parametrize(
    ("diagonal", "shape", "limit"),
    [
        ("innovation", (256, 784), 12.0),
        ("secant", (256, 784), 24.0),
        ("innovation", (4096, 4096), 8.6),
        ("secant", (4096, 4096), 20.6),
        ("innovation", (100_000, 1), 8.01),
        ("secant", (1, 100_000), 20.01),
        ("innovation", (50_000, 8), 16.0),
        ("innovation", (8, 4096), 16.0),
        ("innovation", (50_000, 300), 16.0),
    ],
)
def test_bytes_of_state_per_parameter(diagonal: str, shape: tuple[int, int], limit: float) -> None:
    """Also those of vectors written as matrices: Adam's; and of elongated matrices: at most twice Adam's."""
    param = nn.Parameter(torch.zeros(1).expand(shape))  # not allocated: only the shape counts
    state = new_state(axes_layout(param, 0), {"diagonal": diagonal, "block": 64, "lead": 16})
    found = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor)) / param.numel()
    print(f"{diagonal} {shape}: {found:.2f} bytes a parameter")
    assert found <= limit


@pytest.mark.parametrize("shape", [(300, 1), (1, 300), (300,)])
def test_a_vector_written_as_a_matrix_steps_as_a_vector(shape: tuple[int, ...]) -> None:
    """Same numbers, same state, and no rotation: Adam's cost."""
    runs = []
    for own in (shape, (300,)):
        params = make_params((own,))
        opt = Butterfly(params, lr=0.02, diagonal="secant")
        train(opt, params, range(6))
        (state,) = opt.state.values()
        assert not any(name.startswith(("rotation", "moment")) for name in state)
        runs.append([params[0].detach().flatten(), *(v.flatten() for v in state.values() if isinstance(v, Tensor))])
    assert_same(*runs)


@pytest.mark.parametrize(("long", "rotated"), [(32 * 3, [3, 96]), (32 * 3 + 1, [3])])
@pytest.mark.parametrize("turned", [False, True])
def test_a_very_long_axis_is_left_alone(long: int, rotated: list[int], turned: bool) -> None:
    """More than 32 times as long as the other; the short one is rotated."""
    params = make_params(((3, long) if turned else (long, 3),))
    opt = Butterfly(params, block=128)
    train(opt, params, range(3))
    (state,) = opt.state.values()
    sizes = sorted(state[name].shape[1] for name in state if name.startswith("rotation"))
    assert sizes == [n * n for n in rotated]
    assert all_finite(opt)


def test_experts_are_matrices_of_their_own() -> None:
    """``batch_dims=1``: each of four experts as if it were a parameter; without, the first axis is one more axis."""
    params = make_params(((4, 6, 5),))
    alone = [nn.Parameter(expert.detach().clone()) for expert in params[0]]
    opt, others = build(params, batch_dims=1, diagonal="secant"), Butterfly(alone, diagonal="secant")
    for step in range(9):
        set_grads(params, step)
        for expert, grad in zip(alone, params[0].grad, strict=True):
            expert.grad = grad.clone()
        opt.step()
        others.step()
    for expert, own in zip(alone, params[0], strict=True):
        # The least denominator is a share of the largest entry of the whole parameter.
        torch.testing.assert_close(expert, own, rtol=1e-2, atol=1e-4)
    assert opt.state[params[0]]["rotation0"].shape == (4, 6 * 6)
    with pytest.raises(ValueError, match=r"4 matrices \(batch_dims\) has no single operator"):
        opt.preconditioner(params[0])
    together = make_params(((4, 6, 5),))
    plain = Butterfly(together)
    train(plain, together, range(3))
    assert plain.state[together[0]]["rotation0"].shape == (1, 4 * 4)
    assert plain.state[together[0]]["rotation1"].shape == (1, 30 * 30)


def test_state_holds_tensors_and_plain_values_only() -> None:
    for options in MODES.values():
        params = make_params()
        opt = build(params, **options)
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


@every_mode
def test_distributed_checkpoints_of_one_process(options: dict[str, Any]) -> None:
    """``torch.distributed.checkpoint.state_dict``, flattened and not: the resumed run equals the other bit for bit."""
    for flatten in (False, True):
        model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
        params = list(model.parameters())
        opt = build(params, **options)
        train(opt, params, range(6))
        # In "flat" the state of a group lies under its first parameter: the others have none.
        wanted = StateDictOptions(flatten_optimizer_state_dict=flatten, strict="structure" not in options)
        saved = io.BytesIO()
        torch.save(get_optimizer_state_dict(model, opt, options=wanted), saved)
        saved.seek(0)
        other = copy.deepcopy(model)
        resumed = build(other.parameters(), **options)
        set_optimizer_state_dict(other, resumed, torch.load(saved, weights_only=True), options=wanted)
        kept, found = snapshot(opt), [state for state in snapshot(resumed) if state]
        assert [state.keys() for state in found] == [state.keys() for state in kept]
        assert [(state["calls"], state["step"]) for state in found] == [(6, 6)] * len(kept)
        train(opt, params, range(6, 12))
        train(resumed, list(other.parameters()), range(6, 12))
        assert_same(values(params), values(list(other.parameters())))


def named(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    params = make_params(tuple(shapes.values()))
    return list(zip(shapes, params, strict=True))


NAMED = {"in.weight": (6, 5), "in.bias": (6,), "out.weight": (6, 5), "out.bias": (6,)}


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_a_reordered_model_loads_by_name(structure: str) -> None:
    pairs = named(NAMED)
    opt = Butterfly(pairs, lr=0.02, structure=structure)
    params = [param for _, param in pairs]
    train(opt, params, range(6))
    new = dict(zip(NAMED, copies(params), strict=True))
    order = ["out.weight", "in.bias", "in.weight", "out.bias"]
    other = Butterfly([(name, new[name]) for name in order], lr=0.02, structure=structure)
    if structure == "flat":
        with pytest.raises(ValueError, match=r"structure='flat' .* order"):
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
        return
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["param_names"] == order
    for step in range(6, 10):
        set_grads(params, step)
        for name, param in pairs:
            new[name].grad = param.grad.clone()
        opt.step()
        other.step()
    for name, param in pairs:
        torch.testing.assert_close(new[name], param, rtol=1e-5, atol=1e-6)


def test_other_names_load_in_order_with_a_warning() -> None:
    pairs = named(NAMED)
    opt = Butterfly(pairs)
    train(opt, [param for _, param in pairs], range(2))
    others = [(name.replace("in.", "first."), param) for name, param in named(NAMED)]
    other = Butterfly(others)
    with pytest.warns(UserWarning, match=r"'first\.weight', .* saved as 'in\.weight'") as caught:
        other.load_state_dict(opt.state_dict())
    assert caught[0].filename == __file__
    assert_same(snapshot(other), snapshot(opt))


ADAMS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AMSGrad": functools.partial(torch.optim.Adam, amsgrad=True),
}


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS.keys())
@pytest.mark.parametrize("kind", [Butterfly, ButterflyW])
@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_the_state_of_adam_is_taken_over(make: Callable, kind: type, diagonal: str) -> None:
    """Its momentum goes on, bias corrected; what a run without the switch would average next is the same."""
    params = make_params()
    adam = make(params, lr=0.01, betas=(0.8, 0.99), weight_decay=0.25)
    train(adam, params, range(7))
    own = kind(params, lr=0.5, betas=(0.8, 0.9), weight_decay=0.0, diagonal=diagonal, refit_every=3)
    with pytest.warns(UserWarning, match="3 states of Adam were taken over: the momentum goes on") as caught:
        own.load_state_dict(copy.deepcopy(adam.state_dict()))
    assert caught[0].filename == __file__
    (group,) = own.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["refit_every"]) == (0.01, 0.25, (0.8, 0.9), 3)
    assert group["decoupled_weight_decay"] == adam.param_groups[0]["decoupled_weight_decay"]
    assert not {"max_exp_avg_sq"} & set(own.state[params[0]])
    group["weight_decay"] = adam.param_groups[0]["weight_decay"] = 0.0
    for param in params:
        torch.testing.assert_close(own.state[param]["exp_avg"] * (1 - 0.8**7), adam.state[param]["exp_avg"])
    start = values(params)
    for step in range(7, 12):
        set_grads(params, step)
        own.step()
        for param, value in zip(params, start, strict=True):
            param.data.copy_(value)
        adam.step()
        start = values(params)
    for param in params:
        torch.testing.assert_close(
            own.state[param]["exp_avg"] * (1 - 0.8**12), adam.state[param]["exp_avg"], rtol=1e-5, atol=1e-6
        )
    resumed, new = through_state_dict(own, params, {"diagonal": diagonal})
    train(own, params, range(12, 14))
    train(resumed, new, range(12, 14))
    assert_same(values(params), values(new))


def test_the_loss_does_not_jump_when_adam_is_replaced() -> None:
    """A small network: at Adam's rate the loss goes on falling, and ends below Adam's."""

    def run(switch: int | None) -> list[float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
            x = torch.randn(256, 10)
        y = (x[:, :3].prod(1, keepdim=True) + x[:, 3:4]).tanh()
        opt: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for step in range(200):
            if step == switch:
                saved, opt = opt.state_dict(), Butterfly(model.parameters())
                with pytest.warns(UserWarning, match="taken over"):
                    opt.load_state_dict(saved)
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    plain, switched = run(None), run(100)
    print(f"before {switched[99]:.4f}, the worst of 20 steps after {max(switched[100:120]):.4f}")
    print(f"end: {switched[-1]:.4f}, Adam {plain[-1]:.4f}")
    assert max(switched[100:120]) < 1.05 * switched[99]
    assert switched[-1] < plain[-1]


OTHERS = {
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_states_of_other_optimizers_are_refused(make: Callable) -> None:
    params = make_params()
    other = make(params, lr=0.01)
    train(other, params, range(3))
    own = Butterfly(params)
    train(own, params, range(3))
    kept, groups = snapshot(own), copy.deepcopy(own.state_dict()["param_groups"])
    with pytest.raises(
        ValueError, match=r"this state was not written by Butterfly, Adam or AdamW: it holds .*start without"
    ):
        own.load_state_dict(other.state_dict())
    assert_same(snapshot(own), kept)
    assert_same(own.state_dict()["param_groups"], groups)


def test_flat_does_not_take_over_adam() -> None:
    params = make_params()
    adam = torch.optim.Adam(params)
    train(adam, params, range(2))
    own = Butterfly(params, structure="flat")
    with pytest.raises(ValueError, match="structure='flat' cannot take over a state of Adam"):
        own.load_state_dict(adam.state_dict())
    assert not own.state


@pytest.mark.parametrize("mode", ["axes-innovation", "several-stages", "radix-2", "flat"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_step_without_data_sizes_the_state(mode: str, kind: str) -> None:
    """On meta parameters, or under ``FakeTensorMode``; a real run afterwards is not disturbed."""
    options = MODES[mode]
    params = make_params()
    opt = build(params, **options)
    train(opt, params, range(3))
    shapes = [{name: v.shape for name, v in state.items() if isinstance(v, Tensor)} for state in snapshot(opt)]
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        device = None if kind == "fake" else "meta"
        empty = [nn.Parameter(torch.empty(param.shape, device=device)) for param in params]
        sized = build(empty, **options)
        for _ in range(2):
            for param in empty:
                param.grad = torch.empty_like(param)
            sized.step()
        found = [
            {k: v.shape for k, v in sized.state[p].items() if isinstance(v, Tensor)} for p in empty if p in sized.state
        ]
    assert found == shapes
    resumed, new = through_state_dict(opt, params, options)
    train(opt, params, range(3, 6))
    train(resumed, new, range(3, 6))
    assert_same(values(params), values(new))
    assert all_finite(opt)

"""butterfly_opt.Butterfly: saving, loading, copying and restarting the state, and its size.

Oracle: the uninterrupted run, bit for bit.
"""

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract import MODES, assert_same, every_mode, make_params, snapshot, through_state_dict, train, values
from torch import Tensor, nn

from butterfly_opt import Butterfly
from butterfly_opt.rotation import rotate


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


def test_state_of_an_unknown_format_is_refused() -> None:
    params = make_params()
    opt = Butterfly(params)
    train(opt, params, range(2))
    saved = opt.state_dict()
    saved["state"][0]["version"] = 99
    with pytest.raises(ValueError, match="format version 99, this Butterfly reads"):
        Butterfly(make_params()).load_state_dict(saved)


def test_a_pickle_of_the_former_format_trains_on() -> None:
    """Version 2 had sketches in rotated coordinates, of more columns."""
    params = make_params()
    opt = Butterfly(params)
    train(opt, params, range(3))
    for state in opt.state.values():
        state["version"] = 2
        for name in [name for name in state if name.startswith("sketch")]:
            angles = state[name.replace("sketch", "angles")]
            state[name] = rotate(state[name], angles, dim=0, transpose=True)[:, :20]
    loaded, new = through_pickle(opt, params, {})
    expected = next(iter(opt.state.values()))["sketch0"], next(iter(opt.state.values()))["angles0"]
    sketch = next(iter(loaded.state.values()))["sketch0"]
    torch.testing.assert_close(sketch[:, :20], rotate(expected[0], expected[1], dim=0))
    train(loaded, new, range(3, 6))
    assert all(torch.isfinite(param).all() for param in new)


def test_freezing_leaves_no_stacked_bases_behind() -> None:
    params = [nn.Parameter(torch.zeros(6, 6)) for _ in range(8)]
    opt = Butterfly(params)
    for kept in range(8, 0, -1):
        for index, param in enumerate(params):
            param.grad = torch.ones(6, 6) if index >= 8 - kept else None
        opt.step()
    known = {id(entry): entry for entry in opt._bases.values()}.values()
    owners = [id(owner) for entry in known for owner in entry.owners]
    assert len(owners) == len(set(owners)) <= len(params)


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

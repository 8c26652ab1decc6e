"""What users change between two steps: parameters by hand, hyper-parameters, devices and dtypes of the model."""

import copy
from typing import Any

import pytest
import torch
from contract import make_params, set_grads, snapshot, train, values
from torch import Tensor, nn

from butterfly_opt import Butterfly
from butterfly_opt.rotation import rotate


def swap_in_average(params: list[nn.Parameter]) -> None:
    for param in params:
        param.data = param.data * 0.9


def prune(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[0][0, :2] = 0


def copy_from_elsewhere(params: list[nn.Parameter]) -> None:
    params[0].data.copy_(torch.randn(params[0].shape, generator=torch.Generator().manual_seed(9)))


CHANGES = {"average": swap_in_average, "prune": prune, "copy": copy_from_elsewhere}


@pytest.mark.parametrize(
    "options", [{}, {"structure": "flat"}, {"capturable": True}], ids=["axes", "flat", "capturable"]
)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_parameter_changed_by_hand_does_not_poison_the_pairs(change: Any, options: dict[str, Any]) -> None:
    """The displacement restarts: what it held does not lead to where the parameters are now."""
    params = make_params()
    opt = Butterfly(params, lr=1e-2, refit_steps=1, **options)
    train(opt, params, range(10))
    change(params)
    before = opt.state[params[0]]["disp_sq"].clone()
    train(opt, params, range(10, 11))
    state = opt.state[params[0]]
    assert state["restarts"] == 1
    # The pair of this step has no displacement: the average of squares only decays.
    assert torch.all(state["disp_sq"] <= before)
    train(opt, params, range(11, 16))
    assert state["restarts"] == 1
    assert opt.diagnostics()[0]["restarts"] >= 1


def test_the_run_itself_is_no_change_by_hand() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        params = make_params(dtype=dtype)
        opt = Butterfly(params, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True, refit_steps=1)
        for step in range(12):
            set_grads(params, step)
            if step == 5:
                params[1].grad = None
            opt.step()
        assert opt.diagnostics()[0]["restarts"] == 0


def test_swapping_an_average_in_and_out_again_changes_nothing() -> None:
    runs = []
    for swap in (False, True):
        params = make_params()
        opt = Butterfly(params, lr=1e-2, refit_steps=1)
        train(opt, params, range(6))
        if swap:
            backup = values(params)
            for param in params:
                param.data.mul_(0.5)
            for param, value in zip(params, backup, strict=True):
                param.data.copy_(value)
        train(opt, params, range(6, 9))
        runs.append(values(params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


HYPER: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.5, 0.9),
    "eps": 1e-3,
    "weight_decay": 0.1,
    "refit_every": 2,
    "refit_steps": 3,
    "refit_lr": 0.01,
    "max_update": 0.5,
    "maximize": True,
    "seed": 7,
}


@pytest.mark.parametrize("name", HYPER)
def test_a_hyper_parameter_changed_mid_run_counts_from_then_on(name: str) -> None:
    params = make_params()
    opt = Butterfly(params, lr=1e-2, refit_steps=1)
    train(opt, params, range(5))
    for state in opt.state.values():
        state["calls"] = 197  # past the steps that refit each time, and just before one that does
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = Butterfly(twins, lr=1e-2, refit_steps=1)
    other.load_state_dict(opt.state_dict())
    opt.param_groups[0][name] = HYPER[name]
    train(opt, params, range(5, 9))
    train(other, twins, range(5, 9))
    assert all(bool(param.isfinite().all()) for param in params)
    assert not all(torch.equal(a, b) for a, b in zip(values(params), values(twins), strict=True))


def test_diagonal_changed_mid_run_restarts_with_a_warning() -> None:
    params = make_params()
    opt = Butterfly(params, lr=1e-2, refit_steps=1)
    train(opt, params, range(5))
    opt.param_groups[0]["diagonal"] = "innovation"
    with pytest.warns(UserWarning, match="restarts"):
        train(opt, params, range(5, 6))
    assert opt.state[params[0]]["step"] == 1
    assert "disp_sq" not in opt.state[params[0]]


def test_the_state_follows_a_cast_of_the_model() -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        params = make_params()
        opt = Butterfly(params, lr=1e-2, refit_steps=1)
        train(opt, params, range(4))
        for param in params:
            param.grad = None
            param.data = param.data.to(dtype)
        train(opt, params, range(4, 6))
        for param in params:
            assert param.dtype == dtype
            assert bool(param.isfinite().all())
            state = opt.state[param]
            assert state["step"] == 6
            assert {state["mean_grad"].dtype, state["grad_sq"].dtype, state["disp_sq"].dtype} == {kept}


def test_states_of_the_first_format_load() -> None:
    """It had no fingerprint, no count of restarts, sketches of 8 columns in rotated coordinates, 0-d averages."""
    params = make_params(((3, 2), ()))
    opt = Butterfly(params, refit_steps=1)
    train(opt, params, range(4))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["version"] = 1
        del state["restarts"], state["fingerprint"]
    for name in ("mean_grad", "grad_sq", "disp_sq", "cross", "displacement"):
        saved["state"][1][name] = saved["state"][1][name].reshape(())
    for name in ("sketch0", "sketch1"):
        state = saved["state"][0]
        assert state[name.replace("sketch", "angles")].any()
        rotated = rotate(state[name], state[name.replace("sketch", "angles")], dim=0, transpose=True)
        state[name] = rotated[:, :8].clone()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = Butterfly(twins, refit_steps=1)
    other.load_state_dict(saved)
    for state, old in zip(snapshot(other), snapshot(opt), strict=True):
        assert state.keys() == old.keys()
        assert state["version"] == old["version"]
        for key, value in old.items():
            if key.startswith("sketch"):
                assert state[key].shape == value.shape
                torch.testing.assert_close(state[key][:, :8], value[:, :8])
                assert not state[key][:, 8:].any()
            elif isinstance(value, Tensor) and key != "fingerprint":
                assert torch.equal(state[key], value)
    train(other, twins, range(4, 8))
    assert all(bool(param.isfinite().all()) for param in twins)
    assert other.diagnostics()[0]["restarts"] == 0


def test_an_unknown_format_is_refused() -> None:
    params = make_params()
    opt = Butterfly(params, refit_steps=1)
    train(opt, params, range(1))
    saved = opt.state_dict()
    saved["state"][0]["version"] = 99
    with pytest.raises(ValueError, match="format version 99, this Butterfly reads up to 3"):
        Butterfly(make_params()).load_state_dict(saved)

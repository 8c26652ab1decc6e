"""What users change between two steps: parameters by hand, hyper-parameters, devices and dtypes of the model."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    all_finite,
    assert_same,
    copies,
    make_params,
    snapshot,
    through_state_dict,
    train,
    values,
)
from torch import Tensor, nn

from butterfly_opt import Butterfly


def swap_in_average(params: list[nn.Parameter]) -> None:
    for param in params:
        param.data = param.data * 0.9


def prune(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[0][0, :2] = 0


def copy_from_elsewhere(params: list[nn.Parameter]) -> None:
    params[0].data.copy_(torch.randn(params[0].shape, generator=torch.Generator().manual_seed(9)))


CHANGES = {"average": swap_in_average, "prune": prune, "copy": copy_from_elsewhere}


KINDS = {
    "axes": {},
    "flat": {"structure": "flat"},
    "capturable": {"capturable": True},
    "several stages": {"block": 4, "lead": 2},
    "bfloat16": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_displacement_follows_what_others_write(change: Any, kind: str) -> None:
    """``param_avg`` is the average, with Adam's weights, of the parameters as they were when their gradients came."""
    params = make_params(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    opt = Butterfly(params, lr=1e-2, diagonal="secant", betas=(0.8, 0.9), **KINDS[kind])
    seen: list[list[Tensor]] = []
    for step in range(16):
        if step == 10 or step > 12:
            change(params)
        seen.append(values(params))
        train(opt, params, range(step, step + 1))
    weights = [0.2 * 0.8 ** (15 - i) / (1 - 0.8**16) for i in range(16)]
    averages = [sum(w * own[i].double() for w, own in zip(weights, seen, strict=True)) for i in range(len(params))]
    if kind == "flat":
        found = opt.state[params[0]]["param_avg"].split([param.numel() for param in params])
    else:
        found = tuple(opt.state[param]["param_avg"] for param in params)
    for own, average in zip(found, averages, strict=True):
        torch.testing.assert_close(own.double().view(average.shape), average, rtol=1e-5, atol=1e-5)
    opt.inverse_hessian()
    assert all_finite(opt)


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": lambda param: param.clamp(-0.3, 0.3),
    "unit rows": lambda param: param / param.norm(dim=-1, keepdim=True).clamp_min(1e-9),
    "masked": lambda param: param * (torch.arange(param.numel()).view(param.shape) % 2),
}


@pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_projected_weights_keep_their_estimate(project: Callable[[Tensor], Tensor]) -> None:
    """Projected after every step: the curvature is found, for the pairs hold wherever the parameters go."""
    curvature = torch.logspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    param = nn.Parameter(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    target = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    opt = Butterfly([param], lr=0.02, betas=(0.9, 0.95), diagonal="secant")
    for step in range(300):
        noise = 0.3 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            param.copy_(project(param + noise))
        param.grad = curvature * (param.detach() - target)
        opt.step()
    diagonal = torch.linalg.inv(opt.inverse_hessian(param).to_dense()).diagonal().view(6, 4)
    free = torch.ones(6, 4) if project is not PROJECTIONS["masked"] else project(torch.ones(6, 4))
    ratio = (diagonal / curvature)[free > 0]
    print(f"found / true curvature: median {ratio.median():.3f}")
    assert 0.5 < ratio.median() < 2
    assert opt.diagnostics()[0]["tensors"][0]["curvature_quantiles"]


def test_an_embedding_that_scales_its_rows_keeps_its_estimate() -> None:
    """``max_norm`` writes to the rows in each forward pass: the average follows, nothing restarts or warns."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embedding = nn.Embedding(12, 6, max_norm=1.0)
        target = torch.randn(12, 6)
    opt = Butterfly(embedding.parameters(), lr=0.05, betas=(0.8, 0.9), diagonal="secant")
    seen: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16):
            opt.zero_grad()
            rows = torch.arange(step % 2, 12, 2)
            (embedding(rows) - target[rows]).square().sum().backward()
            seen.append(embedding.weight.detach().clone())
            opt.step()
    weights = [0.2 * 0.8 ** (15 - i) / (1 - 0.8**16) for i in range(16)]
    average = sum(w * own.double() for w, own in zip(weights, seen, strict=True))
    state = opt.state[embedding.weight]
    assert int(state["step"]) == 16
    torch.testing.assert_close(state["param_avg"].double(), average, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_swapping_an_average_in_and_out_again_changes_nothing(diagonal: str) -> None:
    runs = []
    for swap in (False, True):
        params = make_params()
        opt = Butterfly(params, lr=1e-2, diagonal=diagonal)
        train(opt, params, range(6))
        if swap:
            backup = values(params)
            for param in params:
                param.data.mul_(0.5)
            for param, value in zip(params, backup, strict=True):
                param.data.copy_(value)
        train(opt, params, range(6, 9))
        runs.append(values(params))
    assert_same(*runs)


def test_parameters_loaded_after_a_dummy_step_make_no_pair() -> None:
    """A dummy step of zeros makes the state, then weights are loaded: the first displacement is zero all the same."""
    runs = []
    for dummy in (False, True):
        params = make_params()
        opt = Butterfly(params, lr=1e-2, diagonal="secant")
        if dummy:
            for param in params:
                param.grad = torch.zeros_like(param)
            opt.step()
        copy_from_elsewhere(params)
        train(opt, params, range(8))
        runs.append([*values(params), *(state["disp_sq"] for state in snapshot(opt))])
    # The average of the parameters is moved to the first ones, up to rounding.
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


HYPER: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.5, 0.9),
    "eps": 1e-1,
    "weight_decay": 0.1,
    "refit_every": 2,
    "maximize": True,
}


@pytest.mark.parametrize("name", HYPER)
def test_a_hyper_parameter_changed_mid_run_counts_from_then_on(name: str) -> None:
    params = make_params()
    opt = Butterfly(params, lr=1e-2)
    train(opt, params, range(5))
    for state in opt.state.values():
        state["calls"] = 200  # past the steps that refit often
    twins = copies(params)
    other = Butterfly(twins, lr=1e-2)
    other.load_state_dict(opt.state_dict())
    opt.param_groups[0][name] = HYPER[name]
    train(opt, params, range(5, 9))
    train(other, twins, range(5, 9))
    assert all(bool(param.isfinite().all()) for param in params)
    assert not all(torch.equal(a, b) for a, b in zip(values(params), values(twins), strict=True))


@pytest.mark.parametrize(("before", "after"), [("secant", "innovation"), ("innovation", "secant")])
def test_diagonal_changed_mid_run_restarts_with_a_warning(before: str, after: str) -> None:
    params = make_params()
    opt = Butterfly(params, lr=1e-2, diagonal=before)
    train(opt, params, range(5))
    opt.param_groups[0]["diagonal"] = after
    with pytest.warns(UserWarning, match="restarts"):
        train(opt, params, range(5, 6))
    assert opt.state[params[0]]["step"] == 1
    assert ("disp_sq" in opt.state[params[0]]) == (after == "secant")
    train(opt, params, range(6, 9))
    assert all_finite(opt)


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_the_state_follows_a_cast_of_the_model(diagonal: str) -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        params = make_params()
        opt = Butterfly(params, lr=1e-2, diagonal=diagonal)
        train(opt, params, range(4))
        for param in params:
            param.grad = None
            param.data = param.data.to(dtype)
        train(opt, params, range(4, 6))
        for param in params:
            assert param.dtype == dtype
            state = opt.state[param]
            assert state["step"] == 6
            assert {v.dtype for v in state.values() if isinstance(v, Tensor) and v.dim()} == {kept}
        assert all_finite(opt)
        resumed, new = through_state_dict(opt, params, {})
        train(opt, params, range(6, 9))
        train(resumed, new, range(6, 9))
        assert_same(values(params), values(new))


def test_one_of_two_stacked_tensors_may_be_cast() -> None:
    """They shared their operations; a checkpoint goes on bit for bit."""
    params = make_params(((6, 5), (6, 5)))
    opt = Butterfly(params, lr=1e-2)
    train(opt, params, range(4))
    params[1].grad = None
    params[1].data = params[1].data.bfloat16()
    train(opt, params, range(4, 6))
    resumed, new = through_state_dict(opt, params, {})
    train(opt, params, range(6, 9))
    train(resumed, new, range(6, 9))
    assert_same(values(params), values(new))
    assert_same(snapshot(opt), snapshot(resumed))

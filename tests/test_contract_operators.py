"""butterfly_opt.Butterfly: ``preconditioner`` and ``inverse_hessian`` of a trained optimizer.

Oracle: their dense matrices.
"""

import math
from typing import Any

import pytest
import torch
from contract import (
    MODES,
    NAN,
    STEP_TOLERANCE,
    assert_same,
    made_stacks,
    make_params,
    set_grads,
    snapshot,
    train,
    values,
)
from torch import Tensor, nn

from butterfly_opt import Butterfly
from butterfly_opt import step as step_module
from butterfly_opt.diagonal import regress

TRAINED = {name: MODES[name] for name in ("axes-secant", "radix-2", "flat")}
TRAINED["several-stages"] = {**MODES["several-stages"], "diagonal": "secant"}
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
    opt, params = trained(MODES["axes-secant"])
    with pytest.raises(ValueError, match=f"Invalid damping value: {damping}, expected a finite number >= 0"):
        opt.inverse_hessian(params[0], damping=damping)


def test_operators_need_an_estimate() -> None:
    params = make_params()
    opt = Butterfly(params, diagonal="secant")
    for read in (opt.preconditioner, opt.inverse_hessian):
        with pytest.raises(KeyError, match="it took no step yet"):
            read(params[0])
    train(opt, params, range(1))
    with pytest.raises(ValueError, match="moved"):
        opt.inverse_hessian(params[0])
    trained_opt, trained_params = trained(MODES["axes-secant"])
    with pytest.raises(KeyError):
        trained_opt.preconditioner()[params[0]]
    operator = trained_opt.preconditioner(trained_params[1])
    with pytest.raises(ValueError, match=r"operator of shape \(4, 4\) cannot multiply a tensor of shape \(5,\)"):
        operator @ torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot multiply a tensor of shape"):
        trained_opt.preconditioner() @ torch.ones(5, dtype=torch.float64)


@pytest.mark.parametrize("options", [*TRAINED.values(), MODES["axes-innovation"]])
def test_the_preconditioner_is_what_the_step_multiplies_with(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Q diag(d) Q^T gbar`` at the state after a step is that step, but for lr and decoupled decay.

    Of a gradient that is its own average: to any other the step leans by a share. A step of "secant" takes the means of
    the step before, which are gone: here those of its own.
    """
    monkeypatch.setattr(step_module, "regress", lambda *averages, means, **rest: regress(*averages, **rest))
    opt, params = trained({**options, "weight_decay": 0.0})
    sign = -1 if opt.param_groups[0]["maximize"] else 1
    for step in range(12, 16):
        train(opt, params, range(step, step + 1))
        before = values(params)
        for layout in (layout for stack in made_stacks(opt) for layout in stack.layouts):
            average = opt.state[layout.owner]["exp_avg"].clone()
            for param, grad in zip(layout.params, layout.scatter(average), strict=True):
                param.grad = sign * grad
        opt.step()
        momentum = torch.cat([opt.state[p]["exp_avg"].flatten() for p in params if p in opt.state])
        moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, params, strict=True)])
        torch.testing.assert_close(
            opt.preconditioner() @ momentum, moved / opt.param_groups[0]["lr"], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_dead_coordinate_has_the_floor_of_the_step(diagonal: str, eps: float) -> None:
    """With ``eps=0`` a coordinate without gradient is not divided by zero."""
    params = make_params(((4, 3), (5,)), dtype=torch.float64)
    start = values(params)
    opt = Butterfly(params, eps=eps, diagonal=diagonal)
    for step in range(12):
        set_grads(params, step)
        for param in params:
            param.grad[0] = 0.0
        opt.step()
    for param, old in zip(params, start, strict=True):
        operator = opt.preconditioner(param)
        assert torch.isfinite(operator.d).all()
        assert (operator.d > 0).all()
        assert operator.d.max() <= 1 / max(eps, torch.finfo(torch.float64).tiny ** 0.5)
        step_of_it = operator @ opt.state[param]["exp_avg"].flatten()
        assert torch.isfinite(step_of_it).all()
        assert torch.equal(param[0], old[0])

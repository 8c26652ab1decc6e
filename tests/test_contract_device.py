"""Steps in which the host reads nothing: ``capturable``. Oracle: the same run, decided on the host."""

import contextlib
from typing import Any

import pytest
import torch
from contract import make_params, set_grads, snapshot, values
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from butterfly_opt import Butterfly

TOLERANCE = 2e-6
"""Weights of averages are float32 tensors here and doubles there; 20 steps of 1e-2."""

MODES: dict[str, dict[str, Any]] = {
    "secant": {"diagonal": "secant"},
    "innovation": {},
    "flat": {"structure": "flat", "diagonal": "secant"},
    "several stages": {"block": 4, "lead": 2},
    "decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}


class NoHostReads(TorchDispatchMode):
    """Raises for the operations that make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"):
            raise AssertionError(f"{name} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


def run(options: dict[str, Any], *, capturable: bool, bad_step: int | None) -> tuple[list[Tensor], Butterfly]:
    """Captured or not."""
    params = make_params()
    # Refits are scheduled by the steps taken where the device decides, by all that were asked for where the host does.
    refit_every = 3 if bad_step is None else 1
    opt = Butterfly(params, lr=1e-2, capturable=capturable, refit_every=refit_every, **options)
    for step in range(20):
        set_grads(params, step)
        if step == bad_step and params[0].grad is not None:
            params[0].grad[0, 0] = float("nan")
        with NoHostReads() if capturable else contextlib.nullcontext():
            opt.step()
    return values(params), opt


@pytest.mark.filterwarnings("ignore:.*their step was skipped")
@pytest.mark.parametrize("bad_step", [None, 7])
@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_a_capturable_step_reads_nothing_and_changes_nothing(options: dict[str, Any], bad_step: int | None) -> None:
    expected, _ = run(options, capturable=False, bad_step=bad_step)
    found, opt = run(options, capturable=True, bad_step=bad_step)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    assert opt.diagnostics()[0]["nonfinite_steps"] == (bad_step is not None)


def test_the_forbidden_reads_are_noticed() -> None:
    with pytest.raises(AssertionError, match="reads a tensor on the host"), NoHostReads():
        torch.ones(()).item()


@pytest.mark.parametrize("betas", [(0.8, 0.98), (0.98, 0.999), (0.0, 0.0)])
def test_any_betas_keep_a_run_on_the_device_finite(betas: tuple[float, float]) -> None:
    params = make_params()
    opt = Butterfly(params, lr=1e-2, betas=betas, capturable=True)
    for step in range(4):
        set_grads(params, step)
        opt.step()
    assert all(torch.isfinite(value).all() for value in values(params))
    assert all(torch.isfinite(v).all() for state in snapshot(opt) for v in state.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_a_skipped_step_leaves_no_trace(options: dict[str, Any]) -> None:
    params = make_params()
    opt = Butterfly(params, lr=1e-2, capturable=True, **options)
    for step in range(8):
        set_grads(params, step)
        opt.step()
    before, state = values(params), snapshot(opt)
    for value in (float("nan"), float("inf"), 1e20):
        set_grads(params, 8)
        for param in params:
            assert param.grad is not None
            param.grad.view(-1)[-1] = value
        opt.step()
    for one, other in zip(values(params), before, strict=True):
        assert torch.equal(one, other)
    for own, kept in zip(snapshot(opt), state, strict=True):
        for key, value in kept.items():
            if key == "skipped":
                assert own[key] == value + 3
            elif isinstance(value, Tensor):
                assert torch.equal(own[key], value), key


def test_what_decides_on_the_host_cannot_be_captured() -> None:
    for options in ({"on_nonfinite": "raise"}, {"diagonal": "newton"}):
        with pytest.raises(ValueError, match="host and cannot be capturable=True"):
            Butterfly(make_params(), capturable=True, **options)


def test_lr_may_be_a_tensor_that_changes() -> None:
    runs = []
    for lr in (1e-2, torch.tensor(1e-2)):
        params = make_params()
        opt = Butterfly(params, lr=lr, capturable=True)
        for step in range(6):
            set_grads(params, step)
            opt.step()
            if isinstance(lr, Tensor):
                lr.mul_(0.5)
            else:
                opt.param_groups[0]["lr"] *= 0.5
        runs.append(values(params))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_continues_the_eager_run() -> None:
    runs = []
    for captured in (False, True):
        params = [nn.Parameter(param.detach().cuda()) for param in make_params()]
        opt = Butterfly(params, lr=1e-2, capturable=True)
        grads = [torch.ones_like(param) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        for _ in range(3):
            opt.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                opt.step()
        for step in range(20):
            for i, grad in enumerate(grads):
                grad.fill_(float((step + i) % 5) - 2)
            graph.replay() if captured else opt.step()
        runs.append(values(params))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

"""backend="triton" against backend="torch": whole optimizer steps, and what is said where it cannot run."""

import pytest
import torch

from butterfly_opt import Butterfly, update
from butterfly_opt.backend import choose_backend
from butterfly_opt.triton_kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
"""Relative difference of the trajectories after up to 20 steps, as sums are taken in another order."""


def make_network(dtype):
    """Equal and unequal layers, and a convolution that is not contiguous."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(2, 3, 2, dtype=dtype).to(memory_format=torch.channels_last)
    linear = [torch.nn.Linear(4, 4, dtype=dtype) for _ in range(2)]
    return torch.nn.ModuleList([*linear, torch.nn.Linear(4, 7, dtype=dtype), convolution]).to(DEVICE)


def set_grads(params, step):
    """Noisy gradients of a quadratic, the same for every backend."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        noise = torch.randn(param.shape, generator=generator).to(DEVICE)
        param.grad = (param.detach().float() * 3 + noise).to(param.dtype)


def trajectory(backend, dtype, monkeypatch, bad_step=None, steps=8, **options):
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 1)  # the interpreter pays for every program
    monkeypatch.setattr(update, "REFIT_WARMUP", 3)  # and for every refit
    params = list(make_network(dtype).parameters())
    optimizer = Butterfly(params, lr=1e-2, backend=backend, **{"refit_every": 7, "depth": 1, **options})
    for step in range(steps):
        set_grads(params, step)
        if step == bad_step:
            params[0].grad[0, 0] = float("nan")
        optimizer.step()
    return torch.cat([param.detach().float().flatten() for param in params]).cpu()


@pytest.mark.filterwarnings("ignore:1 steps of tensors were skipped")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"depth": 2, "steps": 20}),
        (torch.float32, {"diagonal": "innovation", "weight_decay": 0.1, "decoupled_weight_decay": True, "steps": 20}),
        (torch.float32, {"weight_decay": 0.1, "decoupled_weight_decay": True, "refit_steps": 0}),
        (torch.float32, {"structure": "flat", "block_size": 16}),
        (torch.float32, {"capturable": True, "bad_step": 4}),
        (torch.float32, {"bad_step": 4, "maximize": True, "weight_decay": 0.1}),
    ],
    ids=["secant", "innovation", "decay", "flat", "capturable", "maximize"],
)
def test_trajectories_agree(dtype, options, monkeypatch):
    reference = trajectory("torch", dtype, monkeypatch, **options)
    ours = trajectory("triton", dtype, monkeypatch, **options)
    assert (ours - reference).norm() <= TOLERANCE * reference.norm()


@pytest.mark.parametrize(
    "options", [{"diagonal": "innovation"}, {"stochastic_rounding": True}], ids=["nearest", "random"]
)
def test_low_precision_parameters(options, monkeypatch):
    """One ulp of bfloat16 may differ where a sum falls on the other side of a rounding boundary."""
    reference = trajectory("torch", torch.bfloat16, monkeypatch, **options)
    ours = trajectory("triton", torch.bfloat16, monkeypatch, **options)
    assert (ours - reference).norm() <= 1e-2 * reference.norm()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches in the interpreter")
@pytest.mark.parametrize("refit_steps", [0, 1])
def test_many_small_tensors_do_not_cost_a_launch_each(refit_steps, monkeypatch):
    from triton.runtime import interpreter

    launches = []
    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *a, **k: (launches.append(1), run(*a, **k))[1])
    counts = []
    for layers in (2, 6):
        params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(layers) for shape in ((4, 3), (4,))]
        optimizer = Butterfly(params, backend="triton", refit_steps=refit_steps)
        for param in params:
            param.grad = torch.ones_like(param)
        launches.clear()
        optimizer.step()
        counts.append(len(launches))
    assert counts[0] == counts[1] <= 30


def test_auto_takes_torch_on_a_cpu():
    assert choose_backend("auto", torch.device("cpu"), torch.float32).name == "torch"


def test_triton_without_gpu_or_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' needs parameters on a CUDA device, got cpu"):
        choose_backend("triton", torch.device("cpu"), torch.float32)


def test_triton_refuses_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"does not take torch.float64"):
        choose_backend("triton", torch.device("cpu"), torch.float64)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed"):
        choose_backend("triton", torch.device("cpu"), torch.float32)
    assert choose_backend("auto", torch.device("cuda"), torch.float32).name == "torch"

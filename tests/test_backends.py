"""backend="triton" against backend="torch": whole optimizer steps, and what is said where it cannot run."""

import pytest
import torch

from butterfly_opt import Butterfly
from butterfly_opt.backend import choose_backend
from butterfly_opt.triton_kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
"""Relative difference of the trajectories after 20 steps, as sums are taken in another order."""


def trajectory(backend, dtype, monkeypatch, **options):
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 1)  # the interpreter pays for every program
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3)).to(DEVICE, dtype)
    inputs, targets = torch.randn(100, 7, device=DEVICE, dtype=dtype), torch.randn(100, 3, device=DEVICE, dtype=dtype)
    optimizer = Butterfly(network.parameters(), lr=1e-2, refit_steps=1, backend=backend, **options)
    for _ in range(20):
        optimizer.zero_grad()
        (network(inputs) - targets).float().square().mean().backward()
        optimizer.step()
    return torch.cat([param.detach().float().flatten() for param in network.parameters()])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"diagonal": "innovation", "weight_decay": 0.1, "decoupled_weight_decay": True}),
        (torch.float32, {"structure": "flat", "depth": 1, "block_size": 16}),
    ],
)
def test_trajectories_agree(dtype, options, monkeypatch):
    reference = trajectory("torch", dtype, monkeypatch, **options)
    ours = trajectory("triton", dtype, monkeypatch, **options)
    assert (ours - reference).norm() <= TOLERANCE * reference.norm()


def test_low_precision_parameters(monkeypatch):
    """One ulp of bfloat16 may differ where a sum falls on the other side of a rounding boundary."""
    reference = trajectory("torch", torch.bfloat16, monkeypatch, diagonal="innovation")
    ours = trajectory("triton", torch.bfloat16, monkeypatch, diagonal="innovation")
    assert (ours - reference).norm() <= 1e-2 * reference.norm()


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

"""backend="triton" against backend="torch": whole steps, and what is said where the kernels cannot run.

Without a GPU the kernels run in Triton's interpreter, which pays for every program: tensors are small.
Axes have several leaves each. A matrix of one leaf by one is diagonal in its first basis, so that most of its first
step is the sign of rounding errors, and no two implementations agree.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_opt import Butterfly, diagonal, stack
from butterfly_opt.backend import takes_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
"""Relative difference of the trajectories after up to 20 steps: sums are taken in another order."""
ROUNDED = 1e-2
"""The same of bfloat16 parameters: one may fall on the other side of a rounding boundary."""


def make_parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    """Noisy gradients of a quadratic, the same for every backend."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        noise = torch.randn(param.shape, generator=generator).to(DEVICE)
        param.grad = (param.detach().float() * 3 + noise).to(param.dtype)


def trajectory(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = ((20, 13), (13,)),
    bad_step: int | None = None,
    steps: int = 20,
    **options: Any,
) -> Tensor:
    """All parameters after some steps, one after the other."""
    monkeypatch.setattr(stack, "REFIT_WARMUP", 2)
    params = make_parameters(dtype, list(shapes))
    batched = {"batch_dims": options.pop("batch_dims", 0)}
    chosen: dict[str, Any] = {"refit_every": 9, "block": 8, "lead": 2, **options}
    optimizer = Butterfly([{"params": params, **batched}], lr=1e-2, backend=backend, **chosen)
    for step in range(steps):
        set_grads(params, step)
        if step == bad_step:
            params[0].grad[0, 0] = float("nan")
        optimizer.step()
    return torch.cat([param.detach().float().flatten() for param in params]).cpu()


def difference(monkeypatch: pytest.MonkeyPatch, **options: Any) -> float:
    reference = trajectory("torch", monkeypatch, **options)
    ours = trajectory("triton", monkeypatch, **options)
    return float((ours - reference).norm() / reference.norm())


CASES: dict[str, dict[str, Any]] = {
    "leading, innovation": {"shapes": ((20, 13),)},
    "leading, secant": {"diagonal": "secant"},
    "full, innovation": {"block": 4, "lead": 4, "shapes": ((12, 9),)},
    "full, secant": {"block": 4, "lead": 4, "shapes": ((12, 9),), "diagonal": "secant"},
    "decay and a skip": {
        "weight_decay": 0.1, "decoupled_weight_decay": True, "bad_step": 4, "steps": 6, "shapes": ((12, 9), (12, 9)),
    },
    "maximize, experts": {
        "weight_decay": 0.1, "maximize": True, "steps": 4, "shapes": ((2, 12, 9),), "batch_dims": 1,
        "diagonal": "secant",
    },
    "capturable": {"capturable": True, "steps": 3, "shapes": ((9, 8),)},
    # Two shares take turns; tiles of one group, and of several.
    "shares": {"shapes": ((130, 70),), "block": 64, "lead": 16, "steps": 4, "refit_every": 2},
    "shares, capturable": {"shapes": ((9, 130),), "capturable": True, "steps": 3},
    "a list of many kinds": {
        "shapes": ((2, 9, 5), (2, 9, 5), (1, 12, 9), (2, 3)), "batch_dims": 1, "bad_step": 2, "steps": 4,
        "refit_every": 2,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:1 tensors had a gradient that is not finite")
@pytest.mark.parametrize("name", CASES)
def test_trajectories_agree(name, monkeypatch):
    assert difference(monkeypatch, **CASES[name]) <= TOLERANCE


@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float16, {"diagonal": "secant"}), (torch.bfloat16, {"stochastic_rounding": True})],
    ids=["nearest", "random"],
)
def test_low_precision_parameters(dtype, options, monkeypatch):
    assert difference(monkeypatch, dtype=dtype, steps=3, shapes=((20, 9), (7,)), **options) <= ROUNDED


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_runs_are_bit_equal(diagonal, monkeypatch):
    runs = [trajectory("triton", monkeypatch, diagonal=diagonal, steps=3, shapes=((12, 9), (7,))) for _ in range(2)]
    assert torch.equal(*runs)


def test_a_resumed_run_is_bit_equal(monkeypatch):
    """The means that a step leaves to the next are not in the state: they are taken of it."""
    monkeypatch.setattr(diagonal, "MIN_STEPS", 1)
    params = make_parameters(torch.float32, [(12, 9), (7,)])
    options: dict[str, Any] = {"backend": "triton", "diagonal": "secant", "block": 8, "lead": 2}
    optimizer = Butterfly(params, **options)
    for step in range(4):
        if step == 2:
            copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
            resumed = Butterfly(copies, **options)
            resumed.load_state_dict(optimizer.state_dict())
        set_grads(params, step)
        optimizer.step()
        if step >= 2:
            set_grads(copies, step)
            resumed.step()
    assert all(map(torch.equal, params, copies))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches in the interpreter")
def test_launches_do_not_grow_with_tensors_or_shapes(monkeypatch):
    from triton.runtime import interpreter

    launches: list[int] = []
    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *a, **k: (launches.append(1), run(*a, **k))[1])
    counts = []
    for shapes in ([(9, 5), (10, 7), (4,)], [(9, 5), (10, 7), (4,), (12, 3), (9, 5), (11, 5), (8,)]):
        params = make_parameters(torch.float32, shapes)
        optimizer = Butterfly(params, backend="triton", block=8, lead=2, refit_every=1)
        for step in range(2):
            set_grads(params, step)
            launches.clear()
            optimizer.step()
        counts.append(len(launches))
    assert counts[0] == counts[1] <= 24


OPTIONS = {"backend": "triton", "fused": None, "block": 64}


def test_auto_takes_torch_on_a_cpu():
    assert not takes_kernels({**OPTIONS, "backend": "auto"}, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("device, interpreted", [("cpu", "0"), ("cuda", "1")])
def test_triton_without_gpu_or_interpreter_is_refused(device, interpreted, monkeypatch):
    """Triton's interpreter sees copies of tensors on a GPU, and no addresses."""
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(ValueError, match=f"on a CUDA device, or on the CPU .* got {device}; use"):
        takes_kernels(OPTIONS, torch.device(device), torch.float32)


def test_triton_refuses_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"does not take torch.float64"):
        takes_kernels(OPTIONS, torch.device("cpu"), torch.float64)


def test_matrices_whose_places_are_no_int32_are_left_to_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert takes_kernels(OPTIONS, torch.device("cpu"), torch.float32, 2**31 - 1)
    with pytest.raises(ValueError, match="matrices of at most 2147483647 elements, got 2147483648"):
        takes_kernels(OPTIONS, torch.device("cpu"), torch.float32, 2**31)


def test_missing_triton_is_named(monkeypatch):
    from butterfly_opt import backend

    backend.missing_kernels.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed"):
        takes_kernels(OPTIONS, torch.device("cpu"), torch.float32)
    assert not takes_kernels({**OPTIONS, "backend": "auto"}, torch.device("cuda"), torch.float32)
    backend.missing_kernels.cache_clear()

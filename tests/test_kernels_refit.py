"""Tests of triton_kernels/refit.py, and of ``rotate.residual_gradient``.

Oracle: ``butterfly_opt.refit`` in float64. Without a GPU the kernels run in Triton's interpreter.
``BUTTERFLY_FULL_GRID=1`` runs every combination of lengths, depths and columns.
"""

import itertools
import os

import pytest
import torch
from torch import Tensor

from butterfly_opt import refit, rotation
from butterfly_opt.triton_kernels import launch
from butterfly_opt.triton_kernels import refit as kernels
from butterfly_opt.triton_kernels.rotate import residual_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error of the norm after all angle steps. Where a gradient is small beside its rounding, Adam
# makes a step of it that depends on the rounding, in the float32 torch path as well.
TOLERANCE = 1e-5
LENGTHS = [1, 2, 3, 5, 31, 64, 100, 127, 1000, 1024]
GRID = {"n": LENGTHS, "depth": [1, 2, 3], "columns": [8, 1, 5]}
SAMPLE = [(n, 1 + i % 3, 8 if i % 4 else 5) for i, n in enumerate(LENGTHS)] + [(31, 2, 1), (100, 3, 8), (64, 1, 8)]
OPTIONS = {"refit_lr": 0.06}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tiles grow as if the device had one multiprocessor: the interpreter pays for each program."""
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 1)


def make(n: int, depth: int, columns: int, *, stages: int | None = None) -> tuple[Tensor, refit.AngleState]:
    """A correlated sketch of unit scale, and angles on their way."""
    generator = torch.Generator().manual_seed(n + depth)
    mixing = torch.linspace(0.3, 2, n)[:, None] * torch.randn(n, 4, generator=generator)
    sketch = mixing @ torch.randn(4, columns, generator=generator) + torch.randn(n, columns, generator=generator)
    sketch /= sketch.square().mean().sqrt()
    angles = 0.3 * torch.randn(rotation.angles_shape(n, depth=depth, stages=stages), generator=generator)
    mean = 1e-2 * torch.randn(angles.shape, generator=generator)
    square = 1e-2 * torch.rand(angles.shape, generator=generator)
    for stage in range(angles.shape[1]):  # slots beyond the last pair stay zero
        pairs = sum(not i >> stage & 1 and i + (1 << stage) < n for i in range(n))
        for tensor in (angles, mean, square):
            tensor[:, stage, pairs:] = 0
    return sketch.to(DEVICE), refit.AngleState(*(tensor.to(DEVICE) for tensor in (angles, mean, square)))


def relative_error(result: Tensor, expected: Tensor) -> float:
    difference = result.double() - expected.double()
    return (difference.norm() / expected.double().norm().clamp_min(1e-30)).item()


def check(
    sketch: Tensor, state: refit.AngleState, *, steps: int, taken: Tensor, owned=None, runs: int = 2, **options
) -> None:
    """Compares with torch in float64, and a second run with the first, bit for bit."""
    exact = refit.AngleState(*(tensor.double() for tensor in state))
    again = [tensor.clone() for tensor in state]
    common = {"steps": steps, **OPTIONS}
    refit.refit_sketch_(
        sketch.double(), exact, taken=taken.double(), owned=owned.double() if owned is not None else None, **common
    )
    expected = rotation.rotate(sketch.double(), exact.angles, dim=0, transpose=True)
    before = sketch.clone()
    result = kernels.refit_sketch_(sketch, *state, taken=taken, owned=owned, **common, **options)
    assert relative_error(result, expected) < TOLERANCE
    for name, tensor in exact._asdict().items():
        assert relative_error(getattr(state, name), tensor) < TOLERANCE, name
    assert torch.equal(sketch, before)
    if runs > 1:
        repeated = kernels.refit_sketch_(sketch, *again, taken=taken, owned=owned, **common, **options)
        assert torch.equal(repeated, result)
        assert all(torch.equal(first, second) for first, second in zip(state, again, strict=True))


def covering() -> list[tuple[int, int, int]]:
    return list(itertools.product(*GRID.values())) if os.environ.get("BUTTERFLY_FULL_GRID") == "1" else SAMPLE


@pytest.mark.parametrize("n, depth, columns", covering())
def test_refit_equals_torch(n, depth, columns):
    sketch, state = make(n, depth, columns)
    check(sketch, state, steps=2, taken=torch.tensor(3.0, device=DEVICE))


@pytest.mark.parametrize("n, depth, columns, stages, max_tile, steps", [
    (100, 2, 8, None, 256, 1), (127, 1, 5, None, 256, 1), (64, 2, 1, None, 64, 2), (40, 1, 8, 4, 128, 2),
])  # fmt: skip
def test_longer_axes_take_several_passes(n, depth, columns, stages, max_tile, steps, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_WINDOW", 16)
    sketch, state = make(n, depth, columns, stages=stages)
    taken = torch.full_like(state.angles, 20)
    check(sketch, state, steps=steps, taken=taken, runs=steps, max_tile=max_tile)


def test_longest_axis():
    sketch, state = make(4097, 1, 8)
    assert not kernels.fits_on_chip(state.angles.shape[1], 8)
    check(sketch, state, steps=1, taken=torch.tensor(0.0, device=DEVICE), runs=1)


@pytest.mark.parametrize("window", [kernels.MAX_WINDOW, 16])
def test_packs(window, monkeypatch):
    """Axes of several lengths behind one another, some in one window, each at a step of its own."""
    monkeypatch.setattr(kernels, "MAX_WINDOW", window)
    lengths = [5, 100, 31, 64, 2, 1, 127, 3]
    packing = refit.pack_axes(lengths)
    parts = [make(n, 2, 8) for n in lengths]
    sketch = refit.pack_rows(packing, [part for part, _ in parts])
    states = [state for _, state in parts]
    state = refit.AngleState(*(refit.pack_angles(packing, column) for column in zip(*states, strict=True)))
    taken = refit.pack_angles(packing, [torch.full_like(s.angles, 10.0 * i) for i, s in enumerate(states)])
    owned = refit.pack_angles(packing, [torch.ones_like(s.angles) for s in states])
    assert packing.total % (1 << packing.stages) and packing.total > 1 << packing.stages
    check(sketch, state, steps=2, taken=taken, owned=owned)
    assert not any(tensor[owned == 0].any() for tensor in state)


def test_no_steps_and_nothing_to_rotate():
    sketch, state = make(20, 1, 8)
    kept = [tensor.clone() for tensor in state]
    taken = torch.tensor(0.0, device=DEVICE)
    result = kernels.refit_sketch_(sketch, *state, steps=0, taken=taken, **OPTIONS)
    assert relative_error(result, rotation.rotate(sketch, state.angles, dim=0, transpose=True)) < 1e-6
    assert all(torch.equal(tensor, before) for tensor, before in zip(state, kept, strict=True))
    for shape in ((1, 8), (0, 8), (4, 0)):
        empty = torch.randn(shape, device=DEVICE)
        angles = torch.zeros(1, max(shape[0] - 1, 0).bit_length(), shape[0] // 2, device=DEVICE)
        result = kernels.refit_sketch_(empty, angles, angles, angles, steps=2, taken=taken, **OPTIONS)
        assert torch.equal(result, empty) and result is not empty


def test_zero_sketch_changes_no_angle():
    _, state = make(20, 1, 8)
    zero = torch.zeros(20, 8, device=DEVICE)
    state.mean.zero_()
    kept = state.angles.clone()
    kernels.refit_sketch_(zero, *state, steps=2, taken=torch.tensor(0.0, device=DEVICE), **OPTIONS)
    assert torch.equal(state.angles, kept)


def test_constants_equal_the_package():
    assert kernels.ANGLE_BETAS == refit.ANGLE_BETAS
    assert kernels.ANGLE_EPS == refit.ANGLE_EPS
    assert kernels.SETTLING_STEPS == refit.SETTLING_STEPS


def test_what_fits_on_chip():
    assert kernels.fits_on_chip(10, 8) and not kernels.fits_on_chip(11, 8)
    assert kernels.fits_on_chip(11, 4) and not kernels.fits_on_chip(11, 5)


@pytest.mark.parametrize("n, columns, max_tile", [(1, 8, 32), (3, 3, 32), (100, 8, 256), (100, 8, 16384), (31, 1, 32)])
def test_residual_gradient(n, columns, max_tile):
    u, state = make(n, 2, columns)
    expected = rotation.angle_gradient(u.double(), refit.one_sided_residual(u.double()), state.angles.double(), dim=0)
    result = residual_gradient(u, state.angles.cos(), state.angles.sin(), max_tile=max_tile)
    assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("name, change, kind, message", [
    ("sketch", torch.float64, TypeError, "sketch must be one of torch.float32, got torch.float64; use butterfly_opt"),
    ("mean", torch.bfloat16, TypeError, "mean must be one of torch.float32, got torch.bfloat16"),
    ("sketch", "transposed", ValueError, r"sketch must be contiguous, got shape \(20, 8\)"),
    ("owned", "meta", ValueError, "owned must be on .*, got meta"),
    ("sketch", (20, 9), ValueError, r"sketch must be \(n, k\) with k <= 8, got shape \(20, 9\)"),
    ("sketch", (20,), ValueError, r"sketch must be \(n, k\) with k <= 8, got shape \(20,\)"),
    ("sketch", (22, 8), ValueError, r"angles must be \(depth, <= 5, 11\) for a sketch of 22 rows, got .*\(1, 5, 10\)"),
    ("angles", (1, 6, 10), ValueError, r"angles must be \(depth, <= 5, 10\)"),
    ("square", (1, 5, 9), ValueError, r"square must have shape \(1, 5, 10\) like angles, got \(1, 5, 9\)"),
    ("owned", (5, 10), ValueError, r"owned must have shape \(1, 5, 10\) like angles, got \(5, 10\)"),
    ("taken", (10,), ValueError, r"taken must be 0-d or of shape \(1, 5, 10\) like angles, got \(10,\)"),
    ("taken", torch.int64, TypeError, "taken must be one of torch.float32, got torch.int64"),
    ("steps", -1, ValueError, "steps must be >= 0, got -1"),
    ("refit_lr", float("nan"), ValueError, "refit_lr must be >= 0, got nan"),
])  # fmt: skip
def test_wrong_arguments(name, change, kind, message):
    sketch, state = make(20, 1, 8)
    arguments = {"sketch": sketch, **state._asdict(), "taken": torch.tensor(0.0, device=DEVICE)}
    arguments |= {"owned": torch.ones_like(state.angles), "steps": 1, **OPTIONS}
    old = arguments[name]
    if change == "transposed":
        arguments[name] = old.T.contiguous().T
    elif isinstance(old, Tensor):
        arguments[name] = torch.ones(change, device=DEVICE) if isinstance(change, tuple) else old.to(change)
    else:
        arguments[name] = change
    with pytest.raises(kind, match=message):
        kernels.refit_sketch_(**arguments)


def test_residual_gradient_refuses():
    cos = torch.ones(1, 2, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"u must have at most 8 columns, got shape \(4, 9\)"):
        residual_gradient(torch.zeros(4, 9, device=DEVICE), cos, cos)
    with pytest.raises(ValueError, match="max_tile must be a power of two >= 16, got 8"):
        residual_gradient(torch.zeros(4, 8, device=DEVICE), cos, cos, max_tile=16)

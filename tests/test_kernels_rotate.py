"""Tests of triton_kernels/rotate.py, tables.py and tiles.py. Oracle: ``butterfly_opt.rotation.Rotation`` in float64.

Without a GPU the kernels run in Triton's interpreter. BUTTERFLY_ALL_LENGTHS=1 adds the lengths that take it minutes.
"""

import os

import pytest
import torch
from kernels import DEVICE, make_operands, observe_
from torch import Tensor

from butterfly_opt import fused
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation, _apply
from butterfly_opt.triton_kernels import rotate, tables, tiles

TOLERANCE = 2e-6
"""Relative: float32 sums of up to 64 products a stage, in up to seven stages."""
CASES = [(2, 64, 16), (3, 2, 2), (5, 2, 2), (31, 8, 2), (31, 3, 3), (64, 64, 16), (65, 64, 16), (96, 16, 8)]
CASES += [(100, 64, 16)]
LARGE = [(127, 2, 2), (1000, 64, 16), (1000, 64, 32), (784, 32, 32), (4097, 64, 16)]
if os.environ.get("BUTTERFLY_ALL_LENGTHS"):
    CASES += LARGE


def make_rotation(n: int, block: int, lead: int, count: int = 2) -> Rotation:
    """Random orthogonal groups, float64 values that float32 holds."""
    generator = torch.Generator().manual_seed(n)
    rotation = Rotation.identity(n, block=block, lead=lead, count=count, dtype=torch.float64)
    for view in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
        view.copy_(torch.linalg.qr(torch.randn(view.shape, generator=generator, dtype=torch.float64)).Q)
    rotation.matrices.copy_(rotation.matrices.float())
    rotation.moments.copy_(torch.rand(rotation.moments.shape, generator=generator).double())
    return rotation


def on_kernels(rotation: Rotation) -> Rotation:
    return Rotation(rotation.plan, rotation.matrices.float().to(DEVICE), rotation.moments.float().to(DEVICE))


def values_of(count: int, n: int, others: int, dim: int, values: int = 1) -> Tensor:
    shape = (values, count, n, others) if dim == -2 else (values, count, others, n)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu().double() - exact).norm() / exact.norm())


def on_axis(rotation: Rotation, dim: int) -> list[Rotation | None]:
    """A rotation of rows or of columns, and nothing of the other axis."""
    return [rotation, None] if dim == -2 else [None, rotation]


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_later_stages_rotate_forth_and_back(case, dim):
    """All values on the way forth, the direction alone on the way back."""
    exact = make_rotation(*case)
    x = values_of(2, case[0], 5, dim, values=2).to(DEVICE)
    operands = make_operands(on_axis(on_kernels(exact), dim), x[0], [1.0, 1.0])
    operands.values.copy_(x.flatten(1))
    rotate.turn_(operands, axis=dim + 2, gate=tables.USABLE)
    later = [(stage, [matrix.mT for matrix in matrices]) for stage, matrices in exact._stages[1:]]
    for ours, own in zip(operands.values, x.cpu().double(), strict=True):
        expected = _apply(later, own if dim == -2 else own.mT)
        assert relative(ours.view_as(own), expected if dim == -2 else expected.mT) <= TOLERANCE
    kept = operands.values[0].clone()
    rotate.turn_(operands, axis=dim + 2, gate=tables.USABLE, back=True)
    assert relative(operands.values[1].view_as(x[1]), x[1].cpu().double()) <= TOLERANCE
    assert torch.equal(operands.values[0], kept)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_are_observed(case, dim):
    exact = make_rotation(*case)
    ours = on_kernels(exact)
    x = values_of(2, case[0], 70, dim)[0]
    broken = x.clone().to(DEVICE)
    broken[1] = torch.nan
    observe_(on_axis(ours, dim), broken, [0.25, 0.0])
    before = exact.moments.clone()
    exact.observe_(x.double() if dim == -2 else x.double().mT, torch.tensor([0.25, 0.0]).double())
    assert relative(ours.moments, exact.moments) <= TOLERANCE
    assert torch.equal(ours.moments[1].cpu().double(), before[1]), "a weight of 0 changes nothing, whatever the values"


def test_both_axes_are_observed_in_one_pass():
    """The sums over an axis are the same when that axis is rotated."""
    row, column = make_rotation(24, 8, 2, count=1), make_rotation(40, 8, 4, count=1)
    ours, x = [on_kernels(row), on_kernels(column)], values_of(1, 24, 40, -2)[0]
    observe_(ours, x.to(DEVICE), [1.0])
    row.observe_(x.double(), 1.0)
    column.observe_(x.double().mT, 1.0)
    assert relative(ours[0].moments, row.moments) <= TOLERANCE
    assert relative(ours[1].moments, column.moments) <= TOLERANCE


@pytest.mark.parametrize("others", [1, 64, 200])
def test_chunks_are_added_in_one_order(others, monkeypatch):
    """However many programs share a tile, and twice the same bits."""
    exact = make_rotation(20, 8, 2, count=1)
    x = values_of(1, 20, others, -2)[0].to(DEVICE)
    found = []
    for programs in (1, 1000, 1000):
        monkeypatch.setattr(tiles, "MANY_PROGRAMS", programs)
        ours = on_kernels(exact)
        observe_([ours, None], x, [1.0])
        found.append(ours.moments)
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "runs, length", [([(3, 5)], 15), ([(2, 33), (1, 32)], 98), ([(5, 2)], 11), ([(40, 2), (1, 3)], 84)]
)
def test_tiles_cover_every_coordinate_once(runs, length):
    width = tiles.width_of(length)
    cut = tiles.stage_tiles(tuple(runs), length, 7, width).tolist()
    seen = [start + i for start, total, *_ in cut for i in range(total)]
    assert seen == list(range(length))
    assert all(total <= width and total % size == 0 for _, total, _, size, _ in cut)
    turned = sum(total * size for _, total, offset, size, _ in cut if offset >= 0)
    assert turned == sum(count * size**2 for count, size in runs)


def test_what_does_not_fit_is_refused():
    state = torch.zeros(2, 5, 4, device=DEVICE)
    with pytest.raises(TypeError, match=r"exp_avg must be torch.float32, got torch.float64; use backend='torch'"):
        tiles.check({"exp_avg": state.double()})
    with pytest.raises(ValueError, match=r"exp_avg must be contiguous, got strides \(20, 1, 5\)"):
        tiles.check({"exp_avg": state.mT.contiguous().mT})
    with pytest.raises(ValueError, match="groups of at most 64, got 100; use backend='torch'"):
        fused._stages(make_plan(100, 128, 32), 64, DEVICE)

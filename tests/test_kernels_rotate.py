"""Tests of the rotations of triton_kernels/step.py, of tables.py and tiles.py.

Oracle: ``butterfly_opt.rotation.Rotation`` in float64.

Without a GPU the kernels run in Triton's interpreter. BUTTERFLY_ALL_LENGTHS=1 adds the lengths that take it minutes.
"""

import os

import pytest
import torch
from kernels import DEVICE, make_operands, observe_
from torch import Tensor

from butterfly_opt import fused
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation
from butterfly_opt.triton_kernels import step as kernels
from butterfly_opt.triton_kernels import tables, tiles

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
    for view in (view for runs in rotation.plan.views(rotation.moments) for view in runs):
        random = torch.rand(view.shape, generator=generator)
        view.copy_(random + random.mT)
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
def test_directions_are_rotated_back(case, dim):
    exact = make_rotation(*case)
    x = values_of(2, case[0], 5, dim)[0].to(DEVICE)
    operands = make_operands(on_axis(on_kernels(exact), dim), x, [1.0, 1.0])
    operands.numbers[:, tables.NUMBERS.index("lr")] = -1.0
    operands.values[1].copy_(x.flatten())
    kernels.back_(operands, stochastic=False, write=False)
    expected = exact.from_rotated(x.cpu().double(), dim=dim)
    assert relative(operands.values[0].view_as(x), expected) <= TOLERANCE


@pytest.mark.parametrize("shape", [(24, 40), (65, 200), (9, 130)], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["leading", "full"])
def test_every_coordinate_leaves_once(shape, full):
    """At different levels, whatever is turned there: averages of all, and ``m / (sqrt(A + m^2 / 4) + 1)``."""
    block, lead = (4, 4) if full else (8, 2)
    pair = [make_rotation(n, block, lead, count=1) for n in shape]
    x = values_of(1, *shape, -2)[0].to(DEVICE)
    operands = make_operands([on_kernels(own) for own in pair], x, [1.0], names=("exp_avg", "exp_avg_sq"))
    for name in ("mean", "square"):
        operands.numbers[:, tables.NUMBERS.index(name)] = 0.5
    operands.numbers[:, tables.NUMBERS.index("floor")] = 1.0
    kernels.forth_(operands, gate=tables.USABLE, step=True, observe=False)
    u = pair[1].to_rotated(pair[0].to_rotated(x.cpu().double()), dim=-1)
    averages = operands.tables.parts[0].averages
    assert relative(averages["exp_avg"], 0.5 * x.cpu().double()) <= TOLERANCE
    assert relative(averages["exp_avg_sq"], 0.5 * u**2) <= TOLERANCE
    m = 0.75 * u
    assert relative(operands.values[1].view_as(x), m / ((0.5 * u**2 + 0.25 * m**2).sqrt() + 1)) <= TOLERANCE


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_products_are_as_accurate_as_those_of_float32(scale):
    """Of halves of float16: a tile may be of any size; what is a 2^36th of its largest entry is lost."""
    exact = make_rotation(64, 64, 16, count=1)
    x = values_of(1, 64, 64, -1)[0]
    x[:, 3] *= 1e-6
    operands = make_operands([None, on_kernels(exact)], (scale * x).to(DEVICE), [1.0])
    operands.numbers[:, tables.NUMBERS.index("lr")] = -1.0
    operands.values[1].copy_((scale * x).flatten())
    kernels.back_(operands, stochastic=False, write=False)
    ours, expected = operands.values[0].view_as(x).cpu().double() / scale, exact.from_rotated(x.double(), dim=-1)
    in_float32 = (exact.matrices.float().view(64, 64) @ x.mT).mT.double()
    assert (ours - expected).norm() <= 2 * (in_float32 - expected).norm()
    assert (ours - expected)[:, 3].abs().max() <= 2**-34 * x.abs().max()


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


def test_partial_moments_are_added_in_one_order():
    """Twice the same bits."""
    exact = make_rotation(20, 8, 2, count=1)
    x = values_of(1, 20, 200, -2)[0].to(DEVICE)
    found = []
    for _ in range(2):
        found.append(on_kernels(exact))
        observe_([found[-1], None], x, [1.0])
    assert torch.equal(found[0].moments, found[1].moments)


@pytest.mark.parametrize(
    "runs, length", [([(3, 5)], 15), ([(2, 33), (1, 32)], 98), ([(5, 2)], 11), ([(40, 2), (1, 3)], 84)]
)
def test_tiles_cover_every_coordinate_once(runs, length):
    width = tiles.width_of(length)
    cut = tiles.make_stage(tuple(runs), None, length, 7, width, lead=2).tiles.tolist()
    seen = [start + i for start, total, *_ in cut for i in range(total)]
    assert seen == list(range(length))
    assert all(total <= width for _, total, *_ in cut)
    turned = sum(total * size for _, total, offset, size, *_ in cut if offset >= 0)
    assert turned == sum(count * size**2 for count, size in runs)


def test_what_does_not_fit_is_refused():
    state = torch.zeros(2, 5, 4, device=DEVICE)
    with pytest.raises(TypeError, match=r"exp_avg must be torch.float32, got torch.float64; use backend='torch'"):
        tiles.check({"exp_avg": state.double()})
    with pytest.raises(ValueError, match=r"exp_avg must be contiguous, got strides \(20, 1, 5\)"):
        tiles.check({"exp_avg": state.mT.contiguous().mT})
    with pytest.raises(ValueError, match="groups of at most 64, got 100; use backend='torch'"):
        fused._stages(make_plan(100, 128, 32), 64, DEVICE)

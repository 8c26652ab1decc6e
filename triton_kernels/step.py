"""The element-wise work of a step, inside the passes over the leaves of both axes.

Formulas, in the names of ``butterfly_opt.step``, for a tile of a leaf of the rows and one of the columns:

    forth   y = g - gbar,  gbar <- gbar + a y;   secant: s = theta - thetabar,  thetabar <- thetabar + a s
            u, m, w = B_r^T (y, gbar + a (1 - a) y, s) B_c;    flag = any(gbar = 0)
            partial second moments y y^T and y^T y, of the rows and of the columns
    averages    A <- A + b (u^2 - A);                secant: B <- B + b' (w^2 - B),  C <- C + b' (u w - C)
    direction   d = m / (sqrt(V + m^2) + floor),   V = A, or that of ``butterfly_opt.diagonal.regress``
    back    theta <- round(theta (1 - lr weight_decay) - lr B_r d B_c^T), but for entries with gbar = 0

A coordinate is *final* once no later stage of either axis turns it. Averages and direction of final coordinates are
taken on the way forth over the leaves; ``take_rest_`` does those of all others, between the later stages of the way
forth and those of the way back. Both add up B and |C|, whose means the next step's regression takes. Moments that a
refit of the same step needs are taken in a pass of their own, which changes nothing else.

Layout. Of a list of matrices of any shapes, see ``tables``. Parameters and gradients lie where ``addresses`` says,
state where the table of matrices says. Where no axis is rotated, rows and columns are one row. ``numbers`` come from
device memory, so a captured graph reads their newest values. Where a tensor is not usable, its programs return at once.
Sums have one order, without atomics.

Dtypes. Parameters and gradients float32, bfloat16 or float16, of one dtype each; state and arithmetic float32.
Parameters are rounded once, to nearest even or stochastically (``butterfly_opt.rounding``).

Cost. Bytes a parameter, float32, in full width; final ones are 9/16 of all for ``lead = block / 4``
(``experiments.bench_kernels.step_bytes`` counts them from the plans):

                      innovation                              secant
    forth             g, gbar, gbar' 12; final A, A', d 12;   g, gbar, theta, thetabar, gbar', thetabar' 24; final A, B,
                      others u, m 8                           C both ways, d 28; others u, w, m 12
    moments           halves, written and read 9              the same
    later stages      2 x 5.3                                 3 x 5.3
    take_rest_        others u, m, A, A', d 20                others u, w, m, d 16, A, B, C both ways 24
    later stages back 5.3                                     5.3
    back              d, theta, theta' 12                     the same
    together          68                                      105
"""

from typing import Any

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import MATRIX, NUMBERS, Operands
from .tiles import _WIDE, PRECISION, block_matrix, coordinates, goes_on, pointer, store_moment

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What parameters and gradients may be."""

_TORCH_STEP = "butterfly_opt.step.take_step_"
_M = tl.constexpr(len(MATRIX))
_N = tl.constexpr(len(NUMBERS))
_ROOT_TINY = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)
_LEAST_TAU2 = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.75)


@triton.jit
def _find_tile(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, HEIGHT: tl.constexpr,
               WIDTH: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Matrix, rows of tables, scratch and tiles of a program; where its elements lie, which exist, which are final."""
    programs_ptr += tl.program_id(0) * 3
    matrix = tl.load(programs_ptr).to(tl.int64)
    matrices_ptr += matrix * _M
    first = tl.load(matrices_ptr + 5)
    columns = tl.load(matrices_ptr + 6)
    if EVEN:
        first = tl.multiple_of(first, 16)
        columns = tl.multiple_of(columns, 16)
    row_ptr = tiles_ptr + tl.load(programs_ptr + 1) * _WIDE
    column_ptr = tiles_ptr + tl.load(programs_ptr + 2) * _WIDE
    own_rows, in_rows = coordinates(row_ptr, HEIGHT, False)
    own_columns, in_columns = coordinates(column_ptr, WIDTH, EVEN)
    offsets = own_rows[:, None] * columns + own_columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    final = mask & ((goes_on(row_ptr, HEIGHT)[:, None] | goes_on(column_ptr, WIDTH)[None, :]) == 0)
    numbers_ptr += matrix * _N
    values_ptr += first
    return matrix, matrices_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, final


@triton.jit
def _turn(x, row_matrix, column_matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if ROWS:
        x = tl.dot(row_matrix, x, input_precision=PRECISION)
    if COLUMNS:
        x = tl.dot(x, column_matrix, input_precision=PRECISION)
    return x


@triton.jit
def _innovation(grad_ptr, param_ptr, numbers_ptr, mean, offsets, mask, DECAY: tl.constexpr):
    """``y`` of a tile."""
    grad = tl.load(numbers_ptr + 10) * tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if DECAY:
        grad += tl.load(numbers_ptr + 11) * tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return grad - mean


@triton.jit
def _average(entry_ptr, offsets, product, weight, mask, EVEN: tl.constexpr):
    """``average <- average + weight (product - average)``; returns it, 0 where the mask is."""
    average_ptr = pointer(entry_ptr, tl.float32, EVEN) + offsets
    average = tl.load(average_ptr, mask=mask, other=0.0)
    average += weight * (product - average)
    tl.store(average_ptr, average, mask=mask)
    return tl.where(mask, average, 0.0)


@triton.jit
def _at_least(x, bound):
    """``torch.clamp_min``: unlike ``tl.maximum`` it keeps NaN on every version of Triton."""
    return tl.where(x < bound, bound, x)


@triton.jit
def _regressed(energy, disp_sq, cross, means_ptr, step, newest, REGRESSION: tl.constexpr):
    """``V`` of ``diagonal.regress``, in its order."""
    MIN_STEPS: tl.constexpr = REGRESSION[0]
    MAX_RIDGE: tl.constexpr = REGRESSION[1]
    ROUNDING: tl.constexpr = REGRESSION[2]
    tau2 = tl.load(means_ptr)
    moved = (tau2 > _LEAST_TAU2) & (step > MIN_STEPS)
    inverse = tl.where(moved, 1.0 / tl.sqrt_rn(tl.where(moved, tau2, 1.0)), 0.0)
    b = disp_sq * (inverse * inverse)
    c = cross * inverse
    mean_slope = tl.load(means_ptr + 1) * inverse
    residual = _at_least(energy - c * c / (b + 1 / MAX_RIDGE), 0.0)
    inverse_slope = 1.0 / _at_least(mean_slope, _ROOT_TINY)
    ridge = residual * inverse_slope * (inverse_slope * newest)
    ridge = tl.where(ridge > MAX_RIDGE, MAX_RIDGE, ridge) + ROUNDING
    slope = (c + ridge * mean_slope) / (b + ridge)
    noise = _at_least(energy + slope * (slope * b - 2.0 * c), 0.0)
    return noise + slope * slope


@triton.jit
def _sum(x):
    """In float64: rounded to float32, the order of the additions, and so who added, does not show."""
    return tl.sum(tl.sum(x.to(tl.float64), axis=1), axis=0)


@triton.jit
def _direction(u, m, w, matrix_ptr, numbers_ptr, means_ptr, sums_ptr, offsets, mask, REGRESSION: tl.constexpr,
               ADD: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """``d`` of a tile, after its averages; the sums of B and |C| are written, or added to those of the way forth."""
    energy = _average(matrix_ptr + 1, offsets, u * u, tl.load(numbers_ptr + 1), mask, EVEN)
    if REGRESSION is not None:
        weight = tl.load(numbers_ptr + 2)
        disp_sq = _average(matrix_ptr + 3, offsets, w * w, weight, mask, EVEN)
        cross = _average(matrix_ptr + 4, offsets, u * w, weight, mask, EVEN)
        sum_sq = _sum(disp_sq)
        sum_cross = _sum(tl.abs(cross))
        if ADD:
            sum_sq += tl.load(sums_ptr)
            sum_cross += tl.load(sums_ptr + 1)
        tl.store(sums_ptr, sum_sq)
        tl.store(sums_ptr + 1, sum_cross)
        energy = _regressed(energy, disp_sq, cross, means_ptr, tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 12),
                            REGRESSION)  # fmt: skip
    # sqrt_rn: tl.sqrt takes subnormal energies for zero.
    return m / (tl.sqrt_rn(energy + m * m) + tl.load(numbers_ptr + 7))


@triton.jit
def _forth_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, volume, addresses_ptr, flags_ptr,
                  means_ptr, sums_ptr, row_partial_ptr, column_partial_ptr, gate, STEP: tl.constexpr,
                  OBSERVE: tl.constexpr, DECAY: tl.constexpr, GRAD: tl.constexpr, PARAM: tl.constexpr,
                  REGRESSION: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    matrix, matrix_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, final = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, HEIGHT, WIDTH, EVEN
    )
    if tl.load(numbers_ptr + gate) == 0:
        return
    program = tl.program_id(0).to(tl.int64)
    param_ptr = pointer(addresses_ptr + matrix * 2 + 1, PARAM, EVEN)
    mean_ptr = pointer(matrix_ptr, tl.float32, EVEN)
    mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    grad_ptr = pointer(addresses_ptr + matrix * 2, GRAD, EVEN)
    y = _innovation(grad_ptr, param_ptr, numbers_ptr, mean, offsets, mask, DECAY)
    if OBSERVE:
        # Times 1, and -1: products of one tile would hold 128 KiB of shared memory at a time, those of copies 64.
        copy = tl.load(numbers_ptr + 5) * y
        if ROWS:
            store_moment(row_partial_ptr, tl.dot(copy, tl.trans(copy), input_precision=PRECISION), HEIGHT)
        if COLUMNS:
            copy = -copy
            store_moment(column_partial_ptr, tl.dot(tl.trans(copy), copy, input_precision=PRECISION), WIDTH)
    row_matrix = 0.0
    column_matrix = 0.0
    if ROWS:
        row_matrix = tl.trans(block_matrix(row_ptr, HEIGHT))
    if COLUMNS:
        column_matrix = block_matrix(column_ptr, WIDTH)
    others = (final == 0) & mask
    u = _turn(y, row_matrix, column_matrix, ROWS, COLUMNS)
    tl.store(values_ptr + offsets, u, mask=others)
    if STEP:
        weight = tl.load(numbers_ptr)
        mean += weight * y
        tl.store(mean_ptr + offsets, mean, mask=mask)
        tl.store(flags_ptr + program, tl.max(tl.max(tl.where(mask & (mean == 0), 1, 0), axis=1), axis=0))
        m = _turn(mean + weight * (1.0 - weight) * y, row_matrix, column_matrix, ROWS, COLUMNS)
        w = u
        if REGRESSION is not None:
            param_avg_ptr = pointer(matrix_ptr + 2, tl.float32, EVEN)
            param_avg = tl.load(param_avg_ptr + offsets, mask=mask, other=0.0)
            s = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - param_avg
            tl.store(param_avg_ptr + offsets, param_avg + weight * s, mask=mask)
            w = _turn(s, row_matrix, column_matrix, ROWS, COLUMNS)
            tl.store(values_ptr + volume + volume + offsets, w, mask=others)
        d = _direction(u, m, w, matrix_ptr, numbers_ptr, means_ptr + matrix * 2, sums_ptr + program * 2, offsets, final,
                       REGRESSION, False, EVEN)  # fmt: skip
        tl.store(values_ptr + volume + offsets, tl.where(final, d, m), mask=mask)


@triton.jit
def _rest_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, volume, means_ptr, sums_ptr,
                 REGRESSION: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Averages and direction of the coordinates that later stages turn."""
    matrix, matrix_ptr, numbers_ptr, values_ptr, _, _, offsets, mask, final = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, HEIGHT, WIDTH, EVEN
    )
    if tl.load(numbers_ptr + 5) == 0:
        return
    mask = mask & (final == 0)
    u = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    values_ptr += volume
    m = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    w = u
    if REGRESSION is not None:
        w = tl.load(values_ptr + volume + offsets, mask=mask, other=0.0)
    sums_ptr += tl.program_id(0).to(tl.int64) * 2
    d = _direction(u, m, w, matrix_ptr, numbers_ptr, means_ptr + matrix * 2, sums_ptr, offsets, mask, REGRESSION, True,
                   EVEN)  # fmt: skip
    tl.store(values_ptr + offsets, d, mask=mask)


@triton.jit
def _means_kernel(matrices_ptr, numbers_ptr, sums_ptr, means_ptr, BLOCK: tl.constexpr):
    """The sums of a matrix's programs over its elements."""
    matrix = tl.program_id(0).to(tl.int64)
    if tl.load(numbers_ptr + matrix * _N + 5) == 0:
        return
    matrices_ptr += matrix * _M
    sums_ptr += tl.load(matrices_ptr + 10) * 2
    programs = tl.load(matrices_ptr + 11).to(tl.int32)
    rows = tl.arange(0, BLOCK)[:, None]
    both = tl.arange(0, 2)
    total = tl.zeros((BLOCK, 2), tl.float64)
    for start in range(0, programs, BLOCK):
        total += tl.load(sums_ptr + (start + rows) * 2 + both[None, :], mask=start + rows < programs, other=0.0)
    mean = tl.sum(total, axis=0) / tl.load(matrices_ptr + 7).to(tl.float64)
    tl.store(means_ptr + matrix * 2 + both, mean.to(tl.float32))


@triton.jit
def _mix(bits):
    """``butterfly_opt.rounding._mix``, in uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _round(x, matrix_ptr, offsets, step, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``x`` in ``DTYPE``: to nearest, ties to even, or as ``butterfly_opt.rounding.round_stochastically``."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300 - a capital is no constant here
        # The interpreter's own cast to bfloat16 truncates, so both roundings are spelled out.
        bits = x.to(tl.uint32, bitcast=True)
        above = 0x7FFF + ((bits >> 16) & 1)
        if STOCHASTIC:
            key = _mix(tl.load(matrix_ptr + 8).to(tl.uint32))
            place = (tl.load(matrix_ptr + 9) + offsets).to(tl.uint32)
            above = _mix(_mix(place ^ key) ^ (step.to(tl.int64).to(tl.uint32) * 0x9E3779B1)) & 0xFFFF
        rounded = ((bits + above) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x.to(DTYPE)


@triton.jit
def _back_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, volume, addresses_ptr, flags_ptr,
                 WRITE: tl.constexpr, STOCHASTIC: tl.constexpr, PARAM: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    matrix, matrix_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, _ = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, HEIGHT, WIDTH, EVEN
    )
    if tl.load(numbers_ptr + 5) == 0:
        return
    d = tl.load(values_ptr + volume + offsets, mask=mask, other=0.0)
    row_matrix = 0.0
    column_matrix = 0.0
    if ROWS:
        row_matrix = block_matrix(row_ptr, HEIGHT)
    if COLUMNS:
        column_matrix = tl.trans(block_matrix(column_ptr, WIDTH))
    change = -tl.load(numbers_ptr + 4) * _turn(d, row_matrix, column_matrix, ROWS, COLUMNS)
    # gbar is read where the way forth met a zero: spread, since a mask is no single truth value.
    flagged = tl.zeros((HEIGHT, WIDTH), tl.int32) + tl.load(flags_ptr + tl.program_id(0)) != 0
    mean_ptr = pointer(matrix_ptr, tl.float32, EVEN)
    change = tl.where(tl.load(mean_ptr + offsets, mask=mask & flagged, other=1.0) == 0, 0.0, change)
    if WRITE:
        param_ptr = pointer(addresses_ptr + matrix * 2 + 1, PARAM, EVEN) + offsets
        after = tl.load(param_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(numbers_ptr + 6) + change
        step = tl.load(numbers_ptr + 3)
        tl.store(param_ptr, _round(after, matrix_ptr, offsets, step, PARAM, STOCHASTIC), mask=mask)
    else:
        tl.store(values_ptr + offsets, change, mask=mask)


def forth_(operands: Operands, *, gate: int, step: bool, observe: bool) -> None:
    """Averages of gradients and parameters, and their changes rotated by the leaves; all of final coordinates.

    Equals ``butterfly_opt.step.take_step_`` up to ``to_rotated``, restricted to the leaves.

    Args:
        operands: of the step.
        gate: the column of ``numbers`` that is 0 for matrices to be left out.
        step: else no average changes, and of the values only the innovation is made.
        observe: take the partial second moments of the innovation.
    """
    _launch(
        _forth_kernel, operands, operands.addresses, operands.flags, operands.means, operands.sums, *operands.partials,
        gate, STEP=step, OBSERVE=observe, DECAY=operands.decays, GRAD=_dtype(operands, "gradients"),
        PARAM=_dtype(operands, "parameters"), REGRESSION=operands.regression,
    )  # fmt: skip


def take_rest_(operands: Operands) -> None:
    """Averages and directions of what later stages turned; with secant, the means for the next step.

    Equals the averages of ``butterfly_opt.step.take_step_`` and its ``scale``.
    """
    tables, means = operands.tables, operands.means
    if any(axis.stages[0].lead for part in tables.parts for axis in part.axes):
        _launch(_rest_kernel, operands, means, operands.sums, REGRESSION=operands.regression)
    if operands.regression:
        _means_kernel[(len(means),)](tables.matrices, operands.numbers, operands.sums, means, BLOCK=512)


def back_(operands: Operands, *, stochastic: bool, write: bool) -> None:
    """The direction rotated back by the leaves, and written; equals the end of ``butterfly_opt.step.take_step_``.

    Args:
        operands: of the step.
        stochastic: round bfloat16 parameters at random.
        write: change the parameters; else ``values[0]`` receives the change of usable tensors.
    """
    _launch(
        _back_kernel, operands, operands.addresses, operands.flags, WRITE=write, STOCHASTIC=stochastic,
        PARAM=_dtype(operands, "parameters"),
    )  # fmt: skip


def _launch(kernel: Any, operands: Operands, *own: Tensor | int, **constants: Any) -> None:
    """A program for each tile of the leaves: 16 elements a lane, at most 8 warps."""
    tables = operands.tables
    height, width = (axis.width for axis in tables.axes)
    kernel[(len(tables.programs),)](
        tables.matrices, tables.tiles, tables.programs, operands.numbers, operands.values, tables.volume, *own,
        HEIGHT=height, WIDTH=width, EVEN=operands.even, ROWS=0 in tables.rotated, COLUMNS=1 in tables.rotated,
        num_warps=1 << max(0, min(3, (height * width // 512).bit_length() - 1)), **constants,
    )  # fmt: skip


def _dtype(operands: Operands, name: str) -> Any:
    dtype = operands.dtypes[name == "parameters"]
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {dtype}; use {_TORCH_STEP}")
    return DTYPES[dtype]

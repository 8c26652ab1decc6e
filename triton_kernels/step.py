"""The element-wise work of a step, inside the passes over the leaves of both axes.

Formulas, in the names of ``butterfly_opt.step``, for a tile of a leaf of the rows and one of the columns:

    forth   y = g - gbar,  gbar <- gbar + a y;   secant: s = theta - thetabar,  thetabar <- thetabar + a s
            u, m, w = B_r^T (y, gbar + a (1 - a) y, s) B_c;    flag = any(gbar = 0)
            partial second moments y y^T and y^T y, of the rows and of the columns
    averages    A <- A + b (u^2 - A);                secant: B <- B + b' (w^2 - B),  C <- C + b' (u w - C)
    direction   d = m / (sqrt(V + m^2) + floor),   V = A, or that of ``butterfly_opt.diagonal.regress``
    back    theta <- round(theta (1 - lr weight_decay) - lr B_r d B_c^T), but for entries with gbar = 0

A coordinate is *final* once no later stage of either axis turns it. Averages and direction of final coordinates are
taken in the passes over the leaves; ``take_rest_`` does those of all others, between the later stages of the way
forth and those of the way back. ``secant`` needs sums of B and |C| over the tensor before any direction. Moments that
a refit of the same step needs are taken in a pass of their own, which changes nothing else.

Layout. Of a list of matrices of any shapes, see ``tables``. Parameters and gradients lie where ``addresses`` says,
state where the table of matrices says. Where no axis is rotated, rows and columns are one row. ``numbers`` come from
device memory, so a captured graph reads their newest values. Where a tensor is not usable, its programs return at once.
Sums have one order, without atomics.

Dtypes. Parameters and gradients float32, bfloat16 or float16, of one dtype each; state and arithmetic float32.
Parameters are rounded once, to nearest even or stochastically (``butterfly_opt.rounding``).

Cost. Bytes a parameter, float32, in full width; final ones are 9/16 of all for ``lead = block / 4``
(``butterfly_opt.fused.step_bytes`` counts them from the plans):

                      innovation                              secant
    forth             g, gbar, gbar' 12; final A, A', d 12;   g, gbar, theta, thetabar, gbar', thetabar' 24, m 4;
                      others u, m 8                           final A, B, C both ways 24; others u, w 8
    moments           halves, written and read 9              the same
    later stages      2 x 5.3                                 3 x 5.3
    take_rest_        others u, m, A, A', d 20                others u, w, A, B, C both ways 32; A, B, C, m, d 20
    later stages back 5.3                                     5.3
    back              d, theta, theta' 12                     theta, theta' 8; final A, B, C, m 16; others d 4
    together          68                                      117
"""

from typing import Any

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
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
    return (
        matrix,
        matrices_ptr,
        numbers_ptr + matrix * _N,
        values_ptr + first,
        row_ptr,
        column_ptr,
        offsets,
        mask,
        final,
    )


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
def _average(average_ptr, offsets, product, weight, mask):
    """``average <- average + weight (product - average)``; returns it, 0 where the mask is."""
    average = tl.load(average_ptr + offsets, mask=mask, other=0.0)
    average += weight * (product - average)
    tl.store(average_ptr + offsets, average, mask=mask)
    return tl.where(mask, average, 0.0)


@triton.jit
def _average_pairs(matrix_ptr, offsets, u, w, weight, mask, sums_ptr, EVEN: tl.constexpr, ADD: tl.constexpr):
    """B and C of a tile; their sums are written for the program, or added to those of its first launch."""
    disp_sq = _average(pointer(matrix_ptr + 3, tl.float32, EVEN), offsets, w * w, weight, mask)
    cross = _average(pointer(matrix_ptr + 4, tl.float32, EVEN), offsets, u * w, weight, mask)
    disp_sq = tl.sum(tl.sum(disp_sq, axis=1), axis=0)
    cross = tl.sum(tl.sum(tl.abs(cross), axis=1), axis=0)
    if ADD:
        disp_sq += tl.load(sums_ptr)
        cross += tl.load(sums_ptr + 1)
    tl.store(sums_ptr, disp_sq)
    tl.store(sums_ptr + 1, cross)


@triton.jit
def _at_least(x, bound):
    """``torch.clamp_min``: unlike ``tl.maximum`` it keeps NaN on every version of Triton."""
    return tl.where(x < bound, bound, x)


@triton.jit
def _regressed(energy, matrix_ptr, sums_ptr, offsets, mask, step, newest, MIN_STEPS: tl.constexpr,
               MAX_RIDGE: tl.constexpr, ROUNDING: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """``V`` of ``diagonal.regress``, in its order."""
    size = tl.load(matrix_ptr + 7) * 1.0
    tau2 = tl.load(sums_ptr) / size
    moved = (tau2 > _LEAST_TAU2) & (step > MIN_STEPS)
    inverse = tl.where(moved, 1.0 / tl.sqrt_rn(tl.where(moved, tau2, 1.0)), 0.0)
    b = tl.load(pointer(matrix_ptr + 3, tl.float32, EVEN) + offsets, mask=mask, other=0.0) * (inverse * inverse)
    c = tl.load(pointer(matrix_ptr + 4, tl.float32, EVEN) + offsets, mask=mask, other=0.0) * inverse
    mean_slope = tl.load(sums_ptr + 1) * inverse / size
    residual = _at_least(energy - c * c / (b + 1 / MAX_RIDGE), 0.0)
    inverse_slope = 1.0 / _at_least(mean_slope, _ROOT_TINY)
    ridge = residual * inverse_slope * (inverse_slope * newest)
    ridge = tl.where(ridge > MAX_RIDGE, MAX_RIDGE, ridge) + ROUNDING
    slope = (c + ridge * mean_slope) / (b + ridge)
    noise = _at_least(energy + slope * (slope * b - 2.0 * c), 0.0)
    return noise + slope * slope


@triton.jit
def _direction(m, energy, floor):
    # sqrt_rn: tl.sqrt takes subnormal energies for zero.
    return m / (tl.sqrt_rn(energy + m * m) + floor)


@triton.jit
def _forth_kernel(addresses_ptr, matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr,
                  flags_ptr, sums_ptr, row_partial_ptr, column_partial_ptr, gate, volume, STEP: tl.constexpr,
                  OBSERVE: tl.constexpr, SECANT: tl.constexpr, DECAY: tl.constexpr,
                  GRAD: tl.constexpr, PARAM: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                  EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
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
        square_ptr = pointer(matrix_ptr + 1, tl.float32, EVEN)
        energy = _average(square_ptr, offsets, u * u, tl.load(numbers_ptr + 1), final)
        if SECANT:
            param_avg_ptr = pointer(matrix_ptr + 2, tl.float32, EVEN)
            param_avg = tl.load(param_avg_ptr + offsets, mask=mask, other=0.0)
            s = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - param_avg
            tl.store(param_avg_ptr + offsets, param_avg + weight * s, mask=mask)
            w = _turn(s, row_matrix, column_matrix, ROWS, COLUMNS)
            tl.store(values_ptr + volume + volume + offsets, w, mask=others)
            _average_pairs(matrix_ptr, offsets, u, w, tl.load(numbers_ptr + 2), final, sums_ptr + program * 2, EVEN,
                           False)  # fmt: skip
        else:
            m = tl.where(final, _direction(m, energy, tl.load(numbers_ptr + 7)), m)
        tl.store(values_ptr + volume + offsets, m, mask=mask)


@triton.jit
def _rest_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, partial_ptr, sums_ptr,
                 volume, AVERAGE: tl.constexpr, DIRECT: tl.constexpr, SECANT: tl.constexpr, MIN_STEPS: tl.constexpr,
                 MAX_RIDGE: tl.constexpr, ROUNDING: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                 EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Averages and direction of the coordinates that later stages turn."""
    matrix, matrix_ptr, numbers_ptr, values_ptr, _, _, offsets, mask, final = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, HEIGHT, WIDTH, EVEN
    )
    if tl.load(numbers_ptr + 5) == 0:
        return
    mask = mask & (final == 0)
    square_ptr = pointer(matrix_ptr + 1, tl.float32, EVEN)
    if AVERAGE:
        u = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        energy = _average(square_ptr, offsets, u * u, tl.load(numbers_ptr + 1), mask)
        if SECANT:
            w = tl.load(values_ptr + volume + volume + offsets, mask=mask, other=0.0)
            partial_ptr += tl.program_id(0).to(tl.int64) * 2
            _average_pairs(matrix_ptr, offsets, u, w, tl.load(numbers_ptr + 2), mask, partial_ptr, EVEN, True)
    else:
        energy = tl.load(square_ptr + offsets, mask=mask, other=0.0)
    if DIRECT:
        if SECANT:
            energy = _regressed(energy, matrix_ptr, sums_ptr + matrix * 2, offsets, mask, tl.load(numbers_ptr + 3),
                                tl.load(numbers_ptr + 12), MIN_STEPS, MAX_RIDGE, ROUNDING, EVEN)  # fmt: skip
        values_ptr += volume
        m = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        tl.store(values_ptr + offsets, _direction(m, energy, tl.load(numbers_ptr + 7)), mask=mask)


@triton.jit
def _sums_kernel(matrices_ptr, partial_ptr, sums_ptr, BLOCK: tl.constexpr):
    """Adds the sums of a matrix's programs."""
    matrix = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    disp_sq = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    partial_ptr += tl.load(matrices_ptr + matrix * _M + 10) * 2
    programs = tl.load(matrices_ptr + matrix * _M + 11).to(tl.int32)
    for start in range(0, programs, BLOCK):
        rows = start + lanes
        disp_sq += tl.load(partial_ptr + rows * 2, mask=rows < programs, other=0.0)
        cross += tl.load(partial_ptr + rows * 2 + 1, mask=rows < programs, other=0.0)
    tl.store(sums_ptr + matrix * 2, tl.sum(disp_sq, axis=0))
    tl.store(sums_ptr + matrix * 2 + 1, tl.sum(cross, axis=0))


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
def _back_kernel(addresses_ptr, matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr,
                 flags_ptr, sums_ptr, volume, SECANT: tl.constexpr, WRITE: tl.constexpr, STOCHASTIC: tl.constexpr,
                 PARAM: tl.constexpr, MIN_STEPS: tl.constexpr, MAX_RIDGE: tl.constexpr, ROUNDING: tl.constexpr,
                 HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    matrix, matrix_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, final = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, HEIGHT, WIDTH, EVEN
    )
    if tl.load(numbers_ptr + 5) == 0:
        return
    d = tl.load(values_ptr + volume + offsets, mask=mask, other=0.0)
    step = tl.load(numbers_ptr + 3)
    if SECANT:
        energy = tl.load(pointer(matrix_ptr + 1, tl.float32, EVEN) + offsets, mask=final, other=0.0)
        energy = _regressed(energy, matrix_ptr, sums_ptr + matrix * 2, offsets, final, step,
                            tl.load(numbers_ptr + 12), MIN_STEPS, MAX_RIDGE, ROUNDING, EVEN)  # fmt: skip
        d = tl.where(final, _direction(d, energy, tl.load(numbers_ptr + 7)), d)
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
        tl.store(param_ptr, _round(after, matrix_ptr, offsets, step, PARAM, STOCHASTIC), mask=mask)
    else:
        tl.store(values_ptr + offsets, change, mask=mask)


def forth_(operands: Operands, *, gate: int, step: bool, observe: bool) -> None:
    """Averages of gradients and parameters, and their changes rotated by the leaves.

    Equals ``butterfly_opt.step.take_step_`` up to ``to_rotated``, restricted to the leaves.

    Args:
        operands: of the step.
        gate: the column of ``numbers`` that is 0 for matrices to be left out.
        step: else no average changes, and of the values only the innovation is made.
        observe: take the partial second moments of the innovation.
    """
    with tiles.on_device(operands.values.device):
        _forth_kernel[(len(operands.tables.programs),)](
            operands.addresses, *_tables(operands), operands.values, operands.flags, operands.sums, *operands.partials,
            gate, operands.tables.volume, STEP=step, OBSERVE=observe, SECANT=operands.secant,
            DECAY=operands.decays, GRAD=_dtype(operands, "gradients"),
            PARAM=_dtype(operands, "parameters"), **_geometry(operands),
        )  # fmt: skip


def take_rest_(operands: Operands) -> Tensor:
    """Averages and directions of what later stages turned.

    Equals the averages of ``butterfly_opt.step.take_step_`` and its ``scale``.

    Returns:
        With secant the sums of B and |C| of each matrix, ``(matrices, 2)``, which ``back_`` needs.
    """
    tables, secant = operands.tables, operands.secant
    sums = operands.sums.new_empty(len(tables.matrices), 2) if secant else operands.sums
    has_rest = any(axis.stages[0].lead for part in tables.parts for axis in part.axes)
    passes = [(True, False), (False, True)] if secant else [(True, True)]
    with tiles.on_device(sums.device):
        for average, direct in passes:
            if secant and direct:
                _sums_kernel[(len(sums),)](tables.matrices, operands.sums, sums, BLOCK=1024)
            if has_rest:
                _rest_kernel[(len(operands.tables.programs),)](
                    *_tables(operands), operands.values, operands.sums, sums, tables.volume, AVERAGE=average,
                    DIRECT=direct, SECANT=operands.secant, **operands.regression, **_geometry(operands),
                )  # fmt: skip
    return sums


def back_(operands: Operands, sums: Tensor, *, stochastic: bool, write: bool) -> None:
    """The direction rotated back by the leaves, and written; equals the end of ``butterfly_opt.step.take_step_``.

    Args:
        operands: of the step.
        sums: of ``take_rest_``.
        stochastic: round bfloat16 parameters at random.
        write: change the parameters; else ``values[0]`` receives the change of usable tensors.
    """
    with tiles.on_device(operands.values.device):
        _back_kernel[(len(operands.tables.programs),)](
            operands.addresses, *_tables(operands), operands.values, operands.flags, sums, operands.tables.volume,
            WRITE=write, STOCHASTIC=stochastic, PARAM=_dtype(operands, "parameters"), SECANT=operands.secant,
            **operands.regression, **_geometry(operands),
        )  # fmt: skip


def _tables(operands: Operands) -> tuple[Tensor, ...]:
    tables = operands.tables
    return tables.matrices, tables.tiles, tables.programs, operands.numbers


def _dtype(operands: Operands, name: str) -> Any:
    dtype = operands.dtypes[name == "parameters"]
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {dtype}; use {_TORCH_STEP}")
    return DTYPES[dtype]


def _geometry(operands: Operands) -> dict[str, Any]:
    """Sides of a tile, and which are rotated; 16 elements a lane, at most 8 warps."""
    (height, width), rotated = (axis.width for axis in operands.tables.axes), operands.tables.rotated
    warps = 1 << max(0, min(3, (height * width // 512).bit_length() - 1))
    sides = {"HEIGHT": height, "WIDTH": width, "EVEN": operands.even, "num_warps": warps}
    return {**sides, "ROWS": 0 in rotated, "COLUMNS": 1 in rotated}

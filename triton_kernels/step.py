"""A step, level by level: rotations with the element-wise work inside.

Formulas, in the names of ``butterfly_opt.step``, for a tile of the rows and one of the columns:

    forth   of the leaves   y = g - gbar,  gbar <- gbar + a y;    secant: s = theta - thetabar,  thetabar += a s
                            u, m, w = y, gbar + a (1 - a) y, s;    flag = any(gbar = 0)
            every level     partial second moments u u^T and u^T u, of the rows and of the columns; of the leaves a
                            share at a time (``butterfly_opt.plan.SHARES``)
                            u, m, w <- B_r^T (u, m, w) B_c
            averages        A <- A + b (u^2 - A);        secant: B <- B + b' (w^2 - B),  C <- C + b' (u w - C)
            direction       d = m / (sqrt(V + signal m^2) + floor),   V = A or of ``butterfly_opt.diagonal.regress``
    back    every level     d <- B_r d B_c^T
            of the leaves   theta <- round(theta (1 - lr weight_decay) - lr d), but for entries with gbar = 0

A coordinate is *final* once no later level turns it; its averages and direction are taken there, the others' u, m and w
handed on. The sums of B and |C| give the means that the next step's regression takes. Moments that a refit of the same
step needs are taken in a pass of their own, which changes nothing else.

Layout. Of a list of matrices of any shapes, see ``tables``. Parameters and gradients lie where ``addresses`` says,
state where the table of matrices says, and what is handed on in scratch, where its matrix has it. Where no axis is
rotated, rows and columns are one row. ``numbers`` come from device memory, so a captured graph reads their newest
values. Where a tensor is not usable, its programs return at once. Sums have one order, without atomics.

Dtypes. Parameters and gradients float32, bfloat16 or float16, of one dtype each; state and arithmetic float32,
products as accurate (``tiles``). Parameters are rounded once, to nearest even or stochastically
(``butterfly_opt.rounding``).

Cost. Bytes a parameter, float32, in full width, for ``lead = block / 4``: 9/16 of all are final at the leaves, 5/16 at
the next level (``experiments.bench_kernels.step_bytes`` counts them from the plans):

                      innovation                              secant
    forth, leaves     g, gbar, gbar' 12; final A, A', d 12;   g, gbar, theta, thetabar, gbar', thetabar', u, w 32; final
                      others u, m 8                           A, B, C both ways, d 28; others m 4
    later levels      u, m 8; final A, A', d 12; others 8     u, w, m, u', w' 20; the same
    moments           halves, of a quarter of the leaves'     the same
                      tiles, written and read 5
    back, later       d, d' 8                                 the same
    back, leaves      d, theta, theta' 12                     the same
    together          56                                      96
"""

from typing import Any

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import MATRIX, NUMBERS, PERIOD, PROGRAM, Operands
from .tiles import _WIDE, block_matrix, coordinates, goes_on, halves, pointer, product, scaled

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What parameters and gradients may be."""

_TORCH_STEP = "butterfly_opt.step.take_step_"
_M = tl.constexpr(len(MATRIX))
_N = tl.constexpr(len(NUMBERS))
_P = tl.constexpr(len(PROGRAM))
_PERIOD = tl.constexpr(PERIOD)
# The bounds of ``butterfly_opt.diagonal.regress``, which kernels must not import.
_ROOT_TINY = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)
_LEAST_TAU2 = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.75)


@triton.jit
def _find_tile(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, LEAVES: tl.constexpr,
               HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """Matrix, rows of tables, scratch and tiles of a program; where its elements lie, which exist, which are final."""
    programs_ptr += tl.program_id(0) * _P
    matrix = tl.load(programs_ptr).to(tl.int64)
    matrices_ptr += matrix * _M
    # Of a list int64: a batch of matrices may have more than 2^31 elements.
    first = tl.load(matrices_ptr + 5)
    # Places within a matrix are int32: half the registers and the arithmetic (``tiles.MAX_NUMEL``).
    columns = tl.load(matrices_ptr + 6).to(tl.int32)
    if ALIGNED:
        first = tl.multiple_of(first, 4)
        columns = tl.multiple_of(columns, 4)
    row_ptr = tiles_ptr + tl.load(programs_ptr + 1) * _WIDE
    column_ptr = tiles_ptr + tl.load(programs_ptr + 2) * _WIDE
    # Accesses run along the columns: where rows begin does not matter.
    own_rows, in_rows = coordinates(row_ptr, HEIGHT, LEAVES, False)
    own_columns, in_columns = coordinates(column_ptr, WIDTH, LEAVES, ALIGNED)
    offsets = own_rows[:, None] * columns + own_columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    others = goes_on(row_ptr, HEIGHT, False, ALONE)[:, None] | goes_on(column_ptr, WIDTH, ALIGNED, ALONE)[None, :]
    numbers_ptr += matrix * _N
    values_ptr += first
    return programs_ptr, matrix, matrices_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, others


@triton.jit
def _factor(tile_ptr, WIDTH: tl.constexpr, TURNS: tl.constexpr, ALIGNED: tl.constexpr, ALONE: tl.constexpr):
    """The matrix of a tile, as halves."""
    high = 0.0
    low = 0.0
    if TURNS:
        high, low = halves(block_matrix(tile_ptr, WIDTH, ALIGNED, ALONE))
    return high, low


@triton.jit
def _turn(x, row, row_low, column, column_low, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr):
    """``B_r^T x B_c``, or ``B_r x B_c^T`` with ``BACK``; of ``scaled`` x."""
    # Rows first: a product's result is the left factor of the next without leaving the registers.
    if ROWS:
        high, low = halves(x)
        if not BACK:
            row = tl.trans(row)
            row_low = tl.trans(row_low)
        x = product(row, row_low, high, low)
    if COLUMNS:
        # Not scaled again: ``scaled`` leaves room for what an orthogonal matrix makes of a tile.
        high, low = halves(x)
        if BACK:
            column = tl.trans(column)
            column_low = tl.trans(column_low)
        x = product(high, low, column, column_low)
    return x


@triton.jit
def _store_moments(entry_ptr, clock, partial_ptr, left, left_low, right, right_low, unit, WIDTH: tl.constexpr):
    """The partial second moment of a rotated tile whose turn it is; of its symmetric entries the upper half."""
    if (tl.load(entry_ptr + 2) >> clock) & 1 != 0:
        slot = tl.load(entry_ptr).to(tl.int64)
        # By the unit twice: its square may underflow where the moment does not.
        moment = product(left, left_low, right, right_low) * unit * unit
        i = tl.arange(0, WIDTH)[:, None]
        j = tl.arange(0, WIDTH)[None, :]
        # Fours that reach into the upper half: accesses stay 16 bytes wide.
        tl.store(partial_ptr + slot * (WIDTH * WIDTH) + i * WIDTH + j, moment, mask=i // 4 <= j // 4)


@triton.jit
def _innovation(grad_ptr, param_ptr, numbers_ptr, mean, offsets, mask, DECAY: tl.constexpr):
    """``y`` of a tile."""
    grad = tl.load(numbers_ptr + 10) * tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if DECAY:
        grad += tl.load(numbers_ptr + 11) * tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return grad - mean


@triton.jit
def _average(entry_ptr, offsets, newest, weight, mask, ALIGNED: tl.constexpr):
    """``average <- average + weight (newest - average)``; returns it, 0 where the mask is."""
    average_ptr = pointer(entry_ptr, tl.float32, ALIGNED) + offsets
    average = tl.load(average_ptr, mask=mask, other=0.0)
    average += weight * (newest - average)
    tl.store(average_ptr, average, mask=mask)
    # Elsewhere it is ``weight newest``, which the sums of B and |C| must not count.
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
    # No ``tl.minimum``: a NaN has to stay one, as with torch's clamp.
    ridge = tl.where(ridge > MAX_RIDGE, MAX_RIDGE, ridge) + ROUNDING
    slope = (c + ridge * mean_slope) / (b + ridge)
    noise = _at_least(energy + slope * (slope * b - 2.0 * c), 0.0)
    return noise + slope * slope


@triton.jit
def _root(x):
    """The root by the fast instruction, which takes subnormal numbers for zero: those are scaled before."""
    is_small = x < 1e-30
    root = tl.sqrt(tl.where(is_small, x * 2.0**64, x))
    return tl.where(is_small, root * 2.0**-32, root)


@triton.jit
def _sum(x):
    """In float64: rounded to float32, the order of the additions, and so who added, does not show."""
    return tl.sum(tl.sum(x.to(tl.float64), axis=1), axis=0)


@triton.jit
def _energy(u, w, matrix_ptr, numbers_ptr, means_ptr, sums_ptr, offsets, mask, REGRESSION: tl.constexpr,
            ALIGNED: tl.constexpr):  # fmt: skip
    """``V`` of final coordinates, after their averages; the sums of B and |C| are written."""
    energy = _average(matrix_ptr + 1, offsets, u * u, tl.load(numbers_ptr + 1), mask, ALIGNED)
    if REGRESSION is not None:
        weight = tl.load(numbers_ptr + 2)
        disp_sq = _average(matrix_ptr + 3, offsets, w * w, weight, mask, ALIGNED)
        cross = _average(matrix_ptr + 4, offsets, u * w, weight, mask, ALIGNED)
        # A place of its own for each program: atomics would add in another order in every run.
        tl.store(sums_ptr, _sum(disp_sq))
        tl.store(sums_ptr + 1, _sum(tl.abs(cross)))
        energy = _regressed(energy, disp_sq, cross, means_ptr, tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 12),
                            REGRESSION)  # fmt: skip
    return energy


@triton.jit
def _forth_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, volume, addresses_ptr, flags_ptr,
                  means_ptr, sums_ptr, row_partial_ptr, column_partial_ptr, gate, LEAVES: tl.constexpr,
                  STEP: tl.constexpr, OBSERVE: tl.constexpr, DECAY: tl.constexpr, GRAD: tl.constexpr,
                  PARAM: tl.constexpr, REGRESSION: tl.constexpr, SIGNAL: tl.constexpr, HEIGHT: tl.constexpr,
                  WIDTH: tl.constexpr, ROW_ALIGNED: tl.constexpr, ALIGNED: tl.constexpr, ALONE: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    program_ptr, matrix, matrix_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, others = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, LEAVES, HEIGHT, WIDTH, ALIGNED, ALONE
    )
    # Asked of the device: a captured graph launches the same programs in every step.
    if tl.load(numbers_ptr + gate) == 0:
        return
    final = mask & (others == 0)
    others = mask & others
    ahead_ptr = values_ptr + volume
    disp_ptr = ahead_ptr + volume
    if LEAVES:
        param_ptr = pointer(addresses_ptr + matrix * 2 + 1, PARAM, ALIGNED)
        mean_ptr = pointer(matrix_ptr, tl.float32, ALIGNED)
        mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
        grad_ptr = pointer(addresses_ptr + matrix * 2, GRAD, ALIGNED)
        u = _innovation(grad_ptr, param_ptr, numbers_ptr, mean, offsets, mask, DECAY)
        if STEP:
            # What is turned later waits in scratch, which the cache has: registers are what programs lack.
            weight = tl.load(numbers_ptr)
            mean += weight * u
            tl.store(mean_ptr + offsets, mean, mask=mask)
            # Of which tiles the way back must read gbar; it has the same programs at the leaves.
            found = tl.max(tl.max(tl.where(mask & (mean == 0), 1, 0), axis=1), axis=0)
            tl.store(flags_ptr + tl.program_id(0), found)
            # After the update of gbar ``g - gbar`` is ``(1 - a) y``.
            tl.store(ahead_ptr + offsets, mean + weight * (1.0 - weight) * u, mask=mask)
            if REGRESSION is not None:
                param_avg_ptr = pointer(matrix_ptr + 2, tl.float32, ALIGNED)
                param_avg = tl.load(param_avg_ptr + offsets, mask=mask, other=0.0)
                s = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - param_avg
                tl.store(param_avg_ptr + offsets, param_avg + weight * s, mask=mask)
                tl.store(disp_ptr + offsets, s, mask=mask)
    else:
        u = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    row, row_low = _factor(row_ptr, HEIGHT, ROWS, ROW_ALIGNED, ALONE)
    column, column_low = _factor(column_ptr, WIDTH, COLUMNS, ALIGNED, ALONE)
    if ROWS or COLUMNS:
        u, unit = scaled(u)
        if OBSERVE:
            # Before the turn: second moments are those of what enters a level.
            high, low = halves(u)
            clock = tl.load(numbers_ptr + 13).to(tl.int32) % _PERIOD
            if ROWS:
                _store_moments(program_ptr + 4, clock, row_partial_ptr, high, low, tl.trans(high), tl.trans(low), unit,
                               HEIGHT)  # fmt: skip
            if COLUMNS:
                _store_moments(program_ptr + 5, clock, column_partial_ptr, tl.trans(high), tl.trans(low), high, low,
                               unit, WIDTH)  # fmt: skip
        u = _turn(u, row, row_low, column, column_low, ROWS, COLUMNS, False) * unit
    # With secant the final ones too: read again rather than kept over products, nothing spills.
    waits = others
    if STEP and (REGRESSION is not None):
        waits = mask
    # Of vectors nothing was turned: u and w are still in registers.
    if ROWS or COLUMNS:
        tl.store(values_ptr + offsets, u, mask=waits)
    if STEP:
        w = u
        if REGRESSION is not None:
            w = tl.load(disp_ptr + offsets, mask=mask, other=0.0)
            if ROWS or COLUMNS:
                w, unit = scaled(w)
                w = _turn(w, row, row_low, column, column_low, ROWS, COLUMNS, False) * unit
                tl.store(disp_ptr + offsets, w, mask=waits)
                # A product's entries lie over the lanes otherwise than a load's: written by all before any reads.
                tl.debug_barrier()
                u = tl.load(values_ptr + offsets, mask=mask, other=0.0)
                w = tl.load(disp_ptr + offsets, mask=mask, other=0.0)
        sums_ptr += tl.load(program_ptr + 3).to(tl.int64) * 2
        energy = _energy(u, w, matrix_ptr, numbers_ptr, means_ptr + matrix * 2, sums_ptr, offsets, final, REGRESSION,
                         ALIGNED)  # fmt: skip
        m = tl.load(ahead_ptr + offsets, mask=mask, other=0.0)
        if ROWS or COLUMNS:
            m, unit = scaled(m)
            m = _turn(m, row, row_low, column, column_low, ROWS, COLUMNS, False) * unit
        d = m / (_root(energy + SIGNAL * m * m) + tl.load(numbers_ptr + 7))
        tl.store(ahead_ptr + offsets, tl.where(final, d, m), mask=mask)


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
    # In the order of the programs, which is that of the tables and the same in every run.
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
        # Half a unit in the last place, a little less where the kept bits are even: ties go to even.
        above = 0x7FFF + ((bits >> 16) & 1)
        if STOCHASTIC:
            key = _mix(tl.load(matrix_ptr + 8).to(tl.uint32))
            # Counted over all matrices of a parameter, as torch does.
            place = (tl.load(matrix_ptr + 9) + offsets).to(tl.uint32)
            above = _mix(_mix(place ^ key) ^ (step.to(tl.int64).to(tl.uint32) * 0x9E3779B1)) & 0xFFFF
        rounded = ((bits + above) & 0xFFFF0000).to(tl.float32, bitcast=True)
        # A NaN may carry into the sign, and become a zero.
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x.to(DTYPE)


@triton.jit
def _back_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, volume, addresses_ptr, flags_ptr,
                 LEAVES: tl.constexpr, WRITE: tl.constexpr, STOCHASTIC: tl.constexpr, PARAM: tl.constexpr,
                 HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROW_ALIGNED: tl.constexpr, ALIGNED: tl.constexpr,
                 ALONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    _, matrix, matrix_ptr, numbers_ptr, values_ptr, row_ptr, column_ptr, offsets, mask, _ = _find_tile(
        matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, LEAVES, HEIGHT, WIDTH, ALIGNED, ALONE
    )
    if tl.load(numbers_ptr + 5) == 0:
        return
    d = tl.load(values_ptr + volume + offsets, mask=mask, other=0.0)
    if ROWS or COLUMNS:
        row, row_low = _factor(row_ptr, HEIGHT, ROWS, ROW_ALIGNED, ALONE)
        column, column_low = _factor(column_ptr, WIDTH, COLUMNS, ALIGNED, ALONE)
        d, unit = scaled(d)
        d = _turn(d, row, row_low, column, column_low, ROWS, COLUMNS, True) * unit
    if not LEAVES:
        tl.store(values_ptr + volume + offsets, d, mask=mask)
    else:
        change = -tl.load(numbers_ptr + 4) * d
        # gbar is read where the way forth met a zero: spread, since a mask is no single truth value.
        flagged = tl.zeros((HEIGHT, WIDTH), tl.int32) + tl.load(flags_ptr + tl.program_id(0)) != 0
        mean_ptr = pointer(matrix_ptr, tl.float32, ALIGNED)
        change = tl.where(tl.load(mean_ptr + offsets, mask=mask & flagged, other=1.0) == 0, 0.0, change)
        if WRITE:
            param_ptr = pointer(addresses_ptr + matrix * 2 + 1, PARAM, ALIGNED) + offsets
            after = tl.load(param_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(numbers_ptr + 6) + change
            step = tl.load(numbers_ptr + 3)
            tl.store(param_ptr, _round(after, matrix_ptr, offsets, step, PARAM, STOCHASTIC), mask=mask)
        else:
            tl.store(values_ptr + offsets, change, mask=mask)


MAX_REGISTERS = {"forth": 168, "back": 128}
"""Registers of a lane, so that three and four programs fit a multiprocessor: of GPT-2 on an H200 2.7 and 0.79 ms, as
many as the compiler likes take 3.0 and 0.89. Secant's way forth spills below 255: a quarter slower with 168."""


def forth_(operands: Operands, *, gate: int, step: bool, observe: bool) -> None:
    """Averages of gradients and parameters, and their changes rotated; averages and directions in the basis.

    Equals ``butterfly_opt.step.take_step_`` up to its direction; with secant also the means for the next step.

    Args:
        operands: of the step.
        gate: the column of ``numbers`` that is 0 for matrices to be left out.
        step: else no average changes, and of the values only the innovation is made.
        observe: take the partial second moments of the innovation, for ``refit.observe_``.
    """
    for level in range(len(operands.tables.levels)):
        _launch(
            _forth_kernel, operands, level, None if operands.regression else "forth", operands.addresses,
            operands.flags, operands.means, operands.sums, *(operands.partials[pool] for pool in operands.tables.pools),
            gate, STEP=step, OBSERVE=observe,
            DECAY=operands.decays, GRAD=_dtype(operands, "gradients"), PARAM=_dtype(operands, "parameters"),
            REGRESSION=operands.regression, SIGNAL=operands.signal,
        )  # fmt: skip
    # After all levels: they take the means of the step before.
    if step and operands.regression:
        _means_kernel[(len(operands.means),)](
            operands.tables.matrices, operands.numbers, operands.sums, operands.means, BLOCK=512
        )


def back_(operands: Operands, *, stochastic: bool, write: bool) -> None:
    """The direction rotated back, and written; equals the end of ``butterfly_opt.step.take_step_``.

    Args:
        operands: of the step.
        stochastic: round bfloat16 parameters at random.
        write: change the parameters; else ``values[0]`` receives the change of usable tensors.
    """
    for level in reversed(range(len(operands.tables.levels))):
        _launch(
            _back_kernel, operands, level, "back", operands.addresses, operands.flags, WRITE=write,
            STOCHASTIC=stochastic, PARAM=_dtype(operands, "parameters"),
        )  # fmt: skip


def _launch(
    kernel: Any, operands: Operands, level: int, limit: str | None, *own: Tensor | int, **constants: Any
) -> None:
    """A program for each tile of a level."""
    tables = operands.tables
    programs, (height, width), aligned = tables.levels[level].programs, (a.width for a in tables.axes), operands.aligned
    # Triton knows the option on NVIDIA's GPUs alone.
    if limit and torch.version.hip is None:
        constants["maxnreg"] = MAX_REGISTERS[limit]
    # ``parts[0]``: in ``alone`` and in the widths those of a list agree (``butterfly_opt.fused``).
    kernel[(len(programs),)](
        tables.matrices, tables.tiles, programs, operands.numbers, operands.values, tables.volume, *own,
        LEAVES=level == 0, HEIGHT=height, WIDTH=width, ROW_ALIGNED=aligned[0], ALIGNED=aligned[1],
        ALONE=tables.parts[0].alone, ROWS=0 in tables.rotated, COLUMNS=1 in tables.rotated,
        num_warps=1 << min(2, (height * width // 1024).bit_length()), **constants,
    )  # fmt: skip


def _dtype(operands: Operands, name: str) -> Any:
    dtype = operands.dtypes[name == "parameters"]
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {dtype}; use {_TORCH_STEP}")
    return DTYPES[dtype]

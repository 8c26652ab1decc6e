"""The element-wise work of a step, inside the passes over the leaves of both axes.

Formulas, in the names of ``butterfly_opt.step``, for a tile of a leaf of the rows and one of the columns:

    forth   y = g - gbar,  gbar <- gbar + a y;   secant: s = theta - thetabar,  thetabar <- thetabar + a s
            u, m, w = B_r^T (y, gbar + a (1 - a) y, s) B_c;    flag = any(gbar = 0)
    averages    A <- A + b (u^2 - A);                secant: B <- B + b' (w^2 - B),  C <- C + b' (u w - C)
    direction   d = m / (sqrt(V + m^2) + floor),   V = A, or that of ``butterfly_opt.diagonal.regress``
    back    theta <- round(theta (1 - lr weight_decay) - lr B_r d B_c^T), but for entries with gbar = 0

A coordinate is *final* once no later stage of either axis turns it. Averages and direction of final coordinates are
taken in the passes over the leaves; ``take_rest_`` does those of all others, between the later stages of the way
forth and those of the way back. ``secant`` needs sums of B and |C| over the tensor before any direction.

Layout. State is ``(count, rows, columns)``, contiguous; parameters and gradients lie where ``addresses`` says.
``values`` is ``(2, count, rows, columns)``: u and m, and with ``secant`` a third, w; d takes the place of m. Where no
axis is rotated, rows and columns are one row. ``numbers`` is float32 ``(count, 8)``, see ``NUMBERS``, ``constants``
float32 ``(3,)``, see ``CONSTANTS``: they come from device memory, so a captured graph reads their newest values. Where
a tensor is not usable, its programs return at once. Sums have one order, without atomics.

Dtypes. Parameters and gradients float32, bfloat16 or float16, of one dtype each; state and arithmetic float32.
Parameters are rounded once, to nearest even or stochastically (``butterfly_opt.rounding``).

Cost. Bytes a parameter, float32, in full width; final ones are 9/16 of all for ``lead = block / 4``
(``butterfly_opt.fused.step_bytes`` counts them from the plans):

                      innovation                              secant
    observe           g, gbar, y 12; y of both axes 20.7      the same
    forth             g, gbar, gbar' 12; final A, A', d 12;   g, gbar, theta, thetabar, gbar', thetabar' 24, m 4;
                      others u, m 8                           final A, B, C both ways 24; others u, w 8
    later stages      2 x 5.3                                 3 x 5.3
    take_rest_        others u, m, A, A', d 20                others u, w, A, B, C both ways 32; A, B, C, m, d 20
    later stages back 5.3                                     5.3
    back              d, theta, theta' 12                     theta, theta' 8; final A, B, C, m 16; others d 4
    together          93                                      142
"""

from typing import Any, NamedTuple

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import PRECISION, Tiles, block_matrix, coordinates, goes_on

NUMBERS = ("mean", "square", "pair", "step", "lr", "usable", "keep", "floor")
"""A row of ``numbers``: those of a stack, whether the gradient is usable, 1 - lr weight_decay, and ``step.floor``."""

CONSTANTS = ("l2", "newest")
"""L2 decay and ``1 - beta2``."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What parameters and gradients may be."""

_TORCH_STEP = "butterfly_opt.step.take_step_"
_N = tl.constexpr(len(NUMBERS))
_ROOT_TINY = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)
_LEAST_TAU2 = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.75)


class Geometry(NamedTuple):
    """Tensors of one shape and the leaves of their axes.

    Attributes:
        shape: ``(count, rows, columns)`` as the kernels see them.
        rows: leaves of the rows, or pieces of them.
        columns: the same of the columns.
        row_matrices: ``(count, numel)``, None if the rows are not rotated.
        column_matrices: the same of the columns.
    """

    shape: tuple[int, int, int]
    rows: Tiles
    columns: Tiles
    row_matrices: Tensor | None
    column_matrices: Tensor | None

    @property
    def programs(self) -> int:
        """Tiles of all tensors."""
        return self.shape[0] * len(self.rows) * len(self.columns)

    @property
    def has_rest(self) -> bool:
        """Whether a later stage turns anything."""
        return bool(self.rows.lead or self.columns.lead)

    def arguments(self) -> dict[str, Any]:
        """What every kernel of this file is told."""
        count, rows, columns = self.shape
        dummy = self.rows.table
        row_matrices, column_matrices = self.row_matrices, self.column_matrices
        return {
            "row_table_ptr": self.rows.table,
            "column_table_ptr": self.columns.table,
            "row_matrices_ptr": dummy if row_matrices is None else row_matrices,
            "column_matrices_ptr": dummy if column_matrices is None else column_matrices,
            "row_numel": 0 if row_matrices is None else row_matrices.shape[-1],
            "column_numel": 0 if column_matrices is None else column_matrices.shape[-1],
            "row_tiles": len(self.rows),
            "column_tiles": len(self.columns),
            "row_lead": self.rows.lead,
            "column_lead": self.columns.lead,
            "columns": columns,
            "size": rows * columns,
            "volume": count * rows * columns,
            "HEIGHT": self.rows.width,
            "WIDTH": self.columns.width,
            "EVEN": self.columns.even,
            "ROWS": row_matrices is not None,
            "COLUMNS": column_matrices is not None,
        }


@triton.jit
def _find_tile(row_table_ptr, column_table_ptr, row_tiles, column_tiles, columns, HEIGHT: tl.constexpr,
               WIDTH: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Tensor and tiles of this program, where its elements lie in the tensor, and which exist."""
    program = tl.program_id(0)
    tensor = (program // (row_tiles * column_tiles)).to(tl.int64)
    row_tile = program // column_tiles % row_tiles
    column_tile = program % column_tiles
    own_rows, in_rows = coordinates(row_table_ptr, row_tile, HEIGHT, False)
    own_columns, in_columns = coordinates(column_table_ptr, column_tile, WIDTH, EVEN)
    offsets = own_rows[:, None] * columns + own_columns[None, :]
    return tensor, row_tile, column_tile, offsets, in_rows[:, None] & in_columns[None, :]


@triton.jit
def _is_final(row_table_ptr, column_table_ptr, row_tile, column_tile, row_lead, column_lead, HEIGHT: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    in_row = goes_on(row_table_ptr, row_tile, row_lead, HEIGHT)
    in_column = goes_on(column_table_ptr, column_tile, column_lead, WIDTH)
    return (in_row[:, None] | in_column[None, :]) == 0


@triton.jit
def _turn(x, row_matrix, column_matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if ROWS:
        x = tl.dot(row_matrix, x, input_precision=PRECISION)
    if COLUMNS:
        x = tl.dot(x, column_matrix, input_precision=PRECISION)
    return x


@triton.jit
def _find_operand(addresses_ptr, tensor, OPERAND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tensor's gradient (0) or parameter (1)."""
    pointer = tl.load(addresses_ptr + tensor * 4 + OPERAND).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _innovation(addresses_ptr, constants_ptr, mean, tensor, offsets, mask, GRAD: tl.constexpr, PARAM: tl.constexpr,
                ALIGNED: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr):  # fmt: skip
    """``y`` of a tile."""
    grad_ptr = _find_operand(addresses_ptr, tensor, 0, GRAD, ALIGNED)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    if DECAY:
        param = tl.load(_find_operand(addresses_ptr, tensor, 1, PARAM, ALIGNED) + offsets, mask=mask, other=0.0)
        grad += tl.load(constants_ptr) * param.to(tl.float32)
    return grad - mean


@triton.jit
def _average(average_ptr, offsets, product, weight, mask):
    """``average <- average + weight (product - average)``; returns it, 0 where the mask is."""
    average = tl.load(average_ptr + offsets, mask=mask, other=0.0)
    average += weight * (product - average)
    tl.store(average_ptr + offsets, average, mask=mask)
    return tl.where(mask, average, 0.0)


@triton.jit
def _average_pairs(disp_sq_ptr, cross_ptr, offsets, u, w, weight, mask, partial_ptr, ADD: tl.constexpr):
    """B and C of a tile; their sums are written for the program, or added to those of its first launch."""
    disp_sq = tl.sum(tl.sum(_average(disp_sq_ptr, offsets, w * w, weight, mask), axis=1), axis=0)
    cross = tl.sum(tl.sum(tl.abs(_average(cross_ptr, offsets, u * w, weight, mask)), axis=1), axis=0)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2
    if ADD:
        disp_sq += tl.load(partial_ptr)
        cross += tl.load(partial_ptr + 1)
    tl.store(partial_ptr, disp_sq)
    tl.store(partial_ptr + 1, cross)


@triton.jit
def _at_least(x, bound):
    """``torch.clamp_min``: unlike ``tl.maximum`` it keeps NaN on every version of Triton."""
    return tl.where(x < bound, bound, x)


@triton.jit
def _regressed(energy, disp_sq_ptr, cross_ptr, sums_ptr, tensor, offsets, mask, size, step, newest,
               MIN_STEPS: tl.constexpr, MAX_RIDGE: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip
    """``V`` of ``diagonal.regress``, in its order."""
    tau2 = tl.load(sums_ptr + tensor * 2) / size
    moved = (tau2 > _LEAST_TAU2) & (step > MIN_STEPS)
    inverse = tl.where(moved, 1.0 / tl.sqrt_rn(tl.where(moved, tau2, 1.0)), 0.0)
    b = tl.load(disp_sq_ptr + offsets, mask=mask, other=0.0) * (inverse * inverse)
    c = tl.load(cross_ptr + offsets, mask=mask, other=0.0) * inverse
    mean_slope = tl.load(sums_ptr + tensor * 2 + 1) * inverse / size
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
def _innovation_kernel(addresses_ptr, numbers_ptr, constants_ptr, mean_ptr, out_ptr, size, blocks, GRAD: tl.constexpr,
                       PARAM: tl.constexpr, ALIGNED: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    tensor = (program // blocks).to(tl.int64)
    offsets = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    usable = tl.zeros((BLOCK,), tl.float32) + tl.load(numbers_ptr + tensor * _N + 5) != 0
    mean = tl.load(mean_ptr + tensor * size + offsets, mask=mask, other=0.0)
    y = _innovation(addresses_ptr, constants_ptr, mean, tensor, offsets, mask, GRAD, PARAM, ALIGNED, MAXIMIZE, DECAY)
    tl.store(out_ptr + tensor * size + offsets, tl.where(usable, y, 0.0), mask=mask)


@triton.jit
def _forth_kernel(addresses_ptr, numbers_ptr, constants_ptr, mean_ptr, square_ptr, param_avg_ptr, disp_sq_ptr,
                  cross_ptr, values_ptr, flags_ptr, partial_ptr, row_table_ptr, column_table_ptr, row_matrices_ptr,
                  column_matrices_ptr, row_numel, column_numel, row_tiles, column_tiles, row_lead, column_lead, columns,
                  size, volume, SECANT: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, GRAD: tl.constexpr,
                  PARAM: tl.constexpr, ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                  EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    tensor, row_tile, column_tile, offsets, mask = _find_tile(
        row_table_ptr, column_table_ptr, row_tiles, column_tiles, columns, HEIGHT, WIDTH, EVEN
    )
    numbers_ptr += tensor * _N
    if tl.load(numbers_ptr + 5) == 0:
        return
    own = tensor * size + offsets
    weight = tl.load(numbers_ptr)
    mean = tl.load(mean_ptr + own, mask=mask, other=0.0)
    y = _innovation(addresses_ptr, constants_ptr, mean, tensor, offsets, mask, GRAD, PARAM, ALIGNED, MAXIMIZE, DECAY)
    mean += weight * y
    tl.store(mean_ptr + own, mean, mask=mask)
    zeros = tl.max(tl.max(tl.where(mask & (mean == 0), 1, 0), axis=1), axis=0)
    tl.store(flags_ptr + tl.program_id(0), zeros)
    row_matrix = 0.0
    column_matrix = 0.0
    if ROWS:
        row_matrix = tl.trans(block_matrix(row_matrices_ptr + tensor * row_numel, row_table_ptr, row_tile, HEIGHT))
    if COLUMNS:
        column_matrix = block_matrix(column_matrices_ptr + tensor * column_numel, column_table_ptr, column_tile, WIDTH)
    final = _is_final(row_table_ptr, column_table_ptr, row_tile, column_tile, row_lead, column_lead, HEIGHT, WIDTH)
    final = final & mask
    others = (final == 0) & mask
    u = _turn(y, row_matrix, column_matrix, ROWS, COLUMNS)
    m = _turn(mean + weight * (1.0 - weight) * y, row_matrix, column_matrix, ROWS, COLUMNS)
    tl.store(values_ptr + own, u, mask=others)
    energy = _average(square_ptr, own, u * u, tl.load(numbers_ptr + 1), final)
    if SECANT:
        param = tl.load(_find_operand(addresses_ptr, tensor, 1, PARAM, ALIGNED) + offsets, mask=mask, other=0.0)
        param_avg = tl.load(param_avg_ptr + own, mask=mask, other=0.0)
        s = param.to(tl.float32) - param_avg
        tl.store(param_avg_ptr + own, param_avg + weight * s, mask=mask)
        w = _turn(s, row_matrix, column_matrix, ROWS, COLUMNS)
        tl.store(values_ptr + 2 * volume + own, w, mask=others)
        _average_pairs(disp_sq_ptr, cross_ptr, own, u, w, tl.load(numbers_ptr + 2), final, partial_ptr, False)
    else:
        m = tl.where(final, _direction(m, energy, tl.load(numbers_ptr + 7)), m)
    tl.store(values_ptr + volume + own, m, mask=mask)


@triton.jit
def _rest_kernel(numbers_ptr, constants_ptr, square_ptr, disp_sq_ptr, cross_ptr, values_ptr, partial_ptr, sums_ptr,
                 row_table_ptr, column_table_ptr, row_matrices_ptr, column_matrices_ptr, row_numel, column_numel,
                 row_tiles, column_tiles, row_lead, column_lead, columns, size, volume, AVERAGE: tl.constexpr,
                 DIRECT: tl.constexpr, SECANT: tl.constexpr, MIN_STEPS: tl.constexpr, MAX_RIDGE: tl.constexpr,
                 ROUNDING: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Averages and direction of the coordinates that later stages turn."""
    tensor, row_tile, column_tile, offsets, mask = _find_tile(
        row_table_ptr, column_table_ptr, row_tiles, column_tiles, columns, HEIGHT, WIDTH, EVEN
    )
    numbers_ptr += tensor * _N
    if tl.load(numbers_ptr + 5) == 0:
        return
    final = _is_final(row_table_ptr, column_table_ptr, row_tile, column_tile, row_lead, column_lead, HEIGHT, WIDTH)
    mask = mask & (final == 0)
    own = tensor * size + offsets
    if AVERAGE:
        u = tl.load(values_ptr + own, mask=mask, other=0.0)
        energy = _average(square_ptr, own, u * u, tl.load(numbers_ptr + 1), mask)
        if SECANT:
            w = tl.load(values_ptr + 2 * volume + own, mask=mask, other=0.0)
            _average_pairs(disp_sq_ptr, cross_ptr, own, u, w, tl.load(numbers_ptr + 2), mask, partial_ptr, True)
    else:
        energy = tl.load(square_ptr + own, mask=mask, other=0.0)
    if DIRECT:
        if SECANT:
            energy = _regressed(energy, disp_sq_ptr, cross_ptr, sums_ptr, tensor, own, mask, size * 1.0,
                                tl.load(numbers_ptr + 3), tl.load(constants_ptr + 1), MIN_STEPS, MAX_RIDGE,
                                ROUNDING)  # fmt: skip
        values_ptr += volume
        m = tl.load(values_ptr + own, mask=mask, other=0.0)
        tl.store(values_ptr + own, _direction(m, energy, tl.load(numbers_ptr + 7)), mask=mask)


@triton.jit
def _sums_kernel(partial_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """Adds the sums of a tensor's programs."""
    tensor = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    disp_sq = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        rows = start + lanes
        own_ptr = partial_ptr + (tensor * programs + rows) * 2
        disp_sq += tl.load(own_ptr, mask=rows < programs, other=0.0)
        cross += tl.load(own_ptr + 1, mask=rows < programs, other=0.0)
    tl.store(sums_ptr + tensor * 2, tl.sum(disp_sq, axis=0))
    tl.store(sums_ptr + tensor * 2 + 1, tl.sum(cross, axis=0))


@triton.jit
def _mix(bits):
    """``butterfly_opt.rounding._mix``, in uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _round(x, addresses_ptr, tensor, offsets, step, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``x`` in ``DTYPE``: to nearest, ties to even, or as ``butterfly_opt.rounding.round_stochastically``."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300 - a capital is no constant here
        # The interpreter's own cast to bfloat16 truncates, so both roundings are spelled out.
        bits = x.to(tl.uint32, bitcast=True)
        above = 0x7FFF + ((bits >> 16) & 1)
        if STOCHASTIC:
            key = _mix(tl.load(addresses_ptr + tensor * 4 + 2).to(tl.uint32))
            place = (tl.load(addresses_ptr + tensor * 4 + 3) + offsets).to(tl.uint32)
            above = _mix(_mix(place ^ key) ^ (step.to(tl.int64).to(tl.uint32) * 0x9E3779B1)) & 0xFFFF
        rounded = ((bits + above) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x.to(DTYPE)


@triton.jit
def _back_kernel(addresses_ptr, numbers_ptr, constants_ptr, mean_ptr, square_ptr, disp_sq_ptr, cross_ptr, values_ptr,
                 flags_ptr, sums_ptr, row_table_ptr, column_table_ptr, row_matrices_ptr, column_matrices_ptr, row_numel,
                 column_numel, row_tiles, column_tiles, row_lead, column_lead, columns, size, volume,
                 SECANT: tl.constexpr, WRITE: tl.constexpr, STOCHASTIC: tl.constexpr, PARAM: tl.constexpr,
                 ALIGNED: tl.constexpr, MIN_STEPS: tl.constexpr, MAX_RIDGE: tl.constexpr, ROUNDING: tl.constexpr,
                 HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    tensor, row_tile, column_tile, offsets, mask = _find_tile(
        row_table_ptr, column_table_ptr, row_tiles, column_tiles, columns, HEIGHT, WIDTH, EVEN
    )
    numbers_ptr += tensor * _N
    own = tensor * size + offsets
    if tl.load(numbers_ptr + 5) == 0:
        if not WRITE:
            tl.store(values_ptr + own, tl.zeros((HEIGHT, WIDTH), tl.float32), mask=mask)
        return
    d = tl.load(values_ptr + volume + own, mask=mask, other=0.0)
    step = tl.load(numbers_ptr + 3)
    if SECANT:
        final = _is_final(row_table_ptr, column_table_ptr, row_tile, column_tile, row_lead, column_lead, HEIGHT, WIDTH)
        final = final & mask
        energy = tl.load(square_ptr + own, mask=final, other=0.0)
        energy = _regressed(energy, disp_sq_ptr, cross_ptr, sums_ptr, tensor, own, final, size * 1.0, step,
                            tl.load(constants_ptr + 1), MIN_STEPS, MAX_RIDGE, ROUNDING)  # fmt: skip
        d = tl.where(final, _direction(d, energy, tl.load(numbers_ptr + 7)), d)
    row_matrix = 0.0
    column_matrix = 0.0
    if ROWS:
        row_matrix = block_matrix(row_matrices_ptr + tensor * row_numel, row_table_ptr, row_tile, HEIGHT)
    if COLUMNS:
        column_matrix = block_matrix(column_matrices_ptr + tensor * column_numel, column_table_ptr, column_tile, WIDTH)
        column_matrix = tl.trans(column_matrix)
    change = -tl.load(numbers_ptr + 4) * _turn(d, row_matrix, column_matrix, ROWS, COLUMNS)
    # gbar is read where the way forth met a zero: spread, since a mask is no single truth value.
    flagged = tl.zeros((HEIGHT, WIDTH), tl.int32) + tl.load(flags_ptr + tl.program_id(0)) != 0
    change = tl.where(tl.load(mean_ptr + own, mask=mask & flagged, other=1.0) == 0, 0.0, change)
    if WRITE:
        param_ptr = _find_operand(addresses_ptr, tensor, 1, PARAM, ALIGNED) + offsets
        after = tl.load(param_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(numbers_ptr + 6) + change
        tl.store(param_ptr, _round(after, addresses_ptr, tensor, offsets, step, PARAM, STOCHASTIC), mask=mask)
    else:
        tl.store(values_ptr + own, change, mask=mask)


class Operands(NamedTuple):
    """What one step of tensors of one shape reads and writes.

    Attributes:
        geometry: their shape and leaves.
        averages: state by name, ``exp_avg, exp_avg_sq`` and with secant ``param_avg, disp_sq, cross``.
        addresses: int64 ``(count, 4)``, of ``tiles.address_table``.
        numbers: ``(count, 8)``, see NUMBERS.
        constants: ``(3,)``, see CONSTANTS.
        values: ``(2 or 3, count, rows, columns)``, scratch.
        flags: int32, one a program, scratch.
        sums: ``(programs, 2)``, scratch.
        dtypes: of gradients and parameters.
        aligned: every address is a multiple of 16.
        maximize: gradients count with the opposite sign.
        decays: whether L2 decay is added to the gradient.
        regression: MIN_STEPS, MAX_RIDGE and ROUNDING of ``butterfly_opt.diagonal``.
    """

    geometry: Geometry
    averages: dict[str, Tensor]
    addresses: Tensor
    numbers: Tensor
    constants: Tensor
    values: Tensor
    flags: Tensor
    sums: Tensor
    dtypes: tuple[torch.dtype, torch.dtype]
    aligned: bool
    maximize: bool
    decays: bool
    regression: tuple[float, float, float]

    @property
    def secant(self) -> bool:
        """Whether pairs are averaged."""
        return "cross" in self.averages

    def check(self) -> None:
        """Checks what the kernels rely on.

        Raises:
            TypeError: if state is not float32, or parameters and gradients of a dtype that is not in DTYPES.
            ValueError: if a shape, a device or the contiguity is wrong, or no kernel can run there.
        """
        count, rows, columns = shape = self.geometry.shape
        for name, dtype in zip(("gradients", "parameters"), self.dtypes, strict=True):
            if dtype not in DTYPES:
                raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {dtype}; use {_TORCH_STEP}")
        named: dict[str, tuple[Tensor, tuple[int, ...]]] = {name: (x, shape) for name, x in self.averages.items()}
        named["numbers"] = (self.numbers, (count, len(NUMBERS)))
        named["constants"] = (self.constants, (len(CONSTANTS),))
        named["values"] = (self.values, (3 if self.secant else 2, count, rows, columns))
        named["sums"] = (self.sums, (self.geometry.programs, 2))
        tiles.check(_TORCH_STEP, self.values.device, **named)

    def of_gradients(self) -> dict[str, Any]:
        """How gradients are read."""
        grad, param = (DTYPES[dtype] for dtype in self.dtypes)
        flags = {"MAXIMIZE": self.maximize, "DECAY": self.decays, "ALIGNED": self.aligned}
        return {"GRAD": grad, "PARAM": param, **flags}

    def of_regression(self) -> dict[str, Any]:
        """The numbers of the regression."""
        names = ("MIN_STEPS", "MAX_RIDGE", "ROUNDING")
        return {"SECANT": self.secant, **dict(zip(names, self.regression, strict=True))}

    def of_pairs(self) -> tuple[Tensor, Tensor]:
        """B and C, or what stands in their place."""
        return self.averages.get("disp_sq", self.values), self.averages.get("cross", self.values)


def innovations(operands: Operands) -> Tensor:
    """``y = g - gbar``, 0 where a tensor is not usable, ``(count, rows, columns)``; nothing else changes.

    Equals the first lines of ``butterfly_opt.step.take_step_``; for steps that fit the basis. Raises as
    ``Operands.check``.
    """
    operands.check()
    mean = operands.averages["exp_avg"]
    out, size = torch.empty_like(mean), mean[0].numel()
    blocks = -(-size // tiles.VECTOR_WIDTH)
    with tiles.on_device(out.device):
        _innovation_kernel[(len(out) * blocks,)](
            operands.addresses, operands.numbers, operands.constants, mean, out, size, blocks,
            BLOCK=tiles.VECTOR_WIDTH, **operands.of_gradients(),
        )  # fmt: skip
    return out


def forth_(operands: Operands) -> None:
    """Averages of gradients and parameters, and their changes rotated by the leaves; raises as ``Operands.check``.

    Equals ``butterfly_opt.step.take_step_`` up to ``to_rotated``, restricted to the leaves.
    """
    operands.check()
    averages = operands.averages
    with tiles.on_device(operands.values.device):
        _forth_kernel[(operands.geometry.programs,)](
            operands.addresses, operands.numbers, operands.constants, averages["exp_avg"], averages["exp_avg_sq"],
            averages.get("param_avg", operands.values), *operands.of_pairs(), operands.values, operands.flags,
            operands.sums, SECANT=operands.secant, num_warps=_warps(operands.geometry), **operands.of_gradients(),
            **operands.geometry.arguments(),
        )  # fmt: skip


def take_rest_(operands: Operands) -> Tensor:
    """Averages and directions of what later stages turned; raises as ``Operands.check``.

    Equals the averages of ``butterfly_opt.step.take_step_`` and its ``scale``.

    Returns:
        With secant the sums of B and |C| of each tensor, ``(count, 2)``, which ``back_`` needs.
    """
    operands.check()
    count, secant = operands.geometry.shape[0], operands.secant
    sums = operands.sums.new_empty(count, 2) if secant else operands.sums
    passes = [(True, False), (False, True)] if secant else [(True, True)]
    with tiles.on_device(operands.values.device):
        for average, direct in passes:
            if secant and direct:
                _sums_kernel[(count,)](operands.sums, sums, operands.geometry.programs // count, BLOCK=1024)
            if operands.geometry.has_rest:
                _rest_kernel[(operands.geometry.programs,)](
                    operands.numbers, operands.constants, operands.averages["exp_avg_sq"], *operands.of_pairs(),
                    operands.values, operands.sums, sums, AVERAGE=average, DIRECT=direct,
                    num_warps=_warps(operands.geometry), **operands.of_regression(), **operands.geometry.arguments(),
                )  # fmt: skip
    return sums


def back_(operands: Operands, sums: Tensor, *, stochastic: bool, write: bool) -> None:
    """The direction rotated back by the leaves, and written; equals the end of ``butterfly_opt.step.take_step_``.

    Args:
        operands: of the step.
        sums: of ``take_rest_``.
        stochastic: round bfloat16 parameters at random.
        write: change the parameters; else ``values[0]`` receives the change, 0 for tensors that are not usable.

    Raises:
        TypeError: as ``Operands.check``.
        ValueError: as ``Operands.check``.
    """
    operands.check()
    param = DTYPES[operands.dtypes[1]]
    with tiles.on_device(operands.values.device):
        _back_kernel[(operands.geometry.programs,)](
            operands.addresses, operands.numbers, operands.constants, operands.averages["exp_avg"],
            operands.averages["exp_avg_sq"], *operands.of_pairs(), operands.values, operands.flags, sums, WRITE=write,
            STOCHASTIC=stochastic, PARAM=param, ALIGNED=operands.aligned, num_warps=_warps(operands.geometry),
            **operands.of_regression(), **operands.geometry.arguments(),
        )  # fmt: skip


def _warps(geometry: Geometry) -> int:
    """Warps a program: 16 elements a lane, at most 8 warps."""
    return 1 << max(0, min(3, (geometry.rows.width * geometry.columns.width // 512).bit_length() - 1))

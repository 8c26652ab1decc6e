"""A stage of the rotations of a list, and the second moments of what enters it.

Formula, with ``B`` the matrix of a group and ``v`` its values:

    v <- B^T v, or B v                            in place
    C <- (1 - weight) C + weight sum v v^T        v of the innovation, before it is turned

Layout. Values lie in the scratch of ``tables.Operands``; either axis is rotated where it lies, by strides. Several
values (innovation, average, displacement) share one read of the matrices. A program takes a tile of groups and some
chunks of the other axis. The leaves are turned and observed by ``step.forth_``.

Dtypes. float32; products in full float32. Results do not depend on the run: sums over chunks are written for each
program and added in one order, without atomics.

Cost. Reads and writes the coordinates of the stage, 8 bytes each; one matrix and one partial moment for each program.
Profitable at every size: one launch a stage, and one an axis for its moments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl

from . import tiles
from .tables import MATRIX, NUMBERS, Operands
from .tiles import _WIDE, PRECISION, block_matrix, block_offsets, coordinates, pointer, store_moment

_M = tl.constexpr(len(MATRIX))
_N = tl.constexpr(len(NUMBERS))


@triton.jit(do_not_specialize=["values"])
def _stage_kernel(matrices_ptr, tiles_ptr, programs_ptr, numbers_ptr, values_ptr, partial_ptr, gate, values, volume,
                  WIDTH: tl.constexpr, OTHER: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr,
                  BACK: tl.constexpr, OBSERVE: tl.constexpr):  # fmt: skip
    """One tile and some chunks; ``COLUMNS`` if the last axis is the rotated one."""
    programs_ptr += tl.program_id(0) * 4
    matrix = tl.load(programs_ptr).to(tl.int64)
    if tl.load(numbers_ptr + matrix * _N + gate) == 0:
        return
    tile_ptr = tiles_ptr + tl.load(programs_ptr + 1) * _WIDE
    matrix_ptr = matrices_ptr + matrix * _M
    start = tl.load(matrix_ptr + 5)
    columns = tl.load(matrix_ptr + 6)
    if EVEN:
        start = tl.multiple_of(start, 16)
        columns = tl.multiple_of(columns, 16)
    values_ptr += start
    others = columns
    if COLUMNS:
        others = tl.load(matrix_ptr + 7) // columns
    place, exists = coordinates(tile_ptr, WIDTH, False)
    own = tl.load(pointer(tile_ptr + 8, tl.int64, False) + place, mask=exists, other=0)
    turn = block_matrix(tile_ptr, WIDTH)
    # Rows are multiplied from the left, columns from the right.
    if COLUMNS == BACK:
        turn = tl.trans(turn)
    moment = tl.zeros((WIDTH, WIDTH), tl.float32)
    first = tl.load(programs_ptr + 2)
    for step in range(first * values, tl.load(programs_ptr + 3) * values):
        other = step // values * OTHER + tl.arange(0, OTHER)
        base_ptr = values_ptr + (step % values).to(tl.int64) * volume
        if COLUMNS:
            offsets = other[:, None].to(tl.int64) * columns + own[None, :]
            mask = (other < others)[:, None] & exists[None, :]
        else:
            offsets = own[:, None] * columns + other[None, :]
            mask = exists[:, None] & (other < others)[None, :]
        x = tl.load(base_ptr + offsets, mask=mask, other=0.0)
        if OBSERVE and step % values == 0:
            left, right = (tl.trans(x), x) if COLUMNS else (x, tl.trans(x))
            moment += tl.dot(left, right, input_precision=PRECISION)
        left, right = (x, turn) if COLUMNS else (turn, x)
        x = tl.dot(left, right, input_precision=PRECISION)
        tl.store(base_ptr + offsets, x, mask=mask)
    if OBSERVE:
        store_moment(partial_ptr, moment, WIDTH)


@triton.jit
def _average_kernel(tiles_ptr, groups_ptr, numbers_ptr, partial_ptr, gate, WIDTH: tl.constexpr, SLICE: tl.constexpr,
                    AHEAD: tl.constexpr):  # fmt: skip
    """Adds the partial moments of one tile and takes them into its ``C``: a slice of the entries."""
    groups_ptr += tl.program_id(0) * 5
    weight = tl.load(numbers_ptr + tl.load(groups_ptr).to(tl.int64) * _N + gate)
    if weight == 0:
        return
    entries = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    i = entries // WIDTH
    j = entries % WIDTH
    # Of a partial moment the upper half is written.
    partial_ptr += tl.where(i < j, entries, j * WIDTH + i)[None, :]
    first = tl.load(groups_ptr + 2)
    distance = tl.load(groups_ptr + 3)
    count = tl.load(groups_ptr + 4)
    moment = tl.zeros((SLICE,), tl.float32)
    for start in range(0, count, AHEAD):
        number = start + tl.arange(0, AHEAD)[:, None]
        place = (first + number * distance).to(tl.int64) * (WIDTH * WIDTH)
        moment += tl.sum(tl.load(partial_ptr + place, mask=number < count, other=0.0), axis=0)
    tile_ptr = tiles_ptr + tl.load(groups_ptr + 1) * _WIDE
    offsets, inside, _ = block_offsets(tile_ptr, i, j)
    target = pointer(tile_ptr + 3, tl.float32, False) + offsets
    before = tl.load(target, mask=inside, other=0.0)
    tl.store(target, before + weight * (moment - before), mask=inside)


def turn_(operands: Operands, *, axis: int, gate: int, back: bool = False, observed: int | None = None) -> None:
    """``v <- B^T v`` for every stage of an axis but the leaves, in place, or ``B v`` from the root down with ``back``.

    Equals steps of ``butterfly_opt.rotation.Rotation.to_rotated``, or ``from_rotated``; and ``observe_``, of the leaves
    too, whose partial moments ``step.forth_`` has taken.

    Args:
        operands: all its values are turned; with ``back`` the direction alone.
        axis: 0 for rows, 1 for columns.
        gate: the column of ``numbers`` that is 0 for matrices to be left out.
        back: apply the inverse.
        observed: the column that holds the weights of the innovation in the second moments; None for none.
    """
    tables, values = operands.tables, operands.values[1:2] if back else operands.values
    width, other, later = tables.axes[axis].width, tables.axes[1 - axis].width, tables.passes[axis][1:]
    partials, entries = operands.partials[axis], min(width**2, 1024)
    for stage in reversed(later) if back else later:
        _stage_kernel[(len(stage.programs),)](
            tables.matrices, tables.tiles, stage.programs, operands.numbers, values, partials[stage.first :], gate,
            len(values), tables.volume, WIDTH=width, OTHER=other, EVEN=operands.even, COLUMNS=axis == 1, BACK=back,
            OBSERVE=observed is not None, num_warps=8 if width == tiles.MAX_BLOCK else 4, num_stages=1,
        )  # fmt: skip
    if observed is not None:
        _average_kernel[(len(tables.groups[axis]), width**2 // entries)](
            tables.tiles, tables.groups[axis], operands.numbers, partials, observed, WIDTH=width, SLICE=entries,
            AHEAD=8,
        )  # fmt: skip

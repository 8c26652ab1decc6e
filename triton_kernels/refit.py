"""The second moments of groups, and one orthogonal iteration of every group on its own, one program a tile of groups.

Formula, the names of ``butterfly_opt.rotation``, ``T`` block-diagonal by the changes of the children:

    C <- (1 - weight) C + weight sum v v^T      the partial moments of ``step.forth_``
    C <- T C T^T,  B <- T B          transport, from the second stage of a leading plan on
    B' = the orthogonal factor of C B, R with a diagonal >= 0
    change = (B'^T B)[:lead, :lead]  for the stage above

The factor is made by Householder reflections, as LAPACK's: accurate whatever the condition.

Layout. Matrices and moments lie where the table of tiles says; changes are scratch, ``(lead, lead)`` a group. All
groups of a stage of a list are one launch; stages follow one another.

Dtypes. float32; products in full float32. Nothing is read on the host, and nothing depends on the run.

Cost. Some ``6 width^3`` operations a tile in ``width`` dependent steps, whatever the number of tiles; memory 16 bytes
an entry. Profitable always: ``torch.linalg.qr`` of a batch is a loop over launches on a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl

from .tables import GROUP, NUMBERS, Operands
from .tiles import _WIDE, block_offsets, halves, pointer, product, scaled

_N = tl.constexpr(len(NUMBERS))
_G = tl.constexpr(len(GROUP))


@triton.jit
def _observe_kernel(tiles_ptr, groups_ptr, numbers_ptr, partial_ptr, gate, WIDTH: tl.constexpr, SLICE: tl.constexpr,
                    AHEAD: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """Adds the partial moments of one tile and takes them into its ``C``: some rows of the upper half, and columns."""
    groups_ptr += tl.program_id(0) * _G
    numbers_ptr += tl.load(groups_ptr).to(tl.int64) * _N
    weight = tl.load(numbers_ptr + gate)
    if weight == 0:
        return
    entries = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    i = entries // WIDTH
    j = entries % WIDTH
    # Of a partial moment the upper half is written, in fours.
    upper = i // 4 <= j // 4
    # int64: the partial moments of a list may be more than 2^31 numbers.
    first = tl.load(groups_ptr + 2).to(tl.int64)
    programs = tl.load(groups_ptr + 3)
    shares = tl.load(groups_ptr + 4)
    share = tl.load(numbers_ptr + 13).to(tl.int32) % shares
    count = (share + 1) * programs // shares - share * programs // shares
    moment = tl.zeros((SLICE,), tl.float32)
    # In the order of the tables, without atomics: the same sum in every run.
    for start in range(0, count, AHEAD):
        number = start + tl.arange(0, AHEAD)[:, None]
        partial = (first + number) * (WIDTH * WIDTH) + entries[None, :]
        mask = (number < count) & upper[None, :]
        moment += tl.sum(tl.load(partial_ptr + partial, mask=mask, other=0.0), axis=0)
    tile_ptr = tiles_ptr + tl.load(groups_ptr + 1) * _WIDE
    offsets, inside = block_offsets(tile_ptr, i, j, False, ALONE)
    moments_ptr = pointer(tile_ptr + 3, tl.float32, False)
    inside = inside & (i <= j)
    before = tl.load(moments_ptr + offsets, mask=inside, other=0.0)
    after = before + weight * (moment - before)
    tl.store(moments_ptr + offsets, after, mask=inside)
    # Both halves get one value: C stays symmetric to the bit.
    mirrored, _ = block_offsets(tile_ptr, j, i, False, ALONE)
    tl.store(moments_ptr + mirrored, after, mask=inside & (i < j))


@triton.jit
def _orthogonal_factor(a, total, WIDTH: tl.constexpr):
    """``Q^T`` of ``A = Q R`` with the diagonal of ``R`` >= 0, by reflections ``H = I - tau v v^T``."""
    rows = tl.arange(0, WIDTH)
    i = rows[:, None]
    j = rows[None, :]
    # Over its largest entry, which changes R alone: no square over- or underflows.
    largest = tl.max(tl.abs(a), axis=0)
    a = a / tl.where(largest > 0, largest, 1.0)[None, :]
    # All reflections of A, which turn the identity into Q^T: both sums run down a column, which one lane holds.
    q = tl.where(i == j, 1.0, 0.0)
    # Of a block-diagonal matrix a reflection stays within its block, exactly: small groups share a tile.
    for k in range(total):
        # A gather: a masked sum would be a third sum over the whole tile.
        column = tl.sum(tl.gather(a, tl.zeros_like(i) + k, axis=1), axis=1)
        alpha = tl.sum(tl.where(rows == k, column, 0.0), axis=0)
        below = tl.where(rows > k, column, 0.0)
        rest = tl.sum(below * below, axis=0)
        norm = tl.sqrt_rn(alpha * alpha + rest)
        # Of the other sign than alpha: ``alpha - beta`` does not cancel.
        beta = tl.where(alpha < 0, norm, -norm)
        # A column that is finished already is left alone.
        moves = rest > 0
        tau = tl.where(moves, (beta - alpha) / tl.where(moves, beta, 1.0), 0.0)
        v = tl.where(rows == k, 1.0, below * (1.0 / tl.where(moves, alpha - beta, 1.0)))[:, None]
        a -= v * (tau * tl.sum(a * v, axis=0))[None, :]
        q -= v * (tau * tl.sum(q * v, axis=0))[None, :]
    diagonal = tl.sum(tl.where(i == j, a, 0.0), axis=1)
    return tl.where(diagonal[:, None] < 0, -q, q)


@triton.jit
def _multiply(a, b):
    """``A B`` in float32."""
    a, a_unit = scaled(a)
    b, b_unit = scaled(b)
    a_high, a_low = halves(a)
    b_high, b_low = halves(b)
    return product(a_high, a_low, b_high, b_low) * a_unit * b_unit


# Else compiled anew where ``lead`` is 1 or a multiple of 16, and by the alignment of the groups.
@triton.jit(do_not_specialize=["groups_ptr", "lead"])
def _refit_kernel(tiles_ptr, groups_ptr, numbers_ptr, changes_ptr, scratch_ptr, gate, lead, shift,
                  WIDTH: tl.constexpr, ALONE: tl.constexpr, TRANSPORT: tl.constexpr,
                  CHANGE: tl.constexpr):  # fmt: skip
    """One tile."""
    groups_ptr += tl.program_id(0) * _G
    if tl.load(numbers_ptr + tl.load(groups_ptr).to(tl.int64) * _N + gate) == 0:
        return
    tile_ptr = tiles_ptr + tl.load(groups_ptr + 1) * _WIDE
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    offsets, inside = block_offsets(tile_ptr, i, j, False, ALONE)
    total = tl.load(tile_ptr + 1).to(tl.int32)
    size = tl.load(tile_ptr + 4).to(tl.int32)
    matrices_ptr = pointer(tile_ptr + 2, tl.float32, False)
    moments_ptr = pointer(tile_ptr + 3, tl.float32, False) + offsets
    before = tl.load(matrices_ptr + offsets, mask=inside, other=0.0)
    moment = tl.load(moments_ptr, mask=inside, other=0.0)
    if TRANSPORT:
        own = (i // lead == j // lead) & (i < total) & (j < total)
        child = tl.load(tile_ptr + 7) + i // lead * lead * lead + i % lead * lead + j % lead
        turn = tl.load(changes_ptr + child, mask=own, other=0.0)
        before = _multiply(turn, before)
        moment = _multiply(_multiply(turn, moment), tl.trans(turn))
        tl.store(matrices_ptr + offsets, before, mask=inside)
        tl.store(moments_ptr, moment, mask=inside)
    diagonal = tl.sum(tl.where(i == j, moment, 0.0), axis=0)
    # A tile may hold several groups, each with its own trace.
    trace = tl.sum(tl.where(i // size == j // size, diagonal[None, :], 0.0), axis=1)
    turned = _multiply(moment, before) + shift * trace[:, None] * before
    # By way of memory, where the first partial moment was: a product leaves its entries so that no lane has a column.
    scratch_ptr += tl.load(groups_ptr + 2).to(tl.int64) * (WIDTH * WIDTH) + i * WIDTH + j
    tl.store(scratch_ptr, turned)
    tl.debug_barrier()
    after = _orthogonal_factor(tl.load(scratch_ptr), total, WIDTH)
    if CHANGE:
        # Read again: registers are needed for the reflections.
        change = _multiply(after, tl.load(matrices_ptr + offsets, mask=inside, other=0.0))
        # The root's outputs go nowhere: its lead is 0.
        goes_on = tl.load(tile_ptr + 5)
        leading = inside & (i % size < goes_on) & (j % size < goes_on)
        target = tl.load(tile_ptr + 6) + i // size * lead * lead + i % size * lead + j % size
        tl.store(changes_ptr + target, change, mask=leading)
        # All have read the old matrix before anybody overwrites it.
        tl.debug_barrier()
    # ``after`` is Q^T: memory takes Q.
    mirrored, _ = block_offsets(tile_ptr, j, i, False, ALONE)
    tl.store(matrices_ptr + mirrored, after, mask=inside)


def observe_(operands: Operands, *, gate: int) -> None:
    """Takes the partial moments of ``step.forth_`` into those of all groups.

    Equals ``butterfly_opt.rotation.Rotation.observe_``.

    Args:
        operands: of the step.
        gate: the column of ``numbers`` that holds the weights of the innovation in the second moments.
    """
    tables = operands.tables
    for pool, width in tables.widths.items():
        _observe_kernel[(len(tables.groups[pool]), -(-width * width // 256))](
            tables.tiles, tables.groups[pool], operands.numbers, operands.partials[pool], gate, WIDTH=width, SLICE=256,
            AHEAD=16, ALONE=tables.parts[0].alone,
        )  # fmt: skip


def refit_(operands: Operands, *, gate: int, shift: float) -> None:
    """One orthogonal iteration of every group, from the leaves to the roots, in place.

    Equals ``butterfly_opt.rotation.Rotation.refit_``.

    Args:
        operands: of the step.
        gate: the column of ``numbers`` that is 0 for matrices whose basis stays as it is.
        shift: added to the diagonal of a moment, over its trace.
    """
    tables = operands.tables
    # Plans of one stage have none: theirs are roots, whose outputs go nowhere.
    lead = max(axis.lead for axis in tables.axes)
    changes = operands.values.new_empty(max(1, tables.changes))
    for number, level in enumerate(tables.levels):
        for pool, width in tables.widths.items():
            if groups := len(level.groups[pool]):
                # Leaves have no children, and full plans (``lead`` 0) transport nothing.
                # For a width of 64, 2 and 8 warps take 1.5 and 1.7 times as long as 4 (experiments/NOTES.md).
                _refit_kernel[(groups,)](
                    tables.tiles, level.groups[pool], operands.numbers, changes, operands.partials[pool], gate,
                    max(lead, 1), shift, WIDTH=width, ALONE=tables.parts[0].alone, TRANSPORT=number > 0 and lead > 0,
                    CHANGE=lead > 0, num_warps=width // 16,
                )  # fmt: skip

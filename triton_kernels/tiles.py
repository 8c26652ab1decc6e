"""How an axis is cut into tiles, and what every launch needs: addresses, checks, the number of programs.

Layout. A *tile* of an axis is a set of at most ``width`` coordinates, whole groups of one size: one group, or as many
as fit. A kernel reads their matrices as one block-diagonal ``(width, width)`` matrix, so that groups of 2 and of 64 are
one product each. ``width`` is a power of two >= 16, as ``tl.dot`` needs it, the same for every stage of an axis; what
lies beyond a group is masked. What a stage does not turn is cut into *plain* tiles.

Products are as accurate as float32's, whatever torch's global setting says. A factor is the sum of two float16 numbers,
of 22 bits, after a power of two has brought a tile into their range; three products of theirs add up in float32. What
is lost is 2^-22 of an entry, or 2^-36 of the largest of the tile. Three products of TF32 take twice the time and the
shared memory (and AMD has none); ``ieee`` has no tensor cores.
"""

from collections.abc import Sequence
from typing import NamedTuple

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 64
"""The largest group: a 64 x 64 tile of three tensors and two matrices is what a multiprocessor holds."""

MAX_NUMEL = (1 << 31) - 1
"""Elements of the largest matrix: places within one are int32."""

MIN_WIDTH = 16
"""The least length of a side of ``tl.dot``."""

VECTOR_WIDTH = 1024
"""Elements a program where no axis is rotated."""

ALIGNMENT = 4
"""float32 numbers of the widest access, 16 bytes."""

ALL = 1 << 30
"""``lead`` of an axis whose outputs all go on."""

TILE = ("start", "total", "matrix", "moment", "size", "lead", "change", "below", "index")
"""An int64 row of the table of tiles: first coordinate (from the second stage on, its place in ``index``), coordinates,
addresses of the matrices and second moments of its first group (0: not rotated), size of a group, outputs of a group
that a later stage turns again, where the changes of its groups and of their children are (``refit``), address of the
coordinates of its stage."""

_WIDE = tl.constexpr(len(TILE))


class Stage(NamedTuple):
    """A stage of a rotation with the rest of its axis, or all of an axis that is not rotated.

    Attributes:
        tiles: int64 ``(tiles, 7)`` on the CPU, of which ``tables._tile_rows`` makes the columns of TILE: start, total,
            first number of the matrices (-1: plain), size of a group, number of the first group, outputs of a group
            that a later stage turns (0, a number, or ALL), and whether a launch for this stage has to visit it for its
            own sake.
        groups: their number.
        coordinates: int32 on the device, those of the tiles one after the other; None for ``0, 1, ...``.
        aligned: tiles, groups and runs of coordinates begin and end at multiples of ALIGNMENT.
        alone: no tile holds two groups.
    """

    tiles: Tensor
    groups: int
    coordinates: Tensor | None
    aligned: bool
    alone: bool


def make_stage(
    runs: Sequence[tuple[int, int]], coordinates: Tensor | None, length: int, offset: int, width: int, *, lead: int,
    plain_lead: int = 0, visited: bool = True, device: torch.device | None = None,
) -> Stage:  # fmt: skip
    """Cuts an axis.

    Args:
        runs: number and size of its groups.
        coordinates: of the groups, then of the rest, on the CPU; None for ``0, 1, ...``.
        length: of the axis.
        offset: first number of the stage's matrices in those of a rotation.
        width: coordinates a tile has room for.
        lead: outputs of a group that a later stage turns.
        plain_lead: the same of what is in no group: 0 or ALL.
        visited: whether what is in no group has to be visited.
        device: of the result's coordinates.

    Raises:
        ValueError: if a group is larger than MAX_BLOCK.
    """
    largest = max((size for _, size in runs), default=1)
    if largest > MAX_BLOCK:
        raise ValueError(f"the kernels take groups of at most {MAX_BLOCK}, got {largest}; use backend='torch'")
    start, first, parts = 0, 0, []
    for count, size in runs:
        groups = torch.arange(0, count, width // size)
        starts, left, offsets = start + groups * size, (count - groups) * size, offset + groups * size**2
        parts.append(_rows(starts, left.clamp_max(width // size * size), offsets, size, first + groups, lead, 1))
        start, first, offset = start + count * size, first + count, offset + count * size**2
    if start < length:
        rest = torch.arange(start, length, width)
        ends = (length - rest).clamp_max(width)
        # As one group of ``width``: kernels divide by the size.
        parts.append(_rows(rest, ends, -torch.ones_like(rest), width, 0 * rest, plain_lead, int(visited)))
    cut, aligned = torch.cat(parts), True
    if coordinates is not None:
        whole = len(coordinates) % ALIGNMENT == 0
        runs_of = coordinates.view(-1, ALIGNMENT) if whole else coordinates[:0].view(0, ALIGNMENT)
        aligned = whole and bool((runs_of - runs_of[:, :1] == torch.arange(ALIGNMENT)).all())
        aligned = aligned and bool((runs_of[:, 0] % ALIGNMENT == 0).all())
        coordinates = to_device(coordinates.int(), device or coordinates.device)
    aligned = aligned and bool((cut[:, [0, 1, 3, 5]] % ALIGNMENT == 0).all())
    alone = all(count == 1 or 2 * size > width for count, size in runs)
    return Stage(cut, sum(count for count, _ in runs), coordinates, aligned, alone)


def _rows(starts: Tensor, *columns: Tensor | int) -> Tensor:
    return torch.stack([starts, *(torch.as_tensor(x).expand_as(starts) for x in columns)], dim=1)


def width_of(length: int) -> int:
    """Coordinates a tile of an axis has room for: a power of two."""
    return max(MIN_WIDTH, 1 << (min(length, MAX_BLOCK) - 1).bit_length())


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of the host on a device, without waiting for it."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def address_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The rows on the device, without waiting for it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A captured copy would read the host's memory again at each replay: numbers of a launch stay what they are.
        numbers = [torch.full((), number, dtype=torch.int64, device=device) for row in rows for number in row]
        return torch.stack(numbers).view(len(rows), -1)
    return to_device(torch.tensor(rows), device)


def check(state: dict[str, Tensor]) -> None:
    """Checks what lies on the device.

    Raises:
        TypeError: if it is not float32.
        ValueError: if it is not contiguous.
    """
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be torch.float32, got {tensor.dtype}; use backend='torch'")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; use backend='torch'")


@triton.jit
def pointer(entry_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer whose address a table holds; ``ALIGNED``: a multiple of 16."""
    found = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def coordinates(tile_ptr, WIDTH: tl.constexpr, LEAVES: tl.constexpr, ALIGNED: tl.constexpr):
    """The coordinates of a tile, int32, and which of them exist."""
    lanes = tl.arange(0, WIDTH)
    start = tl.load(tile_ptr).to(tl.int32)
    total = tl.load(tile_ptr + 1).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 4)
        total = tl.multiple_of(total, 4)
    exists = lanes < total
    found = start + lanes
    if not LEAVES:
        index = tl.load(tile_ptr + 8)
        listed = exists & (tl.zeros_like(lanes) + index != 0)
        own = tl.load(index.to(tl.pointer_type(tl.int32)) + found, mask=listed, other=0)
        found = tl.where(listed, own, found)
        if ALIGNED:
            # Of numbers that are loaded the compiler cannot know it.
            found = tl.max_contiguous(tl.multiple_of(found, 4), 4)
    return found, exists


@triton.jit
def goes_on(tile_ptr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, ALONE: tl.constexpr):
    """Which outputs of a tile a later stage turns again."""
    lanes = tl.arange(0, WIDTH)
    # One group a tile saves the division, here and in ``block_offsets``.
    if not ALONE:
        lanes = lanes % tl.load(tile_ptr + 4).to(tl.int32)
    lead = tl.load(tile_ptr + 5).to(tl.int32)
    if ALIGNED:
        lead = tl.multiple_of(lead, 4)
    return lanes < lead


@triton.jit
def block_offsets(tile_ptr, i, j, ALIGNED: tl.constexpr, ALONE: tl.constexpr):
    """Where entries i, j of a tile's block-diagonal matrix lie, and which of them exist."""
    total = tl.load(tile_ptr + 1).to(tl.int32)
    size = tl.load(tile_ptr + 4).to(tl.int32)
    if ALIGNED:
        total = tl.multiple_of(total, 4)
        size = tl.multiple_of(size, 4)
    inside = (i < total) & (j < total) & (tl.zeros_like(i) + tl.load(tile_ptr + 2) != 0)
    if ALONE:
        return i * size + j, inside
    return i // size * size * size + i % size * size + j % size, inside & (i // size == j // size)


@triton.jit
def block_matrix(tile_ptr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, ALONE: tl.constexpr):
    """The block-diagonal matrix of a tile, ``(WIDTH, WIDTH)``; ones on the diagonal of a plain one."""
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    offsets, inside = block_offsets(tile_ptr, i, j, ALIGNED, ALONE)
    # The identity: a path of its own for levels that turn one axis was slower (experiments/NOTES.md).
    rests = (i == j) & (tl.zeros_like(i) + tl.load(tile_ptr + 2) == 0)
    # The address of a plain tile is 0: nothing is read there.
    return tl.where(rests, 1.0, tl.load(pointer(tile_ptr + 2, tl.float32, ALIGNED) + offsets, mask=inside, other=0.0))


@triton.jit
def halves(x):
    """Two float16 numbers whose sum is ``x`` but for 2^-23 of it, or 2^-25 if that is more; ``x`` below 2^15."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def scaled(x):
    """A tile times a power of two that makes its largest entry 2^11 to 2^12, and the inverse of that factor."""
    # By the bits of the exponent: a power of two rounds nothing.
    exponent = tl.max(tl.abs(x)).to(tl.int32, bitcast=True) >> 23
    # To 2^11: an orthogonal matrix of 64 makes at most 8 times as much, below the largest float16, 65504.
    # From 1 to 253 both the factor and its inverse are normal numbers.
    exponent = tl.minimum(tl.maximum(127 + 127 + 11 - exponent, 1), 253)
    return x * (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def product(a_high, a_low, b_high, b_low):
    """``(a_high + a_low) (b_high + b_low)`` in float32, the smallest terms first."""
    # ``a_low b_low``, at most 2^-22 of ``a b``, is left out.
    small = tl.dot(a_low, b_high, acc=tl.dot(a_high, b_low))
    return tl.dot(a_high, b_high, acc=small)

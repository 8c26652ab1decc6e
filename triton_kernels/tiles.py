"""How an axis is cut into tiles, and what every launch needs: addresses, checks, the number of programs.

Layout. A *tile* of an axis is a set of at most ``width`` coordinates, whole groups of one size: one group, or as many
as fit. A kernel reads their matrices as one block-diagonal ``(width, width)`` matrix, so that groups of 2 and of 64 are
one product each. ``width`` is a power of two >= 16, as ``tl.dot`` needs it, the same for every stage of an axis; what
lies beyond a group is masked.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 64
"""The largest group: a 64 x 64 tile of three tensors and two matrices is what a multiprocessor holds."""

MIN_WIDTH = 16
"""The least length of a side of ``tl.dot``."""

VECTOR_WIDTH = 1024
"""Elements a program where no axis is rotated."""

MANY_PROGRAMS = 528
"""Programs that fill a device: four for each of the 132 multiprocessors of an H100."""

MAX_CHUNKS = 8
"""Chunks a program takes where there are more than enough: it writes one partial moment for all of them."""

PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")
"""Products as accurate as float32, whatever torch's global setting says. Three TF32 products (relative error 1.7e-7 of
``B_r^T X B_c`` in emulation, float32 2.5e-7) need the registers of one tile; ``ieee`` unrolls 64 x 64 x 64
multiply-adds and spills up to 11 KiB a thread, as compiled for compute capability 9.0. AMD has ``ieee`` alone."""

ALL = 1 << 30
"""``lead`` of an axis whose outputs all go on."""

TILE = ("start", "total", "matrix", "moment", "size", "lead", "change", "below", "index")
"""An int64 row of the table of tiles: first coordinate (from the second stage on, its place in ``index``), coordinates,
addresses of the matrices and second moments of its first group (0: not rotated), size of a group, outputs of a group
that a later stage turns again, where the changes of its groups and of their children are (``refit``), address of the
coordinates of its stage."""

_WIDE = tl.constexpr(len(TILE))


class Stage(NamedTuple):
    """A stage of a rotation, or all of an axis that is not rotated.

    Attributes:
        tiles: int64 ``(tiles, 5)`` on the CPU: start, total, first number of the matrices (-1: not rotated), size of a
            group, number of the first group.
        groups: their number.
        lead: outputs of a group that a later stage turns again: 0, a number, or ALL.
        coordinates: int64 on the device, those of the groups one after the other; None for ``0, 1, ...``.
    """

    tiles: Tensor
    groups: int
    lead: int
    coordinates: Tensor | None


@functools.lru_cache(maxsize=4096)
def stage_tiles(runs: Sequence[tuple[int, int]], length: int, offset: int, width: int) -> Tensor:
    """The tiles of a stage, see ``Stage``.

    Args:
        runs: number and size of its groups.
        length: coordinates to cover; those that no group has are left as they are.
        offset: first number of the stage's matrices in those of a rotation.
        width: coordinates a tile has room for.

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
        parts.append(_rows(starts, left.clamp_max(width // size * size), offsets, size, first + groups))
        start, first, offset = start + count * size, first + count, offset + count * size**2
    if start < length:
        rest = torch.arange(start, length, width)
        parts.append(_rows(rest, (length - rest).clamp_max(width), torch.full_like(rest, -1), 1, 0 * rest))
    return torch.cat(parts)


def _rows(starts: Tensor, totals: Tensor, offsets: Tensor, size: int, firsts: Tensor) -> Tensor:
    return torch.stack([starts, totals, offsets, torch.full_like(starts, size), firsts], dim=1)


def width_of(length: int) -> int:
    """Coordinates a tile of an axis has room for: a power of two."""
    return max(MIN_WIDTH, 1 << (min(length, MAX_BLOCK) - 1).bit_length())


def share(work: int) -> int:
    """Of so many pieces of work, those that one program takes."""
    return max(1, min(MAX_CHUNKS, work // MANY_PROGRAMS))


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
def pointer(entry_ptr, DTYPE: tl.constexpr, EVEN: tl.constexpr):
    """The pointer whose address a table holds; ``EVEN``: a multiple of 16."""
    found = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    if EVEN:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def coordinates(tile_ptr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The coordinates of a tile, and which of them exist."""
    lanes = tl.arange(0, WIDTH)
    start = tl.load(tile_ptr)
    if EVEN:
        # A constant mask and a known alignment: accesses of 16 bytes.
        return tl.multiple_of(start, 16) + lanes, tl.full((WIDTH,), 1, tl.int32) != 0
    return start + lanes, lanes < tl.load(tile_ptr + 1)


@triton.jit
def goes_on(tile_ptr, WIDTH: tl.constexpr):
    """Which outputs of a tile a later stage turns again."""
    return tl.arange(0, WIDTH) % tl.load(tile_ptr + 4).to(tl.int32) < tl.load(tile_ptr + 5)


@triton.jit
def block_offsets(tile_ptr, i, j):
    """Where entries i, j of a tile's block-diagonal matrix lie, which of them exist, and the size of a block."""
    total = tl.load(tile_ptr + 1).to(tl.int32)
    size = tl.load(tile_ptr + 4).to(tl.int32)
    inside = (i // size == j // size) & (i < total) & (j < total) & (tl.zeros_like(i) + tl.load(tile_ptr + 2) != 0)
    return i // size * size * size + i % size * size + j % size, inside, size


@triton.jit
def block_matrix(tile_ptr, WIDTH: tl.constexpr):
    """The block-diagonal matrix of a tile, ``(WIDTH, WIDTH)``; ones on the diagonal where nothing is rotated."""
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    offsets, inside, _ = block_offsets(tile_ptr, i, j)
    rests = (i == j) & (tl.zeros_like(i) + tl.load(tile_ptr + 2) == 0)
    return tl.where(rests, 1.0, tl.load(pointer(tile_ptr + 2, tl.float32, False) + offsets, mask=inside, other=0.0))


@triton.jit
def store_moment(partial_ptr, moment, WIDTH: tl.constexpr):
    """The upper half of the partial second moment of this program; it is symmetric."""
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * (WIDTH * WIDTH) + i * WIDTH + j, moment, mask=i <= j)

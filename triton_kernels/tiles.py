"""How an axis is cut into tiles, and what every launch needs: pointer tables, checks, the number of programs.

Layout. A *tile* of an axis is a set of at most ``width`` coordinates, whole groups of one size: one group, or as many
as fit. A kernel reads their matrices as one block-diagonal ``(width, width)`` matrix, so that groups of 2 and of 64 are
one product each. ``width`` is a power of two >= 16, as ``tl.dot`` needs it; what lies beyond a group is masked.

Addresses. Parameters and gradients are separate tensors: a launch reads int64 ``(count, 4)`` rows of the addresses of
a tensor's gradient and parameter, its stream of random numbers, and the position of its first element in the parameter.
"""

import contextlib
import functools
import os
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

PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")
"""Products as accurate as float32, whatever torch's global setting says. Three TF32 products (relative error 1.7e-7 of
``B_r^T X B_c`` in emulation, float32 2.5e-7) need the registers of one tile; ``ieee`` unrolls 64 x 64 x 64
multiply-adds and spills up to 11 KiB a thread, as compiled for compute capability 9.0. AMD has ``ieee`` alone."""

ALL = 1 << 30
"""``lead`` of an axis whose outputs all go on."""

_COLUMNS = 5
_WIDE = tl.constexpr(_COLUMNS)


class Tiles(NamedTuple):
    """The tiles of a stage, or of an axis that is not rotated.

    Attributes:
        table: int64 ``(tiles, 5)``: first coordinate (or its place in the stage's index), coordinates, first number
            of the matrices (-1: not rotated), size of a group, number of the first group.
        width: coordinates a tile has room for.
        even: every tile is full and starts at a multiple of 16, so that accesses are 16 bytes wide.
        lead: outputs of a group that a later stage turns again.
    """

    table: Tensor
    width: int
    even: bool
    lead: int

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.table)


@functools.lru_cache(maxsize=4096)
def stage_tiles(runs: Sequence[tuple[int, int]], length: int, offset: int, lead: int, device: torch.device) -> Tiles:
    """The tiles of a stage.

    Args:
        runs: number and size of its groups.
        length: coordinates to cover; those that no group has are left as they are.
        offset: first number of the stage's matrices in those of a rotation.
        lead: outputs of a group that a later stage turns again: 0, a number, or ALL.
        device: of the table.

    Raises:
        ValueError: if a group is larger than MAX_BLOCK.
    """
    largest = max(size for _, size in runs)
    if largest > MAX_BLOCK:
        raise ValueError(f"the kernels take groups of at most {MAX_BLOCK}, got {largest}; use backend='torch'")
    width = _power_of_two(max(largest, min(length, MAX_BLOCK)))
    start, first, parts = 0, 0, []
    for count, size in runs:
        groups = torch.arange(0, count, width // size)
        starts, left, offsets = start + groups * size, (count - groups) * size, offset + groups * size**2
        parts.append(_rows(starts, left, offsets, size, first + groups, width))
        start, first, offset = start + count * size, first + count, offset + count * size**2
    if start < length:
        rest = torch.arange(start, length, width)
        parts.append(_rows(rest, length - rest, torch.full_like(rest, -1), 1, torch.zeros_like(rest), width))
    return _tiles(torch.cat(parts), width, lead, device)


@functools.lru_cache(maxsize=4096)
def plain_tiles(length: int, width: int, device: torch.device) -> Tiles:
    """The tiles of an axis that is not rotated, of at most ``width`` coordinates each."""
    starts = torch.arange(0, length, width)
    table = _rows(starts, length - starts, torch.full_like(starts, -1), 1, torch.zeros_like(starts), width)
    return _tiles(table, width, 0, device)


def _rows(starts: Tensor, left: Tensor, offsets: Tensor, size: int, firsts: Tensor, width: int) -> Tensor:
    total = left.clamp_max(width // size * size)
    return torch.stack([starts, total, offsets, torch.full_like(starts, size), firsts], dim=1)


def _tiles(table: Tensor, width: int, lead: int, device: torch.device) -> Tiles:
    even = bool(((table[:, 0] % 16 == 0) & (table[:, 1] == width)).all())
    return Tiles(table.to(device), width, even, lead)


def _power_of_two(value: int) -> int:
    """The smallest power of two >= ``value`` and MIN_WIDTH."""
    return max(MIN_WIDTH, 1 << (value - 1).bit_length())


def other_width(length: int) -> int:
    """Coordinates a program takes of the axis that it does not rotate."""
    return min(MAX_BLOCK, _power_of_two(length))


def address_table(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """The rows on the device, without waiting for it.

    Raises:
        ValueError: for a CUDA device under Triton's interpreter, which sees copies of the tensors.
    """
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(f"the kernels cannot run on {device} under TRITON_INTERPRET=1; unset it or use CPU tensors")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A captured copy would read the host's memory again at each replay: numbers of a launch stay what they are.
        numbers = [torch.full((), number, dtype=torch.int64, device=device) for row in rows for number in row]
        return torch.stack(numbers).view(len(rows), 4)
    host = torch.tensor(rows)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def can_launch_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of ``device``: CUDA, or the CPU under Triton's interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def check(function: str, device: torch.device, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Checks named float32 tensors against the shapes they need; ``function`` is the torch equivalent to name.

    Raises:
        TypeError: if one is not float32.
        ValueError: if a shape, a device or the contiguity is wrong, or kernels cannot run there.
    """
    if not can_launch_on(device):
        raise ValueError(f"the kernels need a CUDA device, got {device}; use {function}")
    for name, (tensor, shape) in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be torch.float32, got {tensor.dtype}; use {function}")
        if tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous of shape {shape} on {device}, got shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()} on {tensor.device}; use {function}"
            )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def coordinates(table_ptr, tile, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The coordinates of a tile, and which of them exist."""
    lanes = tl.arange(0, WIDTH)
    start = tl.load(table_ptr + tile * _WIDE)
    if EVEN:
        # A constant mask and a known alignment: accesses of 16 bytes.
        return tl.multiple_of(start, 16) + lanes, tl.full((WIDTH,), 1, tl.int32) != 0
    return start + lanes, lanes < tl.load(table_ptr + tile * _WIDE + 1)


@triton.jit
def goes_on(table_ptr, tile, lead, WIDTH: tl.constexpr):
    """Which outputs of a tile a later stage turns again."""
    size = tl.load(table_ptr + tile * _WIDE + 3).to(tl.int32)
    return tl.arange(0, WIDTH) % size < lead


@triton.jit
def block_offsets(table_ptr, tile, WIDTH: tl.constexpr):
    """Where the entries of a tile's block-diagonal matrix lie, which of them exist, and the size of a block."""
    row_ptr = table_ptr + tile * _WIDE
    total = tl.load(row_ptr + 1).to(tl.int32)
    offset = tl.load(row_ptr + 2)
    size = tl.load(row_ptr + 3).to(tl.int32)
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    inside = (i // size == j // size) & (i < total) & (j < total) & (tl.zeros_like(i) + offset >= 0)
    return offset + i // size * size * size + i % size * size + j % size, inside, size


@triton.jit
def block_matrix(matrices_ptr, table_ptr, tile, WIDTH: tl.constexpr):
    """The block-diagonal matrix of a tile, ``(WIDTH, WIDTH)``; ones on the diagonal where nothing is rotated."""
    offsets, inside, _ = block_offsets(table_ptr, tile, WIDTH)
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    rests = (i == j) & (tl.zeros_like(i) + tl.load(table_ptr + tile * _WIDE + 2) < 0)
    return tl.where(rests, 1.0, tl.load(matrices_ptr + offsets, mask=inside, other=0.0))

"""Launch parameters of the rotation kernels, computed from shapes by plain functions.

No autotuning: it needs a GPU to answer, runs in-place kernels several times, and makes two runs of
one program differ. The bounds below follow from registers (65,536 of 4 bytes a multiprocessor) and
from the 32-byte sectors in which memory is read.

Layout. A tensor is ``(batch, pre, n, post)``, contiguous, rotated along ``n``. A launch applies the
stages ``[first, first + k)`` and sees a coordinate as ``i = high * 2**(first + k) + mid * 2**first +
low``. Its tile is ``(group, middle, run)``: all ``middle = 2**k`` values of ``mid``, a ``run`` of
neighbouring elements (of ``post``, or of ``low`` and ``post`` together), and a ``group`` of such
slices (over ``pre``, or over ``high``).
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INPUT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What the kernels read; they compute and write float32."""

ANGLE_DTYPES = frozenset({torch.float32})
"""What cosines and sines come in."""

MAX_TILE = 16384
"""Elements of one tensor held by a program: 64 KiB, a quarter of a multiprocessor's registers."""

SECTOR = 8
"""float32 elements of a 32-byte memory sector: a shorter run wastes bandwidth."""

GOOD_RUN = 16
"""Run length worth having at any number of programs: 64 bytes, what DRAM delivers at once."""

LONG_RUN = 128
"""Run length beyond which coalescing gains nothing."""

GOOD_TILE = 8192
"""Elements up to which sharing the angles among more slices pays: two programs fit a multiprocessor."""

SMALL_TILE = 1024
"""Elements below which a tile is not kept small for the sake of more programs: 2 warps of 16 a lane."""

MIN_PROGRAMS = 264
"""Programs below which tiles are kept small: two for each of the 132 multiprocessors of an H200."""

MAX_TOGETHER = 3
"""Tensors one launch of ``rotate_columns`` turns with a single read of the angles."""


@functools.cache
def is_interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: ``TRITON_INTERPRET=1``, read once."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_launch_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of ``device``: CUDA, or the CPU under the interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and is_interpreting())


def check_tensors(tensors: Sequence[tuple[str, Tensor]], dtypes: frozenset[torch.dtype], function: str) -> None:
    """Checks dtype, device and contiguity of named tensors; ``function`` is the torch equivalent to name.

    Raises:
        TypeError: if a dtype is not among ``dtypes``.
        ValueError: if a tensor is not contiguous, not on the device of the first, or on a device where
            kernels cannot run.
    """
    allowed = ", ".join(sorted(str(dtype) for dtype in dtypes))
    device = tensors[0][1].device
    for name, tensor in tensors:
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be one of {allowed}, got {tensor.dtype}; use {function}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {tensors[0][0]}, got {tensor.device}")
        if not can_launch_on(tensor.device):
            raise ValueError(f"{name} must be on a CUDA device, got {tensor.device}; use {function}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
                f"call .contiguous() or use {function}"
            )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_rotation(
    named: Sequence[tuple[str, Tensor]], cos: Tensor, sin: Tensor, function: str
) -> tuple[int, int, int, int]:
    """Checks named tensors of one shape against their angles; returns ``(batch, pre, n, post)``.

    Raises:
        TypeError: if a dtype is not float32, bfloat16 or float16, or that of the angles not float32.
        ValueError: as ``check_tensors``, or if shapes do not belong together.
    """
    name, first = named[0]
    angles = [("cos", cos), ("sin", sin)]
    check_tensors([*named, *angles], INPUT_DTYPES | ANGLE_DTYPES, function)
    check_tensors(angles, ANGLE_DTYPES, function)
    for other_name, other in named[1:]:
        if other.shape != first.shape:
            raise ValueError(f"{other_name} must have shape {tuple(first.shape)} like {name}, got {tuple(other.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have shape {tuple(cos.shape)} like cos, got {tuple(sin.shape)}")
    if cos.dim() not in (3, 4):
        raise ValueError(f"cos must be (depth, stages, n // 2) or with a leading batch, got shape {tuple(cos.shape)}")
    if first.dim() not in (3, cos.dim()):
        raise ValueError(
            f"{name} must be (pre, n, post), or (batch, pre, n, post) where cos has a batch, got shape "
            f"{tuple(first.shape)} with cos of shape {tuple(cos.shape)}"
        )
    n, post = first.shape[-2:]
    batch = cos.shape[0] if cos.dim() == 4 else 1
    pre = 1 if first.dim() < cos.dim() else first.shape[-3]
    if cos.dim() == 4 and first.shape[0] != batch:
        raise ValueError(f"{name} of shape {tuple(first.shape)} must have the batch of cos, {batch}")
    stages = max(n - 1, 0).bit_length()
    if n < 1 or cos.shape[-1] != n // 2 or cos.shape[-2] > stages:
        raise ValueError(
            f"cos of shape {tuple(cos.shape)} does not fit {name} of shape {tuple(first.shape)}: an axis of length "
            f"{n} >= 1 needs (..., depth, <= {stages}, {n // 2})"
        )
    return batch, pre, n, post


def check_out(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Checks tensors that receive a result: float32, contiguous, where and shaped as the inputs.

    Raises:
        TypeError: if one is not float32.
        ValueError: if their number, a shape, a device or the contiguity is wrong.
    """
    if len(outputs) != len(inputs):
        raise ValueError(f"out must hold {len(inputs)} tensors like columns, got {len(outputs)}")
    for result, x in zip(outputs, inputs, strict=True):
        if result.dtype != torch.float32:
            raise TypeError(f"out must be torch.float32, got {result.dtype}")
        if result.shape != x.shape or result.device != x.device or not result.is_contiguous():
            raise ValueError(
                f"out must be contiguous, of shape {tuple(x.shape)}, on {x.device}, got shape {tuple(result.shape)} "
                f"with strides {result.stride()} on {result.device}"
            )


@dataclass(frozen=True)
class Tile:
    """What one program holds, ``(group, middle, run)`` elements, and how many programs there are.

    Attributes:
        group: slices, along ``pre`` if ``shared_high``, else along ``high``; a power of two.
        middle: ``2**k`` for k stages.
        run: neighbouring elements, along ``post`` if ``shared_low``, else along ``(low, post)``.
        shared_high: the slices of a group read the same angles.
        shared_low: the elements of a run read the same angles.
        high_blocks: programs along ``high``.
        low_blocks: programs along ``low``.
        run_blocks: programs along ``post``, 1 unless ``shared_low``.
        items: programs along ``pre`` and ``post`` together, which all read the same angles.
    """

    group: int
    middle: int
    run: int
    shared_high: bool
    shared_low: bool
    high_blocks: int
    low_blocks: int
    run_blocks: int
    items: int

    @property
    def elements(self) -> int:
        """Elements of one tensor in the tile."""
        return self.group * self.middle * self.run


def stage_passes(stages: int, *, post: int, max_tile: int = MAX_TILE) -> list[range]:
    """Splits ``stages`` into the fewest passes whose tiles fit, of nearly equal length.

    The first pass reads rows (``post = 1``, any number of stages up to half a tile) or slabs of
    columns; a later one reads slabs at least a sector wide, so it takes fewer stages.

    Args:
        stages: stages of one butterfly, >= 0.
        post: elements behind the rotated axis, >= 1.
        max_tile: elements a tile may hold, a power of two >= 16.

    Returns:
        The stages of each pass, in the order of ``Q^T``; empty for 0 stages.

    Raises:
        ValueError: if ``max_tile`` is not a power of two >= 16.
    """
    if max_tile < 2 * SECTOR or max_tile & (max_tile - 1):
        raise ValueError(f"max_tile must be a power of two >= {2 * SECTOR}, got {max_tile}")
    if stages == 0:
        return []
    later = _log2(max_tile // SECTOR)
    first = _log2(max_tile // max(2, min(SECTOR, next_power_of_two(post))))
    passes = 1 if stages <= first else 1 + -(-(stages - first) // later)
    # Even shares, but the first pass takes what the later ones cannot.
    cuts = [0, max(min(first, -(-stages // passes)), stages - (passes - 1) * later)]
    for left in range(passes - 1, 0, -1):
        cuts.append(cuts[-1] + -(-(stages - cuts[-1]) // left))
    return [range(start, end) for start, end in itertools.pairwise(cuts)]


def choose_tile(
    shape: tuple[int, int, int, int],
    stages: range,
    *,
    reduces: bool = False,
    max_tile: int = MAX_TILE,
) -> Tile:
    """Chooses the tile of a pass.

    Runs are first widened to ``GOOD_RUN``, then runs and groups grow while the tile stays within
    ``GOOD_TILE`` and enough programs remain to fill the device.

    Args:
        shape: ``(batch, pre, n, post)``, all >= 1.
        stages: consecutive stages as given by ``stage_passes``.
        reduces: the kernel sums what belongs to one angle, so a run must not mix several angles
            with several columns; two tensors are held, in tiles of half the size where that is possible.
        max_tile: elements of one tensor a tile may hold.
    """
    batch, pre, n, post = shape
    middle = 1 << len(stages)
    lows = 1 << stages.start
    highs = -(-n // (middle * lows))
    shared_low = stages.start == 0 or post >= (2 if reduces else SECTOR)
    shared_high = pre >= highs
    run_length = post if shared_low else lows * post
    groups = pre if shared_high else highs
    # Programs that neither a wider run nor a larger group reduces.
    programs = batch * (highs if shared_high else pre) * (lows if shared_low else 1)

    def grow(size: int, length: int, limit: int, others: int, slices: int) -> int:
        """Doubles ``size`` up to ``limit``; ``others`` elements of the tile and ``slices`` programs are fixed."""
        while size < min(limit, next_power_of_two(length)):
            if 2 * size * others > SMALL_TILE and programs * slices * -(-length // (2 * size)) < MIN_PROGRAMS:
                break
            size *= 2
        return size

    held = max_tile // 2 if reduces else max_tile
    bound = min(GOOD_TILE, held)
    run = min(next_power_of_two(run_length), SECTOR if reduces else GOOD_RUN, max(1, held // middle))
    run = grow(run, run_length, min(LONG_RUN, bound // middle), middle, groups)
    group = grow(1, groups, bound // (middle * run), middle * run, -(-run_length // run))
    run_blocks = -(-post // run) if shared_low else 1
    return Tile(
        group=group,
        middle=middle,
        run=run,
        shared_high=shared_high,
        shared_low=shared_low,
        high_blocks=highs if shared_high else -(-highs // group),
        low_blocks=lows if shared_low else -(-run_length // run),
        run_blocks=run_blocks,
        items=(-(-pre // group) if shared_high else pre) * run_blocks,
    )


def choose_num_warps(elements: int, tensors: int) -> int:
    """Warps a program for ``tensors`` tiles of ``elements`` each: 16 elements a lane, at most 16 warps.

    Never more lanes than elements of a tile: a lane without an element of its own reads its
    neighbour's, which an in-place kernel may already have overwritten.
    """
    warps = min(tensors * elements // 512, elements // 32, 16)
    return 1 << max(warps, 1).bit_length() - 1


def tensors_per_launch(elements: int, *, max_tile: int = MAX_TILE) -> int:
    """Tensors one launch holds at once: up to ``MAX_TOGETHER`` while they fit in twice ``max_tile``."""
    return max(1, min(MAX_TOGETHER, 2 * max_tile // elements))


def choose_workers(tile: Tile, batch: int) -> int:
    """Programs that share the ``items`` of an angle among themselves, each with a partial sum of its own.

    Enough to fill the device, no more: the workspace is this number of copies of the angles.
    """
    others = batch * tile.high_blocks * tile.low_blocks
    return max(1, min(tile.items, -(-2 * MIN_PROGRAMS // others)))


def next_power_of_two(value: int) -> int:
    """The smallest power of two >= ``value``, for ``value >= 1``."""
    return 1 << (value - 1).bit_length()


def _log2(power: int) -> int:
    return power.bit_length() - 1

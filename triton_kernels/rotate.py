"""One stage of a rotation, and the second moments of what enters it.

Formula, with ``B`` the matrix of a group and ``v`` its values:

    rotate_stage_    v <- B^T v, or B v                     in place
    observe_stage_   C <- (1 - weight) C + weight v v^T     summed over the other axis; then v <- B^T v if wanted

Layout. ``x`` is ``(values, count, rows, columns)``, contiguous; either axis is rotated where it lies, by strides.
Several values (innovation, average, displacement) share one read of the matrices, ``(count, numel)`` as in
``butterfly_opt.plan.Plan.views``. A program takes a tile of groups and some chunks of the other axis.

Dtypes. float32; products in full float32. Results do not depend on the run: sums over chunks are
written for each program and added in one order, without atomics.

Cost. Rotating reads and writes the coordinates of the stage, 8 bytes each; observing reads and writes them (the last
stage only reads), and one matrix for each program. Profitable at every size: one launch (two to observe) a stage.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import PRECISION, Tiles, block_matrix, block_offsets, coordinates

_TORCH_ROTATE = "butterfly_opt.rotation.Rotation.to_rotated"
_TORCH_OBSERVE = "butterfly_opt.rotation.Rotation.observe_"


@triton.jit
def _stage_kernel(x_ptr, matrices_ptr, table_ptr, index_ptr, partial_ptr, numel, count, values, others, columns, volume,
                  tiles_count, splits, chunks_each, WIDTH: tl.constexpr, OTHER: tl.constexpr, COLUMNS: tl.constexpr,
                  INDEXED: tl.constexpr, TURN: tl.constexpr, BACK: tl.constexpr, OBSERVE: tl.constexpr):  # fmt: skip
    """Chunks ``[split chunks_each, ...)`` of one tile; ``COLUMNS`` if the last axis is the rotated one."""
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles_count
    tensor = (program // splits // tiles_count).to(tl.int64)
    own, exists = coordinates(table_ptr, tile, WIDTH, False)
    if INDEXED:
        own = tl.load(index_ptr + own, mask=exists, other=0)
    if TURN:
        matrix = block_matrix(matrices_ptr + tensor * numel, table_ptr, tile, WIDTH)
        # Rows are multiplied from the left, columns from the right.
        if COLUMNS == BACK:
            matrix = tl.trans(matrix)
    if OBSERVE:
        moment = tl.zeros((WIDTH, WIDTH), tl.float32)
    first = split * chunks_each
    for step in range(first * values, tl.minimum(first + chunks_each, tl.cdiv(others, OTHER)) * values):
        other = step // values * OTHER + tl.arange(0, OTHER)
        base_ptr = x_ptr + (step % values).to(tl.int64) * volume + tensor * (volume // count)
        if COLUMNS:
            offsets = other[:, None].to(tl.int64) * columns + own[None, :]
            mask = (other < others)[:, None] & exists[None, :]
        else:
            offsets = own[:, None] * columns + other[None, :]
            mask = exists[:, None] & (other < others)[None, :]
        x = tl.load(base_ptr + offsets, mask=mask, other=0.0)
        if OBSERVE:
            if COLUMNS:
                moment += tl.dot(tl.trans(x), x, input_precision=PRECISION)
            else:
                moment += tl.dot(x, tl.trans(x), input_precision=PRECISION)
        if TURN:
            if COLUMNS:
                x = tl.dot(x, matrix, input_precision=PRECISION)
            else:
                x = tl.dot(matrix, x, input_precision=PRECISION)
            tl.store(base_ptr + offsets, x, mask=mask)
    if OBSERVE:
        lanes = tl.arange(0, WIDTH)
        partial_ptr += program.to(tl.int64) * (WIDTH * WIDTH)
        tl.store(partial_ptr + lanes[:, None] * WIDTH + lanes[None, :], moment)


@triton.jit
def _average_kernel(moments_ptr, partial_ptr, weights_ptr, table_ptr, numel, tiles_count, splits,
                    WIDTH: tl.constexpr):  # fmt: skip
    """Adds the partial moments of one tile and takes them into its ``C``."""
    program = tl.program_id(0)
    tile = program % tiles_count
    tensor = (program // tiles_count).to(tl.int64)
    weight = tl.load(weights_ptr + tensor)
    if weight == 0:
        return
    lanes = tl.arange(0, WIDTH)
    partial_ptr += program.to(tl.int64) * splits * (WIDTH * WIDTH)
    entries = lanes[:, None] * WIDTH + lanes[None, :]
    moment = tl.zeros((WIDTH, WIDTH), tl.float32)
    for split in range(splits):
        moment += tl.load(partial_ptr + split * (WIDTH * WIDTH) + entries)
    offsets, inside, _ = block_offsets(table_ptr, tile, WIDTH)
    target = moments_ptr + tensor * numel + offsets
    before = tl.load(target, mask=inside, other=0.0)
    tl.store(target, before + weight * (moment - before), mask=inside)


def rotate_stage_(
    x: Tensor, matrices: Tensor, stage: Tiles, index: Tensor | None, *, dim: int, transpose: bool
) -> None:
    """``v <- B v`` for every group of a stage, or ``B^T v`` with ``transpose``, in place.

    Equals one step of ``butterfly_opt.rotation.Rotation.from_rotated``, or ``to_rotated``.

    Args:
        x: float32 ``(values, count, rows, columns)``, contiguous.
        matrices: float32 ``(count, numel)`` of all stages.
        stage: its tiles.
        index: int64, the coordinates of the groups one after the other; None for ``0, 1, ...``.
        dim: the rotated axis, -2 or -1.
        transpose: apply the inverse.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if shapes or devices do not fit, a tensor is not contiguous, or no kernel can run there.
    """
    tiles.check(_TORCH_ROTATE, x.device, x=(x, tuple(x.shape)), matrices=(matrices, (x.shape[1], matrices.shape[-1])))
    _run(x, matrices, None, stage, index, dim=dim, turn=True, back=not transpose)


def observe_stage_(
    x: Tensor,
    matrices: Tensor,
    moments: Tensor,
    weights: Tensor,
    stage: Tiles,
    index: Tensor | None,
    *,
    dim: int,
    turn: bool,
) -> None:
    """``C <- (1 - weight) C + weight v v^T`` for every group of a stage; equals that of ``Rotation.observe_``.

    Args:
        x: float32 ``(count, rows, columns)``, contiguous, rotated by the stages before.
        matrices: float32 ``(count, numel)``.
        moments: float32, of the same shape, updated.
        weights: float32 ``(count,)``; where it is 0, nothing is written, whatever ``x`` holds.
        stage: its tiles.
        index: int64, the coordinates of the groups; None for ``0, 1, ...``.
        dim: the rotated axis, -2 or -1.
        turn: then ``v <- B^T v`` in ``x``, for the next stage.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if shapes or devices do not fit, a tensor is not contiguous, or no kernel can run there.
    """
    like = (x.shape[0], matrices.shape[-1])
    named = {"matrices": (matrices, like), "moments": (moments, like), "weights": (weights, (x.shape[0],))}
    tiles.check(_TORCH_OBSERVE, x.device, x=(x, tuple(x.shape)), **named)
    partial, splits = _run(x[None], matrices, moments, stage, index, dim=dim, turn=turn, back=False)
    with tiles.on_device(x.device):
        _average_kernel[(x.shape[0] * len(stage),)](
            moments, partial, weights, stage.table, matrices.shape[-1], len(stage), splits, WIDTH=stage.width
        )


def _run(
    x: Tensor,
    matrices: Tensor,
    moments: Tensor | None,
    stage: Tiles,
    index: Tensor | None,
    *,
    dim: int,
    turn: bool,
    back: bool,
) -> tuple[Tensor, int]:
    """Launches a stage; returns the partial moments and their number a tile."""
    values, count, rows, columns = x.shape
    others = columns if dim == -2 else rows
    width = tiles.other_width(others)
    chunks = -(-others // width)
    splits = min(chunks, -(-tiles.MANY_PROGRAMS // (count * len(stage))))
    chunks_each = -(-chunks // splits)
    splits = -(-chunks // chunks_each)
    programs = count * len(stage) * splits
    partial = matrices if moments is None else torch.empty(programs, stage.width, stage.width, device=x.device)
    with tiles.on_device(x.device):
        _stage_kernel[(programs,)](
            x, matrices, stage.table, stage.table if index is None else index, partial, matrices.shape[-1], count,
            values, others, columns, count * rows * columns, len(stage), splits, chunks_each, WIDTH=stage.width,
            OTHER=width,
            COLUMNS=dim == -1, INDEXED=index is not None, TURN=turn, BACK=back, OBSERVE=moments is not None,
            num_warps=8 if stage.width == tiles.MAX_BLOCK else 4, num_stages=1,
        )  # fmt: skip
    return partial, splits

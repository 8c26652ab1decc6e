"""Angle steps on a sketch in one launch: for each window of rows, all of them without leaving the chip.

Formula. ``butterfly_opt.refit.refit_sketch_``, for a sketch ``Z`` of k columns, ``steps`` times:

    u = Q^T Z;  dL/du = u / sqrt(mean u^2) / k;  dL/dangles by rotating back;  Adam on the angles,
    angles -= rate / (1 - beta1^t) mean / (sqrt(square / (1 - beta2^t)) + eps),  rate = refit_lr / (1 + (t - 1) / 800)

with t the angle steps including this one, and then ``Q^T Z`` in the new basis. ``Butterfly`` launches it once for
each angle step, since the next one sees other columns.

Layout. ``Z`` is ``(n, k)``, the angles ``(depth, stages, n // 2)``. Stages never cross an aligned window of
``W = 2**stages`` rows, so a window is a problem of its own: one program holds its tile ``(1, W, k)`` and
updates its slots of the angles in place. In a pack of axes (``butterfly_opt.refit.pack_axes``) a window is
one long axis or several short ones. No atomics; a sum has one order: results do not depend on the run.

Size. A tile of ``W k <= 8192`` floats: ``u`` and its gradient take 64 KiB of a multiprocessor's 256 KiB of
registers, the parts of the stage at work as much again, which is 64 registers a lane for 16 warps, and moves
between lanes 32 KiB of shared memory. With k = 8 that is n <= 1024; twice as much would leave no registers
for anything else. Longer axes take ``rotate_columns`` and ``residual_gradient``, several passes a step,
and one kernel for the angles.

Dtypes. float32.

Cost. On chip: ``Z`` read ``steps + 1`` times (from the cache, after the first) and written once, 16 bytes an
angle read and 12 written a step, ``2 steps + 1`` rotations of k columns. For longer axes
``8 (passes - 1/2) + 8 passes`` bytes of an element of ``Z`` more a step, per butterfly.
"""

import math

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .rotate import residual_gradient, rotate_columns
from .stages import pair_count, part, residual, turn, unite

ANGLE_BETAS = (0.9, 0.99)
"""``butterfly_opt.refit.ANGLE_BETAS``."""

ANGLE_EPS = 1e-4
"""``butterfly_opt.refit.ANGLE_EPS``."""

SETTLING_STEPS = 800
"""``butterfly_opt.refit.SETTLING_STEPS``."""

MAX_COLUMNS = launch.SECTOR
"""Columns of a sketch that the kernels take."""

MAX_WINDOW = 8192
"""Elements of a window of the sketch that a program holds beside its gradient."""

_STATE_DTYPES = frozenset({torch.float32})
_TORCH_REFIT = "butterfly_opt.refit.refit_sketch_"
_BLOCK = 1024

_BETA1 = tl.constexpr(ANGLE_BETAS[0])
_BETA2 = tl.constexpr(ANGLE_BETAS[1])
_LOG_BETA1 = tl.constexpr(math.log2(ANGLE_BETAS[0]))
_LOG_BETA2 = tl.constexpr(math.log2(ANGLE_BETAS[1]))
_EPS = tl.constexpr(ANGLE_EPS)
_SETTLING = tl.constexpr(SETTLING_STEPS)


@triton.jit
def _step_angles(angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, slots, mask, gradient, step, refit_lr,
                 PER_ANGLE: tl.constexpr, OWNED: tl.constexpr):  # fmt: skip
    """``butterfly_opt.refit.step_angles_`` at ``slots``; returns the new angles."""
    angle = tl.load(angles_ptr + slots, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + slots, mask=mask, other=0.0)
    square = tl.load(square_ptr + slots, mask=mask, other=0.0)
    taken = step + (tl.load(taken_ptr + slots, mask=mask, other=0.0) if PER_ANGLE else tl.load(taken_ptr))
    if OWNED:
        gradient = gradient * tl.load(owned_ptr + slots, mask=mask, other=0.0)
    mean += (1.0 - _BETA1) * (gradient - mean)
    square += (1.0 - _BETA2) * (gradient * gradient - square)
    scale = tl.sqrt_rn(square / (1.0 - tl.exp2((taken + 1.0) * _LOG_BETA2))) + _EPS
    rate = refit_lr / (1.0 + taken / _SETTLING) / (1.0 - tl.exp2((taken + 1.0) * _LOG_BETA1))
    angle -= mean / scale * rate
    # Lanes that hold the same slot must all have read it before one of them writes.
    tl.debug_barrier()
    tl.store(angles_ptr + slots, angle, mask=mask)
    tl.store(mean_ptr + slots, mean, mask=mask)
    tl.store(square_ptr + slots, square, mask=mask)
    return angle


@triton.jit
def _back_stage(u, g, angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, row, pairs, n, step, refit_lr,
                PER_ANGLE: tl.constexpr, OWNED: tl.constexpr, STAGE: tl.constexpr, MIDDLE: tl.constexpr,
                RUN: tl.constexpr):  # fmt: skip
    """Undoes a stage of ``Q^T`` on ``u`` and its gradient, and takes the step of its angles."""
    used = pairs < pair_count(n, STAGE)
    angle = tl.load(angles_ptr + row + pairs, mask=used, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    u_lo, u_hi = part(u, 1, MIDDLE, RUN, 1 << STAGE)
    g_lo, g_hi = part(g, 1, MIDDLE, RUN, 1 << STAGE)
    gradient = tl.where(used, tl.sum(g_lo * u_hi - g_hi * u_lo, axis=2, keep_dims=True), 0.0)
    _step_angles(angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, row + pairs, pairs < n // 2, gradient,
                 step, refit_lr, PER_ANGLE, OWNED)  # fmt: skip
    u = unite(cos * u_lo - sin * u_hi, sin * u_lo + cos * u_hi, 1, MIDDLE, RUN, 1 << STAGE)
    g = unite(cos * g_lo - sin * g_hi, sin * g_lo + cos * g_hi, 1, MIDDLE, RUN, 1 << STAGE)
    return u, g


@triton.jit
def _refit_kernel(sketch_ptr, out_ptr, angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, n, columns, depth,
                  steps, refit_lr, PER_ANGLE: tl.constexpr, OWNED: tl.constexpr, STAGES: tl.constexpr,
                  RUN: tl.constexpr):  # fmt: skip
    """All angle steps of one window; ``out`` receives its rotated rows."""
    MIDDLE: tl.constexpr = 1 << STAGES
    window = tl.program_id(0).to(tl.int64)
    index = window * MIDDLE + tl.arange(0, MIDDLE)[None, :, None]
    column = tl.arange(0, RUN)[None, None, :]
    mask = (index < n) & (column < columns)
    offsets = index * columns + column
    pairs = window * (MIDDLE // 2) + tl.arange(0, MIDDLE // 2)[None, :, None]
    half = n // 2
    # The last turn only rotates: with the steps in one loop, the stages are compiled once.
    for step in range(steps + 1):
        u = tl.load(sketch_ptr + offsets, mask=mask, other=0.0)
        for butterfly in range(depth):
            for stage in tl.static_range(STAGES):
                used = pairs < pair_count(n, stage)
                row = (butterfly * STAGES + stage) * half
                angle = tl.load(angles_ptr + row + pairs, mask=used, other=0.0)
                u = turn(u, tl.cos(angle), -tl.sin(angle), 1, MIDDLE, RUN, 1 << stage)
        if step < steps:
            g = residual(u, columns, SUMMED=True)
            for later in range(depth):
                for k in tl.static_range(STAGES):
                    row = ((depth - 1 - later) * STAGES + STAGES - 1 - k) * half
                    u, g = _back_stage(
                        u, g, angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, row, pairs, n, step, refit_lr,
                        PER_ANGLE, OWNED, STAGES - 1 - k, MIDDLE, RUN
                    )  # fmt: skip
            # The next turn reads angles that another lane of this program may have written.
            tl.debug_barrier()
        else:
            tl.store(out_ptr + offsets, u, mask=mask)


@triton.jit
def _angles_kernel(angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, gradient_ptr, cos_ptr, sin_ptr, size, step,
                   refit_lr, PER_ANGLE: tl.constexpr, OWNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The step of all angles from their gradient, and their new cosines and sines."""
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = slots < size
    gradient = tl.load(gradient_ptr + slots, mask=mask, other=0.0)
    angle = _step_angles(angles_ptr, mean_ptr, square_ptr, taken_ptr, owned_ptr, slots, mask, gradient, step,
                         refit_lr, PER_ANGLE, OWNED)  # fmt: skip
    tl.store(cos_ptr + slots, tl.cos(angle), mask=mask)
    tl.store(sin_ptr + slots, tl.sin(angle), mask=mask)


def fits_on_chip(stages: int, columns: int) -> bool:
    """Whether windows of ``2**stages`` rows of a sketch are refitted in one launch."""
    return launch.next_power_of_two(max(columns, 1)) << stages <= MAX_WINDOW


def refit_sketch_(
    sketch: Tensor,
    angles: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    steps: int,
    refit_lr: float,
    taken: Tensor,
    owned: Tensor | None = None,
    max_tile: int = launch.MAX_TILE,
) -> Tensor:
    """Fits the angles of an axis, or of a pack of axes, to at most 8 columns of a sketch.

    Equals ``butterfly_opt.refit.refit_sketch_`` on them.

    Args:
        sketch: ``Z`` in the original coordinates, ``(n, k)``, float32, contiguous, k <= 8.
        angles: ``(depth, stages, n // 2)``, float32, contiguous; updated.
        mean: averages of their gradients, of the same shape; updated.
        square: averages of the squares of their gradients, of the same shape; updated.
        steps: angle steps.
        refit_lr: length of the first step in radians.
        taken: number of angle steps taken before, float32, 0-d or of the shape of the angles.
        owned: 1 at the slots that belong to an axis, 0 at others, of the shape of the angles; all if None.
        max_tile: elements a program may hold where several passes are needed, a power of two >= 32.

    Returns:
        ``Q^T Z`` in the new basis, a new tensor.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if shapes do not belong together, ``sketch`` has more than 8 columns, a tensor is not
            contiguous, devices differ, the kernels cannot run on the device, ``steps`` or ``refit_lr`` is
            not >= 0, or ``max_tile`` is no power of two >= 32.
    """
    _check(sketch, angles, mean, square, taken, owned)
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    if not refit_lr >= 0.0:
        raise ValueError(f"refit_lr must be >= 0, got {refit_lr}")
    n, columns = sketch.shape
    depth, stages, _ = angles.shape
    if not sketch.numel() or not angles.numel():
        return sketch.clone()
    state = (angles, mean, square, taken, angles if owned is None else owned)
    options = {"PER_ANGLE": taken.dim() > 0, "OWNED": owned is not None}
    with launch.on_device(sketch):
        if fits_on_chip(stages, columns):
            out = torch.empty_like(sketch)
            run = launch.next_power_of_two(columns)
            _refit_kernel[(-(-n // (1 << stages)),)](
                sketch, out, *state, n, columns, depth, steps, float(refit_lr), STAGES=stages, RUN=run,
                num_warps=launch.choose_num_warps(run << stages, tensors=2), **options,
            )  # fmt: skip
            return out
        cos, sin = angles.cos(), angles.sin()
        u = torch.empty_like(sketch)
        for step in range(steps + 1):
            rotate_columns(sketch[None], cos, sin, transpose=True, out=u[None], max_tile=max_tile)
            if step < steps:
                gradient = residual_gradient(u, cos, sin, max_tile=max_tile)
                _angles_kernel[(triton.cdiv(angles.numel(), _BLOCK),)](
                    *state, gradient, cos, sin, angles.numel(), step, float(refit_lr), BLOCK=_BLOCK, **options
                )
    return u


def _check(sketch: Tensor, angles: Tensor, mean: Tensor, square: Tensor, taken: Tensor, owned: Tensor | None) -> None:
    like = [("mean", mean), ("square", square), *([("owned", owned)] if owned is not None else [])]
    named = [("sketch", sketch), ("angles", angles), *like, ("taken", taken)]
    launch.check_tensors(named, _STATE_DTYPES, _TORCH_REFIT)
    if sketch.dim() != 2 or sketch.shape[1] > MAX_COLUMNS:
        raise ValueError(f"sketch must be (n, k) with k <= {MAX_COLUMNS}, got shape {tuple(sketch.shape)}")
    n = sketch.shape[0]
    most = max(n - 1, 0).bit_length()
    if angles.dim() != 3 or angles.shape[1] > most or angles.shape[2] != n // 2:
        raise ValueError(
            f"angles must be (depth, <= {most}, {n // 2}) for a sketch of {n} rows, got shape {tuple(angles.shape)}"
        )
    for name, tensor in like:
        if tensor.shape != angles.shape:
            raise ValueError(f"{name} must have shape {tuple(angles.shape)} like angles, got {tuple(tensor.shape)}")
    if taken.dim() and taken.shape != angles.shape:
        raise ValueError(f"taken must be 0-d or of shape {tuple(angles.shape)} like angles, got {tuple(taken.shape)}")

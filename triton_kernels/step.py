"""The averages and the direction of one step in rotated coordinates, each one launch over a list of tensors.

Formulas, for one tensor of ``size`` coordinates, in the names of ``butterfly_opt.estimate``:

    moments_    u = clamp(G, +-1e18) - gbar;  G <- u;  gbar <- gbar + a u;  A <- (1 - b) A + b u^2
                secant also, with w = s:  B <- (1 - b') B + b' w^2;  C <- (1 - b') C + b' u w
    direction_  V = A, or that of ``butterfly_opt.diagonal.regress``
                out <- -lr clip(gbar / (sqrt(V) + max(eps, tiny)), +-max_update);  s <- (1 - a) s + out

``a, b, b'``, the step, ``lr`` and whether the gradient is usable come from device memory, see ``table.py``.
Where it is not usable nothing but ``G`` and ``out`` is written, and those are 0, whatever ``G`` held.

Layout. Any shape, contiguous; a program holds BLOCK elements. Sums over a tensor (of B and ``|C|``) are
written per program and added in a fixed order: no atomics, the results do not depend on the run.

Dtypes. State and arithmetic float32. float64 is for torch.

Cost, bytes a coordinate (``MOMENTS_BYTES``, ``DIRECTION_BYTES``): moments reads G, gbar, A and writes them, 24;
secant reads s too, reads and writes B and C, 44. direction reads gbar, A and writes out, 12; secant reads B and
C too, 20, and with the displacement reads and writes s, 28. Profitable at every size, since each replaces
5 to 25 launches a tensor; below some 2**18 elements a launch is all that counts, which is what lists are for.
"""

from collections.abc import Sequence

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .table import (
    BLOCK,
    NUM_WARPS,
    STATE_DTYPES,
    TensorTable,
    build_table,
    check_beside,
    check_launch,
    check_lists,
    every_element,
    find_operand,
    find_tensor,
    given_lists,
    is_usable,
)

MAX_ROTATED_GRAD = 1e18
"""``butterfly_opt.update.MAX_ROTATED_GRAD``."""

MIN_STEPS = 5
"""``butterfly_opt.diagonal.MIN_STEPS``."""

MOMENTS_BYTES = {"innovation": 24, "secant": 44}
"""Bytes a coordinate that ``moments_`` moves."""

DIRECTION_BYTES = {"innovation": 12, "secant": 20, "secant advancing": 28}
"""Bytes a coordinate that ``direction_`` moves; the last with the displacement."""

_TORCH_MOMENTS = "butterfly_opt.batch.take_averages"
_TORCH_DIRECTION = "butterfly_opt.batch.take_averages"

_LARGEST = tl.constexpr(MAX_ROTATED_GRAD)
_SETTLED = tl.constexpr(MIN_STEPS)
_TINY = torch.finfo(torch.float32).tiny
_ROOT_TINY = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)
_LEAST_TAU2 = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.75)


@triton.jit
def _at_least(x, bound):
    """``torch.clamp_min``: unlike ``tl.maximum`` it keeps NaN, and so on every version of Triton."""
    return tl.where(x < bound, bound, x)


@triton.jit
def _at_most(x, bound):
    """``torch.clamp_max``, which keeps NaN."""
    return tl.where(x > bound, bound, x)


@triton.jit
def _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr, partial_ptr, offsets,
                   mask, SECANT: tl.constexpr):  # fmt: skip
    """``moments_`` of one block; ``partial_ptr`` receives its sums of B and |C|."""
    usable = is_usable(scalars_ptr, offsets.shape[0])
    weight = tl.load(scalars_ptr + 1)
    mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    grad_sq = tl.load(sq_ptr + offsets, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    u = tl.where(usable, _at_most(_at_least(grad, -_LARGEST), _LARGEST) - mean, 0.0)
    tl.store(grad_ptr + offsets, u, mask=mask)
    tl.store(mean_ptr + offsets, mean + u * tl.load(scalars_ptr), mask=mask & usable)
    tl.store(sq_ptr + offsets, grad_sq * (1.0 - weight) + weight * u * u, mask=mask & usable)
    if SECANT:
        weight = tl.load(scalars_ptr + 2)
        w = tl.load(disp_ptr + offsets, mask=mask, other=0.0)
        disp_sq = tl.load(disp_sq_ptr + offsets, mask=mask, other=0.0)
        cross = tl.load(cross_ptr + offsets, mask=mask, other=0.0)
        disp_sq = tl.where(usable, disp_sq * (1.0 - weight) + weight * w * w, disp_sq)
        cross = tl.where(usable, cross * (1.0 - weight) + weight * u * w, cross)
        tl.store(disp_sq_ptr + offsets, disp_sq, mask=mask & usable)
        tl.store(cross_ptr + offsets, cross, mask=mask & usable)
        tl.store(partial_ptr, tl.sum(disp_sq, axis=0))
        tl.store(partial_ptr + 1, tl.sum(tl.abs(cross), axis=0))


@triton.jit
def _energy(grad_sq, disp_sq, cross, sum_disp_sq, sum_cross, size, step, newest):
    """``V`` of ``diagonal.regress``, in its order; ``newest`` is ``1 - beta2``."""
    tau2 = sum_disp_sq / size
    moved = (tau2 > _LEAST_TAU2) & (step > _SETTLED)
    inverse = tl.where(moved, 1.0 / tl.sqrt_rn(tl.where(moved, tau2, 1.0)), 0.0)
    b = disp_sq * (inverse * inverse)
    c = cross * inverse
    mean_slope = sum_cross * inverse / size
    spread = _at_least(grad_sq - c * c / (b + 1e-12), 0.0)
    inverse_slope = 1.0 / _at_least(mean_slope, _ROOT_TINY)
    ridge = _at_most(spread * inverse_slope * (inverse_slope * newest), 1e12) + 1e-6
    slope = (c + ridge * mean_slope) / (b + ridge)
    noise = _at_least(grad_sq - slope * (2.0 * c - slope * b), 0.0)
    return noise + slope * slope


@triton.jit
def _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size, newest,
                     eps, max_update, offsets, mask, SECANT: tl.constexpr, ADVANCE: tl.constexpr):  # fmt: skip
    """``direction_`` of one block."""
    usable = is_usable(scalars_ptr, offsets.shape[0])
    mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    energy = tl.load(sq_ptr + offsets, mask=mask, other=0.0)
    if SECANT:
        disp_sq = tl.load(disp_sq_ptr + offsets, mask=mask, other=0.0)
        cross = tl.load(cross_ptr + offsets, mask=mask, other=0.0)
        step = tl.load(scalars_ptr + 3)
        energy = _energy(energy, disp_sq, cross, tl.load(sums_ptr), tl.load(sums_ptr + 1), size, step, newest)
    # sqrt_rn: tl.sqrt takes subnormal energies for zero.
    scale = tl.sqrt_rn(energy) + eps
    out = _at_most(_at_least(mean / scale, -max_update), max_update) * -tl.load(scalars_ptr + 4)
    out = tl.where(usable, out, 0.0)
    tl.store(out_ptr + offsets, out, mask=mask)
    if ADVANCE:
        displacement = tl.load(disp_ptr + offsets, mask=mask, other=0.0)
        advanced = displacement * (1.0 - tl.load(scalars_ptr)) + out
        tl.store(disp_ptr + offsets, advanced, mask=mask & usable)


@triton.jit
def _moments_kernel(rows_ptr, owners_ptr, scalars_ptr, partial_ptr, SECANT: tl.constexpr, ALIGNED: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    _, row_ptr, scalars_ptr, size, start = find_tensor(rows_ptr, owners_ptr, scalars_ptr, 6 if SECANT else 3, BLOCK)
    grad_ptr = find_operand(row_ptr, 0, ALIGNED, tl.float32)
    mean_ptr = find_operand(row_ptr, 1, ALIGNED, tl.float32)
    sq_ptr = find_operand(row_ptr, 2, ALIGNED, tl.float32)
    disp_ptr = find_operand(row_ptr, 3 if SECANT else 0, ALIGNED, tl.float32)
    disp_sq_ptr = find_operand(row_ptr, 4 if SECANT else 0, ALIGNED, tl.float32)
    cross_ptr = find_operand(row_ptr, 5 if SECANT else 0, ALIGNED, tl.float32)
    sums_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr, sums_ptr,
                       offsets, every_element(BLOCK), SECANT)  # fmt: skip
    else:
        _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr, sums_ptr,
                       offsets, offsets < size, SECANT)  # fmt: skip


@triton.jit
def _direction_kernel(rows_ptr, owners_ptr, scalars_ptr, sums_ptr, newest, eps, max_update, SECANT: tl.constexpr,
                      ADVANCE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    OPERANDS: tl.constexpr = (6 if ADVANCE else 5) if SECANT else 3
    tensor, row_ptr, scalars_ptr, size, start = find_tensor(rows_ptr, owners_ptr, scalars_ptr, OPERANDS, BLOCK)
    out_ptr = find_operand(row_ptr, 0, ALIGNED, tl.float32)
    mean_ptr = find_operand(row_ptr, 1, ALIGNED, tl.float32)
    sq_ptr = find_operand(row_ptr, 2, ALIGNED, tl.float32)
    disp_sq_ptr = find_operand(row_ptr, 3 if SECANT else 0, ALIGNED, tl.float32)
    cross_ptr = find_operand(row_ptr, 4 if SECANT else 0, ALIGNED, tl.float32)
    disp_ptr = find_operand(row_ptr, 5 if ADVANCE else 0, ALIGNED, tl.float32)
    if SECANT:
        sums_ptr += tensor * 2
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size,
                         newest, eps, max_update, offsets, every_element(BLOCK), SECANT, ADVANCE)  # fmt: skip
    else:
        _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size,
                         newest, eps, max_update, offsets, offsets < size, SECANT, ADVANCE)  # fmt: skip


@triton.jit
def _sum_partials_kernel(rows_ptr, partial_ptr, sums_ptr, OPERANDS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the partial sums of each tensor's programs; one program a tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tensor * (3 + OPERANDS)
    first = tl.load(row_ptr + 1)
    last = first + tl.cdiv(tl.load(row_ptr), BLOCK)
    lanes = tl.arange(0, BLOCK)
    disp_sq = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + lanes
        disp_sq += tl.load(partial_ptr + rows * 2, mask=rows < last, other=0.0)
        cross += tl.load(partial_ptr + rows * 2 + 1, mask=rows < last, other=0.0)
    tl.store(sums_ptr + tensor * 2, tl.sum(disp_sq, axis=0))
    tl.store(sums_ptr + tensor * 2 + 1, tl.sum(cross, axis=0))


def moments_table(
    grads: Sequence[Tensor],
    mean_grads: Sequence[Tensor],
    grad_sqs: Sequence[Tensor],
    *,
    displacements: Sequence[Tensor] | None = None,
    disp_sqs: Sequence[Tensor] | None = None,
    crosses: Sequence[Tensor] | None = None,
) -> TensorTable:
    """The table of ``moments_``: for every tensor of a list what a step averages.

    Args:
        grads: ``G``, the rotated gradients; overwritten with the innovations ``u``.
        mean_grads: ``gbar``, updated.
        grad_sqs: ``A``, updated.
        displacements: ``s``, read; with ``disp_sqs`` and ``crosses``, all three or none.
        disp_sqs: ``B``, updated.
        crosses: ``C``, updated.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if a list is empty or of another length, only some of the secant lists are given, shapes
            or devices differ, a tensor is not contiguous, the kernels cannot run on the device, or for CUDA
            tensors under Triton's interpreter, which sees copies of them.
    """
    secant = given_lists(displacements=displacements, disp_sqs=disp_sqs, crosses=crosses)
    lists = [("grads", grads), ("mean_grads", mean_grads), ("grad_sqs", grad_sqs), *secant]
    check_lists(lists, [STATE_DTYPES] * len(lists), _TORCH_MOMENTS)
    return build_table("moments", [tensors for _, tensors in lists])


def moments_(table: TensorTable, scalars: Tensor) -> Tensor | None:
    """Averages of one step of every tensor of a table, in place, in one launch (two for secant).

    Equals the averages of ``butterfly_opt.batch.take_averages``.

    Args:
        table: made by ``moments_table``.
        scalars: float32 ``(tensors, 6)``, see ``table.SCALARS``.

    Returns:
        For secant ``(sum B, sum |C|)`` of every tensor, float32 ``(tensors, 2)``, for ``direction_``; None for
        innovation.

    Raises:
        TypeError: if ``scalars`` is not float32.
        ValueError: if the table is for another launch, or shape, device or contiguity of ``scalars`` is wrong.
    """
    check_launch(table, "moments", scalars, _TORCH_MOMENTS)
    count, programs = len(table.operands[0]), len(table.owners)
    secant = len(table.operands) == 6
    partial = scalars.new_empty((programs, 2)) if secant else scalars
    sums = scalars.new_empty((count, 2)) if secant else None
    with launch.on_device(table.rows):
        if programs:
            _moments_kernel[(programs,)](
                table.rows, table.owners, scalars, partial, SECANT=secant, ALIGNED=table.aligned, BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )  # fmt: skip
        if secant:
            _sum_partials_kernel[(count,)](table.rows, partial, sums, OPERANDS=6, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return sums


def direction_table(
    outs: Sequence[Tensor],
    mean_grads: Sequence[Tensor],
    grad_sqs: Sequence[Tensor],
    *,
    disp_sqs: Sequence[Tensor] | None = None,
    crosses: Sequence[Tensor] | None = None,
    displacements: Sequence[Tensor] | None = None,
) -> TensorTable:
    """The table of ``direction_``: for every tensor of a list what an update is made of.

    Args:
        outs: receive the updates, to be rotated back and added to the parameters.
        mean_grads: ``gbar``.
        grad_sqs: ``A``; ``V = A`` unless the secant lists are given.
        disp_sqs: ``B``; with ``crosses``.
        crosses: ``C``.
        displacements: ``s``, advanced by the update as ``pairs.advance_displacement_`` does. Leave them out
            where the parameters will change by something else (``written`` of ``write_``, rotated).

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: as ``moments_table``, or for ``displacements`` without the secant lists.
    """
    secant = given_lists(disp_sqs=disp_sqs, crosses=crosses)
    if displacements is not None and not secant:
        raise ValueError("displacements need disp_sqs and crosses too, got None")
    advanced = [("displacements", displacements)] if displacements is not None else []
    lists = [("outs", outs), ("mean_grads", mean_grads), ("grad_sqs", grad_sqs), *secant, *advanced]
    check_lists(lists, [STATE_DTYPES] * len(lists), _TORCH_DIRECTION)
    return build_table("direction", [tensors for _, tensors in lists])


def direction_(
    table: TensorTable,
    scalars: Tensor,
    *,
    eps: float,
    max_update: float,
    beta2: float | None = None,
    sums: Tensor | None = None,
) -> None:
    """The rotated update of every tensor of a table, and its next displacement, in one launch.

    Equals the update of ``butterfly_opt.batch.take_averages``.

    Args:
        table: made by ``direction_table``.
        scalars: float32 ``(tensors, 6)``, see ``table.SCALARS``.
        eps: added to ``sqrt(V)``.
        max_update: bound of the update before ``lr``.
        beta2: decay of the averages; needed for secant.
        sums: what ``moments_`` returned for the same tensors; for secant.

    Raises:
        TypeError: if ``scalars`` or ``sums`` is not float32.
        ValueError: if ``eps`` is not >= 0, ``max_update`` not > 0, or ``beta2`` not in [0, 1) for secant; if the
            table is for another launch, or ``scalars`` or ``sums`` have a wrong shape, device or contiguity;
            if ``sums`` is given for innovation or missing for secant.
    """
    check_launch(table, "direction", scalars, _TORCH_DIRECTION)
    secant, advance = len(table.operands) > 3, len(table.operands) == 6
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if not max_update > 0.0:
        raise ValueError(f"max_update must be > 0, got {max_update}")
    if secant and (beta2 is None or not 0.0 <= beta2 < 1.0):
        raise ValueError(f"beta2 must be in [0, 1) for secant, got {beta2}")
    if (sums is not None) != secant:
        raise ValueError(
            f"sums must be given exactly for secant tables, got {'a tensor' if sums is not None else None}"
        )
    if sums is not None:
        meaning = "the sums of B and |C|"
        check_beside(table, "sums", sums, (len(table.operands[0]), 2), meaning, _TORCH_DIRECTION)
    newest = 1.0 - beta2 if beta2 is not None else 0.0
    if len(table.owners):
        with launch.on_device(table.rows):
            _direction_kernel[(len(table.owners),)](
                table.rows, table.owners, scalars, scalars if sums is None else sums, newest, max(float(eps), _TINY),
                float(max_update), SECANT=secant, ADVANCE=advance, ALIGNED=table.aligned, BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )  # fmt: skip

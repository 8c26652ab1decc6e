"""The element-wise parts of one step in rotated coordinates, each fused to one launch.

Formulas, for one tensor of ``size`` coordinates, in the names of ``butterfly_opt.estimate``:

    fused_moments_    u = clamp(G, +-1e18) - gbar;  G <- u;  gbar <- gbar + a u;  A <- (1 - b) A + b u^2
                      secant also, with w = s:  B <- (1 - b') B + b' w^2;  C <- (1 - b') C + b' u w
    fused_direction_  V = A, or that of ``butterfly_opt.diagonal.regress``
                      out <- -lr clip(gbar / max(sqrt(V) + eps, tiny), +-max_update);  s <- (1 - a) s + out
    fused_write_      theta <- theta decay + update, rounded once;  written <- the change of theta

``a, b, b'``, the step and ``lr`` come from a small device tensor (``pack_scalars``): they change without
a new compilation, and a captured CUDA graph reads their newest values.

Layout. Any shape, contiguous; a program holds BLOCK elements. Sums over a tensor (of B and ``|C|``) are
written per program and added in a fixed order: no atomics, the results do not depend on the run.

Many tensors. The ``*_many_`` forms run one launch over a list: a device table of int64 rows ``(size,
first program, address of each operand)`` and the tensor of every program (``TensorTable``). They work
in Triton's interpreter too, on CPU tensors.

Dtypes. State float32; parameters float32, bfloat16 or float16; arithmetic float32. float64 is for torch.

Cost, bytes a coordinate: moments 24 (secant 44); direction 12 (secant 28, 20 without the displacement);
write 12 (2-byte parameters 8), 4 more with ``written``. Profitable at every size, since each replaces
5 to 25 launches; below some 2**18 elements the launch is all that counts, which is what lists are for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

SCALARS = ("mean_weight", "grad_weight", "pair_weight", "step", "lr")
"""What a row of ``scalars`` holds: a, b, b', the steps so far including this one, the learning rate."""

MAX_ROTATED_GRAD = 1e18
"""``butterfly_opt.update.MAX_ROTATED_GRAD``."""

MIN_STEPS = 5
"""``butterfly_opt.diagonal.MIN_STEPS``."""

BLOCK = 2048
"""Elements a program: 8 a lane of 8 warps, two 16-byte accesses."""

_NUM_WARPS = 8
_STATE_DTYPES = frozenset({torch.float32})
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNMENT = 16

_TORCH_MOMENTS = "butterfly_opt.pairs.update_mean_grad_ and butterfly_opt.estimate.update_moments_"
_TORCH_DIRECTION = "butterfly_opt.update.TensorStep.direction"
_TORCH_WRITE = "butterfly_opt.update.TensorStep.write"

_LARGEST = tl.constexpr(MAX_ROTATED_GRAD)
_SETTLED = tl.constexpr(MIN_STEPS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
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
    """``fused_moments_`` of one block; ``partial_ptr`` receives its sums of B and |C|."""
    weight = tl.load(scalars_ptr + 1)
    mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    grad_sq = tl.load(sq_ptr + offsets, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    u = _at_most(_at_least(grad, -_LARGEST), _LARGEST) - mean
    tl.store(grad_ptr + offsets, u, mask=mask)
    tl.store(mean_ptr + offsets, mean + u * tl.load(scalars_ptr), mask=mask)
    tl.store(sq_ptr + offsets, grad_sq * (1.0 - weight) + weight * u * u, mask=mask)
    if SECANT:
        weight = tl.load(scalars_ptr + 2)
        w = tl.load(disp_ptr + offsets, mask=mask, other=0.0)
        disp_sq = tl.load(disp_sq_ptr + offsets, mask=mask, other=0.0)
        cross = tl.load(cross_ptr + offsets, mask=mask, other=0.0)
        disp_sq = disp_sq * (1.0 - weight) + weight * w * w
        cross = cross * (1.0 - weight) + weight * u * w
        tl.store(disp_sq_ptr + offsets, disp_sq, mask=mask)
        tl.store(cross_ptr + offsets, cross, mask=mask)
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
    mean_slope = sum_cross * inverse / _at_least(sum_disp_sq * (inverse * inverse), _TINY)
    spread = _at_least(grad_sq - c * c / (b + 1e-12), 0.0)
    ratio = _at_most(tl.sqrt_rn(spread) * (1.0 / _at_least(mean_slope, _ROOT_TINY)), 1e6)
    ridge = ratio * ratio * newest + 1e-6
    slope = (c + ridge * mean_slope) / (b + ridge)
    noise = _at_least(grad_sq - slope * (2.0 * c - slope * b), 0.0)
    return noise + slope * slope


@triton.jit
def _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size, newest,
                     eps, max_update, offsets, mask, SECANT: tl.constexpr, ADVANCE: tl.constexpr):  # fmt: skip
    """``fused_direction_`` of one block."""
    mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    energy = tl.load(sq_ptr + offsets, mask=mask, other=0.0)
    if SECANT:
        disp_sq = tl.load(disp_sq_ptr + offsets, mask=mask, other=0.0)
        cross = tl.load(cross_ptr + offsets, mask=mask, other=0.0)
        step = tl.load(scalars_ptr + 3)
        energy = _energy(energy, disp_sq, cross, tl.load(sums_ptr), tl.load(sums_ptr + 1), size, step, newest)
    # sqrt_rn: tl.sqrt takes subnormal energies for zero.
    scale = _at_least(tl.sqrt_rn(energy) + eps, _TINY)
    out = _at_most(_at_least(mean / scale, -max_update), max_update) * -tl.load(scalars_ptr + 4)
    tl.store(out_ptr + offsets, out, mask=mask)
    if ADVANCE:
        displacement = tl.load(disp_ptr + offsets, mask=mask, other=0.0)
        tl.store(disp_ptr + offsets, displacement * (1.0 - tl.load(scalars_ptr)) + out, mask=mask)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """The nearest value of ``dtype``, ties to even; the interpreter's own cast to bfloat16 truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _write_block(param_ptr, update_ptr, written_ptr, decay, offsets, mask, TRACK: tl.constexpr):
    """``fused_write_`` of one block."""
    before = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + offsets, mask=mask, other=0.0)
    after = _round(before * decay + update, param_ptr.dtype.element_ty)
    tl.store(param_ptr + offsets, after, mask=mask)
    if TRACK:
        tl.store(written_ptr + offsets, after.to(tl.float32) - before, mask=mask)


@triton.jit
def _moments_kernel(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr, partial_ptr, size,
                    SECANT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    # A full block has a constant mask: accesses are then 16 bytes wide whatever the size.
    if (program + 1) * BLOCK <= size:
        _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr,
                       partial_ptr + program * 2, offsets, tl.full((BLOCK,), 1, tl.int1), SECANT)  # fmt: skip
    else:
        _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr,
                       partial_ptr + program * 2, offsets, offsets < size, SECANT)  # fmt: skip


@triton.jit
def _direction_kernel(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size, newest,
                      eps, max_update, SECANT: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    if (program + 1) * BLOCK <= size:
        _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size,
                         newest, eps, max_update, offsets, tl.full((BLOCK,), 1, tl.int1), SECANT, ADVANCE)  # fmt: skip
    else:
        _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size,
                         newest, eps, max_update, offsets, offsets < size, SECANT, ADVANCE)  # fmt: skip


@triton.jit
def _write_kernel(param_ptr, update_ptr, written_ptr, decay, size, TRACK: tl.constexpr, DECAY_IS_TENSOR: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    if DECAY_IS_TENSOR:
        decay = tl.load(decay)
    if (program + 1) * BLOCK <= size:
        _write_block(param_ptr, update_ptr, written_ptr, decay, offsets, tl.full((BLOCK,), 1, tl.int1), TRACK)
    else:
        _write_block(param_ptr, update_ptr, written_ptr, decay, offsets, offsets < size, TRACK)


@triton.jit
def _find(rows_ptr, owners_ptr, OPERANDS: tl.constexpr, BLOCK: tl.constexpr):
    """The tensor of this program, its row of the table, its size and where the program's block starts."""
    program = tl.program_id(0)
    tensor = tl.load(owners_ptr + program).to(tl.int64)
    row_ptr = rows_ptr + tensor * (2 + OPERANDS)
    return tensor, row_ptr, tl.load(row_ptr), (program - tl.load(row_ptr + 1)) * BLOCK


@triton.jit
def _operand(row_ptr, INDEX: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to an operand of a table's row."""
    pointer = tl.load(row_ptr + 2 + INDEX).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _moments_many_kernel(rows_ptr, owners_ptr, scalars_ptr, scalars_stride, partial_ptr, SECANT: tl.constexpr,
                         ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, row_ptr, size, start = _find(rows_ptr, owners_ptr, 6 if SECANT else 3, BLOCK)
    grad_ptr = _operand(row_ptr, 0, ALIGNED, tl.float32)
    mean_ptr = _operand(row_ptr, 1, ALIGNED, tl.float32)
    sq_ptr = _operand(row_ptr, 2, ALIGNED, tl.float32)
    disp_ptr = _operand(row_ptr, 3 if SECANT else 0, ALIGNED, tl.float32)
    disp_sq_ptr = _operand(row_ptr, 4 if SECANT else 0, ALIGNED, tl.float32)
    cross_ptr = _operand(row_ptr, 5 if SECANT else 0, ALIGNED, tl.float32)
    scalars_ptr += tensor * scalars_stride
    sums_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr, sums_ptr,
                       offsets, tl.full((BLOCK,), 1, tl.int1), SECANT)  # fmt: skip
    else:
        _moments_block(grad_ptr, mean_ptr, sq_ptr, disp_ptr, disp_sq_ptr, cross_ptr, scalars_ptr, sums_ptr,
                       offsets, offsets < size, SECANT)  # fmt: skip


@triton.jit
def _direction_many_kernel(rows_ptr, owners_ptr, scalars_ptr, scalars_stride, sums_ptr, newest, eps, max_update,
                           SECANT: tl.constexpr, ADVANCE: tl.constexpr, ALIGNED: tl.constexpr,
                           BLOCK: tl.constexpr):  # fmt: skip
    OPERANDS: tl.constexpr = (6 if ADVANCE else 5) if SECANT else 3
    tensor, row_ptr, size, start = _find(rows_ptr, owners_ptr, OPERANDS, BLOCK)
    out_ptr = _operand(row_ptr, 0, ALIGNED, tl.float32)
    mean_ptr = _operand(row_ptr, 1, ALIGNED, tl.float32)
    sq_ptr = _operand(row_ptr, 2, ALIGNED, tl.float32)
    disp_sq_ptr = _operand(row_ptr, 3 if SECANT else 0, ALIGNED, tl.float32)
    cross_ptr = _operand(row_ptr, 4 if SECANT else 0, ALIGNED, tl.float32)
    disp_ptr = _operand(row_ptr, 5 if ADVANCE else 0, ALIGNED, tl.float32)
    scalars_ptr += tensor * scalars_stride
    if SECANT:
        sums_ptr += tensor * 2
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size,
                         newest, eps, max_update, offsets, tl.full((BLOCK,), 1, tl.int1), SECANT, ADVANCE)  # fmt: skip
    else:
        _direction_block(out_ptr, mean_ptr, sq_ptr, disp_sq_ptr, cross_ptr, disp_ptr, sums_ptr, scalars_ptr, size,
                         newest, eps, max_update, offsets, offsets < size, SECANT, ADVANCE)  # fmt: skip


@triton.jit
def _write_many_kernel(rows_ptr, owners_ptr, decay, TRACK: tl.constexpr, DECAY_IS_TENSOR: tl.constexpr,
                       DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    _, row_ptr, size, start = _find(rows_ptr, owners_ptr, 3 if TRACK else 2, BLOCK)
    param_ptr = _operand(row_ptr, 0, ALIGNED, DTYPE)
    update_ptr = _operand(row_ptr, 1, ALIGNED, tl.float32)
    written_ptr = _operand(row_ptr, 2 if TRACK else 1, ALIGNED, tl.float32)
    offsets = start + tl.arange(0, BLOCK)
    if DECAY_IS_TENSOR:
        decay = tl.load(decay)
    if start + BLOCK <= size:
        _write_block(param_ptr, update_ptr, written_ptr, decay, offsets, tl.full((BLOCK,), 1, tl.int1), TRACK)
    else:
        _write_block(param_ptr, update_ptr, written_ptr, decay, offsets, offsets < size, TRACK)


@triton.jit
def _sum_partials_kernel(rows_ptr, partial_ptr, sums_ptr, OPERANDS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the partial sums of each tensor's programs; one program a tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tensor * (2 + OPERANDS)
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


def can_use_step(param: Tensor, *state: Tensor) -> bool:
    """Whether the kernels take a parameter (float32, bfloat16, float16) and its float32 state tensors."""
    try:
        launch.check_tensors([("param", param)], launch.INPUT_DTYPES, _TORCH_WRITE)
        if state:
            named = [(f"state[{i}]", tensor) for i, tensor in enumerate(state)]
            launch.check_tensors(named, _STATE_DTYPES, _TORCH_DIRECTION)
    except (TypeError, ValueError):
        return False
    return all(tensor.device == param.device for tensor in state)


def pack_scalars(
    *,
    mean_weight: float | Tensor,
    grad_weight: float | Tensor,
    pair_weight: float | Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    device: torch.device,
) -> Tensor:
    """The ``scalars`` of a step, ``(5,)`` float32 on ``device``, without a synchronisation.

    Args:
        mean_weight: ``a``, weight of this gradient in ``gbar``.
        grad_weight: ``b``, weight of ``u^2`` in ``A``.
        pair_weight: ``b'``, weight of this pair in ``B`` and ``C``.
        step: steps so far, including this one.
        lr: learning rate.
        device: where the kernels run.

    Cost: one asynchronous copy of 20 bytes for numbers; with a 0-d device tensor among them, a few small
    launches, which a CUDA graph can hold.
    """
    values = (mean_weight, grad_weight, pair_weight, step, lr)
    if any(isinstance(value, Tensor) for value in values):
        parts = [
            value.to(device, torch.float32) if isinstance(value, Tensor) else torch.full((), value, device=device)
            for value in values
        ]
        return torch.stack([part.float() for part in parts])
    return _to_device(torch.tensor(values, dtype=torch.float32), device)


def fused_moments_(
    grad: Tensor,
    mean_grad: Tensor,
    grad_sq: Tensor,
    scalars: Tensor,
    *,
    displacement: Tensor | None = None,
    disp_sq: Tensor | None = None,
    cross: Tensor | None = None,
) -> Tensor | None:
    """Averages of one step, in place; equals ``pairs.update_mean_grad_`` and ``estimate.update_moments_``.

    Args:
        grad: ``G``, the rotated gradient; overwritten with the innovation ``u``.
        mean_grad: ``gbar``, updated.
        grad_sq: ``A``, updated.
        scalars: see ``pack_scalars``.
        displacement: ``s``, read; with ``disp_sq`` and ``cross``, all three or none.
        disp_sq: ``B``, updated.
        cross: ``C``, updated.

    Returns:
        For secant the programs' sums of ``B`` and ``|C|``, float32 ``(programs, 2)``: their
        ``.sum(0)`` is ``sums`` of ``fused_direction_``. None for innovation.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if shapes or devices differ, a tensor is not contiguous, the kernels cannot run on the
            device, or only some of the secant tensors are given.
    """
    secant = _given(displacement=displacement, disp_sq=disp_sq, cross=cross)
    named = [("grad", grad), ("mean_grad", mean_grad), ("grad_sq", grad_sq), *secant]
    _check_state(named, scalars, _TORCH_MOMENTS)
    _check_scalars(scalars, None)
    programs = triton.cdiv(grad.numel(), BLOCK)
    partial = torch.empty((programs, 2), dtype=torch.float32, device=grad.device) if secant else None
    if programs:
        with launch.on_device(grad):
            _moments_kernel[(programs,)](
                grad, mean_grad, grad_sq, displacement, disp_sq, cross, scalars,
                scalars if partial is None else partial, grad.numel(), SECANT=bool(secant), BLOCK=BLOCK,
                num_warps=_NUM_WARPS,
            )  # fmt: skip
    return partial


def fused_direction_(
    out: Tensor,
    mean_grad: Tensor,
    grad_sq: Tensor,
    scalars: Tensor,
    *,
    eps: float,
    max_update: float,
    beta2: float | None = None,
    disp_sq: Tensor | None = None,
    cross: Tensor | None = None,
    sums: Tensor | None = None,
    displacement: Tensor | None = None,
) -> None:
    """The rotated update, and the next displacement; equals ``-lr * update.TensorStep.direction`` ("adam").

    Args:
        out: receives the update, to be rotated back and added to the parameters.
        mean_grad: ``gbar``.
        grad_sq: ``A``; ``V = A`` unless the secant tensors are given.
        scalars: see ``pack_scalars``.
        eps: added to ``sqrt(V)``.
        max_update: bound of the update before ``lr``.
        beta2: decay of the averages; needed for secant.
        disp_sq: ``B``; with ``cross`` and ``sums``, all three or none.
        cross: ``C``.
        sums: ``(sum B, sum |C|)``, float32 ``(2,)``.
        displacement: ``s``, advanced by ``out`` as ``pairs.advance_displacement_`` does. Leave it out where
            the parameters will change by something else (``written`` of ``fused_write_``, rotated).

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: as ``fused_moments_``, if ``eps`` is not >= 0, ``max_update`` not > 0, or ``beta2``
            not in [0, 1).
    """
    secant = _given(disp_sq=disp_sq, cross=cross, sums=sums)
    newest = _check_direction(eps, max_update, beta2, secant=bool(secant), advance=displacement is not None)
    advanced = [("displacement", displacement)] if displacement is not None else []
    named = [("out", out), ("mean_grad", mean_grad), ("grad_sq", grad_sq), *secant[:2], *advanced]
    _check_state(named, scalars, _TORCH_DIRECTION)
    _check_scalars(scalars, None)
    if sums is not None:
        _check_sums(sums, (2,), out)
    if not out.numel():
        return
    with launch.on_device(out):
        _direction_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out, mean_grad, grad_sq, disp_sq, cross, displacement, sums, scalars, out.numel(), newest, float(eps),
            float(max_update), SECANT=bool(secant), ADVANCE=displacement is not None, BLOCK=BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip


def fused_write_(
    param: Tensor, update: Tensor, *, scale_decay: float | Tensor = 1.0, written: Tensor | None = None
) -> None:
    """``param <- param * scale_decay + update``, rounded once; the write of ``update.TensorStep.write``.

    torch's two operations round a bfloat16 parameter twice under decay; else the results are equal.

    Args:
        param: float32, bfloat16 or float16.
        update: float32.
        scale_decay: ``1 - lr * weight_decay``; a number, or a float32 device tensor of one element.
        written: receives the change of ``param`` after rounding, float32.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if shapes or devices differ, a tensor is not contiguous, the kernels cannot run on the
            device, or a tensor ``scale_decay`` has not one element.
    """
    tensors = [("update", update)] + ([("written", written)] if written is not None else [])
    _check_write(param, tensors)
    _check_decay(scale_decay, param)
    if param.numel():
        with launch.on_device(param):
            _write_kernel[(triton.cdiv(param.numel(), BLOCK),)](
                param, update, written, _decay_argument(scale_decay), param.numel(), TRACK=written is not None,
                DECAY_IS_TENSOR=isinstance(scale_decay, Tensor), BLOCK=BLOCK, num_warps=_NUM_WARPS,
            )  # fmt: skip
    torch.autograd.graph.increment_version(param)


@dataclass(frozen=True, eq=False)
class TensorTable:
    """A list of tensors in the form that one launch reads; made by ``moments_table`` and its likes.

    It holds its tensors, so their memory lives as long as the table: build it once for buffers that stay
    (state, parameters, buffers for rotated gradients and updates) and use it in every step. A tensor whose
    storage was replaced (``param.data = ...``) is found by ``is_current``; build a new table then.

    Cost: building takes a few microseconds a tensor on the host and one asynchronous copy of
    ``8 (2 + operands)`` bytes a tensor and 4 bytes a program; ``is_current`` some 0.1 microseconds a tensor.

    Attributes:
        kind: the launch it is for: "moments", "direction" or "write".
        operands: for each operand of the launch, one tensor a row.
        rows: int64 ``(tensors, 2 + operands)``: size, first program, addresses.
        owners: int32 ``(programs,)``: the row of each program.
        addresses: the operands' addresses when the table was built.
        aligned: every address is a multiple of 16 bytes.
    """

    kind: str
    operands: tuple[tuple[Tensor, ...], ...]
    rows: Tensor
    owners: Tensor
    addresses: tuple[tuple[int, ...], ...]
    aligned: bool

    def is_current(self) -> bool:
        """Whether all tensors still lie where they lay when the table was built."""
        return _addresses(self.operands) == self.addresses

    def is_for(self, *operands: Sequence[Tensor]) -> bool:
        """Whether the table is of exactly these memory ranges: one sequence an operand, in order."""
        sizes = [tensor.numel() for tensor in operands[0]] if operands else []
        return _addresses(operands) == self.addresses and sizes == [tensor.numel() for tensor in self.operands[0]]


def moments_table(
    grads: Sequence[Tensor],
    mean_grads: Sequence[Tensor],
    grad_sqs: Sequence[Tensor],
    *,
    displacements: Sequence[Tensor] | None = None,
    disp_sqs: Sequence[Tensor] | None = None,
    crosses: Sequence[Tensor] | None = None,
) -> TensorTable:
    """The table of ``fused_moments_many_``; the i-th tensors are the arguments of ``fused_moments_``.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: as ``fused_moments_``, if a list is empty or of another length, or for CUDA tensors
            under Triton's interpreter, which sees copies of them.
    """
    secant = _given(displacements=displacements, disp_sqs=disp_sqs, crosses=crosses)
    lists = [("grads", grads), ("mean_grads", mean_grads), ("grad_sqs", grad_sqs), *secant]
    for named in _named_rows(lists):
        _check_state(named, None, _TORCH_MOMENTS)
    return _build_table("moments", [tensors for _, tensors in lists])


def direction_table(
    outs: Sequence[Tensor],
    mean_grads: Sequence[Tensor],
    grad_sqs: Sequence[Tensor],
    *,
    disp_sqs: Sequence[Tensor] | None = None,
    crosses: Sequence[Tensor] | None = None,
    displacements: Sequence[Tensor] | None = None,
) -> TensorTable:
    """The table of ``fused_direction_many_``; the i-th tensors are the arguments of ``fused_direction_``.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: as ``moments_table``, or for ``displacements`` without the secant tensors.
    """
    secant = _given(disp_sqs=disp_sqs, crosses=crosses)
    if displacements is not None and not secant:
        raise ValueError("displacements need disp_sqs and crosses too, got None")
    advanced = [("displacements", displacements)] if displacements is not None else []
    lists = [("outs", outs), ("mean_grads", mean_grads), ("grad_sqs", grad_sqs), *secant, *advanced]
    for named in _named_rows(lists):
        _check_state(named, None, _TORCH_DIRECTION)
    return _build_table("direction", [tensors for _, tensors in lists])


def write_table(
    params: Sequence[Tensor], updates: Sequence[Tensor], *, written: Sequence[Tensor] | None = None
) -> TensorTable:
    """The table of ``fused_write_many_``; the i-th tensors are the arguments of ``fused_write_``.

    Raises:
        TypeError: if a dtype is not as for ``fused_write_``.
        ValueError: as ``moments_table``, or if the parameters have several dtypes.
    """
    lists = [("params", params), ("updates", updates), *([("written", written)] if written is not None else [])]
    for (name, param), *tensors in _named_rows(lists):
        _check_write(param, tensors, name)
        if param.dtype != params[0].dtype:
            raise ValueError(f"{name} must be {params[0].dtype} like params[0], got {param.dtype}; make two tables")
    return _build_table("write", [tensors for _, tensors in lists])


def fused_moments_many_(table: TensorTable, scalars: Tensor) -> Tensor | None:
    """``fused_moments_`` of every row of a table, in one launch (two for secant).

    Args:
        table: made by ``moments_table``.
        scalars: ``(5,)`` for all tensors, or ``(tensors, 5)``, see ``pack_scalars``.

    Returns:
        For secant ``(sum B, sum |C|)`` of every tensor, float32 ``(tensors, 2)``; None for innovation.

    Raises:
        TypeError: if ``scalars`` is not float32.
        ValueError: if the table is for another launch, or ``scalars`` has another shape or device.
    """
    _check_table(table, "moments")
    count = len(table.operands[0])
    _check_scalars(scalars, count, table.operands[0][0])
    device, programs = table.rows.device, len(table.owners)
    secant = len(table.operands) == 6
    partial = torch.empty((programs, 2), dtype=torch.float32, device=device) if secant else None
    sums = torch.empty((count, 2), dtype=torch.float32, device=device) if secant else None
    with launch.on_device(table.rows):
        if programs:
            _moments_many_kernel[(programs,)](
                table.rows, table.owners, scalars, _row_stride(scalars), scalars if partial is None else partial,
                SECANT=secant, ALIGNED=table.aligned, BLOCK=BLOCK, num_warps=_NUM_WARPS,
            )  # fmt: skip
        if secant:
            _sum_partials_kernel[(count,)](table.rows, partial, sums, OPERANDS=6, BLOCK=BLOCK, num_warps=_NUM_WARPS)
    return sums


def fused_direction_many_(
    table: TensorTable,
    scalars: Tensor,
    *,
    eps: float,
    max_update: float,
    beta2: float | None = None,
    sums: Tensor | None = None,
) -> None:
    """``fused_direction_`` of every row of a table, in one launch.

    Args:
        table: made by ``direction_table``.
        scalars: ``(5,)`` for all tensors, or ``(tensors, 5)``, see ``pack_scalars``.
        eps: added to ``sqrt(V)``.
        max_update: bound of the update before ``lr``.
        beta2: decay of the averages; needed for secant.
        sums: what ``fused_moments_many_`` returned for the same tensors; for secant.

    Raises:
        TypeError: if ``scalars`` or ``sums`` is not float32.
        ValueError: as ``fused_direction_``, if the table is for another launch, or ``sums`` is given
            without need or missing.
    """
    _check_table(table, "direction")
    first, count = table.operands[0][0], len(table.operands[0])
    secant, advance = len(table.operands) > 3, len(table.operands) == 6
    newest = _check_direction(eps, max_update, beta2, secant=secant, advance=advance)
    _check_scalars(scalars, count, first)
    if (sums is not None) != secant:
        raise ValueError(
            f"sums must be given exactly for secant tables, got {'a tensor' if sums is not None else None}"
        )
    if sums is not None:
        _check_sums(sums, (count, 2), first)
    if len(table.owners):
        with launch.on_device(table.rows):
            _direction_many_kernel[(len(table.owners),)](
                table.rows, table.owners, scalars, _row_stride(scalars), sums, newest, float(eps), float(max_update),
                SECANT=secant, ADVANCE=advance, ALIGNED=table.aligned, BLOCK=BLOCK, num_warps=_NUM_WARPS,
            )  # fmt: skip


def fused_write_many_(table: TensorTable, *, scale_decay: float | Tensor = 1.0) -> None:
    """``fused_write_`` of every row of a table, in one launch.

    Raises:
        TypeError: if a tensor ``scale_decay`` is not float32.
        ValueError: if the table is for another launch, or a tensor ``scale_decay`` has not one element.
    """
    _check_table(table, "write")
    params = table.operands[0]
    _check_decay(scale_decay, params[0])
    if len(table.owners):
        with launch.on_device(table.rows):
            _write_many_kernel[(len(table.owners),)](
                table.rows, table.owners, _decay_argument(scale_decay), TRACK=len(table.operands) == 3,
                DECAY_IS_TENSOR=isinstance(scale_decay, Tensor), DTYPE=_TRITON_DTYPES[params[0].dtype],
                ALIGNED=table.aligned, BLOCK=BLOCK, num_warps=_NUM_WARPS,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)


def _addresses(operands: Sequence[Sequence[Tensor]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in operands)


def _build_table(kind: str, operands: Sequence[Sequence[Tensor]]) -> TensorTable:
    device = operands[0][0].device
    _check_addressable(device)
    addresses = _addresses(operands)
    sizes = torch.tensor([tensor.numel() for tensor in operands[0]])
    programs = (sizes + BLOCK - 1) // BLOCK
    rows = torch.stack([sizes, programs.cumsum(0) - programs, *(torch.tensor(column) for column in addresses)], 1)
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), programs)
    return TensorTable(
        kind=kind,
        operands=tuple(tuple(tensors) for tensors in operands),
        rows=_to_device(rows, device),
        owners=_to_device(owners, device),
        addresses=addresses,
        aligned=all(address % _ALIGNMENT == 0 for column in addresses for address in column),
    )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _decay_argument(scale_decay: float | Tensor) -> Any:
    """A tensor or a float: an int would be compiled into the kernel."""
    return scale_decay if isinstance(scale_decay, Tensor) else float(scale_decay)


def _row_stride(scalars: Tensor) -> int:
    return len(SCALARS) if scalars.dim() == 2 else 0


def _given(**tensors: Any) -> list[tuple[str, Any]]:
    """The named tensors, or none if all are None."""
    missing = [name for name, value in tensors.items() if value is None]
    if missing and len(missing) < len(tensors):
        raise ValueError(f"{', '.join(tensors)} must be given together, got None for {', '.join(missing)}")
    return [] if missing else list(tensors.items())


def _named_rows(lists: Sequence[tuple[str, Sequence[Tensor]]]) -> list[list[tuple[str, Tensor]]]:
    """The i-th tensors of all lists, named; on one device."""
    (name, first), *others = lists
    if not first:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    for other, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{other} must hold {len(first)} tensors like {name}, got {len(tensors)}")
    for i, tensor in enumerate(first):
        if tensor.device != first[0].device:
            raise ValueError(f"{name}[{i}] must be on {first[0].device} like {name}[0], got {tensor.device}")
    return [[(f"{label}[{i}]", tensors[i]) for label, tensors in lists] for i in range(len(first))]


def _check_shapes(named: Sequence[tuple[str, Tensor]]) -> None:
    name, first = named[0]
    for other, tensor in named[1:]:
        if tensor.shape != first.shape:
            raise ValueError(f"{other} must have shape {tuple(first.shape)} like {name}, got {tuple(tensor.shape)}")


def _check_state(named: Sequence[tuple[str, Tensor]], scalars: Tensor | None, function: str) -> None:
    launch.check_tensors([*named, *([("scalars", scalars)] if scalars is not None else [])], _STATE_DTYPES, function)
    _check_shapes(named)


def _check_write(param: Tensor, tensors: Sequence[tuple[str, Tensor]], name: str = "param") -> None:
    launch.check_tensors([(name, param), *tensors], launch.INPUT_DTYPES, _TORCH_WRITE)
    launch.check_tensors(tensors, _STATE_DTYPES, _TORCH_WRITE)
    _check_shapes([(name, param), *tensors])


def _check_scalars(scalars: Tensor, tensors: int | None, beside: Tensor | None = None) -> None:
    """Checks the shape of ``scalars``, and for a list of ``tensors`` the rest too."""
    width = len(SCALARS)
    if beside is not None:
        launch.check_tensors([("scalars", scalars)], _STATE_DTYPES, _TORCH_DIRECTION)
        if scalars.device != beside.device:
            raise ValueError(f"scalars must be on {beside.device} like the tensors, got {scalars.device}")
    if scalars.shape != (width,) and (tensors is None or scalars.shape != (tensors, width)):
        rows = "" if tensors is None else f" or ({tensors}, {width})"
        raise ValueError(f"scalars must have shape ({width},){rows}, {', '.join(SCALARS)}, got {tuple(scalars.shape)}")


def _check_sums(sums: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    launch.check_tensors([("out", beside), ("sums", sums)], _STATE_DTYPES, _TORCH_DIRECTION)
    if sums.shape != shape:
        raise ValueError(f"sums must have shape {shape}, the sums of B and |C|, got {tuple(sums.shape)}")


def _check_direction(eps: float, max_update: float, beta2: float | None, *, secant: bool, advance: bool) -> float:
    """Checks the numbers of a direction; returns ``1 - beta2``, 0 without need."""
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if not max_update > 0.0:
        raise ValueError(f"max_update must be > 0, got {max_update}")
    if not secant:
        if advance:
            raise ValueError("displacement needs disp_sq, cross and sums too, got None")
        return 0.0
    if beta2 is None or not 0.0 <= beta2 < 1.0:
        raise ValueError(f"beta2 must be in [0, 1) for secant, got {beta2}")
    return 1.0 - beta2


def _check_decay(scale_decay: float | Tensor, beside: Tensor) -> None:
    if not isinstance(scale_decay, Tensor):
        return
    launch.check_tensors([("scale_decay", scale_decay)], _STATE_DTYPES, _TORCH_WRITE)
    if scale_decay.numel() != 1 or scale_decay.device != beside.device:
        raise ValueError(
            f"scale_decay must have one element on {beside.device}, got shape {tuple(scale_decay.shape)} "
            f"on {scale_decay.device}"
        )


def _check_table(table: TensorTable, kind: str) -> None:
    if table.kind != kind:
        raise ValueError(f"table must be made by {kind}_table, got one made by {table.kind}_table")


def _check_addressable(device: torch.device) -> None:
    """The interpreter works on host copies of CUDA tensors, whose addresses no table knows."""
    if device.type == "cuda" and launch.is_interpreting():
        raise ValueError(f"a table cannot be used on {device} under TRITON_INTERPRET=1; unset it or use CPU tensors")

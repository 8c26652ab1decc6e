"""The write of an update to the parameters of a list, one launch, with decoupled decay and rounding.

Formula. ``theta <- round(theta (1 - lr weight_decay) + update)``, ``written <- the change of theta``, in
float32 and rounded once: to nearest, ties to even, or stochastically. Stochastic rounding of float32 to
bfloat16 adds random bits to the 16 that are cut off, so the expected value is exact:

    bits <- (bits(x) + (random & 0xFFFF)) & 0xFFFF0000           (infinities and NaN stay what they are)
    random = mix(mix(index ^ mix(mix(seed) ^ stream)) ^ step 0x9E3779B1)    all modulo 2**32

a counter-based stream like that of ``butterfly_opt.sketch``, ``mix`` its hash: the same on every device.

Where the scalars of a tensor say that its gradient is not usable, the parameter is left alone, decay
included, and ``written`` is 0.

Layout. Any shape, contiguous; a program holds BLOCK elements. The lists are tables, see ``table.py``.

Dtypes. Parameters float32, bfloat16 or float16, of one dtype a list; updates and arithmetic float32, no
fused multiply-add, so the result does not depend on the device. Stochastic rounding: bfloat16.

Cost, bytes a coordinate (``write_bytes``): theta read and written, the update read, 12 (2-byte parameters 8), 4
more for ``written``; some 20 integer operations for a random number, hidden behind the memory.
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
    check_launch,
    check_lists,
    every_element,
    find_operand,
    find_tensor,
    is_usable,
)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TORCH_WRITE = "butterfly_opt.batch.write_one"


@triton.jit
def _mix(bits):
    """``butterfly_opt.sketch._mix``, in uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _round(x, random, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``x`` in ``dtype``: the nearest value, ties to even, or one of the two around it with the bits of ``random``."""
    if dtype == tl.bfloat16:
        # The interpreter's own cast to bfloat16 truncates, so both roundings are spelled out.
        bits = x.to(tl.uint32, bitcast=True)
        above = random & 0xFFFF if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1)
        rounded = ((bits + above) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x.to(dtype)


@triton.jit
def _write_block(param_ptr, update_ptr, written_ptr, scalars_ptr, weight_decay, key, offsets, mask,
                 TRACK: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """``write_`` of one block."""
    usable = is_usable(scalars_ptr, offsets.shape[0])
    decay = 1.0 - tl.load(scalars_ptr + 4) * weight_decay
    before = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + offsets, mask=mask, other=0.0)
    random = tl.full((1,), 0, tl.uint32)
    if STOCHASTIC:
        # Two rounds with the step between them: neighbouring steps share no pattern.
        step = tl.load(scalars_ptr + 3).to(tl.int64).to(tl.uint32)
        random = _mix(_mix(offsets.to(tl.uint32) ^ key) ^ (step * 0x9E3779B1))
    after = _round(before * decay + update, random, param_ptr.dtype.element_ty, STOCHASTIC)
    tl.store(param_ptr + offsets, after, mask=mask & usable)
    if TRACK:
        tl.store(written_ptr + offsets, tl.where(usable, after.to(tl.float32) - before, 0.0), mask=mask)


@triton.jit(do_not_specialize=["seed"])
def _write_kernel(rows_ptr, owners_ptr, scalars_ptr, weight_decay, seed, TRACK: tl.constexpr,
                  STOCHASTIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    _, row_ptr, scalars_ptr, size, start = find_tensor(rows_ptr, owners_ptr, scalars_ptr, 3 if TRACK else 2, BLOCK)
    param_ptr = find_operand(row_ptr, 0, ALIGNED, DTYPE)
    update_ptr = find_operand(row_ptr, 1, ALIGNED, tl.float32)
    written_ptr = find_operand(row_ptr, 2 if TRACK else 1, ALIGNED, tl.float32)
    key = _mix(_mix(seed.to(tl.uint32)) ^ tl.load(row_ptr + 2).to(tl.uint32))
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _write_block(param_ptr, update_ptr, written_ptr, scalars_ptr, weight_decay, key, offsets,
                     every_element(BLOCK), TRACK, STOCHASTIC)  # fmt: skip
    else:
        _write_block(param_ptr, update_ptr, written_ptr, scalars_ptr, weight_decay, key, offsets, offsets < size,
                     TRACK, STOCHASTIC)  # fmt: skip


def write_bytes(dtype: torch.dtype, *, track: bool = False) -> int:
    """Bytes a coordinate that ``write_`` moves for parameters of ``dtype``, with ``written`` if ``track``."""
    return 2 * dtype.itemsize + 4 + 4 * track


def write_table(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    written: Sequence[Tensor] | None = None,
    streams: Sequence[int] | None = None,
) -> TensorTable:
    """The table of ``write_``: the parameters of a list and their updates.

    Args:
        params: float32, bfloat16 or float16, all of one dtype.
        updates: float32, to be added.
        written: receive the changes of the parameters after rounding, float32.
        streams: numbers that distinguish the parameters in stochastic rounding.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if a list is empty or of another length, shapes or devices differ, the parameters have
            several dtypes, a tensor is not contiguous, the kernels cannot run on the device, or for CUDA
            tensors under Triton's interpreter, which sees copies of them.
    """
    lists = [("params", params), ("updates", updates), *([("written", written)] if written is not None else [])]
    check_lists(lists, [launch.INPUT_DTYPES, *[STATE_DTYPES] * (len(lists) - 1)], _TORCH_WRITE)
    for i, param in enumerate(params):
        if param.dtype != params[0].dtype:
            raise ValueError(
                f"params[{i}] must be {params[0].dtype} like params[0], got {param.dtype}; make two tables"
            )
    return build_table("write", [tensors for _, tensors in lists], streams)


def write_(table: TensorTable, scalars: Tensor, *, weight_decay: float = 0.0, rounding_seed: int | None = None) -> None:
    """``theta <- theta (1 - lr weight_decay) + update`` for every parameter of a table, in one launch.

    Equals ``butterfly_opt.batch.write_one``.

    Args:
        table: made by ``write_table``.
        scalars: float32 ``(tensors, 6)``, see ``table.SCALARS``; the step is read for stochastic rounding.
        weight_decay: decoupled decay.
        rounding_seed: rounds stochastically with this seed; to nearest if None.

    Raises:
        TypeError: if ``scalars`` is not float32, or for stochastic rounding of parameters that are not bfloat16.
        ValueError: if the table is for another launch, shape, device or contiguity of ``scalars`` is wrong,
            ``weight_decay`` is not >= 0, or stochastic rounding finds no ``streams`` in the table.
    """
    check_launch(table, "write", scalars, _TORCH_WRITE)
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    params = table.operands[0]
    if rounding_seed is not None and params[0].dtype != torch.bfloat16:
        raise TypeError(f"stochastic rounding needs bfloat16 parameters, got {params[0].dtype}; set rounding_seed=None")
    if rounding_seed is not None and table.streams is None:
        raise ValueError(f"rounding_seed = {rounding_seed} needs a table with streams, got None")
    if len(table.owners):
        with launch.on_device(table.rows):
            _write_kernel[(len(table.owners),)](
                table.rows, table.owners, scalars, float(weight_decay), (rounding_seed or 0) & 0xFFFFFFFF,
                TRACK=len(table.operands) == 3, STOCHASTIC=rounding_seed is not None,
                DTYPE=_TRITON_DTYPES[params[0].dtype], ALIGNED=table.aligned, BLOCK=BLOCK, num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)

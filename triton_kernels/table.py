"""Lists of tensors for one launch: a device table of their addresses, and how a program finds its part.

Layout. Row t of the table is int64 ``(size, first program, stream, address of each operand)``; program p
holds the elements ``[(p - first program) BLOCK, ...)`` of tensor ``owners[p]``. A single tensor is a list
of one. The tables work in Triton's interpreter too, on CPU tensors.

Numbers that change from step to step come from device memory, ``scalars``, float32 ``(tensors, 6)``: no
new compilation, no host value, and a captured CUDA graph reads their newest values.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

SCALARS = ("mean_weight", "grad_weight", "pair_weight", "step", "lr", "usable")
"""A row of ``scalars``: the weights a, b, b' of the new values, the steps so far including this one, the
learning rate, and 1, or 0 where the gradient is not finite: the step then leaves the tensor alone."""

BLOCK = 2048
"""Elements a program: 8 a lane of 8 warps, two 16-byte accesses."""

NUM_WARPS = 8

STATE_DTYPES = frozenset({torch.float32})

_ALIGNMENT = 16
_WIDTH = tl.constexpr(len(SCALARS))
_BASE = tl.constexpr(1 << 62)
"""Added to a number so that its type is int64 whatever its size: one compilation for all."""


@triton.jit
def find_tensor(rows_ptr, owners_ptr, scalars_ptr, OPERANDS: tl.constexpr, BLOCK: tl.constexpr):
    """The tensor of this program, its row of the table, its scalars, its size, and where its block starts."""
    program = tl.program_id(0)
    tensor = tl.load(owners_ptr + program).to(tl.int64)
    row_ptr = rows_ptr + tensor * (3 + OPERANDS)
    start = (program - tl.load(row_ptr + 1)) * BLOCK
    return tensor, row_ptr, scalars_ptr + tensor * _WIDTH, tl.load(row_ptr), start


@triton.jit
def find_operand(row_ptr, INDEX: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to an operand of a row."""
    pointer = tl.load(row_ptr + 3 + INDEX).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def every_element(BLOCK: tl.constexpr):
    """The mask of a full block: a constant, so that accesses are 16 bytes wide whatever the size."""
    return tl.full((BLOCK,), 1, tl.int32) != 0


@triton.jit
def is_usable(scalars_ptr, BLOCK: tl.constexpr):
    """Whether the gradient of this tensor is usable, one value for each element of a block."""
    # Spread before it is compared: the interpreter cannot combine a single truth value with a mask.
    return tl.zeros((BLOCK,), tl.float32) + tl.load(scalars_ptr + 5) != 0


@triton.jit
def _put(out_ptr, count, value, INDEX: tl.constexpr):
    tl.store(out_ptr + INDEX, value - _BASE, mask=count > INDEX)


@triton.jit(do_not_specialize=["count", "a", "b", "c", "d", "e", "f", "g", "h"])
def _fill_kernel(out_ptr, count, a, b, c, d, e, f, g, h):
    """Writes up to eight of its own arguments, each given with ``_BASE`` added."""
    _put(out_ptr, count, a, 0)
    _put(out_ptr, count, b, 1)
    _put(out_ptr, count, c, 2)
    _put(out_ptr, count, d, 3)
    _put(out_ptr, count, e, 4)
    _put(out_ptr, count, f, 5)
    _put(out_ptr, count, g, 6)
    _put(out_ptr, count, h, 7)


@dataclass(frozen=True, eq=False)
class TensorTable:
    """A list of tensors in the form that one launch reads; made by ``moments_table`` and its likes.

    It holds its tensors, so their memory lives as long as the table: build it once for buffers that stay
    (state, parameters, buffers for rotated gradients and updates) and use it in every step. A tensor whose
    storage was replaced (``param.data = ...``) is found by ``is_current``; build a new table then.

    It may be built while a CUDA graph is captured: the graph then holds its numbers, and must not outlive its
    tensors.

    Cost: building takes a few microseconds a tensor on the host, one asynchronous copy of ``8 (3 + operands)``
    bytes a tensor and a few small launches; ``is_current`` some 0.1 microseconds a tensor.

    Attributes:
        kind: the launch it is for: "moments", "direction" or "write".
        operands: for each operand of the launch, one tensor a row.
        streams: random stream of each row, if the launch draws numbers.
        rows: int64 ``(tensors, 3 + operands)``: size, first program, stream, addresses.
        owners: int32 ``(programs,)``: the row of each program.
        addresses: the operands' addresses when the table was built.
        aligned: every address is a multiple of 16 bytes.
    """

    kind: str
    operands: tuple[tuple[Tensor, ...], ...]
    streams: tuple[int, ...] | None
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


def build_table(kind: str, operands: Sequence[Sequence[Tensor]], streams: Sequence[int] | None = None) -> TensorTable:
    """The table of checked operands.

    Raises:
        ValueError: for CUDA tensors under Triton's interpreter, which sees copies of them, or if
            ``streams`` are not one a tensor.
    """
    device = operands[0][0].device
    if device.type == "cuda" and launch.is_interpreting():
        raise ValueError(f"a table cannot be used on {device} under TRITON_INTERPRET=1; unset it or use CPU tensors")
    if streams is not None and len(streams) != len(operands[0]):
        raise ValueError(f"streams must hold one number for each of {len(operands[0])} tensors, got {len(streams)}")
    addresses = _addresses(operands)
    sizes = [tensor.numel() for tensor in operands[0]]
    programs = [-(-size // BLOCK) for size in sizes]
    firsts = itertools.accumulate(programs[:-1], initial=0)
    numbers = zip(sizes, firsts, streams or [0] * len(sizes), *addresses, strict=True)
    rows = _to_device(list(itertools.chain.from_iterable(numbers)), device).view(len(sizes), -1)
    owners = torch.repeat_interleave(
        torch.arange(len(sizes), dtype=torch.int32, device=device),
        (rows[:, 0] + (BLOCK - 1)) // BLOCK,
        output_size=sum(programs),
    )
    return TensorTable(
        kind=kind,
        operands=tuple(tuple(tensors) for tensors in operands),
        streams=tuple(streams) if streams is not None else None,
        rows=rows,
        owners=owners,
        addresses=addresses,
        aligned=all(address % _ALIGNMENT == 0 for column in addresses for address in column),
    )


def check_lists(
    lists: Sequence[tuple[str, Sequence[Tensor]]], dtypes: Sequence[frozenset[torch.dtype]], function: str
) -> None:
    """Checks the operands of a table; ``dtypes`` allows some for each list, ``function`` is the torch equivalent.

    Raises:
        TypeError: if a dtype is not allowed.
        ValueError: if a list is empty, of another length than the first, or its i-th tensor of another shape; if
            a tensor is not on the device of the first, not where kernels can run, or not contiguous.
    """
    name, first = lists[0]
    if not first:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    device = first[0].device
    for (other, tensors), allowed in zip(lists, dtypes, strict=True):
        if len(tensors) != len(first):
            raise ValueError(f"{other} must hold {len(first)} tensors like {name}, got {len(tensors)}")
        for i, (tensor, like) in enumerate(zip(tensors, first, strict=True)):
            if tensor.shape != like.shape:
                raise ValueError(
                    f"{other}[{i}] must have shape {tuple(like.shape)} like {name}[{i}], got {tuple(tensor.shape)}"
                )
            # Lists are long and checked in every step: names are made only for what fails.
            if tensor.dtype not in allowed or tensor.device != device or not tensor.is_contiguous():
                launch.check_tensors([(f"{other}[{i}]", tensor)], allowed, function)
                raise ValueError(f"{other}[{i}] must be on {device} like {name}[0], got {tensor.device}")
    launch.check_tensors([(f"{name}[0]", first[0])], dtypes[0], function)


def given_lists(**lists: Any) -> list[tuple[str, Any]]:
    """The named lists, or none if all are None.

    Raises:
        ValueError: if only some are None.
    """
    missing = [name for name, value in lists.items() if value is None]
    if missing and len(missing) < len(lists):
        raise ValueError(f"{', '.join(lists)} must be given together, got None for {', '.join(missing)}")
    return [] if missing else list(lists.items())


def check_launch(table: TensorTable, kind: str, scalars: Tensor, function: str) -> None:
    """Checks that the table is for this launch and ``scalars`` have a row for each of its tensors.

    Raises:
        TypeError: if ``scalars`` is not float32.
        ValueError: if the table is of another kind, or shape, device or contiguity of ``scalars`` is wrong.
    """
    if table.kind != kind:
        raise ValueError(f"table must be made by {kind}_table, got one made by {table.kind}_table")
    check_beside(table, "scalars", scalars, (len(table.operands[0]), len(SCALARS)), ", ".join(SCALARS), function)


def check_beside(
    table: TensorTable, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str, function: str
) -> None:
    """Checks a float32 tensor with a row for each tensor of a table.

    Raises:
        TypeError: if it is not float32.
        ValueError: if its shape, device or contiguity is wrong.
    """
    launch.check_tensors([(name, tensor)], STATE_DTYPES, function)
    if tensor.device != table.rows.device:
        raise ValueError(f"{name} must be on {table.rows.device} like the tensors of the table, got {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, {meaning}, got {tuple(tensor.shape)}")


def _to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers, without waiting for the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _fill(numbers, device)
    host = torch.tensor(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _fill(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers as arguments of kernels, which a CUDA graph keeps: host memory it would read again later."""
    filled = torch.empty(len(numbers), dtype=torch.int64, device=device)
    based = [number + _BASE.value for number in numbers]
    based += [_BASE.value] * (-len(based) % 8)
    with launch.on_device(filled):
        for start in range(0, len(based), 8):
            _fill_kernel[(1,)](filled[start:], len(numbers) - start, *based[start : start + 8])
    return filled


def _addresses(operands: Sequence[Sequence[Tensor]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in operands)

"""Butterfly rotation and its angle gradient, fused: the stages of a pass happen on chip.

Formula. With the stages of ``butterfly_opt.rotation`` (stage l turns the pairs ``(i, i + 2**l)`` by
``G(t) = [[cos t, -sin t], [sin t, cos t]]``), ``rotate_columns`` computes ``Q x`` or ``Q^T x`` along
``n`` and ``angle_gradient`` the sums ``dL/dt = sum grad_lo * hi - grad_hi * lo`` at each stage's output.

Layout. Tensors are contiguous ``(batch, pre, n, post)``, or ``(pre, n, post)`` where the angles have
no batch: rows of a matrix are ``(rows, n, 1)``, columns ``(1, n, columns)``. Angles are given as
``cos`` and ``sin``, ``(batch, depth, stages, n // 2)``; pair p of a stage reads slot p. A program
holds a tile ``(group, middle, run)``, see ``launch.py``, and brings the partners of a stage together
by reshape, permute and split, so any stage sees both in one lane.

Dtypes. float32, bfloat16 and float16 in; arithmetic, result and sums float32. float64 is for torch.

Cost. A pass moves 8 bytes a float32 element, whatever the number of its stages. There is one pass up
to n = 8192 for rows and 2048 for columns (all ``depth`` butterflies in it), two for most longer axes,
``depth`` times. Profitable from some 2**16 elements; below, one launch is all that counts. Results
do not depend on the run: no atomics, each sum has one order.
"""

from collections.abc import Sequence
from typing import Any, overload

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .stages import pair_count, part, positions, residual, turn, unite

_TORCH_ROTATE = "butterfly_opt.rotation.rotate"
_TORCH_GRADIENT = "butterfly_opt.rotation.angle_gradient"


@triton.jit
def _turn_stage(x0, x1, x2, cos_ptr, sin_ptr, slots, n, table, TENSORS: tl.constexpr, FIRST: tl.constexpr,
                STAGES: tl.constexpr, LOCAL: tl.constexpr, TRANSPOSE: tl.constexpr, GROUP: tl.constexpr,
                RUN: tl.constexpr):  # fmt: skip
    """Stage ``FIRST + LOCAL`` of up to three tiles; ``table`` is the first stage's row of the angles."""
    row = table + (FIRST + LOCAL) * (n // 2)
    used = slots < pair_count(n, FIRST + LOCAL)
    cos = tl.load(cos_ptr + row + slots, mask=used, other=1.0)
    sin = tl.load(sin_ptr + row + slots, mask=used, other=0.0)
    if TRANSPOSE:
        sin = -sin
    x0 = turn(x0, cos, sin, GROUP, 1 << STAGES, RUN, 1 << LOCAL)
    if TENSORS > 1:
        x1 = turn(x1, cos, sin, GROUP, 1 << STAGES, RUN, 1 << LOCAL)
    if TENSORS > 2:
        x2 = turn(x2, cos, sin, GROUP, 1 << STAGES, RUN, 1 << LOCAL)
    return x0, x1, x2


@triton.jit
def _rotate_kernel(in0_ptr, in1_ptr, in2_ptr, out0_ptr, out1_ptr, out2_ptr, cos_ptr, sin_ptr, n, pre, post, items,
                   pre_items, high_blocks, low_blocks, depth, first_butterfly, butterflies, stages,
                   TENSORS: tl.constexpr, TRANSPOSE: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr,
                   GROUP: tl.constexpr, RUN: tl.constexpr, SHARED_HIGH: tl.constexpr,
                   SHARED_LOW: tl.constexpr):  # fmt: skip
    """Stages ``[FIRST, FIRST + STAGES)`` of ``butterflies`` butterflies of one tile; ``out`` may be ``in``."""
    program = tl.program_id(0)
    item = program % items
    block = (program // items) % (high_blocks * low_blocks)
    batch = (program // items // (high_blocks * low_blocks)).to(tl.int64)
    offsets, mask, slots = positions(
        block, item, n, pre, post, pre_items, low_blocks, FIRST, STAGES, GROUP, RUN, SHARED_HIGH, SHARED_LOW
    )
    offsets += batch * pre * n * post
    x0 = tl.load(in0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x1 = x0
    x2 = x0
    if TENSORS > 1:
        x1 = tl.load(in1_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if TENSORS > 2:
        x2 = tl.load(in2_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for step in range(butterflies):
        butterfly = first_butterfly + (step if TRANSPOSE else butterflies - 1 - step)
        table = (batch * depth + butterfly) * stages * (n // 2)
        for k in tl.static_range(STAGES):
            x0, x1, x2 = _turn_stage(
                x0, x1, x2, cos_ptr, sin_ptr, slots, n, table, TENSORS, FIRST, STAGES,
                k if TRANSPOSE else STAGES - 1 - k, TRANSPOSE, GROUP, RUN
            )  # fmt: skip
    tl.store(out0_ptr + offsets, x0, mask=mask)
    if TENSORS > 1:
        tl.store(out1_ptr + offsets, x1, mask=mask)
    if TENSORS > 2:
        tl.store(out2_ptr + offsets, x2, mask=mask)


@triton.jit
def _gradient_stage(u, g, cos_ptr, sin_ptr, partial_ptr, slots, n, table, sums, earlier, FIRST: tl.constexpr,
                    STAGES: tl.constexpr, LOCAL: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
                    SHARED_HIGH: tl.constexpr, SHARED_LOW: tl.constexpr):  # fmt: skip
    """Adds the moments of one stage to this program's sums, then undoes the stage."""
    MIDDLE: tl.constexpr = 1 << STAGES
    half = n // 2
    used = slots < pair_count(n, FIRST + LOCAL)
    row = table + (FIRST + LOCAL) * half
    cos = tl.load(cos_ptr + row + slots, mask=used, other=1.0)
    sin = tl.load(sin_ptr + row + slots, mask=used, other=0.0)
    u_lo, u_hi = part(u, GROUP, MIDDLE, RUN, 1 << LOCAL)
    g_lo, g_hi = part(g, GROUP, MIDDLE, RUN, 1 << LOCAL)
    moment = g_lo * u_hi - g_hi * u_lo
    if SHARED_LOW:
        moment = tl.sum(moment, axis=2, keep_dims=True)
    if SHARED_HIGH:
        moment = tl.sum(moment, axis=0, keep_dims=True)
    target = partial_ptr + sums + LOCAL * half + slots
    moment += tl.load(target, mask=used & earlier, other=0.0)
    # Slots without a pair get their zero here: the workspace is not cleared beforehand.
    tl.store(target, tl.where(used, moment, 0.0), mask=slots < half)
    u = unite(cos * u_lo - sin * u_hi, sin * u_lo + cos * u_hi, GROUP, MIDDLE, RUN, 1 << LOCAL)
    g = unite(cos * g_lo - sin * g_hi, sin * g_lo + cos * g_hi, GROUP, MIDDLE, RUN, 1 << LOCAL)
    return u, g


@triton.jit
def _gradient_kernel(u_ptr, g_ptr, u_out_ptr, g_out_ptr, cos_ptr, sin_ptr, partial_ptr, n, pre, post, items,
                     pre_items, high_blocks, low_blocks, workers, batches, depth, first_butterfly, butterflies, stages,
                     RESIDUAL: tl.constexpr, STORE_U: tl.constexpr, STORE_G: tl.constexpr, FIRST: tl.constexpr,
                     STAGES: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, SHARED_HIGH: tl.constexpr,
                     SHARED_LOW: tl.constexpr):  # fmt: skip
    """Partial sums ``(workers, batch, butterflies, STAGES, n // 2)``; worker w takes items w, w + workers, ..."""
    program = tl.program_id(0)
    worker = program % workers
    block = (program // workers) % (high_blocks * low_blocks)
    batch = (program // workers // (high_blocks * low_blocks)).to(tl.int64)
    for item in range(worker, items, workers):
        earlier = tl.full((1, 1, 1), 0, tl.int32) + item > worker
        offsets, mask, slots = positions(
            block, item, n, pre, post, pre_items, low_blocks, FIRST, STAGES, GROUP, RUN, SHARED_HIGH, SHARED_LOW
        )
        offsets += batch * pre * n * post
        u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = residual(u, post, SHARED_LOW) if RESIDUAL else tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        for step in range(butterflies):
            butterfly = butterflies - 1 - step
            table = (batch * depth + first_butterfly + butterfly) * stages * (n // 2)
            sums = ((worker * batches + batch) * butterflies + butterfly) * STAGES * (n // 2)
            for k in tl.static_range(STAGES):
                u, g = _gradient_stage(
                    u, g, cos_ptr, sin_ptr, partial_ptr, slots, n, table, sums, earlier, FIRST, STAGES,
                    STAGES - 1 - k, GROUP, RUN, SHARED_HIGH, SHARED_LOW
                )  # fmt: skip
        if STORE_U:
            tl.store(u_out_ptr + offsets, u, mask=mask)
        if STORE_G:
            tl.store(g_out_ptr + offsets, g, mask=mask)
        # The next item adds to sums that another lane of this program may have written.
        tl.debug_barrier()


def can_use_rotate(columns: Tensor, cos: Tensor) -> bool:
    """Whether the kernels take these tensors: dtypes, device, contiguity and matching shapes."""
    try:
        launch.check_rotation([("columns", columns)], cos, cos, _TORCH_ROTATE)
    except (TypeError, ValueError):
        return False
    return True


@overload
def rotate_columns(
    columns: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    transpose: bool = ...,
    out: Tensor | None = ...,
    max_tile: int = ...,
) -> Tensor: ...


@overload
def rotate_columns(
    columns: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    transpose: bool = ...,
    out: Sequence[Tensor] | None = ...,
    max_tile: int = ...,
) -> list[Tensor]: ...


def rotate_columns(
    columns: Tensor | Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    transpose: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
    max_tile: int = launch.MAX_TILE,
) -> Tensor | list[Tensor]:
    """Computes ``Q x``, or ``Q^T x`` with ``transpose``; equals ``butterfly_opt.rotation.rotate``.

    Args:
        columns: ``(pre, n, post)``, contiguous, float32, bfloat16 or float16; or several of one shape,
            which are turned together (three at a time) by one read of the angles.
        cos: cosines of the angles ``(depth, stages, n // 2)``, float32; with a leading ``batch``,
            ``columns`` is ``(batch, pre, n, post)``, or ``(batch, n, post)`` for ``pre = 1``.
        sin: sines, the shape of ``cos``.
        transpose: apply the inverse ``Q^T``.
        out: float32 tensors that receive the result, the shape of ``columns``. They may be
            ``columns`` themselves, which rotates in place, but must not overlap them otherwise.
        max_tile: elements a program may hold, a power of two >= 16; smaller means more passes.

    Returns:
        ``out``, or new float32 tensors of the shape of ``columns``: a list where a sequence was given.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: if shapes do not belong together, a tensor is not contiguous, devices differ, the
            kernels cannot run on the device, or ``max_tile`` is no power of two >= 16.
    """
    inputs = [columns] if isinstance(columns, Tensor) else list(columns)
    if not inputs:
        return []
    named = [("columns" if isinstance(columns, Tensor) else f"columns[{i}]", x) for i, x in enumerate(inputs)]
    shape = launch.check_rotation(named, cos, sin, _TORCH_ROTATE)
    if out is None:
        outputs = [torch.empty_like(x, dtype=torch.float32) for x in inputs]
    else:
        outputs = [out] if isinstance(out, Tensor) else list(out)
        launch.check_out(outputs, inputs)
    passes = launch.stage_passes(cos.shape[-2], post=max(shape[3], 1), max_tile=max_tile)
    if not passes or not cos.shape[-3] or not inputs[0].numel():
        for result, x in zip(outputs, inputs, strict=True):
            result.copy_(x)
    else:
        with launch.on_device(inputs[0]):
            _rotate(inputs, outputs, cos, sin, shape, passes, transpose, max_tile)
    return outputs[0] if isinstance(columns, Tensor) else outputs


def angle_gradient(
    u: Tensor,
    grad_u: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    out_input_gradient: Tensor | None = None,
    max_tile: int = launch.MAX_TILE,
) -> Tensor:
    """Gradient of a loss of ``u = Q^T y`` for the angles; equals ``butterfly_opt.rotation.angle_gradient``.

    Args:
        u: rotated tensor, laid out as ``columns`` of ``rotate_columns``.
        grad_u: ``dL/du``, the shape of ``u``.
        cos: cosines of the angles, as for ``rotate_columns``.
        sin: sines, the shape of ``cos``.
        out_input_gradient: float32 tensor of the shape of ``u`` that receives ``dL/dy = Q grad_u``,
            which costs nothing but its write. It may be ``grad_u`` itself, and overlap no other.
        max_tile: elements a program may hold, a power of two >= 16; smaller means more passes.

    Returns:
        ``dL/dangles``, float32, the shape of ``cos``, summed over ``pre`` and ``post`` in an order
        fixed by the shapes. Unused slots are zero.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: as for ``rotate_columns``.

    Cost: ``u`` and ``grad_u`` are read once a pass, and written between passes; the partial sums need
    one copy of a pass's angles for each of the programs that share an angle, at most some 500 programs
    in all.
    """
    shape = launch.check_rotation([("u", u), ("grad_u", grad_u)], cos, sin, _TORCH_GRADIENT)
    if out_input_gradient is not None:
        launch.check_out([out_input_gradient], [u])
    passes = launch.stage_passes(cos.shape[-2], post=max(shape[3], 1), max_tile=max_tile)
    if not passes or not cos.shape[-3] or not u.numel():
        if out_input_gradient is not None:
            out_input_gradient.copy_(grad_u)
        return torch.zeros_like(cos)
    with launch.on_device(u):
        return _angle_gradient(u, grad_u, cos, sin, out_input_gradient, shape, passes, max_tile)


def residual_gradient(u: Tensor, cos: Tensor, sin: Tensor, *, max_tile: int = launch.MAX_TILE) -> Tensor:
    """``angle_gradient`` of the one-sided criterion, ``dL/du`` made on chip by the first of its passes.

    Equals ``butterfly_opt.rotation.angle_gradient`` of ``butterfly_opt.refit.one_sided_residual(u)``.

    Args:
        u: rotated sketch ``(n, k)``, float32, k <= 8: a tile holds all columns of its rows.
        cos: cosines of the angles ``(depth, stages, n // 2)``, float32.
        sin: sines, the shape of ``cos``.
        max_tile: elements a program may hold, a power of two >= 32; smaller means more passes.

    Returns:
        ``dL/dangles``, as ``angle_gradient``.

    Raises:
        TypeError: if a dtype is not as above.
        ValueError: as ``angle_gradient``, or for more than 8 columns.
    """
    shape = launch.check_rotation([("u", u[None])], cos, sin, _TORCH_GRADIENT)
    if shape[3] > launch.SECTOR:
        raise ValueError(f"u must have at most {launch.SECTOR} columns, got shape {tuple(u.shape)}")
    # Of tiles half as large, in which a pass leaves room for all columns.
    passes = launch.stage_passes(cos.shape[-2], post=max(shape[3], 1), max_tile=max_tile // 2)
    if not passes or not cos.shape[-3] or not u.numel():
        return torch.zeros_like(cos)
    with launch.on_device(u):
        return _angle_gradient(u, None, cos, sin, None, shape, passes, max_tile)


def _rotate(
    inputs: list[Tensor],
    outputs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    shape: tuple[int, int, int, int],
    passes: list[range],
    transpose: bool,
    max_tile: int,
) -> None:
    """Runs the passes; the first reads ``inputs``, the others work in place on ``outputs``."""
    batch, pre, n, post = shape
    depth, stages = cos.shape[-3:-1]
    for index, (butterfly, butterflies, used) in enumerate(_order(passes, depth, transpose)):
        sources = outputs if index else inputs
        tile = launch.choose_tile(shape, used, max_tile=max_tile)
        together = launch.tensors_per_launch(tile.elements, max_tile=max_tile)
        for start in range(0, len(inputs), together):
            source, target = sources[start : start + together], outputs[start : start + together]
            filler = [source[0]] * (launch.MAX_TOGETHER - len(source))
            _rotate_kernel[(batch * tile.high_blocks * tile.low_blocks * tile.items,)](
                *source, *filler, *target, *filler, cos, sin, n, pre, post, tile.items, tile.items // tile.run_blocks,
                tile.high_blocks, tile.low_blocks, depth, butterfly, butterflies, stages, TENSORS=len(source),
                TRANSPOSE=transpose, **_tile_options(tile, used, len(source)),
            )  # fmt: skip


def _angle_gradient(
    u: Tensor,
    grad_u: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor | None,
    shape: tuple[int, int, int, int],
    passes: list[range],
    max_tile: int,
) -> Tensor:
    """Runs the passes of ``Q`` and sums each one's partial sums; without ``grad_u`` the first makes the residual."""
    batch, pre, n, post = shape
    depth, stages = cos.shape[-3:-1]
    gradient = torch.empty_like(cos)
    view = gradient.view(batch, depth, stages, n // 2)
    launches = _order(passes, depth, transpose=False)
    several = len(launches) > 1
    u_next = torch.empty_like(u, dtype=torch.float32) if several else u
    g_first = u if grad_u is None else grad_u
    g_next = out if out is not None else torch.empty_like(u, dtype=torch.float32) if several else g_first
    for index, (butterfly, butterflies, used) in enumerate(launches):
        last = index == len(launches) - 1
        tile = launch.choose_tile(shape, used, reduces=True, max_tile=max_tile)
        workers = launch.choose_workers(tile, batch)
        partial = torch.empty((workers, batch, butterflies, len(used), n // 2), dtype=torch.float32, device=u.device)
        _gradient_kernel[(batch * tile.high_blocks * tile.low_blocks * workers,)](
            u_next if index else u, g_next if index else g_first, u_next, g_next, cos, sin, partial, n, pre, post,
            tile.items, tile.items // tile.run_blocks, tile.high_blocks, tile.low_blocks, workers, batch,
            depth, butterfly, butterflies, stages, RESIDUAL=grad_u is None and not index, STORE_U=not last,
            STORE_G=not last or out is not None,
            **_tile_options(tile, used, tensors=2),
        )  # fmt: skip
        torch.sum(partial, dim=0, out=view[:, butterfly : butterfly + butterflies, used.start : used.stop])
    return gradient


def _order(passes: list[range], depth: int, transpose: bool) -> list[tuple[int, int, range]]:
    """Launches as (first butterfly, butterflies, stages): one for all butterflies where a single pass does."""
    if len(passes) == 1:
        return [(0, depth, passes[0])]
    launches = [(butterfly, 1, used) for butterfly in range(depth) for used in passes]
    return launches if transpose else launches[::-1]


def _tile_options(tile: launch.Tile, used: range, tensors: int) -> dict[str, Any]:
    """The compile-time arguments of a launch."""
    return {
        "FIRST": used.start,
        "STAGES": len(used),
        "GROUP": tile.group,
        "RUN": tile.run,
        "SHARED_HIGH": tile.shared_high,
        "SHARED_LOW": tile.shared_low,
        "num_warps": launch.choose_num_warps(tile.elements, tensors),
    }

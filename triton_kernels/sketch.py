"""The product of a sketch: one tensor, unfolded along an axis, times a few weighted columns, in one read.

Formula. ``Z[i, j] = sum over pre, post of X[pre, i, post] W[(pre, post), j]``: ``butterfly_opt.sketch``'s
``Y R`` for the axis ``n`` of ``X``, with ``W`` the random signs times the weights of the columns.

Layout. ``X`` is contiguous ``(batch, pre, n, post)``, see ``launch.py``: no axis is moved, nothing copied. A program
holds ROWS indices of ``n`` and walks over chunks of COLUMNS of ``(pre, post)``, keeping a sum for each of their
positions: ``ROWS COLUMNS k`` floats, 32 registers a lane. Programs that share rows write partial sums of
their own, added in a fixed order: no atomics.

Dtypes. float32, and products in full float32 whatever torch's global setting says.

Cost. 4 bytes an element of ``X``, and half a byte for ``W`` from the cache, where the torch path on a GPU, which has
to split ``X`` to be exact on tensor cores, moves 32 (40 with a copy for the axis); ``2 k`` flops.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

MAX_WEIGHTS = 8
"""Columns of the result that a program holds."""

ROWS = 64
"""Indices of ``n`` a program: 256 contiguous bytes where ``post = 1``."""

COLUMNS = 16
"""Columns of a chunk: 64 contiguous bytes where ``post`` is long, what DRAM delivers at once."""

_DTYPES = frozenset({torch.float32})
_TORCH_SKETCH = "butterfly_opt.sketch.sketch_product"


@triton.jit
def _product_kernel(x_ptr, weights_ptr, partial_ptr, n, pre, post, weights, workers, batches, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr):  # fmt: skip
    """Partial sums ``(workers, batch, n, weights)``; worker w takes the chunks w, w + workers, ..."""
    program = tl.program_id(0)
    worker = program % workers
    blocks = tl.cdiv(n, ROWS)
    block = (program // workers) % blocks
    batch = (program // workers // blocks).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    kept = tl.arange(0, WEIGHTS)
    columns = pre * post
    sums = tl.zeros((ROWS, COLUMNS, WEIGHTS), tl.float32)
    for chunk in range(worker, tl.cdiv(columns, COLUMNS), workers):
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        start = ((batch * pre + column // post) * n * post + column % post)[None, :]
        x = tl.load(
            x_ptr + start + (row.to(tl.int64) * post)[:, None], mask=(row < n)[:, None] & inside[None, :], other=0.0
        )
        places = (batch * columns + column)[:, None] * weights + kept[None, :]
        w = tl.load(weights_ptr + places, mask=inside[:, None] & (kept < weights)[None, :], other=0.0)
        sums += x[:, :, None] * w[None, :, :]
    places = (((worker * batches + batch) * n + row) * weights)[:, None] + kept[None, :]
    mask = (row < n)[:, None] & (kept < weights)[None, :]
    tl.store(partial_ptr + places, tl.sum(sums, axis=1), mask=mask)


def sketch_product(x: Tensor, weights: Tensor) -> Tensor:
    """``X``, unfolded along ``n``, times ``weights``; equals ``butterfly_opt.sketch.sketch_product``.

    Args:
        x: ``(batch, pre, n, post)``, float32, contiguous.
        weights: ``W``, ``(batch, pre * post, k)``, float32, contiguous, k <= 8.

    Returns:
        ``(batch, n, k)``, float32: ``x.movedim(2, 1).reshape(batch, n, -1) @ weights``.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if shapes do not belong together, k > 8, a tensor is not contiguous, devices differ, or
            the kernels cannot run on the device.
    """
    launch.check_tensors([("x", x), ("weights", weights)], _DTYPES, _TORCH_SKETCH)
    if x.dim() != 4:
        raise ValueError(f"x must be (batch, pre, n, post), got shape {tuple(x.shape)}")
    batch, pre, n, post = x.shape
    if weights.dim() != 3 or weights.shape[:2] != (batch, pre * post) or weights.shape[2] > MAX_WEIGHTS:
        raise ValueError(
            f"weights must be ({batch}, {pre * post}, k) with k <= {MAX_WEIGHTS} for x of shape {tuple(x.shape)}, "
            f"got shape {tuple(weights.shape)}"
        )
    count = weights.shape[2]
    if not x.numel() or not count:
        return x.new_zeros(batch, n, count)
    programs = batch * -(-n // ROWS)
    workers = max(1, min(-(-pre * post // COLUMNS), -(-2 * launch.MIN_PROGRAMS // programs)))
    partial = x.new_empty(workers, batch, n, count)
    with launch.on_device(x):
        _product_kernel[(programs * workers,)](
            x, weights, partial, n, pre, post, count, workers, batch, ROWS=ROWS, COLUMNS=COLUMNS,
            WEIGHTS=launch.next_power_of_two(count), num_warps=8,
        )  # fmt: skip
    return partial.sum(0) if workers > 1 else partial[0]

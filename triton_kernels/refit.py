"""One orthogonal iteration of every group of a stage on its second moment, one program a tile of groups.

Formula, the names of ``butterfly_opt.rotation``, ``T`` block-diagonal by the changes of the children:

    C <- T C T^T,  B <- T B          transport, from the second stage of a leading plan on
    B' = the orthogonal factor of C B, R with a diagonal >= 0
    change = (B'^T B)[:lead, :lead]  for the stage above

The factor is made by Householder reflections, as LAPACK's: accurate whatever the condition. A column is first divided
by its largest entry, which changes R alone, so that no square over- or underflows. Reflections of a block-diagonal
matrix stay within its blocks, exactly: small groups share a program.

Layout. Matrices and moments are ``(count, numel)`` as in ``butterfly_opt.plan.Plan.views``; changes are
``(count, groups, lead, lead)``. All groups of a stage of all tensors are one launch; stages follow one another.

Dtypes. float32; products in full float32. Nothing is read on the host, and nothing depends on the run.

Cost. Some ``6 width^3`` operations a tile in ``width`` dependent steps, whatever the number of tiles; memory 16 bytes
an entry. Profitable always: ``torch.linalg.qr`` of a batch is a loop over launches on a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import _WIDE, PRECISION, Tiles, block_matrix, block_offsets

_TORCH_REFIT = "butterfly_opt.rotation.Rotation.refit_"


@triton.jit
def _orthogonal_factor(a, total, WIDTH: tl.constexpr):
    """``Q`` of ``A = Q R`` with the diagonal of ``R`` >= 0, by reflections ``H = I - tau v v^T``."""
    rows = tl.arange(0, WIDTH)
    i = rows[:, None]
    j = rows[None, :]
    largest = tl.max(tl.abs(a), axis=0)
    a = a / tl.where(largest > 0, largest, 1.0)[None, :]
    q = tl.where(i == j, 1.0, 0.0)
    for k in range(total):
        column = tl.sum(tl.where(j == k, a, 0.0), axis=1)
        alpha = tl.sum(tl.where(rows == k, column, 0.0), axis=0)
        below = tl.where(rows > k, column, 0.0)
        rest = tl.sum(below * below, axis=0)
        norm = tl.sqrt_rn(alpha * alpha + rest)
        beta = tl.where(alpha < 0, norm, -norm)
        # A column that is finished already is left alone, but for its sign.
        moves = rest > 0
        tau = tl.where(moves, (beta - alpha) / tl.where(moves, beta, 1.0), 0.0)
        v = tl.where(rows == k, 1.0, below / tl.where(moves, alpha - beta, 1.0))
        a -= tau * v[:, None] * tl.sum(a * v[:, None], axis=0)[None, :]
        q -= tau * tl.sum(q * v[None, :], axis=1)[:, None] * v[None, :]
        diagonal = tl.where(moves, beta, alpha)
        # Column k of Q is final: later reflections act on columns behind it.
        q = tl.where((j == k) & (tl.zeros_like(j) + diagonal < 0), -q, q)
    return q


@triton.jit
def _refit_kernel(matrices_ptr, moments_ptr, usable_ptr, below_ptr, change_ptr, table_ptr, numel, below_numel,
                  change_numel, tiles_count, lead, shift, WIDTH: tl.constexpr, TRANSPORT: tl.constexpr,
                  CHANGE: tl.constexpr):  # fmt: skip
    """``refit_stage_`` of one tile."""
    program = tl.program_id(0)
    tile = program % tiles_count
    tensor = (program // tiles_count).to(tl.int64)
    if tl.load(usable_ptr + tensor) == 0:
        return
    offsets, inside, size = block_offsets(table_ptr, tile, WIDTH)
    total = tl.load(table_ptr + tile * _WIDE + 1).to(tl.int32)
    matrices_ptr += tensor * numel
    moments_ptr += tensor * numel
    before = block_matrix(matrices_ptr, table_ptr, tile, WIDTH)
    moment = tl.load(moments_ptr + offsets, mask=inside, other=0.0)
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    if TRANSPORT:
        start = tl.load(table_ptr + tile * _WIDE)
        own = (i // lead == j // lead) & (i < total) & (j < total)
        child = below_ptr + tensor * below_numel + start * lead + i // lead * lead * lead + i % lead * lead + j % lead
        turn = tl.load(child, mask=own, other=0.0)
        before = tl.dot(turn, before, input_precision=PRECISION)
        moment = tl.dot(turn, moment, input_precision=PRECISION)
        moment = tl.dot(moment, tl.trans(turn), input_precision=PRECISION)
        tl.store(moments_ptr + offsets, moment, mask=inside)
    diagonal = tl.sum(tl.where(i == j, moment, 0.0), axis=0)
    trace = tl.sum(tl.where(i // size == j // size, diagonal[None, :], 0.0), axis=1)
    turned = tl.dot(moment, before, input_precision=PRECISION) + shift * trace[:, None] * before
    after = _orthogonal_factor(turned, total, WIDTH)
    tl.store(matrices_ptr + offsets, after, mask=inside)
    if CHANGE:
        change = tl.dot(tl.trans(after), before, input_precision=PRECISION)
        group = tl.load(table_ptr + tile * _WIDE + 4) + i // size
        leading = inside & (i % size < lead) & (j % size < lead)
        target = change_ptr + tensor * change_numel + group * lead * lead + i % size * lead + j % size
        tl.store(target, change, mask=leading)


def refit_stage_(
    matrices: Tensor,
    moments: Tensor,
    usable: Tensor,
    stage: Tiles,
    *,
    groups: int,
    lead: int,
    below: Tensor | None,
    shift: float,
) -> Tensor:
    """One orthogonal iteration of every group of a stage, in place; equals that of ``Rotation.refit_``.

    Args:
        matrices: float32 ``(count, numel)``, updated.
        moments: float32, of the same shape, transported.
        usable: float32 ``(count,)``; tensors where it is 0 stay as they are.
        stage: its tiles.
        groups: its number of groups.
        lead: outputs of a group that go on; 0 in a full plan, which is not transported.
        below: the changes of the stage before, ``(count, its groups, lead, lead)``; None for the first.
        shift: added to the diagonal of a moment, over its trace.

    Returns:
        The changes of this stage, ``(count, groups, lead, lead)``; those of unusable tensors are not written.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if shapes or devices do not fit, a tensor is not contiguous, or no kernel can run there.
    """
    count, numel = matrices.shape
    named = {"matrices": (matrices, (count, numel)), "moments": (moments, (count, numel)), "usable": (usable, (count,))}
    tiles.check(_TORCH_REFIT, matrices.device, **named)
    change = matrices.new_empty(count, groups, lead, lead)
    with tiles.on_device(matrices.device):
        _refit_kernel[(count * len(stage),)](
            matrices, moments, usable, change if below is None else below, change, stage.table, numel,
            0 if below is None else below[0].numel(), groups * lead**2, len(stage), max(lead, 1), shift,
            WIDTH=stage.width, TRANSPORT=below is not None, CHANGE=lead > 0, num_warps=4 if stage.width <= 32 else 8,
        )  # fmt: skip
    return change

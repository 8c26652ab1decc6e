"""What the rotation kernels share: a stage of a butterfly on a tile ``(GROUP, MIDDLE, RUN)`` held on chip.

The stages lie along MIDDLE, a power of two. The partners of a stage are brought together by reshape,
permute and split, so that any stage sees both in one lane; the compiler turns that into moves between
registers, lanes or through shared memory as the stride demands.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def positions(block, item, n, pre, post, pre_items, low_blocks, FIRST: tl.constexpr, STAGES: tl.constexpr,
              GROUP: tl.constexpr, RUN: tl.constexpr, SHARED_HIGH: tl.constexpr,
              SHARED_LOW: tl.constexpr):  # fmt: skip
    """Where a tile lies.

    Returns:
        Offsets of its elements and which exist, ``(GROUP, middle, RUN)``; slots of its angles in a
        stage, ``(GROUP or 1, middle / 2, RUN or 1)``.
    """
    MIDDLE: tl.constexpr = 1 << STAGES
    LOWS: tl.constexpr = 1 << FIRST
    groups = tl.arange(0, GROUP)[:, None, None]
    runs = tl.arange(0, RUN)[None, None, :]
    high_block = block // low_blocks
    low_block = block % low_blocks
    if SHARED_HIGH:
        high = tl.full((1, 1, 1), 0, tl.int32) + high_block
        row = (item % pre_items) * GROUP + groups
    else:
        high = high_block * GROUP + groups
        row = tl.full((1, 1, 1), 0, tl.int32) + item % pre_items
    if SHARED_LOW:
        low = tl.full((1, 1, 1), 0, tl.int32) + low_block
        column = (item // pre_items) * RUN + runs
        inside = column < post
    else:
        flat = low_block * RUN + runs
        low = flat // post
        column = flat % post
        inside = low < LOWS
    middle = tl.arange(0, MIDDLE)[None, :, None]
    index = high * (MIDDLE * LOWS) + middle * LOWS + low
    mask = (index < n) & (row < pre) & inside
    offsets = (row.to(tl.int64) * n + index) * post + column
    pairs = tl.arange(0, MIDDLE // 2)[None, :, None]
    slots = high * (MIDDLE // 2 * LOWS) + pairs * LOWS + low
    return offsets, mask, slots


@triton.jit
def pair_count(n, STAGE: tl.constexpr):
    """Pairs of a stage: its slots are a prefix, since pairs are numbered by ascending lower partner."""
    return (n >> (STAGE + 1)) * (1 << STAGE) + tl.maximum(n % (2 << STAGE) - (1 << STAGE), 0)


@triton.jit
def part(tile, GROUP: tl.constexpr, MIDDLE: tl.constexpr, RUN: tl.constexpr, STRIDE: tl.constexpr):
    """Lower and upper partners at distance STRIDE along MIDDLE, each ``(GROUP, MIDDLE / 2, RUN)``."""
    blocks = tl.reshape(tile, (GROUP, MIDDLE // (2 * STRIDE), 2, STRIDE, RUN))
    lo, hi = tl.split(tl.permute(blocks, (0, 1, 3, 4, 2)))
    return tl.reshape(lo, (GROUP, MIDDLE // 2, RUN)), tl.reshape(hi, (GROUP, MIDDLE // 2, RUN))


@triton.jit
def unite(lo, hi, GROUP: tl.constexpr, MIDDLE: tl.constexpr, RUN: tl.constexpr, STRIDE: tl.constexpr):
    """Inverse of ``part``."""
    pairs = tl.reshape(tl.join(lo, hi), (GROUP, MIDDLE // (2 * STRIDE), STRIDE, RUN, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 4, 2, 3)), (GROUP, MIDDLE, RUN))


@triton.jit
def turn(tile, cos, sin, GROUP: tl.constexpr, MIDDLE: tl.constexpr, RUN: tl.constexpr, STRIDE: tl.constexpr):
    """One stage of ``Q``: ``(lo, hi) <- (cos lo - sin hi, sin lo + cos hi)``."""
    lo, hi = part(tile, GROUP, MIDDLE, RUN, STRIDE)
    return unite(cos * lo - sin * hi, sin * lo + cos * hi, GROUP, MIDDLE, RUN, STRIDE)


@triton.jit
def residual(u, columns, SUMMED: tl.constexpr):
    """``butterfly_opt.refit.one_sided_residual``: ``u / sqrt(mean u^2) / columns``, the mean over RUN.

    RUN holds all columns of a row, and zeros beyond them; not SUMMED where it holds rows of one column.
    """
    energy = u * u
    if SUMMED:
        energy = tl.sum(energy, axis=2, keep_dims=True) / columns
    energy = tl.where(energy < _TINY, _TINY, energy)
    return u / (tl.sqrt_rn(energy) * columns)

"""Grouped stages: a butterfly whose angles are shared by many columns, as a few matrix products.

``k`` consecutive stages ``l .. l + k - 1`` mix only coordinates whose indices differ in bits
``l .. l + k - 1``. With ``i = (high, middle, low)``, ``low`` of ``l`` bits and ``middle`` of ``k``,
they are one small matrix for each ``(high, low)``: a rotation of length 1024 is two batches of 32
products with 32 x 32 blocks. The blocks are built once for each set of angles and used until the
angles change.

Cost of an application to c columns: ``2 n c sum_g 2**k_g`` flops, all in matrix products, and a
transposed copy for all groups but the first of a butterfly, against ``3 n c num_stages`` flops in as many
passes over memory. Profitable from about 16 columns on (measured by ``python -m experiments.bench_rotation``).
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from butterfly_opt.rotation import rotate_columns_

MAX_GROUP = 6
"""Stages in one group: blocks of at most 64 x 64."""


@dataclass(frozen=True)
class StageGroup:
    """The blocks of one group: ``matrices[high, low]`` is the ``middle x middle`` part of ``Q^T``."""

    matrices: Tensor
    padded: int

    def apply(self, x: Tensor, *, transpose: bool) -> Tensor:
        """``(n, columns) -> (n, columns)``; ``transpose`` applies this group's part of ``Q^T``."""
        n, columns = x.shape
        high, low, middle, _ = self.matrices.shape
        if self.padded != n:
            x = torch.nn.functional.pad(x, (0, 0, 0, self.padded - n))
        matrices = self.matrices if transpose else self.matrices.mT
        # With one batch dimension the operands reach the batched product without a copy.
        if low == 1:
            return torch.bmm(matrices[:, 0], x.view(high, middle, columns)).view(self.padded, columns)[:n]
        parts = x.contiguous().view(high, middle, low, columns).transpose(1, 2)
        mixed = torch.bmm(matrices[0], parts[0]).unsqueeze(0) if high == 1 else torch.matmul(matrices, parts)
        return mixed.transpose(1, 2).reshape(self.padded, columns)[:n]


class RotationBlocks:
    """The rotation of one axis as grouped blocks, equal to ``rotation.rotate`` up to rounding.

    Args:
        angles: ``(depth, num_stages, n // 2)``.
        n: length of the axis.

    Memory: about ``n * 2**k`` numbers a group of ``k`` stages, kept until the angles change.
    """

    def __init__(self, angles: Tensor, n: int) -> None:
        self.n = n
        # By span, all butterflies of the stack at once; then in the order in which they apply.
        spans = [_groups(angles, n, first, last) for first, last in _split(angles.shape[1], n)]
        self.groups = [groups[butterfly] for butterfly in range(angles.shape[0]) for groups in spans]

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x`` (``Q^T x`` with ``transpose``) along axis ``dim``, which has length n.

        Returns:
            A contiguous tensor of the shape of ``x`` in the dtype of the angles.
        """
        moved = x.movedim(dim, 0)
        columns = moved.reshape(self.n, -1)
        for group in self.groups if transpose else reversed(self.groups):
            columns = group.apply(columns, transpose=transpose)
        if dim % x.dim() == x.dim() - 1:  # torch copies the transpose of a matrix faster than other permutations
            return columns.t().contiguous().view(x.shape)
        return columns.view(moved.shape).movedim(0, dim).contiguous()


def _split(stages: int, n: int) -> list[tuple[int, int]]:
    """Spans of at most MAX_GROUP stages, as equal as possible, or such that two need no padding."""
    count = -(-stages // MAX_GROUP)
    bounds = [stages * g // count for g in range(count + 1)] if count else [0]
    if count == 2:
        near = sorted(range(max(1, stages - MAX_GROUP), min(stages, MAX_GROUP + 1)), key=lambda k: abs(k - bounds[1]))
        bounds[1] = next((k for k in near if n % (1 << k) == 0), bounds[1])
    return list(itertools.pairwise(bounds))


def _groups(angles: Tensor, n: int, first: int, last: int) -> list[StageGroup]:
    """Builds stages ``first .. last - 1`` of every butterfly by sending the identity of each block through."""
    depth = angles.shape[0]
    low = 1 << first
    middle = min(1 << (last - first), -(-n // low))
    index = torch.arange(n, device=angles.device)
    units = torch.zeros(depth, 1, n, middle, dtype=angles.dtype, device=angles.device)
    units[:, 0, index, index // low % middle] = 1
    rotate_columns_(units, angles[:, None], transpose=True, stages=range(first, last))
    high = -(-n // (low * middle))
    padded = high * middle * low
    units = torch.nn.functional.pad(units, (0, 0, 0, padded - n))
    matrices = units.view(depth, high, middle, low, middle).transpose(2, 3).contiguous()
    return [StageGroup(matrices[butterfly], padded) for butterfly in range(depth)]

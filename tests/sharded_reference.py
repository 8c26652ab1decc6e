"""One process that holds whole tensors and rotates them as shards do: the oracle of sharded steps.

``Q = diag(Q_1, .., Q_r) O`` written out segment by segment, without collectives, padding or shares.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from butterfly_opt import stack
from butterfly_opt.plan import Plan, make_plan
from butterfly_opt.rotation import Rotation, identity_matrices


def new_rotation(plan: Plan, count: int) -> Rotation:
    matrices = identity_matrices(plan, count, torch.float64)
    return Rotation(plan, matrices, torch.zeros_like(matrices))


class Segments(list[Rotation]):
    """What the segments rotate by themselves."""

    def scale_leaves_(self, factor: float) -> None:
        for rotation in self:
            rotation.scale_leaves_(factor)


class SegmentedRotation:
    """``Rotation`` of an axis in segments, of whole tensors in float64.

    Args:
        sizes: of the segments.
        count: number of rotations.
        most: leading outputs of a segment that meet those of the others.
    """

    def __init__(self, sizes: list[int], block: int, lead: int, count: int, *, most: int) -> None:
        self.sizes, self.heads = sizes, [min(most, size) for size in sizes]
        plans = [make_plan(n, block, lead) if n > most else Plan(n, block, lead, ()) for n in sizes]
        self.inner = Segments(new_rotation(plan, count) for plan in plans)
        self.outer = new_rotation(make_plan(sum(self.heads), block, lead), count)
        starts = list(accumulate(sizes, initial=0))
        self.at = torch.cat([start + torch.arange(h) for start, h in zip(starts, self.heads, strict=False)])

    def _inner(self, x: Tensor, name: str) -> Tensor:
        parts = [getattr(r, name)(part) for r, part in zip(self.inner, x.split(self.sizes, dim=1), strict=True)]
        return torch.cat(parts, dim=1)

    def to_rotated(self, x: Tensor, *, dim: int = -2) -> Tensor:
        if dim == -1:
            return self.to_rotated(x.mT).mT
        u = self._inner(x, "to_rotated")
        return u.index_copy(1, self.at, self.outer.to_rotated(u[:, self.at]))

    def from_rotated(self, u: Tensor, *, dim: int = -2) -> Tensor:
        if dim == -1:
            return self.from_rotated(u.mT).mT
        u = u.index_copy(1, self.at, self.outer.from_rotated(u[:, self.at]))
        return self._inner(u, "from_rotated")

    def observe_(self, values: Tensor, weight: Tensor, *, leaves: Tensor | None = None) -> None:
        heads = self._inner(values, "to_rotated")[:, self.at]
        seen = (values if leaves is None else leaves).split(self.sizes, dim=1)
        for rotation, part, own in zip(self.inner, values.split(self.sizes, dim=1), seen, strict=True):
            rotation.observe_(part, weight, leaves=own)
        self.outer.observe_(heads, weight)

    def start_(self, values: Tensor) -> None:
        for rotation, part in zip(self.inner, values.split(self.sizes, dim=1), strict=True):
            rotation.start_(part)
        self.outer.start_(self._inner(values, "to_rotated")[:, self.at])

    def refit_(self, usable: Tensor | None = None) -> None:
        changes = [rotation.refit_(usable) for rotation in self.inner]
        entering = torch.zeros(self.outer.count, len(self.at), len(self.at), dtype=torch.float64)
        for (low, high), change in zip(pairwise(accumulate(self.heads, initial=0)), changes, strict=True):
            own = torch.eye(high - low)[None] if change is None else change[:, 0]
            entering[:, low:high, low:high] = own[:, : high - low, : high - low]
        self.outer.refit_(usable, entering=entering)


def rotate_in_segments(monkeypatch: Any, sizes: dict[tuple[int, int], list[int]], *, most: int) -> None:
    """Makes optimizers of this process rotate axes in segments: ``sizes`` of (length, dim), one tensor a shape."""
    original = stack.rotation_of
    made: dict[Any, SegmentedRotation] = {}  # stacks are made anew; what lies outside of the state must not be

    def rotation_of(layout: Any, dim: int, options: Any, matrices: Tensor, moments: Tensor) -> Any:
        own = sizes.get((layout.shape[dim], dim))
        if own is None:
            return original(layout, dim, options, matrices, moments)
        key = id(layout.owner), dim
        if key not in made:
            made[key] = SegmentedRotation(own, options["block"], options["lead"], len(matrices), most=most)
        return made[key]

    monkeypatch.setattr(stack, "rotation_of", rotation_of)

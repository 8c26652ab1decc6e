"""Parameters that are cut over processes (``DTensor``, so FSDP2 and tensor parallelism): their axes and their bases.

A shard is rotated by itself, and its leading outputs (``heads``: ``lead`` of
each, of many shards fewer) meet those of the others in the rotation above them:

    Q = diag(Q_1, .., Q_shards) O          O acts on the leading outputs of the shards and leaves the others alone

``Q_i`` and ``O`` are wide butterflies (``rotation``); a shard of so few coordinates goes on whole. So ``Q`` depends on
n, block, lead and the number of shards alone. ``Q_i`` and its second moments lie where the shard does; ``O``
is the same in every process, which computes it anew from the same numbers. The statistics of an axis that is whole are
sums over the processes that share the other axis.

What is saved has a shape that does not depend on the number of shards, as ``torch.distributed.checkpoint`` asks: for
every coordinate of a cut axis ``row_numbers`` numbers, in which a shard stores its own groups and a share of those of
``O``.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from butterfly_opt.collectives import Gather, Group, Sum
from butterfly_opt.dtensor import placed
from butterfly_opt.layout import Cut, TensorLayout
from butterfly_opt.options import Options
from butterfly_opt.plan import Plan, make_plan
from butterfly_opt.rotation import Rotation, identity_matrices

MAX_MEETING = 8
"""Shards that bring ``lead`` outputs each: of more every one brings fewer, so that what meets does not grow with them.
On paper 64 shards of a 4096 x 4096 matrix would else receive as much as the whole of it."""


def heads(sizes: Sequence[int], lead: int) -> list[int]:
    """How many outputs of each shard go on to meet the others'."""
    return [min(size, lead, max(1, MAX_MEETING * lead // len(sizes))) for size in sizes]


def row_numbers(block: int, lead: int) -> int:
    """Numbers that are saved for a coordinate of a cut axis.

    Its stages together take ``block (1 + lead / block + ..)``; a shard hardly longer than its heads has a group of its
    own beside that of ``O``, and groups that are not full need a little more.
    """
    return -(-block * block // (block - lead)) + lead + -(-lead * lead // block)


@lru_cache(maxsize=256)
def inner_plan(size: int, block: int, lead: int, own_heads: int) -> Plan:
    """The plan of a shard: without a stage where all its coordinates are heads."""
    return make_plan(size, block, lead) if size > own_heads else Plan(size, block, lead, ())


class ShardedRotation:
    """``Rotation`` for tensors of which this process holds a shard; what other processes know is awaited.

    Args:
        inner: of this process's part of the axis, or of the whole axis.
        meeting: where the leading outputs of the shards meet; None where the axis is whole or shards do not meet.
        over: the processes that share the other axis: second moments are sums over them.

    Cost: a rotation gathers ``shards * lead`` rows of a cut axis; ``observe_`` gathers as many, and sums the second
    moments of a whole one; ``refit_`` gathers ``lead^2`` numbers a shard.
    """

    def __init__(self, inner: Rotation, meeting: "Meeting | None", over: Group | None) -> None:
        self.inner, self.meeting, self.over = inner, meeting, over
        self.rounds = max(len(inner.plan.stages), 0 if meeting is None else meeting.rounds)

    async def to_rotated(self, x: Tensor, *, dim: int = -2) -> Tensor:
        """``Q^T x``, of the shards ``x`` of all processes."""
        u = self.inner.to_rotated(x, dim=dim)
        return u if self.meeting is None else await self.meeting.turn(u, Rotation.to_rotated, dim=dim)

    async def from_rotated(self, u: Tensor, *, dim: int = -2) -> Tensor:
        """``Q u``, the inverse of ``to_rotated``."""
        if self.meeting is not None:
            u = await self.meeting.turn(u, Rotation.from_rotated, dim=dim)
        return self.inner.from_rotated(u, dim=dim)

    async def observe_(self, values: Tensor, weight: Tensor, *, leaves: Tensor | None = None) -> None:
        """See ``Rotation.observe_``."""
        await self._observe_(self.inner, values, weight, leaves)
        if self.meeting is not None:
            await self._observe_(await self.meeting.outer(), await self._heads(values), weight)
            self.meeting.store()

    async def start_(self, values: Tensor) -> None:
        """See ``Rotation.start_``."""
        await self._start_(self.inner, values)
        # After its own start: the heads are outputs of the new matrices.
        if self.meeting is not None:
            await self._start_(await self.meeting.outer(), await self._heads(values))
            self.meeting.store()

    async def refit_(self, usable: Tensor | None = None) -> None:
        """See ``Rotation.refit_``; ``O`` is transported as the heads of the shards turn."""
        change = self.inner.refit_(usable)
        if self.meeting is not None:
            outer = await self.meeting.outer()
            outer.refit_(usable, entering=await self.meeting.join_changes(change))
            self.meeting.store()

    async def _heads(self, values: Tensor) -> Tensor:
        assert self.meeting is not None
        return await self.meeting.gather_heads(self.inner.to_rotated(values))

    async def _observe_(self, rotation: Rotation, values: Tensor, weight: Tensor, leaves: Tensor | None = None) -> None:
        own = rotation.second_moments(values, leaves=leaves)
        rotation.take_moments_(own if self.over is None else await Sum(own, self.over), weight)

    async def _start_(self, rotation: Rotation, values: Tensor) -> None:
        if self.over is None:
            rotation.start_(values)
            return
        stages = rotation.starting_(values)
        # As many rounds in every process, also where a shorter shard has fewer stages.
        for _ in range(self.rounds):
            moments = next(stages, [])
            own = [moment.reshape(-1) for moment in moments]
            total = await Sum(torch.cat(own) if own else values.new_zeros(0), self.over)
            for moment, part in zip(moments, total.split([len(part) for part in own]), strict=True):
                moment.copy_(part.view_as(moment))
        # Once more: the last stage is fitted after its moments were yielded.
        next(stages, None)


class Meeting:
    """The rotation ``O`` of the leading outputs of all shards, the same in every process.

    Args:
        cut: how the axis is cut.
        block: the largest group.
        lead: leading outputs of a shard.
        matrices: ``(count, numbers)``, begins with this process's share of the groups of ``O``, which is what is saved.
        moments: their second moments, in the same places.
    """

    def __init__(self, cut: Cut, block: int, lead: int, matrices: Tensor, moments: Tensor) -> None:
        self.cut, self.sizes = cut, heads(cut.sizes, lead)
        self.plan = make_plan(sum(self.sizes), block, lead)
        shards = [inner_plan(n, block, lead, own) for n, own in zip(cut.sizes, self.sizes, strict=True)]
        self.rounds = max(len(plan.stages) for plan in (self.plan, *shards))
        self.bounds = share_bounds(self.plan, self.sizes)
        low, high = self.bounds[cut.index : cut.index + 2]
        self._saved = matrices[:, : high - low], moments[:, : high - low]
        # Put together when awaited: a constructor cannot ask other processes.
        self._outer: Rotation | None = None

    @property
    def size(self) -> int:
        """Coordinates of this process's shard that go on."""
        return self.sizes[self.cut.index]

    def start_(self) -> None:
        """Makes ``O`` the identity."""
        matrices, _ = self._saved
        whole = identity_matrices(self.plan, len(matrices), matrices.dtype, matrices.device)
        self._outer = Rotation(self.plan, whole, torch.zeros_like(whole))
        self.store()

    async def outer(self) -> Rotation:
        """``O``: once put together from the shares of all processes, then kept."""
        if self._outer is None:
            lengths = [high - low for low, high in pairwise(self.bounds)]
            own = torch.stack(self._saved)
            shares = await Gather(_padded(own, -1, max(lengths)), self.cut.group)
            whole = torch.cat([share[..., :length] for share, length in zip(shares, lengths, strict=True)], dim=-1)
            self._outer = Rotation(self.plan, *whole.unbind())
        return self._outer

    def store(self) -> None:
        """Saves this process's share of ``O``."""
        assert self._outer is not None and self._outer.moments is not None
        low, high = self.bounds[self.cut.index : self.cut.index + 2]
        for saved, whole in zip(self._saved, (self._outer.matrices, self._outer.moments), strict=True):
            saved.copy_(whole[:, low:high])

    async def turn(self, u: Tensor, rotate: Callable[[Rotation, Tensor], Tensor], *, dim: int) -> Tensor:
        """``u`` with its leading coordinates turned by ``O``, or by its transpose."""
        outer = await self.outer()
        turned = rotate(outer, await self.gather_heads(u if dim == -2 else u.mT))
        first = sum(self.sizes[: self.cut.index])
        own = turned[:, first : first + self.size]
        tail = u.narrow(dim, self.size, u.shape[dim] - self.size)
        return torch.cat([own if dim == -2 else own.mT, tail], dim=dim)

    async def gather_heads(self, u: Tensor) -> Tensor:
        """The leading coordinates of all shards one after the other, ``(count, coordinates, columns)``."""
        gathered = await Gather(_padded(u[:, : self.size], 1, max(self.sizes)), self.cut.group)
        return torch.cat([head[:, :size] for head, size in zip(gathered, self.sizes, strict=True)], dim=1)

    async def join_changes(self, change: Tensor | None) -> Tensor:
        """The changes of the heads of all shards, ``(count, coordinates, coordinates)``, block-diagonal.

        Args:
            change: of this shard's, as ``Rotation.refit_`` returns it; None where its heads are the coordinates.
        """
        matrices, largest = self._saved[0], max(self.sizes)
        if change is None:
            own = torch.eye(self.size, dtype=matrices.dtype, device=matrices.device).repeat(len(matrices), 1, 1)
        else:
            # The last stage of a shard is one group, its root.
            own = change[:, 0, : self.size, : self.size]
        own = _padded(_padded(own, 1, largest), 2, largest)
        joined = own.new_zeros(len(own), self.plan.n, self.plan.n)
        ends = list(accumulate(self.sizes, initial=0))
        for (low, high), part in zip(pairwise(ends), await Gather(own, self.cut.group), strict=True):
            joined[:, low:high, low:high] = part[:, : high - low, : high - low]
        return joined


def share_bounds(plan: Plan, sizes: Sequence[int]) -> list[int]:
    """The numbers of a plan in shares, proportional to ``sizes``: where each begins, and the end."""
    return [plan.numel * end // plan.n for end in accumulate(sizes, initial=0)]


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with zeros up to a size: what is gathered has one shape."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def basis_names(layout: TensorLayout) -> list[tuple[str, str]]:
    """The state keys of the matrices and second moments of each rotated axis.

    What lies otherwise than for a whole tensor has another name: it is never taken for it.
    """
    prefixes = ["shard_" if _lies_by_shard(layout, dim) else "" for dim in layout.rotated]
    return [(f"{prefix}rotation{axis}", f"{prefix}moment{axis}") for axis, prefix in enumerate(prefixes)]


def _lies_by_shard(layout: TensorLayout, dim: int) -> bool:
    """Whether an axis is cut, or its statistics are those of a shard alone."""
    cuts = dict(layout.cuts)
    return dim in cuts or (not layout.cross_shard and bool(cuts.keys() - {-3}))


def new_basis(layout: TensorLayout, dim: int, options: Options) -> tuple[Tensor, Tensor]:
    """The state of an axis before the first gradient: matrices that leave everything as it is, and their moments."""
    block, lead, batch, n = options["block"], options["lead"], layout.shape[0], layout.shape[dim]
    cut, device = dict(layout.cuts).get(dim), layout.owner.device
    if cut is None:
        matrices = identity_matrices(make_plan(n, block, lead), batch, layout.dtype, device)
    else:
        rows = torch.zeros(batch, n * row_numbers(block, lead), dtype=layout.dtype, device=device)
        # On views of ``rows``: what these are given is the state.
        rotation = rotation_of(layout, dim, options, rows, rows.clone())
        assert isinstance(rotation, ShardedRotation)
        rotation.inner.matrices.copy_(identity_matrices(rotation.inner.plan, batch, layout.dtype, device))
        if rotation.meeting is not None:
            rotation.meeting.start_()
        matrices = rows.view(batch, n, row_numbers(block, lead))
    return _placed(matrices, layout, dim, options), _placed(torch.zeros_like(matrices), layout, dim, options)


def rotation_of(
    layout: TensorLayout, dim: int, options: Options, matrices: Tensor, moments: Tensor
) -> Rotation | ShardedRotation:
    """The rotation of an axis on its state, of ``count`` tensors like this one.

    Args:
        layout: of one of them.
        dim: the axis.
        options: of the group.
        matrices: ``(count, numbers)``, what this process holds of the first tensor of ``new_basis``.
        moments: the same of the second.
    """
    block, lead, n, cuts = options["block"], options["lead"], layout.shape[dim], dict(layout.cuts)
    # ``-3 - dim`` is the other one of -2 and -1.
    cut, other = cuts.get(dim), cuts.get(-3 - dim)
    over = other.group if other is not None and other.shards > 1 and layout.cross_shard else None
    if cut is None:
        whole = Rotation(make_plan(n, block, lead), matrices, moments)
        return whole if over is None else ShardedRotation(whole, None, over)
    meets = cut.shards > 1 and layout.cross_shard
    # Without heads a shard is rotated to its own root, an empty one not at all.
    plan = inner_plan(n, block, lead, heads(cut.sizes, lead)[cut.index] if meets else 0)
    inner = Rotation(plan, matrices[:, : plan.numel], moments[:, : plan.numel])
    if not meets:
        return ShardedRotation(inner, None, over)
    return ShardedRotation(inner, Meeting(cut, block, lead, matrices[:, plan.numel :], moments[:, plan.numel :]), over)


def basis_shape(layout: TensorLayout, dim: int, options: Options) -> torch.Size:
    """The shape that ``new_basis`` gives, of all shards together."""
    block, lead, cuts = options["block"], options["lead"], dict(layout.cuts)
    batch = cuts[-3].n if -3 in cuts else layout.shape[0]
    if dim in cuts:
        return torch.Size((batch, cuts[dim].n, row_numbers(block, lead)))
    if _lies_by_shard(layout, dim):
        batch *= cuts[-3 - dim].shards
    return torch.Size((batch, make_plan(layout.shape[dim], block, lead).numel))


def _placed(matrices: Tensor, layout: TensorLayout, dim: int, options: Options) -> Tensor:
    """The state of this process as a ``DTensor``, where processes hold different ones."""
    cuts = dict(layout.cuts)
    tensor_dims = {cuts[-3].mesh_dim: 0} if -3 in cuts else {}
    if dim in cuts:
        tensor_dims[cuts[dim].mesh_dim] = 1
    elif _lies_by_shard(layout, dim):
        # Statistics of shards by themselves lie one behind the other in the batch.
        tensor_dims[cuts[-3 - dim].mesh_dim] = 0
    if not tensor_dims:
        return matrices
    return placed(matrices, layout.owner.device_mesh, tensor_dims, basis_shape(layout, dim, options))  # type: ignore[attr-defined]

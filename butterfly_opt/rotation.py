"""The rotation of an axis: a wide butterfly that is fitted in closed form to second moments.

``Q`` is a product of stages of small orthogonal matrices (``plan``), after M. Mathieu and Y. LeCun, "Fast Approximation
of Rotations and Hessians Matrices", arXiv:1404.7195 (2014). Nothing here knows an optimizer. With ``B`` the matrix
of a group, ``v`` the values that enter it and ``C`` their running second moment,

    observe   C <- (1 - weight) C + weight v v^T                     v summed over the other axes of the tensor, in
                                                                     leaves over a share of them (``plan.SHARES``)
    start     B <- eigenvectors of C, the leading ones first, from the leaves to the root
    refit     B <- qr((C + SHIFT tr C) B), one orthogonal iteration, from the leaves to the root

A pair of directions of nearly equal energy moves by its correlation only, so that averages kept in rotated
coordinates stay valid over a refit. Where the matrices of the children of a group change from B to B', its own ``C``
and ``B`` are *transported*: stated in the new outputs of the children, ``C <- T C T^T, B <- T B`` with
``T = (B'^T B)[:lead, :lead]`` child by child.

Everything is batched: ``count`` rotations of one length, of as many tensors, are one object.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from butterfly_opt.plan import Plan, Run, Stage, make_plan

MAX_DENSE_LENGTH = 128
"""Axes up to this length are rotated by one dense product: on a CPU faster than the stages, which beat it from 200 on
(``python -m experiments.bench_rotation``)."""

SHIFT = {torch.float32: 1e-6, torch.float64: 1e-7}
"""Added to the diagonal of a second moment, over its trace: directions without energy stay where they are, instead of
where rounding turns them."""

MAX_SQUARE_NUMBERS = 1 << 22
"""Numbers held at a time while entries of Q are squared (32 MiB in float64)."""


class Rotation:
    """``count`` rotations of axes of length n, with the statistics they are fitted to.

    Args:
        plan: the groups.
        matrices: ``(count, plan.numel)``, the orthogonal matrices of all groups one after the other (``plan.views``),
            float32 or float64. Gradients flow into them.
        moments: the second moments, of the same shape; None for a rotation that is not fitted.

    Both tensors are the state: ``observe_``, ``start_`` and ``refit_`` write into them and nowhere else.

    Cost: a rotation of one column takes ``2 sum size^2`` flops over the groups, about ``2.7 n block`` for
    ``lead = block / 4``; the state ``2 plan.numel`` numbers.
    """

    def __init__(self, plan: Plan, matrices: Tensor, moments: Tensor | None = None) -> None:
        self.plan, self.matrices, self.moments = plan, matrices, moments
        self._dense: tuple[int, Tensor] | None = None
        self._stages = list(zip(plan.stages, plan.views(matrices), strict=True))
        self._moments = None if moments is None else plan.views(moments)

    @classmethod
    def identity(
        cls,
        n: int,
        *,
        block: int = 64,
        lead: int = 16,
        count: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "Rotation":
        """Rotations that leave everything as it is, with statistics of zero."""
        plan = make_plan(n, block, lead)
        matrices = identity_matrices(plan, count, dtype, device)
        return cls(plan, matrices, torch.zeros_like(matrices))

    @property
    def count(self) -> int:
        """Number of rotations."""
        return len(self.matrices)

    def to_rotated(self, x: Tensor, *, dim: int = -2) -> Tensor:
        """``u = Q^T x``.

        Args:
            x: ``(count, n, columns)``, or with ``dim = -1`` ``(count, columns, n)``, in the dtype of the matrices.
            dim: the rotated axis, -2 or -1.

        Returns:
            A tensor of the shape of ``x``; ``x`` itself only where there is no stage.
        """
        if self._is_short:
            q = self.dense()
            return torch.bmm(q.mT, x) if dim == -2 else torch.bmm(x, q)
        return _apply([(stage, [matrix.mT for matrix in matrices]) for stage, matrices in self._stages], x, dim)

    def from_rotated(self, u: Tensor, *, dim: int = -2) -> Tensor:
        """``x = Q u``, the inverse of ``to_rotated``."""
        if self._is_short:
            q = self.dense()
            return torch.bmm(q, u) if dim == -2 else torch.bmm(u, q.mT)
        return _apply(self._stages[::-1], u, dim)

    @property
    def _is_short(self) -> bool:
        """Whether one dense product is faster than the stages."""
        return self.plan.n <= MAX_DENSE_LENGTH and len(self.plan.stages) > 0

    def dense(self) -> Tensor:
        """The matrices Q, ``(count, n, n)``, made anew when the matrices have changed. Cost: n columns."""
        made_of = self.matrices._version
        # Never kept with a gradient: every graph needs its own.
        if self._dense is None or self._dense[0] != made_of or self.matrices.requires_grad:
            q = torch.eye(self.plan.n, dtype=self.matrices.dtype, device=self.matrices.device).expand(
                self.count, -1, -1
            )
            self._dense = made_of, _apply(self._stages[::-1], q)
        return self._dense[1]

    def squared(self, d: Tensor) -> Tensor:
        """``(Q o Q) d``, Q o Q the squares of the entries: the diagonal of ``Q diag(d) Q^T``.

        In the full plan every entry of Q is one path through the stages, so its square is a product of squares. In
        the leading plan paths add up within a block: the diagonal blocks ``B (children's blocks) B^T`` are carried from
        the root to the leaves, exactly.

        Args:
            d: ``(count, n, columns)``.

        Cost: for a column O(n block) in the full plan, O(n block^2) in the leading one; memory O(block) times ``d``,
            a slice of columns at a time.
        """
        if self.plan.is_full:
            return _apply([(stage, [m.square() for m in matrices]) for stage, matrices in self._stages[::-1]], d)
        width = max(1, MAX_SQUARE_NUMBERS // (self.count * self.plan.n * self.plan.block))
        return torch.cat([self._squared_columns(part) for part in d.split(width, dim=-1)], dim=-1)

    def _squared_columns(self, d: Tensor) -> Tensor:
        lead = self.plan.lead
        blocks: Tensor | None = None  # of the children: (count, columns, groups, lead, lead) each
        for stage, matrices in reversed(self._stages):
            part = _gather(stage, d)
            groups: list[Tensor] = []
            for run, matrix, values in zip(stage.runs, matrices, _split(stage, part), strict=True):
                inner = torch.diag_embed(values.unflatten(0, (len(d), run.groups)).permute(0, 3, 1, 2))
                if blocks is not None:
                    # What the stage above made of the leading outputs takes the place of their own d.
                    own, blocks = blocks[:, :, : run.groups], blocks[:, :, run.groups :]
                    inner[..., :lead, :lead] = own
                groups.append(matrix[:, None] @ inner @ matrix[:, None].mT)
            if stage.index is None:
                diagonals = [g.diagonal(dim1=-2, dim2=-1).flatten(2) for g in groups]
                return torch.cat(diagonals, dim=2).mT.contiguous()
            below = [_children(group, lead) for group in groups]
            blocks = torch.cat(below, dim=2)
        return d

    def observe_(self, values: Tensor, weight: float | Tensor, *, leaves: Tensor | None = None) -> None:
        """Takes vectors into the second moments: ``C <- (1 - weight) C + weight v v^T``, in place.

        Args:
            values: ``(count, n, columns)``; other axes of a tensor may be rotated or not, their sum is the same.
            weight: a number, or ``(count,)``.
            leaves: the columns whose second moments the first stage takes; those of ``values`` if None.

        Cost: that of a rotation, and as much again for the products.
        """
        weight = weight.view(-1, 1, 1, 1) if isinstance(weight, Tensor) else weight
        for moments, _, seen in self._entering(values, leaves):
            for moment, v in zip(moments, seen, strict=True):
                moment.lerp_(_outer(v, moment), weight)

    def second_moments(self, values: Tensor, *, leaves: Tensor | None = None) -> Tensor:
        """``v v^T`` of every group, ``(count, plan.numel)``, of ``values`` as ``observe_`` takes them."""
        found = torch.empty_like(self.matrices)
        for views, (_, _, seen) in zip(self.plan.views(found), self._entering(values, leaves), strict=True):
            for view, v in zip(views, seen, strict=True):
                view.copy_(_outer(v, view))
        return found

    def take_moments_(self, found: Tensor, weight: float | Tensor) -> None:
        """``C <- (1 - weight) C + weight found``, see ``observe_``."""
        assert self.moments is not None
        self.moments.lerp_(found, weight.view(-1, 1) if isinstance(weight, Tensor) else weight)

    def start_(self, values: Tensor) -> None:
        """Fits the matrices to the second moments of ``values`` alone, by eigenvectors, leading first.

        ``values`` must be finite, which is not checked here: it would wait for a GPU.
        """
        for _ in self.starting_(values):
            pass

    def starting_(self, values: Tensor) -> Iterator[list[Tensor]]:
        """``start_`` stage by stage: yields second moments before it fits to them, so that others' can be added."""
        for moments, matrices, entering in self._entering(values):
            for moment, v in zip(moments, entering, strict=True):
                moment.copy_(_outer(v, moment))
            yield moments
            for moment, matrix in zip(moments, matrices, strict=True):
                matrix.copy_(_eigenvectors(moment))

    def scale_leaves_(self, factor: float) -> None:
        """Multiplies the second moments of the first stage: that far their past counts beside what comes."""
        if self.plan.stages:
            for moment in self._known_moments()[0]:
                moment.mul_(factor)

    def _entering(
        self, values: Tensor, leaves: Tensor | None = None
    ) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Stage by stage the moments and matrices of its runs, and the values that enter them, or ``leaves``.

        The matrices may be changed before the next stage is asked for.
        """
        lead = self.plan.lead
        for (stage, matrices), moments in zip(self._stages, self._known_moments(), strict=True):
            seen = leaves if leaves is not None and stage is self.plan.stages[0] else None
            if not self.plan.is_full:
                entering = _split(stage, values)  # the leading outputs of the stage before, in the order of its groups
                yield moments, matrices, entering if seen is None else _split(stage, seen)
                if stage is not self.plan.stages[-1]:
                    runs = zip(stage.runs, matrices, entering, strict=True)
                    heads = [(run, torch.bmm(m[..., :lead].flatten(0, 1).mT, v)) for run, m, v in runs]
                    values = _join([u.view(self.count, run.groups * lead, u.shape[-1]) for run, u in heads])
                continue
            yield moments, matrices, _split(stage, _gather(stage, values if seen is None else seen))
            values = _apply([(stage, [matrix.mT for matrix in matrices])], values)

    def _known_moments(self) -> list[list[Tensor]]:
        if self._moments is None:
            raise ValueError("this rotation keeps no second moments")
        return self._moments

    def refit_(self, usable: Tensor | None = None, *, entering: Tensor | None = None) -> Tensor | None:
        """One orthogonal iteration of every group on its second moment, with transport, in place.

        Args:
            usable: bool ``(count,)``; rotations where it is False stay as they are.
            entering: how the coordinates themselves have turned, ``(count, n, n)``; groups see their own blocks of it.
                Of the leading plan only.

        Returns:
            How the leading outputs of the last stage have turned, ``(count, groups, lead, lead)``; None in the full
            plan, whose outputs all go on, and without a stage.

        Cost: a QR decomposition and four products of each group.
        """
        change: Tensor | None = None  # of the leading outputs of the stage before, (count, groups, lead, lead)
        # What is kept is computed all the same and left out afterwards: nothing is read on the host.
        keep = None if usable is None else ~usable.view(-1, 1, 1, 1)
        for (stage, matrices), moments in zip(self._stages, self._known_moments(), strict=True):
            changes = []
            first = 0
            for run, moment, matrix in zip(stage.runs, moments, matrices, strict=True):
                before, moved = matrix, moment
                own: Tensor | None = None
                if change is not None:
                    # Runs take their children in order, as ``plan`` lists them.
                    children = run.span // self.plan.lead
                    own, change = change[:, :children], change[:, children:]
                elif entering is not None and stage is self.plan.stages[0]:
                    own = _own_blocks(entering[:, first : first + run.span, first : first + run.span], run)
                    first += run.span
                if own is not None:
                    moved = _transport(own, _transport(own, moment).mT).mT
                    before = _transport(own, matrix)
                shift = SHIFT[matrix.dtype] * moved.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
                after = orthogonalize(torch.addcmul(moved @ before, before, shift))
                if keep is not None:
                    after, moved = torch.where(keep, matrix, after), torch.where(keep, moment, moved)
                if not self.plan.is_full:
                    lead = self.plan.lead
                    changes.append(after[..., :lead].mT @ before[..., :lead])
                matrix.copy_(after)
                moment.copy_(moved)
            change = _join(changes) if changes else None
        return change


def identity_matrices(plan: Plan, count: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Matrices of ``count`` rotations that leave everything as it is, ``(count, plan.numel)``."""
    matrices = torch.zeros(count, plan.numel, dtype=dtype, device=device)
    for view in (view for runs in plan.views(matrices) for view in runs):
        view.diagonal(dim1=-2, dim2=-1).fill_(1)
    return matrices


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal factor of ``Q R``, R with a diagonal >= 0, ``(..., n, n)``: by Householder reflections.

    Accurate whatever the condition; columns of zero are completed to a basis.
    """
    q, r = torch.linalg.qr(matrices)
    # LAPACK leaves the signs open: chosen so, a basis that fits already does not flip.
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * signs.to(q.dtype).unsqueeze(-2)


RANK = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Energy over the largest entry of a second moment below which a direction has none: what rounding leaves."""


def _eigenvectors(moments: Tensor) -> Tensor:
    """Orthonormal eigenvectors of symmetric matrices, the largest eigenvalue first; those without energy in order."""
    # In float64, relative to the largest entry and without subnormal numbers: on the second moments of one float32
    # gradient with dead rows the decomposition does not always converge.
    scale = moments.abs().amax((-2, -1), keepdim=True)
    relative = moments.double() / torch.where(scale > 0, scale, 1.0)
    relative.masked_fill_(relative.abs() < 1e-30, 0.0)
    slope = torch.linspace(1, 0, moments.shape[-1], dtype=torch.float64, device=moments.device)
    energies, vectors = torch.linalg.eigh(relative)
    empty = vectors * (energies < RANK[moments.dtype]).unsqueeze(-2)
    among = empty @ empty.mT
    # Directions of equal energy, as those of none, are chosen by a slope and not by rounding; for those of none it is
    # steep, and below 0, so that they stay the last.
    relative.diagonal(dim1=-2, dim2=-1).add_(1e-9 * slope)
    relative += among @ (1e-3 * (slope - 1).unsqueeze(-1) * among)
    return torch.linalg.eigh(relative).eigenvectors.flip(-1).to(moments.dtype)


def _apply(stages: Sequence[tuple[Stage, Sequence[Tensor]]], x: Tensor, dim: int = -2) -> Tensor:
    """Multiplies every group of some stages by its matrix, along ``dim``, stage after stage; ``x`` stays as it is."""
    own = False  # whether x is ours to write to
    for stage, matrices in stages:
        part = _gather(stage, x, dim)
        turned = []
        for run, m, v in zip(stage.runs, matrices, _split(stage, part if dim == -2 else part.mT), strict=True):
            if dim == -2:
                turned.append(torch.bmm(m.flatten(0, 1), v).view(len(x), run.span, x.shape[-1]))
            else:
                # From the right, so that rows stay rows: a transposed copy can take longer than the product.
                rows = torch.bmm(v.mT, m.flatten(0, 1).mT).view(len(x), run.groups, x.shape[-2], run.size)
                turned.append(rows.transpose(1, 2).flatten(2))
        x = _put(stage, x, _join(turned, dim), dim, in_place=own)
        own = True
    return x


def _gather(stage: Stage, x: Tensor, dim: int = -2) -> Tensor:
    """The coordinates of the groups of a stage, one after the other."""
    index = stage.index_on(x.device)
    if index is None:
        return x
    # Within rows it takes four times as long as gather, which keeps x for a gradient: ``_put`` writes over it.
    if dim == -2 or torch.is_grad_enabled():
        return x.index_select(dim, index)
    return x.gather(dim, index.expand(*x.shape[:-1], -1))


def _put(stage: Stage, x: Tensor, part: Tensor, dim: int, *, in_place: bool) -> Tensor:
    """``x`` with ``part`` where ``_gather`` took it from."""
    index = stage.index_on(x.device)
    if index is None:
        return part
    if dim == -2:
        return (x.index_copy_ if in_place else x.index_copy)(dim, index, part)
    return (x.scatter_ if in_place else x.scatter)(dim, index.expand_as(part), part)


def _split(stage: Stage, part: Tensor) -> list[Tensor]:
    """``(count * groups, size, columns)`` for each run, of the coordinates of all groups in order."""
    count, columns = len(part), part.shape[-1]
    pieces = (part,) if len(stage.runs) == 1 else part.split_with_sizes([run.span for run in stage.runs], -2)
    runs = list(zip(stage.runs, pieces, strict=True))
    if count == 1 or part.stride(-1) == 1:
        return [piece.reshape(count * run.groups, run.size, columns) for run, piece in runs]
    # Several transposed matrices: copied row by row, as they lie in memory.
    return [piece.mT.unflatten(-1, run).transpose(1, 2).flatten(0, 1).mT for run, piece in runs]


def _outer(v: Tensor, moment: Tensor) -> Tensor:
    """``v v^T`` of the groups of a run, of the shape of their moments."""
    return torch.bmm(v, v.mT).view(moment.shape)


def _join(parts: list[Tensor], dim: int = 1) -> Tensor:
    """Concatenates."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _transport(change: Tensor, matrix: Tensor) -> Tensor:
    """``T M`` with T block-diagonal: ``(count, groups * children, lead, lead)`` and ``(count, groups, size, size)``."""
    count, groups, size, columns = matrix.shape
    lead = change.shape[-1]
    rows = matrix.reshape(count, groups * (size // lead), lead, columns)
    return (change @ rows).view(count, groups, size, columns)


def _own_blocks(matrix: Tensor, run: Run) -> Tensor:
    """The diagonal blocks ``(count, groups, size, size)`` of ``(count, span, span)``."""
    split = matrix.reshape(len(matrix), *run, *run)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _children(blocks: Tensor, lead: int) -> Tensor:
    """The diagonal blocks ``(count, columns, groups * children, lead, lead)`` of matrices of groups."""
    count, columns, groups, size, _ = blocks.shape
    children = size // lead
    split = blocks.reshape(count, columns, groups, children, lead, children, lead)
    return split.diagonal(dim1=3, dim2=5).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)

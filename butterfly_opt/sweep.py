"""Closed forms for the group matrices of a rotation that diagonalises a symmetric matrix, from the leaves to the root.

With A the matrix in the coordinates that enter a stage, and g the coordinates of a group, in the *leading* plan
the matrix of the group holds eigenvectors of ``A_gg``. Those that are coupled to other groups most go on:

    energy    |A_{-g,g} v|^2                            what is off the diagonal for good if v stops here
    logdet    log v^T A_gg v - log v^T ((A^-1)_gg)^-1 v     nats that the others tell about v, for a Gaussian

Both vanish for a direction that no other group is coupled to, so that a planted basis of the same plan is found to
rounding. The root is an eigendecomposition. With logdet the directions V that stop are then turned against those that
go on, U, to fewer nats that all the rest tells about V together (``_turned``):

    log |V^T A_gg V| + log |V^T (A^-1)_gg V|

In the *full* plan of radix 2 every pair gets its Jacobi angle (off-diagonal energy falls by ``2 a_ij^2``), which is
defined up to the order of the two outputs. That choice decides everything after it: later stages mix only
coordinates with equal digits here, so what is coupled must come to lie on one side. With ``s_p = +-1`` for "pair p
exchanged" the energy on equal sides is ``s^T W s / 2`` plus a constant, ``W_pq = a_ll^2 + a_hh^2 - a_lh^2 - a_hl^2``
for the lower (l) and higher (h) partners of p and q; s is the sign of W's leading eigenvector, exact where the
eigenbasis is such a butterfly (there ``W_pq = s_p s_q |W_pq|``: Perron). Larger radices take eigenvectors, the largest
eigenvalue first.
"""

import math

import torch
from torch import Tensor

from butterfly_opt.plan import Plan, Run, Stage
from butterfly_opt.rotation import Rotation, identity_matrices

TURNS = 4
"""Times that V and U are turned: held-out nats of digits, (16, 4) and (32, 8), are 42.2 / 45.4 with none, 42.8 / 45.9
with 4, 42.9 / 46.0 with 8 and with 16; factor analysis of equal memory 42.4 / 45.8."""

MAX_LENGTHS = 4
"""Lengths of a turn that are tried, each half the one before."""


def sweep(matrix: Tensor, plan: Plan, criterion: str, *, turns: int = TURNS) -> Rotation:
    """The rotation Q that brings ``Q^T A Q`` near a diagonal matrix, in one pass over the stages.

    Args:
        matrix: A, ``(n, n)``, symmetric, float32 or float64; positive definite for "logdet".
        plan: the groups.
        criterion: "energy" or "logdet"; the full plan knows only "energy".
        turns: of "logdet", that many times V is turned against U.

    Cost: O(n^2 block); O(n^3) for "logdet" and for the first stage of radix 2.
    """
    rotation = Rotation(plan, identity_matrices(plan, 1, matrix.dtype, matrix.device))
    for stage, matrices in zip(plan.stages, plan.views(rotation.matrices), strict=True):
        taken = stage.index_on(matrix.device)
        index = torch.arange(plan.n, device=matrix.device) if taken is None else taken
        if plan.is_full:
            found = _full(matrix, stage, index, plan.block)
        else:
            # The root has no others to be coupled to.
            inverse = torch.linalg.inv(matrix) if criterion == "logdet" and stage is not plan.stages[-1] else None
            found = _leading(matrix, inverse, stage, plan.lead, turns)
        for old, new in zip(matrices, found, strict=True):
            old.copy_(new)
        if plan.is_full:
            rows = _turn(matrix[index], found, stage.runs)
            matrix = matrix.index_copy(0, index, rows)
            matrix = matrix.index_copy(1, index, _turn(matrix[:, index].mT, found, stage.runs).mT)
        elif stage is not plan.stages[-1]:
            leading = [m[..., : plan.lead] for m in found]
            matrix = _turn(_turn(matrix, leading, stage.runs).mT, leading, stage.runs)
    return rotation


def _turn(rows: Tensor, matrices: list[Tensor], runs: tuple[Run, ...]) -> Tensor:
    """``B^T rows`` group by group, ``(1, groups, size, outputs)`` each; the coordinates of all groups in order."""
    parts = rows.split([run.span for run in runs])
    return torch.cat(
        [(m[0].mT @ part.unflatten(0, run)).flatten(0, 1) for m, part, run in zip(matrices, parts, runs, strict=True)]
    )


def _blocks(matrix: Tensor, runs: tuple[Run, ...]) -> list[Tensor]:
    """The diagonal blocks of the groups of each run, ``(groups, size, size)``."""
    blocks, start = [], 0
    for run in runs:
        square = matrix[start : start + run.span, start : start + run.span].unflatten(0, run).unflatten(2, run)
        blocks.append(square.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        start += run.span
    return blocks


def _leading(matrix: Tensor, inverse: Tensor | None, stage: Stage, lead: int, turns: int) -> list[Tensor]:
    """Eigenvectors of the groups, those most coupled to other groups first; with "logdet" turned from there."""
    found = []
    rows = matrix.split([run.span for run in stage.runs])
    others = _blocks(matrix if inverse is None else inverse, stage.runs)
    for run, own, part, other in zip(stage.runs, _blocks(matrix, stage.runs), rows, others, strict=True):
        values, vectors = torch.linalg.eigh(own)
        if run.size == len(matrix):
            coupled = values  # the root: there is no other group, and the order would be that of rounding
        elif inverse is None:
            # Within its group v is an eigenvector: the rest of its energy lies in others.
            coupled = (vectors.mT @ part.unflatten(0, run)).square().sum(-1) - values.square()
        else:
            alone = (vectors * torch.linalg.solve(other, vectors)).sum(-2)
            coupled = values.log() - alone.log()
        order = coupled.argsort(-1, descending=True)
        vectors = vectors.take_along_dim(order.unsqueeze(-2), dim=-1)
        if inverse is not None:
            vectors = _turned(vectors, own, other, lead, turns)
        found.append(vectors[None])
    return found


def _turned(vectors: Tensor, matrix: Tensor, inverse: Tensor, lead: int, turns: int) -> Tensor:
    """Eigenvectors of groups ``(..., size, size)`` whose last ``size - lead`` share less with all the rest.

    Every v of V is turned towards every u of U by the Newton step of its own angle, all at once. For the angle of v and
    u alone, and one of the two matrices M, with ``K = (V^T M V)^-1``, ``Z = K V^T M U`` and ``s_u = u^T M u`` less what
    V explains of it, ``log |V^T M V|`` has the slope ``2 Z_vu`` and the curvature ``2 (s_u K_vv - 1 - Z_vu^2)``.
    """
    u, v = vectors[..., :lead], vectors[..., lead:]
    shared = _shared(v, matrix, inverse)
    for _ in range(turns):
        slope, bend = torch.zeros_like(v.mT @ u), torch.zeros_like(v.mT @ u)
        for m in (matrix, inverse):
            k, across = torch.linalg.inv_ex(v.mT @ m @ v).inverse, v.mT @ m @ u
            z = k @ across
            rest = (u * (m @ u)).sum(-2) - (across * z).sum(-2)
            slope += 2 * z
            bend += 2 * (k.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * rest.unsqueeze(-2) - 1 - z.square())
        # At most a radian or so; from a maximum downhill, too.
        angles = -slope / torch.maximum(bend.abs(), 1 + slope.abs())
        length = torch.ones_like(shared)
        for _ in range(MAX_LENGTHS):
            own = length[..., None, None] * angles
            q = torch.linalg.qr(torch.cat([u - v @ own, v + u @ own.mT], -1)).Q
            after = _shared(q[..., lead:], matrix, inverse)
            # False for a NaN too, of a matrix that is singular to rounding.
            falls = after < shared
            if falls.all():
                break
            length = torch.where(falls, length, length / 2)
        taken = falls[..., None, None]
        u, v = torch.where(taken, q[..., :lead], u), torch.where(taken, q[..., lead:], v)
        shared = torch.where(falls, after, shared)
    # Each part again by the eigenvectors of what it sees, the largest eigenvalue first.
    return torch.cat([x @ torch.linalg.eigh(x.mT @ matrix @ x).eigenvectors.flip(-1) for x in (u, v)], -1)


def _shared(v: Tensor, matrix: Tensor, inverse: Tensor) -> Tensor:
    """``log |V^T A V| + log |V^T A^-1 V|`` of each group: twice the nats that V and all the rest share."""
    return torch.logdet(v.mT @ matrix @ v) + torch.logdet(v.mT @ inverse @ v)


def _full(matrix: Tensor, stage: Stage, index: Tensor, radix: int) -> list[Tensor]:
    """The matrices of a stage of the full plan."""
    groups = matrix[index][:, index]
    if radix > 2:
        return [torch.linalg.eigh(own).eigenvectors.flip(-1)[None] for own in _blocks(groups, stage.runs)]
    (own,) = _blocks(groups, stage.runs)
    angle = 0.5 * torch.atan2(2 * own[:, 0, 1], own[:, 0, 0] - own[:, 1, 1])
    # The smallest of the angles that diagonalise; ``_exchanges`` settles the order of the outputs.
    angle = angle - math.pi / 2 * torch.round(angle / (math.pi / 2))
    turn = _givens(angle)
    # Rows and columns of the pairs turned; coordinates without a partner are needed beside them.
    turned = matrix.index_copy(0, index, _turn(matrix[index], [turn], stage.runs))
    turned = turned.index_copy(1, index, _turn(turned[:, index].mT, [turn], stage.runs).mT)
    exchanged = _exchanges(turned, index.view(-1, 2))
    return [torch.where(exchanged.view(1, -1, 1, 1), _givens(angle + math.pi / 2), turn)]


def _givens(angle: Tensor) -> Tensor:
    """``(1, pairs, 2, 2)``: columns ``(cos, sin)`` and ``(-sin, cos)``."""
    c, s = angle.cos(), angle.sin()
    return torch.stack((c, -s, s, c), -1).view(1, -1, 2, 2)


def _exchanges(matrix: Tensor, pairs: Tensor) -> Tensor:
    """Which pairs ``(count, 2)`` exchange their outputs, bool ``(count,)``; see the module docstring."""
    n = len(matrix)
    stride = int(pairs[0, 1] - pairs[0, 0])
    low = torch.arange(n, device=matrix.device)
    low = low[low // stride % 2 == 0]  # lower partners, with and without a higher one
    exists = low + stride < n
    high = (low + stride).clamp_max(n - 1)
    energy = matrix.square()
    # A partner that does not exist couples with nothing.
    across = exists.to(matrix.dtype)
    both = across[:, None] * across
    coupling = energy[low][:, low] + both * energy[high][:, high]
    coupling = coupling - across * energy[low][:, high] - across[:, None] * energy[high][:, low]
    # Only pairs whose lower digits agree meet again.
    coupling = torch.where((low % stride)[:, None] == low % stride, coupling, 0.0)
    coupling.diagonal().zero_()
    chosen = torch.zeros(n, dtype=torch.bool, device=matrix.device)
    for digit in range(min(stride, n)):
        own = (low % stride == digit).nonzero().squeeze(-1)
        leading = torch.linalg.eigh(coupling[own][:, own]).eigenvectors[:, -1]
        # Coordinates without a partner decide which side is which; without any, few exchanges are as good as many.
        alone = (leading * ~exists[own]).sum()
        side = torch.where(alone != 0, alone, leading.sum())
        chosen[low[own]] = (leading * torch.where(side < 0, -1.0, 1.0) < 0) & exists[own]
    return chosen[pairs[:, 0]]

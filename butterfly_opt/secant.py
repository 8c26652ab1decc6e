"""The inverse Hessian from clean secant pairs ``y = H s``: multi-secant least squares, group by group.

A pair is *clean* where both gradients are of one function, without noise. Then a group of coordinates knows more than
second moments. With every pair at weight 1, whatever its length, and decay ``beta``, each group keeps of its own values

    B = sum s s^T / |s|^2        C = sum y s^T / |s|^2        A = sum y y^T / |s|^2

Its symmetric least-squares curvature H solves the Lyapunov equation ``B H + H B + 2 lam H = C + C^T + 2 lam h0 I``,
``h0 = tr C / tr B``, entry by entry in the eigenbasis of B. A group of n coordinates that sees whole pairs is exact
after n independent ones: up to ``block`` coordinates this is a dense multi-secant quasi-Newton method.

A longer axis is a leading plan (``butterfly_opt.plan``). What a group cannot explain by its own coordinates is the
residual ``R = A - C B^-1 C^T``: its ``lead`` leading directions meet those of other groups in the next stage, the
others keep the group's own curvature. Where the eigenbasis of H is a wide butterfly, R has rank ``lead`` and the
estimate becomes exact. Where children turn, the sums of their parents are transported as in ``butterfly_opt.rotation``,
and forgotten in so far as the leading subspace has moved.

A tensor of several long axes has one rotation per axis, its sums taken over the columns in the rotated coordinates of
the other axes, each at its own curvature, and the diagonal ``E[u w] / E[w^2]``.

The estimate is ``P = Q diag(1 / |h|) Q^T``, positive definite by construction; negative ``h`` are counted.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from butterfly_opt.basis import Basis
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.plan import Plan, check_plan, make_plan
from butterfly_opt.rotation import Rotation

State = dict[str, Any]

PRIOR = 0.1
"""lam where the pairs contradict one another, in pairs. Gradient evaluations of a logistic regression on digits
to 1e-4: 52 / 45 / 69 / 74 for lam = 0.3 / 0.1 / 0.03 / 0.01. Pairs of a quadratic agree, and lam goes to 0."""

ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Directions of B below this share of its largest eigenvalue are unknown, and the least ``|h|``, over the largest."""

LEAST_WEIGHT = 1e-3
"""Pairs: residuals along a direction that has seen less count by this."""

FORGET = 32.0
"""Sums of a parent are kept by the overlap of its children's old and new leading directions to this power, over the
share of their tails that is unexplained, which counts from ``LEAST_UNEXPLAINED`` on. Random eigenbases of 256 want a
long memory, condition left after 300 pairs 834 with power 32 and 1797 with 512; where tails become exact, what the
parent knows from before is wrong, and 32 never gets there (2.4 instead of 1.000)."""

LEAST_UNEXPLAINED = 1 / 16

DIAGONAL_BETA = 0.9
"""Decay of the diagonal and of the sums of a tensor with several rotated axes, whose coordinates turn meanwhile."""


def new_state(
    shape: Sequence[int],
    *,
    block: int = 64,
    lead: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The state of an estimate for tensors of one shape: tensors and plain numbers.

    Tensors of at most ``block`` entries, or with one axis longer than 1, are one vector.

    Raises:
        TypeError: if ``dtype`` is neither float32 nor float64.
        ValueError: if the tensors are empty, a number is out of range, or ``lead = block``.

    Memory: four matrices per group, ``4 plan.numel`` numbers an axis.
    """
    if dtype not in ROUNDING:
        raise TypeError(f"an estimate must be float32 or float64, got {dtype}")
    check_plan(block, lead)
    if lead == block:
        raise ValueError(f"clean pairs need lead < block, the leading plan, got lead = block = {block}")
    values = torch.ones(tuple(shape), dtype=dtype, device=device)
    if not values.numel():
        raise ValueError(f"an estimate needs at least one entry, got shape {tuple(shape)}")
    state: State = {"values": values, "block": block, "lead": lead}
    state["pairs"] = torch.zeros((), dtype=dtype, device=device)
    state["negative"] = torch.zeros((), dtype=torch.int64, device=device)
    state["stale"] = 0
    for dim, n in _axes(values, block):
        rotation = Rotation.identity(n, block=block, lead=lead, dtype=dtype, device=device)
        state[f"matrices{dim}"] = rotation.matrices
        for name in ("gram", "cross", "energy"):
            state[f"{name}{dim}"] = torch.zeros_like(rotation.matrices)
    if len(_axes(values, block)) > 1:
        state["disp_sq"], state["products"] = torch.zeros_like(values), torch.zeros_like(values)
    return state


def update_(state: State, delta_theta: Tensor, delta_grad: Tensor, *, beta: float = 1.0) -> None:
    """Takes one pair ``y = H s`` into the sums, in place.

    Args:
        state: see ``new_state``.
        delta_theta: s, of the shape of the tensor; finite and not zero, which is not checked here: see ``check_pair``.
        delta_grad: y, of the same shape.
        beta: decay of the sums.

    Cost: three products of columns a group, and a refit (two eigendecompositions a group) where there are several
    stages or axes; else none before the estimate is asked for.
    """
    values = state["values"]
    axes, basis = _axes(values, state["block"]), _basis(state)
    scale = delta_theta.abs().max()
    # First to numbers of order 1: squares of short displacements underflow.
    s, y = ((x / scale).to(values.dtype).reshape(basis.shape) for x in (delta_theta, delta_grad))
    # Both by the norm of the s before: the right side is made first.
    s, y = s / s.norm(), y / s.norm()
    state["pairs"].mul_(beta).add_(1)
    if len(axes) > 1:
        _observe_axes_(state, basis, s, y, min(beta, DIAGONAL_BETA))
    else:
        _observe_(state, 0, s.view(1, -1, 1), y.view(1, -1, 1), beta)
    state["stale"] = 1
    # Later stages take the next pair in this basis; a single dense group can wait until it is asked.
    if len(axes) > 1 or len(_plan(state, axes[0][1]).stages) > 1:
        refit_(state)


def refit_(state: State) -> None:
    """Matrices and curvatures from the sums, in place; does nothing where no pair has come since."""
    if not state["stale"]:
        return
    axes = _axes(state["values"], state["block"])
    changed = [_refit_axis(state, dim, n) for dim, n in axes]
    h = changed[0]
    if len(axes) > 1:
        h = state["products"] / state["disp_sq"].clamp_min(torch.finfo(h.dtype).tiny)
    h = h.reshape(state["values"].shape)
    floor = ROUNDING[h.dtype] * h.abs().max()
    state["negative"].copy_((h < -floor).sum())
    # Where all curvature is 0 its inverse stays finite.
    state["values"].copy_(h.abs().clamp_min(floor).clamp_min(torch.finfo(h.dtype).tiny))
    state["stale"] = 0


def operator(state: State, *, damping: float = 0.0) -> RotatedDiagonal:
    """``P = Q diag(1 / (|h| + damping)) Q^T``, of its own memory."""
    refit_(state)
    basis = _basis(state)
    copies = [(dim, Rotation(r.plan, r.matrices.clone())) for dim, r in basis.rotations]
    return RotatedDiagonal(Basis(basis.shape, copies), 1 / (state["values"].view(basis.shape) + damping))


def apply_inverse(state: State, grad: Tensor) -> Tensor:
    """``P g``, of the shape and dtype of ``g``; before the first pair ``g`` itself."""
    refit_(state)
    basis = _basis(state)
    rotated = basis.to_rotated(grad.to(state["values"].dtype).reshape(basis.shape))
    return basis.from_rotated(rotated / state["values"].view(basis.shape)).view(grad.shape).to(grad.dtype)


def check_pair(state: State, delta_theta: Tensor, delta_grad: Tensor) -> None:
    """Checks a pair before it enters the state. Cost: it reads both tensors, and waits for a GPU.

    Raises:
        TypeError: if one is no tensor, or not real floating point.
        ValueError: if a shape differs, an entry is not finite, or the displacement is zero.
    """
    shape = state["values"].shape
    for name, x in (("delta_theta", delta_theta), ("delta_grad", delta_grad)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be real floating point, got {x.dtype}")
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got {(~torch.isfinite(x)).sum().item()} entries that are not")
    largest = delta_theta.abs().max()
    if not largest > 0:
        raise ValueError("delta_theta must not be zero: a pair without displacement says nothing of the curvature")
    if not torch.isfinite((delta_grad / largest).to(state["values"].dtype)).all():
        raise ValueError(
            f"delta_grad over delta_theta must be finite in {state['values'].dtype}, got a displacement of at most "
            f"{largest.item():.3g} and a change of gradient up to {delta_grad.abs().max().item():.3g}"
        )


class SecantEstimate:
    """Tracks ``P = Q diag(1 / |h|) Q^T ~ H^-1`` of a function of a tensor from pairs ``y = H s``.

    Args:
        shape: shape of the tensor.
        block: the largest group of coordinates with a dense curvature. With ``block >= numel`` the estimate is dense
            and, on a quadratic function, exact after as many independent pairs as there are entries.
        lead: directions of a group that meet those of other groups, at most ``block // 2``.
        beta: decay of the sums; 1 for a quadratic function, and measured level with 0.98 on a logistic regression.
        dtype: float32 or float64, of the state.

    Raises:
        TypeError, ValueError: see ``new_state``; if ``beta`` is not in (0, 1].

    Example:
        >>> estimate = SecantEstimate((2,))
        >>> estimate.update(s, hessian @ s)
        >>> estimate.inverse_hessian() @ gradient
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        block: int = 64,
        lead: int = 16,
        beta: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0.0 < beta <= 1.0:
            raise ValueError(f"Invalid beta value: {beta}, expected a number in (0, 1]")
        self.beta = beta
        self.state = new_state(shape, block=block, lead=lead, dtype=dtype)

    def update(self, delta_theta: Tensor, delta_grad: Tensor) -> None:
        """Takes one pair ``(s, y)``, tensors of the shape of the parameter.

        Raises:
            TypeError, ValueError: see ``check_pair``; the state is then as before.
        """
        check_pair(self.state, delta_theta, delta_grad)
        update_(self.state, delta_theta.detach(), delta_grad.detach(), beta=self.beta)

    def inverse_hessian(self, *, damping: float = 0.0) -> RotatedDiagonal:
        """``Q diag(1 / (|h| + damping)) Q^T``, parameter units squared by loss units, on the flattened tensor.

        Raises:
            ValueError: before the first pair, or if ``damping`` is negative or not finite.
        """
        if not self.state["pairs"] > 0:
            raise ValueError("no estimate before the first pair: call update(delta_theta, delta_grad)")
        if not 0.0 <= damping < float("inf"):
            raise ValueError(f"Invalid damping value: {damping}, expected a finite number >= 0")
        return operator(self.state, damping=damping)

    @property
    def negative_curvature(self) -> int:
        """Number of directions whose curvature is negative; they enter P by their absolute value."""
        refit_(self.state)
        return int(self.state["negative"])


def curvature(gram: Tensor, cross: Tensor, prior: Tensor, least: Tensor) -> Tensor:
    """The symmetric least-squares curvature of pairs.

    lam is ``PRIOR`` times the variance that the pairs show over that of the entries of H, at most ``PRIOR``. In the
    eigenbasis of B the columns i and j both tell ``H_ij``, as ``C_ij / b_j`` and ``C_ji / b_i``; their difference has
    the variance ``nu^2 (1 / b_i + 1 / b_j)``, nu^2 that of an entry of ``y - H s``. Exact pairs agree.

    Args:
        gram: B, ``(..., n, n)``.
        cross: C, of the same shape.
        prior: h0, ``(..., 1, 1)``: where nothing is known.
        least: eigenvalues of B up to this are rounding, > 0, ``(..., 1, 1)``.
    """
    gram_values, basis = torch.linalg.eigh(gram)
    known = gram_values > 1e4 * least.squeeze(-1)
    b = torch.where(gram_values > least.squeeze(-1), gram_values, 0.0)
    rows, columns = b.unsqueeze(-1), b.unsqueeze(-2)
    turned = basis.mT @ cross @ basis
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    prior = prior * eye
    both = known.unsqueeze(-1) & known.unsqueeze(-2)
    total = torch.where(both, rows + columns, 1.0)
    entries = torch.where(both, (turned + turned.mT) / total, 0.0)
    # Entries off the diagonal are told twice; a group of one coordinate has none.
    weight = torch.where(both, rows * columns / total, 0.0) * (1 - eye)
    apart = torch.where(both, turned / torch.where(both, columns, 1.0), 0.0)
    noise = ((apart - apart.mT) * weight).square().sum((-2, -1)) / weight.sum((-2, -1)).clamp_min(1e-30)
    spread = ((entries - prior).square() * both * total).sum((-2, -1)) / (both * total).sum((-2, -1)).clamp_min(1e-30)
    share = noise / torch.maximum(noise, spread).clamp_min(torch.finfo(gram.dtype).tiny)
    # With ``least`` an entry that was never seen is the prior, and not 0 / 0.
    lam = PRIOR * share[..., None, None] + least
    h = (turned + turned.mT + 2 * lam * prior) / (rows + columns + 2 * lam)
    return basis @ h @ basis.mT


def _unexplained(gram: Tensor, cross: Tensor, energy: Tensor) -> Tensor:
    """``R = A - C B^-1 C^T``, the change of gradient that a group's own displacement leaves."""
    values, basis = torch.linalg.eigh(gram)
    known = values > ROUNDING[gram.dtype] * values[..., -1:].clamp_min(torch.finfo(gram.dtype).tiny)
    seen = cross @ basis
    return energy - (seen * torch.where(known, 1 / torch.where(known, values, 1.0), 0.0).unsqueeze(-2)) @ seen.mT


def _observe_(state: State, dim: int, s: Tensor, y: Tensor, beta: float) -> None:
    """Takes columns ``(1, n, columns)`` into the sums of an axis."""
    plan = _plan(state, s.shape[-2])
    sums = (plan.views(state[f"{name}{dim}"]) for name in ("gram", "cross", "energy"))
    matrices = state[f"matrices{dim}"]
    for stage, entering_s, entering_y in zip(
        zip(*sums, strict=True), _entering(plan, matrices, s), _entering(plan, matrices, y), strict=True
    ):
        for gram, cross, energy, v, u in zip(*stage, entering_s, entering_y, strict=True):
            gram.mul_(beta).add_(v @ v.mT)
            cross.mul_(beta).add_(u @ v.mT)
            energy.mul_(beta).add_(u @ u.mT)


def _observe_axes_(state: State, basis: Basis, s: Tensor, y: Tensor, beta: float) -> None:
    """Takes a pair into the sums of every axis, and into the diagonal."""
    w, u = basis.to_rotated(s), basis.to_rotated(y)
    state["disp_sq"].mul_(beta).add_(w.square())
    state["products"].mul_(beta).add_(u * w)
    h = state["values"]
    for dim, rotation in basis.rotations:
        # Column j of the other axes sees its own curvature h_j: stiff ones, which leak into the others, count as much.
        own = h.log().mean(dim, keepdim=True).exp()
        # Back along its own axis: groups are fitted to the original coordinates of it.
        back = Basis(basis.shape, [(dim, rotation)])
        entering = (back.from_rotated(x).movedim(dim, 0) for x in (w * own.sqrt(), u / own.sqrt()))
        columns = [x.reshape(1, h.shape[dim], -1) for x in entering]
        _observe_(state, dim, columns[0], columns[1], beta)


def _entering(plan: Plan, matrices: Tensor, values: Tensor) -> Iterator[list[Tensor]]:
    """Stage by stage what enters the groups of each run, ``(1, groups, size, columns)``."""
    for stage, rotations in zip(plan.stages, plan.views(matrices), strict=True):
        parts = values.split([run.span for run in stage.runs], dim=-2)
        entering = [part.unflatten(-2, run) for part, run in zip(parts, stage.runs, strict=True)]
        yield entering
        leading = [m[..., : plan.lead].mT @ v for m, v in zip(rotations, entering, strict=True)]
        values = torch.cat([part.flatten(1, 2) for part in leading], dim=1)


def _refit_axis(state: State, dim: int, n: int) -> Tensor:
    """Fits the matrices of an axis, from the leaves to the root; its curvatures, ``(n,)`` in rotated coordinates."""
    plan = _plan(state, n)
    names = ("gram", "cross", "energy", "matrices")
    views = [plan.views(state[f"{name}{dim}"]) for name in names]
    h = state["values"].new_zeros(n)
    # Of the leading outputs of the stage before, (1, groups, lead, lead) and (1, groups).
    change = keep = h.new_zeros(0)
    # Of all leaves together: what a group that has not moved is taken for.
    b, c, a = (torch.stack([_trace(run).sum() for run in view[0]]).sum() for view in views[:3])
    default = _prior(b, c, a, torch.ones_like(b))
    for stage, *runs in zip(plan.stages, *views, strict=True):
        found, changes, keeps = [], [], []
        for gram, cross, energy, matrix in zip(*runs, strict=True):
            if stage is not plan.stages[0]:
                children = matrix.shape[1] * (matrix.shape[-1] // plan.lead)
                own, change = change[:, :children], change[:, children:]
                kept, keep = keep[:, :children], keep[:, children:]
                _transport_(own, kept, (gram, cross, energy), matrix)
            if stage is plan.stages[-1]:
                values, _, after = _eigen(_Group(gram, cross, energy, default, n))
            else:
                values, unexplained, after = _leading(_Group(gram, cross, energy, default, n), plan.lead)
                moved = after[..., : plan.lead].mT @ matrix[..., : plan.lead]
                overlap = (moved.square().sum((-2, -1)) / plan.lead).clamp(0, 1)
                changes.append(moved)
                keeps.append(overlap ** (FORGET / unexplained.clamp_min(LEAST_UNEXPLAINED)))
            matrix.copy_(after)
            found.append(values.flatten())
        if changes:
            change, keep = torch.cat(changes, dim=1), torch.cat(keeps, dim=1)
        outputs = torch.cat(found)
        index = stage.index_on(h.device)
        h = outputs if index is None else h.index_copy(0, index, outputs)
    return h


class _Group:
    """The sums of groups of one size, and what is derived from their traces."""

    def __init__(self, gram: Tensor, cross: Tensor, energy: Tensor, default: Tensor, n: int) -> None:
        self.sums = gram, cross, energy
        traces = tuple(_trace(total)[..., None, None] for total in self.sums)
        self.size, self.n = gram.shape[-1], n
        self.least = (ROUNDING[gram.dtype] * traces[0]).clamp_min(torch.finfo(gram.dtype).tiny)
        self.prior = _prior(traces[0], traces[1], traces[2], default)
        self.count = n / self.size * traces[0].squeeze(-1)  # pairs, each by its share of the displacement

    def curvature(self, basis: Tensor | None = None) -> Tensor:
        """Of the group, or of some directions ``(..., size, k)`` of it."""
        gram, cross, _ = self.within(basis)
        return curvature(gram, cross, self.prior, self.least)

    def within(self, basis: Tensor | None) -> tuple[Tensor, ...]:
        """The sums of some directions."""
        return self.sums if basis is None else tuple(basis.mT @ total @ basis for total in self.sums)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _prior(gram: Tensor, cross: Tensor, energy: Tensor, default: Tensor) -> Tensor:
    """``h0 = tr C / tr B``, not far below the root mean square ``sqrt(tr A / tr B)``: curvatures may cancel."""
    safe = torch.where(gram > 0, gram, 1.0)
    return torch.where(gram > 0, torch.maximum(cross / safe, PRIOR * (energy.clamp_min(0) / safe).sqrt()), default)


def _leading(group: _Group, lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """A group that is no root: unexplained directions first, then its own eigenvectors; returns as ``_eigen``."""
    # As long as the group explains every pair by itself, its stiffest directions go on.
    own = group.curvature()
    left = torch.where(group.count.unsqueeze(-1) > group.size, _unexplained(*group.sums), own @ own)
    scale = left.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
    basis = torch.linalg.eigh((left + left.mT) / scale).eigenvectors.flip(-1)
    values, unexplained, turn = _eigen(group, basis[..., lead:])
    after = torch.cat((basis[..., :lead], basis[..., lead:] @ turn), dim=-1)
    # 0 for the leading outputs, which a later stage fills in.
    return torch.cat((torch.zeros_like(basis[..., 0, :lead]), values), dim=-1), unexplained, after


def _eigen(group: _Group, within: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``sign(h) sqrt(h^2 + nu^2)``, the mean share of nu^2 in it, and the eigenvectors of the curvature of a group.

    ``nu^2 = |v^T (y - H s)|^2 / (v^T s)^2`` is 0 where the group explains its pairs. Else the error of h may exceed h,
    and the inverse of an eigenvalue near 0 would be a long step along a direction that is not soft. The residuals of
    ``count`` pairs of ``size`` of n coordinates are too small by ``1 - size / count``.
    """
    values, basis = torch.linalg.eigh(group.curvature(within))
    b, c, a = ((basis * (total @ basis)).sum(-2) for total in group.within(within))
    rest = (a - 2 * values * c + values.square() * b).clamp_min(0)
    if group.size < group.n:
        # A residual is no larger than the change of gradient itself.
        rest = torch.minimum(
            rest / (1 - group.size / group.count.clamp_min(group.size)).clamp_min(1e-3), a.clamp_min(0)
        )
    rest = rest / (b + LEAST_WEIGHT)
    energy = values.square() + rest
    share = (rest / energy.clamp_min(torch.finfo(energy.dtype).tiny)).mean(-1)
    return torch.where(values < 0, -1.0, 1.0) * energy.sqrt(), share, basis


def _transport_(change: Tensor, keep: Tensor, sums: Sequence[Tensor], matrix: Tensor) -> None:
    """States the sums of groups in the new outputs of their children, and forgets, in place.

    Args:
        change: ``(1, groups * children, lead, lead)``.
        keep: ``(1, groups * children)``; the least of its children counts for a group.
        sums: ``(1, groups, size, size)`` each.
        matrix: of the groups, of the same shape; only stated anew.
    """
    lead, (count, groups, size, _) = change.shape[-1], matrix.shape
    own = change.view(count, groups, size // lead, lead, lead)

    def turn(rows: Tensor) -> Tensor:
        return (own @ rows.reshape(count, groups, -1, lead, size)).view(matrix.shape)

    for total in sums:
        total.copy_(keep.view(count, groups, -1).amin(-1)[..., None, None] * turn(turn(total).mT).mT)
    matrix.copy_(turn(matrix))


def _plan(state: State, n: int) -> Plan:
    return make_plan(n, state["block"], state["lead"])


def _axes(values: Tensor, block: int) -> list[tuple[int, int]]:
    """The rotated axes and their lengths: one of all entries, or those longer than 1."""
    long = [(dim, n) for dim, n in enumerate(values.shape) if n > 1]
    return [(0, values.numel())] if values.numel() <= block or len(long) < 2 else long


def _basis(state: State) -> Basis:
    values = state["values"]
    axes = _axes(values, state["block"])
    shape = values.shape if len(axes) > 1 else torch.Size((values.numel(),))
    return Basis(shape, [(dim, Rotation(_plan(state, n), state[f"matrices{dim}"])) for dim, n in axes])

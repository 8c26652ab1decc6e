"""Refitting the angles: one gradient step on a criterion that is smallest in the eigenbasis.

The criterion of a basis is ``E[y' P y + s' P^-1 s]`` at its best diagonal ``P = Q diag(D) Q^T``. With
``u = Q^T y``, ``w = Q^T s``, ``A = E[u^2]``, ``B = E[w^2]``:

    two-sided (clean pairs)   2 sum sqrt(A B)     dL/du = D u,  dL/dw = w / D,  D = sqrt(B / A)
    one-sided (noisy pairs)   2 sum sqrt(A)       dL/du = u / sqrt(A)           s taken as isotropic

Along an optimisation path ``s`` is far from isotropic: with clean pairs only the two-sided form ends
in the eigenbasis, and there every single pair has gradient zero.

With noisy pairs angle steps are Adam's, in radians, on gradients made dimensionless: a step is about
``refit_lr`` per angle whatever the scale of the loss, and ``ANGLE_EPS`` keeps rounding from being
amplified to a full step. The step length shrinks with the number of steps (``settling_rate``).

With clean pairs and angles shared by many columns they are damped Newton steps,
``NEWTON_DAMPING * gradient / E[curvature]``, at most ``MAX_NEWTON_STEP``: since the gradient of every pair
vanishes at the solution, they converge linearly. Where every pair of coordinates has an angle of its own
(vectors), stage after stage the angle is the closed-form Jacobi angle of a 2 x 2 least-squares Hessian
(``refit_jacobi_``): two pairs determine it, however parallel they are.

Many axes at once: ``pack_axes`` lays axes of any lengths behind one another, each starting at a
multiple of its own power of two. A stage with stride 2**l then pairs ``(i, i + 2**l)`` everywhere:
the whole collection is *one* butterfly, rotated and refitted with one sequence of operations.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from butterfly_opt.backend import TORCH, Backend, TritonBackend
from butterfly_opt.rotation import StoredPass, angle_curvature, angle_gradient, num_stages, pair_moments_pass_, rotate

ANGLE_BETAS = (0.9, 0.99)
ANGLE_EPS = 1e-4
STEP_COLUMNS = 8
MAX_STORED = 1 << 26
"""Numbers that a refit in torch keeps beside the state."""

SETTLING_STEPS = 800
NEWTON_DAMPING = 0.5
MAX_NEWTON_STEP = 0.3
CURVATURE_BETA = 0.9


class AngleState(NamedTuple):
    """The angles of one axis (or of a pack) and the averages of their gradients, all of one shape."""

    angles: Tensor
    mean: Tensor
    square: Tensor


def settling_rate(refit_lr: float, angle_steps: Tensor) -> Tensor:
    """Step length ``refit_lr / (1 + angle_steps / SETTLING_STEPS)``: it shrinks as the basis settles."""
    return refit_lr / (1 + angle_steps / SETTLING_STEPS)


def one_sided_residual(u: Tensor) -> Tensor:
    """Loss gradient ``u / sqrt(A) / k`` for columns ``u`` of shape ``(n, k)``, ``A`` their mean square."""
    grad_sq = u.square().mean(-1, keepdim=True)
    return u * (grad_sq.clamp_min(torch.finfo(u.dtype).tiny).rsqrt() / u.shape[-1])


def two_sided_scale(grad_sq: Tensor, disp_sq: Tensor) -> Tensor:
    """``D = sqrt(B / A)``; 0 where A or B is 0, which leaves such a coordinate out of the criterion."""
    return torch.where((grad_sq > 0) & (disp_sq > 0), (disp_sq / grad_sq).sqrt(), 0.0)


def step_angles_(state: AngleState, gradient: Tensor, *, refit_lr: float, taken: Tensor) -> None:
    """One Adam step on the angles, in place.

    Args:
        state: angles and averages.
        gradient: dimensionless gradient, of the shape of the angles.
        refit_lr: length of the first step in radians.
        taken: number of angle steps taken before; 0-d, or broadcast to the angles.
    """
    beta1, beta2 = ANGLE_BETAS
    state.mean.lerp_(gradient, 1 - beta1)
    state.square.lerp_(gradient.square(), 1 - beta2)
    state.angles.sub_(last_angle_step(state, refit_lr, taken + 1))


def last_angle_step(state: AngleState, refit_lr: float, taken: Tensor) -> Tensor:
    """What the ``taken``-th angle step subtracted, in radians; ``taken >= 1``."""
    beta1, beta2 = ANGLE_BETAS
    scale = (state.square / (1 - beta2**taken)).sqrt_().add_(ANGLE_EPS)
    rate = settling_rate(refit_lr, taken - 1) / (1 - beta1**taken)
    return state.mean / scale * rate


def refit_sketch_(
    sketch: Tensor,
    state: AngleState,
    *,
    steps: int,
    refit_lr: float,
    taken: Tensor,
    owned: Tensor | None = None,
    backend: Backend = TORCH,
) -> None:
    """Fits the angles of an axis, or of a pack of axes, to a sketch with the one-sided criterion.

    Args:
        sketch: ``Z`` in the *original* coordinates, ``(n, k)``, of unit scale.
        state: angles and averages, updated in place.
        steps: angle steps.
        refit_lr: length of the first step in radians.
        taken: number of angle steps taken before these; 0-d, or broadcast to the angles.
        owned: 1 at the slots of a pack that belong to one of its axes, 0 at those between two axes.
        backend: what carries out the rotations.

    Each step sees STEP_COLUMNS columns, from the first ones on in turn: many columns tell more of the second
    moment, and cost no more.

    Cost: ``steps`` times two rotations of STEP_COLUMNS columns; memory at most MAX_STORED numbers, or a few
    copies of those columns where not even one axis fits.
    """
    if isinstance(backend, TritonBackend):
        for step, part in enumerate(_columns_in_turn(sketch, steps)):
            backend.fused_angle_step_(part, state, refit_lr=refit_lr, taken=taken + step, owned=owned)
        return
    n, (depth, stages, _) = sketch.shape[0], state.angles.shape
    # Blocks of rows that no stage mixes can be refitted one part after the other.
    rows = max(1, MAX_STORED // StoredPass.size(1 << stages, STEP_COLUMNS, depth, stages)) << stages
    for start in range(0, n, rows):
        columns = _columns_in_turn(sketch[start : start + rows], steps)
        own = (..., slice(num_stages(len(columns[0]))), slice(start // 2, min(start + rows, n) // 2))
        _refit_rows_(
            columns,
            AngleState(*(part[own] for part in state)),
            refit_lr=refit_lr,
            taken=taken[own] if taken.dim() else taken,
            owned=None if owned is None else owned[own],
        )


def _columns_in_turn(sketch: Tensor, steps: int) -> list[Tensor]:
    """The columns that each of the angle steps sees."""
    parts = sketch.split(STEP_COLUMNS, dim=1)
    return [parts[step % len(parts)] for step in range(steps)]


def _refit_rows_(
    columns: Sequence[Tensor], state: AngleState, *, refit_lr: float, taken: Tensor, owned: Tensor | None
) -> None:
    """``refit_sketch_`` of some rows, in torch."""
    depth, stages, _ = state.angles.shape
    is_stored = StoredPass.size(len(columns[0]), STEP_COLUMNS, depth, stages) <= MAX_STORED
    passes = StoredPass(columns[0], state.angles) if is_stored else None
    for step, part in enumerate(columns):
        if passes is not None:
            gradient = passes.gradient(part, one_sided_residual, state.angles)
        else:
            rotated = rotate(part, state.angles, dim=0, transpose=True)
            gradient = angle_gradient(rotated, one_sided_residual(rotated), state.angles, dim=0)
        if owned is not None:
            gradient.mul_(owned)
        step_angles_(state, gradient, refit_lr=refit_lr, taken=taken + step)


def refit_pair_(
    delta_grad: Tensor,
    delta_theta: Tensor,
    axes: Sequence[tuple[int, Tensor, Tensor]],
    *,
    scale: Tensor,
    weight: float,
) -> None:
    """One damped Newton step of the angles of all axes on the two-sided criterion of a clean pair.

    Args:
        delta_grad: ``u``, rotated, any shape.
        delta_theta: ``w``, rotated, the same shape.
        axes: for each rotated dimension its angles and their averaged curvature, updated in place.
        scale: ``D = sqrt(B / A)``, the same shape.
        weight: weight of this pair in the averaged curvature.

    Cost: ten rotations.
    """
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    sides = ((delta_grad, scale * delta_grad, scale), (delta_theta, inverse * delta_theta, inverse))
    for dim, angles, curvature in axes:
        gradient, newest = torch.zeros_like(angles), torch.zeros_like(angles)
        for u, grad_u, form in sides:
            gradient += angle_gradient(u, grad_u, angles, dim=dim)
            newest += angle_curvature(u, grad_u, form, angles, dim=dim)
        curvature.lerp_(newest, weight)
        floor = torch.finfo(curvature.dtype).eps * curvature.abs().amax().clamp_min(torch.finfo(curvature.dtype).tiny)
        step = NEWTON_DAMPING * gradient / curvature.abs().clamp_min(floor)
        angles.sub_(step.clamp_(-MAX_NEWTON_STEP, MAX_NEWTON_STEP))


def refit_jacobi_(delta_grad: Tensor, delta_theta: Tensor, angles: Tensor, moments: Tensor, *, weight: float) -> None:
    """Sets the angles of a vector's butterfly stage by stage to Jacobi angles, in place.

    For the partners ``(lo, hi)`` of a stage, ``H2 = E[y s'] E[s s']^-1`` is the least-squares Hessian of the
    pairs seen so far; the angle ``0.5 atan2(2 h12, h11 - h22)`` makes it diagonal, taken modulo pi/2 next
    to the present one, so that the coordinates do not change their places.

    Args:
        delta_grad: ``y`` in the original coordinates, ``(n,)``.
        delta_theta: ``s``, ``(n,)``.
        angles: ``(depth, num_stages, n // 2)``.
        moments: ``(7, *angles.shape)``, averages of the products of partners, updated.
        weight: weight of this pair in ``moments``.

    Cost: one rotation of two vectors, and 7 numbers of state an angle.
    """
    quarter = math.pi / 2

    def update(butterfly: int, stage: int, slots: slice, lo: Tensor, hi: Tensor) -> Tensor:
        (y0, s0), (y1, s1) = lo, hi
        average = moments[:, butterfly, stage, slots]
        average.lerp_(torch.stack((s0 * s0, s0 * s1, s1 * s1, y0 * s0, y0 * s1, y1 * s0, y1 * s1)), weight)
        s00, s01, s11, y00, y01, y10, y11 = average
        determinant = s00 * s11 - s01 * s01
        known = determinant > 1e3 * torch.finfo(average.dtype).eps * s00 * s11
        # Cramer's rule; the common factor 1 / determinant > 0 does not change the angle.
        twice_h12 = y01 * s00 - y00 * s01 + y10 * s11 - y11 * s01
        difference = y00 * s11 - y01 * s01 - y11 * s00 + y10 * s01
        present = angles[butterfly, stage, slots]
        jacobi = 0.5 * torch.atan2(twice_h12, difference)
        jacobi += quarter * torch.round((present - jacobi) / quarter)
        return torch.where(known, jacobi, present)

    pair_moments_pass_(torch.stack((delta_grad, delta_theta)).view(2, 1, -1, 1), angles, update)


class Packing(NamedTuple):
    """Where each axis of a pack starts, the length of the pack and its number of stages."""

    offsets: tuple[int, ...]
    total: int
    stages: int


def pack_axes(lengths: Sequence[int]) -> Packing:
    """Places axes behind one another, longest first, each on room for its power of two.

    Sorted so, each starts at a multiple of its own width. The room between two axes stays empty:
    a coordinate paired with it has a zero partner, hence a zero gradient.
    """
    offsets, end = [0] * len(lengths), 0
    for axis in sorted(range(len(lengths)), key=lambda axis: -num_stages(lengths[axis])):
        offsets[axis] = end
        end += 1 << num_stages(lengths[axis])
    return Packing(tuple(offsets), end, max(map(num_stages, lengths), default=0))


def pack_rows(packing: Packing, parts: Sequence[Tensor]) -> Tensor:
    """Copies ``(n_i, k)`` tensors to their places in one ``(total, k)`` tensor; zeros between them."""
    packed = parts[0].new_zeros(packing.total, parts[0].shape[1])
    for part, offset in zip(parts, packing.offsets, strict=True):
        packed[offset : offset + part.shape[0]] = part
    return packed


def pack_angles(packing: Packing, parts: Sequence[Tensor]) -> Tensor:
    """Copies ``(depth, num_stages_i, n_i // 2)`` tensors to their slots in one such tensor of the pack."""
    packed = parts[0].new_zeros(parts[0].shape[0], packing.stages, packing.total // 2)
    for part, offset in zip(parts, packing.offsets, strict=True):
        packed[:, : part.shape[1], offset // 2 : offset // 2 + part.shape[2]] = part
    return packed


def unpack_angles_(packing: Packing, packed: Tensor, parts: Sequence[Tensor]) -> None:
    """The inverse of ``pack_angles``: writes into ``parts``."""
    for part, offset in zip(parts, packing.offsets, strict=True):
        part.copy_(packed[:, : part.shape[1], offset // 2 : offset // 2 + part.shape[2]])


def refit_pack_(
    axes: Sequence[tuple[Tensor, AngleState, Tensor]],
    *,
    steps: int,
    refit_lr: float,
    usable: Sequence[Tensor] | None = None,
    backend: Backend = TORCH,
) -> None:
    """Refits axes of any lengths together, in place: their angles and averages.

    Args:
        axes: for each its sketch in original coordinates, its angles and averages, and the number of angle
            steps taken before, 0-d.
        steps: angle steps.
        refit_lr: length of the first angle step in radians.
        usable: for each axis a 0-d bool: whether to refit it, decided without the host; all if None.
        backend: what carries out the rotations.
    """
    sketches, states, taken = zip(*axes, strict=True)
    # Blocks of a longer vector have fewer stages than their length.
    stages = max(state.angles.shape[1] for state in states)
    packing = pack_axes([sketch.shape[0] for sketch in sketches])._replace(stages=stages)
    before = AngleState(*(pack_angles(packing, parts) for parts in zip(*states, strict=True)))
    packed = AngleState(*(part.clone() for part in before)) if usable is not None else before

    def spread(values: Sequence[Tensor]) -> Tensor:
        """A number of each axis in its slots of the pack, ``(1, num_stages, slots)``: for all butterflies."""
        parts = [value.expand_as(s.angles[:1]) for value, s in zip(values, states, strict=True)]
        return pack_angles(packing, parts)

    scales = [sketch.square().mean().sqrt().clamp_min(torch.finfo(sketch.dtype).tiny) for sketch in sketches]
    refit_sketch_(
        pack_rows(packing, [sketch / scale for sketch, scale in zip(sketches, scales, strict=True)]),
        packed,
        steps=steps,
        refit_lr=refit_lr,
        taken=spread(taken),
        owned=spread([torch.ones_like(count) for count in taken]),
        backend=backend,
    )
    changed = None if usable is None else spread(usable)
    for parts, old, new in zip(zip(*states, strict=True), before, packed, strict=True):
        unpack_angles_(packing, new if changed is None else torch.where(changed, new, old), parts)

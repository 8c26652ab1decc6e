"""Butterfly rotations: an orthogonal matrix as a product of (n/2) log2(n) Givens rotations.

Method of M. Mathieu and Y. LeCun, "Fast Approximation of Rotations and Hessians Matrices",
arXiv:1404.7195 (2014), section 2. Pure functions on tensors; nothing here knows an optimizer.

Definition. A vector of ``n`` coordinates passes through ``num_stages(n) = ceil(log2 n)`` stages.
Stage ``l`` has ``stride = 2**l`` and turns each pair of coordinates ``(i, i + stride)``, with bit
``l`` of ``i`` zero, by an angle of its own, as in a fast Fourier transform. Where ``n`` is no power
of two, a coordinate whose partner would lie outside the vector is left alone, so the product is
orthogonal at every length. With the 2 x 2 blocks

    G(t) = [[cos t, -sin t],          Q = G_0 G_1 ... G_{num_stages - 1}
            [sin t,  cos t]]

``Q^T x`` applies stage 0 first. ``depth`` butterflies may follow one another; ``Q`` is the product.

Glossary, used throughout the package:

    n            length of the rotated axis
    num_stages   stages of one butterfly, ceil(log2 n); fewer give independent blocks of 2**num_stages
    stride       2**l, the distance of the two partners in stage l
    angles       (*batch, depth, num_stages, n // 2), radians; pair number p of stage l, in ascending
                 order of its lower partner, reads ``angles[..., l, p]``; slots beyond the last pair
                 of a stage are unused and stay zero
    depth        butterflies multiplied with one another
    Q            rotation, n x n; its columns are the basis vectors
    u = Q^T y    rotated coordinates of a vector y
    delta_theta  s, a change of parameters
    delta_grad   y, the change of gradient that belongs to it
    D            diagonal of the inverse-Hessian estimate Q diag(D) Q^T

Cost of a rotation: 3 n num_stages depth flops a column; memory: one copy of the input.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def num_stages(n: int) -> int:
    """Number of stages of a butterfly on ``n`` coordinates, ``ceil(log2 n)``; 0 for n = 1.

    Raises:
        ValueError: if ``n < 1``.
    """
    if n < 1:
        raise ValueError(f"a butterfly needs n >= 1 coordinates, got n = {n}")
    return (n - 1).bit_length()


def angles_shape(n: int, *, depth: int = 1, stages: int | None = None) -> tuple[int, int, int]:
    """Shape ``(depth, num_stages, n // 2)`` of the angles of a butterfly on ``n`` coordinates.

    Args:
        n: length of the rotated axis, >= 1.
        depth: butterflies multiplied with one another, >= 1.
        stages: keep only the first ``stages`` stages, which rotates independent blocks of
            ``2**stages`` consecutive coordinates; all stages if None.

    Raises:
        ValueError: if ``n < 1``, ``depth < 1`` or ``stages < 0``.
    """
    if depth < 1:
        raise ValueError(f"a butterfly needs depth >= 1, got depth = {depth}")
    if stages is not None and stages < 0:
        raise ValueError(f"stages must be None or >= 0, got {stages}")
    full = num_stages(n)
    return depth, full if stages is None else min(stages, full), n // 2


def rotate(x: Tensor, angles: Tensor, *, dim: int = -1, transpose: bool = False) -> Tensor:
    """Computes ``Q x`` (or ``Q^T x`` with ``transpose``) along one axis of ``x``.

    Args:
        x: real tensor whose axis ``dim`` has length n. Batch dimensions of ``angles`` are the
            leading dimensions of ``x``.
        angles: ``(*batch, depth, num_stages, n // 2)``, float32 or float64.
        dim: the rotated axis.
        transpose: apply the inverse ``Q^T``, from the original to the rotated coordinates.

    Returns:
        A new contiguous tensor of the shape of ``x`` in the promoted dtype of ``x`` and ``angles``:
        bfloat16 and float16 input is computed and returned in float32.

    Raises:
        TypeError: if ``x`` or ``angles`` is not real floating point.
        ValueError: if the shapes do not belong together.
    """
    columns = _to_columns(x, angles, dim)
    rotate_columns_(columns, angles, transpose=transpose)
    return columns.view(x.shape)


def angle_gradient(u: Tensor, grad_u: Tensor, angles: Tensor, *, dim: int = -1) -> Tensor:
    """Gradient of a loss of ``u = Q^T y`` with respect to the angles, by rotating back.

    A Givens rotation moves its outputs ``(lo, hi)`` by ``(hi, -lo)`` per radian, so
    ``dL/dt = sum grad_lo * hi - grad_hi * lo`` over the columns. Since each stage is orthogonal its
    inputs are recomputed from its outputs: no intermediate vector is stored.

    Args:
        u: ``Q^T y`` along ``dim``, as returned by ``rotate(y, angles, dim=dim, transpose=True)``.
        grad_u: ``dL/du``, the shape of ``u``.
        angles: ``(*batch, depth, num_stages, n // 2)``.
        dim: the rotated axis.

    Returns:
        ``dL/dangles``, the shape of ``angles``, summed over all other dimensions of ``u``. Unused
        slots are zero.

    Raises:
        TypeError: if an argument is not real floating point.
        ValueError: if the shapes do not belong together.

    Cost: two rotations and one reduction. The vector ``Q grad_u`` comes for free but is not returned.
    """
    if u.shape != grad_u.shape:
        raise ValueError(f"u and grad_u must have one shape, got {tuple(u.shape)} and {tuple(grad_u.shape)}")
    both = torch.stack((_to_columns(u, angles, dim), _to_columns(grad_u, angles, dim)))
    cos, sin = angles.cos(), angles.sin()
    gradient = torch.zeros_like(angles)
    depth, stages, _ = angles.shape[-3:]
    for butterfly in reversed(range(depth)):
        for stage in reversed(range(stages)):
            out = gradient[..., butterfly, stage, :]
            for (lo, hi), slots, pairs in _stage_pairs(both, stage):
                moment = lo[1] * hi[0] - hi[1] * lo[0]
                summed = moment.sum(-1).sum(angles.dim() - 3)
                out[..., slots] = summed.reshape(*out.shape[:-1], pairs.numel())
            _turn_(both, cos[..., butterfly, stage, :], sin[..., butterfly, stage, :], stage)
    return gradient


def _whole_blocks(n: int, stages: int) -> int:
    """``n`` rounded up: a coordinate without partner gets one that is zero, and the angle 0."""
    return -(-n >> stages) << stages


class StoredPass:
    """The gradient of the angles as ``angle_gradient`` gives it, with the output of every stage stored.

    Two rotations instead of three, in buffers and views made once: for refits, where few columns pass through
    many stages again and again, and the calls cost as much as the arithmetic.

    Args:
        columns: ``y``, or any tensor of its shape ``(n, k)``.
        angles: the angles, or any tensor of their shape ``(depth, num_stages, n // 2)``.

    Memory: ``2.5 depth num_stages + 3`` tensors of the size of the columns.
    """

    def __init__(self, columns: Tensor, angles: Tensor) -> None:
        (n, k), (depth, stages, slots) = columns.shape, angles.shape
        self.n, self.slots = n, slots
        padded = _whole_blocks(n, stages)
        self.cos, self.sin, self.moments = (columns.new_zeros(depth, stages, padded // 2, k) for _ in range(3))
        self.cos.fill_(1)
        self.outputs = columns.new_zeros(depth * stages + 1, padded, k)
        self.grads = columns.new_zeros(2, padded, k)
        self.views: list[tuple[Tensor, ...]] = []
        for index in range(depth * stages):
            butterfly, stage = divmod(index, stages)
            buffers = self.outputs[index], self.outputs[index + 1], self.grads[index % 2 - 1], self.grads[index % 2]
            partners = [part for buffer in buffers for part in buffer.view(-1, 2, 1 << stage, k).unbind(1)]
            angled = [each[butterfly, stage].view(-1, 1 << stage, k) for each in (self.cos, self.sin, self.moments)]
            self.views.append((*angled, *partners))

    @staticmethod
    def size(n: int, columns: int, depth: int, num_stages: int) -> int:
        """Numbers kept for ``columns`` vectors of length ``n``."""
        return _whole_blocks(n, num_stages) * columns * (5 * depth * num_stages + 6) // 2

    def gradient(self, y: Tensor, residual: Callable[[Tensor], Tensor], angles: Tensor) -> Tensor:
        """Gradient of a loss of ``u = Q^T y``.

        Args:
            y: columns.
            residual: gives ``dL/du``.
            angles: the angles.

        Returns:
            ``dL/dangles``, a new tensor of the shape of ``angles``.
        """
        self.cos[..., : self.slots, :] = angles.cos().unsqueeze(-1)
        self.sin[..., : self.slots, :] = angles.sin().unsqueeze(-1)
        self.outputs[0, : self.n] = y
        for cos, sin, _, lo, hi, out_lo, out_hi, *_ in self.views:
            torch.mul(lo, cos, out=out_lo).addcmul_(hi, sin)
            torch.mul(hi, cos, out=out_hi).addcmul_(lo, sin, value=-1)
        self.grads[len(self.views) % 2 - 1, : self.n] = residual(self.outputs[-1, : self.n])
        for cos, sin, moment, _, _, out_lo, out_hi, lo, hi, grad_lo, grad_hi in reversed(self.views):
            torch.mul(grad_lo, out_hi, out=moment).addcmul_(grad_hi, out_lo, value=-1)
            torch.mul(grad_lo, cos, out=lo).addcmul_(grad_hi, sin, value=-1)
            torch.mul(grad_hi, cos, out=hi).addcmul_(grad_lo, sin)
        # The sum over the columns, which a product does several times faster than a sum over a short dimension.
        return (self.moments @ self.moments.new_ones(self.moments.shape[-1]))[..., : self.slots].contiguous()


def angle_curvature(u: Tensor, grad_u: Tensor, weights: Tensor, angles: Tensor, *, dim: int = -1) -> Tensor:
    """Second derivatives of ``L = 1/2 sum weights u^2``, ``u = Q^T y``, with respect to each angle.

    With ``W`` the quadratic form of ``L`` at the outputs ``(lo, hi)`` of a stage, a second derivative is
    ``W_lo hi^2 + W_hi lo^2 - lo grad_lo - hi grad_hi``. The diagonal of ``W`` is carried back through the
    stages by squared cosines and sines, which is exact for depth 1, where every entry of ``Q`` is a
    single path; the off-diagonal entry of a pair is left out.

    Args:
        u: rotated vectors.
        grad_u: ``weights * u``.
        weights: non-negative, the shape of ``u``.
        angles: ``(*batch, depth, num_stages, n // 2)``.
        dim: the rotated axis.

    Returns:
        The curvatures, of the shape of ``angles``, summed over all other dimensions of ``u``.

    Cost: three rotations.
    """
    both = torch.stack((_to_columns(u, angles, dim), _to_columns(grad_u, angles, dim)))
    form = _to_columns(weights, angles, dim)
    cos, sin = angles.cos(), angles.sin()
    curvature = torch.zeros_like(angles)
    depth, stages, _ = angles.shape[-3:]
    for butterfly in reversed(range(depth)):
        for stage in reversed(range(stages)):
            c, s = cos[..., butterfly, stage, :], sin[..., butterfly, stage, :]
            out = curvature[..., butterfly, stage, :]
            for ((lo, hi), slots, pairs), ((w_lo, w_hi), _, _) in zip(
                _stage_pairs(both, stage), _stage_pairs(form, stage), strict=True
            ):
                moment = w_lo * hi[0].square() + w_hi * lo[0].square() - lo[0] * lo[1] - hi[0] * hi[1]
                out[..., slots] = moment.sum(-1).sum(angles.dim() - 3).reshape(*out.shape[:-1], pairs.numel())
                keep = c[..., slots].square().reshape(*c.shape[:-1], 1, *pairs, 1)
                swapped = (w_lo - w_hi) * (1 - keep)
                w_lo -= swapped
                w_hi += swapped
            _turn_(both, c, s, stage)
    return curvature


def pair_moments_pass_(
    columns: Tensor, angles: Tensor, update: Callable[[int, int, slice, Tensor, Tensor], Tensor]
) -> None:
    """Takes two vectors through ``Q^T`` stage by stage, letting each stage choose its angles first.

    Args:
        columns: ``(2, 1, n, 1)``, both vectors, overwritten with their rotated coordinates.
        angles: ``(depth, num_stages, n // 2)``, overwritten stage by stage.
        update: called as ``update(butterfly, stage, slots, lo, hi)`` with the partners before the stage,
            each ``(2, pairs)``; returns the angles of these slots.
    """
    for butterfly in range(angles.shape[0]):
        for stage in range(angles.shape[1]):
            row = angles[butterfly, stage]
            for (lo, hi), slots, _ in _stage_pairs(columns, stage):
                row[slots] = update(butterfly, stage, slots, lo.reshape(2, -1), hi.reshape(2, -1))
            _turn_(columns, row.cos(), -row.sin(), stage)


def dense_rotation(angles: Tensor, n: int) -> Tensor:
    """The matrix ``Q``, for inspection: ``(*batch, n, n)``, in the dtype of ``angles``.

    Cost: O(n^2 log n) time, O(n^2) memory.
    """
    eye = torch.eye(n, dtype=angles.dtype, device=angles.device)
    return rotate(eye.expand(*angles.shape[:-3], n, n), angles, dim=-2)


def _to_columns(x: Tensor, angles: Tensor, dim: int) -> Tensor:
    """A fresh ``(*batch, pre, n, post)`` copy of ``x``, the rotated axis at -2, after checking both."""
    for name, tensor in (("x", x), ("angles", angles)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be real floating point, got {tensor.dtype}")
    if angles.dim() < 3:
        raise ValueError(f"angles must be (*batch, depth, num_stages, n // 2), got {tuple(angles.shape)}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim = {dim} is out of range for x of shape {tuple(x.shape)}")
    batch, axis = angles.shape[:-3], dim % x.dim()
    if axis < len(batch) or x.shape[: len(batch)] != batch:
        raise ValueError(f"x of shape {tuple(x.shape)} must start with the batch {tuple(batch)} of angles")
    n = x.shape[axis]
    most = num_stages(n)
    if angles.shape[-1] != n // 2 or angles.shape[-2] > most:
        raise ValueError(
            f"angles of shape {tuple(angles.shape)} do not fit an axis of length {n}: "
            f"expected (..., depth, <= {most}, {n // 2})"
        )
    pre, post = x.shape[len(batch) : axis].numel(), x.shape[axis + 1 :].numel()
    columns = torch.empty(*batch, pre, n, post, dtype=torch.promote_types(x.dtype, angles.dtype), device=x.device)
    columns.view(x.shape).copy_(x)
    return columns


def rotate_columns_(columns: Tensor, angles: Tensor, *, transpose: bool, stages: range | None = None) -> None:
    """Applies ``Q`` or ``Q^T``, or only some ``stages`` of it, in place to ``(*batch, pre, n, post)``."""
    cos, sin = angles.cos(), angles.sin()
    used = range(angles.shape[-2]) if stages is None else stages
    order = [(butterfly, stage) for butterfly in range(angles.shape[-3]) for stage in used]
    if transpose:
        sin.neg_()
    else:
        order.reverse()
    for butterfly, stage in order:
        _turn_(columns, cos[..., butterfly, stage, :], sin[..., butterfly, stage, :], stage)


def _turn_(columns: Tensor, cos: Tensor, sin: Tensor, stage: int) -> None:
    """One stage in place: ``(lo, hi) <- (cos lo - sin hi, sin lo + cos hi)``; cos, sin: ``(*batch, n // 2)``."""
    for (lo, hi), slots, pairs in _stage_pairs(columns, stage):
        c = cos[..., slots].reshape(*cos.shape[:-1], 1, *pairs, 1)
        s = sin[..., slots].reshape(*sin.shape[:-1], 1, *pairs, 1)
        turned = (c * lo).addcmul_(s, hi, value=-1)
        hi.mul_(c).addcmul_(s, lo)
        lo.copy_(turned)


def _stage_pairs(columns: Tensor, stage: int) -> Iterator[tuple[tuple[Tensor, Tensor], slice, torch.Size]]:
    """Views of the lower and upper partners of a stage, with their angle slots.

    The complete blocks of ``2 * stride`` coordinates come first, then the incomplete last one, of
    which only the partners that exist are paired.

    Yields:
        ``(lo, hi)``, each ``(..., *pairs, post)``; the slice of their slots; the shape ``pairs``.
    """
    n = columns.shape[-2]
    stride = 1 << stage
    blocks = n // (2 * stride)
    covered = blocks * 2 * stride
    if blocks:
        pairs = columns[..., :covered, :].unflatten(-2, (blocks, 2, stride))
        yield (pairs[..., 0, :, :], pairs[..., 1, :, :]), slice(0, covered // 2), torch.Size((blocks, stride))
    unpaired = n - covered - stride
    if unpaired > 0:
        lo = columns[..., covered : covered + unpaired, :]
        hi = columns[..., covered + stride :, :]
        yield (lo, hi), slice(covered // 2, covered // 2 + unpaired), torch.Size((unpaired,))

"""A differentiable butterfly rotation, for learnable orthogonal layers."""

from typing import Any

import torch
from torch import Tensor

from butterfly_opt.backend import Backend, choose_backend


def butterfly_rotation(
    x: Tensor, angles: Tensor, *, dim: int = -1, transpose: bool = False, backend: str = "auto"
) -> Tensor:
    """``Q x`` (``Q^T x`` with ``transpose``) along one axis, differentiable in ``x`` and ``angles``.

    The backward pass rotates back and stores nothing but its input or output, whatever the number of stages.

    Args:
        x: real tensor whose axis ``dim`` has length n.
        angles: ``(depth, num_stages, n // 2)``, see ``butterfly_opt.rotation``.
        dim: the rotated axis.
        transpose: apply the inverse.
        backend: "auto", "torch" or "triton".

    Returns:
        A tensor of the shape of ``x`` in the promoted dtype of ``x`` and ``angles``.

    Raises:
        TypeError: if ``x`` or ``angles`` is not real floating point.
        ValueError: if the shapes do not belong together, or ``backend`` cannot run on their device.

    Cost: one rotation forward, four backward.

    Example:
        >>> angles = torch.nn.Parameter(torch.zeros(angles_shape(64)))
        >>> y = butterfly_rotation(x, angles)
    """
    chosen = choose_backend(backend, x.device, torch.promote_types(x.dtype, angles.dtype))
    return _Rotation.apply(x, angles, dim, transpose, chosen)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, dim: int, transpose: bool, backend: Backend) -> Tensor:
        result = backend.rotate(x, angles, dim=dim, transpose=transpose)
        ctx.save_for_backward(result if transpose else x, angles)
        ctx.dim, ctx.transpose, ctx.backend = dim, transpose, backend
        ctx.dtype = x.dtype
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        saved, angles = ctx.saved_tensors
        grad_x = ctx.backend.rotate(grad, angles, dim=ctx.dim, transpose=not ctx.transpose)
        # <g, Q x> = <Q^T g, x>: for Q the gradient and the input change their places.
        u, grad_u = (saved, grad) if ctx.transpose else (grad_x, saved.to(grad_x.dtype))
        return grad_x.to(ctx.dtype), ctx.backend.angle_gradient(u, grad_u, angles, dim=ctx.dim), None, None, None

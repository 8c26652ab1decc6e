"""The inverse of a Hessian that can only be multiplied with, from its products with a few hundred random vectors.

For random orthonormal columns S and ``Y = H S``, ``Y Y^T`` estimates ``H^2``: its second moments fit the basis Q of a
wide butterfly (``Rotation.start_``), directions of large curvature first. With ``u = Q^T y`` and ``w = Q^T s``

    h_i   = sum u_i w_i / sum w_i^2                             over the k probes, regression without a constant
    var_i = (1 - k / n) sum (u_i - h_i w_i)^2 / (k sum w_i^2)   of h_i, from what the other coordinates add to u_i
    P     = Q diag(1 / sqrt(h^2 + var + prior^2)) Q^T           prior = PRIOR (1 / k - 1 / n) mean |h|

positive definite, and the more careful the less is known. Nothing of order n^2 is kept. Where the spectrum of H is
spikes over a flat tail, as that of trained networks (V. Papyan, arXiv:1811.07062), a hundred probes are enough; with
``k = n`` and ``n <= block`` P is exact.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from butterfly_opt.basis import Basis
from butterfly_opt.fit import Fit, products
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation

PRIOR = 16
"""Probes: a basis of k of them takes directions without energy for flat, which are only unseen. Condition of P H left
by 20 / 50 / 100 / 200 probes for n = 256, twelve spikes over a flat tail: 3.8e7 / 1.5e7 / 4.0 / 1.4 without, 17 / 5.4 /
2.4 / 1.5 with 16, 76 / 18 / 6.2 / 1.7 with 64; eigenvalues from 1 to 1000: 1700 / 1290 / 921 / 513 with 16."""

MIN_CURVATURE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""The least curvature over the largest: below it is rounding."""


@dataclass(frozen=True)
class ProbedFit(Fit):
    """A fitted inverse, and what is known of its sign.

    Attributes:
        negative: coordinates whose curvature is below zero by more than two standard deviations.
    """

    negative: int


def hessian_product(loss: Callable[[], Tensor], params: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Multiplication with the Hessian of a loss at the present parameters, by differentiating its gradient.

    Args:
        loss: evaluates the loss, a scalar with a graph; it is called once, here.
        params: parameters; those without ``requires_grad`` are left out. Their entries, one after the other, are the
            coordinates.

    Returns:
        A function of ``(n, columns)``, as ``probe_inverse`` and ``fit_symmetric`` take; it holds the gradient's graph.

    Raises:
        ValueError: if no parameter requires a gradient, or the loss is no scalar.

    Cost: about two gradients a column.
    """
    wanted = [param for param in params if param.requires_grad]
    if not wanted:
        raise ValueError("no parameter requires a gradient")
    with torch.enable_grad():
        value = loss()
        if value.numel() != 1:
            raise ValueError(f"the loss must be a scalar, got shape {tuple(value.shape)}")
        # ``sum``: a loss of one element may have axes.
        grads = torch.autograd.grad(value.sum(), wanted, create_graph=True, materialize_grads=True)
        gradient = torch.cat([grad.flatten() for grad in grads])

    def product(vectors: Tensor) -> Tensor:
        if not gradient.requires_grad:  # a linear loss
            return torch.zeros_like(vectors)
        columns = [
            torch.autograd.grad(gradient, wanted, vector, retain_graph=True, materialize_grads=True)
            for vector in vectors.mT.contiguous()
        ]
        return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in columns], dim=1)

    return product


def probe_inverse(
    product: Callable[[Tensor], Tensor],
    n: int,
    *,
    probes: int = 300,
    block: int = 64,
    lead: int = 16,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ProbedFit:
    """Fits ``P = Q diag(d) Q^T``, d > 0, to the inverse of a symmetric matrix H that is only multiplied with.

    Args:
        product: multiplies H with ``(n, columns)``; see ``hessian_product``.
        n: order of H.
        probes: random vectors; more than n are n, which is exact up to ``block`` coordinates.
        block: coordinates of a group; see ``butterfly_opt.plan``.
        lead: outputs of a group that go on.
        generator: of the probes, on ``device``; torch's default if None.
        dtype: float32 or float64; torch's default if None.
        device: of the probes.

    Returns:
        P; ``error`` is ``||Y - Q diag(h) Q^T S||_F / ||Y||_F``, which estimates the relative error of ``P^-1`` as an
        approximation of H, and ``errors`` has that of the diagonal without a rotation before it.

    Raises:
        TypeError: if ``dtype`` is neither float32 nor float64.
        ValueError: if ``n`` or ``probes`` is below 1, the function returns another shape or what is not finite, or H
            is zero.

    Cost: k products, O(k n (k + block)) for k probes; memory ``2 k n + O(n block)``.

    Example:
        >>> product = hessian_product(lambda: cross_entropy(model(x), y), model.parameters())
        >>> P = probe_inverse(product, sum(p.numel() for p in model.parameters())).operator
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in MIN_CURVATURE:
        raise TypeError(f"probes must be float32 or float64, got {dtype}")
    for name, value in (("n", n), ("probes", probes)):
        if not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    plan, k = make_plan(n, block, lead), min(probes, n)
    s = torch.linalg.qr(torch.randn(n, k, dtype=dtype, device=device, generator=generator)).Q
    y = products(product, s)
    if not torch.isfinite(y).all():
        raise ValueError("the products must be finite")
    if not y.any():
        raise ValueError("the matrix is zero: it has no inverse")
    rotation = Rotation.identity(n, block=block, lead=lead, dtype=dtype, device=device)
    before = _curvature(s, y)
    rotation.start_(y[None])
    w, u = (rotation.to_rotated(x[None])[0] for x in (s, y))
    h, variance = _curvature(w, u)
    errors = [(torch.linalg.norm(b - c[:, None] * a) / torch.linalg.norm(b)).item() for a, b, c in (
        (s, y, before[0]), (w, u, h)
    )]  # fmt: skip
    prior = PRIOR * (1 / k - 1 / n) * h.abs().mean()
    size = (h.square() + variance + prior.square()).sqrt()
    size = size.clamp_min(MIN_CURVATURE[dtype] * size.max())
    basis = Basis((n,), [(0, Rotation(plan, rotation.matrices))])
    # Zero but for rounding is not negative.
    negative = int((h < -2 * variance.sqrt() - MIN_CURVATURE[dtype] * size.max()).sum())
    return ProbedFit(RotatedDiagonal(basis, 1 / size), errors[-1], errors, negative)


def _curvature(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``h`` and its variance for displacements and changes of gradient ``(n, probes)``."""
    n, k = w.shape
    energy = w.square().sum(1).clamp_min(torch.finfo(w.dtype).tiny)
    h = (u * w).sum(1) / energy
    return h, (1 - k / n) * (u - h[:, None] * w).square().sum(1) / (k * energy)

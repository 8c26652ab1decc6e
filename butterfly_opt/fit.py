"""Offline fitting of ``Q diag(d) Q^T``: to a matrix, a covariance, the inverse of a Hessian known by pairs.

What is fitted is put together and checked here; ``butterfly_opt.sweep`` has the closed forms.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from butterfly_opt.basis import Basis
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.plan import make_plan
from butterfly_opt.sweep import sweep

CRITERIA = ("energy", "logdet")

PRODUCT_COLUMNS = 256
"""Columns in one product when a matrix is read through its products."""

SYMMETRY_EPS = 1e4
"""A matrix counts as symmetric up to this many roundings of its largest entry."""


@dataclass(frozen=True)
class Fit:
    """A fitted operator.

    Attributes:
        operator: ``Q diag(d) Q^T``, with ``d = diag(Q^T A Q)``; of ``fit_inverse`` with 1 / d.
        error: ``||A - Q diag(d) Q^T||_F / ||A||_F``, A the matrix fitted.
        errors: the same after each rotation, from none on.
    """

    operator: RotatedDiagonal
    error: float
    errors: list[float]


@dataclass(frozen=True)
class CovarianceFit(Fit):
    """A fitted covariance.

    Attributes:
        loc: mean of the samples, ``(n,)``; zero for ``assume_centered``.
        count: number of samples.
        shrinkage: what was applied.
    """

    loc: Tensor
    count: int
    shrinkage: float


def fit_symmetric(
    matrix: Tensor | Callable[[Tensor], Tensor],
    *,
    block: int = 64,
    lead: int = 16,
    rotations: int = 1,
    criterion: str = "energy",
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Fit:
    """Fits ``Q diag(d) Q^T`` to a symmetric matrix, in closed form.

    Args:
        matrix: ``(n, n)``, float32 or float64; or a function that multiplies it with ``(n, columns)``.
        block: coordinates of a group; see ``butterfly_opt.plan``.
        lead: outputs of a group that go on; ``block`` for the full plan, 2 and 2 for the paper's butterfly.
        rotations: rotations in a row, each fitted to what the ones before it leave.
        criterion: "energy", the relative error; or "logdet", the likelihood, for positive definite matrices.
        n: order of the matrix, for a function.
        dtype: float32 or float64 of the columns given to a function; torch's default if None.
        device: of the columns given to a function.

    Returns:
        The operator, in the dtype and on the device of the matrix, and its errors. A planted eigenbasis of the
        same plan is found to rounding: a leading one, and the full one of radix 2.

    Raises:
        TypeError: if the matrix is no tensor, or neither float32 nor float64.
        ValueError: if the matrix is empty, not square, not finite or not symmetric; for "logdet", if it is not
            positive definite; if an option is out of range.

    Cost: O(n^2 block) a rotation; for "logdet", and for the first stage of radix 2, O(n^3). Memory O(n^2).

    Example:
        >>> fit = fit_symmetric(hessian, block=32, lead=16)
        >>> fit.operator @ x, fit.error
    """
    if callable(matrix):
        dense = _dense(matrix, n, torch.get_default_dtype() if dtype is None else dtype, device)
    else:
        _check_tensor("matrix", matrix)
        dense = matrix.detach()
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    _check_symmetric(dense)
    dense = (dense + dense.mT) / 2
    if criterion == "logdet":
        _check_positive_definite(dense, "criterion='logdet'", "add a multiple of the identity, or use 'energy'")
    return fit_checked(dense, criterion, block=block, lead=lead, rotations=rotations)


def fit_checked(matrix: Tensor, criterion: str, *, block: int, lead: int, rotations: int) -> Fit:
    """``fit_symmetric`` of a symmetric matrix that the caller has checked."""
    if not rotations >= 1:
        raise ValueError(f"rotations must be >= 1, got {rotations}")
    plan = make_plan(len(matrix), block, lead)
    norm = torch.linalg.norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    found, rotated = [], matrix
    errors = [_off_diagonal(matrix, norm)]
    for _ in range(rotations):
        rotation = sweep(rotated, plan, criterion)
        half = rotation.to_rotated(rotated[None])
        rotated = rotation.to_rotated(half, dim=-1)[0]
        # ``eigh`` reads one triangle: rounding must not make the other differ.
        rotated = (rotated + rotated.mT) / 2
        found.append((0, rotation))
        errors.append(_off_diagonal(rotated, norm))
    return Fit(RotatedDiagonal(Basis(matrix.shape[:1], found), rotated.diagonal().clone()), errors[-1], errors)


def _off_diagonal(matrix: Tensor, norm: Tensor) -> float:
    return (torch.linalg.norm(matrix - torch.diag(matrix.diagonal())) / norm).item()


def fit_covariance(
    samples: Tensor | Iterable[Tensor],
    *,
    block: int = 64,
    lead: int = 16,
    rotations: int = 1,
    shrinkage: float | str = 0.0,
    assume_centered: bool = False,
) -> CovarianceFit:
    """Fits ``Q diag(d) Q^T`` to the covariance of samples, for the likelihood (criterion "logdet").

    Args:
        samples: ``(count, n)``, float32 or float64; or an iterable of such batches, read once.
        block: see ``fit_symmetric``, as ``lead`` and ``rotations``.
        lead: see ``block``.
        rotations: see ``block``.
        shrinkage: ``(1 - shrinkage) C + shrinkage tr(C) / n I`` is fitted, as by scikit-learn's ``ShrunkCovariance``;
            "oas" chooses it as scikit-learn's ``OAS`` (Y. Chen et al., IEEE Trans. Sign. Proc. 58, 2010).
        assume_centered: take the mean as zero.

    Returns:
        The operator, in the dtype of the samples, with ``loc`` and ``count``. C divides by ``count``.

    Raises:
        TypeError: if the samples are neither float32 nor float64.
        ValueError: if there are fewer than two samples, they are not finite, not ``(count, n)`` of one n, the
            covariance is singular (too few samples, or linearly dependent coordinates), or an option is out of range.

    Cost: O(count n^2) for C in float64, then as ``fit_symmetric``.
    """
    count, loc, covariance, dtype = _moments([samples] if isinstance(samples, Tensor) else samples, assume_centered)
    amount = _shrinkage(shrinkage, covariance, count)
    n = loc.numel()
    target = covariance.diagonal().mean()
    covariance = (1 - amount) * covariance + amount * target * torch.eye(n, dtype=loc.dtype, device=loc.device)
    _check_positive_definite(
        covariance,
        f"the covariance of {count} samples of {n} coordinates",
        "use shrinkage='oas' or more samples",
    )
    # In float64 to the end: in float32 the inverse of images' covariances is rounding.
    fit = fit_checked(covariance, "logdet", block=block, lead=lead, rotations=rotations)
    fit = replace(fit, operator=fit.operator.to(dtype))
    d = fit.operator.d
    if not (torch.isfinite(d).all() and (d > 0).all()):
        raise ValueError(
            f"variances from {d.min():.3g} to {d.max():.3g} do not fit {dtype}: scale the samples, or pass float64"
        )
    return CovarianceFit(**vars(fit), loc=loc.to(dtype), count=count, shrinkage=amount)


def fit_inverse(
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    block: int = 64,
    lead: int = 16,
    rotations: int = 1,
    shrinkage: float = 0.0,
) -> Fit:
    """Fits ``P = Q diag(d) Q^T`` to the inverse of a Hessian known by pairs ``y = H s``.

    The least-squares Hessian of the pairs is fitted with criterion "logdet", then inverted. With ``hbar = sum s y /
    sum s^2``, shrinkage adds ``shrinkage sum s^2 / n ||H - hbar I||_F^2`` to the squares.

    Args:
        pairs: ``(delta_theta, delta_grad)``, each ``(n,)`` or ``(k, n)``, float32 or float64.
        block: see ``fit_symmetric``, as ``lead`` and ``rotations``.
        lead: see ``block``.
        rotations: see ``block``.
        shrinkage: weight of the prior, >= 0; needed where the displacements do not span all coordinates.

    Returns:
        P; ``error`` and ``errors`` are those of ``P^-1`` as an approximation of H.

    Raises:
        TypeError: if the pairs are neither float32 nor float64.
        ValueError: if there are no pairs, they are not finite, their shapes differ, their displacements do not span
            all coordinates, the Hessian is not positive definite, or an option is out of range.

    Cost: O(k n^2) for k pairs, then as ``fit_symmetric``. ``SecantEstimate`` takes pairs as they come, at O(n block).
    """
    hessian = _least_squares_hessian(pairs, shrinkage)
    _check_positive_definite(hessian, "the Hessian of the pairs", "use pairs of a convex function, or more shrinkage")
    fit = fit_checked(hessian, "logdet", block=block, lead=lead, rotations=rotations)
    return replace(fit, operator=fit.operator.map_eigenvalues(torch.reciprocal))


def _dense(
    product: Callable[[Tensor], Tensor], n: int | None, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """The matrix that ``product`` multiplies with."""
    if n is None or n < 1:
        raise ValueError(f"a matrix given as a function needs its order n >= 1, got n = {n}")
    return products(product, torch.eye(n, dtype=dtype, device=device))


def products(product: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
    """A matrix given as a function times ``(n, columns)``, PRODUCT_COLUMNS at a time."""
    found = []
    for part in columns.split(PRODUCT_COLUMNS, dim=1):
        result = product(part)
        if result.shape != part.shape:
            raise ValueError(f"the function must return shape {tuple(part.shape)}, got {tuple(result.shape)}")
        found.append(result.detach())
    return torch.cat(found, dim=1)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")


def _check_floating(name: str, tensor: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
    # By the extremes, which a NaN is one of: a tenth of the time of a mask.
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ValueError(f"{name} must be finite, got {(~torch.isfinite(tensor)).sum().item()} entries that are not")


def _check_symmetric(matrix: Tensor) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"matrix must be square and not empty, got shape {tuple(matrix.shape)}")
    _check_floating("matrix", matrix)
    difference, largest = (matrix - matrix.mT).abs().max().item(), matrix.abs().max().item()
    if difference > SYMMETRY_EPS * torch.finfo(matrix.dtype).eps * largest:
        raise ValueError(
            f"matrix must be symmetric, got entries that differ from their mirror image by up to {difference:.3g} "
            f"(largest entry {largest:.3g}); use (A + A.T) / 2 if that is meant"
        )


def _check_positive_definite(matrix: Tensor, what: str, advice: str) -> None:
    values = torch.linalg.eigvalsh(matrix)
    # Below this an eigenvalue is rounding; a NaN is refused too.
    if not values[0] > matrix.shape[0] * torch.finfo(matrix.dtype).eps * values[-1].abs():
        raise ValueError(
            f"{what} must be positive definite, got eigenvalues from {values[0]:.3g} to {values[-1]:.3g}; {advice}"
        )


def _moments(batches: Iterable[Tensor], assume_centered: bool) -> tuple[int, Tensor, Tensor, torch.dtype]:
    """Count, mean and covariance (divided by the count), in float64, and the dtype of the samples."""
    count, dtype = 0, torch.float64
    mean = scatter = torch.zeros(0)
    for batch in batches:
        _check_floating("samples", batch)
        if batch.dim() != 2 or not batch.shape[1] or (count and batch.shape[1] != mean.numel()):
            expected = f"(count, {mean.numel()})" if count else "(count, n)"
            raise ValueError(f"samples must have shape {expected}, got {tuple(batch.shape)}")
        if not batch.shape[0]:
            # The mean of no samples is NaN.
            continue
        dtype, batch = batch.dtype, batch.detach().double()
        if not count:
            mean, scatter = batch.new_zeros(batch.shape[1]), batch.new_zeros(batch.shape[1], batch.shape[1])
        # With ``assume_centered`` the mean stays the zeros it starts as.
        centre = mean if assume_centered else batch.mean(0)
        apart, count = centre - mean, count + batch.shape[0]
        share = batch.shape[0] / count
        # T. Chan et al., "Updating formulae", COMPSTAT 1982: nothing cancels.
        scatter.addr_(apart, apart, alpha=share * (count - batch.shape[0]))
        centred = batch - centre
        scatter.addmm_(centred.mT, centred)
        mean = mean + share * apart
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {count}")
    return count, mean, scatter / count, dtype


def _shrinkage(shrinkage: float | str, covariance: Tensor, count: int) -> float:
    """The amount of shrinkage towards ``tr(C) / n I``."""
    if shrinkage == "oas":
        n = covariance.shape[0]
        target = covariance.diagonal().mean().square()
        energy = covariance.square().mean()
        spread = (count + 1) * (energy - target / n)
        return min(1.0, ((energy + target) / spread).item()) if spread > 0 else 1.0
    if isinstance(shrinkage, str) or not 0.0 <= shrinkage <= 1.0:
        raise ValueError(f"shrinkage must be 'oas' or a number from 0 to 1, got {shrinkage!r}")
    return float(shrinkage)


def _least_squares_hessian(pairs: Iterable[tuple[Tensor, Tensor]], shrinkage: float) -> Tensor:
    """The symmetric part of the H with the least squares of ``y - H s``; see ``fit_inverse``."""
    if not 0.0 <= shrinkage < math.inf:
        raise ValueError(f"shrinkage must be a finite number >= 0, got {shrinkage}")
    displacements: list[Tensor] = []
    gradients: list[Tensor] = []
    for s, y in pairs:
        _check_floating("delta_theta", s)
        _check_floating("delta_grad", y)
        if s.shape != y.shape or s.dim() not in (1, 2) or (displacements and s.shape[-1] != displacements[0].shape[-1]):
            raise ValueError(
                f"pairs must be two tensors of one shape, (n,) or (k, n), got {tuple(s.shape)} and {tuple(y.shape)}"
            )
        displacements.append(s.detach().reshape(-1, s.shape[-1]))
        gradients.append(y.detach().reshape(-1, s.shape[-1]))
    if not displacements:
        raise ValueError("fit_inverse needs at least one pair, got none")
    S, Y = torch.cat(displacements), torch.cat(gradients)
    n = S.shape[1]
    if shrinkage > 0:
        # The prior as n more pairs: ``weight`` along each coordinate, with a y of ``hbar weight``.
        weight = (shrinkage * S.square().sum() / n).sqrt() * torch.eye(n, dtype=S.dtype, device=S.device)
        S, Y = torch.cat((S, weight)), torch.cat((Y, weight * (S * Y).sum() / S.square().sum()))
    # Before ``lstsq``, which on a GPU takes full rank for granted.
    rank = int(torch.linalg.matrix_rank(S))
    if rank < n:
        raise ValueError(
            f"the displacements of {S.shape[0]} pairs span {rank} of {n} dimensions: the Hessian is not determined; "
            "give more pairs, or shrinkage > 0"
        )
    hessian = torch.linalg.lstsq(S, Y).solution
    return (hessian + hessian.mT) / 2

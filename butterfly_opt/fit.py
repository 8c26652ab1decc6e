"""Offline fitting: the angles and the diagonal of ``Q diag(d) Q^T`` for a matrix, a covariance, an inverse Hessian.

The gradient descent of M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014), section 3, on the angles, with
the best diagonal ``d = diag(Q^T A Q)`` put in. With ``M = Q^T A Q`` the criteria are

    energy    ||A - Q diag(d) Q^T||_F^2 / ||A||_F^2 = ||offdiag M||_F^2 / ||A||_F^2    dL/dM = 2 offdiag M / ||A||_F^2
    logdet    mean log diag M                                                          dL/dM = diag(1 / (n diag M))

``logdet`` is, up to constants, the negative log-likelihood of a Gaussian with covariance ``Q diag(d) Q^T`` on
data of covariance A, and the measure ``tr(P A) - log det(P A)`` of R. Byrd and J. Nocedal (SIAM J. Numer.
Anal. 26, 1989) for ``P = Q diag(1 / d) Q^T`` as an approximate inverse of A.

Where descent starts decides where it ends: from angles near zero it does not find a planted butterfly of 16
coordinates. ``jacobi_start`` is a closed form that does, to rounding. From there Adam takes steps that
shrink linearly to zero. Measured against L-BFGS, plain Jacobi angles and random starts: ``tests/test_fit.py``
holds the cases, the README the numbers.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from butterfly_opt.angle_basis import AngleBasis
from butterfly_opt.backend import choose_backend
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.rotation import angles_shape, num_stages, rotate_columns_

CRITERIA = ("energy", "logdet")
ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-12
RESTART_SPREAD = 0.3
"""Radians: standard deviation of what a restart adds to the angles of the first start."""
PRODUCT_COLUMNS = 256
"""Columns in one product when a matrix is read through its products."""

SYMMETRY_EPS = 1e4
"""A matrix counts as symmetric up to this many roundings of its largest entry."""

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the steps of a fit, as ``tqdm.tqdm`` does."""


@dataclass(frozen=True)
class FitOptions:
    """How angles are fitted.

    Attributes:
        depth: butterflies multiplied with one another.
        steps: angle steps of a restart; 0 keeps the start.
        lr: length of the first angle step in radians; it shrinks linearly to zero.
        restarts: starts: the closed form (or ``start``), then random neighbours of it; the best is kept.
        seed: of the random neighbours.
        tolerance: a restart ends when the mean loss of ``patience`` steps is within this of that of the
            ``patience`` before. Losses are dimensionless: shares of the squared norm, nats a coordinate.
        patience: see ``tolerance``.
        start: angles to start from; ``jacobi_start(matrix, depth=depth)`` if None.
        progress: wraps the steps, such as ``tqdm.tqdm``.

    Raises:
        ValueError: if a number is out of range.
    """

    depth: int = 1
    steps: int = 200
    lr: float = 0.2
    restarts: int = 1
    seed: int = 0
    tolerance: float = 1e-6
    patience: int = 30
    start: Tensor | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        bounds = (("depth", 1), ("steps", 0), ("restarts", 1), ("patience", 1), ("tolerance", 0))
        for name, low in bounds:
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be a finite number > 0, got {self.lr}")


@dataclass(frozen=True)
class Fit:
    """A fitted operator and how it was found.

    Attributes:
        operator: ``Q diag(d) Q^T`` at the angles of the smallest loss.
        angles: ``(depth, num_stages, n // 2)``, for ``start`` of another fit.
        error: ``||A - Q diag(d) Q^T||_F / ||A||_F`` at these angles, A the matrix fitted.
        losses: the criterion at the start and after each angle step, of the best restart.
        errors: the relative error at the same steps.
        restart_losses: the smallest loss of each restart.
        stopped_early: whether the loss came to rest before the last step.
    """

    operator: RotatedDiagonal
    angles: Tensor
    error: float
    losses: list[float]
    errors: list[float]
    restart_losses: list[float]
    stopped_early: bool


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
    options: FitOptions = FitOptions(),
    *,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    criterion: str = "energy",
) -> Fit:
    """Fits ``Q diag(d) Q^T`` to a symmetric matrix.

    Args:
        matrix: ``(n, n)``, float32 or float64; or a function that multiplies it with ``(n, columns)``.
        options: depth, steps, restarts, ...
        n: order of the matrix, for a function.
        dtype: float32 or float64 of the columns given to a function; torch's default if None.
        device: of the columns given to a function.
        criterion: "energy", the relative error; or "logdet", for positive definite matrices.

    Returns:
        The operator, in the dtype and on the device of the matrix, and its history.

    Raises:
        TypeError: if the matrix is neither float32 nor float64.
        ValueError: if the matrix is empty, not square, not finite or not symmetric; for "logdet", if it is not
            positive definite; if an option is out of range.

    Cost: O(depth n^2 log n) a step, and O(n^3 + depth n^2 log n) for the start; memory O(n^2), for a function
    too. Equal input, seed and device give equal results.

    Example:
        >>> fit = fit_symmetric(hessian, depth=2, progress=tqdm.tqdm)
        >>> fit.operator @ x, fit.error
    """
    if isinstance(matrix, Tensor):
        dense = matrix.detach()
    else:
        dense = _dense(matrix, n, torch.get_default_dtype() if dtype is None else dtype, device)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    _check_symmetric(dense)
    dense = (dense + dense.mT) / 2
    if criterion == "logdet":
        _check_positive_definite(dense, "criterion='logdet'", "add a multiple of the identity, or use 'energy'")
    return _fit(
        dense,
        criterion,
        options,
    )


def fit_covariance(
    samples: Tensor | Iterable[Tensor],
    options: FitOptions = FitOptions(),
    *,
    shrinkage: float | str = 0.0,
    assume_centered: bool = False,
) -> CovarianceFit:
    """Fits ``Q diag(d) Q^T`` to the covariance of samples, by maximum likelihood (criterion "logdet").

    Args:
        samples: ``(count, n)``, float32 or float64; or an iterable of such batches, read once.
        options: see ``FitOptions``.
        shrinkage: ``(1 - shrinkage) C + shrinkage tr(C) / n I`` is fitted, as by scikit-learn's ``ShrunkCovariance``;
            "oas" chooses it as scikit-learn's ``OAS`` (Y. Chen et al., IEEE Trans. Sign. Proc. 58, 2010).
        assume_centered: take the mean as zero.

    Returns:
        The operator, in the dtype of the samples, with ``loc``, ``count`` and the history. C divides by ``count``.

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
        covariance.to(dtype),
        f"the covariance of {count} samples of {n} coordinates",
        "use shrinkage='oas' or more samples",
    )
    fit = _fit(
        covariance.to(dtype),
        "logdet",
        options,
    )
    return CovarianceFit(**vars(fit), loc=loc.to(dtype), count=count, shrinkage=amount)


def fit_inverse(
    pairs: Iterable[tuple[Tensor, Tensor]],
    options: FitOptions = FitOptions(),
    *,
    shrinkage: float = 0.0,
) -> Fit:
    """Fits ``P = Q diag(d) Q^T`` to the inverse of a Hessian known by pairs ``y = H s``.

    The least-squares Hessian of the pairs is fitted with criterion "logdet" (module docstring), then inverted.
    With ``hbar = sum s y / sum s^2``, shrinkage adds ``shrinkage sum s^2 / n ||H - hbar I||_F^2`` to the squares.

    Args:
        pairs: ``(delta_theta, delta_grad)``, each ``(n,)`` or ``(k, n)``, float32 or float64.
        options: see ``FitOptions``.
        shrinkage: weight of the prior, >= 0; needed where the displacements do not span all coordinates.

    Returns:
        P and the history; ``error`` and ``errors`` are those of ``P^-1`` as an approximation of H.

    Raises:
        TypeError: if the pairs are neither float32 nor float64.
        ValueError: if there are no pairs, they are not finite, their shapes differ, their displacements do not span
            all coordinates, the Hessian is not positive definite, or an option is out of range.

    Cost: O(k n^2) for k pairs, then as ``fit_symmetric``.
    """
    hessian = _least_squares_hessian(pairs, shrinkage)
    _check_positive_definite(hessian, "the Hessian of the pairs", "use pairs of a convex function, or more shrinkage")
    fit = _fit(
        hessian,
        "logdet",
        options,
    )
    inverse = RotatedDiagonal(fit.operator.basis, fit.operator.d.reciprocal())
    return replace(fit, operator=inverse)


def jacobi_start(matrix: Tensor, *, depth: int = 1) -> Tensor:
    """Angles for a symmetric matrix in closed form; exact where its eigenbasis is a butterfly.

    Stage by stage every pair gets the angle ``0.5 atan2(2 m_ij, m_ii - m_jj)`` that makes its own 2 x 2 matrix
    diagonal (Jacobi), which lowers the off-diagonal energy by ``2 m_ij^2``. The angle is defined up to
    quarter turns, which exchange the two partners. That choice is free within the stage and decides
    everything after it: later stages mix only coordinates with equal bits below and at this stage, so what
    is coupled must come to lie on one side. With ``s_p = +-1`` for "pair p exchanged" the energy on equal
    sides is ``s^T W s / 2`` plus a constant, ``W_pq = m_ll^2 + m_hh^2 - m_lh^2 - m_hl^2`` for the lower (l) and
    higher (h) partners of p and q; s is the sign of W's leading eigenvector, which is exact where the
    eigenbasis is a butterfly (there ``W_pq = s_p s_q |W_pq|``: Perron). A coordinate without partner stays.

    Args:
        matrix: ``(n, n)``, symmetric.
        depth: butterflies, each started on what the ones before it leave.

    Returns:
        ``(depth, num_stages, n // 2)``.

    Cost: O(n^3) for the eigenvectors of the first stage, O(depth n^2 log n) for the rest.
    """
    n = matrix.shape[0]
    angles = matrix.new_zeros(angles_shape(n, depth=depth))
    rotated = matrix.clone()
    for butterfly in range(depth):
        for stage in range(num_stages(n)):
            turn = torch.zeros_like(angles[:1])
            for choose in (_pair_angles, _exchanges):
                pairs, exists = choose(rotated, stage)
                chosen = pairs.T.reshape(-1)[exists.T.reshape(-1)]
                turn.zero_()[0, stage, : chosen.numel()] = chosen
                angles[butterfly] += turn[0]
                rotated = _turn(rotated, turn, stage)
    return angles


def _pair_blocks(matrix: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
    """Couplings of the pairs of a stage whose lower bits agree.

    Returns:
        ``(low, pairs, 2, pairs, 2)``, the entries for partners (0 lower, 1 higher) of two pairs, the matrix
        padded to a power of two with zeros; whether the lower and the higher partner exist, ``(low, pairs)``.
    """
    n, low = matrix.shape[0], 1 << stage
    width = 1 << num_stages(n)
    padded = torch.nn.functional.pad(matrix, (0, width - n, 0, width - n))
    high = width // (2 * low)
    blocks = padded.view(high, 2, low, high, 2, low).diagonal(dim1=2, dim2=5).permute(4, 0, 1, 2, 3)
    inside = (torch.arange(width, device=matrix.device) < n).view(high, 2, low)
    return blocks, inside[:, 0].T, inside[:, 1].T


def _pair_angles(matrix: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """Jacobi angles in [-pi/4, pi/4], ``(low, pairs)``, and which pairs exist."""
    blocks, _, exists = _pair_blocks(matrix, stage)
    own = blocks.diagonal(dim1=1, dim2=3)
    angle = 0.5 * torch.atan2(2 * own[:, 0, 1], own[:, 0, 0] - own[:, 1, 1])
    return angle - math.pi / 2 * torch.round(angle / (math.pi / 2)), exists


def _exchanges(matrix: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """A quarter turn for each pair to exchange, ``(low, pairs)``, and which pairs exist."""
    blocks, has_lower, exists = _pair_blocks(matrix, stage)
    energy = blocks.square()
    coupling = energy[:, :, 0, :, 0] + energy[:, :, 1, :, 1] - energy[:, :, 0, :, 1] - energy[:, :, 1, :, 0]
    coupling.diagonal(dim1=1, dim2=2).zero_()
    leading = torch.linalg.eigh(coupling).eigenvectors[..., -1]
    # Coordinates without partner decide which side is which; without any, few exchanges are as good as many.
    alone = (leading * (has_lower & ~exists)).sum(-1, keepdim=True)
    side = torch.where(alone != 0, alone, leading.sum(-1, keepdim=True))
    exchanged = (leading * torch.where(side < 0, -1.0, 1.0) < 0) & exists
    return math.pi / 2 * exchanged.to(matrix.dtype), exists


def _turn(matrix: Tensor, angles: Tensor, stage: int) -> Tensor:
    """``G^T M G`` for one stage G."""
    for _ in range(2):
        matrix = matrix.mT.contiguous()
        rotate_columns_(matrix.unsqueeze(0), angles, transpose=True, stages=range(stage, stage + 1))
    return matrix


class _Descent:
    """One descent from given angles, and what it found."""

    def __init__(self, matrix: Tensor, criterion: str, angles: Tensor) -> None:
        self.matrix, self.criterion = matrix, criterion
        self.backend = choose_backend("auto", matrix.device, matrix.dtype)
        self.norm = torch.linalg.norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
        self.angles = angles.clone()
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.best = (math.inf, math.inf, self.angles, matrix.diagonal())
        self.stopped_early = False

    def run(self, options: FitOptions) -> None:
        """Adam on the angles, with steps that shrink linearly to zero."""
        optimizer = torch.optim.Adam([self.angles], lr=options.lr, betas=ADAM_BETAS, eps=ADAM_EPS)
        steps: Iterable[int] = range(options.steps)
        for step in steps if options.progress is None else options.progress(steps):
            self.angles.grad = self._look()
            if self._at_rest(options):
                self.stopped_early = True
                return
            optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
            optimizer.step()
        self._look()

    def _look(self) -> Tensor:
        """Records loss, error and the best angles so far; returns the gradient of the angles."""
        half = self.backend.rotate(self.matrix, self.angles, dim=0, transpose=True)
        rotated = self.backend.rotate(half.mT, self.angles, dim=0, transpose=True)
        d = rotated.diagonal().clone()
        rest = rotated - torch.diag(d)
        error = torch.linalg.norm(rest) / self.norm
        if self.criterion == "energy":
            loss, slope = error.square(), rest * (2 / self.norm.square())
        else:
            # Positive by construction, but for rounding.
            d = d.clamp_min(torch.finfo(d.dtype).tiny)
            loss, slope = d.log().mean(), torch.diag(1 / (d * d.numel()))
        self.losses.append(loss.item())
        self.errors.append(error.item())
        if self.losses[-1] < self.best[0]:
            self.best = (self.losses[-1], self.errors[-1], self.angles.clone(), d)
        # Both sides of M = Q^T A Q contribute the same.
        return 2 * self.backend.angle_gradient(rotated, slope, self.angles, dim=0)

    def _at_rest(self, options: FitOptions) -> bool:
        # Rounding of the rotations: the relative error cannot be told from zero.
        if self.errors[-1] <= self.matrix.shape[0] * torch.finfo(self.matrix.dtype).eps:
            return True
        # Means: the first steps of Adam, all of one length, lose a part of a good start and win it back.
        last = self.losses[-options.patience :]
        before = self.losses[-2 * options.patience : -options.patience]
        return len(before) == len(last) and abs(sum(before) - sum(last)) < options.tolerance * len(last)


def _fit(matrix: Tensor, criterion: str, options: FitOptions) -> Fit:
    """The best of several descents."""
    shape = angles_shape(matrix.shape[0], depth=options.depth)
    start = jacobi_start(matrix, depth=options.depth) if options.start is None else options.start.detach().to(matrix)
    if start.shape != shape:
        raise ValueError(f"start must have shape {tuple(shape)}, got {tuple(start.shape)}")
    generator = torch.Generator().manual_seed(options.seed)
    descents = []
    for restart in range(options.restarts):
        shift = torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device)
        descent = _Descent(matrix, criterion, start + RESTART_SPREAD * shift if restart else start)
        descent.run(options)
        descents.append(descent)
    best = min(descents, key=lambda descent: descent.best[0])
    _, error, angles, d = best.best
    return Fit(
        operator=RotatedDiagonal(AngleBasis((matrix.shape[0],), [(0, angles)]), d),
        angles=angles,
        error=error,
        losses=best.losses,
        errors=best.errors,
        restart_losses=[descent.best[0] for descent in descents],
        stopped_early=best.stopped_early,
    )


def _dense(
    product: Callable[[Tensor], Tensor], n: int | None, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """The matrix that ``product`` multiplies with."""
    if n is None or n < 1:
        raise ValueError(f"a matrix given as a function needs its order n >= 1, got n = {n}")
    columns = []
    for units in torch.eye(n, dtype=dtype, device=device).split(PRODUCT_COLUMNS, dim=1):
        result = product(units)
        if result.shape != units.shape:
            raise ValueError(f"the function must return shape {tuple(units.shape)}, got {tuple(result.shape)}")
        columns.append(result.detach())
    return torch.cat(columns, dim=1)


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
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
            continue
        dtype, batch = batch.dtype, batch.detach().double()
        if not count:
            mean, scatter = batch.new_zeros(batch.shape[1]), batch.new_zeros(batch.shape[1], batch.shape[1])
        centre = mean if assume_centered else batch.mean(0)
        apart, count = centre - mean, count + batch.shape[0]
        share = batch.shape[0] / count
        # T. Chan et al., "Updating formulae", COMPSTAT 1982: nothing cancels.
        scatter += (batch - centre).mT @ (batch - centre) + share * (count - batch.shape[0]) * apart.outer(apart)
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
        weight = (shrinkage * S.square().sum() / n).sqrt() * torch.eye(n, dtype=S.dtype, device=S.device)
        S, Y = torch.cat((S, weight)), torch.cat((Y, weight * (S * Y).sum() / S.square().sum()))
    rank = int(torch.linalg.matrix_rank(S))
    if rank < n:
        raise ValueError(
            f"the displacements of {S.shape[0]} pairs span {rank} of {n} dimensions: the Hessian is not determined; "
            "give more pairs, or shrinkage > 0"
        )
    hessian = torch.linalg.lstsq(S, Y).solution
    return (hessian + hessian.mT) / 2

"""Gradient descent on the angles of ``Q diag(d) Q^T``, and the closed form it starts from.

The gradient descent of M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014), section 3, with the best diagonal
``d = diag(Q^T A Q)`` put in. With ``M = Q^T A Q`` the criteria are

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
from dataclasses import dataclass

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


DEFAULT_OPTIONS = FitOptions()


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


class Descent:
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
            self.angles.grad = self.look()
            if self._at_rest(options):
                self.stopped_early = True
                return
            optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
            optimizer.step()
        self.look()

    def look(self) -> Tensor:
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


def fit_angles(matrix: Tensor, criterion: str, options: FitOptions) -> Fit:
    """The best of several descents on a symmetric matrix, which the caller has checked.

    Args:
        matrix: ``(n, n)``, symmetric; positive definite for "logdet".
        criterion: one of ``CRITERIA``.
        options: see ``FitOptions``.

    Raises:
        ValueError: if ``options.start`` has another shape.

    Cost: O(depth n^2 log n) a step, after ``jacobi_start`` where no start is given.
    """
    shape = angles_shape(matrix.shape[0], depth=options.depth)
    start = jacobi_start(matrix, depth=options.depth) if options.start is None else options.start.detach().to(matrix)
    if start.shape != shape:
        raise ValueError(f"start must have shape {tuple(shape)}, got {tuple(start.shape)}")
    generator = torch.Generator().manual_seed(options.seed)
    descents = []
    for restart in range(options.restarts):
        shift = torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device)
        descent = Descent(matrix, criterion, start + RESTART_SPREAD * shift if restart else start)
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

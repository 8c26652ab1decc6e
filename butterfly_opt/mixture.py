"""Gaussian mixtures with butterfly covariances, as a scikit-learn estimator. Needs scikit-learn >= 1.6.

Expectation maximisation (A. Dempster, N. Laird, D. Rubin, J. R. Stat. Soc. B 39, 1977) with covariances
``Q_k diag(d_k) Q_k^T`` (M. Mathieu, Y. LeCun, arXiv:1404.7195, 2014), Q_k wide butterflies. A maximisation step fits
each rotation in closed form to the samples of its component, and keeps the one before where that is likelier; the best
diagonal for a rotation is ``diag(Q^T C Q)``. So the likelihood rises, though the rotation need not be optimal (a
generalised EM). Components whose samples have not changed are left as they are.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.orthogonal import num_angles
from butterfly_opt.plan import Plan, check_plan, make_plan
from butterfly_opt.rotation import Rotation
from butterfly_opt.sweep import sweep

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "butterfly_opt.mixture needs scikit-learn >= 1.6; install it with pip install 'butterfly-opt[experiments]'"
    ) from error


ROWS, NUMBERS = 1024, 1 << 17
"""Samples whose densities are computed at a time, and numbers to fit at a time: they stay in the cache."""
REST = 0.2
"""Over ``tol``: the share of its samples that has changed, below which a component stays as it was maximised last. On
digits that saves half of the maximisations, at the same likelihood; with 1 a tenth of a nat is lost."""
EPS, TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny


class _Mixture(NamedTuple):
    """Weights, means, matrices of the rotations and eigenvalues of the components, each ``(n_components, ...)``."""

    plan: Plan
    weights: Tensor
    loc: Tensor
    matrices: Tensor
    d: Tensor

    def normal(self, k: int) -> ButterflyNormal:
        """Component k."""
        operator = RotatedDiagonal.from_rotation(Rotation(self.plan, self.matrices[k : k + 1]), self.d[k])
        return ButterflyNormal(self.loc[k], operator, validate_args=False)

    def log_prob(self, samples: Tensor, k: int) -> Tensor:
        """``log p_k(x)``, ``(count,)``; a slice of the samples at a time."""
        normal = self.normal(k)
        return torch.cat([normal.log_prob(part) for part in samples.split(ROWS)])

    def log_joint(self, samples: Tensor) -> Tensor:
        """``log (weight_k p_k(x))``, ``(n_components, count)``."""
        each = [self.log_prob(samples, k) for k in range(len(self.loc))]
        return torch.stack(each) + self.weights.log()[:, None]


def _weights(responsibilities: Tensor) -> Tensor:
    """The weights of the components for responsibilities ``(n_components, count)``."""
    counts = responsibilities.sum(1) + 10 * EPS  # components without samples: as in scikit-learn
    return counts / counts.sum()


def _sweep(columns: Tensor, ridge: float, plan: Plan) -> Tensor:
    """``sweep.sweep`` for the likelihood, of a batch of matrices ``columns columns^T + ridge I``, without turns.

    Where columns are few, no matrix of order n is made. Turns would double the time of a fit; the held-out likelihood
    of mixtures of digits and MNIST is the same with them.

    Args:
        columns: ``(batch, n, count)``.
        ridge: >= 0.
        plan: of the rotations.

    Returns:
        Their matrices ``(batch, plan.numel)``.
    """

    def eye(n: int) -> Tensor:
        return torch.eye(n, dtype=columns.dtype)

    if plan.is_full:
        return torch.cat([sweep(own @ own.T + ridge * eye(plan.n), plan, "logdet").matrices for own in columns])
    matrices = columns.new_zeros(len(columns), plan.numel)
    # Woodbury's difference cancels where the ridge is small beside the samples.
    few = columns.shape[2] < plan.n and ridge > 1e-10 * columns.square().sum((1, 2)).max()
    for stage, views in zip(plan.stages, plan.views(matrices), strict=True):
        last, leading = stage is plan.stages[-1], []
        if last:
            inverse = columns
        elif few:  # the inverse is a multiple of I - inverse inverse^T
            factor = torch.linalg.cholesky(columns.mT @ columns + ridge * eye(columns.shape[2]))
            inverse = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
        else:  # inverse inverse^T
            unit = eye(columns.shape[1])
            # Unchecked: an error here would not name the component; ``_maximize_`` looks at its eigenvalues.
            factor = torch.linalg.cholesky_ex(columns @ columns.mT + ridge * unit).L
            inverse = torch.linalg.solve_triangular(factor, unit, upper=False).mT
        spans = [run.span for run in stage.runs]
        for run, view, *parts in zip(stage.runs, views, columns.split(spans, 1), inverse.split(spans, 1), strict=True):
            own, other = (part.unflatten(1, run) for part in parts)
            unit = eye(run.size)
            values, vectors = torch.linalg.eigh(own @ own.mT + ridge * unit)
            if not last:
                block = unit - other @ other.mT if few else other @ other.mT
                # Those that the others tell most about go on, see ``sweep``.
                alone = (vectors * torch.linalg.solve_ex(block, vectors).result).sum(-2)
                order = (values / alone).argsort(-1, descending=True)
                vectors = vectors.take_along_dim(order.unsqueeze(-2), dim=-1)
                leading.append((vectors[..., : plan.lead].mT @ own).flatten(1, 2))
            view.copy_(vectors)
        columns = torch.cat(leading, 1) if leading else columns
    return matrices


class ButterflyMixture(DensityMixin, BaseEstimator):
    """Mixture of Gaussians with covariances ``Q_k diag(d_k) Q_k^T``, between diagonal and full ones.

    Up to ``block`` coordinates a component is a full Gaussian; beyond, it has about ``0.7 n block``
    parameters where a full one has ``n (n + 1) / 2``: it needs fewer samples and less time. The interface
    is that of ``sklearn.mixture.GaussianMixture``; all checks of
    ``sklearn.utils.estimator_checks.check_estimator`` pass. The arithmetic is in float64, on the CPU.

    Args:
        n_components: number of Gaussians.
        block: coordinates of a group of the rotations, see ``butterfly_opt.plan``.
        lead: outputs of a group that go on; ``block`` for the full plan.
        tol: EM ends when the mean log-likelihood of a sample changes by less, in nats.
        reg_covar: added to the diagonals of the covariances, in squared units of X.
        max_iter: maximisations after the first.
        n_init: starts by k-means; the one of the highest likelihood is kept.
        means_init: ``(n_components, n)``, means to start from, as in scikit-learn: the first maximisation takes the
            rest from k-means.
        warm_start: start from the mixture of the last call of ``fit``, once.
        random_state: of k-means and of ``sample``: a seed, a ``numpy.random.RandomState``, or None.

    Attributes:
        weights_: ``(n_components,)``.
        means_: ``(n_components, n)``.
        operators_: covariances, a list of ``RotatedDiagonal`` in float64.
        covariances_: the same as dense matrices, ``(n_components, n, n)``, made when asked for.
        lower_bound_: mean log-likelihood of a training sample, in nats; of ``lower_bounds_`` the last.
        lower_bounds_: the same after each maximisation, of the start that was kept.
        n_iter_: maximisations after the first.
        converged_: whether ``tol`` was reached.
        n_features_in_: n.

    Cost: of a maximisation O(count n^2 + n^3) for each component; of an expectation, and of every prediction, one
    rotation for each sample and component. Memory O(n^2 + count n).

    Example:
        >>> ButterflyMixture(10, reg_covar=1e-2, random_state=0).fit(X).score(held_out)
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        block: int = 32,
        lead: int = 8,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        means_init: ArrayLike | None = None,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.block = block
        self.lead = lead
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.means_init = means_init
        self.warm_start = warm_start
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> "ButterflyMixture":
        """Fits the mixture by EM.

        Args:
            X: samples, ``(count, n)``.
            y: ignored.

        Raises:
            ValueError: if a parameter is out of range, X is not finite, has fewer than two samples or fewer than
                components, or a covariance is singular.
        """
        self._check_parameters()
        data = validate_data(self, X, dtype=np.float64, order="C", ensure_min_samples=2)
        if len(data) < self.n_components:
            raise ValueError(f"n_components must be at most the {len(data)} samples, got {self.n_components}")
        samples, random = torch.tensor(data), check_random_state(self.random_state)
        means = self._check_means()
        last = getattr(self, "_mixture", None) if self.warm_start else None
        shape = (self.n_components, data.shape[1])
        if last is not None and last.loc.shape == shape:
            runs = [self._run(samples, last)]
        else:
            runs = [self._run(samples, self._first(samples, means, random)) for _ in range(self.n_init)]
        self._mixture, self.lower_bounds_ = max(runs, key=lambda run: run[1][-1])
        self.lower_bound_ = self.lower_bounds_[-1]
        self.n_iter_ = len(self.lower_bounds_) - 1
        self.converged_ = self._at_rest(self.lower_bounds_)
        self.weights_ = self._mixture.weights.numpy()
        self.means_ = self._mixture.loc.numpy()
        self.operators_ = [self._mixture.normal(k).operator for k in range(self.n_components)]
        if not self.converged_:
            warnings.warn(
                f"EM did not reach tol = {self.tol} in max_iter = {self.max_iter} iterations: raise either",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def fit_predict(self, X: ArrayLike, y: object = None) -> NDArray[np.int64]:
        """``fit(X).predict(X)``."""
        return self.fit(X).predict(X)

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """The most probable component of each sample, ``(count,)``."""
        return self._log_joint(X).argmax(0).numpy()

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """The probability of each component given each sample, ``(count, n_components)``."""
        return self._log_joint(X).softmax(0).T.numpy()

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Log-likelihood of each sample, ``(count,)``, in nats."""
        return self._log_joint(X).logsumexp(0).numpy()

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log-likelihood of a sample, in nats."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Draws from the mixture.

        Returns:
            Samples ``(n_samples, n)`` in the order of their components, and the components ``(n_samples,)``.

        Raises:
            ValueError: if ``n_samples`` is less than 1.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"n_samples must be >= 1, got {n_samples}")
        random = check_random_state(self.random_state)
        counts = random.multinomial(n_samples, self.weights_)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        drawn = [
            loc + operator.sample((count,), generator=generator)
            for loc, operator, count in zip(self._mixture.loc, self.operators_, counts.tolist(), strict=True)
        ]
        return torch.cat(drawn).numpy(), np.repeat(np.arange(self.n_components), counts)

    def bic(self, X: ArrayLike) -> float:
        """Bayesian information criterion on X; the lower the better."""
        scores = self.score_samples(X)
        return float(-2 * scores.sum() + self._n_parameters() * math.log(len(scores)))

    def aic(self, X: ArrayLike) -> float:
        """Akaike's information criterion on X; the lower the better."""
        return float(-2 * self.score_samples(X).sum() + 2 * self._n_parameters())

    @property
    def covariances_(self) -> NDArray[np.float64]:
        """The covariances as dense matrices, ``(n_components, n, n)``. Cost: n rotations each."""
        check_is_fitted(self)
        return torch.stack([operator.to_dense() for operator in self.operators_]).numpy()

    def _first(self, samples: Tensor, means: Tensor | None, random: np.random.RandomState) -> _Mixture:
        """A start by k-means."""
        labels = KMeans(self.n_components, n_init=1, random_state=random).fit(samples.numpy()).labels_
        start = torch.nn.functional.one_hot(torch.tensor(labels).long(), self.n_components).to(samples.dtype).T
        n = samples.shape[1]
        plan = make_plan(n, self.block, self.lead)
        loc, d = samples.new_zeros(2, self.n_components, n)
        mixture = _Mixture(plan, _weights(start), loc, samples.new_zeros(self.n_components, plan.numel), d)
        for chosen in self._batches(torch.ones(self.n_components), start, n):
            self._maximize_(mixture, samples, start[chosen], chosen)
        return mixture if means is None else mixture._replace(loc=means)

    def _run(self, samples: Tensor, mixture: _Mixture) -> tuple[_Mixture, list[float]]:
        """EM from one start: the mixture, and the mean log-likelihood after each maximisation."""
        # ``_maximize_`` writes in place, and the last fit stands if this one fails.
        mixture = mixture._replace(loc=mixture.loc.clone(), matrices=mixture.matrices.clone(), d=mixture.d.clone())
        # Densities without weights: those of components at rest stay what they are.
        log_probs = mixture._replace(weights=torch.ones_like(mixture.weights)).log_joint(samples)
        # Nothing is seen yet: in the first round all have moved.
        seen = torch.full_like(log_probs, torch.inf)
        bounds: list[float] = []
        while True:
            joint = log_probs + mixture.weights.log()[:, None]
            bounds.append(joint.logsumexp(0).mean().item())
            if self._at_rest(bounds) or len(bounds) > self.max_iter:
                return mixture, bounds
            responsibilities = joint.softmax(0)
            mixture = mixture._replace(weights=_weights(responsibilities))
            moved = (responsibilities - seen).abs().sum(1) > REST * self.tol * responsibilities.sum(1)
            for chosen in self._batches(moved, responsibilities, samples.shape[1]):
                seen[chosen] = responsibilities[chosen]
                self._maximize_(mixture, samples, seen[chosen], chosen, start=False)
                for k in chosen.tolist():
                    log_probs[k] = mixture.log_prob(samples, k)

    def _at_rest(self, bounds: list[float]) -> bool:
        return len(bounds) > 1 and abs(bounds[-1] - bounds[-2]) < self.tol

    @staticmethod
    def _batches(moved: Tensor, responsibilities: Tensor, n: int) -> Sequence[Tensor]:
        """The components that have moved, in batches, by the samples that they have."""
        count = int((responsibilities > EPS).sum(1).max())
        return moved.nonzero().flatten().split(max(1, NUMBERS // max(1, n * count))) if moved.any() else ()

    def _maximize_(
        self, mixture: _Mixture, samples: Tensor, responsibilities: Tensor, chosen: Tensor, *, start: bool = True
    ) -> None:
        """Chosen components for responsibilities ``(chosen, count)``: new rotations, or those before where likelier."""
        plan = mixture.plan
        shares, index = responsibilities.topk(int((responsibilities > EPS).sum(1).max()))
        shares = shares / (responsibilities.sum(1, keepdim=True) + 10 * EPS)
        part = samples[index]
        mean = shares.unsqueeze(1) @ part
        columns = ((part - mean) * shares.sqrt().unsqueeze(-1)).mT.contiguous()

        def eigenvalues(matrices: Tensor) -> Tensor:
            return Rotation(plan, matrices).to_rotated(columns).square().sum(-1) + self.reg_covar

        # Before the decompositions, which would not name the component.
        broken = ~torch.isfinite(columns.square().sum((1, 2)))
        if not broken.any():
            matrices = _sweep(columns, self.reg_covar, plan)
            d = eigenvalues(matrices)
            if not start and plan.n > self.block:  # a dense eigenbasis is optimal
                kept = eigenvalues(mixture.matrices[chosen])
                likelier = (kept.log().sum(1) < d.log().sum(1)).unsqueeze(1)
                matrices, d = torch.where(likelier, mixture.matrices[chosen], matrices), torch.where(likelier, kept, d)
            # Less is the rounding of the samples, squared.
            rounding = TINY + (10 * EPS * samples.abs().max()).square()
            broken = ~(d > rounding).all(1)
        if broken.any():
            raise ValueError(
                f"the covariance of component {chosen[broken][0]} is singular or not finite: raise reg_covar = "
                f"{self.reg_covar}, lower n_components = {self.n_components}, or rescale X"
            )
        mixture.loc[chosen], mixture.matrices[chosen], mixture.d[chosen] = mean.squeeze(1), matrices, d

    def _log_joint(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        samples = validate_data(self, X, dtype=np.float64, order="C", reset=False)
        return self._mixture.log_joint(torch.tensor(samples))

    def _n_parameters(self) -> int:
        """Free parameters: weights, means, eigenvalues, and the angles of the rotations."""
        plan = self._mixture.plan
        return self.n_components * (2 * plan.n + num_angles(plan) + 1) - 1

    def _check_means(self) -> Tensor | None:
        if self.means_init is None:
            return None
        means = torch.tensor(np.asarray(self.means_init, dtype=np.float64))
        shape = (self.n_components, self.n_features_in_)
        if means.shape != shape or not torch.isfinite(means).all():
            raise ValueError(f"means_init must be finite and of shape {shape}, got shape {tuple(means.shape)}")
        return means

    def _check_parameters(self) -> None:
        check_plan(self.block, self.lead)
        bounds: tuple[tuple[str, Any], ...] = (
            ("n_components", 1),
            ("tol", 0),
            ("reg_covar", 0),
            ("max_iter", 1),
            ("n_init", 1),
        )
        for name, low in bounds:
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")

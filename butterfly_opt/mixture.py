"""Gaussian mixtures with butterfly covariances, as a scikit-learn estimator. Needs scikit-learn >= 1.6.

Expectation maximisation (A. Dempster, N. Laird, D. Rubin, J. R. Stat. Soc. B 39, 1977) with covariances
``Q_k diag(d_k) Q_k^T`` (M. Mathieu, Y. LeCun, arXiv:1404.7195, 2014), Q_k wide butterflies. A maximisation step fits
each rotation in closed form to the weighted covariance of its component, and keeps the one before where that is
likelier; the best diagonal for a rotation is ``diag(Q^T C Q)``. So the likelihood rises, though the rotation need not
be optimal (a generalised EM).
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from butterfly_opt.basis import Basis
from butterfly_opt.fit import fit_checked
from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.plan import check_plan, make_plan

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


class _Mixture(NamedTuple):
    """The parameters of a mixture."""

    weights: Tensor
    components: list[ButterflyNormal]

    def log_joint(self, samples: Tensor) -> Tensor:
        """``log (weight_k p_k(x))``, ``(count, n_components)``."""
        return torch.stack([component.log_prob(samples) for component in self.components], 1) + self.weights.log()


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
        if last is not None and (len(last.weights), len(last.components[0].loc)) == shape:
            runs = [self._run(samples, last)]
        else:
            runs = [self._run(samples, self._first(samples, means, random)) for _ in range(self.n_init)]
        self._mixture, self.lower_bounds_ = max(runs, key=lambda run: run[1][-1])
        self.lower_bound_ = self.lower_bounds_[-1]
        self.n_iter_ = len(self.lower_bounds_) - 1
        self.converged_ = self._at_rest(self.lower_bounds_)
        self.weights_ = self._mixture.weights.numpy()
        self.means_ = torch.stack([component.loc for component in self._mixture.components]).numpy()
        self.operators_ = [component.operator for component in self._mixture.components]
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
        return self._log_joint(X).argmax(1).numpy()

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """The probability of each component given each sample, ``(count, n_components)``."""
        return self._log_joint(X).softmax(1).numpy()

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Log-likelihood of each sample, ``(count,)``, in nats."""
        return self._log_joint(X).logsumexp(1).numpy()

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
            component.loc + component.operator.sample((count,), generator=generator)
            for component, count in zip(self._mixture.components, counts.tolist(), strict=True)
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
        start = torch.nn.functional.one_hot(torch.tensor(labels).long(), self.n_components)
        mixture = self._maximize(samples, start.to(samples.dtype), None)
        if means is None:
            return mixture
        return mixture._replace(
            components=[
                ButterflyNormal(mean, component.operator, validate_args=False)
                for mean, component in zip(means, mixture.components, strict=True)
            ]
        )

    def _run(self, samples: Tensor, mixture: _Mixture) -> tuple[_Mixture, list[float]]:
        """EM from one start: the mixture, and the mean log-likelihood after each maximisation."""
        bounds: list[float] = []
        while True:
            joint = mixture.log_joint(samples)
            bounds.append(joint.logsumexp(1).mean().item())
            if self._at_rest(bounds) or len(bounds) > self.max_iter:
                return mixture, bounds
            mixture = self._maximize(samples, joint.softmax(1), mixture)

    def _at_rest(self, bounds: list[float]) -> bool:
        return len(bounds) > 1 and abs(bounds[-1] - bounds[-2]) < self.tol

    def _maximize(self, samples: Tensor, responsibilities: Tensor, before: _Mixture | None) -> _Mixture:
        """The mixture for given responsibilities ``(count, n_components)``."""
        # Components without samples: as in scikit-learn.
        counts = responsibilities.sum(0) + 10 * torch.finfo(samples.dtype).eps
        components = []
        for k, shares in enumerate((responsibilities / counts).T):
            mean = shares @ samples
            centred = shares.sqrt()[:, None] * (samples - mean)
            covariance = centred.T @ centred
            covariance.diagonal().add_(self.reg_covar)
            operator = self._fit_covariance(covariance, None if before is None else before.components[k])
            if not (operator.d > torch.finfo(samples.dtype).tiny).all():
                raise ValueError(
                    f"the covariance of component {k} is singular or not finite: raise reg_covar = {self.reg_covar}, "
                    f"lower n_components = {self.n_components}, or rescale X"
                )
            components.append(ButterflyNormal(mean, operator, validate_args=False))
        return _Mixture(counts / counts.sum(), components)

    def _fit_covariance(self, covariance: Tensor, before: ButterflyNormal | None) -> RotatedDiagonal:
        """The new fit, or the rotation before with the best diagonal for it, whichever is likelier."""
        if not torch.isfinite(covariance).all():
            return RotatedDiagonal(Basis(covariance.shape[:1]), covariance.diagonal())
        operator = fit_checked(covariance, "logdet", block=self.block, lead=self.lead, rotations=1).operator
        # A dense eigenbasis is optimal.
        if before is None or len(covariance) <= self.block:
            return operator
        basis = before.operator.basis  # type: ignore[attr-defined]
        half = basis.to_rotated(covariance)
        kept = basis.to_rotated(half.T.contiguous()).diagonal()
        return RotatedDiagonal(basis, kept.clone()) if kept.log().sum() < operator.d.log().sum() else operator

    def _log_joint(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        samples = validate_data(self, X, dtype=np.float64, order="C", reset=False)
        return self._mixture.log_joint(torch.tensor(samples))

    def _n_parameters(self) -> int:
        """Free parameters: weights, means, eigenvalues, and the angles of the rotations.

        A group of b coordinates has b (b - 1) / 2 angles; those among its leading outputs its parent has too.
        """
        n = self.n_features_in_
        plan = make_plan(n, self.block, self.lead)
        angles = 0
        for stage in plan.stages:
            shared = 0 if plan.is_full or stage is plan.stages[-1] else self.lead * (self.lead - 1) // 2
            angles += sum(run.groups * (run.size * (run.size - 1) // 2 - shared) for run in stage.runs)
        return self.n_components * (2 * n + angles + 1) - 1

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

"""Gaussian mixtures with butterfly covariances, as a scikit-learn estimator. Needs scikit-learn >= 1.6.

Expectation maximisation (A. Dempster, N. Laird, D. Rubin, J. R. Stat. Soc. B 39, 1977) with covariances
``Q_k diag(d_k) Q_k^T`` (M. Mathieu, Y. LeCun, arXiv:1404.7195, 2014). A maximisation step takes a few steps of descent
on the angles of each component, on its weighted covariance with criterion "logdet", which is the expected
likelihood (``butterfly_opt.descent``); the best angles seen are kept, so the likelihood rises though the angles
are not yet optimal (a generalised EM). The best diagonal for the angles is in closed form.
"""

import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from butterfly_opt.descent import Fit, FitOptions, fit_angles
from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.rotation import num_stages

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

WARM_STEPS = 0.1
"""Angle steps of a later maximisation, as a share of those of the first."""
WARM_LR = 0.01
"""Radians: length of its first angle step. Longer ones lose what the maximisation before has found."""
LR_DECAY = 0.25
"""Where a descent gains less than ``tol``, another one takes steps shorter by this factor, and so do all after it."""
MIN_LR = 1e-4
"""Radians: the shortest first angle step."""


class _Mixture(NamedTuple):
    """The parameters of a mixture, and how the next maximisation goes on with the angles."""

    weights: Tensor
    components: list[ButterflyNormal]
    options: list[FitOptions]

    def log_joint(self, samples: Tensor) -> Tensor:
        """``log (weight_k p_k(x))``, ``(count, n_components)``."""
        return torch.stack([component.log_prob(samples) for component in self.components], 1) + self.weights.log()


class ButterflyMixture(DensityMixin, BaseEstimator):
    """Mixture of Gaussians with covariances ``Q_k diag(d_k) Q_k^T``, between diagonal and full ones.

    A component has ``depth n log2(n) / 2 + n`` parameters for its covariance where a full one has ``n (n + 1) / 2``: it
    needs fewer samples. The interface is that of ``sklearn.mixture.GaussianMixture``; all checks of
    ``sklearn.utils.estimator_checks.check_estimator`` pass. The arithmetic is in float64, on the CPU.

    Args:
        n_components: number of Gaussians.
        depth: butterflies multiplied in each eigenbasis.
        angle_steps: descent steps on the angles in the first maximisation; each later one takes a tenth of them.
        tol: EM ends when the mean log-likelihood of a sample changes by less, in nats.
        reg_covar: added to the diagonals of the covariances, in squared units of X.
        max_iter: maximisations after the first.
        n_init: starts by k-means; the one of the highest likelihood is kept.
        random_state: of k-means and of ``sample``: a seed, a ``numpy.random.RandomState``, or None.

    Attributes:
        weights_: ``(n_components,)``.
        means_: ``(n_components, n)``.
        operators_: covariances, a list of ``RotatedDiagonal`` in float64.
        lower_bound_: mean log-likelihood of a training sample, in nats; of ``lower_bounds_`` the last.
        lower_bounds_: the same after each maximisation, of the start that was kept.
        n_iter_: maximisations after the first.
        converged_: whether ``tol`` was reached.
        n_features_in_: n.

    Cost: of a maximisation O(count n^2) and O(depth n^2 log n) an angle step for each component, O(n^3) in the first;
    of an expectation, and of every prediction, one rotation for each sample and component. Memory O(n^2 + count n).

    Example:
        >>> ButterflyMixture(10, reg_covar=1e-2, random_state=0).fit(X).score(held_out)
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        depth: int = 1,
        angle_steps: int = 100,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.depth = depth
        self.angle_steps = angle_steps
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
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
        runs = []
        for _ in range(self.n_init):
            labels = KMeans(self.n_components, n_init=1, random_state=random).fit(data).labels_
            start = torch.nn.functional.one_hot(torch.tensor(labels).long(), self.n_components)
            runs.append(self._run(samples, start.to(samples.dtype)))
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

    def _run(self, samples: Tensor, responsibilities: Tensor) -> tuple[_Mixture, list[float]]:
        """EM from one start: the mixture, and the mean log-likelihood after each maximisation."""
        mixture = self._maximize(samples, responsibilities, None)
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
        """The mixture for given responsibilities ``(count, n_components)``, its angles from those before."""
        # Components without samples: as in scikit-learn.
        counts = responsibilities.sum(0) + 10 * torch.finfo(samples.dtype).eps
        components, following = [], []
        for k, shares in enumerate((responsibilities / counts).T):
            mean = shares @ samples
            centred = shares.sqrt()[:, None] * (samples - mean)
            covariance = centred.T @ centred
            covariance.diagonal().add_(self.reg_covar)
            fit, options = self._fit_angles(covariance, None if before is None else before.options[k])
            if not (fit.operator.d > torch.finfo(samples.dtype).tiny).all():
                raise ValueError(
                    f"the covariance of component {k} is singular or not finite: raise reg_covar = {self.reg_covar}, "
                    f"lower n_components = {self.n_components}, or rescale X"
                )
            components.append(ButterflyNormal(mean, fit.operator, validate_args=False))
            following.append(options)
        return _Mixture(counts / counts.sum(), components, following)

    def _fit_angles(self, covariance: Tensor, options: FitOptions | None) -> tuple[Fit, FitOptions]:
        """The fit of a component, and the options of its next one."""
        if options is None:
            fit = fit_angles(covariance, "logdet", FitOptions(depth=self.depth, steps=self.angle_steps))
            steps = math.ceil(WARM_STEPS * self.angle_steps)
            return fit, FitOptions(depth=self.depth, steps=steps, lr=WARM_LR, start=fit.angles)
        while True:
            fit = fit_angles(covariance, "logdet", options)
            # In nats a sample: the loss is a mean over the coordinates, of twice the negative log-likelihood.
            gain = 0.5 * len(covariance) * (fit.losses[0] - min(fit.losses))
            if gain >= self.tol or options.lr * LR_DECAY < MIN_LR:
                return fit, replace(options, start=fit.angles)
            options = replace(options, start=fit.angles, lr=options.lr * LR_DECAY)

    def _log_joint(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        samples = validate_data(self, X, dtype=np.float64, order="C", reset=False)
        return self._mixture.log_joint(torch.tensor(samples))

    def _n_parameters(self) -> int:
        """Free parameters: weights, means, eigenvalues, and an angle for each pair of each stage."""
        n = self.n_features_in_
        pairs = sum(sum(i + (1 << stage) < n for i in range(n) if not i >> stage & 1) for stage in range(num_stages(n)))
        return self.n_components * (2 * n + self.depth * pairs + 1) - 1

    def _check_parameters(self) -> None:
        bounds: tuple[tuple[str, Any], ...] = (
            ("n_components", 1),
            ("depth", 1),
            ("angle_steps", 0),
            ("tol", 0),
            ("reg_covar", 0),
            ("max_iter", 1),
            ("n_init", 1),
        )
        for name, low in bounds:
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")

"""butterfly_opt.mixture. Oracles: scikit-learn's GaussianMixture and its estimator checks, planted mixtures."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import check_estimator

from butterfly_opt.mixture import ButterflyMixture
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.rotation import angles_shape


def planted(counts=(200, 300), n=8, *, apart=4.0, seed=0):
    """Samples of Gaussians whose eigenbases are butterflies, their components, and the operators."""
    generator = torch.Generator().manual_seed(seed)
    samples, operators = [], []
    for count in counts:
        angles = 6 * torch.rand(angles_shape(n), generator=generator, dtype=torch.float64)
        covariance = RotatedDiagonal.from_angles(angles, torch.logspace(-1, 1, n, dtype=torch.float64))
        loc = apart * torch.randn(n, generator=generator, dtype=torch.float64)
        samples.append(loc + covariance.sample((count,), generator=generator))
        operators.append(covariance)
    return torch.cat(samples).numpy(), np.repeat(np.arange(len(counts)), counts), operators


@pytest.fixture(scope="module")
def fitted():
    X, labels, operators = planted()
    return ButterflyMixture(2, random_state=0).fit(X), X, labels, operators


@pytest.mark.parametrize("model", [ButterflyMixture(angle_steps=10), ButterflyMixture(2, depth=2, angle_steps=5)])
def test_scikit_learn_checks_pass(model):
    """All of them, but that of the array API, which scikit-learn skips where SCIPY_ARRAY_API is not set."""
    results = check_estimator(model, on_fail=None)
    assert len(results) > 35
    unusual = {result["check_name"]: result["exception"] for result in results if result["status"] != "passed"}
    assert set(unusual) <= {"check_array_api_input"}, unusual


@pytest.mark.parametrize("n", [1, 2])
def test_it_is_the_full_mixture_where_a_butterfly_is_any_rotation(n):
    """In one and two dimensions every covariance is ``Q diag(d) Q^T``."""
    X, _, _ = planted(n=n, apart=6.0, seed=1)
    ours = ButterflyMixture(2, random_state=0, tol=1e-8).fit(X)
    theirs = GaussianMixture(2, random_state=0, tol=1e-8).fit(X)
    assert ours.converged_
    assert theirs.converged_
    order = np.argsort(ours.means_[:, 0]), np.argsort(theirs.means_[:, 0])
    np.testing.assert_allclose(ours.weights_[order[0]], theirs.weights_[order[1]], atol=1e-4)
    np.testing.assert_allclose(ours.means_[order[0]], theirs.means_[order[1]], atol=1e-3)
    dense = np.stack([operator.to_dense().numpy() for operator in ours.operators_])
    np.testing.assert_allclose(dense[order[0]], theirs.covariances_[order[1]], atol=1e-3)
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), atol=1e-3)
    np.testing.assert_allclose(ours.predict_proba(X)[:, order[0]], theirs.predict_proba(X)[:, order[1]], atol=1e-3)
    assert ours.bic(X) == pytest.approx(theirs.bic(X), abs=1e-2)
    assert ours.aic(X) == pytest.approx(theirs.aic(X), abs=1e-2)


def test_what_is_fitted_is_the_mixture_of_its_attributes(fitted):
    model, X, _, _ = fitted
    oracle = GaussianMixture(2)
    oracle.weights_, oracle.means_ = model.weights_, model.means_
    dense = np.stack([operator.to_dense().numpy() for operator in model.operators_])
    oracle.precisions_cholesky_ = np.stack([np.linalg.inv(np.linalg.cholesky(matrix)).T for matrix in dense])
    np.testing.assert_allclose(model.score_samples(X), oracle.score_samples(X), rtol=1e-10)
    np.testing.assert_allclose(model.predict_proba(X), oracle.predict_proba(X), atol=1e-10)
    np.testing.assert_array_equal(model.predict(X), oracle.predict(X))
    assert model.score(X) == pytest.approx(oracle.score(X)) == pytest.approx(model.lower_bound_)
    np.testing.assert_allclose(model.weights_.sum(), 1)


def test_planted_components_are_found(fitted):
    model, X, labels, operators = fitted
    found = model.predict(X)
    assert adjusted_rand_score(labels, found) > 0.99
    assert model.converged_
    assert model.n_iter_ < 50
    for planted_label, operator in enumerate(operators):
        k = np.bincount(found[labels == planted_label]).argmax()
        dense = operator.to_dense()
        assert (model.operators_[k].to_dense() - dense).norm() < 0.2 * dense.norm()


@pytest.mark.filterwarnings("ignore:EM did not reach")
def test_the_likelihood_rises_with_every_maximisation():
    X, _, _ = planted((60, 50, 40), apart=0.7, seed=3)
    for depth in (1, 2):
        model = ButterflyMixture(3, depth=depth, angle_steps=20, reg_covar=1e-9, max_iter=30, random_state=0).fit(X)
        assert model.n_iter_ >= 5
        assert len(model.lower_bounds_) == model.n_iter_ + 1
        assert np.diff(model.lower_bounds_).min() > -1e-6
        assert model.lower_bound_ == model.lower_bounds_[-1]


def test_warm_angles_go_on_where_the_maximisation_before_ended():
    """Depth 2 at 64 coordinates: EM with few angle steps improves on the angles of the first maximisation."""
    X = load_digits().data[:500]
    options = {"depth": 2, "reg_covar": 1e-1, "tol": 0, "max_iter": 10, "random_state": 0}
    with pytest.warns(ConvergenceWarning, match="did not reach tol = 0 in max_iter = 10"):
        model = ButterflyMixture(**options, angle_steps=40).fit(X)
    assert model.lower_bounds_[-1] > model.lower_bounds_[0] + 0.3
    assert np.diff(model.lower_bounds_).min() > -1e-3


@pytest.mark.filterwarnings("ignore:EM did not reach")
def test_digits_beat_full_and_diagonal_covariances_on_held_out_samples():
    """reg_covar 0.01 in squared grey levels: full -100.7, diagonal -100.7, depth 1 -92.3."""
    X = load_digits().data[np.random.RandomState(0).permutation(1797)]
    train, held_out = X[:1200], X[1200:]
    options = {"reg_covar": 1e-2, "random_state": 0}
    ours = ButterflyMixture(10, angle_steps=30, max_iter=8, tol=0.01, **options).fit(train).score(held_out)
    theirs = [
        GaussianMixture(10, covariance_type=kind, **options).fit(train).score(held_out) for kind in ("full", "diag")
    ]
    assert ours > max(theirs) + 5


def test_more_starts_are_no_worse():
    X, _, _ = planted((40, 40, 40), n=4, apart=3.0, seed=2)
    options = {"angle_steps": 10, "random_state": 1, "tol": 1e-2}
    bounds = [ButterflyMixture(3, n_init=n_init, **options).fit(X).lower_bound_ for n_init in (1, 2, 4)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0] + 0.5


def test_samples_come_from_the_mixture(fitted):
    model, _, _, _ = fitted
    X, labels = model.sample(20_000)
    assert X.shape == (20_000, 8)
    for k, operator in enumerate(model.operators_):
        part = X[labels == k]
        assert len(part) / len(X) == pytest.approx(model.weights_[k], abs=0.02)
        dense = operator.to_dense().numpy()
        np.testing.assert_allclose(part.mean(0), model.means_[k], atol=0.2)
        np.testing.assert_allclose(np.cov(part.T), dense, atol=0.06 * dense.trace())
    again = model.sample(20_000)
    np.testing.assert_array_equal(again[0], X)
    assert model.score(X) == pytest.approx(model.lower_bound_, abs=0.1)


@pytest.mark.parametrize(("n", "pairs"), [(1, 0), (2, 1), (3, 2), (8, 12), (10, 15)])
def test_parameters_are_counted(n, pairs):
    """bic - aic = (log count - 2) parameters."""
    X = np.random.RandomState(0).randn(40, n)
    model = ButterflyMixture(2, depth=3, angle_steps=0, random_state=0, tol=1.0).fit(X)
    parameters = 2 * (2 * n + 3 * pairs) + 1
    assert model.bic(X) - model.aic(X) == pytest.approx((np.log(40) - 2) * parameters)
    assert model.aic(X) == pytest.approx(-2 * 40 * model.score(X) + 2 * parameters)


def test_equal_seeds_give_equal_models_that_pickle(fitted):
    model, X, _, _ = fitted
    again = pickle.loads(pickle.dumps(clone(model).fit(X)))
    np.testing.assert_array_equal(again.score_samples(X), model.score_samples(X))
    np.testing.assert_array_equal(clone(model).fit_predict(X), model.predict(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be >= 1, got 0"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"angle_steps": -1}, "angle_steps must be >= 0, got -1"),
        ({"tol": float("nan")}, "tol must be >= 0, got nan"),
        ({"reg_covar": -1e-6}, "reg_covar must be >= 0, got -1e-06"),
        ({"max_iter": 0}, "max_iter must be >= 1, got 0"),
        ({"n_init": 0}, "n_init must be >= 1, got 0"),
        ({"n_components": 6}, "n_components must be at most the 5 samples, got 6"),
        ({"n_components": 5, "reg_covar": 0.0}, "covariance of component 0 is singular or not finite: raise reg_covar"),
    ],
)
def test_parameters_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ButterflyMixture(random_state=0, **options).fit(np.random.RandomState(0).randn(5, 3))


def test_wrong_calls_are_refused(fitted):
    with pytest.raises(ValueError, match="n_samples must be >= 1, got 0"):
        fitted[0].sample(0)
    for method in ("predict", "predict_proba", "score_samples", "score", "bic", "aic", "sample"):
        with pytest.raises(NotFittedError):
            getattr(ButterflyMixture(), method)(np.ones((2, 2)))


def test_without_scikit_learn_the_extra_is_named():
    script = "import sys; sys.modules['sklearn'] = None; import butterfly_opt; import butterfly_opt.mixture"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert finished.returncode == 1
    assert "ImportError: butterfly_opt.mixture needs scikit-learn >= 1.6; install it with" in finished.stderr

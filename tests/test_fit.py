"""Offline fits and their sweeps. Oracles: planted eigenbases, dense float64 linear algebra, scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from sklearn.covariance import OAS, ShrunkCovariance
from sklearn.datasets import load_digits
from torch.distributions import MultivariateNormal

from butterfly_opt.basis import Basis
from butterfly_opt.fit import fit_covariance, fit_inverse, fit_symmetric
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation, orthogonalize
from butterfly_opt.secant import SecantEstimate
from butterfly_opt.sweep import sweep
from experiments.paper_covariance import factor_analysis

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
EXACT = {torch.float32: 5e-5, torch.float64: 1e-11}
"""Relative error of a planted basis: a few hundred roundings."""
PLANS = [(64, 16), (8, 2), (8, 4), (2, 2)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n, *, plan=(8, 2), seed=0, spectrum=None):
    """``Q diag(d) Q^T``, every group of Q a random orthogonal matrix."""
    rotation = Rotation.identity(n, block=plan[0], lead=plan[1], dtype=torch.float64)
    for view in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
        view.copy_(orthogonalize(normal(*view.shape, seed=seed)))
    d = normal(n, seed=seed + 100) if spectrum is None else spectrum
    q = rotation.dense()[0]
    return (q * d) @ q.T


def noise(n, *, seed=1):
    entries = normal(n, n, seed=seed)
    return (entries + entries.T) / (2 * n**0.5)


def stiff(n, seed=0):
    """Condition 1e3, in random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.logspace(0, 3, n, dtype=torch.float64)[order]


def relative(ours, dense):
    return ((ours.double() - dense).norm() / dense.norm()).item()


@pytest.fixture(scope="module")
def digits():
    samples = torch.from_numpy(load_digits().data)
    return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def covariance(digits):
    return torch.from_numpy(ShrunkCovariance(shrinkage=0.01).fit(digits.numpy()).covariance_)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 32, 33, 64, 100, 200])
def test_planted_bases_are_found(n, plan, dtype, device):
    """Whatever the order of the eigenvalues: what goes on is what other groups are coupled to."""
    for seed in range(2):
        dense = planted(n, plan=plan, seed=seed)
        fit = fit_symmetric(dense.to(device, dtype), block=plan[0], lead=plan[1])
        assert fit.operator.dtype == dtype
        assert fit.operator.device.type == device
        assert fit.error < EXACT[dtype]
        assert fit.errors[-1] == fit.error
        assert relative(fit.operator.to_dense().cpu(), dense) < EXACT[dtype]


@pytest.mark.parametrize("plan", PLANS)
def test_planted_bases_are_found_for_the_likelihood(plan):
    dense = planted(100, plan=plan, spectrum=stiff(100))
    assert fit_symmetric(dense, block=plan[0], lead=plan[1], criterion="logdet").error < 1e-10


def test_radix_2_finds_the_butterfly_of_explicit_givens_factors():
    angles = 2 * math.pi * torch.rand(1, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.from_numpy(reference.dense_rotation(angles, 64))
    assert fit_symmetric((q * normal(64)) @ q.T, block=2, lead=2).error < 1e-11
    equal = fit_symmetric(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), block=2, lead=2)
    assert sorted(equal.operator.eigenvalues().tolist()) == pytest.approx([1.0, 3.0])
    diagonal = fit_symmetric(torch.diag(torch.arange(5.0)), block=2, lead=2)
    assert diagonal.error == 0


@pytest.mark.parametrize("plan", [(8, 2), (2, 2)])
def test_a_planted_basis_is_found_under_noise(plan):
    dense, extra = planted(64, plan=plan, seed=3), 0.04 * noise(64)
    fit = fit_symmetric(dense + extra, block=plan[0], lead=plan[1])
    assert fit.error < 5 * relative(dense, dense + extra)
    assert fit.error < 0.3 * fit.errors[0]


@pytest.mark.parametrize("plan", [(2, 2), (4, 4), (16, 4)])
def test_every_rotation_in_a_row_lowers_the_error(plan):
    dense = noise(40, seed=4)
    fit = fit_symmetric(dense, block=plan[0], lead=plan[1], rotations=3)
    assert len(fit.errors) == 4
    assert all(after < before for before, after in itertools.pairwise(fit.errors))
    assert fit.error == pytest.approx(relative(fit.operator.to_dense(), dense))
    q = fit.operator.from_eigenbasis(torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(fit.operator.eigenvalues(), (q.T @ dense @ q).diagonal())


def test_up_to_one_block_it_is_the_eigendecomposition(covariance):
    fit = fit_symmetric(covariance)
    assert fit.error < 1e-12
    torch.testing.assert_close(fit.operator.eigenvalues().sort().values, torch.linalg.eigvalsh(covariance))


def test_wider_groups_lower_the_error(covariance):
    """Digits pixels: relative errors 0.60 for radix 2, 0.29, 0.15 and 0.05."""
    plans = [(2, 2), (16, 4), (32, 8), (32, 16)]
    errors = [fit_symmetric(covariance, block=block, lead=lead).error for block, lead in plans]
    print(dict(zip(plans, errors, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.35
    assert errors[3] < 0.07


def test_a_function_is_fitted_as_its_matrix():
    dense = planted(20)
    whole = fit_symmetric(dense, block=4, lead=2)
    product = fit_symmetric(lambda x: dense @ x, n=20, dtype=torch.float64, block=4, lead=2)
    torch.testing.assert_close(product.operator.to_dense(), whole.operator.to_dense())
    single = fit_symmetric(lambda x: dense.float() @ x, n=20)
    assert single.operator.dtype == torch.float32


def log_likelihood(samples, loc, operator):
    x = (samples - loc).T
    return (
        (-0.5 * (operator.inverse().quadratic(x) + operator.logdet() + len(loc) * math.log(2 * math.pi))).mean().item()
    )


@pytest.mark.parametrize("plan, factors", [((16, 4), 10), ((32, 8), 19)])
def test_what_stops_shares_fewer_nats_with_the_rest(digits, plan, factors):
    """Held out, above factor analysis of as many free numbers: 640 and 659, 1120 and 1109."""
    train, held_out = digits[:1000], digits[1000:]
    fit = fit_covariance(train, block=plan[0], lead=plan[1], shrinkage="oas")
    dense = torch.from_numpy(OAS().fit(train.numpy()).covariance_)
    rotation = sweep(dense, make_plan(64, *plan), "logdet", turns=0)
    d = rotation.to_rotated(rotation.to_rotated(dense[None]), dim=-1)[0].diagonal()
    equal = factor_analysis(dense, factors)
    scores = {
        "turned": log_likelihood(held_out, fit.loc, fit.operator),
        "not turned": log_likelihood(held_out, fit.loc, RotatedDiagonal(Basis((64,), [(0, rotation)]), d)),
        "factor analysis": MultivariateNormal(fit.loc, equal).log_prob(held_out).mean().item(),
    }
    print(scores)
    assert scores["turned"] > max(scores["not turned"] + 0.3, scores["factor analysis"])


def test_digits_beat_the_diagonal_on_held_out_samples(digits):
    """Held-out log-likelihood of radix 2, groups of 16 and of 32, beside the diagonal and the full matrix."""
    train, held_out = digits[:1000], digits[1000:]
    scores = {}
    for plan in ((2, 2), (16, 4), (32, 8)):
        fit = fit_covariance(train, block=plan[0], lead=plan[1], shrinkage="oas")
        scores[plan] = log_likelihood(held_out, fit.loc, fit.operator)
    dense = torch.from_numpy(OAS().fit(train.numpy()).covariance_)
    scores["diagonal"] = log_likelihood(held_out, fit.loc, RotatedDiagonal(Basis((64,)), dense.diagonal()))
    scores["full"] = MultivariateNormal(fit.loc, dense).log_prob(held_out).mean().item()
    print(scores)
    assert scores["diagonal"] + 8 < scores[2, 2] < scores[16, 4] < scores[32, 8] < scores["full"]
    assert scores[32, 8] > scores["full"] - 4


def test_float32_samples_are_fitted_in_float64():
    """In float32 this covariance, of condition 1e8, would be singular to rounding."""
    samples = (normal(500, 30) * torch.logspace(0, -4, 30, dtype=torch.float64)).float()
    fit = fit_covariance(samples, block=8, lead=2)
    exact = fit_covariance(samples.double(), block=8, lead=2)
    assert fit.operator.dtype == fit.loc.dtype == torch.float32
    torch.testing.assert_close(fit.operator.d, exact.operator.d.float())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_variances_beyond_float32_are_refused(scale):
    samples = normal(300, 20).float() * scale
    with pytest.raises(ValueError, match=r"variances from .* do not fit torch\.float32: scale the samples"):
        fit_covariance(samples)
    assert (fit_covariance(samples.double()).operator.d > 0).all()


def test_covariances_are_those_of_scikit_learn(digits, covariance):
    fit = fit_covariance(digits, shrinkage=0.01)
    assert relative(fit.operator.to_dense(), covariance) < 1e-12
    assert fit.count == 1797
    assert fit.shrinkage == 0.01
    torch.testing.assert_close(fit.loc, digits.mean(0))
    few = digits[:40]
    for centred in (False, True):
        theirs = OAS(assume_centered=centred).fit(few.numpy())
        ours = fit_covariance(few, shrinkage="oas", assume_centered=centred, block=16, lead=4)
        assert ours.shrinkage == pytest.approx(theirs.shrinkage_)
        assert ours.operator.trace().item() == pytest.approx(theirs.covariance_.trace())
        assert ours.loc.any() == (not centred)
    alike = torch.eye(2, dtype=torch.float64).repeat(4, 1) - 0.5
    isotropic = torch.cat((alike, alike.flip(1) * torch.tensor([1.0, -1.0])))
    assert fit_covariance(isotropic, shrinkage="oas").shrinkage == pytest.approx(
        OAS().fit(isotropic.numpy()).shrinkage_
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_read_as_one(dtype):
    samples = normal(300, 10).to(dtype) + 100
    whole = fit_covariance(samples)
    batches = fit_covariance(batch for batch in samples.split([100, 1, 0, 199]))
    assert batches.count == 300
    assert batches.operator.dtype == batches.loc.dtype == dtype
    torch.testing.assert_close(batches.loc, whole.loc)
    torch.testing.assert_close(batches.operator.to_dense(), whole.operator.to_dense(), rtol=1e-4, atol=1e-5)
    assert whole.operator.trace().item() == pytest.approx(samples.double().var(0, correction=0).sum().item(), rel=1e-4)


@pytest.mark.parametrize("plan", [(8, 2), (2, 2)])
@pytest.mark.parametrize("n", [16, 64])
def test_the_inverse_of_a_planted_hessian(n, plan):
    hessian = planted(n, plan=plan, spectrum=stiff(n))
    s = normal(n + 5, n, seed=2)
    y = s @ hessian
    fit = fit_inverse([(s, y)], block=plan[0], lead=plan[1])
    assert relative(fit.operator.to_dense(), torch.linalg.inv(hessian)) < 1e-8
    one_by_one = fit_inverse(zip(s, y, strict=True), block=plan[0], lead=plan[1])
    torch.testing.assert_close(one_by_one.operator.to_dense(), fit.operator.to_dense())


def test_the_inverse_under_noise_conditions_the_hessian():
    """16 coordinates of condition 1e3, 1 % noise."""
    hessian = planted(16, spectrum=stiff(16))
    s = normal(64, 16, seed=2)
    y = s @ hessian
    y += 0.01 * y.std() * normal(*y.shape, seed=3)
    fit = fit_inverse([(s, y)])
    assert reference.condition(fit.operator.to_dense().numpy(), hessian.numpy()) < 10
    assert reference.condition(torch.diag(1 / hessian.diagonal()).numpy(), hessian.numpy()) > 100


def test_few_pairs_are_completed_by_the_prior():
    s = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = fit_inverse([(s, 3 * s)], shrinkage=0.1)
    torch.testing.assert_close(fit.operator.to_dense(), torch.eye(8, dtype=torch.float64) / 3)
    # Against the normal equations, at n = 2 where every symmetric matrix is fitted exactly.
    s = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = s @ torch.tensor([[3.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    weight, mean = 0.5 * s.square().sum() / 2, (s * y).sum() / s.square().sum()
    eye = torch.eye(2, dtype=torch.float64)
    hessian = torch.linalg.solve(s.T @ s + weight * eye, s.T @ y + weight * mean * eye)
    expected = torch.linalg.inv((hessian + hessian.T) / 2)
    torch.testing.assert_close(fit_inverse([(s, y)], shrinkage=0.5).operator.to_dense(), expected)


BROKEN = torch.eye(3).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(float("nan")))
LOPSIDED = torch.eye(3) + torch.ones(3, 3).triu(1)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.ones(2, 3), {}, r"matrix must be square and not empty, got shape \(2, 3\)"),
        (torch.ones(4), {}, r"matrix must be square and not empty, got shape \(4,\)"),
        (torch.ones(0, 0), {}, r"matrix must be square and not empty, got shape \(0, 0\)"),
        (BROKEN, {}, "matrix must be finite, got 1 entries that are not"),
        (LOPSIDED, {}, r"matrix must be symmetric, got entries that differ .* by up to 1 \(largest entry 1\)"),
        (torch.eye(3), {"criterion": "trace"}, r"criterion must be one of \('energy', 'logdet'\), got 'trace'"),
        (
            torch.diag(torch.tensor([1.0, -2.0])),
            {"criterion": "logdet"},
            "positive definite, got eigenvalues from -2 to 1",
        ),
        (torch.ones(2, 2), {"criterion": "logdet"}, "criterion='logdet' must be positive definite"),
        (lambda x: x, {}, "a matrix given as a function needs its order n >= 1, got n = None"),
        (lambda x: x, {"n": 0}, "needs its order n >= 1, got n = 0"),
        (lambda x: x[:2], {"n": 3}, r"the function must return shape \(3, 3\), got \(2, 3\)"),
        (torch.eye(4), {"rotations": 0}, "rotations must be >= 1, got 0"),
        (torch.eye(4), {"block": 1}, "Invalid block value: 1, expected an integer >= 2"),
        (torch.eye(4), {"lead": 33}, "Invalid lead value: 33"),
    ],
)
def test_matrices_that_are_refused(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        fit_symmetric(matrix, **options)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.randn(1, 3), {}, "a covariance needs at least 2 samples, got 1"),
        ([], {}, "a covariance needs at least 2 samples, got 0"),
        (torch.randn(5), {}, r"samples must have shape \(count, n\), got \(5,\)"),
        (torch.randn(5, 0), {}, r"samples must have shape \(count, n\), got \(5, 0\)"),
        ([torch.randn(5, 3), torch.randn(5, 2)], {}, r"samples must have shape \(count, 3\), got \(5, 2\)"),
        (torch.full((5, 3), float("inf")), {}, "samples must be finite, got 15 entries"),
        (torch.randn(4, 8), {}, "covariance of 4 samples of 8 coordinates must be positive definite.*shrinkage='oas'"),
        (torch.ones(9, 3), {"shrinkage": "oas"}, "covariance of 9 samples of 3 coordinates must be positive definite"),
        (torch.randn(9, 3), {"shrinkage": "ledoit"}, "shrinkage must be 'oas' or a number from 0 to 1, got 'ledoit'"),
        (torch.randn(9, 3), {"shrinkage": 1.5}, "shrinkage must be 'oas' or a number from 0 to 1, got 1.5"),
    ],
)
def test_samples_that_are_refused(samples, options, message):
    with pytest.raises(ValueError, match=message):
        fit_covariance(samples, **options)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "fit_inverse needs at least one pair, got none"),
        ([(torch.ones(3), torch.ones(2))], {}, r"of one shape, \(n,\) or \(k, n\), got \(3,\) and \(2,\)"),
        ([(torch.ones(3), torch.ones(3)), (torch.ones(2), torch.ones(2))], {}, r"got \(2,\) and \(2,\)"),
        ([(torch.ones(3), torch.full((3,), float("nan")))], {}, "delta_grad must be finite, got 3 entries"),
        ([(torch.full((3,), float("nan")), torch.ones(3))], {}, "delta_theta must be finite, got 3 entries"),
        ([(torch.eye(3)[:2], torch.eye(3)[:2])], {}, "displacements of 2 pairs span 2 of 3 dimensions.*shrinkage > 0"),
        (
            [(torch.eye(3), -torch.eye(3))],
            {},
            "Hessian of the pairs must be positive definite, got eigenvalues from -1",
        ),
        ([(torch.eye(3), torch.eye(3))], {"shrinkage": -1.0}, "shrinkage must be a finite number >= 0, got -1.0"),
    ],
)
def test_pairs_that_are_refused(pairs, options, message):
    with pytest.raises(ValueError, match=message):
        fit_inverse(pairs, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fit_symmetric(torch.eye(3, dtype=torch.float16)),
        lambda: fit_covariance(torch.ones(5, 3, dtype=torch.int64)),
        lambda: fit_inverse([(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))]),
    ],
)
def test_other_dtypes_are_refused(call):
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch\."):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: fit_symmetric(np.eye(3)), "matrix"),
        (lambda: fit_covariance(np.ones((5, 3))), "samples"),
        (lambda: fit_inverse([(np.ones(3), np.ones(3))]), "delta_theta"),
        (lambda: SecantEstimate((3,)).update(np.ones(3), np.ones(3)), "delta_theta"),
    ],
)
def test_arrays_are_refused_by_name(call, name):
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got ndarray; use torch\.as_tensor"):
        call()

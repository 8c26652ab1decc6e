"""Offline fits and their descent. Oracles: planted eigenbases, dense float64 linear algebra, autograd, scikit-learn."""

import itertools
import math

import pytest
import reference
import torch
from sklearn.covariance import OAS, ShrunkCovariance
from sklearn.datasets import load_digits

from butterfly_opt.angle_basis import AngleBasis
from butterfly_opt.autograd import butterfly_rotation
from butterfly_opt.descent import Descent, FitOptions, jacobi_start
from butterfly_opt.fit import fit_covariance, fit_inverse, fit_symmetric
from butterfly_opt.operators import RotatedDiagonal
from butterfly_opt.rotation import angles_shape, dense_rotation, num_stages

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative error of a planted basis: a few hundred roundings."""


def planted(n, *, seed=0, depth=1, spectrum=None):
    """``Q diag(d) Q^T`` with angles anywhere on the circle, from explicit Givens factors."""
    generator = torch.Generator().manual_seed(seed)
    angles = 2 * math.pi * torch.rand(angles_shape(n, depth=depth), generator=generator, dtype=torch.float64)
    d = torch.randn(n, generator=generator, dtype=torch.float64) if spectrum is None else spectrum
    Q = torch.from_numpy(reference.dense_rotation(angles, n))
    return Q @ torch.diag(d) @ Q.T


def noise(n, *, seed=1):
    entries = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (entries + entries.T) / (2 * n**0.5)


def stiff(n):
    return torch.logspace(0, 3, n, dtype=torch.float64)


def relative(ours, dense):
    return ((ours.double() - dense).norm() / dense.norm()).item()


@pytest.fixture(scope="module")
def digits():
    samples = torch.from_numpy(load_digits().data)
    return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def covariance(digits):
    return fit_covariance(digits, FitOptions(steps=0), shrinkage=0.01), torch.from_numpy(
        ShrunkCovariance(shrinkage=0.01).fit(digits.numpy()).covariance_
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 32, 33, 64, 100])
def test_planted_butterflies_are_found(n, dtype, device):
    for seed in range(3):
        dense = planted(n, seed=seed)
        fit = fit_symmetric(dense.to(device, dtype))
        assert fit.operator.dtype == dtype
        assert fit.operator.device.type == device
        assert fit.error < EXACT[dtype]
        assert relative(fit.operator.to_dense().cpu(), dense) < EXACT[dtype]
        if n > 1 and dtype == torch.float64:
            assert fit.stopped_early


@pytest.mark.parametrize("n", [16, 64])
def test_a_planted_butterfly_is_found_under_noise(n):
    dense, extra = planted(n, seed=3), 0.04 * noise(n)
    fit = fit_symmetric(dense + extra)
    assert fit.error < relative(dense, dense + extra)
    assert fit.error < 0.8 * fit.errors[0]
    # What is left of the noise: its share in the tangent space, as many of the entries as there are parameters.
    parameters, entries = n * math.log2(n) / 2 + n, n * (n + 1) / 2
    left = relative(fit.operator.to_dense(), dense) / relative(dense + extra, dense)
    assert left == pytest.approx(math.sqrt(parameters / entries), rel=0.2)


def test_plain_jacobi_angles_do_not_find_it():
    """The exchanges matter: without them descent ends far away, from any of these starts."""
    dense = planted(32, seed=1)
    shape = angles_shape(32)
    near_zero = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = fit_symmetric(dense, FitOptions(start=near_zero, restarts=3))
    assert fit.error > 0.2
    assert fit_symmetric(dense).error < 1e-12


def test_exact_starts():
    equal = jacobi_start(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert equal.abs().item() == pytest.approx(math.pi / 4)
    assert not jacobi_start(torch.diag(torch.arange(5.0)), depth=2).any()
    assert jacobi_start(torch.ones(1, 1)).shape == (1, 0, 0)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("n", [7, 24])
def test_every_butterfly_of_the_start_lowers_the_energy(n, depth):
    dense = noise(n, seed=4) * n
    angles = jacobi_start(dense, depth=depth)
    energies = []
    for count in range(depth + 1):
        Q = torch.from_numpy(reference.dense_rotation(angles[:count], n))
        rotated = Q.T @ dense @ Q
        energies.append(rotated.square().sum() - rotated.diagonal().square().sum())
    assert all(after < 0.95 * before for before, after in itertools.pairwise(energies))
    for stage in range(num_stages(n)):
        assert not angles[:, stage, len(reference.stage_pairs(n, stage)) :].any()


@pytest.mark.parametrize("criterion", ["energy", "logdet"])
@pytest.mark.parametrize(("n", "depth"), [(8, 1), (6, 2)])
def test_gradients_are_those_of_autograd(n, depth, criterion):
    dense = planted(n, depth=2, spectrum=stiff(n).sqrt())
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(angles_shape(n, depth=depth), generator=generator, dtype=torch.float64)
    ours = Descent(dense, criterion, angles)
    gradient = ours.look()
    angles.requires_grad_()
    half = butterfly_rotation(dense, angles, dim=0, transpose=True)
    rotated = butterfly_rotation(half, angles, dim=1, transpose=True)
    if criterion == "energy":
        loss = (rotated - torch.diag(rotated.diagonal())).square().sum() / dense.square().sum()
    else:
        loss = rotated.diagonal().log().mean()
    (expected,) = torch.autograd.grad(loss, angles)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert ours.losses == pytest.approx([loss.item()])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("criterion", ["energy", "logdet"])
def test_the_history_is_that_of_the_operator(covariance, criterion, depth):
    dense = covariance[1]
    fit = fit_symmetric(dense, FitOptions(depth=depth, steps=60), criterion=criterion)
    approximation = fit.operator.to_dense()
    assert fit.error == pytest.approx(relative(approximation, dense), rel=1e-6)
    Q = dense_rotation(fit.angles, 64)
    torch.testing.assert_close(fit.operator.eigenvalues(), (Q.T @ dense @ Q).diagonal())
    loss = fit.error**2 if criterion == "energy" else fit.operator.logdet().item() / 64
    assert min(fit.losses) == pytest.approx(loss, rel=1e-9)
    assert fit.restart_losses == [min(fit.losses)]
    assert len(fit.losses) == len(fit.errors) == 61
    assert not fit.stopped_early
    assert min(fit.losses) < fit.losses[0] - 0.02
    start = fit_symmetric(dense, FitOptions(depth=depth, steps=0), criterion=criterion)
    assert start.losses == fit.losses[:1]


def test_depth_and_steps_lower_the_error(covariance):
    """Digits pixels: relative errors fall with depth and with steps; measured 0.48, 0.24, 0.10 after 200 steps."""
    dense = covariance[1]
    errors = [fit_symmetric(dense, FitOptions(depth=depth)).error for depth in (1, 2, 4)]
    assert errors[0] < 0.52
    assert errors[1] < 0.27
    assert errors[2] < 0.12


def test_a_random_eigenbasis_approximates_badly():
    Q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    assert fit_symmetric(Q @ torch.diag(stiff(64)) @ Q.T).error > 0.5


def test_a_function_is_fitted_as_its_matrix():
    dense = planted(20, depth=2)
    whole = fit_symmetric(dense, FitOptions(steps=5))
    product = fit_symmetric(lambda x: dense @ x, FitOptions(steps=5), n=20, dtype=torch.float64)
    torch.testing.assert_close(product.angles, whole.angles)
    single = fit_symmetric(lambda x: dense.float() @ x, FitOptions(steps=5), n=20)
    assert single.operator.dtype == torch.float32


def test_seeds_and_restarts():
    dense = planted(24, depth=2)
    once = fit_symmetric(dense, FitOptions(steps=40))
    several = [fit_symmetric(dense, FitOptions(steps=40, restarts=3, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(several[0].angles, several[1].angles)
    assert several[0].restart_losses == several[1].restart_losses != several[2].restart_losses
    for fit in several:
        assert fit.restart_losses[0] == once.restart_losses[0]
        assert len(set(fit.restart_losses)) == 3
        assert min(fit.losses) == min(fit.restart_losses)
    state = torch.get_rng_state()
    fit_symmetric(dense, FitOptions(steps=2, restarts=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_shrink_to_zero(covariance):
    descent = Descent(covariance[1], "energy", jacobi_start(covariance[1]))
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(descent.angles.clone())
            yield step

    descent.run(FitOptions(steps=40, lr=0.1, progress=progress))
    seen.append(descent.angles)
    moves = [(after - before).abs().max().item() for before, after in itertools.pairwise(seen)]
    assert moves[0] == pytest.approx(0.1, rel=1e-3)  # Adam's first step has the length of the rate
    assert moves[-1] < 2 * 0.1 / 40


def test_the_best_angles_are_kept():
    dense = planted(16) + 0.02 * noise(16)
    fit = fit_symmetric(dense, FitOptions(steps=2, lr=1.0))
    assert fit.losses[0] < fit.losses[1]
    assert fit.error == fit.errors[0] == min(fit.errors)
    torch.testing.assert_close(fit.angles, jacobi_start(dense))


def test_a_fit_goes_on_from_given_angles():
    dense = planted(24, depth=2)
    first = fit_symmetric(dense, FitOptions(steps=40))
    again = fit_symmetric(dense, FitOptions(steps=0, start=first.angles))
    assert again.error == pytest.approx(first.error)
    assert torch.equal(again.angles, first.angles)


def test_it_stops_when_the_loss_rests_and_reports_progress():
    dense = planted(16) + 0.05 * noise(16)
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    fit = fit_symmetric(dense, FitOptions(steps=400, progress=progress))
    assert fit.stopped_early
    assert len(fit.losses) == len(seen) < 400
    full = fit_symmetric(dense, FitOptions(steps=400, tolerance=0.0))
    assert not full.stopped_early
    assert min(fit.losses) - min(full.losses) < 1e-4


def log_likelihood(samples, loc, operator):
    x = (samples - loc).T
    return (
        (-0.5 * (operator.inverse().quadratic(x) + operator.logdet() + len(loc) * math.log(2 * math.pi))).mean().item()
    )


def test_digits_beat_the_diagonal_on_held_out_samples(digits):
    """Mean log-likelihood of held-out digits: diagonal -151.7, depth 1 -140.5, depth 4 -134.0, full matrix -132.2."""
    train, held_out = digits[:1000], digits[1000:]
    likelihoods = []
    for depth in (1, 4):
        fit = fit_covariance(train, FitOptions(depth=depth), shrinkage="oas")
        likelihoods.append(log_likelihood(held_out, fit.loc, fit.operator))
    dense = torch.from_numpy(OAS().fit(train.numpy()).covariance_)
    diagonal = log_likelihood(held_out, fit.loc, RotatedDiagonal(AngleBasis((64,), ()), dense.diagonal()))
    full = torch.distributions.MultivariateNormal(fit.loc, dense).log_prob(held_out).mean().item()
    assert diagonal + 9 < likelihoods[0] < likelihoods[1] < full
    assert likelihoods[1] > full - 4


def test_covariances_are_those_of_scikit_learn(digits, covariance):
    fit, dense = covariance
    Q = dense_rotation(fit.angles, 64)
    torch.testing.assert_close(fit.operator.eigenvalues(), (Q.T @ dense @ Q).diagonal(), rtol=1e-9, atol=1e-9)
    assert fit.count == 1797
    assert fit.shrinkage == 0.01
    torch.testing.assert_close(fit.loc, digits.mean(0))
    few = digits[:40]
    for centred in (False, True):
        theirs = OAS(assume_centered=centred).fit(few.numpy())
        ours = fit_covariance(few, FitOptions(steps=0), shrinkage="oas", assume_centered=centred)
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
    samples = torch.randn(300, 10, generator=torch.Generator().manual_seed(0), dtype=dtype) + 100
    options = FitOptions(steps=10)
    whole = fit_covariance(samples, options)
    batches = fit_covariance((batch for batch in samples.split([100, 1, 0, 199])), options)
    assert batches.count == 300
    assert batches.operator.dtype == batches.loc.dtype == dtype
    torch.testing.assert_close(batches.loc, whole.loc)
    torch.testing.assert_close(batches.operator.to_dense(), whole.operator.to_dense(), rtol=1e-4, atol=1e-5)
    assert whole.operator.trace().item() == pytest.approx(samples.double().var(0, correction=0).sum().item(), rel=1e-4)


@pytest.mark.parametrize("n", [16, 64])
def test_the_inverse_of_a_planted_hessian(n):
    hessian = planted(n, spectrum=stiff(n))
    s = torch.randn(n + 5, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = s @ hessian
    fit = fit_inverse([(s, y)])
    assert relative(fit.operator.to_dense(), torch.linalg.inv(hessian)) < 1e-8
    one_by_one = fit_inverse(zip(s, y, strict=True))
    torch.testing.assert_close(one_by_one.operator.to_dense(), fit.operator.to_dense())


def test_the_inverse_under_noise_conditions_the_hessian():
    """16 coordinates of condition 1e3, 1 % noise: 684 by the diagonal of H, 2.0 here."""
    hessian = planted(16, spectrum=stiff(16))
    generator = torch.Generator().manual_seed(2)
    s = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    y = s @ hessian
    y += 0.01 * y.std() * torch.randn(y.shape, generator=generator, dtype=torch.float64)
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
        (
            torch.eye(4),
            {"options": FitOptions(start=torch.zeros(1, 1, 1))},
            r"start must have shape \(1, 2, 2\), got \(1, 1, 1\)",
        ),
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
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"restarts": 0}, "restarts must be >= 1, got 0"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0, got nan"),
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number > 0, got nan"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FitOptions(**options)

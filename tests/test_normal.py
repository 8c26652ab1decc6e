"""butterfly_opt.normal. Oracle: torch.distributions.MultivariateNormal with the dense covariance, float64."""

import pickle

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from butterfly_opt import normal
from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.operators import DirectSum, RotatedDiagonal
from butterfly_opt.orthogonal import group_matrices, num_skew
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation

EXACT = {"rtol": 1e-10, "atol": 1e-10}
"""float64: a few thousand roundings of the Cholesky factor of a covariance of condition 40."""
SIZES = [(1, (64, 16)), (2, (2, 2)), (7, (4, 2)), (16, (64, 16)), (300, (64, 16))]


def operator(n, *, plan=(4, 2), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(num_skew(n, block=plan[0], lead=plan[1]), generator=generator, dtype=dtype)
    return rotated(skew, 0.1 + 4 * torch.rand(n, generator=generator, dtype=dtype), plan)


def rotated(skew, d, plan=(4, 2)):
    made = make_plan(len(d), *plan)
    return RotatedDiagonal.from_rotation(Rotation(made, group_matrices(made, skew)), d)


def pair(n, *, plan=(4, 2), seed=0, batch=()):
    """The same Gaussian, ours and torch's."""
    covariance = operator(n, plan=plan, seed=seed)
    loc = torch.randn(*batch, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return ButterflyNormal(loc, covariance), MultivariateNormal(loc, covariance.to_dense())


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("n", "plan"), SIZES)
def test_all_are_those_of_the_dense_gaussian(n, plan, batch):
    ours, dense = pair(n, plan=plan, batch=batch)
    assert ours.batch_shape == dense.batch_shape
    assert ours.event_shape == dense.event_shape
    assert ours.has_rsample
    for name in ("mean", "mode", "variance", "stddev"):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name), **EXACT)
    torch.testing.assert_close(ours.entropy(), dense.entropy(), **EXACT)
    torch.testing.assert_close(ours.perplexity(), dense.perplexity(), rtol=1e-8, atol=0)
    for shape in ((), (5,), (4, 1, 1)):
        value = dense.sample(shape)
        torch.testing.assert_close(ours.log_prob(value), dense.log_prob(value), **EXACT)
    assert ours.rsample((5, 2)).shape == ours.sample((5, 2)).shape == (5, 2, *batch, n)
    one = torch.zeros(n, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(one), dense.log_prob(one), **EXACT)


@pytest.mark.parametrize(("n", "plan"), SIZES)
def test_the_divergence_is_that_of_the_dense_gaussians(n, plan, monkeypatch):
    for batches in (((), ()), ((3,), ()), ((2, 1), (3,))):
        (p, dense_p), (q, dense_q) = pair(n, plan=plan, batch=batches[0]), pair(n, seed=7, batch=batches[1])
        expected = kl_divergence(dense_p, dense_q)
        torch.testing.assert_close(kl_divergence(p, q), expected, **EXACT)
        assert kl_divergence(p, q).shape == torch.broadcast_shapes(*batches)
    monkeypatch.setattr(normal, "MAX_TRACE_NUMBERS", 3 * n)
    torch.testing.assert_close(kl_divergence(p, q), expected, **EXACT)
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros_like(p.loc[..., 0]), **EXACT)


def test_samples_have_the_mean_and_the_covariance():
    """200,000 samples: the covariance of a sample covariance is sum of products of S over their number."""
    covariance = operator(6)
    loc = torch.arange(6, dtype=torch.float64)
    torch.manual_seed(0)
    samples = ButterflyNormal(loc, covariance).sample((200_000,))
    dense = covariance.to_dense()
    spread = (dense.diagonal().outer(dense.diagonal()) + dense.square()).div(len(samples)).sqrt()
    assert ((samples.T.cov() - dense).abs() < 5 * spread).all()
    assert ((samples.mean(0) - loc).abs() < 5 * (dense.diagonal() / len(samples)).sqrt()).all()


@pytest.mark.parametrize("quantity", ["log_prob", "entropy", "kl", "rsample"])
def test_gradients_reach_everything(quantity):
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(num_skew(6, block=4, lead=2), generator=generator, dtype=torch.float64, requires_grad=True)
    d = (0.5 + torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_()
    loc = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    value = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    other = pair(6, seed=5)[0]

    def compute(skew, d, loc, value):
        p = ButterflyNormal(loc, rotated(skew, d))
        if quantity == "rsample":
            torch.manual_seed(1)
            return p.rsample((2,))
        if quantity == "kl":
            return kl_divergence(p, other), kl_divergence(other, p)
        return p.log_prob(value) if quantity == "log_prob" else p.entropy()

    assert torch.autograd.gradcheck(compute, (skew, d, loc, value))


def test_expand_shares_the_operator():
    ours, dense = pair(7, batch=(3,))
    ours, dense = ours.expand((2, 3)), dense.expand((2, 3))
    assert (ours.batch_shape, ours.event_shape) == ((2, 3), (7,))
    value = dense.sample((4,))
    torch.testing.assert_close(ours.log_prob(value), dense.log_prob(value), **EXACT)
    torch.testing.assert_close(ours.variance, dense.variance, **EXACT)
    torch.testing.assert_close(ours.entropy(), dense.entropy(), **EXACT)
    assert ours.rsample((4,)).shape == value.shape
    assert (
        ButterflyNormal(torch.zeros(7).double(), operator(7), validate_args=False).expand((2,))._validate_args is False
    )


@pytest.mark.parametrize(
    ("batch", "own"), [((), (3,)), ((2, 3), (3,)), ((3,), (2, 1)), ((2, 3), (2, 3)), ((4, 1), (3,))]
)
def test_a_batch_of_covariances(batch, own):
    """Each with a rotation of its own, and all with one."""
    count, plan = torch.Size(own).numel(), make_plan(7, 4, 2)
    generator = torch.Generator().manual_seed(0)
    skews = [torch.randn(num_skew(7, block=4, lead=2), generator=generator).double() for _ in range(count)]
    matrices = torch.cat([group_matrices(plan, skew) for skew in skews])
    d = 0.1 + 4 * torch.rand(*own, 7, generator=generator, dtype=torch.float64)
    loc = torch.randn(*batch, 7, generator=generator, dtype=torch.float64)
    for rotation in (Rotation(plan, matrices), Rotation(plan, matrices[:1])):
        covariance = RotatedDiagonal.from_rotation(rotation, d)
        ours, dense = ButterflyNormal(loc, covariance), MultivariateNormal(loc, covariance.to_dense())
        assert ours.batch_shape == dense.batch_shape
        value = dense.sample((5,))
        torch.testing.assert_close(ours.log_prob(value), dense.log_prob(value), **EXACT)
        torch.testing.assert_close(ours.entropy(), dense.entropy(), **EXACT)
        torch.testing.assert_close(ours.variance, dense.variance, **EXACT)
        q, dense_q = pair(7, seed=7)
        torch.testing.assert_close(kl_divergence(ours, q), kl_divergence(dense, dense_q), **EXACT)
        torch.testing.assert_close(kl_divergence(q, ours), kl_divergence(dense_q, dense), **EXACT)
        # All draws of a batch are independent, where the operators are shared too.
        samples = ours.expand((2, *ours.batch_shape)).sample((20_000,)) - ours.loc
        assert samples.shape == (20_000, 2, *ours.batch_shape, 7)
        both = torch.einsum("s...i,s...j->...ij", samples, samples).div(len(samples)) - dense.covariance_matrix
        assert both.abs().max() < 0.25
        assert (samples[:, 0] * samples[:, 1]).mean(0).abs().max() < 0.2


def test_direct_sums_are_independent_blocks():
    parts = operator(3), operator(5, seed=1)
    loc = torch.arange(8, dtype=torch.float64)
    ours = ButterflyNormal(loc, DirectSum([((), part) for part in parts]))
    value = torch.randn(4, 8, dtype=torch.float64)
    pieces = [
        MultivariateNormal(loc[part], block.to_dense()).log_prob(value[:, part])
        for part, block in zip((slice(0, 3), slice(3, 8)), parts, strict=True)
    ]
    torch.testing.assert_close(ours.log_prob(value), sum(pieces), **EXACT)


def test_float32_stays_float32_and_it_pickles():
    ours = ButterflyNormal(torch.zeros(16), operator(16, dtype=torch.float32))
    value = pickle.loads(pickle.dumps(ours)).sample((3,))
    for result in (value, ours.log_prob(value), ours.entropy(), ours.variance, kl_divergence(ours, ours)):
        assert result.dtype == torch.float32
    expected = MultivariateNormal(torch.zeros(16), operator(16, dtype=torch.float32).to_dense()).log_prob(value)
    torch.testing.assert_close(ours.log_prob(value), expected, rtol=1e-4, atol=1e-4)


def negative(n):
    return operator(n).map_eigenvalues(lambda d: d - 3)


@pytest.mark.parametrize(
    ("loc", "covariance", "error", "message"),
    [
        (torch.zeros(()), operator(3), ValueError, r"loc must have shape \(..., 3\), got \(\)"),
        (torch.zeros(2, 4), operator(3), ValueError, r"loc must have shape \(..., 3\), got \(2, 4\)"),
        (torch.zeros(3), operator(3), TypeError, "dtype of the operator, torch.float64, got torch.float32"),
        (torch.full((3,), float("nan")).double(), operator(3), ValueError, "Expected parameter loc"),
        (torch.zeros(3).double(), negative(3), ValueError, "Expected parameter eigenvalues"),
    ],
)
def test_arguments_that_are_refused(loc, covariance, error, message):
    with pytest.raises(error, match=message):
        ButterflyNormal(loc, covariance, validate_args=True)


def test_values_that_are_refused():
    # Asked for: torch's own test utilities, imported by other tests, turn the default off.
    ours = ButterflyNormal(pair(3)[0].loc, pair(3)[0].operator, validate_args=True)
    with pytest.raises(ValueError, match="Expected value argument"):
        ours.log_prob(torch.full((3,), float("nan")).double())
    with pytest.raises(ValueError, match="right-most size of value"):
        ours.log_prob(torch.zeros(4).double())
    with pytest.raises(ValueError, match="two distributions of one dimension, got 3 and 4"):
        kl_divergence(ours, pair(4)[0])

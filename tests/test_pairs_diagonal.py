"""The pairs of ``step``, and ``diagonal``. Oracles: averages of full histories, the regression in ``reference``."""

from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from butterfly_opt import Butterfly
from butterfly_opt.diagonal import MIN_STEPS, regress

# Recursions and histories sum some 60 terms of order one in float64.
PAIR_TOLERANCE = 1e-12
# Against the naive regression, relative: cancellation in A - C^2/B costs digits in float32; the code guards its
# division by B / tau2 with 1e-12, which shows in float64 where a coordinate moved 1e-3 of the mean.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
REGRESS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}

STEPS, N = 60, 6
BETAS = {
    "constant": [0.9] * STEPS,
    "none": [0.0] * STEPS,
    "long": [0.99] * STEPS,
    "warming up": [0.5 + 0.49 * t / STEPS for t in range(STEPS)],
    "cooling down": [0.99 - 0.9 * t / STEPS for t in range(STEPS)],
    "cycling": [0.85 if t % 7 < 4 else 0.95 for t in range(STEPS)],
}


def weight_of(beta: float, t: int) -> float:
    """The weight of step t (from 1): bias-corrected for a constant beta, the first one always 1."""
    return (1 - beta) / (1 - beta**t)


def symmetric(n: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return matrix + matrix.T


def walk(betas: list[float], *, tensors: bool = False, capturable: bool = False) -> list[dict[str, np.ndarray]]:
    """Walks a quadratic in steps that others write, through the optimizer: its averages, and what they are of."""
    rng = np.random.default_rng(3)
    hessian, offset = symmetric(N, 4), rng.standard_normal(N)
    param = torch.from_numpy(rng.standard_normal(N)).requires_grad_()
    opt = Butterfly([param], lr=0.0, diagonal="secant", capturable=capturable)
    rows = []
    for beta in betas:
        theta = param.detach().numpy().copy()
        opt.param_groups[0]["betas"] = (torch.tensor(beta, dtype=torch.float64) if tensors else beta, 0.99)
        param.grad = torch.from_numpy(hessian @ theta + offset)
        opt.step()
        state = opt.state[param]
        rows.append({"theta": theta, "grad": param.grad.numpy().copy(), "hessian": hessian})
        rows[-1] |= {name: state[name].numpy().copy() for name in ("exp_avg", "param_avg", "disp_sq", "cross")}
        with torch.no_grad():
            param.add_(torch.from_numpy(rng.standard_normal(N) * rng.choice([1e-2, 1.0])))
    return rows


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS.keys())
def test_pair_identity_on_a_quadratic(betas: list[float], tensors: bool, capturable: bool) -> None:
    """y_t = H s_t from the second step on, whatever was written and whatever beta does."""
    rows = walk(betas, tensors=tensors, capturable=capturable)
    for before, row in pairwise(rows):
        y, s = row["grad"] - before["exp_avg"], row["theta"] - before["param_avg"]
        np.testing.assert_allclose(y, row["hessian"] @ s, rtol=0, atol=PAIR_TOLERANCE * (1 + abs(y).max()))
        assert abs(s).max() > 1e-3


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS.keys())
def test_averages_equal_those_of_histories(betas: list[float]) -> None:
    """Gradients and parameters with the same weights; squares and products of the pairs, which start at step 2."""
    rows = walk(betas)
    weights = [weight_of(beta, t) for t, beta in enumerate(betas, 1)]
    assert weights[0] == 1.0
    for t in range(1, STEPS + 1):
        averages = [reference.weighted_average([r[k] for r in rows[:t]], weights[:t]) for k in ("grad", "theta")]
        scale = 1 + max(abs(row["grad"]).max() for row in rows[:t])
        for name, average in zip(("exp_avg", "param_avg"), averages, strict=True):
            np.testing.assert_allclose(rows[t - 1][name], average, rtol=0, atol=PAIR_TOLERANCE * scale)
    s = [row["theta"] - before["param_avg"] for before, row in pairwise(rows)]
    y = [row["grad"] - before["exp_avg"] for before, row in pairwise(rows)]
    for name, products in (("disp_sq", [a * a for a in s]), ("cross", [a * b for a, b in zip(s, y, strict=True)])):
        expected = reference.exponential_average(products, 0.99)
        np.testing.assert_allclose(rows[-1][name], expected, rtol=0, atol=PAIR_TOLERANCE * 1e3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_constant_beta_is_the_bias_corrected_average(beta: float) -> None:
    """gbar is Adam's m_t / (1 - beta^t): a weighted mean of the whole history, with weights beta^(t-j)."""
    rows = walk([beta] * STEPS)
    for t in (1, 2, 5, STEPS):
        expected = reference.exponential_average([row["grad"] for row in rows[:t]], beta)
        np.testing.assert_allclose(rows[t - 1]["exp_avg"], expected, rtol=0, atol=PAIR_TOLERANCE * 100)


def test_the_first_weight_is_at_most_1_for_every_beta() -> None:
    """Rounded up, it would make averages of squares negative: so it would for every sixth beta on this grid."""
    for thousandths in range(1000):
        param = torch.ones(2, requires_grad=True)
        opt = Butterfly([param], betas=(thousandths / 1000, thousandths / 1000), capturable=True)
        param.grad = torch.tensor([1.0, -2.0])
        opt.step()
        assert opt.state[param]["exp_avg"].tolist() == [1.0, -2.0]
        assert opt.state[param]["exp_avg_sq"].tolist() == [1.0, 4.0]


def rows_of(*values: Tensor) -> list[Tensor]:
    """Each as a stack of one tensor, ``(1, 1, n)``."""
    return [value.reshape(1, 1, -1) for value in values]


LATE = torch.full((1, 1, 1), 1000.0)


def moments(shape: tuple[int, ...], *, noise: float, seed: int, pairs: int = 40) -> tuple[np.ndarray, ...]:
    """A, B, C of ``pairs`` random pairs with curvatures of both signs; and the curvatures."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)
    w = rng.standard_normal((pairs, *shape)) * 10.0 ** rng.uniform(-2, 0, shape)
    u = h * w + noise * rng.standard_normal((pairs, *shape))
    return (u**2).mean(0), (w**2).mean(0), (u * w).mean(0), h


@pytest.mark.parametrize("dtype", REGRESS_TOLERANCE)
@pytest.mark.parametrize("noise", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3)])
def test_regress_equals_the_naive_formula(shape: tuple[int, ...], noise: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        A, B, C, _ = moments(shape, noise=noise, seed=seed)
        h, nu2, tau2 = reference.secant_regression(A, B, C, 0.99, rounding=ROUNDING[dtype])
        found = regress(*rows_of(*(torch.from_numpy(x).to(dtype) for x in (A, B, C))), beta2=0.99, step=LATE)
        tolerance = REGRESS_TOLERANCE[dtype]
        assert found.tau.item() == pytest.approx(tau2**0.5, rel=tolerance)
        scale = np.sqrt(A)
        slope, variance, total = (x.numpy().reshape(shape) for x in (found.slope, found.noise, found.energy))
        np.testing.assert_allclose(slope / scale, h * tau2**0.5 / scale, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(variance / A, nu2 / A, rtol=tolerance, atol=tolerance)
        energy = nu2 + h**2 * tau2
        np.testing.assert_allclose(total / A, energy / A, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale_grad", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale_disp", [1e-6, 1.0, 1e6])
def test_noise_free_pairs_give_the_curvature(scale_grad: float, scale_disp: float) -> None:
    """Up to the fixed part 1e-6 tau2 of the ridge, which weighs by tau2 / B: the displacements are of one size."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal(50) * 10.0 ** rng.uniform(-1, 1, 50) * scale_grad / scale_disp
    w = rng.standard_normal((30, 50)) * scale_disp
    u = h * w
    A, B, C = (torch.from_numpy(x) for x in ((u**2).mean(0), (w**2).mean(0), (u * w).mean(0)))
    found = regress(*rows_of(A, B, C), beta2=0.99, step=LATE)
    top = abs(h).max()
    np.testing.assert_allclose((found.slope / found.tau).flatten().numpy(), h, rtol=1e-5, atol=5e-6 * top)
    np.testing.assert_allclose(
        found.energy.sqrt().flatten().numpy() / found.tau.item(), abs(h), rtol=1e-2, atol=1e-3 * top
    )


def test_zero_displacement_gives_the_gradient_energy() -> None:
    A = torch.tensor([0.0, 1e-30, 1.0, 4.0])
    found = regress(*rows_of(A, torch.zeros(4), torch.zeros(4)), beta2=0.99, step=LATE)
    assert torch.equal(found.energy.flatten(), A)
    assert found.tau == 0


def test_the_first_steps_give_the_gradient_energy() -> None:
    A, B, C, _ = (torch.from_numpy(x) for x in moments((9,), noise=0.1, seed=1))
    for step in range(1, MIN_STEPS + 2):
        found = regress(*rows_of(A, B, C), beta2=0.99, step=torch.full((1, 1, 1), float(step)))
        assert bool(found.tau > 0) == (step > MIN_STEPS)
        assert torch.equal(found.energy.flatten(), A) == (step <= MIN_STEPS)


@pytest.mark.parametrize("grad_scale", [1e18, 1e-15, 1e-18, 1e-30])
@pytest.mark.parametrize("disp_scale", [1e-12, 1e-3, 1.0, 1e6])
def test_extreme_gradients_stay_finite(grad_scale: float, disp_scale: float) -> None:
    """float32, gradients up to MAX_ROTATED_GRAD of the optimizer; squares below 1e-38 round to zero."""
    rng = np.random.default_rng(2)
    u = torch.from_numpy(rng.standard_normal((20, 64)).clip(-1, 1) * grad_scale).float()
    w = torch.from_numpy(rng.standard_normal((20, 64)) * disp_scale).float()
    found = regress(*rows_of(u.square().mean(0), w.square().mean(0), (u * w).mean(0)), beta2=0.99, step=LATE)
    for value in (*found, found.energy):
        assert torch.isfinite(value).all()
    assert (found.energy >= 0).all()


@settings(deadline=None, max_examples=200)
@given(
    n=st.integers(1, 8),
    seed=st.integers(0, 2**31 - 1),
    noise=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e3]),
    grad_exponent=st.integers(-12, 12),
    disp_exponent=st.integers(-8, 3),
    beta2=st.sampled_from([0.0, 0.9, 0.999]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_energy_is_never_negative(
    n: int, seed: int, noise: float, grad_exponent: int, disp_exponent: int, beta2: float, dtype: torch.dtype
) -> None:
    """Moments of any real pairs, curvatures of both signs: V >= 0, noise >= 0, all finite; D positive where V is."""
    A, B, C, _ = moments((n,), noise=noise, seed=seed, pairs=1 + seed % 5)
    scale_grad, scale_disp = 10.0**grad_exponent, 10.0**disp_exponent
    A, B, C = A * scale_grad**2, B * scale_disp**2, C * scale_grad * scale_disp
    found = regress(*rows_of(*(torch.from_numpy(x).to(dtype) for x in (A, B, C))), beta2=beta2, step=LATE)
    assert (found.energy >= 0).all()
    assert (found.noise >= 0).all()
    assert all(torch.isfinite(x).all() for x in (*found, found.energy))


@settings(deadline=None, max_examples=100)
@given(
    moments=st.lists(
        st.tuples(*[st.floats(0, 2.0**100, width=32)] * 2, st.floats(-1, 1, width=32)), min_size=1, max_size=6
    )
)
def test_energy_is_never_negative_for_arbitrary_moments(moments: list[tuple[float, float, float]]) -> None:
    """Any A, B >= 0 with |C| <= sqrt(A B), zeros and extremes in one tensor."""
    A = torch.tensor([m[0] for m in moments])
    B = torch.tensor([m[1] for m in moments])
    C = torch.tensor([m[2] for m in moments]) * A.sqrt() * B.sqrt()
    found = regress(*rows_of(A, B, C), beta2=0.99, step=LATE)
    assert (found.noise >= 0).all()
    assert (found.energy >= 0).all()


def test_a_resting_coordinate_takes_the_mean_curvature() -> None:
    """Where nothing moved the slope is the tensor's mean curvature, not 0 / 0 and not 0."""
    w = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    A, B = torch.tensor([4.0, 4.0, 1e-8], dtype=torch.float64), w.square()
    found = regress(*rows_of(A, B, torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)), beta2=0.99, step=LATE)
    assert (found.slope / found.tau).flatten().tolist() == pytest.approx([2.0, 2.0, 2.0], rel=1e-3)

"""experiments.uses and its parts. Oracles: dense inverses, retraining, scipy's cg on dense matrices.

Bounds are what the examples claim, with room below what was measured (beside them).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from butterfly_opt import RotatedDiagonal, Rotation
from butterfly_opt.operators import SymmetricOperator
from butterfly_opt.rotation import orthogonalize
from experiments import uses, uses_influence, uses_laplace, uses_large, uses_model, uses_preconditioner
from experiments.paper_models import Objective
from experiments.uses_influence import InfluenceRow, influence
from experiments.uses_laplace import LaplaceRow, laplace
from experiments.uses_model import Trained, trained
from experiments.uses_preconditioner import PreconditionerRow, fitted_systems, held_out_systems, iterations

PLAN = {"block": 64, "lead": 16}
FIT, FEW, PROBED, OPTIMIZER = "fit_inverse, wide", "probe_inverse, 30", "probe_inverse, 300", "Butterfly optimizer"
SOURCES = {"diagonal", OPTIMIZER, FEW, PROBED, "fit_inverse, radix 2", FIT}


def rotated(values: torch.Tensor) -> RotatedDiagonal:
    """An operator of these eigenvalues in a random basis of two stages."""
    rotation = Rotation.identity(len(values), block=4, lead=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for view in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
        view.copy_(orthogonalize(torch.randn(view.shape, generator=generator, dtype=torch.float64)))
    return RotatedDiagonal.from_rotation(rotation, values)


@pytest.fixture(scope="module")
def model() -> Trained:
    return trained(0.01)


@pytest.fixture(scope="module")
def estimates(model: Trained) -> dict[str, SymmetricOperator]:
    return uses_model.all_estimates(model, **PLAN, seed=0)


def test_training_ends_at_the_minimum(model: Trained) -> None:
    """scipy's own L-BFGS finds the same."""

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(theta)
        return model.train.loss(point).item(), model.train.gradient(point).numpy()

    found = minimize(value, np.zeros(model.train.n), jac=True, method="L-BFGS-B", options={"gtol": 1e-7, "ftol": 0.0})
    np.testing.assert_allclose(model.theta.numpy(), found.x, atol=1e-4)
    assert model.train.gradient(model.theta).abs().max() < 1e-8
    torch.testing.assert_close(torch.linalg.eigvalsh(model.hessian)[0].item(), 0.01, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_damped_is_the_inverse_of_the_shifted(damping: float) -> None:
    estimate = rotated(torch.linspace(0.5, 4, 8, dtype=torch.float64))
    expected = torch.linalg.inv(torch.linalg.inv(estimate.to_dense()) + damping * torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(uses_model.damped(estimate, damping).to_dense(), expected)


def test_every_source_estimates_the_inverse(model: Trained, estimates: dict[str, SymmetricOperator]) -> None:
    found = estimates
    assert set(found) == SOURCES
    torch.testing.assert_close(found["diagonal"].to_dense(), torch.diag(1 / model.hessian.diagonal()))
    inverse = torch.linalg.inv(model.hessian)
    errors = {name: (torch.linalg.norm(P.to_dense() - inverse) / inverse.norm()).item() for name, P in found.items()}
    assert errors[FIT] < 0.2 < errors["fit_inverse, radix 2"] + 0.1 < errors["diagonal"]  # 0.09, 0.20, 0.40
    # In the units of an inverse Hessian: right to a factor on average.
    for P in found.values():
        assert 0.1 < (P.trace() / inverse.trace()).item() < 2


def test_influence_ranks_training_samples(model: Trained, estimates: dict[str, SymmetricOperator]) -> None:
    rows = influence(model, estimates, dampings=(0.0, 0.1))
    assert all(isinstance(row, InfluenceRow) for row in rows)
    influences = {(row.estimate, row.damping): row for row in rows}
    assert {name for name, _ in influences} == {"multiple of I", *SOURCES}
    for damping in (0.0, 0.1):
        ours, flat = influences[FIT, damping], influences["multiple of I", damping]
        assert ours.rank_correlation > 0.8  # 0.89, 0.99
        assert ours.worst > 0.7  # 0.81, 0.97
        assert ours.top > 0.85 > flat.top  # 95 %, 99 %; 40 %, 61 %
        assert ours.relative_error < 0.3 < 1 < flat.relative_error  # 0.15, 0.02; 14.5, 5.4
    # Without damping the inverse matters: gradients alone rank badly.
    assert influences["multiple of I", 0.0].rank_correlation < 0.4
    # What newton steps leave behind does not: pairs of one path, 0.27.
    for few_pairs in (PROBED, FEW):  # 0.82, 0.56; 0.25
        assert influences[few_pairs, 0.0].rank_correlation > influences["diagonal", 0.0].rank_correlation + 0.05
    assert influences[PROBED, 0.1].rank_correlation > 0.9 > influences["diagonal", 0.1].rank_correlation  # 0.95, 0.85
    assert influences["multiple of I", 0.1].rank_correlation > 0.8


def test_comparison_of_influences() -> None:
    exact = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = uses_influence.compare("same", 0.0, 2 * exact, exact)
    assert (same.rank_correlation, same.worst, same.top) == pytest.approx((1.0, 1.0, 1.0))
    assert same.relative_error == pytest.approx(1.0)
    opposite = uses_influence.compare("opposite", 0.0, -exact, exact)
    assert (opposite.rank_correlation, opposite.top, opposite.relative_error) == pytest.approx((-1.0, 1.0, 2.0))


def test_exact_influence_predicts_retraining(model: Trained) -> None:
    """A training sample weighted a little more, trained again: the test loss moves as predicted."""
    sample, weight = 7, 1e-3

    def losses(point: torch.Tensor, objective: Objective) -> torch.Tensor:
        logits = objective.logits(point, objective.inputs)
        return torch.nn.functional.cross_entropy(logits, objective.targets, reduction="none")

    gradients, test = model.train.sample_gradients(model.theta), model.test.sample_gradients(model.theta)
    predicted = -test @ torch.linalg.solve(model.hessian, gradients[sample]) * weight
    theta = model.theta.clone()
    for _ in range(10):  # Newton's method; the Hessian hardly changes
        point = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.train.loss(point) + weight * losses(point, model.train)[sample], point)
        theta = theta - torch.linalg.solve(model.hessian, gradient)
    assert gradient.norm() < 1e-10
    moved = losses(theta, model.test) - losses(model.theta, model.test)
    assert torch.corrcoef(torch.stack((moved, predicted)))[0, 1] > 0.99
    assert (moved.norm() / predicted.norm()).item() == pytest.approx(1.0, abs=0.1)


def test_laplace_variances_and_samples(model: Trained, estimates: dict[str, SymmetricOperator]) -> None:
    rows = {row.posterior: row for row in laplace(model, estimates, samples=50)}
    assert set(rows) == {"none", "exact", *SOURCES}
    assert all(isinstance(row, LaplaceRow) for row in rows.values())
    assert rows[FIT].rank_correlation > 0.95  # 0.996
    assert rows[FIT].ratio == pytest.approx(1, abs=0.1)  # 0.99
    assert rows[PROBED].rank_correlation > 0.95 > rows["diagonal"].rank_correlation  # 0.99, 0.81
    for row in rows.values():
        assert row.accuracy > 0.93
        assert abs(row.loss - rows["exact"].loss) < 0.05
    # The closed form of the variance is that of the samples.
    posterior = uses_model.diagonal(model.hessian).map_eigenvalues(lambda d: d / len(model.train.inputs))
    directions = uses_laplace.jacobian(model)
    samples = uses_laplace.draw(posterior, model, 4000, 0)
    spread = ((samples - model.theta) @ directions).var(0)
    torch.testing.assert_close(spread, posterior.quadratic(directions), rtol=0.15, atol=0.0)
    # Linear logits: exactly the directions times the parameters.
    torch.testing.assert_close(model.test.logits(samples[0], model.test.inputs).flatten(), samples[0] @ directions)


def test_preconditioning_where_it_must_help_and_where_it_cannot() -> None:
    rows = fitted_systems(n=128, **PLAN, seed=0)
    assert all(isinstance(row, PreconditionerRow) for row in rows)
    count = {(row.system, row.preconditioner): row.iterations for row in rows}
    for planted, found, other in (("planted", "radix 2", "wide"), ("wide", "wide", "radix 2")):
        assert count[f"{planted}, n 128", f"butterfly, {found}"] <= 4  # nearly the identity is left
        assert count[f"{planted}, n 128", f"butterfly, {other}"] > 10
        assert count[f"{planted}, n 128", "none"] > 40
    ridge = [count["ridge on digits, n 64", name] for name in ("none", "diagonal", "butterfly, radix 2")]
    assert ridge[2] < 0.8 * ridge[1] < 0.5 * ridge[0]  # 43, 58, 132
    haar = [count["haar, n 128", name] for name in ("none", "diagonal", "butterfly, radix 2")]
    assert haar[2] > 0.5 * haar[0]


def test_preconditioning_of_held_out_newton_steps(model: Trained, estimates: dict[str, SymmetricOperator]) -> None:
    rows = held_out_systems(model, estimates, dampings=(0.01,))
    held_out = {row.preconditioner: row.iterations for row in rows}
    assert set(held_out) == {"none", *SOURCES}
    for few in (FIT, PROBED, FEW):
        assert held_out[few] < 0.8 * min(held_out["none"], held_out["diagonal"])  # 12, 12, 15; 26, 32


def test_a_network_without_a_dense_inverse(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row.damping, row.preconditioner): row for row in uses_large.large(**PLAN, seed=0, hidden=(8,), limit=200)}
    assert "curvlinops" in capsys.readouterr().out or (0.1, "EKFAC") in rows
    for damping in uses_large.DAMPINGS:
        none, probed = rows[damping, "none"], rows[damping, "probe_inverse, 100"]
        assert probed.iterations < none.iterations
        assert probed.cosine > none.cosine
        assert probed.error < none.error


def test_iterations_are_those_of_cg() -> None:
    """As many as distinct eigenvalues; one with the inverse itself; an error where it cannot converge."""
    values = torch.tensor([1.0] * 5 + [10.0] * 6 + [100.0] * 5, dtype=torch.float64)
    operator = rotated(values)
    right = torch.ones(16, dtype=torch.float64)
    assert iterations(operator.to_scipy(), right, None) == 3
    assert iterations(operator.to_scipy(), right, operator.inverse()) == 1
    broken = operator.map_eigenvalues(lambda d: d * float("nan"))
    with pytest.raises(RuntimeError, match="cg did not converge in 5000 iterations"):
        iterations(broken.to_scipy(), right, None)


def test_held_out_system_is_the_damped_test_hessian(model: Trained) -> None:
    system = uses_preconditioner.held_out_system(model, 0.5)
    x = np.random.default_rng(0).standard_normal(model.train.n)
    expected = model.test.hessian(model.theta).numpy() @ x + 0.5 * x
    np.testing.assert_allclose(system.matvec(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use", uses.L2)
def test_the_command_passes_its_options(
    use: str, model: Trained, estimates: dict[str, SymmetricOperator], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, int]] = []
    monkeypatch.setattr(uses, "trained", lambda l2: model)
    monkeypatch.setattr(uses, "all_estimates", lambda model, **options: seen.append(options) or estimates)
    made: list[str] = []
    for name in ("influence", "laplace", "fitted_systems", "held_out_systems"):
        monkeypatch.setattr(uses, name, lambda *arguments, name=name, **options: made.append(name))
    uses.main([use, "--block", "8", "--lead", "2", "--seed", "3"])
    assert seen == [{"seed": 3, "block": 8, "lead": 2}]
    assert made == ([use] if use != "preconditioner" else ["fitted_systems", "held_out_systems"])

"""``probe_inverse`` and ``hessian_product``. Oracles: dense inverses, condition numbers, torch.func.hessian."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from butterfly_opt import ProbedFit, hessian_product, probe_inverse


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hessian(values: Tensor, seed: int = 0) -> Tensor:
    """Random eigenvectors."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(seed), dtype=torch.float64)).Q
    return basis * values @ basis.T


def spikes(n: int) -> Tensor:
    """Twelve of 10 to 1000 over a flat tail."""
    return torch.cat([torch.ones(n - 12), torch.logspace(1, 3, 12)]).double()


def probe(matrix: Tensor, probes: int, **options: Any) -> ProbedFit:
    options = {"generator": seeded(1), "dtype": matrix.dtype} | options
    return probe_inverse(lambda v: matrix @ v, len(matrix), probes=probes, **options)


def condition(fit: ProbedFit, matrix: Tensor) -> float:
    return reference.condition(fit.operator.to_dense().numpy(), matrix.numpy())


@pytest.mark.parametrize("n", [1, 2, 31, 64])
def test_as_many_probes_as_coordinates_of_a_block_are_exact(n: int) -> None:
    values = torch.linspace(1, 9, n, dtype=torch.float64) * (-1.0) ** torch.arange(n)
    matrix = hessian(values)
    fit = probe(matrix, n + 5)
    magnitude = hessian(values.abs())
    # Ties are broken by a slope of 1e-9 (``rotation._eigenvectors``).
    torch.testing.assert_close(fit.operator.to_dense(), torch.linalg.inv(magnitude), rtol=1e-6, atol=1e-6)
    assert fit.error < 1e-6
    assert fit.negative == n // 2


def test_spikes_over_a_flat_tail_take_few_probes() -> None:
    """Condition 1000; 20 / 50 / 100 / 200 probes leave 17 / 5 / 2.4 / 1.5. Jacobi scaling: 2,800."""
    matrix = hessian(spikes(256))
    left = {k: condition(probe(matrix, k), matrix) for k in (20, 50, 100, 200)}
    print(left)
    assert left[20] < 60  # without a prior: 4e7
    assert left[50] < 12
    assert left[100] < 5
    assert left[200] < 2.5


@pytest.mark.parametrize(("n", "probes"), [(256, 200), (1000, 1000)])
def test_random_eigenvectors_of_many_blocks(n: int, probes: int) -> None:
    """Eigenvalues from 1 to 1000, n = 256 / 1000: 513 / 842, Jacobi scaling 1,003 / 998.

    L-BFGS of as many numbers (two vectors a pair, against the matrices of the basis) on the same pairs: 832 / 920.
    """
    matrix = hessian(torch.logspace(0, 3, n, dtype=torch.float64))
    fit = probe(matrix, probes)
    jacobi = reference.condition(np.diag(1 / matrix.diagonal().numpy()), matrix.numpy())
    s = torch.linalg.qr(torch.randn(n, probes, generator=seeded(1), dtype=torch.float64)).Q.T
    rotation = fit.operator.basis.rotations[0][1]
    history = min(probes, rotation.plan.numel // (2 * n))
    pairs = [(a.numpy(), (matrix @ a).numpy()) for a in s[:history]]
    memory = reference.condition(reference.bfgs_inverse(pairs), matrix.numpy())
    print(f"n {n}, {probes} probes: ours {condition(fit, matrix):.4g}, Jacobi {jacobi:.4g}, L-BFGS {memory:.4g}")
    assert condition(fit, matrix) < 0.95 * min(jacobi, memory)


@pytest.mark.parametrize("plan", [(2, 2), (4, 4), (16, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_plan_and_dtype_gives_a_positive_definite_operator(plan: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = hessian(spikes(37)).to(dtype)
    fit = probe(matrix, 20, block=plan[0], lead=plan[1])
    assert fit.operator.dtype == dtype
    assert (fit.operator.eigenvalues() > 0).all()
    assert fit.error <= fit.errors[0]


def test_probes_come_from_their_generator() -> None:
    matrix = hessian(spikes(40))
    before = torch.get_rng_state()
    first, again, other = (probe(matrix, 20, generator=seeded(s)).operator.to_dense() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


class TestHessianProduct:
    def test_it_is_that_of_torch_func(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        model[0].bias.requires_grad_(False)
        x, target = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
        named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        sizes = [p.numel() for p in named.values()]

        def loss(theta: Tensor) -> Tensor:
            parts = [part.view_as(p) for part, p in zip(theta.split(sizes), named.values(), strict=True)]
            return cross_entropy(torch.func.functional_call(model, dict(zip(named, parts, strict=True)), (x,)), target)

        theta = torch.cat([p.flatten() for p in named.values()])
        expected = torch.func.hessian(loss)(theta)
        product = hessian_product(lambda: cross_entropy(model(x), target), model.parameters())
        torch.testing.assert_close(product(torch.eye(len(theta), dtype=torch.float64)), expected)
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            assert product(theta[:, None]).shape == (len(theta), 1)
        fit = probe_inverse(product, len(theta), dtype=torch.float64)
        assert fit.operator.shape == (len(theta), len(theta))

    def test_parameters_without_curvature(self) -> None:
        a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
        assert not hessian_product(lambda: a.sum(), [a, b])(torch.ones(5, 2)).any()
        product = hessian_product(lambda: a.square().sum(), [a, b])
        assert product(torch.ones(5, 1)).flatten().tolist() == [2.0, 2.0, 0.0, 0.0, 0.0]


def failing(result: float) -> Callable[[Tensor], Tensor]:
    return lambda v: torch.full_like(v, result)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda: probe_inverse(failing(1.0), 0), ValueError, "n must be >= 1, got 0"),
        (lambda: probe_inverse(failing(1.0), 3, probes=0), ValueError, "probes must be >= 1, got 0"),
        (lambda: probe_inverse(failing(1.0), 3, block=3, lead=2), ValueError, "Invalid lead value"),
        (lambda: probe_inverse(failing(torch.nan), 3), ValueError, "the products must be finite"),
        (lambda: probe_inverse(failing(0.0), 3), ValueError, "the matrix is zero"),
        (lambda: probe_inverse(lambda v: v[0], 3), ValueError, r"the function must return shape \(3, 3\), got \(3,\)"),
        (lambda: probe_inverse(failing(1.0), 3, dtype=torch.bfloat16), TypeError, "float32 or float64"),
        (lambda: hessian_product(lambda: torch.ones(()), [torch.ones(2)]), ValueError, "no parameter requires"),
        (lambda: hessian_product(lambda: torch.ones(2), [nn.Parameter(torch.ones(2))]), ValueError, "must be a scalar"),
    ],
)
def test_errors(function: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function()

"""butterfly_opt.sketch. Oracles: statistics of fair signs, and exponential averages from ``reference``.

Statistical bounds are 5 standard deviations of what fair, independent signs give; all seeds are fixed,
so a test that passes once passes always.
"""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from butterfly_opt.sketch import MAX_COLUMNS, random_signs, sketch_product, update_sketch_

CPU = torch.device("cpu")
SIGMAS = 5.0


def signs(rows: int, columns: int = 8, *, seed: int = 0, stream: int = 0, step: int | Tensor = 1) -> Tensor:
    return random_signs(rows, columns, seed=seed, stream=stream, step=step, device=CPU)


def assert_fair(values: Tensor) -> None:
    """The mean of +-1 values is within SIGMAS / sqrt(count) of 0."""
    assert values.mean().abs().item() < SIGMAS / values.numel() ** 0.5


@pytest.mark.parametrize("columns", [1, 8, MAX_COLUMNS])
@pytest.mark.parametrize("rows", [1, 1000])
def test_signs_are_plus_or_minus_one(rows: int, columns: int) -> None:
    matrix = signs(rows, columns)
    assert matrix.shape == (rows, columns)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix.abs(), torch.ones(rows, columns))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**40 + 7])
def test_signs_are_balanced_and_independent_within_a_matrix(seed: int) -> None:
    matrix = signs(20_000, MAX_COLUMNS, seed=seed)
    assert_fair(matrix)
    for column in matrix.unbind(1):
        assert_fair(column)
    gram = matrix.T @ matrix / len(matrix) - torch.eye(MAX_COLUMNS)
    assert gram.abs().max().item() < SIGMAS / len(matrix) ** 0.5
    for lag in (1, 2, 3, 8, 64, 1024):
        assert_fair(matrix[lag:] * matrix[:-lag])


@pytest.mark.parametrize("other", [{"step": 2}, {"step": 3}, {"step": 257}, {"stream": 1}, {"stream": 2}, {"seed": 1}])
def test_neighbouring_matrices_are_uncorrelated(other: dict[str, int]) -> None:
    first, second = signs(20_000), signs(20_000, **other)
    assert_fair(first * second)
    assert_fair(first[1:] * second[:-1])
    assert_fair(first[:-1] * second[1:])
    cross = first.T @ second / len(first)
    assert cross.abs().max().item() < SIGMAS / len(first) ** 0.5


def test_one_position_over_many_steps() -> None:
    """What enters a running sketch over time: each position is fair, consecutive ones independent."""
    history = torch.stack([signs(16, 4, step=step) for step in range(1, 4001)])
    assert history.mean(0).abs().max().item() < SIGMAS / len(history) ** 0.5
    for lag in (1, 2, 4):
        assert (history[lag:] * history[:-lag]).mean(0).abs().max().item() < SIGMAS / (len(history) - lag) ** 0.5


def test_signs_are_a_pure_function() -> None:
    expected = signs(50, seed=3, stream=4, step=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(signs(50, seed=3, stream=4, step=5), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(signs(20, seed=3, stream=4, step=5), expected[:20])
    assert torch.equal(signs(50, 3, seed=3, stream=4, step=5), expected[:, :3])


@pytest.mark.parametrize("step", [0, 1, 7, 1000, 2**24 + 1, 2**31 - 1])
def test_tensor_step_equals_number(step: int) -> None:
    assert torch.equal(signs(40, step=torch.tensor(step)), signs(40, step=step))


def test_too_many_columns() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_COLUMNS} columns, got columns = {MAX_COLUMNS + 1}"):
        signs(3, MAX_COLUMNS + 1)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_update_sketch_by_hand(as_tensor: bool) -> None:
    sketch = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    matrix = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    flips = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    product = sketch_product(matrix[None], flips[None], dim=1)[0]
    update_sketch_(sketch, product, weight=torch.tensor(0.5, dtype=torch.float64) if as_tensor else 0.5)
    # sqrt(1 - 1/2) (1, 2) + sqrt((1/2) / 2) (3 + 5, -3 + 5)
    assert sketch[0].tolist() == pytest.approx([0.5**0.5 + 4, 2 * 0.5**0.5 + 1], rel=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_product_unfolds_each_tensor_along_the_axis(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    columns = 60 // x.shape[dim]
    weights = torch.randn(2, columns, 8, generator=generator, dtype=torch.float64)
    for tensor, own, found in zip(x, weights, sketch_product(x, weights, dim=dim), strict=True):
        unfolded = np.moveaxis(tensor.numpy(), dim - 1, 0).reshape(x.shape[dim], columns)
        np.testing.assert_allclose(found.numpy(), unfolded @ own.numpy(), rtol=1e-12, atol=1e-12)


def test_sketch_keeps_the_exponential_average_in_expectation() -> None:
    """E[Z Z^T] over seeds equals the average of Y Y^T; the tolerance is SIGMAS standard errors of each entry."""
    n, columns, k, steps, weight, seeds = 4, 6, 8, 5, 0.3, 1500
    rng = np.random.default_rng(0)
    history = rng.standard_normal((steps, n, columns)) * np.array([3.0, 1.0, 0.3, 0.1])[:, None]
    samples = np.empty((seeds, n, n))
    for seed in range(seeds):
        sketch = torch.zeros(n, k, dtype=torch.float64)
        for step, matrix in enumerate(history, 1):
            share = 1.0 if step == 1 else weight
            product = torch.from_numpy(matrix) @ signs(columns, k, seed=seed, step=step).double()
            update_sketch_(sketch, product, weight=share)
        samples[seed] = (sketch @ sketch.T).numpy()
    products = [matrix @ matrix.T for matrix in history]
    expected = reference.weighted_average(products, [1.0] + [weight] * (steps - 1))
    standard_error = samples.std(0) / seeds**0.5
    assert (abs(samples.mean(0) - expected) < SIGMAS * standard_error).all()
    assert (standard_error < 0.05 * np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))).all()

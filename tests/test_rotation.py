"""butterfly_opt.rotation. Oracles: the dense float64 product of Givens matrices in ``reference``, and autograd."""

import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from butterfly_opt.rotation import (
    StoredPass,
    angle_curvature,
    angle_gradient,
    angles_shape,
    dense_rotation,
    num_stages,
    rotate,
    rotate_columns_,
)

LENGTHS = [1, 2, 3, 5, 7, 31, 64, 100, 127, 1000]
# Relative error of the norm, by the dtype of the input: a result is as exact as the arithmetic, which is
# float32 for the half precisions (their inputs are compared as rounded), and each of up to 30 stages adds
# about one rounding: 30 * 2^-24 = 2e-6, 30 * 2^-53 = 3e-15.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def random_angles(n: int, *, depth: int = 1, stages: int | None = None, batch: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(17 * n + depth)
    return math.pi * torch.randn(*batch, *angles_shape(n, depth=depth, stages=stages), generator=generator).double()


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used_slots(n: int, stages: int) -> Tensor:
    """Mask ``(stages, n // 2)`` of the slots that belong to a pair."""
    mask = torch.zeros(stages, n // 2, dtype=torch.bool)
    for stage in range(stages):
        mask[stage, : len(reference.stage_pairs(n, stage))] = True
    return mask


def assert_close(actual: Tensor, expected: Any, dtype: torch.dtype) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm(actual.double() - expected)
    assert error <= TOLERANCE[dtype] * max(torch.linalg.vector_norm(expected), 1.0)


@pytest.mark.parametrize(("n", "count"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1000, 10), (1024, 10), (1025, 11)])
def test_num_stages(n: int, count: int) -> None:
    assert num_stages(n) == count == reference.stage_count(n)
    assert angles_shape(n, depth=2) == (2, count, n // 2)
    assert angles_shape(n, stages=1) == (1, min(count, 1), n // 2)


@pytest.mark.parametrize("n", LENGTHS)
def test_angle_zero_is_the_identity(n: int) -> None:
    x = random_tensor(n, 3)
    assert torch.equal(rotate(x, torch.zeros(angles_shape(n, depth=2)).double(), dim=0), x)


@pytest.mark.parametrize(
    ("angle", "q_x", "qt_x"),
    [(0.0, [3.0, 4.0], [3.0, 4.0]), (math.pi / 2, [-4.0, 3.0], [4.0, -3.0]), (math.pi, [-3.0, -4.0], [-3.0, -4.0])],
)
def test_one_pair_by_hand(angle: float, q_x: list[float], qt_x: list[float]) -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    angles = torch.full((1, 1, 1), angle, dtype=torch.float64)
    assert_close(rotate(x, angles), q_x, torch.float64)
    assert_close(rotate(x, angles, transpose=True), qt_x, torch.float64)


def test_three_coordinates_by_hand() -> None:
    """Stage 0 of n = 3 has the pair (0, 1); stage 1 has (0, 2); Q^T applies stage 0 first."""
    quarter = torch.full((1, 2, 1), math.pi / 2, dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    # Stage 0: (lo, hi) <- (hi, -lo) gives (2, -1, 3); stage 1 on (0, 2) gives (3, -1, -2).
    assert_close(rotate(x, quarter, transpose=True), [3.0, -1.0, -2.0], torch.float64)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_dense_givens_product(n: int, depth: int, transpose: bool) -> None:
    angles = random_angles(n, depth=depth)
    matrix = reference.dense_rotation(angles, n)
    expected = matrix.T if transpose else matrix
    rows, columns = random_tensor(3, n), random_tensor(n, 2)
    assert_close(rotate(rows, angles, transpose=transpose), reference.apply_along(expected, rows, 1), torch.float64)
    assert_close(
        rotate(columns, angles, dim=0, transpose=transpose), reference.apply_along(expected, columns, 0), torch.float64
    )


@pytest.mark.parametrize("stages", [0, 1, 2, 4, 99])
@pytest.mark.parametrize("n", [1, 2, 7, 31, 64, 100])
def test_truncated_stages_rotate_blocks(n: int, stages: int) -> None:
    angles = random_angles(n, depth=2, stages=stages)
    matrix = torch.from_numpy(reference.dense_rotation(angles, n))
    assert_close(dense_rotation(angles, n), matrix, torch.float64)
    block = torch.arange(n) // 2 ** min(stages, num_stages(n))
    assert not matrix[block[:, None] != block].any()


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_batch_of_angles(n: int) -> None:
    angles = random_angles(n, depth=2, batch=(2, 3))
    x = random_tensor(2, 3, 4, n, 5)
    turned = rotate(x, angles, dim=-2)
    dense = dense_rotation(angles, n)
    assert dense.shape == (2, 3, n, n)
    for i in range(2):
        for j in range(3):
            expected = reference.apply_along(reference.dense_rotation(angles[i, j], n), x[i, j], 1)
            assert_close(turned[i, j], expected, torch.float64)
            assert_close(dense[i, j] @ x[i, j], expected, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transpose", [False, True])
def test_dtypes(dtype: torch.dtype, transpose: bool) -> None:
    n = 100
    angles = random_angles(n, depth=3).float()
    x = random_tensor(4, n).to(dtype)
    turned = rotate(x, angles, transpose=transpose)
    assert turned.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    matrix = reference.dense_rotation(angles, n)
    expected = reference.apply_along(matrix.T if transpose else matrix, x.double(), 1)
    # float32 angles: their cosines are float32 whatever x is.
    assert_close(turned, expected, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_non_contiguous_input_and_untouched_arguments(dim: int) -> None:
    x = random_tensor(6, 12, 10).permute(2, 0, 1)[::2, :, 1::2]
    n = x.shape[dim]
    angles = random_angles(n)
    before, angles_before = x.clone(), angles.clone()
    turned = rotate(x, angles, dim=dim)
    assert turned.is_contiguous()
    assert_close(turned, reference.apply_along(reference.dense_rotation(angles, n), x, dim % 3), torch.float64)
    assert torch.equal(x, before)
    assert torch.equal(angles, angles_before)


def test_contiguous_input_is_not_aliased() -> None:
    x = random_tensor(8)
    assert rotate(x, random_angles(8)).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_columns(shape: tuple[int, int]) -> None:
    dim = shape.index(5)
    x = torch.empty(shape, dtype=torch.float64)
    angles = random_angles(5)
    assert rotate(x, angles, dim=dim).shape == shape
    assert not angle_gradient(x, x, angles, dim=dim).any()


def test_some_stages_in_place() -> None:
    angles = random_angles(13, depth=1)
    columns = random_tensor(1, 13, 4)
    expected = rotate(columns, angles, dim=1, transpose=True)
    for span in (range(0, 1), range(1, 3), range(3, 4)):
        rotate_columns_(columns, angles, transpose=True, stages=span)
    assert_close(columns, expected, torch.float64)


class Rotated(torch.autograd.Function):
    """``Q^T y`` with ``angle_gradient`` as its backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, angles: Tensor, dim: int) -> Tensor:
        u = rotate(y, angles, dim=dim, transpose=True)
        ctx.save_for_backward(u, angles)
        ctx.dim = dim
        return u

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor, Tensor, None]:
        u, angles = ctx.saved_tensors
        return rotate(grad_u, angles, dim=ctx.dim), angle_gradient(u, grad_u, angles, dim=ctx.dim), None


@pytest.mark.parametrize(
    ("shape", "dim", "depth", "batch", "stages"),
    [
        ((1, 3), 0, 1, (), None),
        ((2, 3), 0, 1, (), None),
        ((3, 2), 0, 2, (), None),
        ((2, 7, 2), 1, 3, (), None),
        ((3, 8), 1, 2, (), 2),
        ((2, 3, 5), 2, 1, (2,), None),
        ((2, 2, 5, 3), 2, 2, (2, 2), None),
    ],
)
def test_angle_gradient_gradcheck(
    shape: tuple[int, ...], dim: int, depth: int, batch: tuple[int, ...], stages: int | None
) -> None:
    angles = random_angles(shape[dim], depth=depth, batch=batch, stages=stages).requires_grad_()
    y = random_tensor(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, angles: Rotated.apply(y, angles, dim), (y, angles))


@pytest.mark.parametrize("n", [3, 5, 7, 100])
def test_unused_slots_have_no_derivative(n: int) -> None:
    angles = random_angles(n, depth=2)
    u, grad_u = random_tensor(n, 4), random_tensor(n, 4, seed=1)
    unused = ~used_slots(n, num_stages(n))
    assert not angle_gradient(u, grad_u, angles, dim=0)[:, unused].any()
    assert not angle_curvature(u, grad_u, grad_u.square(), angles, dim=0)[:, unused].any()


@pytest.mark.parametrize("n", [*LENGTHS[:-1], 96])
@pytest.mark.parametrize("depth", [1, 3])
def test_stored_pass_equals_angle_gradient(n: int, depth: int) -> None:
    """With the stages' outputs stored, in buffers that are used again, as by rotating back."""
    weights = random_tensor(n, 4, seed=1)
    passes = StoredPass(weights, torch.zeros(angles_shape(n, depth=depth)))
    for scale in (1.0, 0.3):
        angles = scale * random_angles(n, depth=depth) * used_slots(n, num_stages(n))
        y = scale * random_tensor(n, 4, seed=2)
        u = rotate(y, angles, dim=0, transpose=True)
        expected = angle_gradient(u, weights * u, angles, dim=0)
        assert_close(passes.gradient(y, lambda u: weights * u, angles), expected, torch.float64)


def dense_tensor(angles: Tensor, n: int) -> Tensor:
    """``Q`` by differentiable products of whole matrices."""
    product = torch.eye(n, dtype=angles.dtype)
    for butterfly in angles:
        for stage, row in enumerate(butterfly):
            factor = torch.eye(n, dtype=angles.dtype)
            for slot, (i, j) in enumerate(reference.stage_pairs(n, stage)):
                plane = torch.zeros(n, n, dtype=angles.dtype)
                plane[i, i] = plane[j, j] = 1.0
                skew = torch.zeros(n, n, dtype=angles.dtype)
                skew[i, j], skew[j, i] = -1.0, 1.0
                factor = factor + (row[slot].cos() - 1) * plane + row[slot].sin() * skew
            product = product @ factor
    return product


def second_derivatives(y: Tensor, weights: Tensor, angles: Tensor) -> Tensor:
    """Diagonal of the Hessian of ``1/2 sum weights (Q^T y)^2`` in the angles, by autograd."""

    def loss(flat: Tensor) -> Tensor:
        return 0.5 * (weights * (dense_tensor(flat.view_as(angles), y.shape[0]).T @ y).square()).sum()

    return torch.autograd.functional.hessian(loss, angles.reshape(-1)).diagonal().view_as(angles)


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8])
def test_angle_curvature_of_the_output_stage_is_exact(n: int) -> None:
    """The quadratic form is diagonal at the outputs, so the last stage of Q^T has its exact curvature."""
    angles, y = random_angles(n), random_tensor(n, 4)
    weights = random_tensor(n, 4, seed=2).exp()
    u = rotate(y, angles, dim=0, transpose=True)
    curvature = angle_curvature(u, weights * u, weights, angles, dim=0)
    torch.testing.assert_close(curvature[0, -1], second_derivatives(y, weights, angles)[0, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [3, 4, 6, 8, 13])
def test_angle_curvature_of_earlier_stages_leaves_out_one_term(n: int) -> None:
    """At depth 1 every stage is exact up to ``2 W_lo,hi lo hi``, the off-diagonal entry of the form at the pair."""
    angles, y = random_angles(n), random_tensor(n, 1)
    weights = random_tensor(n, 1, seed=2).exp()
    u = rotate(y, angles, dim=0, transpose=True)
    curvature = angle_curvature(u, weights * u, weights, angles, dim=0)[0]
    expected = second_derivatives(y, weights, angles)[0]
    for stage in range(num_stages(n)):
        before = torch.from_numpy(reference.dense_rotation(angles[:, : stage + 1], n))
        after = torch.from_numpy(reference.dense_rotation(angles, n)).T @ before
        form, outputs = after.T @ torch.diag(weights[:, 0]) @ after, before.T @ y[:, 0]
        for slot, (i, j) in enumerate(reference.stage_pairs(n, stage)):
            left_out = 2 * form[i, j] * outputs[i] * outputs[j]
            assert expected[stage, slot] == pytest.approx((curvature[stage, slot] - left_out).item(), abs=1e-9)


def test_angle_curvature_sums_columns_and_batches() -> None:
    angles = random_angles(5, depth=2, batch=(2,))
    y, weights = random_tensor(2, 3, 5, 4), random_tensor(2, 3, 5, 4, seed=1).exp()
    u = rotate(y, angles, dim=2, transpose=True)
    whole = angle_curvature(u, weights * u, weights, angles, dim=2)
    for b in range(2):
        parts = [angle_curvature(u[b, i], (weights * u)[b, i], weights[b, i], angles[b], dim=0) for i in range(3)]
        torch.testing.assert_close(whole[b], sum(parts), rtol=1e-12, atol=1e-12)


lengths = st.integers(1, 70)
depths = st.integers(1, 3)
seeds = st.integers(0, 2**31 - 1)


@settings(deadline=None, max_examples=60)
@given(n=lengths, depth=depths, seed=seeds)
def test_rotation_properties(n: int, depth: int, seed: int) -> None:
    """Q^T Q x = x; the norm is kept; <Q x, y> = <x, Q^T y>."""
    generator = torch.Generator().manual_seed(seed)
    angles = 4 * torch.randn(angles_shape(n, depth=depth), generator=generator, dtype=torch.float64)
    x, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    turned = rotate(x, angles)
    assert_close(rotate(turned, angles, transpose=True), x, torch.float64)
    assert turned.norm().item() == pytest.approx(x.norm().item(), rel=1e-12)
    assert (turned @ y).item() == pytest.approx((x @ rotate(y, angles, transpose=True)).item(), rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(n=lengths, depth=depths, seed=seeds)
def test_rotation_is_linear(n: int, depth: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randn(angles_shape(n, depth=depth), generator=generator, dtype=torch.float64)
    x, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    assert_close(rotate(2 * x - 3 * y, angles), 2 * rotate(x, angles) - 3 * rotate(y, angles), torch.float64)


@pytest.mark.parametrize("n", [0, -3])
def test_num_stages_needs_a_coordinate(n: int) -> None:
    with pytest.raises(ValueError, match=f"n >= 1 coordinates, got n = {n}"):
        num_stages(n)


def test_angles_shape_rejects_depth_and_stages() -> None:
    with pytest.raises(ValueError, match="depth >= 1, got depth = 0"):
        angles_shape(4, depth=0)
    with pytest.raises(ValueError, match="stages must be None or >= 0, got -1"):
        angles_shape(4, stages=-1)


@pytest.mark.parametrize(
    ("x", "angles", "dim", "error", "match"),
    [
        (torch.ones(4, dtype=torch.int64), torch.zeros(1, 2, 2), 0, TypeError, "x must be real floating point"),
        (torch.ones(4, dtype=torch.complex64), torch.zeros(1, 2, 2), 0, TypeError, "x must be real floating point"),
        (torch.ones(4), torch.zeros(1, 2, 2, dtype=torch.int64), 0, TypeError, "angles must be real floating point"),
        (torch.ones(4), torch.zeros(2, 2), 0, ValueError, r"angles must be \(\*batch, depth"),
        (torch.ones(4), torch.zeros(1, 2, 2), 1, ValueError, "dim = 1 is out of range"),
        (torch.ones(4), torch.zeros(1, 2, 2), -2, ValueError, "dim = -2 is out of range"),
        (torch.ones(2, 4), torch.zeros(3, 1, 2, 2), 1, ValueError, r"must start with the batch \(3,\)"),
        (torch.ones(4, 4), torch.zeros(4, 1, 2, 2), 0, ValueError, r"must start with the batch \(4,\)"),
        (torch.ones(5), torch.zeros(1, 2, 3), 0, ValueError, "do not fit an axis of length 5"),
        (torch.ones(4), torch.zeros(1, 3, 2), 0, ValueError, "do not fit an axis of length 4"),
    ],
)
def test_rotate_rejects(x: Tensor, angles: Tensor, dim: int, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rotate(x, angles, dim=dim)
    with pytest.raises(error, match=match):
        angle_gradient(x, x, angles, dim=dim)


def test_angle_gradient_rejects_two_shapes() -> None:
    with pytest.raises(ValueError, match=r"u and grad_u must have one shape, got \(4,\) and \(4, 1\)"):
        angle_gradient(torch.ones(4), torch.ones(4, 1), torch.zeros(1, 2, 2))

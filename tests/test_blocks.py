"""butterfly_opt.blocks. Oracles: ``rotation.rotate``, tested by itself, and a dense product from ``reference``."""

import pytest
import reference
import torch
from torch import Tensor

from butterfly_opt.blocks import MAX_GROUP, RotationBlocks
from butterfly_opt.rotation import angles_shape, rotate

# Relative error of the norm: a block product sums up to 32 terms a group, of at most 4 groups a butterfly.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def make(n: int, depth: int, stages: int | None, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (3 * torch.randn(angles_shape(n, depth=depth, stages=stages), generator=generator)).to(dtype)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bound = TOLERANCE[actual.dtype] * max(expected.norm().item(), 1.0)
    assert (actual - expected).norm() <= bound


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 31, 32, 33, 64, 100, 127, 1000, 1025])
def test_equals_rotate(n: int, depth: int, transpose: bool) -> None:
    angles = make(n, depth, None, torch.float64)
    blocks = RotationBlocks(angles, n)
    x = torch.randn(3, n, 2, dtype=torch.float64)
    assert_equal(blocks.rotate(x, dim=1, transpose=transpose), rotate(x, angles, dim=1, transpose=transpose))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dimension_and_dtype(dtype: torch.dtype, dim: int, transpose: bool) -> None:
    x = torch.randn(14, 12, 5).to(dtype).transpose(0, 1)[::2]
    before = x.clone()
    n = x.shape[dim]
    angles = make(n, 2, None, dtype)
    turned = RotationBlocks(angles, n).rotate(x, dim=dim, transpose=transpose)
    assert_equal(turned, rotate(x, angles, dim=dim, transpose=transpose))
    assert torch.equal(x, before)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("stages", [0, 1, 2, MAX_GROUP, MAX_GROUP + 1, 8])
@pytest.mark.parametrize("n", [1, 2, 31, 100, 1000])
def test_truncated_stages(n: int, stages: int, transpose: bool) -> None:
    angles = make(n, 2, stages, torch.float64)
    x = torch.randn(n, 3, dtype=torch.float64)
    turned = RotationBlocks(angles, n).rotate(x, dim=0, transpose=transpose)
    assert_equal(turned, rotate(x, angles, dim=0, transpose=transpose))


@pytest.mark.parametrize("n", [2, 7, 100])
def test_equals_dense(n: int) -> None:
    angles = make(n, 2, None, torch.float64)
    turned = RotationBlocks(angles, n).rotate(torch.eye(n, dtype=torch.float64), dim=0)
    assert_equal(turned, torch.from_numpy(reference.dense_rotation(angles, n)))


@pytest.mark.parametrize(("n", "stages"), [(1024, None), (4097, None), (4097, 6)])
def test_groups_are_few_and_small(n: int, stages: int | None) -> None:
    angles = make(n, 1, stages, torch.float32)
    groups = RotationBlocks(angles, n).groups
    assert len(groups) == -(-angles.shape[1] // MAX_GROUP)
    assert all(group.matrices.shape[-1] <= 2**MAX_GROUP for group in groups)


def test_blocks_are_read_once() -> None:
    """The angles may be changed in place afterwards, as a refit does."""
    angles = make(8, 1, None, torch.float64)
    blocks, x = RotationBlocks(angles, 8), torch.randn(8, dtype=torch.float64)
    expected = blocks.rotate(x, dim=0)
    angles.add_(1.0)
    assert torch.equal(blocks.rotate(x, dim=0), expected)

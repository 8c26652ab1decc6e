"""Tests of triton_kernels/sketch.py. Oracle: the dense product in float64."""

import pytest
import torch

from butterfly_opt.triton_kernels import launch
from butterfly_opt.triton_kernels.sketch import sketch_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 3, 5, 31, 64, 100, 127, 1000, 1024, 4097]


def make(batch: int, pre: int, n: int, post: int, count: int = 8):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(batch, pre, n, post, generator=generator)
    weights = torch.randint(0, 2, (batch, pre * post, count), generator=generator) * 2.0 - 1
    return x.to(DEVICE), weights.to(DEVICE)


def expected(x, weights):
    return x.double().movedim(2, 1).reshape(x.shape[0], x.shape[2], -1) @ weights.double()


@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("batch, pre, post", [(1, 70, 1), (1, 1, 70), (2, 3, 5)])
def test_product_equals_float64(batch, pre, n, post, programs, monkeypatch):
    monkeypatch.setattr(launch, "MIN_PROGRAMS", programs)  # several share the columns of short axes
    x, weights = make(batch, pre, n, post)
    weights *= torch.arange(1, 1 + pre * post, device=DEVICE)[:, None]
    result = sketch_product(x, weights)
    assert result.dtype == torch.float32 and result.shape == (batch, n, 8)
    reference = expected(x, weights)
    assert (result - reference).norm() < 1e-6 * reference.norm()
    assert torch.equal(sketch_product(x, weights), result)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_fewer_columns(count):
    x, weights = make(1, 4, 33, 1, count)
    assert (sketch_product(x, weights) - expected(x, weights)).abs().max() < 1e-5


def test_integers_are_exact():
    x = torch.arange(24.0, device=DEVICE).view(1, 2, 3, 4)
    weights = torch.ones(1, 8, 2, device=DEVICE)
    assert torch.equal(sketch_product(x, weights)[0, :, 1], x.sum((0, 1, 3)))


@pytest.mark.parametrize("shape", [(1, 0, 3, 2), (1, 2, 0, 2), (0, 2, 3, 2)])
def test_empty_tensors(shape):
    x, weights = torch.zeros(shape, device=DEVICE), torch.zeros(shape[0], shape[1] * shape[3], 8, device=DEVICE)
    assert torch.equal(sketch_product(x, weights), torch.zeros(shape[0], shape[2], 8, device=DEVICE))


@pytest.mark.parametrize("name, change, kind, message", [
    ("x", torch.float64, TypeError, r"x must be one of torch.float32, got torch.float64; use butterfly_opt.sketch"),
    ("weights", torch.bfloat16, TypeError, r"weights must be one of torch.float32, got torch.bfloat16"),
    ("weights", "meta", ValueError, "weights must be on .*, got meta"),
    ("x", "transposed", ValueError, r"x must be contiguous, got shape \(1, 2, 4, 4\)"),
    ("x", (4, 4), ValueError, r"x must be \(batch, pre, n, post\), got shape \(4, 4\)"),
    ("weights", (1, 9, 8), ValueError, r"weights must be \(1, 8, k\) with k <= 8 .* got shape \(1, 9, 8\)"),
    ("weights", (1, 8, 9), ValueError, r"weights must be \(1, 8, k\) with k <= 8 .* got shape \(1, 8, 9\)"),
])  # fmt: skip
def test_wrong_arguments(name, change, kind, message):
    tensors = dict(zip(("x", "weights"), make(1, 2, 4, 4), strict=True))
    old = tensors[name]
    if change == "transposed":
        tensors[name] = old.mT
    else:
        tensors[name] = torch.ones(change, device=DEVICE) if isinstance(change, tuple) else old.to(change)
    with pytest.raises(kind, match=message):
        sketch_product(**tensors)

"""butterfly_opt.operators and the operators of the optimizer, against dense matrices; and what they refuse."""

import pytest
import torch

from butterfly_opt import Butterfly
from butterfly_opt.backend import TORCH
from butterfly_opt.basis import Basis
from butterfly_opt.operators import DirectSum, RotatedDiagonal
from butterfly_opt.rotation import angles_shape, dense_rotation
from butterfly_opt.sketch import random_signs

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
"""Float64: a few hundred roundings."""


def operator(shape, seed=0):
    torch.manual_seed(seed)
    angles = [torch.randn(angles_shape(n), dtype=torch.float64) for n in shape]
    diagonal = torch.rand(shape, dtype=torch.float64) + 0.5
    dense = torch.ones(1, 1, dtype=torch.float64)
    for n, part in zip(shape, angles, strict=True):
        dense = torch.kron(dense, dense_rotation(part, n))
    return RotatedDiagonal(Basis(shape, list(enumerate(angles)), TORCH), diagonal), (
        dense @ torch.diag(diagonal.flatten()) @ dense.T
    )


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (2, 3, 5)])
def test_products_and_dense(shape):
    ours, dense = operator(shape)
    n = dense.shape[0]
    x = torch.randn(n, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.to_dense(), dense, **TOLERANCE)
    torch.testing.assert_close(ours @ x, dense @ x, **TOLERANCE)
    torch.testing.assert_close(ours @ x[:, 0], dense @ x[:, 0], **TOLERANCE)
    assert ours.shape == (n, n)
    assert repr(ours) == f"RotatedDiagonal(n={n}, tensor={tuple(shape)})"


def test_direct_sum():
    (first, dense_first), (second, dense_second) = operator((3,)), operator((2, 4), seed=1)
    params = [torch.empty(3), torch.empty(2, 4)]
    total = DirectSum([((params[0],), first), ((params[1],), second)])
    dense = torch.block_diag(dense_first, dense_second)
    x = torch.randn(11, dtype=torch.float64)
    torch.testing.assert_close(total @ x, dense @ x, **TOLERANCE)
    torch.testing.assert_close(total.to_dense(), dense, **TOLERANCE)
    assert len(total) == 2
    assert total[params[1]] is second
    with pytest.raises(KeyError, match=r"no operator for a parameter of shape \(7,\)"):
        total[torch.empty(7)]
    with pytest.raises(ValueError, match=r"cannot multiply a tensor of shape \(4,\)"):
        total @ torch.randn(4)


def test_wrong_shapes_are_named():
    ours, _ = operator((3,))
    with pytest.raises(ValueError, match=r"operator of shape \(3, 3\) cannot multiply a tensor of shape \(4,\)"):
        ours @ torch.randn(4)
    with pytest.raises(ValueError, match=r"diagonal must have shape \(3,\), got \(2,\)"):
        RotatedDiagonal(ours.basis, torch.ones(2))


def test_estimates_that_do_not_exist_yet():
    param = torch.randn(4, 3, requires_grad=True)
    optimizer = Butterfly([param])
    with pytest.raises(KeyError, match="no estimate for this parameter"):
        optimizer.preconditioner(param)
    param.grad = torch.randn(4, 3)
    optimizer.step()
    assert torch.linalg.eigvalsh(optimizer.preconditioner(param).to_dense()).min() > 0
    with pytest.raises(ValueError, match="the parameters have not moved for enough steps"):
        optimizer.inverse_hessian(param)


def test_a_group_is_a_direct_sum():
    params = [torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
    optimizer = Butterfly([{"params": [params[0]]}, {"params": [params[1]], "structure": "flat"}])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.preconditioner(optimizer.param_groups[1]).shape == (5, 5)
    assert optimizer.preconditioner().shape == (17, 17)


def test_capturable_with_raise_is_refused():
    with pytest.raises(ValueError, match="reads the gradient on the host and cannot be capturable"):
        Butterfly([torch.zeros(2, requires_grad=True)], capturable=True, on_nonfinite="raise")


def test_sketches_have_a_largest_width():
    with pytest.raises(ValueError, match="at most 32 columns, got columns = 33"):
        random_signs(4, 33, seed=0, stream=0, step=1, device=torch.device("cpu"))

"""butterfly_opt.autograd against numerical derivatives (gradcheck) and, in the kernels, against torch."""

import pytest
import torch

from butterfly_opt import butterfly_rotation
from butterfly_opt.rotation import angles_shape, rotate


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((6,), -1), ((3, 5), 0), ((2, 7, 3), 1), ((4, 1), 1)])
def test_gradcheck(shape, dim, transpose):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(angles_shape(shape[dim], depth=2), dtype=torch.float64)
    # Slots beyond the last pair of a stage do not exist: their derivative is zero either way.
    angles.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: butterfly_rotation(x, a, dim=dim, transpose=transpose), (x, angles))


@pytest.mark.parametrize("transpose", [False, True])
def test_kernels_give_the_same_gradients(transpose):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        x = torch.randn(5, 12, device=device, requires_grad=True)
        angles = torch.randn(angles_shape(12), device=device, requires_grad=True)
        weight = torch.randn(5, 12, device=device)
        (butterfly_rotation(x, angles, transpose=transpose, backend=backend) * weight).sum().backward()
        results.append((x.grad, angles.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_low_precision_input_gets_its_gradient_in_its_own_dtype():
    x = torch.randn(3, 8).to(torch.bfloat16).requires_grad_()
    angles = torch.randn(angles_shape(8), requires_grad=True)
    result = butterfly_rotation(x, angles)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, rotate(x.detach(), angles.detach()))
    result.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert angles.grad.dtype == torch.float32


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match="do not fit an axis of length 7"):
        butterfly_rotation(torch.randn(3, 7), torch.zeros(angles_shape(8)))

"""The bias of the inverse-Hessian estimate under noise, and that it is right without.

Oracle: gradients of pure noise, whose curvature is zero, and a quadratic with known Hessian.
"""

import pytest
import torch

from butterfly_opt import Butterfly
from butterfly_opt.diagonal import regress

BETA1, BETA2, LR = 0.9, 0.999, 1e-3


def test_noise_alone_looks_like_curvature_and_the_correction_removes_it():
    """With steps ``c m`` and H = 0 the regression finds h = 0.112 / c; corrected: below 0.015 / c.

    ``c`` is a little smaller than ``lr / sqrt V``, which leaves out ``m^2``.
    """
    torch.manual_seed(0)
    param = torch.zeros(1200, requires_grad=True)
    # A vector is not rotated: the directions stay the same.
    optimizer = Butterfly([param], lr=LR, betas=(BETA1, BETA2), diagonal="secant")
    for _ in range(3000):
        param.grad = torch.randn(1200)
        optimizer.step()
    state = optimizer.state[param]
    moments = (state[name].view(1, 1, -1) for name in ("exp_avg_sq", "disp_sq", "cross"))
    found = regress(*moments, beta2=BETA2, step=state["step"].view(1, 1, 1))
    gain = LR / found.energy.sqrt()
    biased = (found.slope / found.tau * gain).median().item()
    corrected = (gain / optimizer.inverse_hessian(param, corrected=True).d).median().item()
    print(f"h c = {biased:.4f}, corrected {corrected:.4f}")
    assert 0.112 < biased < 0.135
    assert corrected < 0.015


def test_without_noise_it_is_the_inverse_hessian():
    torch.manual_seed(0)
    curvature = torch.logspace(-1, 1, 20, dtype=torch.float64)
    param = torch.randn(20, dtype=torch.float64, requires_grad=True)
    # A short memory: the first gradient belongs to no pair, and its square must be forgotten.
    optimizer = Butterfly([param], lr=1e-2, betas=(BETA1, 0.8), diagonal="secant")
    for _ in range(150):
        optimizer.zero_grad()
        (0.5 * curvature * param.square()).sum().backward()
        optimizer.step()
    estimate = optimizer.inverse_hessian(param).to_dense().diagonal()
    torch.testing.assert_close(estimate * curvature, torch.ones_like(curvature), rtol=0.02, atol=0)
    damped = optimizer.inverse_hessian(param, damping=2.0).to_dense().diagonal()
    torch.testing.assert_close(damped * (curvature + 2.0), torch.ones_like(curvature), rtol=0.02, atol=0)


@pytest.mark.parametrize("options", [{}, {"block": 4, "lead": 4}, {"block": 32}], ids=["blocks", "radix 4", "dense"])
def test_a_rotated_quadratic_is_found(options: dict[str, int]) -> None:
    """Curvature ``A (x) B`` of a matrix: the estimate approximates the inverse, within the axes' basis."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (6, 5))
    left = a * torch.logspace(-1, 1, 6, dtype=torch.float64) @ a.T
    right = b * torch.logspace(-0.5, 0.5, 5, dtype=torch.float64) @ b.T
    param = torch.randn(6, 5, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = Butterfly([param], lr=3e-2, betas=(BETA1, 0.95), diagonal="secant", refit_every=1, **options)
    for _ in range(500):
        optimizer.zero_grad()
        noise = 0.1 * torch.randn(6, 5, dtype=torch.float64, generator=generator)
        (0.5 * (left @ (param + noise) @ right * (param + noise)).sum()).backward()
        optimizer.step()
    hessian = torch.kron(left, right)
    product = optimizer.inverse_hessian(param).to_dense() @ hessian
    spread = torch.linalg.eigvals(product).real
    before, after = torch.linalg.cond(hessian), spread.max() / spread.min()
    print(f"condition of H: {before:.0f}, preconditioned: {after:.1f}")
    assert spread.min() > 0
    assert after < before / 5


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_newton_finds_the_inverse_hessian_of_a_quadratic(structure: str) -> None:
    """Up to ``block`` parameters it is exact, the operator of the step is the estimate, and it stays so at rest."""
    param = torch.nn.Parameter(torch.ones(6, 5, dtype=torch.float64))
    curvature = torch.linspace(1, 30, 30, dtype=torch.float64)
    opt = Butterfly([param], lr=1.0, diagonal="newton", structure=structure)
    with pytest.raises(KeyError, match="took no step yet"):
        opt.inverse_hessian(param)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = 0.5 * (curvature * param.flatten().square()).sum()
        loss.backward()
        return loss

    opt.step(closure)
    with pytest.raises(ValueError, match="no inverse-Hessian estimate yet"):
        opt.inverse_hessian(param)
    for _ in range(60):
        opt.step(closure)
    expected = torch.diag(1 / curvature)
    torch.testing.assert_close(opt.inverse_hessian(param).to_dense(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(opt.preconditioner(param).to_dense(), opt.inverse_hessian(param).to_dense())
    damped = torch.diag(1 / (curvature + 0.5))
    torch.testing.assert_close(opt.inverse_hessian(param, damping=0.5).to_dense(), damped, rtol=0, atol=1e-3)
    assert opt.diagnostics()[0]["tensors"][0]["negative"] == 0

"""The bias of the inverse-Hessian estimate under noise, and that it is right without.

Oracle: gradients of pure noise, whose curvature is zero, and a quadratic with known Hessian.
"""

import torch

from butterfly_opt import Butterfly
from butterfly_opt.diagonal import regress

BETA1, BETA2, LR = 0.9, 0.999, 1e-3


def test_noise_alone_looks_like_curvature_and_the_correction_removes_it():
    """With steps ``c gbar`` and H = 0 the regression finds h = 0.105 / c; corrected: below 0.015 / c."""
    torch.manual_seed(0)
    param = torch.zeros(30, 40, requires_grad=True)
    optimizer = Butterfly([param], lr=LR, betas=(BETA1, BETA2), refit_steps=0)
    for _ in range(3000):
        param.grad = torch.randn(30, 40)
        optimizer.step()
    state = optimizer.state[param]
    found = regress(state["grad_sq"], state["disp_sq"], state["cross"], beta2=BETA2)
    gain = LR / found.energy.sqrt()
    biased = (found.slope / found.tau * gain).median().item()
    corrected = (gain / optimizer.inverse_hessian(param, corrected=True).d).median().item()
    print(f"h c = {biased:.4f}, corrected {corrected:.4f}")
    assert 0.095 < biased < 0.115
    assert corrected < 0.015


def test_without_noise_it_is_the_inverse_hessian():
    torch.manual_seed(0)
    curvature = torch.logspace(-1, 1, 20, dtype=torch.float64)
    param = torch.randn(20, dtype=torch.float64, requires_grad=True)
    # A short memory: the first gradient belongs to no pair, and its square must be forgotten.
    optimizer = Butterfly([param], lr=1e-2, betas=(BETA1, 0.9), refit_steps=0)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * curvature * param.square()).sum().backward()
        optimizer.step()
    estimate = optimizer.inverse_hessian(param).to_dense().diagonal()
    torch.testing.assert_close(estimate * curvature, torch.ones_like(curvature), rtol=0.02, atol=0)
    damped = optimizer.inverse_hessian(param, damping=2.0).to_dense().diagonal()
    torch.testing.assert_close(damped * (curvature + 2.0), torch.ones_like(curvature), rtol=0.02, atol=0)

"""What the examples share: a trained classifier, and estimates of its inverse Hessian from several sources."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from butterfly_opt import Butterfly, DirectSum, FitOptions, RotatedDiagonal, SecantEstimate, fit_inverse
from butterfly_opt.operators import SymmetricOperator
from experiments.paper_models import Objective, digits_objectives

PROBES = 300
"""Pairs that ``probed`` sees."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """Logistic regression on digits (650 parameters), its minimum and the exact Hessian there."""

    train: Objective
    test: Objective
    theta: Tensor
    hessian: Tensor


def trained(l2: float) -> Trained:
    """Trains by L-BFGS to a gradient below 1e-9."""
    train, test = digits_objectives(l2=l2)
    theta = train.minimum(train.start(0))
    return Trained(train, test, theta, train.hessian(theta))


def damped(estimate: SymmetricOperator, damping: float) -> SymmetricOperator:
    """``(H + damping I)^-1`` for an estimate of ``H^-1``."""
    return estimate.inverse().shifted(damping).inverse()


def diagonal(hessian: Tensor) -> RotatedDiagonal:
    """``diag(1 / H_ii)``, from the exact Hessian: no angles."""
    d = 1 / hessian.diagonal()
    return RotatedDiagonal.from_angles(d.new_zeros(1, 0, len(d) // 2), d)


def fitted(model: Trained, *, depth: int, steps: int, seed: int) -> RotatedDiagonal:
    """``fit_inverse`` on Gaussian probes s and ``y = H s``.

    The least squares behind it need as many pairs as parameters: as many products as the exact Hessian. What is saved
    is its use: memory and time of a product are O(n log n), and damping, inverse and samples are closed forms.
    """
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(model.train.n * 11 // 10, model.train.n, generator=generator, dtype=torch.float64)
    pairs = [(s, model.train.product(model.theta, s))]
    return fit_inverse(pairs, FitOptions(depth=depth, steps=steps)).operator


def probed(model: Trained, *, seed: int) -> DirectSum:
    """``SecantEstimate`` of every weight and bias on few probes: no matrix of order n anywhere."""
    generator = torch.Generator().manual_seed(seed)
    estimates = [SecantEstimate(shape, dtype=torch.float64) for shape in model.train.shapes]
    for _ in range(PROBES):
        s = torch.randn(model.train.n, generator=generator, dtype=torch.float64)
        y = model.train.product(model.theta, s[None])[0]
        pieces = zip(estimates, model.train.parameters(s), model.train.parameters(y), strict=True)
        for estimate, ds, dy in pieces:
            estimate.update(ds, dy)
    return DirectSum([((), estimate.inverse_hessian()) for estimate in estimates])


def from_optimizer(model: Trained, *, steps: int = 100) -> DirectSum | RotatedDiagonal:
    """What training with ``Butterfly`` leaves behind, for nothing: ``optimizer.inverse_hessian()``."""
    params = [param.clone().requires_grad_() for param in model.train.parameters(model.train.start(0))]
    optimizer = Butterfly(params, lr=0.7, betas=(0.5, 0.8), scaling="newton")
    for _ in range(steps):
        optimizer.zero_grad()
        model.train.loss(torch.cat([param.flatten() for param in params])).backward()
        optimizer.step()
    return optimizer.inverse_hessian()


def all_estimates(model: Trained, *, depth: int, steps: int, seed: int) -> dict[str, SymmetricOperator]:
    """Every source by name, the exact diagonal first."""
    return {
        "diagonal": diagonal(model.hessian),
        "Butterfly optimizer": from_optimizer(model),
        f"SecantEstimate, {PROBES} probes": probed(model, seed=seed),
        f"fit_inverse, depth {depth}": fitted(model, depth=depth, steps=steps, seed=seed),
    }

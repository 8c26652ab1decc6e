"""What the examples share: a trained classifier, and estimates of its inverse Hessian from several sources."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from butterfly_opt import Basis, Butterfly, RotatedDiagonal, fit_inverse, hessian_product, probe_inverse
from butterfly_opt.operators import SymmetricOperator
from experiments.paper_models import Objective, digits_objectives

PROBES = (30, 300)
"""Products with the Hessian that ``probed`` sees."""


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
    """``diag(1 / H_ii)``, from the exact Hessian: no rotation."""
    d = 1 / hessian.diagonal()
    return RotatedDiagonal(Basis(d.shape), d)


def fitted(model: Trained, *, block: int, lead: int, seed: int) -> RotatedDiagonal:
    """``fit_inverse`` on Gaussian probes s and ``y = H s``.

    The least squares behind it need as many pairs as parameters: as many products as the exact Hessian. What is saved
    is its use: memory and time of a product are O(n block), and damping, inverse and samples are closed forms.
    """
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(model.train.n * 11 // 10, model.train.n, generator=generator, dtype=torch.float64)
    pairs = [(s, model.train.product(model.theta, s))]
    return fit_inverse(pairs, block=block, lead=lead).operator


def probed(objective: Objective, theta: Tensor, *, probes: int, block: int, lead: int, seed: int) -> RotatedDiagonal:
    """``probe_inverse``: few products, no matrix of order n anywhere."""
    generator, point = torch.Generator().manual_seed(seed), theta.clone().requires_grad_()
    fit = probe_inverse(
        hessian_product(lambda: objective.loss(point), [point]),
        objective.n,
        probes=probes,
        block=block,
        lead=lead,
        generator=generator,
        dtype=theta.dtype,
    )
    return fit.operator


def from_optimizer(model: Trained, *, block: int, lead: int, steps: int = 100) -> RotatedDiagonal:
    """What training with ``Butterfly`` leaves behind, for nothing: the estimate of its quasi-Newton steps."""
    params = [param.clone().requires_grad_() for param in model.train.parameters(model.train.start(0))]
    optimizer = Butterfly(params, lr=1.0, diagonal="newton", structure="flat", block=block, lead=lead)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.train.loss(torch.cat([param.flatten() for param in params]))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    estimate = optimizer.inverse_hessian(params[0])
    assert isinstance(estimate, RotatedDiagonal)
    return estimate


def all_estimates(model: Trained, *, block: int, lead: int, seed: int) -> dict[str, SymmetricOperator]:
    """Every source by name, the exact diagonal first."""
    plan = {"block": block, "lead": lead}
    return {
        "diagonal": diagonal(model.hessian),
        "Butterfly optimizer": from_optimizer(model, **plan),
        **{f"probe_inverse, {k}": probed(model.train, model.theta, probes=k, **plan, seed=seed) for k in PROBES},
        "fit_inverse, radix 2": fitted(model, block=2, lead=2, seed=seed),
        "fit_inverse, wide": fitted(model, **plan, seed=seed),
    }

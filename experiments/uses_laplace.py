"""Laplace's approximation: samples of the posterior and the variance of predictions.

With N samples the posterior of the parameters is about ``N(theta, (N (H + lambda I))^-1)``, H the Hessian of the mean
loss with its regularisation ``l2``, whose prior precision is ``N l2`` (C. Bishop, *Pattern Recognition and Machine
Learning* (2006), section 4.5). The logits of a linear classifier are linear, so that their variance is ``j^T P j / N``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import nll_loss

from butterfly_opt.operators import SymmetricOperator
from experiments.uses_model import Trained, damped


@dataclasses.dataclass(frozen=True)
class LaplaceRow:
    """One posterior.

    Attributes:
        posterior: source of the inverse Hessian; "none" is the point estimate.
        rank_correlation: Spearman's coefficient of the logits' variances with the exact ones.
        ratio: median of variance over exact variance.
        loss: test log loss of the mean of the predicted probabilities, nats.
        accuracy: of the same prediction, a fraction.
    """

    posterior: str
    rank_correlation: float
    ratio: float
    loss: float
    accuracy: float


def jacobian(model: Trained) -> Tensor:
    """Derivatives of the test logits, ``(n, samples * classes)``."""
    flat = torch.func.jacrev(lambda theta: model.test.logits(theta, model.test.inputs).flatten())(model.theta)
    return flat.T


def predict(model: Trained, thetas: Tensor) -> tuple[float, float]:
    """Test log loss and accuracy of the mean probabilities over parameters ``(count, n)``."""
    logits = torch.func.vmap(lambda theta: model.test.logits(theta, model.test.inputs))(thetas)
    mean = logits.softmax(-1).mean(0)
    accuracy = (mean.argmax(1) == model.test.targets).double().mean().item()
    return nll_loss(mean.log(), model.test.targets).item(), accuracy


def draw(posterior: SymmetricOperator, model: Trained, count: int, seed: int) -> Tensor:
    """Samples ``(count, n)`` of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    return model.theta + posterior.sample((count,), generator=generator).double()


def laplace(
    model: Trained,
    estimates: Mapping[str, SymmetricOperator],
    *,
    damping: float = 0.0,
    samples: int = 200,
    seed: int = 0,
) -> list[LaplaceRow]:
    """Compares posteriors with the one of the exact Hessian; prints a Markdown table.

    Args:
        model: the classifier.
        estimates: by name, in units of the inverse Hessian of ``model.train``.
        damping: lambda.
        samples: of the parameters.
        seed: of the samples.
    """
    count = len(model.train.inputs)
    precision = count * (model.hessian + damping * torch.eye(model.train.n, dtype=torch.float64))
    covariance = torch.linalg.inv(precision)
    directions = jacobian(model)
    exact = (directions * (covariance @ directions)).sum(0)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(samples, model.train.n, generator=generator, dtype=torch.float64)
    rows = [
        LaplaceRow("none", float("nan"), float("nan"), *predict(model, model.theta[None])),
        LaplaceRow("exact", 1.0, 1.0, *predict(model, model.theta + normal @ torch.linalg.cholesky(covariance).T)),
    ]
    for name, estimate in estimates.items():
        posterior = damped(estimate, damping).map_eigenvalues(lambda d: d / count)
        variance = posterior.quadratic(directions).double()
        rank = float(spearmanr(variance, exact).statistic)
        ratio = (variance / exact).median().item()
        rows.append(LaplaceRow(name, rank, ratio, *predict(model, draw(posterior, model, samples, seed))))
    print(f"{len(exact)} test logits, {samples} samples of {model.train.n} parameters")
    print("| posterior | variance: rank correlation | median ratio | test log loss | test accuracy |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.posterior} | {row.rank_correlation:.3f} | {row.ratio:.2f} | {row.loss:.4f} | {row.accuracy:.2%} |"
        )
    return rows

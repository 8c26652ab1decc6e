"""Influence of training samples on test losses through ``(H + lambda I)^-1``.

Weighting training sample i by ``1 / N + e`` moves the loss of test sample t by ``-e g_t^T H^-1 g_i`` to first order
(P. W. Koh, P. Liang, *Understanding black-box predictions via influence functions*, arXiv:1703.04730, eq. 2). The
regularisation is part of H; lambda damps it further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor

from butterfly_opt.operators import SymmetricOperator
from experiments.uses_model import Trained, damped

TOP = 10


@dataclasses.dataclass(frozen=True)
class InfluenceRow:
    """One estimate at one damping, over the test samples.

    Attributes:
        estimate: its source.
        damping: lambda.
        rank_correlation: mean of Spearman's coefficient with the exact influences of all training samples.
        worst: its smallest value.
        top: mean share of the ten largest exact influences (absolute) among the ten largest estimated.
        relative_error: Frobenius norm over all pairs of samples.
    """

    estimate: str
    damping: float
    rank_correlation: float
    worst: float
    top: float
    relative_error: float


def compare(name: str, damping: float, found: Tensor, exact: Tensor) -> InfluenceRow:
    """Influences ``(test samples, training samples)`` against the exact ones."""
    ranks = [float(spearmanr(a, b).statistic) for a, b in zip(found, exact, strict=True)]
    best = [set(values.abs().topk(TOP).indices.tolist()) for values in (*found, *exact)]
    shared = [len(a & b) / TOP for a, b in zip(best[: len(found)], best[len(found) :], strict=True)]
    error = torch.linalg.norm(found - exact) / torch.linalg.norm(exact)
    return InfluenceRow(name, damping, sum(ranks) / len(ranks), min(ranks), sum(shared) / len(shared), error.item())


def influence(
    model: Trained,
    estimates: Mapping[str, SymmetricOperator],
    *,
    dampings: Sequence[float] = (0.0, 0.01, 0.1),
    samples: int = 50,
) -> list[InfluenceRow]:
    """Compares estimates of the inverse Hessian with the exact one; prints a Markdown table.

    Args:
        model: the classifier.
        estimates: by name, in units of the inverse Hessian of ``model.train``.
        dampings: values of lambda.
        samples: test samples, the first ones.
    """
    training = model.train.sample_gradients(model.theta)
    test = model.test.sample_gradients(model.theta)[:samples]
    eye = torch.eye(model.train.n, dtype=torch.float64)
    print(f"influence of {len(training)} training samples on {len(test)} test losses, {model.train.n} parameters")
    print("| damping | estimate | rank correlation, mean | worst | top 10 found | relative error |")
    print("|---|---|---|---|---|---|")
    rows = []
    for damping in dampings:
        exact = -test @ torch.linalg.solve(model.hessian + damping * eye, training.T)
        found = {"multiple of I": -test @ training.T / (model.hessian.diagonal().mean() + damping)}
        for name, estimate in estimates.items():
            found[name] = -test @ (damped(estimate, damping) @ training.T).double()
        for name, values in found.items():
            row = compare(name, damping, values, exact)
            rows.append(row)
            print(
                f"| {damping:g} | {name} | {row.rank_correlation:.3f} | {row.worst:.3f} | {row.top:.0%} | "
                f"{row.relative_error:.2f} |"
            )
    return rows

"""Covariance of real images: butterflies, the diagonal, low rank plus diagonal of equal size, and the full matrix.

The second use of M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014). All models are fitted to one matrix, the covariance
of the training images after shrinkage, so that they differ only in what they can represent. Beside each butterfly
stand factors with as many free numbers as it has angles. (It stores matrices, two to four numbers an angle.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import ConfigError, DatasetConfig
from experiments.data import load_dataset
from experiments.paper_files import (
    ORANGE,
    PLAN_STYLES,
    VERMILION,
    add_legend,
    check_at_least,
    new_figure,
    save_figure,
    write_rows,
)
from experiments.paper_plans import PlanConfig, check_plans


@dataclasses.dataclass(frozen=True)
class CovarianceConfig:
    """What is fitted.

    Attributes:
        dataset: the images.
        plans: butterflies by name; the ranks beside them follow.
        patch: side of square patches cut at random places, one an image; 0 takes whole images.
        train_samples: images of the training split, all if there are fewer.
        test_samples: images of the test split, all if there are fewer.
        shrinkage: a number from 0 to 1: ``(1 - shrinkage) C + shrinkage tr(C) / n I`` is fitted.
        oas: choose the shrinkage as scikit-learn's ``OAS``.
        seed: of the choice of images and patches.
    """

    dataset: DatasetConfig
    plans: dict[str, PlanConfig]
    patch: int = 0
    train_samples: int = 20_000
    test_samples: int = 10_000
    shrinkage: float = 0.0
    oas: bool = False
    seed: int = 0
    run_dir: str | None = None

    def __post_init__(self) -> None:
        check_plans(self.plans)
        check_at_least(0, patch=self.patch, seed=self.seed)
        check_at_least(2, train_samples=self.train_samples, test_samples=self.test_samples)
        if not 0.0 <= self.shrinkage <= 1.0:
            raise ConfigError(f"shrinkage must be from 0 to 1, got {self.shrinkage}")
        if self.oas and self.shrinkage:
            raise ConfigError(f"oas=true chooses the shrinkage: leave out shrinkage={self.shrinkage}")


@dataclasses.dataclass(frozen=True)
class CovarianceRow:
    """One model. ``rank`` is that of the factors, else 0; ``numbers`` are those free beside the mean.

    ``error`` is relative, in the Frobenius norm; log-likelihoods are nats an image (patch).
    """

    model: str
    rank: int
    numbers: int
    error: float
    train_log_likelihood: float
    test_log_likelihood: float
    seconds: float


def image_vectors(config: CovarianceConfig) -> tuple[Tensor, Tensor]:
    """Training and test vectors ``(count, n)``, float64, pixels from 0 to 1, channel by channel and row by row."""
    data = load_dataset(config.dataset)
    generator = torch.Generator().manual_seed(config.seed)
    vectors = []
    for split, count in ((data.train, config.train_samples), (data.test, config.test_samples)):
        images = split.images[torch.randperm(len(split.images), generator=generator)[:count]]
        if config.patch:
            side = config.patch
            if side > min(images.shape[2:]):
                raise ConfigError(f"patch must be at most {min(images.shape[2:])}, the side of the images, got {side}")
            windows = images.unfold(2, side, 1).unfold(3, side, 1)
            rows = torch.randint(windows.shape[2], (len(images),), generator=generator)
            columns = torch.randint(windows.shape[3], (len(images),), generator=generator)
            images = windows[torch.arange(len(images)), :, rows, columns]
        vectors.append(images.flatten(1).double() / data.max_value)
    return vectors[0], vectors[1]


def log_likelihood(centred: Tensor, covariance: Tensor) -> float:
    """Mean of ``log N(x; 0, covariance)`` over the rows, in nats, through Cholesky."""
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, centred.T, upper=False)
    n = len(covariance)
    logdet = 2 * factor.diagonal().log().sum()
    return (-0.5 * (n * math.log(2 * math.pi) + logdet + whitened.square().sum(0).mean())).item()


def factor_analysis(covariance: Tensor, rank: int) -> Tensor:
    """``W W^T + diag(psi)`` of the largest likelihood (scikit-learn's ``FactorAnalysis``), for a given covariance."""
    from sklearn.decomposition import FactorAnalysis
    from sklearn.exceptions import ConvergenceWarning

    # Rows +-sqrt(n) R with R R = covariance have mean zero and exactly this covariance.
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * (len(values) * values.clamp_min(0)).sqrt()) @ vectors.T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = FactorAnalysis(rank, max_iter=300, random_state=0).fit(torch.cat((root, -root)).numpy())
    return torch.from_numpy(model.get_covariance())


def principal_components(covariance: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors, and the diagonal of what they leave."""
    values, vectors = torch.linalg.eigh(covariance)
    leading = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    return leading + torch.diag((covariance - leading).diagonal())


def factor_numbers(n: int, rank: int) -> int:
    """Free numbers of factors ``(n, rank)``, which are known up to a rotation."""
    return n * rank - rank * (rank - 1) // 2


def equal_rank(n: int, angles: int) -> int:
    """The rank whose factors have as many free numbers, as nearly as may be."""
    return min(range(1, n), key=lambda rank: abs(factor_numbers(n, rank) - angles))


def _models(covariance: Tensor, config: CovarianceConfig) -> Iterator[tuple[str, int, int, Callable[[], Tensor]]]:
    """Name, rank of the factors, free numbers, and what computes the dense matrix."""
    n = len(covariance)
    yield "diagonal", 0, n, lambda: torch.diag(covariance.diagonal())
    for name, plan in config.plans.items():
        yield name, 0, plan.angles(n) + n, lambda p=plan: p.fit(covariance).to_dense()  # type: ignore[misc]
    for rank in sorted({equal_rank(n, plan.angles(n)) for plan in config.plans.values()}):
        numbers = factor_numbers(n, rank) + n
        yield "factor analysis", rank, numbers, lambda r=rank: factor_analysis(covariance, r)  # type: ignore[misc]
        yield "PCA + diagonal", rank, numbers, lambda r=rank: principal_components(covariance, r)  # type: ignore[misc]
    yield "full", n, n * (n + 1) // 2, lambda: covariance


def run(config: CovarianceConfig, folder: Path) -> list[CovarianceRow]:
    """Fits all models, writes ``covariance.csv`` and the figure; prints a Markdown table."""
    from sklearn.covariance import oas

    train, test = image_vectors(config)
    mean = train.mean(0)
    train, test = train - mean, test - mean
    n = train.shape[1]
    sample_covariance = train.T @ train / len(train)
    amount = float(oas(train.numpy(), assume_centered=True)[1]) if config.oas else config.shrinkage
    target = sample_covariance.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    covariance = (1 - amount) * sample_covariance + amount * target
    print(f"{len(train)} training and {len(test)} test vectors of {n} coordinates, shrinkage {amount:.3g}")
    print("| model | rank | free numbers | relative error | train log-likelihood | test log-likelihood |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, size, numbers, build in _models(covariance, config):
        begin = time.perf_counter()
        dense = build()
        seconds = time.perf_counter() - begin
        error = (torch.linalg.norm(dense - covariance) / torch.linalg.norm(covariance)).item()
        scores = [log_likelihood(vectors, dense) for vectors in (train, test)]
        rows.append(CovarianceRow(name, size, numbers, error, scores[0], scores[1], round(seconds, 3)))
        print(f"| {name} | {size} | {numbers} | {error:.3f} | {scores[0]:.1f} | {scores[1]:.1f} |", flush=True)
        write_rows(folder / "covariance.csv", rows)
    draw(config, rows, folder)
    return rows


STYLES: dict[str, dict[str, Any]] = {
    "diagonal": {"color": "0.5", "marker": "x"},
    "factor analysis": {"color": VERMILION, "marker": "^"},
    "PCA + diagonal": {"color": ORANGE, "marker": "v", "linestyle": "--"},
    "full": {"color": "0.5", "marker": "*"},
}


def draw(config: CovarianceConfig, rows: list[CovarianceRow], folder: Path) -> None:
    """Error and held-out log-likelihood against the free numbers."""
    figure, axes = new_figure(1, 2, width=7.6, height=3.8)
    panels = (
        ("error", r"$\|C - A\|_F \;/\; \|C\|_F$"),
        ("test_log_likelihood", "held-out log-likelihood (nats per image)"),
    )
    if config.patch:
        panels = (panels[0], (panels[1][0], "held-out log-likelihood (nats per patch)"))
    for axis, (field, label) in zip(axes[0], panels, strict=True):
        for name, style in (STYLES | dict(zip(config.plans, itertools.cycle(PLAN_STYLES), strict=False))).items():
            chosen = [row for row in rows if row.model == name]
            points = ([row.numbers for row in chosen], [getattr(row, field) for row in chosen])
            axis.plot(*points, label=name, markersize=5, linewidth=1.2, clip_on=False, zorder=3, **style)
        axis.set(xscale="log")
        axis.set_xlabel("free numbers beside the mean", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
    axes[0, 0].set_ylim(bottom=0)
    source = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "folder": Path(config.dataset.root).name}
    what = f"{config.patch} x {config.patch} patches" if config.patch else "images"
    figure.suptitle(f"Covariance of {what}: {source[config.dataset.name]}", fontsize=9)
    add_legend(figure, axes, columns=4)
    save_figure(figure, folder, "covariance")

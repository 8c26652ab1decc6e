"""Synthetic symmetric matrices: relative error of ``Q diag(d) Q^T`` against angle steps, depth and size.

The first experiment of M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014), section 4. Every point is a fit of its own,
with the steps shrinking to zero at its own end.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from butterfly_opt import FitOptions, RotatedDiagonal, fit_symmetric
from butterfly_opt.rotation import angles_shape, num_stages
from experiments.config import ConfigError, near_matches
from experiments.paper_files import (
    DEPTH_STYLES,
    add_legend,
    check_at_least,
    new_figure,
    save_figure,
    write_rows,
)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What is fitted.

    Attributes:
        families: names in ``FAMILIES``.
        sizes: orders n for the error against n, with ``steps`` angle steps.
        depths: butterflies multiplied with one another.
        steps: angle steps for the error against n.
        budgets: angle steps for the error against steps, at order ``budget_size`` and ``budget_depths``.
        lr: length of the first angle step in radians.
        seeds: of the matrices; the median is drawn.
    """

    families: list[str]
    sizes: list[int]
    depths: list[int]
    steps: int
    budgets: list[int]
    budget_size: int
    budget_depths: list[int]
    lr: float = 0.2
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    run_dir: str | None = None

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise ConfigError(f"unknown family '{name}'{near_matches(name, FAMILIES)}")
        check_at_least(2, sizes=self.sizes, budget_size=self.budget_size)
        check_at_least(1, depths=self.depths, budget_depths=self.budget_depths)
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        check_at_least(0, steps=self.steps, budgets=self.budgets, seeds=self.seeds)


@dataclasses.dataclass(frozen=True)
class SyntheticRow:
    """One fit. ``angles`` is their number; errors are in the Frobenius norm, over that of the matrix."""

    study: str
    family: str
    n: int
    depth: int
    steps: int
    seed: int
    angles: int
    error: float
    diagonal_error: float
    seconds: float


def _spectrum(n: int, generator: torch.Generator) -> Tensor:
    """1 ... 1e-3, evenly on a logarithmic scale, in random order."""
    return torch.logspace(0, -3, n)[torch.randperm(n, generator=generator)]


def _butterflies(depth: int) -> Callable[[int, torch.Generator], Tensor]:
    def build(n: int, generator: torch.Generator) -> Tensor:
        angles = 2 * torch.pi * torch.rand(angles_shape(n, depth=depth), generator=generator)
        return RotatedDiagonal.from_angles(angles, _spectrum(n, generator)).to_dense()

    return build


def haar(n: int, generator: torch.Generator) -> Tensor:
    """An eigenbasis drawn from the Haar measure: n (n - 1) / 2 angles, of which a butterfly has n log2(n) / 2."""
    # The QR decomposition of a Gaussian matrix, but for signs, which a symmetric matrix does not show.
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    return (basis * _spectrum(n, generator)) @ basis.T


def low_rank(n: int, generator: torch.Generator) -> Tensor:
    """Random directions, n / 8 of them, with eigenvalues 1 ... 0.5, plus noise of spectral norm about 0.04."""
    rank = max(1, n // 8)
    basis = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    noise = torch.randn(n, n, generator=generator) / (2 * n) ** 0.5
    return (basis * torch.linspace(1, 0.5, rank)) @ basis.T + 0.02 * (noise + noise.T)


FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "planted": _butterflies(1),
    "stacked": _butterflies(2),
    "low_rank": low_rank,
    "haar": haar,
}
TITLES = {
    "planted": "planted butterfly",
    "stacked": "two planted, stacked",
    "low_rank": "low rank + noise",
    "haar": "random eigenbasis",
}


def _fit(study: str, family: str, n: int, depth: int, steps: int, seed: int, lr: float) -> SyntheticRow:
    matrix = FAMILIES[family](n, torch.Generator().manual_seed(seed))
    matrix = (matrix + matrix.T) / 2
    begin = time.perf_counter()
    # No early stop: the error is asked for at exactly so many steps.
    fit = fit_symmetric(matrix, FitOptions(depth=depth, steps=steps, lr=lr, tolerance=0.0))
    seconds = time.perf_counter() - begin
    diagonal = torch.linalg.norm(matrix - torch.diag(matrix.diagonal())) / torch.linalg.norm(matrix)
    angles = depth * sum(_pairs(n, stage) for stage in range(num_stages(n)))
    return SyntheticRow(study, family, n, depth, steps, seed, angles, fit.error, diagonal.item(), round(seconds, 3))


def _pairs(n: int, stage: int) -> int:
    """Pairs of a stage: coordinates with bit ``stage`` clear whose partner exists."""
    return sum(1 for i in range(n - (1 << stage)) if not i >> stage & 1)


def run(config: SyntheticConfig, folder: Path) -> list[SyntheticRow]:
    """Fits everything, writes ``synthetic.csv`` and the figure; prints a line for each size and family."""
    tasks = [
        ("steps", family, config.budget_size, depth, steps, seed)
        for family in config.families
        for depth in config.budget_depths
        for steps in config.budgets
        for seed in config.seeds
    ] + [
        ("size", family, n, depth, config.steps, seed)
        for n in config.sizes
        for family in config.families
        for depth in config.depths
        for seed in config.seeds
    ]
    rows = []
    for task in tasks:
        rows.append(_fit(*task, config.lr))
        row = rows[-1]
        print(
            f"{row.family}, n {row.n}, depth {row.depth}, {row.steps} steps: error {row.error:.3g}, diagonal only "
            f"{row.diagonal_error:.3g} ({row.seconds:.1f} s)",
            flush=True,
        )
        write_rows(folder / "synthetic.csv", rows)
    draw(config, rows, folder)
    return rows


def _median(rows: list[SyntheticRow], name: str) -> float:
    return torch.tensor([getattr(row, name) for row in rows]).median().item()


def draw(config: SyntheticConfig, rows: list[SyntheticRow], folder: Path) -> None:
    """Small multiples: error against angle steps (above) and against n (below), one column a family."""
    figure, axes = new_figure(2, len(config.families), width=2.2 * len(config.families) + 0.6, height=4.6, sharey=True)
    all_depths = sorted({*config.depths, *config.budget_depths})
    for column, family in enumerate(config.families):
        for line, (study, key, depths, values) in enumerate(
            (("steps", "steps", config.budget_depths, config.budgets), ("size", "n", config.depths, config.sizes))
        ):
            axis = axes[line, column]
            chosen = [row for row in rows if row.family == family and row.study == study]
            for depth in depths:
                points = [
                    _median([row for row in chosen if row.depth == depth and getattr(row, key) == value], "error")
                    for value in values
                ]
                style = DEPTH_STYLES[all_depths.index(depth) % len(DEPTH_STYLES)]
                axis.plot(values, points, label=f"depth {depth}", markersize=3.5, linewidth=1.2, **style)
            flat = [
                _median([row for row in chosen if getattr(row, key) == value], "diagonal_error") for value in values
            ]
            axis.plot(values, flat, color="0.5", linestyle="--", linewidth=1.0, label="diagonal only")
            axis.set_ylim(-0.04, 1.04)
        axes[0, column].set_xscale("symlog", linthresh=10, linscale=0.5)
        axes[0, column].set_xlim(left=-1)
        axes[0, column].set_xlabel(f"angle steps (n = {config.budget_size})", fontsize=8)
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xlabel(f"order n ({config.steps} angle steps)", fontsize=8)
        axes[0, column].set_title(TITLES[family], fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\|A - Q\,\mathrm{diag}(d)\,Q^T\|_F \;/\; \|A\|_F$", fontsize=8)
    add_legend(figure, axes, columns=len(all_depths) + 1)
    save_figure(figure, folder, "synthetic")

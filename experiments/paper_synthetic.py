"""Synthetic symmetric matrices: relative error of ``Q diag(d) Q^T`` against rotations in a row, and against size.

The first experiment of M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014), section 4, with the paper's butterfly and wide
ones. Fits are closed forms; each rotation is fitted to what the ones before it leave.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from butterfly_opt import Rotation, fit_symmetric
from butterfly_opt.rotation import orthogonalize
from experiments.config import ConfigError, near_matches
from experiments.paper_files import PLAN_STYLES, add_legend, check_at_least, new_figure, save_figure, write_rows
from experiments.paper_plans import PlanConfig, check_plans


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What is fitted.

    Attributes:
        families: names in ``FAMILIES``.
        plans: butterflies by name.
        sizes: orders n for the error against n.
        row_size: order for the error against rotations in a row, of plans that have a single one.
        rotations: how many in a row, at most.
        seeds: of the matrices; the median is drawn.
    """

    families: list[str]
    plans: dict[str, PlanConfig]
    sizes: list[int]
    row_size: int
    rotations: int
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    run_dir: str | None = None

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise ConfigError(f"unknown family '{name}'{near_matches(name, FAMILIES)}")
        check_plans(self.plans)
        check_at_least(2, sizes=self.sizes, row_size=self.row_size)
        check_at_least(1, rotations=self.rotations)
        check_at_least(0, seeds=self.seeds)


@dataclasses.dataclass(frozen=True)
class SyntheticRow:
    """One fit. ``angles`` is their number; errors are in the Frobenius norm, over that of the matrix.

    ``seconds`` is the time of the whole call, for ``study`` "rotations" of all of them together.
    """

    study: str
    family: str
    n: int
    plan: str
    rotations: int
    seed: int
    angles: int
    error: float
    diagonal_error: float
    seconds: float


def _spectrum(n: int, generator: torch.Generator) -> Tensor:
    """1 ... 1e-3, evenly on a logarithmic scale, in random order."""
    return torch.logspace(0, -3, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]


def planted(block: int, lead: int, rotations: int = 1) -> Callable[[int, torch.Generator], Tensor]:
    """Matrices whose eigenbasis is a butterfly, every group a random orthogonal matrix."""

    def build(n: int, generator: torch.Generator) -> Tensor:
        matrix = torch.diag(_spectrum(n, generator))
        for _ in range(rotations):
            rotation = Rotation.identity(n, block=block, lead=lead, dtype=torch.float64)
            for view in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
                view.copy_(orthogonalize(torch.randn(view.shape, generator=generator, dtype=torch.float64)))
            basis = rotation.dense()[0]
            matrix = basis @ matrix @ basis.T
        return matrix

    return build


def haar(n: int, generator: torch.Generator) -> Tensor:
    """An eigenbasis drawn from the Haar measure: n (n - 1) / 2 angles; radix 2 has n log2(n) / 2."""
    # The QR decomposition of a Gaussian matrix, but for signs, which a symmetric matrix does not show.
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (basis * _spectrum(n, generator)) @ basis.T


def low_rank(n: int, generator: torch.Generator) -> Tensor:
    """Random directions, n / 8 of them, with eigenvalues 1 ... 0.5, plus noise of spectral norm about 0.04."""
    rank = max(1, n // 8)
    basis = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64) / (2 * n) ** 0.5
    return (basis * torch.linspace(1, 0.5, rank, dtype=torch.float64)) @ basis.T + 0.02 * (noise + noise.T)


FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "planted": planted(2, 2),
    "stacked": planted(2, 2, rotations=2),
    "wide": planted(64, 16),
    "low_rank": low_rank,
    "haar": haar,
}
TITLES = {
    "planted": "planted, radix 2",
    "stacked": "two of radix 2, stacked",
    "wide": "planted, (64, 16)",
    "low_rank": "low rank + noise",
    "haar": "random eigenbasis",
}


def _fit(family: str, n: int, plan: PlanConfig, seed: int) -> tuple[list[float], float]:
    """Errors after each rotation, from none on, and seconds."""
    matrix = FAMILIES[family](n, torch.Generator().manual_seed(seed))
    matrix = (matrix + matrix.T) / 2
    begin = time.perf_counter()
    fit = fit_symmetric(matrix, **dataclasses.asdict(plan))
    return fit.errors, round(time.perf_counter() - begin, 3)


def run(config: SyntheticConfig, folder: Path) -> list[SyntheticRow]:
    """Fits everything, writes ``synthetic.csv`` and the figure; prints a line a fit."""
    tasks = [("rotations", family, config.row_size) for family in config.families]
    tasks += [("size", family, n) for n in config.sizes for family in config.families]
    rows: list[SyntheticRow] = []
    for study, family, n in tasks:
        in_a_row = study == "rotations"
        for name, plan in config.plans.items():
            if in_a_row and plan.rotations > 1:
                continue
            used = dataclasses.replace(plan, rotations=config.rotations) if in_a_row else plan
            for seed in config.seeds:
                errors, seconds = _fit(family, n, used, seed)
                for count in range(len(errors)) if in_a_row else [used.rotations]:
                    angles = count * used.angles(n) // used.rotations
                    own = (count, seed, angles, errors[count], errors[0], seconds)
                    rows.append(SyntheticRow(study, family, n, name, *own))
                print(
                    f"{family}, n {n}, {name}, {used.rotations} in a row: error {errors[-1]:.3g}, diagonal only "
                    f"{errors[0]:.3g} ({seconds:.1f} s)",
                    flush=True,
                )
        write_rows(folder / "synthetic.csv", rows)
    draw(config, rows, folder)
    return rows


def _medians(rows: list[SyntheticRow], key: str, field: str) -> tuple[list[int], list[float]]:
    values = sorted({getattr(row, key) for row in rows})
    chosen = [torch.tensor([getattr(row, field) for row in rows if getattr(row, key) == value]) for value in values]
    return values, [errors.median().item() for errors in chosen]


def draw(config: SyntheticConfig, rows: list[SyntheticRow], folder: Path) -> None:
    """Small multiples: error against rotations in a row (above) and against n (below), one column a family."""
    figure, axes = new_figure(2, len(config.families), width=2.0 * len(config.families) + 0.6, height=4.6, sharey=True)
    for column, family in enumerate(config.families):
        for axis, (study, key) in zip(axes[:, column], (("rotations", "rotations"), ("size", "n")), strict=True):
            shown = [row for row in rows if row.family == family and row.study == study]
            for index, name in enumerate(config.plans):
                if not any(row.plan == name for row in shown):
                    continue
                points = _medians([row for row in shown if row.plan == name], key, "error")
                axis.plot(*points, label=name, markersize=3.5, linewidth=1.2, **PLAN_STYLES[index % len(PLAN_STYLES)])
            flat = _medians(shown, key, "diagonal_error")
            axis.plot(*flat, color="0.5", linestyle="--", linewidth=1.0, label="diagonal only")
            axis.set_ylim(-0.04, 1.04)
        axes[0, column].set_xlabel(f"rotations (n = {config.row_size})", fontsize=8)
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xlabel("order n", fontsize=8)
        axes[0, column].set_title(TITLES[family], fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\|A - Q\,\mathrm{diag}(d)\,Q^T\|_F \;/\; \|A\|_F$", fontsize=8)
    add_legend(figure, axes, columns=len(config.plans) + 1)
    save_figure(figure, folder, "synthetic")

"""Tracking the Hessian along an optimisation: butterflies against dense BFGS, L-BFGS and diagonals.

The third use of M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014). Adam takes mini-batch steps on a small classifier of
digits. After each step every estimate sees one pair ``(s, y)``, the same for all: of the path, the step and the change
of the full gradient; or a probe, a Gaussian s and ``y = H s``, at the cost of one Hessian-vector product. Beside them,
what does not track: ``probe_inverse`` made anew at the present point, from as many products as they have had so far. At
some steps all are judged by the exact Hessian H (autograd, float64). H of a network is indefinite: the reference is
``(|H| + damping I)^-1``, |H| with the absolute eigenvalues, and an estimate P is damped likewise,
``(P^-1 + damping I)^-1``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import BFGS, LbfgsInvHessProduct
from torch import Tensor

from butterfly_opt import SecantEstimate, probe_inverse
from experiments.config import ConfigError
from experiments.paper_files import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    add_legend,
    check_at_least,
    new_figure,
    save_figure,
    write_rows,
)
from experiments.paper_models import Objective, digits_objectives
from experiments.paper_plans import PlanConfig

MEMORY = 10
"""Pairs that L-BFGS keeps."""
PAIRS = {"path": "path pairs", "probes": "probes"}
PROBED = "probe_inverse, anew"
Pairs = dict[str, tuple[Tensor, Tensor]]
CURVATURE = 1e-8
"""BFGS skips a pair whose ``s y`` is below this, relative to ``|s| |y|``."""


@dataclasses.dataclass(frozen=True)
class ProblemConfig:
    """A classifier: hidden widths (none: logistic regression), regularisation, damping of the inverse, Adam's rate."""

    l2: float
    damping: float
    lr: float
    hidden: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class HessianConfig:
    """What is tracked.

    Attributes:
        problems: by name.
        checkpoints: steps at which the estimates are judged, ascending; the last one ends the run.
        batch_size: of Adam's steps; pairs are of the full batch.
        block: of the tracked butterflies, coordinates of a group.
        lead: of the same, outputs of a group that go on.
        plans: butterflies fitted to the exact Hessian, by name.
        seed: of the weights, batches and probes.
    """

    problems: dict[str, ProblemConfig]
    checkpoints: list[int]
    batch_size: int = 128
    block: int = 64
    lead: int = 16
    plans: dict[str, PlanConfig] = dataclasses.field(default_factory=dict)
    seed: int = 0
    run_dir: str | None = None

    def __post_init__(self) -> None:
        check_at_least(1, checkpoints=self.checkpoints, batch_size=self.batch_size)
        PlanConfig(self.block, self.lead)
        if self.lead == self.block:
            raise ConfigError(f"pairs need lead < block, got lead = block = {self.block}")
        check_at_least(0, seed=self.seed)
        if sorted(set(self.checkpoints)) != self.checkpoints:
            raise ConfigError(f"checkpoints must be ascending, got {self.checkpoints}")
        for name, problem in self.problems.items():
            check_at_least(0, **{f"problems.{name}.l2": problem.l2, f"problems.{name}.damping": problem.damping})
            if not problem.lr > 0:
                raise ConfigError(f"problems.{name}.lr must be above 0, got {problem.lr}")


@dataclasses.dataclass(frozen=True)
class HessianRow:
    """One estimate at one step. ``relative_error`` is in the Frobenius norm; ``condition`` is that of ``P H``, damped.

    ``pairs`` is "path", "probes", or "exact" for what is made from H itself; ``smallest`` and ``largest`` are
    eigenvalues of H.
    """

    problem: str
    step: int
    pairs: str
    method: str
    relative_error: float
    condition: float
    loss: float
    smallest: float
    largest: float


class _Secant:
    """Butterflies for parts of the flat vector, each reshaped."""

    def __init__(self, shapes: Sequence[torch.Size], *, block: int, lead: int) -> None:
        self.shapes = shapes
        self.parts = [SecantEstimate(shape, block=block, lead=lead, dtype=torch.float64) for shape in shapes]

    def update(self, s: Tensor, y: Tensor) -> None:
        sizes = [shape.numel() for shape in self.shapes]
        for part, shape, ds, dy in zip(self.parts, self.shapes, s.split(sizes), y.split(sizes), strict=True):
            part.update(ds.view(shape), dy.view(shape))

    def dense(self) -> Tensor:
        return torch.block_diag(*(part.inverse_hessian().to_dense() for part in self.parts))


class _Diagonal:
    """``sqrt(sum y^2 / sum s^2)`` of each coordinate, every pair at weight 1: what the others add counts as noise."""

    def __init__(self, n: int) -> None:
        self.sums = torch.zeros(2, n, dtype=torch.float64)

    def update(self, s: Tensor, y: Tensor) -> None:
        self.sums += torch.stack((s, y)).square() / s.square().sum()

    def dense(self) -> Tensor:
        moved = (self.sums > 0).all(0)  # pixels that are zero everywhere may have no gradient
        h = torch.where(moved, self.sums[1] / self.sums[0], self.sums[1].sum() / self.sums[0].sum()).sqrt()
        return torch.diag(1 / h)


class _DenseBFGS:
    """``scipy.optimize.BFGS``, which scales its start by the first pair."""

    def __init__(self, n: int) -> None:
        self.strategy = BFGS(exception_strategy="skip_update", min_curvature=CURVATURE)
        self.strategy.initialize(n, "inv_hess")

    def update(self, s: Tensor, y: Tensor) -> None:
        if s @ y > CURVATURE * s.norm() * y.norm():
            self.strategy.update(s.numpy(), y.numpy())

    def dense(self) -> Tensor:
        matrix = torch.as_tensor(self.strategy.get_matrix())
        return (matrix + matrix.T) / 2


class _LimitedBFGS:
    """The last pairs, from ``gamma I`` (J. Nocedal, S. Wright, *Numerical Optimization* (2006), eq. 7.20)."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, s: Tensor, y: Tensor) -> None:
        if s @ y > CURVATURE * s.norm() * y.norm():
            self.pairs = [*self.pairs[-MEMORY + 1 :], (s, y)]

    def dense(self) -> Tensor:
        if not self.pairs:
            return torch.eye(self.n, dtype=torch.float64)
        S, Y = (torch.stack(vectors) for vectors in zip(*self.pairs, strict=True))
        gamma = (S[-1] @ Y[-1] / Y[-1].square().sum()).item()
        # scipy starts from I: gamma times the recursion for displacements s / gamma is the one from gamma I.
        matrix = gamma * torch.from_numpy(LbfgsInvHessProduct((S / gamma).numpy(), Y.numpy()).todense())
        return (matrix + matrix.T) / 2


def new_trackers(objective: Objective, config: HessianConfig) -> dict[str, Any]:
    """Everything that learns from pairs: ``update(s, y)``, ``dense()``."""
    plan = {"block": config.block, "lead": config.lead}
    return {
        "butterfly, layers": _Secant(objective.shapes, **plan),
        "butterfly, flat": _Secant([torch.Size((objective.n,))], **plan),
        "diagonal": _Diagonal(objective.n),
        "L-BFGS": _LimitedBFGS(objective.n),
        "dense BFGS": _DenseBFGS(objective.n),
    }


def path(objective: Objective, problem: ProblemConfig, config: HessianConfig) -> Iterator[tuple[int, Tensor, Pairs]]:
    """Adam on mini-batches drawn with replacement; yields after each step its number, theta and the pairs by kind."""
    generator = torch.Generator().manual_seed(config.seed)
    theta = objective.start(config.seed)
    optimizer = torch.optim.Adam([theta], lr=problem.lr)
    gradient = objective.gradient(theta)
    for step in range(1, config.checkpoints[-1] + 1):
        rows = torch.randint(len(objective.inputs), (config.batch_size,), generator=generator)
        before, gradient_before = theta.clone(), gradient
        theta.grad = objective.gradient(theta, rows)
        optimizer.step()
        gradient = objective.gradient(theta)
        probe = torch.randn(objective.n, generator=generator, dtype=theta.dtype)
        product = objective.product(theta, probe[None])[0]
        yield step, theta, {"path": (theta - before, gradient - gradient_before), "probes": (probe, product)}


def judge(estimate: Tensor, values: Tensor, vectors: Tensor, damping: float) -> tuple[float, float]:
    """Relative error of a damped estimate of ``(|H| + damping)^-1``, and the condition of their quotient.

    Args:
        estimate: P, positive definite, ``(n, n)``.
        values: ``|h| + damping`` of the Hessian, ``(n,)``.
        vectors: its eigenvectors, ``(n, n)``.
        damping: of P.
    """
    own, basis = torch.linalg.eigh(estimate)
    damped = (basis * (own / (1 + damping * own))) @ basis.T
    inverse = (vectors / values) @ vectors.T
    error = torch.linalg.norm(damped - inverse) / torch.linalg.norm(inverse)
    root = vectors * values.sqrt()
    spectrum = torch.linalg.eigvalsh(root.T @ damped @ root)
    return error.item(), (spectrum[-1] / spectrum[0]).item() if spectrum[0] > 0 else float("inf")


def fitted(name: str) -> str:
    """What the butterfly ``name`` fitted to the exact Hessian is called."""
    return f"{name} fitted to H"


def _references(absolute: Tensor, config: HessianConfig) -> dict[str, Tensor]:
    """What no tracker can know: made from ``|H|`` itself."""
    n = len(absolute)
    inverse = torch.linalg.inv(absolute)
    return {
        "multiple of I": inverse.trace() / n * torch.eye(n, dtype=absolute.dtype),
        "exact diagonal": torch.diag(1 / absolute.diagonal()),
        **{fitted(name): plan.fit(absolute).inverse().to_dense() for name, plan in config.plans.items()},
    }


def _judge_all(
    name: str,
    step: int,
    objective: Objective,
    theta: Tensor,
    learned: Mapping[str, Mapping[str, Any]],
    config: HessianConfig,
) -> list[HessianRow]:
    damping = config.problems[name].damping
    h, vectors = torch.linalg.eigh(objective.hessian(theta))
    values = h.abs() + damping
    # The references are of the damped matrix: they need no damping of their own.
    references = _references((vectors * values) @ vectors.T, config)
    candidates = [("exact", method, P, 0.0) for method, P in references.items()]
    generator = torch.Generator().manual_seed(config.seed)
    probed = probe_inverse(
        lambda columns: objective.product(theta, columns.T).T,
        objective.n,
        probes=step,
        block=config.block,
        lead=config.lead,
        generator=generator,
        dtype=theta.dtype,
    )
    candidates.append(("probes", PROBED, probed.operator.to_dense(), damping))
    candidates += [
        (kind, method, tracker.dense(), damping)
        for kind, trackers in learned.items()
        for method, tracker in trackers.items()
    ]
    loss = objective.loss(theta).item()
    rows = []
    for kind, method, P, own_damping in candidates:
        error, condition = judge(P, values, vectors, own_damping)
        rows.append(HessianRow(name, step, kind, method, error, condition, loss, h[0].item(), h[-1].item()))
        print(f"| {name} | {step} | {kind} | {method} | {error:.3f} | {condition:.1f} |", flush=True)
    return rows


def run(config: HessianConfig, folder: Path) -> list[HessianRow]:
    """Tracks every problem, writes ``hessian.csv`` and the figure; prints a Markdown table."""
    rows: list[HessianRow] = []
    print("| problem | step | pairs | estimate | relative error of the inverse | condition of P H |")
    print("|---|---|---|---|---|---|")
    for name, problem in config.problems.items():
        objective, _ = digits_objectives(hidden=problem.hidden, l2=problem.l2)
        learned = {kind: new_trackers(objective, config) for kind in PAIRS}
        for step, theta, pairs in path(objective, problem, config):
            for kind, trackers in learned.items():
                for tracker in trackers.values():
                    tracker.update(*pairs[kind])
            if step in config.checkpoints:
                rows += _judge_all(name, step, objective, theta, learned, config)
                write_rows(folder / "hessian.csv", rows)
    draw(config, rows, folder)
    return rows


STYLES: dict[str, dict[str, Any]] = {
    "butterfly, layers": {"color": BLUE, "marker": "o"},
    "butterfly, flat": {"color": SKY, "marker": "s"},
    "diagonal": {"color": ORANGE, "marker": "v"},
    "L-BFGS": {"color": VERMILION, "marker": "^"},
    "dense BFGS": {"color": PURPLE, "marker": "D"},
    PROBED: {"color": GREEN, "marker": "P"},
    "exact diagonal": {"color": BLACK, "linestyle": ":"},
    "multiple of I": {"color": "0.6", "linestyle": "--"},
}


def draw(config: HessianConfig, rows: list[HessianRow], folder: Path) -> None:
    """Relative error and condition over the steps, a column for each problem and kind of pairs.

    Lines without markers are made from H itself.
    """
    lines = [{"color": color, "linestyle": "-."} for color in (BLACK, YELLOW, GREEN)]
    references = dict(zip(map(fitted, config.plans), itertools.cycle(lines), strict=False))
    columns = [(name, kind) for name in config.problems for kind in PAIRS]
    figure, axes = new_figure(2, len(columns), width=2.4 * len(columns) + 0.4, height=5.0, sharex=True, sharey="row")
    fields = (("relative_error", "relative error of the inverse"), ("condition", r"condition number of $P\,H$"))
    for column, (name, kind) in enumerate(columns):
        for axis, (field, _) in zip(axes[:, column], fields, strict=True):
            for method, style in (STYLES | references).items():
                chosen = [
                    row for row in rows if row.problem == name and row.method == method and row.pairs in (kind, "exact")
                ]
                points = ([row.step for row in chosen], [getattr(row, field) for row in chosen])
                axis.plot(*points, label=method, markersize=3.5, linewidth=1.2, **style)
            axis.set(xscale="log", yscale="log")
        axes[0, column].set_title(f"{name.replace('_', ' ')}, {PAIRS[kind]}", fontsize=8)
        axes[1, column].set_xlabel("step", fontsize=8)
    for axis, (_, label) in zip(axes[:, 0], fields, strict=True):
        axis.set_ylabel(label, fontsize=8)
    add_legend(figure, axes, columns=4)
    save_figure(figure, folder, "hessian")

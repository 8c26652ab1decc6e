"""A comparison suite: its YAML file, its runs, and which of them are still to be made.

The runs of an optimizer on a task follow from the results so far (`plan`), so a suite that was killed goes on by
planning again:

1. the learning-rate grid with the first seed (or the first `lr_grid.seeds`), around the optimizer's usual rate,
   extended while the best rate (lowest final training loss) lies on an edge;
2. the other seeds at the best rate;
3. for the optimizers in `shortened`: the same at `fractions` of the steps, the schedule shrunk with them;
4. for the optimizers in `robust`: a fixed rate and multiples of the best rate, and the baselines at these rates.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import butterfly_opt
from experiments.config import (
    Component,
    ConfigError,
    ScheduleConfig,
    apply_overrides,
    load_section,
    near_matches,
    read_yaml,
    split_override,
)
from experiments.problems import check_problem


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A problem and how long it is trained; `without` names optimizers that are left out.

    `rates` are learning rates usual for this task, by optimizer, where they are other than `OptimizerConfig.lr`.
    """

    problem: Component
    steps: int
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    without: list[str] = dataclasses.field(default_factory=list)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and the learning rate usual for it; `scheduled` false keeps the rate constant (line searches)."""

    optimizer: Component
    lr: float
    scheduled: bool = True


@dataclasses.dataclass(frozen=True)
class LrGrid:
    """`points` rates, each `factor` times the one before, extended at an edge up to `max_points`.

    Where one seed says little, a rate counts by its mean loss over the first `seeds` of the suite.
    """

    factor: float = 3.0
    points: int = 3
    max_points: int = 7
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Rates at which `Suite.robust` and the baselines are run: `lr`, and `factors` times the best rate."""

    lr: float = 1e-3
    factors: list[float] = dataclasses.field(default_factory=lambda: [0.25, 4.0])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])


@dataclasses.dataclass(frozen=True)
class Suite:
    """Everything that is compared.

    `baselines` are variants of the optimizer that sets the mark (Adam): on each task the better one counts.
    `target` is the optimizer whose distance from the baseline is divided (SOAP); `subject` the one that all others are
    tested against, seed by seed.
    """

    tasks: dict[str, TaskConfig]
    optimizers: dict[str, OptimizerConfig]
    baselines: list[str]
    target: str
    subject: str = ""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    lr_grid: LrGrid = dataclasses.field(default_factory=LrGrid)
    fractions: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    shortened: list[str] = dataclasses.field(default_factory=list)
    robust: list[str] = dataclasses.field(default_factory=list)
    robustness: Robustness = dataclasses.field(default_factory=Robustness)

    def optimizers_of(self, task: str) -> list[str]:
        """The optimizers that run on a task."""
        return [name for name in self.optimizers if name not in self.tasks[task].without]


USES = {
    "__init__",
    "_version",
    "diagnostics",
    "estimate",
    "fit",
    "fused",
    "mixture",
    "normal",
    "operators",
    "orthogonal",
    "probe",
    "sweep",
}
"""Modules of `butterfly_opt` that decide no step in plain torch; `fused` computes the same with kernels."""


@functools.cache
def code_digest() -> str:
    """Digest of the code that decides a step of Butterfly: a run counts for the code it was made with.

    Of syntax trees without their docstrings: comments and layout may change.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(butterfly_opt.__file__).parent.glob("*.py")):
        if file.stem in USES:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            # A docstring is an expression that is a constant; so is one behind a constant of a module.
            if isinstance(body := getattr(node, "body", None), list):
                body[:] = [
                    item for item in body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
                ]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run; `steps` and `schedule` are already shrunk, `window` is in gradient evaluations."""

    task: str
    optimizer: str
    problem: Component
    component: Component
    lr: float
    seed: int
    steps: int
    schedule: ScheduleConfig
    window: int
    device: str

    @property
    def key(self) -> str:
        """A file name that holds a digest of everything the result depends on.

        Where the data lie is left out. For Butterfly the code is part of it.
        """
        content: dict[str, Any] = dataclasses.asdict(self)
        dataset = content["problem"]["keywords"].get("dataset")
        if dataset is not None:
            content["problem"]["keywords"]["dataset"] = {"name": dataset.get("name")}
        if self.component.name.endswith(("Butterfly", "ButterflyW")):
            content["code"] = code_digest()
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return f"{self.task}/{self.optimizer}-lr{self.lr:g}-seed{self.seed}-steps{self.steps}-{digest}"


def build_run(suite: Suite, task: str, optimizer: str, *, lr: float, seed: int, fraction: float = 1.0) -> Run:
    """The run of an optimizer on a task; `fraction` shrinks the steps and the schedule's warm-up."""
    config, entry = suite.tasks[task], suite.optimizers[optimizer]
    schedule = config.schedule if entry.scheduled else ScheduleConfig()
    return Run(
        task=task,
        optimizer=optimizer,
        problem=config.problem,
        component=Component(entry.optimizer.name, {**entry.optimizer.keywords, "lr": lr}),
        lr=lr,
        seed=seed,
        steps=max(1, round(fraction * config.steps)),
        schedule=dataclasses.replace(schedule, warmup_steps=round(fraction * schedule.warmup_steps)),
        window=max(1, config.steps // 20),
        device=suite.device,
    )


def usual_rate(suite: Suite, task: str, optimizer: str) -> float:
    """The rate in the middle of the first grid."""
    return suite.tasks[task].rates.get(optimizer, suite.optimizers[optimizer].lr)


def search_rates(
    usual: float, grid: LrGrid, loss_of: Callable[[float], float | None]
) -> tuple[list[float], float | None]:
    """The rates to try, and the best one once their losses are known.

    Args:
        usual: the middle of the first `grid.points` rates.
        grid: the geometric grid.
        loss_of: the final loss at a rate, infinite for a diverged run, None while it is not known.

    Returns:
        The rates so far, and the one of the lowest loss (of equals the smallest); None while a loss is missing.
    """
    low = -(grid.points // 2)
    high = low + grid.points - 1
    while True:
        # Rounded, so that a rate is the same number however the grid was reached.
        rates = [float(f"{usual * grid.factor**exponent:.4g}") for exponent in range(low, high + 1)]
        losses = [loss_of(rate) for rate in rates]
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            return rates, None
        best = known.index(min(known))
        if len(rates) >= grid.max_points or 0 < best < len(rates) - 1:
            return rates, rates[best]
        low, high = (low - 1, high) if best == 0 else (low, high + 1)


def _mean_loss(runs: Sequence[Run], loss_of: Callable[[Run], float | None]) -> float | None:
    """None while one is missing, infinite if one diverged."""
    losses = [loss_of(run) for run in runs]
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses) else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs known to be needed, each with what it is needed for, and how many more will follow at least.

    Both mappings go by task and optimizer.
    """

    runs: list[tuple[Run, str]]
    num_to_come: dict[tuple[str, str], int]
    best_rates: dict[tuple[str, str], float]


def plan(suite: Suite, loss_of: Callable[[Run], float | None]) -> Plan:
    """Every run that the results so far call for.

    Args:
        suite: the comparison.
        loss_of: the final loss of a run, infinite if it diverged or failed, None if there is no result.

    Returns:
        Pairs of a run and its role: "search", "best", "fraction 0.5", "butterfly at lr 0.001" or "butterfly at
        best x4"; a run may come several times. An optimizer that diverges at every rate has no best rate.
    """
    runs: list[tuple[Run, str]] = []
    best_rates: dict[tuple[str, str], float] = {}
    to_come: dict[tuple[str, str], int] = {}
    fractions = [fraction for fraction in suite.fractions if fraction != 1.0]
    searched = suite.seeds[: suite.lr_grid.seeds]
    for task in suite.tasks:
        for name in suite.optimizers_of(task):
            build = functools.partial(build_run, suite, task, name)
            rates, best = search_rates(
                usual_rate(suite, task, name),
                suite.lr_grid,
                lambda lr, build=build: _mean_loss([build(lr=lr, seed=seed) for seed in searched], loss_of),  # type: ignore[misc]
            )
            runs += [(build(lr=rate, seed=seed), "search") for rate in rates for seed in searched]
            lengths = [1.0, *(fractions if name in suite.shortened else [])]
            if best is None:
                to_come[task, name] = len(suite.seeds) * len(lengths) - len(searched)
                continue
            if all(loss_of(build(lr=best, seed=seed)) == float("inf") for seed in searched):
                continue
            best_rates[task, name] = best
            for length in lengths:
                role = "best" if length == 1.0 else f"fraction {length:g}"
                runs += [(build(lr=best, seed=seed, fraction=length), role) for seed in suite.seeds]
        for name in [name for name in suite.robust if (task, name) in best_rates]:
            rated = {f"{name} at lr {suite.robustness.lr:g}": suite.robustness.lr}
            for factor in suite.robustness.factors:
                rated[f"{name} at best x{factor:g}"] = float(f"{factor * best_rates[task, name]:.4g}")
            compared = [name, *(item for item in suite.baselines if item not in suite.tasks[task].without)]
            for role, lr in rated.items():
                for seed in suite.robustness.seeds:
                    runs += [(build_run(suite, task, item, lr=lr, seed=seed), role) for item in compared]
    return Plan(runs, to_come, best_rates)


def _check_names(names: Collection[str], known: Collection[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} '{name}'{near_matches(name, known)}")


def _check_numbers(suite: Suite) -> None:
    grid = suite.lr_grid
    if not (grid.factor > 1 and 1 <= grid.points <= grid.max_points):
        raise ConfigError(f"lr_grid needs factor > 1 and 1 <= points <= max_points, got {grid}")
    if not suite.seeds:
        raise ConfigError("seeds must hold at least one seed")
    if not 1 <= grid.seeds <= len(suite.seeds):
        raise ConfigError(f"lr_grid.seeds must be from 1 to {len(suite.seeds)}, the suite's number, got {grid.seeds}")
    if any(seed < 0 for seed in [*suite.seeds, *suite.robustness.seeds]):
        raise ConfigError(f"seeds must be at least 0, got {suite.seeds} and {suite.robustness.seeds}")
    if any(not 0 < fraction <= 1 for fraction in suite.fractions):
        raise ConfigError(f"fractions must be above 0 and at most 1, got {suite.fractions}")
    rates = {f"optimizers.{name}.lr": entry.lr for name, entry in suite.optimizers.items()}
    rates |= {f"tasks.{t}.rates.{name}": lr for t, task in suite.tasks.items() for name, lr in task.rates.items()}
    for key, rate in {**rates, "robustness.lr": suite.robustness.lr}.items():
        if not 0 <= rate < float("inf"):
            raise ConfigError(f"{key} must be a finite number >= 0, got {rate}")
    for name, task in suite.tasks.items():
        if not 0 <= task.schedule.warmup_steps <= task.steps or task.steps < 1:
            raise ConfigError(f"tasks.{name} needs steps >= 1 and 0 <= schedule.warmup_steps <= steps")


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """Loads a suite and sets the overrides.

    `dataset.root=...` and other keys of `dataset` hold for every task with a data set; all other keys name their
    place in the file: `tasks.cifar10_cnn.steps=50`.

    Raises:
        ConfigError: an unknown name or key, a wrong type or a value out of bounds.
    """
    raw = read_yaml(path)
    suite = _apply(raw, overrides)
    named = [*suite.baselines, suite.target, *suite.shortened, *suite.robust, *filter(None, [suite.subject])]
    _check_names(named, suite.optimizers, "optimizer")
    if not suite.baselines:
        raise ConfigError("baselines must name at least one optimizer")
    for name, task in suite.tasks.items():
        check_problem(task.problem, f"tasks.{name}.problem")
        _check_names([*task.without, *task.rates], suite.optimizers, "optimizer")
    _check_numbers(suite)
    return suite


def _apply(raw: Mapping[str, Any], overrides: Sequence[str]) -> Suite:
    suite: Suite = load_section(Suite, raw, "")
    shared = [item for item in overrides if split_override(item)[0].startswith("dataset.")]
    with_data = [name for name, task in suite.tasks.items() if "dataset" in task.problem.keywords]
    # The shared ones first: a task's own override wins.
    ordered = [f"tasks.{name}.problem.{item}" for name in with_data for item in shared]
    ordered += [item for item in overrides if item not in shared]
    for place in (split_override(item)[0].split(".") for item in ordered):
        for section, known in (("tasks", suite.tasks), ("optimizers", suite.optimizers)):
            if place[0] == section and len(place) > 2:  # a key of one; a whole new one may be given
                _check_names(place[1:2], known, section.removesuffix("s"))
    result: Suite = load_section(Suite, apply_overrides(raw, ordered), "")
    return result


def select(known: Collection[str], wanted: Sequence[str], what: str) -> list[str]:
    """The wanted names, all if there are none.

    Raises:
        ConfigError: an unknown name, with near matches.
    """
    _check_names(wanted, known, what)
    return [name for name in known if not wanted or name in wanted]

"""Shows what each hyper-parameter of Butterfly does: `python -m experiments.sensitivity --suite ... [key=value ...]`.

Trains tasks of a comparison suite with one hyper-parameter changed at a time, the others at the defaults and the
learning rate at the suite's, several runs at a time. Finished runs are kept as those of `experiments.compare`, so
the command goes on where it was stopped. Writes into the output folder

    sensitivity.csv     one row a run
    sensitivity.png     a panel for each hyper-parameter: final training loss over that of the defaults
    runs/               the results, one JSON file a run
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import math
import os
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from butterfly_opt import Butterfly
from experiments.config import Component, ConfigError
from experiments.measure import Store
from experiments.parallel import StoppedError, train_missing
from experiments.suite import Run, Suite, build_run, load_suite, select
from experiments.train import Parser, exit_code

VALUES: dict[str, Sequence[Any]] = {
    "lr": (0.25, 0.5, 1, 2, 4),
    "betas": ((0.8, 0.95), (0.9, 0.9), (0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.95, 0.95)),
    "diagonal": ("innovation", "secant"),
    "block": (32, 64, 128, 256),
    "lead": (4, 8, 16, 32),
    "refit_every": (2, 5, 10, 20, 50),
}
"""The values of each hyper-parameter; of `lr` multiples of the suite's rate."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A hyper-parameter, its value and the run that shows it."""

    name: str
    value: Any
    run: Run


def default_of(name: str) -> Any:
    """The default of a hyper-parameter; 1 for `lr`, whose values are multiples."""
    return 1 if name == "lr" else inspect.signature(Butterfly.__init__).parameters[name].default


def trials(suite: Suite, optimizer: str, tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Trial]:
    """Every value of every hyper-parameter on every task, the defaults in each series."""
    for task in tasks:
        for seed in seeds:
            for name, values in VALUES.items():
                for value in values:
                    lr = suite.optimizers[optimizer].lr * (value if name == "lr" else 1)
                    run = build_run(suite, task, optimizer, lr=lr, seed=seed)
                    # What is the default is left out, so that the series share the run of the defaults.
                    if name != "lr" and value != default_of(name):
                        changed = list(value) if isinstance(value, tuple) else value
                        component = Component(run.component.name, {**run.component.keywords, name: changed})
                        run = dataclasses.replace(run, component=component)
                    yield Trial(name, value, run)


def relative_losses(wanted: Sequence[Trial], store: Store) -> dict[tuple[str, str], list[tuple[Any, float]]]:
    """By hyper-parameter and task: each value with the final loss over that of the defaults, median over the seeds."""
    ratios: dict[tuple[str, str], dict[Any, list[float]]] = {}
    default = {(t.run.task, t.run.seed): store.loss_of(t.run) for t in wanted if t.value == default_of(t.name)}
    for trial in wanted:
        loss, level = store.loss_of(trial.run), default[trial.run.task, trial.run.seed]
        if loss is not None and level is not None:
            series = ratios.setdefault((trial.name, trial.run.task), {})
            series.setdefault(trial.value, []).append(loss / level)
    return {
        key: [(value, statistics.median(values)) for value, values in series.items()] for key, series in ratios.items()
    }


def write_csv(wanted: Sequence[Trial], store: Store, path: Path) -> None:
    """Writes one row a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "seed", "hyper_parameter", "value", "lr", "final_loss", "seconds"])
        for trial in wanted:
            result = store.load(trial.run)
            if result is not None:
                seconds = f"{result.seconds[-1]:.1f}" if result.seconds else ""
                run = trial.run
                row = [run.task, run.seed, trial.name, trial.value, f"{run.lr:g}", f"{result.final_loss:.6g}", seconds]
                writer.writerow(row)


def draw(series: dict[tuple[str, str], list[tuple[Any, float]]], path: Path) -> None:
    """A panel for each hyper-parameter, a line for each task; a grey line at the default, diverged runs at the top."""
    from experiments.paper_files import add_legend, new_figure  # matplotlib is slow to import, for every worker too

    names = list(dict.fromkeys(name for name, _ in series))
    columns = -(-len(names) // 2)
    figure, axes = new_figure(2, columns, width=2.7 * columns, height=6.0)
    for place in axes.flat[len(names) :]:
        place.remove()
    finite = [ratio for line in series.values() for _, ratio in line if math.isfinite(ratio)]
    low, high = 0.95 * min(finite), 1.05 * max(finite)
    for axis, name in zip(axes.flat, names, strict=False):
        ticks = list(VALUES[name])
        axis.axvline(ticks.index(default_of(name)), color="0.85", linewidth=6)
        for (shown, task), line in series.items():
            if shown == name:
                heights = [min(ratio, high) for _, ratio in line]
                axis.plot([ticks.index(value) for value, _ in line], heights, marker="o", markersize=4, label=task)
        labels = ["/".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value) for value in ticks]
        axis.set_xticks(range(len(ticks)), labels, rotation=40, ha="right", fontsize=8)
        axis.set(title=f"{name} (multiples)" if name == "lr" else name, yscale="log", ylim=(low, high * 1.02))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(False, axis="x")
        axis.grid(True, axis="y", which="minor", color="0.92", linewidth=0.6)
    figure.supylabel("final training loss / that of the defaults", fontsize=10)
    add_legend(figure, axes, columns=len({task for _, task in series}))
    figure.savefig(path, dpi=130)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Show what each hyper-parameter of Butterfly does."
    parser = Parser(prog="python -m experiments.sensitivity", description=description, allow_abbrev=False)
    parser.add_argument("--suite", type=Path, required=True, help="YAML file, for example configs/suites/quick.yaml")
    parser.add_argument("--task", action="append", default=[], help="train only this task; may be repeated")
    parser.add_argument("--optimizer", default="butterfly", help="entry of the suite that is varied")
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), help="output folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=1, help="how many of the suite's seeds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=/data")
    arguments = parser.parse_intermixed_args(argv)
    for name in ("workers", "seeds"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parse_arguments(argv)
    suite = load_suite(arguments.suite, arguments.overrides)
    select(suite.optimizers, [arguments.optimizer], "optimizer")
    if not suite.optimizers[arguments.optimizer].optimizer.name.endswith("Butterfly"):
        raise ConfigError(f"--optimizer must name a Butterfly of the suite, got '{arguments.optimizer}'")
    tasks = select(suite.tasks, arguments.task, "task")
    if suite.device == "auto":
        raise ConfigError("device must be cpu or cuda here; set device=cpu")
    if arguments.seeds > len(suite.seeds):
        raise ConfigError(f"--seeds must be at most {len(suite.seeds)}, the suite's number, got {arguments.seeds}")
    store = Store(arguments.out)
    wanted = list(trials(suite, arguments.optimizer, tasks, suite.seeds[: arguments.seeds]))

    def planner(skipped: Collection[str]) -> tuple[list[Run], int]:
        return [trial.run for trial in wanted if trial.run.task not in skipped], 0

    code = 0
    try:
        for note in train_missing(planner, store, workers=arguments.workers, description="varying"):
            print(note, file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted: the figure shows the finished runs. The same command goes on.", file=sys.stderr)
        code = 130
    except StoppedError as error:
        print(f"Stopped: {error}. The same command goes on.", file=sys.stderr)
        code = 1
    write_csv(wanted, store, arguments.out / "sensitivity.csv")
    series = relative_losses(wanted, store)
    if series:
        draw(series, arguments.out / "sensitivity.png")
        print(f"results: {arguments.out / 'sensitivity.png'}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

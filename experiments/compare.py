"""Compares optimizers: `python -m experiments.compare --suite configs/suites/quick.yaml [key=value ...]`.

Trains every task of the suite with every optimizer, several runs at a time, one thread each. A finished run is one
file, so the command goes on where it was stopped; a run whose configuration changed (for Butterfly: or the code of
the package) is made again. Afterwards, also after Ctrl-C, it writes into the output folder

    runs.csv        one row a run
    report.md       the tables
    *.png           loss curves of each task, an overview
    runs/           the results with their loss curves, one JSON file a run

`--task` and `--optimizer` choose what is trained; the report always holds all results there are. Exit codes: 0 done, 1
a worker process died, 2 a mistake in the suite or the arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from experiments.config import ConfigError
from experiments.measure import Store
from experiments.optimizers import MissingPackageError, build_optimizer
from experiments.parallel import Planner, StoppedError, train_missing
from experiments.plots import draw_all
from experiments.report import Report, format_report, write_csv
from experiments.suite import Run, Suite, load_suite, plan, select
from experiments.train import Parser, exit_code
from experiments.trainer import choose_device


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.compare", description="Compare optimizers.", allow_abbrev=False)
    parser.add_argument("--suite", type=Path, required=True, help="YAML file, for example configs/suites/quick.yaml")
    parser.add_argument("--task", action="append", default=[], help="train only this task; may be repeated")
    parser.add_argument("--optimizer", action="append", default=[], help="train only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="output folder, by default runs/<name of the suite>")
    parser.add_argument("--workers", type=int, help="runs at a time, by default one per core; 1 with a GPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=/data")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {arguments.workers}")
    return arguments


def _drop_missing(suite: Suite) -> tuple[Suite, list[str]]:
    """Removes the optimizers whose package is not installed; checks the keywords of the others."""
    notes, missing = [], []
    for name, entry in suite.optimizers.items():
        with_rate = dataclasses.replace(entry.optimizer, keywords={**entry.optimizer.keywords, "lr": entry.lr})
        try:
            build_optimizer(with_rate, [nn.Parameter(torch.ones(2, 2))])
        except MissingPackageError as error:
            notes.append(f"Optimizer {name} is skipped: {error}.")
            missing.append(name)
        except ConfigError as error:
            raise ConfigError(f"optimizers.{name}: {error}") from error
    kept = {name: entry for name, entry in suite.optimizers.items() if name not in missing}
    reduced = dataclasses.replace(
        suite,
        optimizers=kept,
        baselines=[name for name in suite.baselines if name in kept],
        shortened=[name for name in suite.shortened if name in kept],
        robust=[name for name in suite.robust if name in kept],
    )
    return reduced, notes


def _planner(suite: Suite, store: Store, tasks: Sequence[str], optimizers: Sequence[str]) -> Planner:
    """Plans the runs of the chosen tasks and optimizers."""

    def current(skipped: Collection[str]) -> tuple[list[Run], int]:
        def is_wanted(task: str, optimizer: str) -> bool:
            return task in tasks and task not in skipped and optimizer in optimizers

        found = plan(suite, store.loss_of)
        runs = [run for run, _ in found.runs if is_wanted(run.task, run.optimizer)]
        return runs, sum(count for names, count in found.num_to_come.items() if is_wanted(*names))

    return current


def write_report(suite: Suite, store: Store, notes: Sequence[str]) -> None:
    """Writes runs.csv, report.md and the figures from the results there are."""
    report = Report(suite, store)
    write_csv(report, store.folder / "runs.csv")
    (store.folder / "report.md").write_text(format_report(report, notes=notes), encoding="utf-8")
    draw_all(report, store.folder)


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parse_arguments(argv)
    suite = load_suite(arguments.suite, arguments.overrides)
    tasks = select(suite.tasks, arguments.task, "task")
    optimizers = select(suite.optimizers, arguments.optimizer, "optimizer")
    for name in arguments.optimizer:
        if not any(name in suite.optimizers_of(task) for task in tasks):
            raise ConfigError(f"the suite leaves '{name}' out of {', '.join(tasks)} (`without`)")
    device = choose_device(suite.device)
    suite, notes = _drop_missing(dataclasses.replace(suite, device="cuda" if device.type == "cuda" else "cpu"))
    store = Store(arguments.out or Path("runs") / arguments.suite.stem)
    workers = arguments.workers or (1 if suite.device == "cuda" else os.cpu_count() or 1)
    code = 0
    try:
        planner = _planner(suite, store, tasks, optimizers)
        for note in train_missing(planner, store, workers=workers, description="comparing"):
            notes.append(note)
    except KeyboardInterrupt:
        notes.append("Interrupted: the tables hold the finished runs. The same command goes on.")
        code = 130
    except StoppedError as error:
        notes.append(f"Stopped: {error}. The same command goes on.")
        code = 1
    for note in notes:
        print(note, file=sys.stderr)
    write_report(suite, store, notes)
    print(f"results: {store.folder / 'report.md'}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

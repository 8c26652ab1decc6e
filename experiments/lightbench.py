"""Butterfly beside Adam and SOAP on the analytic tasks of LightBench, with a reader's checkout of it.

    git clone https://github.com/HomebrewML/LightBench
    python -m experiments.lightbench --checkout LightBench [--task NAME ...] [--level NAME ...] [--optimizer NAME ...]

Every optimizer has the same attempts at a level: `--trials` learning rates in a geometric grid, with its default decay
of second moments, then with the others of `--beta2` (the benchmark searches rates and decays, too), all else at its
defaults, no weight decay, float32, `--steps` steps, the noise of an attempt the same for all. As in the benchmark an
attempt is won if a loss of a group of 256 steps, with the parameters at the group's end, meets the task's condition; a
level is won if an attempt is; levels are climbed, and behind the first that is lost the others count as lost. Networks,
data sets and levels of more than `MAX_PARAMS` parameters are left out. Writes into the output folder

    lightbench.csv      one row an optimizer, level and seed
    lightbench.md       the counts, and every level that tells the optimizers apart, those that others win first
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from experiments.benchmarking import commit_of, describe_environment, note
from experiments.config import Component, ConfigError
from experiments.lightbench_tasks import LEVELS, Task, attempt, build_task, levels_of, opened, tasks_of
from experiments.optimizers import check_optimizer
from experiments.report import format_table
from experiments.suite import code_digest, select
from experiments.train import Parser, exit_code

OPTIMIZERS = {
    "Butterfly": Component("Butterfly", {"betas": [0.9, 0.95]}),
    "Adam": Component("Adam", {"betas": [0.9, 0.999]}),
    "SOAP": Component("pytorch_optimizer.SOAP", {"betas": [0.95, 0.95], "weight_decay": 0.0}),
}
MAX_PARAMS = 2**18
LOWEST_RATE, HIGHEST_RATE = 1e-4, 10.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer on one level: `lr` and `beta2` won, after so many `trials`; 0 where a level before was lost."""

    task: str
    level: str
    seed: int
    optimizer: str
    won: bool
    lr: float | None
    beta2: float | None
    trials: int
    seconds: float
    error: str


def rates(trials: int, first: float) -> list[float]:
    """A geometric grid from LOWEST_RATE to HIGHEST_RATE, the nearest to `first` first: an order that saves time."""
    span = math.log(HIGHEST_RATE / LOWEST_RATE)
    grid = [LOWEST_RATE * math.exp(span * i / (trials - 1)) for i in range(trials)]
    return sorted(grid, key=lambda rate: abs(math.log(rate / first)))


def with_decay(component: Component, beta2: float) -> Component:
    """The optimizer with another decay of its second moments."""
    return Component(component.name, {**component.keywords, "betas": [component.keywords["betas"][0], beta2]})


def climb(
    name: str,
    tasks: Mapping[str, Task],
    optimizer: str,
    *,
    seed: int,
    trials: int,
    decays: Sequence[float],
    every: bool,
) -> Iterator[Row]:
    """The rows of an optimizer over the levels of a task; behind the first lost one none is tried, unless `every`."""
    component, last, is_lost = OPTIMIZERS[optimizer], 0.1, False
    decays = list(dict.fromkeys([component.keywords["betas"][1], *decays]))
    for level, task in tasks.items():
        start, count, error = time.perf_counter(), 0, ""
        won: tuple[float | None, float | None] = None, None
        for beta2, lr in [] if is_lost and not every else itertools.product(decays, rates(trials, last)):
            count += 1
            try:
                if attempt(task, with_decay(component, beta2), lr, seed=1000 + seed):
                    won, last = (float(f"{lr:.3g}"), beta2), lr
                    break
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as raised:  # a task or an optimizer gives up
                error = f"{type(raised).__name__}: {raised}".splitlines()[0][:100]
        is_won = won[0] is not None
        is_lost |= not is_won
        seconds = round(time.perf_counter() - start, 1)
        yield Row(name, level, seed, optimizer, is_won, *won, count, seconds, "" if is_won else error)


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of all tasks, seeds and optimizers; levels that cannot be built or are too large are named on stderr."""
    wanted = select(LEVELS, arguments.level, "level")
    with opened(arguments.checkout) as load, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tasks: shapes that broadcast
        for name in select(tasks_of(arguments.checkout), arguments.task, "task"):
            module = load(name)
            for seed in arguments.seeds:
                tasks = {}
                for level in (level for level in levels_of(module) if level in wanted):
                    try:
                        task = build_task(module, level, seed=seed, steps=arguments.steps)
                    except Exception as error:  # some levels name parameters that their model does not take
                        note(f"{name} {level} is left out: {error}")
                        continue
                    size = sum(parameter.numel() for parameter in task.model.parameters())
                    if size <= MAX_PARAMS:
                        tasks[level] = task
                    else:
                        note(f"{name} {level} is left out: {size} parameters, more than {MAX_PARAMS}")
                for optimizer in select(OPTIMIZERS, arguments.optimizer, "optimizer"):
                    options = {"trials": arguments.trials, "decays": arguments.beta2, "every": arguments.every_level}
                    yield from climb(name, tasks, optimizer, seed=seed, **options)


def winners(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """The optimizers that win each level of each task, with more than half of the seeds."""
    need = len({row.seed for row in rows}) / 2
    wins: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        level = wins.setdefault((row.task, row.level), {})
        level[row.optimizer] = level.get(row.optimizer, 0) + row.won
    return {key: [name for name, count in level.items() if count > need] for key, level in wins.items()}


def format_page(rows: Sequence[Row], head: str) -> str:
    """The Markdown page; `head` says what the rows were made with."""
    names = list(dict.fromkeys(row.optimizer for row in rows))
    default = {name: OPTIMIZERS[name].keywords["betas"][1] for name in names}
    won = winners(rows)
    won_so = winners([dataclasses.replace(row, won=row.won and row.beta2 == default[row.optimizer]) for row in rows])
    decided = {key: found for key, found in won.items() if 0 < len(found) < len(names)}

    def levels(title: str, keys: list[tuple[str, str]]) -> list[str]:
        cells = [[*key, *("won" if name in won[key] else "lost" for name in names)] for key in keys]
        return [f"## {title}", "", *(format_table(["task", "level", *names], cells) if cells else ["None.", ""])]

    def counts(keys: Iterable[tuple[str, str]]) -> list[str]:
        keys = list(keys)
        found = [
            f"{sum(name in won[key] for key in keys)} ({sum(name in won_so[key] for key in keys)})" for name in names
        ]
        return [str(len(keys)), *found]

    by_task = [[task, *counts(key for key in won if key[0] == task)] for task in dict.fromkeys(task for task, _ in won)]
    header = ["", "levels", *names]
    return "\n".join([
        "# LightBench's analytic tasks",
        "",
        head,
        "",
        "A level is won if one of the attempts meets the task's own condition, with more than half of the seeds, and "
        "decided if some optimizers win it and some do not. In brackets what the default decay of second moments wins "
        f"({', '.join(f'{name} {default[name]:g}' for name in names)}).",
        "",
        *levels(f"What {names[0]} loses and another wins", [key for key, x in decided.items() if names[0] not in x]),
        "## Counts",
        "",
        *format_table(header, [["decided", *counts(decided)], ["all", *counts(won)], *by_task]),
        *levels(f"What {names[0]} wins and another loses", [key for key, x in decided.items() if names[0] in x]),
    ])  # fmt: skip


def _command(argv: Sequence[str]) -> int:
    from experiments.paper_files import write_rows  # matplotlib is slow to import

    parser = Parser(prog="python -m experiments.lightbench", description="LightBench's analytic tasks on a CPU.")
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of HomebrewML/LightBench")
    for name in ("task", "level", "optimizer"):
        parser.add_argument(f"--{name}", action="append", default=[], help=f"only this {name}; may be repeated")
    parser.add_argument(
        "--steps", type=int, default=512, help="of an attempt, in groups of 256; some tasks double them"
    )
    parser.add_argument("--trials", type=int, default=6, help=f"rates, from {LOWEST_RATE:g} to {HIGHEST_RATE:g}")
    parser.add_argument("--beta2", type=float, nargs="*", default=[0.95, 0.999], help="decays beside the default one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of initial values and noise")
    parser.add_argument("--every-level", action="store_true", help="try the levels behind a lost one too")
    parser.add_argument("--out", type=Path, default=Path("runs/lightbench"), help="output folder")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.trials < 2:
        raise ConfigError(f"--steps must be at least 1, --trials 2, got {arguments.steps} and {arguments.trials}")
    for name in select(OPTIMIZERS, arguments.optimizer, "optimizer"):
        check_optimizer(OPTIMIZERS[name])
    torch.set_num_threads(1)
    words = ["LightBench" if word == str(arguments.checkout) else word for word in argv]
    head = (
        f"{describe_environment(torch.device('cpu'))}, one thread; butterfly_opt {code_digest()}; LightBench "
        f"{commit_of(arguments.checkout)}. `{shlex.join(['python', '-m', 'experiments.lightbench', *words])}`: "
        f"{arguments.trials} rates, the default decay and those of {arguments.beta2}, {arguments.steps} steps, seeds "
        f"{arguments.seeds}."
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in run(arguments):
        rows.append(row)
        outcome = "won" if row.won else f"lost {row.error}"
        note(f"{row.task} {row.level}, seed {row.seed}, {row.optimizer}: {outcome} after {row.trials}")
        write_rows(arguments.out / "lightbench.csv", rows)
        (arguments.out / "lightbench.md").write_text(format_page(rows, head), encoding="utf-8")
    print(f"results: {arguments.out / 'lightbench.md'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())

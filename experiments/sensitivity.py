"""Shows what each hyper-parameter and each part of Butterfly does.

    python -m experiments.sensitivity --suite configs/suites/quick.yaml [--vary NAME ...] [key=value ...]

Trains tasks of a comparison suite with one thing changed at a time, the others at the defaults and the learning rate at
the suite's for the task, several runs at a time. Only among parts the rate of each is searched, with the first seed, by
the suite's grid: another step may want another rate. Finished runs are kept as those of
`experiments.compare`, so the command goes on where it was stopped. Writes into the output folder

    sensitivity.csv     one row a run
    sensitivity.md      final training losses over those of the defaults, with paired tests
    sensitivity.png     the same, a panel for each hyper-parameter
    runs/               the results, one JSON file a run
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import inspect
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from butterfly_opt import Butterfly
from experiments.benchmarking import describe_environment
from experiments.config import Component, ConfigError
from experiments.measure import Store
from experiments.parallel import StoppedError, train_missing
from experiments.report import MIN_PAIRS, format_table, paired_test
from experiments.suite import Run, Suite, build_run, code_digest, load_suite, search_rates, select, usual_rate
from experiments.train import Parser, exit_code

VALUES: dict[str, Sequence[Any]] = {
    "part": ("all", "no rotation", "radix 2", "no transport", "no exact zeros"),
    "lr": (0.25, 0.5, 1, 2, 4),
    "betas": ((0.8, 0.95), (0.9, 0.9), (0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.95, 0.95)),
    "diagonal": ("innovation", "secant"),
    "block": (16, 32, 64, 128, 256),
    "lead": (4, 8, 16, 32, 64),
    "refit_every": (1, 2, 5, 10, 20, 50),
}
"""The values of each hyper-parameter; of `lr` multiples of the suite's rate. `lead` stays a quarter of `block`."""

PARTS: dict[str, Component] = {
    "no rotation": Component("experiments.variants.UnrotatedButterfly"),
    "radix 2": Component("Butterfly", {"block": 2, "lead": 2}),
    "no transport": Component("experiments.variants.UntransportedButterfly"),
    "no exact zeros": Component("experiments.variants.ZeroMovingButterfly"),
}
"""Butterfly without a part of it: the optimizer, and what is changed."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A hyper-parameter, its value and the run that shows it; `is_shown` false where another rate was better."""

    name: str
    value: Any
    run: Run
    is_shown: bool = True


def default_of(name: str) -> Any:
    """The default of a hyper-parameter: 1 for `lr`, whose values are multiples, and all parts."""
    own = {"lr": 1, "part": "all"}
    return own[name] if name in own else inspect.signature(Butterfly.__init__).parameters[name].default


def changed(run: Run, name: str, value: Any) -> Run:
    """The run with one thing changed; itself at the default, so that the series share the run of the defaults."""
    if name == "lr" or value == default_of(name):
        return run
    if name == "part":
        component = PARTS[value]
    else:
        component = Component(run.component.name, {name: list(value) if isinstance(value, tuple) else value})
        if name == "block":
            component.keywords["lead"] = value // 4
    component = Component(component.name, {**run.component.keywords, **component.keywords})
    return dataclasses.replace(run, component=component)


def trials(
    suite: Suite,
    optimizer: str,
    tasks: Sequence[str],
    seeds: Sequence[int],
    *,
    names: Sequence[str] = tuple(VALUES),
    loss_of: Callable[[Run], float | None] = lambda run: None,
) -> Iterator[Trial]:
    """Every value of the named hyper-parameters on every task, the defaults in each series.

    Of parts the runs that the losses so far call for: first the rates with the first seed, then the best with all.
    """
    for task, name in itertools.product(tasks, names):
        usual = usual_rate(suite, task, optimizer)
        for value in VALUES[name]:

            def at(lr: float, seed: int, task: str = task, name: str = name, value: Any = value) -> Run:
                return changed(build_run(suite, task, optimizer, lr=lr, seed=seed), name, value)

            best: float | None = usual * (value if name == "lr" else 1)
            if name == "part":
                rates, best = search_rates(usual, suite.lr_grid, lambda lr, at=at: loss_of(at(lr, seeds[0])))  # type: ignore[misc]
                for rate in (rate for rate in rates if rate != best):
                    yield Trial(name, value, at(rate, seeds[0]), is_shown=False)
            if best is not None:
                for seed in seeds:
                    yield Trial(name, value, at(best, seed))


class Effect(NamedTuple):
    """Final training loss over that of the defaults: geometric mean over the seeds, and the paired test's interval.

    With fewer than `MIN_PAIRS` seeds the interval is the mean alone and p is NaN. So where a loss is exactly zero and
    has no logarithm: the mean is then of the losses. Infinite where a run diverged.
    """

    ratio: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, losses: Sequence[float], defaults: Sequence[float]) -> Effect:
        """Of losses with the same seeds."""
        if not all(map(math.isfinite, losses)):
            return cls(math.inf, math.inf, math.inf, math.nan)
        if min(*losses, *defaults) <= 0:
            ratio = sum(losses) / sum(defaults) if sum(defaults) else math.nan
            return cls(ratio, ratio, ratio, math.nan)
        if len(losses) >= MIN_PAIRS and losses != defaults:
            return cls(*paired_test(defaults, losses))
        ratio = statistics.geometric_mean(loss / own for loss, own in zip(losses, defaults, strict=True))
        return cls(ratio, ratio, ratio, math.nan)


Series = dict[tuple[str, str], list[tuple[Any, Effect]]]


def relative_losses(wanted: Sequence[Trial], store: Store) -> Series:
    """By hyper-parameter and task: each value with what it does to the loss."""
    pairs: dict[tuple[str, str], dict[Any, list[tuple[float, float]]]] = {}
    shown = [(trial, store.loss_of(trial.run)) for trial in wanted if trial.is_shown]
    default = {(t.name, t.run.task, t.run.seed): loss for t, loss in shown if t.value == default_of(t.name)}
    for trial, loss in shown:
        level = default.get((trial.name, trial.run.task, trial.run.seed))
        if loss is not None and level is not None:
            series = pairs.setdefault((trial.name, trial.run.task), {})
            series.setdefault(trial.value, []).append((loss, level))
    return {
        key: [(value, Effect.of(*zip(*losses, strict=True))) for value, losses in series.items()]
        for key, series in pairs.items()
    }


def _label(value: Any) -> str:
    return "/".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)


def format_page(series: Series, wanted: Sequence[Trial]) -> str:
    """The Markdown page: a row for each changed value, a column for each task."""
    tasks = list(dict.fromkeys(task for _, task in series))
    seeds = list(dict.fromkeys(trial.run.seed for trial in wanted))
    rows = []
    for name, value in dict.fromkeys((t.name, t.value) for t in wanted if t.value != default_of(t.name)):
        cells = []
        for effect in (dict(series.get((name, task), [])).get(value) for task in tasks):
            text = "-" if effect is None else "diverged" if math.isinf(effect.ratio) else f"{effect.ratio:.3f}"
            if effect is not None and effect.p == effect.p:
                text += f" [{effect.low:.3f}, {effect.high:.3f}]"
                text = f"**{text}**" if effect.p < 0.05 else text
            cells.append(text)
        rows.append([name, _label(value), *cells])
    return "\n".join([
        "# What each hyper-parameter and each part does",
        "",
        f"{describe_environment(torch.device('cpu'))}, one thread a run; butterfly_opt {code_digest()}. Seeds {seeds}. "
        "Final training loss over that of the defaults with the same seed: the geometric mean, and the 95 % interval "
        "of a paired t-test of the logarithms; bold where p < 0.05, not corrected for the number of rows. Learning "
        "rates are those of the defaults; among parts, each one's best of a grid that is searched with the first seed.",
        "",
        *format_table(["changed", "to", *tasks], rows),
        "![The same as a figure](sensitivity.png)",
        "",
    ])  # fmt: skip


def write_csv(wanted: Sequence[Trial], store: Store, path: Path) -> None:
    """Writes one row a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "seed", "hyper_parameter", "value", "lr", "shown", "final_loss", "seconds"])
        for trial in wanted:
            result = store.load(trial.run)
            if result is not None:
                seconds = f"{result.seconds[-1]:.1f}" if result.seconds else ""
                run = trial.run
                row = [run.task, run.seed, trial.name, trial.value, f"{run.lr:g}", trial.is_shown]
                writer.writerow([*row, f"{result.final_loss:.6g}", seconds])


def draw(series: Series, path: Path) -> None:
    """A panel for each hyper-parameter, a line for each task; a grey line at the default, diverged runs at the top.

    Bars are the 95 % intervals, where there are enough seeds.
    """
    from experiments.paper_files import add_legend, new_figure  # matplotlib is slow to import, for every worker too

    names = list(dict.fromkeys(name for name, _ in series))
    rows = 1 if len(names) < 3 else 2
    columns = -(-len(names) // rows)
    figure, axes = new_figure(rows, columns, width=max(4.0, 2.7 * columns), height=1.0 + 2.8 * rows)
    for place in axes.flat[len(names) :]:
        place.remove()
    ratios = [effect.ratio for line in series.values() for _, effect in line if 0 < effect.ratio < math.inf]
    low, high = 0.95 * min(ratios, default=1.0), 1.05 * max(ratios, default=1.0)
    tasks = list(dict.fromkeys(task for _, task in series))
    for axis, name in zip(axes.flat, names, strict=False):
        ticks = list(VALUES[name])
        axis.axvline(ticks.index(default_of(name)), color="0.85", linewidth=6)
        for (shown, task), line in series.items():
            if shown == name:
                heights = [max(low, min(effect.ratio, high)) for _, effect in line]
                bars = [[max(0.0, h - e.low), max(0.0, e.high - h)] for h, (_, e) in zip(heights, line, strict=True)]
                shift = 0.1 * (tasks.index(task) - (len(tasks) - 1) / 2)  # so that bars do not hide each other
                places = [ticks.index(value) + shift for value, _ in line]
                style = "" if isinstance(ticks[0], str) else "-"
                axis.errorbar(
                    places, heights, np.array(bars).T, marker="o", markersize=4, elinewidth=0.8, label=task,
                    linestyle=style,
                )  # fmt: skip
        axis.set_xticks(range(len(ticks)), map(_label, ticks), rotation=40, ha="right", fontsize=8)
        title = f"{name} (multiples)" if name == "lr" else name
        axis.set(title=title, yscale="log", ylim=(low, high * 1.02), xlim=(-0.5, len(ticks) - 0.5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(False, axis="x")
        axis.grid(True, axis="y", which="minor", color="0.92", linewidth=0.6)
    figure.supylabel("final training loss / that of the defaults", fontsize=10)
    add_legend(figure, axes, columns=len(tasks))
    figure.savefig(path, dpi=130)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Show what each hyper-parameter of Butterfly does."
    parser = Parser(prog="python -m experiments.sensitivity", description=description, allow_abbrev=False)
    parser.add_argument("--suite", type=Path, required=True, help="YAML file, for example configs/suites/quick.yaml")
    parser.add_argument("--task", action="append", default=[], help="train only this task; may be repeated")
    parser.add_argument("--vary", action="append", default=[], help="vary only this; may be repeated")
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
    names = select(VALUES, arguments.vary, "hyper-parameter")
    store = Store(arguments.out)
    seeds = suite.seeds[: arguments.seeds]
    find = functools.partial(trials, suite, arguments.optimizer, tasks, seeds, names=names, loss_of=store.loss_of)

    def planner(skipped: Collection[str]) -> tuple[list[Run], int]:
        return [trial.run for trial in find() if trial.run.task not in skipped], 0

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
    wanted = list(find())
    write_csv(wanted, store, arguments.out / "sensitivity.csv")
    series = relative_losses(wanted, store)
    if series:
        draw(series, arguments.out / "sensitivity.png")
        (arguments.out / "sensitivity.md").write_text(format_page(series, wanted), encoding="utf-8")
        print(f"results: {arguments.out / 'sensitivity.md'}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

"""Reads the results of a suite: steps and seconds to Adam's loss, medians over seeds, the CSV and the Markdown table.

"Adam" is, on each task, the baseline with the lowest median final loss. Its final loss with a seed (the smoothed
training loss at its last step, `experiments.measure.smooth`) is the level the others with that seed have to reach: the
same initial weights, the same batches. Steps are counted in gradient evaluations.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats

from experiments.benchmarking import describe_environment
from experiments.measure import Result, Store, smooth
from experiments.suite import Plan, Run, Suite, build_run, code_digest, plan

COLUMNS = (
    "task", "optimizer", "roles", "lr", "seed", "steps", "status", "final_loss", "metric_name", "metric", "evaluations",
    "seconds", "step_ms_median", "step_ms_mean", "steps_to_adam", "seconds_to_adam", "state_bytes_per_param",
    "num_params", "error",
)  # fmt: skip


class Spread(NamedTuple):
    """Median, smallest and largest value over the seeds; infinite stands for never or diverged."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def text(self, style: str, *, missing: str = "never") -> str:
        """Returns "median [low, high]", or one number where there is no spread; `missing` for infinite ones."""

        def show(value: float) -> str:
            return format(value, style) if math.isfinite(value) else missing

        if self.low == self.high:
            return show(self.median)
        return f"{show(self.median)} [{show(self.low)}, {show(self.high)}]"


def time_to_level(result: Result, level: float, window: int) -> tuple[float, float]:
    """Gradient evaluations and seconds from which on the smoothed loss stays at or below `level`.

    Infinite if it ends above, or diverged. Not the first crossing, which noise makes early: a run's time to its own
    final loss could be half of its steps.
    """
    curve = smooth(result.losses, result.evaluations, window)
    first = len(curve)
    while first > 0 and curve[first - 1] <= level:
        first -= 1
    if result.status != "ok" or first == len(curve):
        return math.inf, math.inf
    return result.evaluations[first], result.seconds[first]


@dataclasses.dataclass(frozen=True)
class Summary:
    """One line of the table: an optimizer on a task, at its best rate, over the seeds.

    Attributes:
        steps_full: evaluations to Adam's loss over Adam's own to it, in the run of full length.
        steps_any: the same, the smallest over the lengths that were run, each with its own schedule.
        seconds, seconds_ratio: training time to Adam's loss, the smallest over the lengths; over Adam's own.
        step_ms, mean_step_ms: median and mean time of a step.
        covered: of the distance between Adam's and the target's median loss; None if the target is not better.
    """

    task: str
    optimizer: str
    lr: float
    num_seeds: int
    num_ok: int
    final_loss: Spread
    metric_name: str
    metric: Spread | None
    steps_full: Spread
    steps_any: Spread
    seconds: Spread
    seconds_ratio: Spread
    step_ms: float
    mean_step_ms: float
    bytes_per_param: float
    covered: float | None


class Report:
    """The results of a suite, read once.

    Args:
        suite: what is compared.
        store: its results; runs without one are left out.
    """

    def __init__(self, suite: Suite, store: Store) -> None:
        self.suite = suite
        self.plan: Plan = plan(suite, store.loss_of)
        self.runs: dict[str, tuple[Run, list[str], Result]] = {}
        for run, role in self.plan.runs:
            result = store.load(run)
            if result is not None:
                roles = self.runs.setdefault(run.key, (run, [], result))[1]
                if role not in roles:
                    roles.append(role)
        self._levels = {task: self._adam_levels(task) for task in suite.tasks}
        self.summaries = [
            summary
            for task in suite.tasks
            for name in suite.optimizers_of(task)
            if (summary := self._summarise(task, name)) is not None
        ]

    def results(self, task: str, optimizer: str, *, fraction: float = 1.0) -> dict[int, tuple[Run, Result]]:
        """The finished runs at the best rate, by seed."""
        lr = self.plan.best_rates.get((task, optimizer))
        found: dict[int, tuple[Run, Result]] = {}
        if lr is None:
            return found
        for seed in self.suite.seeds:
            run = build_run(self.suite, task, optimizer, lr=lr, seed=seed, fraction=fraction)
            if run.key in self.runs:
                found[seed] = run, self.runs[run.key][2]
        return found

    def final_loss(self, task: str, optimizer: str, *, fraction: float = 1.0) -> Spread | None:
        """Of the runs at the best rate; None if there are none."""
        losses = [result.final_loss for _, result in self.results(task, optimizer, fraction=fraction).values()]
        return Spread.of(losses) if losses else None

    def adam(self, task: str) -> str | None:
        """The baseline that counts on a task: the one with the lowest median final loss."""
        losses = {
            name: spread.median
            for name in self.suite.baselines
            if (spread := self.final_loss(task, name)) is not None and math.isfinite(spread.median)
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def _adam_levels(self, task: str) -> dict[int, float]:
        adam = self.adam(task)
        results = self.results(task, adam) if adam is not None else {}
        return {seed: result.final_loss for seed, (_, result) in results.items() if result.status == "ok"}

    def time_to_adam(self, run: Run, result: Result) -> tuple[float, float]:
        """Evaluations and seconds of a run to Adam's loss with the same seed; infinite if never or not known."""
        level = self._levels[run.task].get(run.seed)
        return time_to_level(result, level, run.window) if level is not None else (math.inf, math.inf)

    def _summarise(self, task: str, optimizer: str) -> Summary | None:
        pairs = self.results(task, optimizer)
        if not pairs:
            return None
        ok = [result for _, result in pairs.values() if result.status == "ok"]
        final = Spread.of(result.final_loss for _, result in pairs.values())
        adam = self.adam(task)
        adams = self.results(task, adam) if adam is not None else {}
        own = {seed: self.time_to_adam(run, result) for seed, (run, result) in adams.items()}
        full = {seed: self.time_to_adam(run, result) for seed, (run, result) in pairs.items()}
        reached = dict(full)
        for fraction in self.suite.fractions:
            for seed, (run, result) in self.results(task, optimizer, fraction=fraction).items():
                steps, seconds = self.time_to_adam(run, result)
                best = reached.get(seed, (math.inf, math.inf))
                reached[seed] = min(steps, best[0]), min(seconds, best[1])

        def over_adams(times: Mapping[int, tuple[float, float]], which: int) -> Spread:
            never = (math.inf, math.inf)
            return Spread.of(
                time[which] / own[seed][which] if math.isfinite(own.get(seed, never)[which]) else math.inf
                for seed, time in times.items()
            )

        metrics = [result.metric for result in ok if result.metric is not None]
        return Summary(
            task=task,
            optimizer=optimizer,
            lr=self.plan.best_rates[task, optimizer],
            num_seeds=len(pairs),
            num_ok=len(ok),
            final_loss=final,
            metric_name=next(iter(pairs.values()))[1].metric_name,
            metric=Spread.of(metrics) if metrics else None,
            steps_full=over_adams(full, 0),
            steps_any=over_adams(reached, 0),
            seconds=Spread.of(seconds for _, seconds in reached.values()),
            seconds_ratio=over_adams(reached, 1),
            step_ms=statistics.median(result.step_ms for result in ok) if ok else math.nan,
            mean_step_ms=statistics.median(mean_step_ms(result) for result in ok) if ok else math.nan,
            bytes_per_param=max((result.state_bytes / result.num_params for result in ok), default=math.nan),
            covered=self._covered(task, final.median),
        )

    def _covered(self, task: str, loss: float) -> float | None:
        adam = self.adam(task)
        start = self.final_loss(task, adam) if adam is not None else None
        end = self.final_loss(task, self.suite.target) if self.suite.target in self.suite.optimizers_of(task) else None
        if start is None or end is None or not end.median < start.median or not math.isfinite(loss):
            return None
        return (start.median - loss) / (start.median - end.median)


def mean_step_ms(result: Result) -> float:
    """Mean time of an optimizer step in milliseconds."""
    return 1000 * result.seconds[-1] / len(result.seconds) if result.seconds else math.nan


def write_csv(report: Report, path: Path) -> None:
    """One row per finished run; an infinite `final_loss` or `..._to_adam` (never, or no Adam yet) is left blank."""

    def blank(value: float) -> float | str:
        return value if math.isfinite(value) else ""

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for run, roles, result in report.runs.values():
            steps, seconds = report.time_to_adam(run, result)
            evaluations, duration = (result.evaluations[-1], result.seconds[-1]) if result.losses else (0, 0.0)
            writer.writerow(
                (
                    run.task, run.optimizer, "; ".join(roles), run.lr, run.seed, run.steps, result.status,
                    blank(result.final_loss), result.metric_name, result.metric, evaluations, f"{duration:.3f}",
                    blank(result.step_ms), blank(mean_step_ms(result)), blank(steps), blank(seconds),
                    result.state_bytes / result.num_params, result.num_params, result.error,
                )
            )  # fmt: skip


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, and a blank one."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _task_lines(report: Report, task: str) -> list[str]:
    summaries = [summary for summary in report.summaries if summary.task == task]
    adam = report.adam(task)
    if not summaries:
        return _lost_lines(report, task)
    header = [
        "optimizer", "best lr", "final train loss", summaries[0].metric_name, "steps to Adam's loss, full length",
        "steps to Adam's loss, any length", "seconds to Adam's loss", "over Adam's", "ms per step, median (mean)",
        "state bytes per parameter", "Adam to target covered",
    ]  # fmt: skip
    rows = []
    for item in summaries:
        style = ".2%" if item.metric_name.endswith("accuracy") else ".4g"
        lost = item.num_seeds - item.num_ok
        rows.append(
            [
                item.optimizer + (" (Adam)" if item.optimizer == adam else ""),
                f"{item.lr:g}",
                item.final_loss.text(".4g", missing="diverged")
                + (f" ({lost} of {item.num_seeds} lost)" if lost else ""),
                item.metric.text(style) if item.metric is not None else "-",
                *(
                    "-" if adam is None else spread.text(style)
                    for spread, style in (
                        (item.steps_full, ".2f"),
                        (item.steps_any, ".2f"),
                        (item.seconds, ".3g"),
                        (item.seconds_ratio, ".2f"),
                    )
                ),
                f"{item.step_ms:.2f} ({item.mean_step_ms:.2f})",
                f"{item.bytes_per_param:.2f}",
                "-" if item.covered is None else f"{item.covered:.0%}",
            ]
        )
    unknown = f"Of {' and '.join(report.suite.baselines)} none has run: no loss to reach.\n"
    notes = [unknown] if adam is None and report.suite.baselines else []
    return [f"## {task}", "", *format_table(header, rows), *notes, *_lost_lines(report, task)]


def _lost_lines(report: Report, task: str) -> list[str]:
    """What diverged or failed, and optimizers without a best rate."""
    lost: dict[tuple[str, str], list[str]] = {}
    for run, _, result in report.runs.values():
        if run.task == task and result.status != "ok":
            reason = result.status + (f" ({result.error})" if result.error else "")
            lost.setdefault((run.optimizer, reason), []).append(f"lr {run.lr:g} seed {run.seed}")
    return [f"{name} {reason}: {', '.join(places)}.\n" for (name, reason), places in lost.items()]


MIN_PAIRS = 3
"""Seeds that a paired test needs to say anything."""


def paired_test(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float, float]:
    """Whether one optimizer ends lower than another with the same seeds: a paired t-test of the log losses.

    Args:
        own: final losses, > 0, of at least MIN_PAIRS seeds.
        other: those of the other optimizer with the same seeds.

    Returns:
        The geometric mean of `other / own`, the 95 % interval of it, and the two-sided p-value.
    """
    result = stats.ttest_rel([math.log(x) for x in other], [math.log(x) for x in own])
    interval = result.confidence_interval(0.95)
    ratio = math.exp(statistics.fmean(math.log(y / x) for x, y in zip(own, other, strict=True)))
    return ratio, math.exp(interval.low), math.exp(interval.high), float(result.pvalue)


def _paired_lines(report: Report) -> list[str]:
    """Every optimizer beside `Suite.subject`, with the same seeds."""
    subject, rows = report.suite.subject, []
    for task in report.suite.tasks:
        own = {seed: result.final_loss for seed, (_, result) in report.results(task, subject).items()}
        for name in report.suite.optimizers_of(task):
            other = {seed: result.final_loss for seed, (_, result) in report.results(task, name).items()}
            # A loss of exactly zero, as on digits, has no logarithm.
            seeds = [seed for seed in own if seed in other and 0 < own[seed] * other[seed] < math.inf]
            if name == subject or len(seeds) < MIN_PAIRS:
                continue
            losses = [other[seed] for seed in seeds]
            ratio, low, high, p = paired_test([own[seed] for seed in seeds], losses)
            verdict = "higher" if low > 1 else "lower" if high < 1 else "not told apart"
            mean = f"{statistics.fmean(losses):.4g} +- {statistics.stdev(losses):.2g}"
            rows.append([task, name, mean, f"{ratio:.3f} [{low:.3f}, {high:.3f}]", f"{p:.2g}", verdict])
    if not rows:
        return []
    header = ["task", "optimizer", "final loss, mean and deviation", f"over {subject}'s [95 %]", "p", "its loss is"]
    title = f"## Beside {subject}, seed by seed: paired t-tests of log losses"
    return [title, "", *format_table(header, rows)]


def _fraction_lines(report: Report) -> list[str]:
    """Final losses of shortened runs against Adam's at full length."""
    suite = report.suite
    fractions = sorted({*suite.fractions, 1.0})
    if fractions == [1.0]:
        return []
    rows = []
    for task in suite.tasks:
        adam = report.adam(task)
        level = report.final_loss(task, adam) if adam is not None else None
        for name in [name for name in suite.shortened if name in suite.optimizers_of(task)]:
            spreads = [report.final_loss(task, name, fraction=fraction) for fraction in fractions]
            if level is not None and any(spreads):
                cells = [spread.text(".4g", missing="diverged") if spread is not None else "-" for spread in spreads]
                rows.append([task, name, *cells, level.text(".4g")])
    if not rows:
        return []
    header = ["task", "optimizer", *(f"{fraction:g} of the steps" for fraction in fractions), "Adam, all steps"]
    return ["## Shorter runs: final train loss, the schedule shrunk with the steps", "", *format_table(header, rows)]


def _robust_lines(report: Report) -> list[str]:
    """Each optimizer in `robust` against the better baseline at the same rate."""
    groups: dict[tuple[str, str, float], dict[str, list[float]]] = {}
    labels: dict[tuple[str, str, float], dict[str, None]] = {}  # two roles may come to one rate: one row
    for run, roles, result in report.runs.values():
        own_labels: dict[str, list[str]] = {}
        for name, label in (role.split(" at ") for role in roles if " at " in role):
            own_labels.setdefault(name, []).append(label)
        for name, found in own_labels.items():
            key = (run.task, name, run.lr)
            groups.setdefault(key, {}).setdefault(run.optimizer, []).append(result.final_loss)
            labels.setdefault(key, {}).update(dict.fromkeys(found))
    rows = []
    for (task, name, lr), by_name in groups.items():
        adam = [Spread.of(losses) for item, losses in by_name.items() if item in report.suite.baselines]
        if name in by_name and adam:
            own, other = Spread.of(by_name[name]), min(adam)
            losses = (item.text(".4g", missing="diverged") for item in (own, other))
            verdict = "yes" if own.median <= other.median else "**no**"
            rows.append([task, f"{name} at {', '.join(labels[task, name, lr])}", f"{lr:g}", *losses, verdict])
    if not rows:
        return []
    header = ["task", "run", "lr", "final train loss", "Adam at this lr", "at most Adam's"]
    return ["## Other learning rates", "", *format_table(header, rows)]


def format_report(report: Report, *, notes: Sequence[str]) -> str:
    """The Markdown report; `notes` are printed at the top (what was skipped)."""
    suite = report.suite
    device = torch.device("cuda" if suite.device == "cuda" else "cpu")
    rate = "the rate that the suite gives"
    if suite.lr_grid.max_points > 1:
        rate = f"its best rate of a grid searched with the first {suite.lr_grid.seeds} of them"
    lines = [
        "# Comparison",
        "",
        f"{describe_environment(device)}, {os.cpu_count()} CPUs, one thread a run; butterfly_opt {code_digest()}. "
        f"Seeds {suite.seeds}; medians over the seeds with [min, max]; each optimizer at {rate}. Steps are gradient "
        "evaluations, over those after which Adam itself stays at its final loss; Adam is the best of "
        f"{', '.join(suite.baselines)} on each task; the target is {suite.target}.",
        "",
        *(f"{note}\n" for note in notes),
    ]
    sections: list[Callable[[Report], list[str]]] = [_paired_lines, _fraction_lines, _robust_lines]
    for task in suite.tasks:
        lines += _task_lines(report, task)
    for section in sections:
        lines += section(report)
    return "\n".join(lines)

"""Learning rates of Adam and Butterfly side by side: `python -m experiments.transfer [--suite ...] [key=value ...]`.

On each task of a suite (by default one model at four widths) both search their best rate, and Butterfly is also trained
at Adam's. Beside the losses stands the size of an update in units of the rate: the root mean square over all entries of
`(theta_t+1 - theta_t) / lr`, the median over the steps. One run at a time, one thread; the same command goes on where
it was stopped. Writes into the output folder

    transfer.csv    one row a run
    transfer.md     the table
    transfer.png    final loss against the rate, where rates were searched
    runs/           one JSON file a run
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from experiments.measure import measure
from experiments.suite import Run, Suite, build_run, code_digest, load_suite, search_rates, select, usual_rate
from experiments.train import Parser, exit_code

WIDTHS = Path(__file__).parent.parent / "configs" / "transfer" / "widths.yaml"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: its smoothed final training loss, infinite if it diverged, and the size of its updates over lr."""

    task: str
    optimizer: str
    lr: float
    seed: int
    final_loss: float
    metric: float | None
    update_rms: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """On one task the better Adam at its best rate, Butterfly at its own, and Butterfly at Adam's."""

    adam: Trial
    own: Trial
    at_adams: Trial

    @property
    def ratio(self) -> float:
        """Butterfly's best rate over Adam's."""
        return self.own.lr / self.adam.lr

    @property
    def kept(self) -> float:
        """Share of the gain in the logarithm of the loss that Butterfly keeps at Adam's rate; NaN without a gain."""
        gain = math.log(self.adam.final_loss / self.own.final_loss)
        return math.log(self.adam.final_loss / self.at_adams.final_loss) / gain if gain > 0 else math.nan


@contextlib.contextmanager
def watched_updates() -> Iterator[list[float]]:
    """Collects the root mean square of every update of every optimizer, over the rate of its group."""
    before: list[Tensor] = []
    sizes: list[float] = []

    def remember(optimizer: Optimizer, *_: Any) -> None:
        before[:] = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]

    def compare(optimizer: Optimizer, *_: Any) -> None:
        pairs = [(param, float(group["lr"])) for group in optimizer.param_groups for param in group["params"]]
        changes = [(param.detach() - old) / lr for (param, lr), old in zip(pairs, before, strict=True)]
        square = sum(float(change.double().square().sum()) for change in changes)
        sizes.append(math.sqrt(square / sum(change.numel() for change in changes)))

    handles = [register_optimizer_step_pre_hook(remember), register_optimizer_step_post_hook(compare)]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def train(run: Run, folder: Path) -> Trial:
    """The trial of a run: read if it is there, else trained and kept."""
    path = folder / "runs" / f"{run.key}.json"
    if not path.exists():
        with watched_updates() as sizes:
            result = measure(run)
        rms = statistics.median(sizes) if sizes else math.nan
        trial = Trial(run.task, run.optimizer, run.lr, run.seed, result.final_loss, result.metric, rms)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(trial)), encoding="utf-8")
        temporary.replace(path)
        print(f"{run.task} {run.optimizer} lr {run.lr:g}: loss {trial.final_loss:.4g}, rms {rms:.3f}", flush=True)
    return Trial(**json.loads(path.read_text(encoding="utf-8")))


def search(suite: Suite, task: str, optimizer: str, folder: Path) -> list[Trial]:
    """The trials of the grid with the first seed, extended while the best rate lies on an edge; by rate."""
    usual = usual_rate(suite, task, optimizer)
    found: dict[float, Trial] = {}
    while True:
        losses = {lr: trial.final_loss for lr, trial in found.items()}
        rates, _ = search_rates(usual, suite.lr_grid, losses.get)
        missing = [lr for lr in rates if lr not in found]
        if not missing:
            return [found[lr] for lr in rates]
        found[missing[0]] = train(build_run(suite, task, optimizer, lr=missing[0], seed=suite.seeds[0]), folder)


def compare(suite: Suite, task: str, optimizer: str, folder: Path) -> tuple[Comparison, list[Trial]]:
    """The comparison on a task, and all its trials."""

    def loss(trial: Trial) -> float:
        return trial.final_loss

    adams = [trial for name in suite.baselines for trial in search(suite, task, name, folder)]
    owns = search(suite, task, optimizer, folder)
    adam, own = min(adams, key=loss), min(owns, key=loss)
    at_adams = train(build_run(suite, task, optimizer, lr=adam.lr, seed=adam.seed), folder)
    return Comparison(adam, own, at_adams), [*adams, *owns, *([at_adams] if at_adams not in owns else [])]


def format_page(found: Sequence[Comparison], *, has_figure: bool) -> str:
    """The Markdown page: what was measured, the table, and the spread of the rates over the tasks."""
    header = ("task", "Adam: best lr", "loss", "update / lr", "Butterfly: best lr", "over Adam's", "loss",
              "update / lr", "Butterfly at Adam's lr: loss", "of its gain kept")  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for item in found:
        adam, own = item.adam, item.own
        cells = [adam.task, f"{adam.lr:g}", f"{adam.final_loss:.4g}", f"{adam.update_rms:.3f}", f"{own.lr:g}",
                 f"{item.ratio:.2g}", f"{own.final_loss:.4g}", f"{own.update_rms:.3f}",
                 f"{item.at_adams.final_loss:.4g}", f"{item.kept:.0%}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    ratios = [item.ratio for item in found]
    spreads = [max(rates) / min(rates) for rates in ([x.adam.lr for x in found], [x.own.lr for x in found])]
    return "\n".join([
        "# Learning rates of Adam and Butterfly",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, one thread; butterfly_opt {code_digest()}, "
        f"seed {found[0].adam.seed}. Final training losses, smoothed, at the best rate of each one's grid; update / lr "
        "is the root mean square of an update over the rate, the median over the steps of that run. The last column: "
        "log(Adam / Butterfly at Adam's lr) over log(Adam / Butterfly), of the losses.",
        "",
        *lines,
        "",
        f"Best rates of Butterfly over Adam's: median {statistics.median(ratios):.2g}, from {min(ratios):.2g} to "
        f"{max(ratios):.2g}. Largest best rate over the smallest: Adam {spreads[0]:.3g}, Butterfly {spreads[1]:.3g}.",
        "",
        *(["![Final loss against the rate](transfer.png)", ""] if has_figure else []),
    ])  # fmt: skip


def draw(trials: Sequence[Trial], path: Path) -> None:
    """A panel for each optimizer: final loss against the rate, a line a task, a ring at the best; diverged runs end."""
    from experiments.paper_files import PLAN_STYLES, add_legend, new_figure  # matplotlib is slow to import

    names, tasks = (list(dict.fromkeys(getattr(trial, key) for trial in trials)) for key in ("optimizer", "task"))
    figure, axes = new_figure(1, len(names), width=4.0 * len(names), height=3.6, sharey=True)
    for axis, name in zip(axes.flat, names, strict=True):
        for number, task in enumerate(tasks):
            line = sorted((t.lr, t.final_loss) for t in trials if (t.optimizer, t.task) == (name, task))
            style = PLAN_STYLES[number % len(PLAN_STYLES)]
            axis.plot(*zip(*line, strict=True), label=task, markersize=3, linewidth=1.2, **style)
            best = min(line, key=lambda point: point[1])
            axis.plot(*best, color=style["color"], marker="o", markersize=9, fillstyle="none", linestyle="")
        axis.set(xscale="log", yscale="log", xlabel="learning rate", title=name)
    axes.flat[0].set_ylabel("final training loss")
    add_legend(figure, axes, columns=len(tasks))
    figure.savefig(path, dpi=130)


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m experiments.transfer", description="Learning rates of Adam and Butterfly.")
    parser.add_argument("--suite", type=Path, default=WIDTHS, help="YAML file (default: configs/transfer/widths.yaml)")
    parser.add_argument("--task", action="append", default=[], help="train only this task; may be repeated")
    parser.add_argument("--optimizer", default="butterfly", help="entry of the suite beside the baselines")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="output folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=/data")
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    suite = load_suite(arguments.suite, arguments.overrides)
    select(suite.optimizers, [arguments.optimizer], "optimizer")
    torch.set_num_threads(1)  # as in every comparison: the losses of one run do not depend on the machine's load
    found, trials = [], []
    for task in select(suite.tasks, arguments.task, "task"):
        comparison, own = compare(suite, task, arguments.optimizer, arguments.out)
        found.append(comparison)
        trials += own
        write(found, trials, arguments.out, searched=suite.lr_grid.max_points > 1)
    print(f"results: {arguments.out / 'transfer.md'}")
    return 0


def write(found: Sequence[Comparison], trials: Sequence[Trial], folder: Path, *, searched: bool) -> None:
    """Writes the CSV, the page and, where rates were searched, the figure."""
    from experiments.paper_files import write_rows

    write_rows(folder / "transfer.csv", trials)
    if searched:
        draw(trials, folder / "transfer.png")
    (folder / "transfer.md").write_text(format_page(found, has_figure=searched), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

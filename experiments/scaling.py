"""Time of an optimizer's step and bytes of its state as models grow: `python -m experiments.scaling`.

Square matrices with random gradients, float32, one thread on a CPU: four of them at growing width (one from 2048 on),
and more and more at width 128. Butterfly beside Adam, SOAP and Muon (both with their defaults); of all the plain step
(the median) and the mean, which holds refits and decompositions. A size is left out where the size before, times the
growth of a matrix product, says that it would take more than `--limit` seconds. Writes into the output folder

    scaling.csv     one row an optimizer and size
    scaling.md      the tables, and where Butterfly's mean step gets shorter than the others'
    scaling.png     time against width and depth
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from butterfly_opt import Butterfly
from experiments.benchmarking import describe_environment, note
from experiments.config import Component, ConfigError
from experiments.measure import state_bytes
from experiments.optimizers import build_optimizer
from experiments.report import format_table
from experiments.suite import code_digest
from experiments.train import Parser, exit_code

OPTIMIZERS = {
    "Adam": Component("Adam"),
    "Butterfly": Component("Butterfly"),
    "SOAP": Component("pytorch_optimizer.SOAP"),
    "Muon": Component("experiments.variants.Float32Muon"),
}
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
WIDTH_OF_DEPTHS = 128
CYCLE = 10
"""Steps between two refits of Butterfly, and between two decompositions of SOAP."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer at one size; `sweep` is "width" or "depth", times are of a step of all layers."""

    sweep: str
    width: int
    layers: int
    optimizer: str
    steps: int
    median_ms: float
    mean_ms: float
    state_bytes_per_param: float

    @property
    def size(self) -> int:
        """What grows in the sweep."""
        return self.width if self.sweep == "width" else self.layers


def time_steps(component: Component, width: int, layers: int, *, seconds: float) -> tuple[list[float], float]:
    """Times of single steps, over whole cycles, and bytes of state a parameter.

    At least one cycle, more while they fit in `seconds`. The first steps, which make the state, are not counted.
    """
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(width, width, generator=generator) * 0.02) for _ in range(layers)]
    # Two sets of gradients take turns: constant ones have no innovation.
    sets: list[list[Tensor]] = [[torch.randn(width, width, generator=generator) for _ in params] for _ in range(2)]
    optimizer = build_optimizer(component, params)
    count = 0

    def step() -> float:
        nonlocal count
        for param, grad in zip(params, sets[count % 2], strict=True):
            param.grad = grad.clone()  # some optimizers write into it
        count += 1
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(2):
        step()
    _pass_warmup(optimizer)
    times: list[float] = []
    while not times or sum(times) * (1 + CYCLE / len(times)) < seconds:
        times += [step() for _ in range(CYCLE)]
    return times, state_bytes([optimizer]) / (layers * width * width)


def _pass_warmup(optimizer: Optimizer) -> None:
    """Sets the clock of Butterfly behind its first 100 steps, which refit more often; they take minutes at 4096."""
    if isinstance(optimizer, Butterfly):
        for state in optimizer.state.values():
            state["calls"] += 100


def layers_of(width: int) -> int:
    """Matrices of a width; one where four would take minutes."""
    return 4 if width < 2048 else 1


def sweep(
    name: str, sizes: Sequence[tuple[int, int]], optimizers: Sequence[str], *, limit: float, seconds: float
) -> list[Row]:
    """The rows of a sweep over (width, layers), sizes in growing order."""
    rows = []
    for optimizer in optimizers:
        before: tuple[float, float] | None = None  # work in multiplications, and the seconds it took
        for width, layers in sizes:
            work = layers * width**3
            if before is not None and before[1] * work / before[0] > limit:
                note(f"{optimizer} at {width} x {width} x {layers} is left out: more than {limit:g} s")
                break
            start = time.perf_counter()
            times, state = time_steps(OPTIMIZERS[optimizer], width, layers, seconds=seconds)
            # What went on top of the seconds that were asked for.
            before = work, time.perf_counter() - start - max(0.0, sum(times) - CYCLE * statistics.fmean(times))
            median, mean = 1e3 * statistics.median(times), 1e3 * statistics.fmean(times)
            rows.append(Row(name, width, layers, optimizer, len(times), median, mean, state))
            note(f"{optimizer} {width} x {width} x {layers}: {median:.3g} ms, mean {mean:.3g} ms")
    return rows


def crossover(rows: Sequence[Row], other: str) -> float | None:
    """The size from which on Butterfly's mean step is shorter than another's; None if it is not at the largest.

    Interpolated between two sizes as a power law; the smallest size if it is shorter everywhere.
    """
    times = {(row.optimizer, row.size): row.mean_ms for row in rows}
    sizes = sorted({size for name, size in times if name == other and ("Butterfly", size) in times})
    logs = [math.log(times["Butterfly", size] / times[other, size]) for size in sizes]
    if not logs or logs[-1] >= 0:
        return None
    last = max((i for i, ratio in enumerate(logs) if ratio >= 0), default=None)
    if last is None:
        return sizes[0]
    share = logs[last] / (logs[last] - logs[last + 1])
    return math.exp(math.log(sizes[last]) + share * math.log(sizes[last + 1] / sizes[last]))


def describe_crossovers(rows: Sequence[Row], what: str) -> str:
    """A sentence for each other optimizer."""
    sentences = []
    for other in dict.fromkeys(row.optimizer for row in rows if row.optimizer != "Butterfly"):
        size = crossover(rows, other)
        sentences.append(
            f"{other}: its mean step stays the shorter one."
            if size is None
            else f"{other}: Butterfly's mean step is shorter from {what} {size:.0f} on."
        )
    return " ".join(sentences)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_page(rows: Sequence[Row]) -> str:
    """The Markdown page."""
    lines = [
        "# Time and state of a step as models grow",
        "",
        f"{describe_environment(torch.device('cpu'))}, one thread; butterfly_opt {code_digest()}. Square float32 "
        "matrices, random gradients. Milliseconds of `optimizer.step()` for all of them: the median, a plain step, and "
        f"in brackets the mean over cycles of {CYCLE} steps, with refits and decompositions (Butterfly spreads those "
        "of larger matrices over the steps); bytes of state a parameter. A dash: left out, too slow. Muon's products "
        "are in bfloat16, which most CPUs emulate.",
        "",
    ]
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    for name, what in (("width", "width"), ("depth", "layers")):
        own = [row for row in rows if row.sweep == name]
        found = {(row.optimizer, row.size): row for row in own}
        cells = []
        for width, layers in dict.fromkeys((row.width, row.layers) for row in own):
            size = width if name == "width" else layers
            here = [found.get((optimizer, size)) for optimizer in optimizers]
            times = ["-" if r is None else f"{_digits(r.median_ms)} ({_digits(r.mean_ms)})" for r in here]
            state = ["-" if r is None else f"{r.state_bytes_per_param:.1f}" for r in here]
            cells.append([f"{layers} x {width} x {width}", *times, *state])
        header = ["matrices", *(f"{item}, ms" for item in optimizers), *(f"{item}, bytes" for item in optimizers)]
        lines += [f"## Over {name}", "", *format_table(header, cells), describe_crossovers(own, what), ""]
    return "\n".join([*lines, "![Time against width and depth](scaling.png)", ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time a layer against width, and of all layers against depth; the mean as a line, the plain step dotted."""
    from experiments.paper_files import PLAN_STYLES, add_legend, new_figure  # matplotlib is slow to import

    figure, axes = new_figure(1, 2, width=9.0, height=3.8)
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    for axis, name in zip(axes.flat, ("width", "depth"), strict=True):
        for optimizer, style in zip(optimizers, PLAN_STYLES, strict=False):
            own = [row for row in rows if (row.sweep, row.optimizer) == (name, optimizer)]
            layers = [row.layers if name == "width" else 1 for row in own]
            for key, line, label in (("mean_ms", "-", optimizer), ("median_ms", ":", None)):
                times = [getattr(row, key) / count for row, count in zip(own, layers, strict=True)]
                axis.plot([row.size for row in own], times, linestyle=line, markersize=4, label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axes[0, 0].set(xlabel="width of a square matrix", ylabel="ms a step and matrix")
    axes[0, 1].set(xlabel=f"matrices of width {WIDTH_OF_DEPTHS}", ylabel="ms a step, all matrices")
    figure.suptitle("mean of a step (lines) and plain step (dotted)", fontsize=10)
    add_legend(figure, axes, columns=len(optimizers))
    figure.savefig(path, dpi=130)


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m experiments.scaling", description="Time and state of a step as models grow.")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="widths of the matrices")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help=f"matrices of width {WIDTH_OF_DEPTHS}")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds an optimizer and size may take")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds to spend on each at least")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="output folder")
    arguments = parser.parse_args(argv)
    if min(*arguments.widths, *arguments.depths) < 1:
        raise ConfigError(f"widths and depths must be at least 1, got {arguments.widths} and {arguments.depths}")
    names = [name for name in OPTIMIZERS if name != "SOAP" or importlib.util.find_spec("pytorch_optimizer")]
    torch.set_num_threads(1)
    options = {"limit": arguments.limit, "seconds": arguments.seconds}
    rows = sweep("width", [(width, layers_of(width)) for width in sorted(arguments.widths)], names, **options)
    rows += sweep("depth", [(WIDTH_OF_DEPTHS, layers) for layers in sorted(arguments.depths)], names, **options)
    write(rows, arguments.out)
    print(f"results: {arguments.out / 'scaling.md'}")
    return 0


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes the CSV, the page and the figure."""
    from experiments.paper_files import write_rows

    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "scaling.csv", rows)
    (folder / "scaling.md").write_text(format_page(rows), encoding="utf-8")
    draw(rows, folder / "scaling.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

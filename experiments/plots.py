"""Figures of a comparison: loss curves of each task, and one overview."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.measure import Result, smooth
from experiments.report import Report, Summary

_POINTS = 300
_AXES: tuple[tuple[str, Callable[[Result], Sequence[float]]], ...] = (
    ("optimizer steps", lambda result: range(1, len(result.losses) + 1)),
    ("gradient evaluations", lambda result: result.evaluations),
    ("seconds", lambda result: result.seconds),
)


def _style(suite_names: Sequence[str], name: str) -> dict[str, Any]:
    """Colour and line of an optimizer, the same in every figure."""
    from matplotlib import colormaps  # slow to import, and every worker imports this module

    index = suite_names.index(name)
    return {"color": colormaps["tab10"](index % 10), "linestyle": ("-", "--", ":")[index // 10 % 3]}


def _new_figure(width: float, height: float, panels: int) -> tuple[Any, Sequence[Any]]:
    """A figure of some inches with panels side by side, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False).ravel())


def _band(
    results: Sequence[Result], window: int, read: Callable[[Result], Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Abscissae and the smoothed loss of each run interpolated to them, (runs, points)."""
    end = min(read(result)[-1] for result in results)
    start = max(read(result)[0] for result in results)
    x = np.linspace(min(start, end), end, _POINTS)
    curves = [np.interp(x, read(item), smooth(item.losses, item.evaluations, window)) for item in results]
    return x, np.array(curves)


def draw_task(report: Report, task: str, path: Path) -> bool:
    """Smoothed loss (median and range over the seeds) against steps, evaluations and seconds; False without runs."""
    names = list(report.suite.optimizers)
    figure, panels = _new_figure(15.0, 4.8, len(_AXES))
    lowest, highest = math.inf, -math.inf
    for name in report.suite.optimizers_of(task):
        pairs = [pair for pair in report.results(task, name).values() if pair[1].status == "ok"]
        if not pairs:
            continue
        results, window = [result for _, result in pairs], pairs[0][0].window
        for axis, (_, read) in zip(panels, _AXES, strict=True):
            x, curves = _band(results, window, read)
            style = _style(names, name)
            axis.plot(x, np.median(curves, 0), label=f"{name} (lr {pairs[0][0].lr:g})", linewidth=1.5, **style)
            axis.fill_between(x, curves.min(0), curves.max(0), color=style["color"], alpha=0.12, linewidth=0)
            lowest, highest = min(lowest, curves.min()), max(highest, float(np.median(curves[:, 0])))
    if lowest == math.inf:
        return False
    adam = report.adam(task)
    level = report.final_loss(task, adam) if adam is not None else None
    for axis, (label, _) in zip(panels, _AXES, strict=True):
        if level is not None:
            axis.axhline(level.median, color="0.4", linestyle=(0, (1, 2)), linewidth=1.0, label="Adam's final loss")
        axis.set(xlabel=label, yscale="log", ylim=(lowest * 0.95, highest * 1.05))
        axis.grid(True, which="both", color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xscale("log")
    panels[0].set_ylabel("smoothed training loss")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(task)
    figure.savefig(path)
    return True


def _heat(axis: Any, report: Report, title: str, read: Callable[[Summary], float], *, ratio: bool) -> None:
    """Optimizers by tasks, each cell with its number; ratios are coloured around 1, blue below."""
    tasks = [task for task in report.suite.tasks if any(item.task == task for item in report.summaries)]
    names = [name for name in report.suite.optimizers if any(item.optimizer == name for item in report.summaries)]
    values = np.full((len(names), len(tasks)), np.nan)
    for item in report.summaries:
        values[names.index(item.optimizer), tasks.index(item.task)] = read(item)
    with np.errstate(divide="ignore"):
        shown = np.log2(np.where(np.isfinite(values), values, np.nan))
    limits = {"vmin": -2.0, "vmax": 2.0} if ratio else {}
    image = axis.imshow(shown, cmap="RdBu_r" if ratio else "Greys", aspect="auto", **limits)
    for (row, column), value in np.ndenumerate(values):
        text = "" if math.isnan(value) else f"{value:.2f}" if math.isfinite(value) else "never"
        is_dark = math.isfinite(value) and np.mean(image.cmap(image.norm(shown[row, column]))[:3]) < 0.5
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")
    axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(title, fontsize=10)


def draw_overview(report: Report, path: Path) -> None:
    """Steps and seconds to Adam's final loss, over Adam's, and the bytes of state, as three tables of colours."""
    rows = len({item.optimizer for item in report.summaries})
    figure, panels = _new_figure(18.0, 2.5 + 0.35 * rows, 3)
    _heat(panels[0], report, "steps to Adam's final loss / Adam's", lambda item: item.steps_any.median, ratio=True)
    _heat(
        panels[1], report, "seconds to Adam's final loss / Adam's", lambda item: item.seconds_ratio.median, ratio=True
    )
    _heat(panels[2], report, "state bytes per parameter", lambda item: item.bytes_per_param, ratio=False)
    figure.savefig(path)


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Draws loss-<task>.png and overview.png into the folder; tasks without results are left out."""
    if not report.summaries:
        return []
    paths = [folder / f"loss-{task}.png" for task in report.suite.tasks]
    drawn = [path for task, path in zip(report.suite.tasks, paths, strict=True) if draw_task(report, task, path)]
    draw_overview(report, folder / "overview.png")
    return [*drawn, folder / "overview.png"]

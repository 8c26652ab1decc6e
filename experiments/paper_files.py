"""What the paper's experiments share: strict configurations, CSV of dataclass rows, figures as PDF and PNG."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.config import ConfigError, apply_overrides, load_section, read_yaml
from experiments.run_folder import check_new_folder

# M. Okabe, K. Ito, "Color Universal Design" (2008): told apart by colour-blind readers.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
PLAN_STYLES = (
    {"color": SKY, "marker": "o"},
    {"color": BLUE, "marker": "s"},
    {"color": GREEN, "marker": "^"},
    {"color": BLACK, "marker": "D"},
    {"color": PURPLE, "marker": "v"},
    {"color": YELLOW, "marker": "P"},
)
"""Of the butterflies of a figure, in order; after the last one they repeat."""


def load(section_type: type, path: Path, overrides: Sequence[str]) -> Any:
    """The configuration of an experiment; the file must be valid by itself.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of bounds.
    """
    raw = read_yaml(path)
    load_section(section_type, raw, "")
    return load_section(section_type, apply_overrides(raw, overrides), "")


def check_at_least(low: float, **values: float | Sequence[float]) -> None:
    """Checks numbers, and lists of numbers that may not be empty.

    Raises:
        ConfigError: a number below ``low``, or an empty list.
    """
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) else [value]
        if not numbers or not all(number >= low for number in numbers):
            raise ConfigError(f"{name} must be at least {low}, got {value}")


def open_folder(path: Path, config: Any) -> Path:
    """Creates the run folder and writes the configuration into it.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    check_new_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    plain = {**dataclasses.asdict(config), "run_dir": None}
    (path / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return path


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes dataclass instances of one class as CSV, one column a field."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(rows[0])])
        writer.writerows(dataclasses.astuple(row) for row in rows)


def new_figure(rows: int, columns: int, *, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure in inches and its axes as a 2-d array; ``options`` as for ``Figure.subplots``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(True, which="major", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def add_legend(figure: Figure, axes: Any, *, columns: int) -> None:
    """One legend under all panels, each label once."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Saves ``name.pdf`` and ``name.png``."""
    figure.savefig(folder / f"{name}.pdf")
    figure.savefig(folder / f"{name}.png", dpi=100)

"""The files of one run: config.yaml, metrics.csv, checkpoint.pt, curves.png and TensorBoard events."""

from __future__ import annotations

import csv
import datetime
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from experiments.config import Config, ConfigError
from experiments.loop import Row

_COLUMNS = ("step", "train_loss", "lr", "test_loss", "test_accuracy", "seconds")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` that takes its place when written completely and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """Checks that a run may be written to `path`.

    Raises:
        ConfigError: `path` exists and is not an empty folder.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"run_dir {path} is not empty: continue it with --resume {path}, or name another run_dir")


def default_folder(config_path: Path) -> Path:
    """Returns runs/<config-name>-<timestamp>, with a number where two runs start in one second."""
    base = Path("runs") / f"{config_path.stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads checkpoint.pt of a run folder onto the CPU.

    Raises:
        ConfigError: there is no such folder or file, or it cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(f"there is no run folder {path}")
    file = path / "checkpoint.pt"
    if not file.is_file():
        raise ConfigError(f"the run folder {path} has no checkpoint.pt")
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"cannot read the checkpoint {file}: {first}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ConfigError(f"{file} is not a checkpoint of experiments.train")
    return state


class RunFolder:
    """Writes a run's files; satisfies `experiments.loop.Recorder`.

    Args:
        path: the folder; created with its parents when absent.
        config: written to config.yaml, with the device it runs on.
        resume_step: the checkpoint's step; later rows of an existing metrics.csv are dropped. 0 for a new run.
    """

    def __init__(self, path: Path, config: Config, *, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        # The folder itself says where it is: run_dir stays empty, so that the file can start another run.
        plain = {**config.to_dict(), "run_dir": None}
        with _replacing(path / "config.yaml") as file:
            file.write(yaml.safe_dump(plain, sort_keys=False).encode())
        kept = [row for row in self._read_metrics() if int(row["step"]) <= resume_step]
        with _replacing(self._metrics_path) as file:
            lines = [",".join(_COLUMNS), *(",".join(row[column] for column in _COLUMNS) for row in kept)]
            file.write(("\n".join(lines) + "\n").encode())
        self._metrics = self._metrics_path.open("a", encoding="utf-8", newline="")
        self._csv = csv.writer(self._metrics, lineterminator="\n")
        self._board = SummaryWriter(path / "tensorboard", purge_step=resume_step + 1 if resume_step else None)

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.csv"

    def _read_metrics(self) -> list[dict[str, str]]:
        if not self._metrics_path.exists():
            return []
        with self._metrics_path.open(encoding="utf-8", newline="") as file:
            # A line cut short by a crash has no value in its last column.
            return [row for row in csv.DictReader(file) if all(row.get(column) is not None for column in _COLUMNS)]

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Appends the rows to metrics.csv and TensorBoard."""
        for row in rows:
            loss = accuracy = None
            self._board.add_scalar("train/loss", row.train_loss, row.step)
            self._board.add_scalar("train/lr", row.lr, row.step)
            if row.evaluation is not None:
                loss, accuracy = row.evaluation.loss, row.evaluation.accuracy
                self._board.add_scalar("test/loss", loss, row.step)
                if accuracy is not None:
                    self._board.add_scalar("test/accuracy", accuracy, row.step)
            self._csv.writerow([row.step, row.train_loss, row.lr, loss, accuracy, f"{row.seconds:.3f}"])
        self._metrics.flush()

    def add_diagnostics(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the optimizer's own numbers to TensorBoard."""
        for name, value in numbers.items():
            self._board.add_scalar(f"optimizer/{name}", value, step)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces checkpoint.pt atomically."""
        # The rows must be on disk before a checkpoint that says they are done.
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        with _replacing(self.path / "checkpoint.pt") as file:
            torch.save(dict(state), file)

    def close(self) -> None:
        """Closes the files and draws curves.png."""
        self._metrics.close()
        self._board.close()
        rows = self._read_metrics()
        if rows:
            with _replacing(self.path / "curves.png") as file:
                draw_curves(rows, file, title=self.path.name)


def _column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column where it is not blank."""
    filled = [row for row in rows if row[name]]
    return [int(row["step"]) for row in filled], [float(row[name]) for row in filled]


def draw_curves(rows: Sequence[Mapping[str, str]], file: IO[bytes], *, title: str) -> None:
    """Draws train and test loss (log scale), and the test accuracy where there is one, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

    accuracy_steps, accuracy = _column(rows, "test_accuracy")
    panels = 2 if accuracy else 1
    figure = Figure(figsize=(5.6 * panels, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharex=True)[0]
    steps, losses = _column(rows, "train_loss")
    window = max(1, len(losses) // 50)
    smooth = [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
    axes[0].plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    name = "train" if window == 1 else f"train (mean of {window} steps)"
    axes[0].plot(steps, smooth, color="tab:blue", linewidth=1.5, label=name)
    test_steps, test_losses = _column(rows, "test_loss")
    axes[0].plot(test_steps, test_losses, color="tab:orange", marker="o", markersize=3.5, label="test")
    axes[0].set(ylabel="loss (log scale)", title="Loss", yscale="log")
    # Ticks at 1, 2 and 5: a loss often spans less than a decade, where powers of ten say little.
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(frameon=False)
    if accuracy:
        axes[1].plot(accuracy_steps, accuracy, color="tab:green", marker="o", markersize=3.5)
        axes[1].set(ylabel="test accuracy", title=f"Test accuracy: {accuracy[-1]:.1%} at the end")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes:
        axis.set_xlabel("training step")
        axis.grid(True, which="major", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color="0.35")
    figure.savefig(file, format="png")

"""The training loop shared by `experiments.train` and `experiments.sweep`."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.trainer import Evaluation, Trainer

# Losses are read from the device once per so many steps, so that a GPU is not waited for at every step.
_READ_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One training step: the loss before the update, the rate it used, training seconds so far."""

    step: int
    train_loss: float
    lr: float
    seconds: float
    evaluation: Evaluation | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a run; `train_loss` is the mean over the last 20 steps, `step_ms` excludes the first steps."""

    train_loss: float
    evaluation: Evaluation
    seconds: float
    step_ms: float


class DivergedError(Exception):
    """The training loss is not finite."""


class StoppedError(Exception):
    """Stopped between two steps, after a checkpoint."""


class Recorder(Protocol):
    """Where a run's results go; `RunFolder` writes files, `NullRecorder` nothing."""

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Called with consecutive steps, each step once."""

    def add_diagnostics(self, step: int, numbers: Mapping[str, float]) -> None:
        """Called at an evaluation with the optimizer's own numbers."""

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Called after the rows up to the checkpoint's step were added."""


class NullRecorder:
    """Keeps nothing."""

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Does nothing."""

    def add_diagnostics(self, step: int, numbers: Mapping[str, float]) -> None:
        """Does nothing."""

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""


def named_scalars(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Few scalars of `Butterfly.diagnostics`, by parameter name, and by number where there are no names."""
    scalars = {"nonfinite_steps": float(sum(group["nonfinite_steps"] for group in groups))}
    for index, tensor in enumerate(tensor for group in groups for tensor in group["tensors"]):
        if "off_diagonal" in tensor:  # matrices only: what the basis misses, and the noise it finds
            name = tensor["name"] or str(index)
            scalars[f"off_diagonal/{name}"] = max(tensor["off_diagonal"])
            scalars[f"noise/{name}"] = tensor["noise_quantiles"][1]
    return scalars


class _Segment:
    """Steps whose losses have not been read from the device yet, and the clock that runs meanwhile."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps: list[tuple[int, Tensor, float, float]] = []
        self.start = time.perf_counter()

    def take_step(self) -> None:
        lr = float(self.trainer.optimizer.param_groups[0]["lr"])
        loss = self.trainer.train_step()
        seconds = self.trainer.seconds + time.perf_counter() - self.start
        self.steps.append((self.trainer.step, loss, lr, seconds))

    def read(self) -> list[Row]:
        """Reads the losses, which waits for the device, and adds the time to the trainer's."""
        losses = torch.stack([loss for _, loss, _, _ in self.steps]).tolist()
        self.trainer.seconds += time.perf_counter() - self.start
        self.trainer.recent_losses.extend(losses)
        return [Row(step, loss, lr, seconds) for loss, (step, _, lr, seconds) in zip(losses, self.steps, strict=True)]


def fit(
    trainer: Trainer,
    recorder: Recorder,
    *,
    label: str = "training",
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains from `trainer.step` to the configured number of steps.

    Evaluates every `eval_every` steps and at the end, saves a checkpoint before the first step, every
    `checkpoint_every` steps, at the end, and when `should_stop()` turns true, which is asked after every step.

    Raises:
        DivergedError: the loss is not finite; the steps up to it are recorded.
        StoppedError: `should_stop()` was true.
    """
    config = trainer.config
    evaluation: Evaluation | None = None
    timed_from: tuple[int, float] | None = None
    first_step, first_seconds = trainer.step, trainer.seconds
    if trainer.step == 0:
        recorder.save_checkpoint(trainer.state_dict())
    segment = _Segment(trainer)
    with tqdm(total=config.steps, initial=trainer.step, desc=label, unit="step", dynamic_ncols=True) as bar:
        while trainer.step < config.steps:
            segment.take_step()
            stop, is_last = should_stop(), trainer.step == config.steps
            is_evaluation = is_last or trainer.step % config.eval_every == 0
            is_checkpoint = is_last or stop or trainer.step % config.checkpoint_every == 0
            if not (is_evaluation or is_checkpoint or len(segment.steps) == _READ_EVERY):
                continue
            rows = segment.read()
            _check_finite(rows, recorder)
            if is_evaluation:
                evaluation = trainer.evaluate()
                rows[-1] = dataclasses.replace(rows[-1], evaluation=evaluation)
                _add_diagnostics(trainer, recorder)
            recorder.add_rows(rows)
            if is_checkpoint:
                recorder.save_checkpoint(trainer.state_dict())
            _show(bar, rows, evaluation)
            if stop and not is_last:
                raise StoppedError
            # Compilation and lazy state make the first steps slow.
            timed_from = timed_from or (trainer.step, trainer.seconds)
            segment = _Segment(trainer)
    if timed_from is None or timed_from[0] == trainer.step:
        timed_from = first_step, first_seconds
    return _outcome(trainer, evaluation or trainer.evaluate(), timed_from)


def _outcome(trainer: Trainer, evaluation: Evaluation, timed_from: tuple[int, float]) -> Outcome:
    step, seconds = timed_from
    step_ms = 1000 * (trainer.seconds - seconds) / max(1, trainer.step - step)
    return Outcome(statistics.fmean(trainer.recent_losses), evaluation, trainer.seconds, step_ms)


def _check_finite(rows: Sequence[Row], recorder: Recorder) -> None:
    for index, row in enumerate(rows):
        if not math.isfinite(row.train_loss):
            recorder.add_rows(rows[: index + 1])
            raise DivergedError(f"the loss became {row.train_loss} at step {row.step}; try a lower optimizer.lr")


def _add_diagnostics(trainer: Trainer, recorder: Recorder) -> None:
    diagnostics = getattr(trainer.optimizer, "diagnostics", None)
    if callable(diagnostics):
        recorder.add_diagnostics(trainer.step, named_scalars(diagnostics()))


def _show(bar: tqdm[Any], rows: Sequence[Row], evaluation: Evaluation | None) -> None:
    shown = {"loss": f"{rows[-1].train_loss:.4g}"}
    if evaluation is not None and evaluation.accuracy is not None:
        shown["test acc"] = f"{evaluation.accuracy:.2%}"
    elif evaluation is not None:
        shown["test loss"] = f"{evaluation.loss:.4g}"
    bar.set_postfix(shown, refresh=False)
    bar.update(rows[-1].step - bar.n)

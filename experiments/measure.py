"""Trains one run of a suite and measures it: losses, times, gradient evaluations, state bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.config import ConfigError
from experiments.optimizers import build_optimizers, evaluating, lr_factor
from experiments.problems import Problem, build_problem
from experiments.suite import Run


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        status: "ok", "diverged" or "failed" (the optimizer raised; `error` says what).
        final_loss: the smoothed training loss at the end; infinite unless the status is "ok".
        metric: the validation number named `metric_name`; None unless the status is "ok".
        losses: the training loss before each optimizer step.
        evaluations: which gradient evaluation, from 1, each of these losses came from.
        seconds: training time so far after each step, evaluation excluded.
        step_ms: median time of a step; a refit or a decomposition every tenth step does not show in it.
        state_bytes: bytes of all tensors in the optimizer's state, each storage once.
    """

    status: str
    final_loss: float
    metric: float | None
    metric_name: str
    losses: list[float]
    evaluations: list[int]
    seconds: list[float]
    step_ms: float
    state_bytes: int
    num_params: int
    error: str = ""


def smooth(losses: Sequence[float], evaluations: Sequence[int], window: int) -> list[float]:
    """The smoothed loss: the mean over the steps of the last `window` gradient evaluations, itself included.

    Entry i averages the losses j <= i with evaluations[j] > evaluations[i] - window. For an optimizer with one
    evaluation a step this is the mean of the last `window` losses (of all so far in the first ones).
    """
    smoothed, start = [], 0
    for index in range(len(losses)):
        while evaluations[start] <= evaluations[index] - window:
            start += 1
        # No running sum: after one huge loss it would hold rounding errors only.
        smoothed.append(statistics.fmean(losses[start : index + 1]))
    return smoothed


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, (list, tuple)):
        for value in nested:
            yield from _tensors(value)


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes of the tensors in the states, at any depth; what shares a storage is counted once."""
    storages = {}
    for optimizer in optimizers:
        for tensor in _tensors(list(optimizer.state.values())):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def take_step(problem: Problem, optimizers: Sequence[Optimizer]) -> tuple[float, int]:
    """One step on the next batch; returns the loss before it and the number of gradient evaluations.

    Of a problem with a `score` that takes the place of the loss, which must be finite all the same.
    """
    batch = problem.next_batch()
    losses: list[Tensor] = []

    def closure() -> Tensor:
        problem.model.zero_grad()
        loss = problem.loss(batch)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        return loss

    first, *others = optimizers
    first.step(closure)  # type: ignore[arg-type]
    for optimizer in others:  # the gradient is there already
        optimizer.step()
    loss, score = float(losses[0]), getattr(problem, "score", None)
    return (score() if score is not None and math.isfinite(loss) else loss), len(losses)


def measure(run: Run) -> Result:
    """Trains until `run.steps` gradient evaluations are made, or the run has diverged.

    A run has diverged when its loss is not finite, or its final loss is more than twice the first one. An exception
    of the optimizer makes a "failed" result.

    Raises:
        ConfigError: the data of the problem are absent.
    """
    problem = build_problem(run.problem, seed=run.seed, device=torch.device(run.device))
    losses: list[float] = []
    evaluations: list[int] = []
    seconds: list[float] = []
    status, error, done = "ok", "", 0
    optimizers: list[Optimizer] = []
    try:
        optimizers = build_optimizers(run.component, problem.model)
        while done < run.steps:
            rate = run.lr * lr_factor(done, steps=run.steps, schedule=run.schedule)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            start = time.perf_counter()
            loss, count = take_step(problem, optimizers)
            elapsed = time.perf_counter() - start
            if not math.isfinite(loss):
                status = "diverged"
                break
            losses.append(loss)
            evaluations.append(done + 1)
            done += count
            seconds.append(elapsed + (seconds[-1] if seconds else 0.0))
    except ConfigError:
        raise
    except Exception as caught:  # whatever an optimizer raises is a result of the comparison
        status, error = "failed", f"{type(caught).__name__}: {caught}"
    final_loss = smooth(losses, evaluations, run.window)[-1] if status == "ok" else math.inf
    if status == "ok" and final_loss > 2 * losses[0]:
        status, final_loss = "diverged", math.inf
    with evaluating(optimizers):
        metric = problem.metric() if status == "ok" else None
    durations = [after - before for before, after in zip([0.0, *seconds], seconds, strict=False)]
    return Result(
        status=status,
        final_loss=final_loss,
        metric=metric,
        metric_name=problem.metric_name,
        losses=losses,
        evaluations=evaluations,
        seconds=seconds,
        step_ms=1000 * statistics.median(durations) if durations else math.nan,
        state_bytes=state_bytes(optimizers),
        num_params=sum(item.numel() for item in problem.model.parameters()),
        error=error,
    )


class Store:
    """The results of a suite, one file a run: `<folder>/runs/<task>/<optimizer>-...-<digest>.json`.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the output folder {folder}: {error.strerror}") from error
        self.folder = folder
        self._loaded: dict[str, Result] = {}

    def path(self, run: Run) -> Path:
        """Where the result of a run lies."""
        return self.folder / "runs" / f"{run.key}.json"

    def load(self, run: Run) -> Result | None:
        """The result of a run, None if there is none or it cannot be read."""
        key = run.key
        if key not in self._loaded:
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._loaded[key] = Result(**json.loads(self.path(run).read_text(encoding="utf-8")))
        return self._loaded.get(key)

    def loss_of(self, run: Run) -> float | None:
        """The final loss of a run, None if there is no result; as `experiments.suite.plan` wants it."""
        result = self.load(run)
        return None if result is None else result.final_loss

    def save(self, run: Run, result: Result) -> None:
        """Writes a result under another name first: a file that is there is complete."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
        temporary.replace(path)

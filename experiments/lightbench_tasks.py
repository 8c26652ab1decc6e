"""The tasks of a checkout of LightBench, and an attempt at one on a CPU.

The models, the data and the conditions of winning are the checkout's; its search is not, which wants heavyball, optuna
and a GPU: `main` of a task is called as its runner calls it, with a `trial` that only takes down what it is given.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experiments.config import Component, ConfigError
from experiments.optimizers import build_optimizer

LEVELS = ("trivial", "easy", "medium", "hard", "extreme", "nightmare")
NO_FORMULA = (
    "CIFAR", "MNIST", "SVHN", "Tolstoi", "class_", "generalization_", "grokking", "memory_", "multi_objective",
    "noisy_matmul", "plasticity_", "transfer_", "xor_",
)  # fmt: skip
"""How the names of tasks begin whose objective is a network or a data set, or takes hours on a CPU."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task hands to its search."""

    model: nn.Module
    data: Callable[[], tuple[Any, Any]]
    loss_of: Callable[[Any, Any], Tensor]
    wins: Callable[[nn.Module, float], tuple[bool, Any]]
    steps: int
    group: int


def tasks_of(checkout: Path) -> list[str]:
    """The names of the analytic tasks: the modules that call a search.

    Raises:
        ConfigError: there are none.
    """
    files = [file for file in (checkout / "lightbench").glob("*.py") if not file.stem.startswith(NO_FORMULA)]
    names = [file.stem for file in files if file.stem != "utils" and " trial(" in file.read_text(encoding="utf-8")]
    if not names:
        raise ConfigError(f"--checkout {checkout} holds no tasks in a folder lightbench")
    return sorted(names)


class OnCPU(TorchFunctionMode):
    """Keeps on the CPU what asks for `cuda`."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the function without its wish for a GPU."""
        keywords = dict(kwargs or {})
        if function is Tensor.cuda:
            return args[0]
        if str(keywords.get("device")).startswith("cuda"):
            keywords["device"] = "cpu"
        return function(*args, **keywords)


@contextlib.contextmanager
def opened(checkout: Path) -> Iterator[Callable[[str], Any]]:
    """Gives the function that imports a module of the checkout; afterwards nothing of it is left in `sys.modules`.

    Of heavyball, optuna and typer there are stand-ins: tasks import them, but what they are for is done here.
    """
    typer = MagicMock()
    typer.Typer.return_value.command.return_value = lambda main: main
    names = ("heavyball", "heavyball.chainable", "heavyball.helpers", "heavyball.utils", "optuna")
    stand_ins = {"typer": typer, **{name: MagicMock() for name in names}}
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.path.insert(0, str(checkout))
    sys.modules.update(stand_ins)
    try:
        yield lambda name: importlib.import_module(f"lightbench.{name}")
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.partition(".")[0] == "lightbench"]:
            del sys.modules[name]
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def seed_all(seed: int) -> None:
    """Seeds the three generators that tasks draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def levels_of(module: Any) -> list[str]:
    """The levels that a task names; one without any has the first only."""
    return [level for level in LEVELS if level in getattr(module, "configs", LEVELS[:1])]


def build_task(module: Any, level: str, *, seed: int, steps: int) -> Task:
    """Calls `main` of a task as the benchmark's runner does, and takes down what reaches the search.

    Raises:
        Exception: whatever `main` raises; some levels of some tasks name parameters that their model does not take.
    """
    found: list[Task] = []

    def record(
        model: nn.Module, data: Any, loss_fn: Any, wins: Any, steps: int, *_: Any, group: int = 256, **keywords: Any
    ) -> None:
        model = model.to("cpu", torch.float32)
        group = min(group, steps)
        found.append(Task(model, data or (lambda: (None, None)), loss_fn or (lambda x, _: x), wins, steps, group))

    module.trial = record
    wanted = {"dtype": "float32", "steps": steps, "weight_decay": 0, "opt": "", "trials": 1, "config": level}
    known = inspect.signature(module.main).parameters
    seed_all(seed)
    with OnCPU():
        module.main(**{name: value for name, value in wanted.items() if name in known})
    return found[0]


def attempt(task: Task, component: Component, lr: float, *, seed: int) -> bool:
    """Trains a copy of the model at one rate; whether it wins before a loss is not finite."""
    seed_all(seed)
    model = copy.deepcopy(task.model)
    optimizer = build_optimizer(Component(component.name, {**component.keywords, "lr": lr}), model.parameters())
    for _ in range(task.steps // task.group):
        losses = []
        for _ in range(task.group):
            with OnCPU():
                inputs, targets = task.data()
                loss = task.loss_of(model() if inputs is None else model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        for value in losses:
            if task.wins(model, value)[0]:
                return True
            if not math.isfinite(value):
                return False
    return False

"""Optimizers by name, with their keywords checked, and the learning-rate schedule."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiments.config import Component, ConfigError, ScheduleConfig, near_matches

# Where a bare or a dotted name may come from; pytorch_optimizer needs not be installed.
_PACKAGES = ("butterfly_opt", "torch.optim", "pytorch_optimizer", "experiments.variants")

_OURS = ("Butterfly", "ButterflyW")


class MissingPackageError(ConfigError):
    """The optimizer's package, or one that it cannot do without, is not installed."""


def _classes(package: str) -> dict[str, type[Optimizer]]:
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        # Installed but broken is a mistake to see, not a package to do without.
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        kind = MissingPackageError if is_missing else ConfigError
        raise kind(f"{package} does not import, so its optimizers cannot be used: {error}") from error
    members = ((name, getattr(module, name, None)) for name in dir(module))
    return {
        name: member
        for name, member in members
        if isinstance(member, type) and issubclass(member, Optimizer) and member is not Optimizer
    }


def _find_class(name: str) -> tuple[str, type[Optimizer]]:
    """Returns the full name for messages and the class."""
    package, _, bare = name.rpartition(".")
    if not package:
        package = "butterfly_opt" if bare in _OURS else "torch.optim"
    if package not in _PACKAGES:
        raise ConfigError(f"unknown optimizer '{name}': no package '{package}'{near_matches(package, _PACKAGES)}")
    known = _classes(package)
    if bare not in known:
        names = [*known, *_OURS] if package == "torch.optim" else list(known)
        raise ConfigError(f"unknown optimizer '{name}' (optimizer.name){near_matches(bare, names)}")
    if known[bare].__name__ == "Kron" and not torch.backends.opt_einsum.is_available():
        # torch.einsum then contracts its five factors from left to right: m^2 n^2 numbers for an m x n matrix.
        raise MissingPackageError("pytorch_optimizer.Kron needs opt_einsum, which is not installed")
    return f"{package}.{bare}", known[bare]


def _check_keyword(where: str, value: Any, default: Any) -> Any:
    """Checks a value against the type of the keyword's default; lists become tuples (betas)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, (int, float)):
        wanted, fits = "a number", is_number
    elif isinstance(default, str):
        wanted, fits = "text", isinstance(value, str)
    elif isinstance(default, (tuple, list)):
        wanted = f"a list of {len(default)} values"
        fits = isinstance(value, (tuple, list)) and len(value) == len(default)
    else:
        wanted, fits = "", True
    if not fits:
        raise ConfigError(f"{where} must be {wanted}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def build_optimizer(
    config: Component, parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
) -> Optimizer:
    """Builds `Butterfly`, `ButterflyW`, a class of torch.optim, or `pytorch_optimizer.X`, by name.

    Raises:
        ConfigError: unknown name or keyword, or a value the optimizer refuses.
    """
    full_name, optimizer_class = _find_class(config.name)
    signature = [item for item in inspect.signature(optimizer_class).parameters.values() if item.name != "params"]
    # Only named keywords: a **kwargs would swallow a typing error silently.
    known = {item.name: item.default for item in signature if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)}
    keywords = {}
    for key, value in config.keywords.items():
        if key not in known:
            raise ConfigError(f"{full_name} has no keyword '{key}'{near_matches(key, known)}")
        keywords[key] = _check_keyword(f"optimizer.{key} of {full_name}", value, known[key])
    try:
        # type[Any]: the base class declares another signature than its subclasses.
        constructor: Any = optimizer_class
        optimizer: Optimizer = constructor(parameters, **keywords)
    except Exception as error:  # whatever a third-party constructor raises is about these keywords
        raise ConfigError(f"{full_name} refuses its keywords {keywords}: {error}") from error
    return optimizer


def build_optimizers(config: Component, model: nn.Module) -> list[Optimizer]:
    """The optimizers that together train the model: one, except for Muon.

    `torch.optim.Muon`, and `Float32Muon`, take matrices only: embeddings and what is no matrix get Adam with the same
    learning rate.

    Raises:
        ConfigError: as `build_optimizer`.
    """
    if config.name.rpartition(".")[2] not in ("Muon", "Float32Muon"):
        return [build_optimizer(config, model.parameters())]
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = list(model.parameters())
    matrices = [item for item in parameters if item.ndim == 2 and item not in embeddings]
    others = [item for item in parameters if item.ndim != 2 or item in embeddings]
    adam = Component("Adam", {"lr": config.keywords["lr"]} if "lr" in config.keywords else {})
    groups = [(config, matrices), (adam, others)]
    return [build_optimizer(component, members) for component, members in groups if members]


def check_optimizer(config: Component) -> None:
    """Builds the optimizer on a tiny parameter and takes one step.

    Finds wrong keywords before any data are loaded, and optimizers that cannot be used here
    (LBFGS wants a closure, SparseAdam sparse gradients).

    Raises:
        ConfigError: as `build_optimizer`, or the step fails.
    """
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer(config, [parameter])
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer.step()
    except Exception as error:  # any failure of a dense, closure-free step means the same
        raise ConfigError(f"optimizer '{config.name}' cannot train these models: {error}") from error


@contextlib.contextmanager
def evaluating(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Holds the parameters that are meant for evaluation, where an optimizer has `eval()` and `train()`.

    Schedule-free optimizers take gradients at one point and evaluate their average; for all others nothing happens.
    """
    switching: list[Any] = [item for item in optimizers if hasattr(item, "eval") and hasattr(item, "train")]
    for optimizer in switching:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switching:
            optimizer.train()


def lr_factor(step: int, *, steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the learning rate at 0-based `step`.

    (step + 1) / warmup_steps during the warm-up, then from 1 to 0 over the remaining steps:
    1 - p (linear) or (1 + cos(pi p)) / 2 (cosine), p = (step - warmup_steps) / (steps - warmup_steps).
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.decay == "none":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 1.0 - progress if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def build_scheduler(optimizer: Optimizer, schedule: ScheduleConfig, steps: int) -> LambdaLR:
    """The schedule of `lr_factor`, stepped once after every optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, steps=steps, schedule=schedule))

"""What a comparison trains: model, reproducible batches, loss and one validation number, built by name and seed.

The initial weights come from the global generator after `torch.manual_seed(seed)`, the batches from a generator
of their own: an optimizer that draws random numbers changes neither.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.config import (
    Component,
    Config,
    ConfigError,
    DatasetConfig,
    load_component,
    load_section,
    near_matches,
)
from experiments.data import BatchSampler, Dataset, load_dataset
from experiments.models import check_model, mlp
from experiments.nonstationary import DQN, GAN, PPO
from experiments.sequence_models import SEQUENCE_MODELS
from experiments.trainer import Trainer


class Problem(Protocol):
    """One training problem with one seed.

    May have a method `score() -> float`, lower is better, which is recorded where the loss says nothing about success.
    """

    model: nn.Module
    metric_name: str

    def next_batch(self) -> Any:
        """Draws the next batch."""

    def loss(self, batch: Any) -> Tensor:
        """The training loss of a batch, differentiable."""

    def metric(self) -> float:
        """The validation number; changes no state."""


# The decoded images stay in memory between the runs of a worker, which come task by task.
@functools.lru_cache(maxsize=1)
def _cached_dataset(config: DatasetConfig) -> Dataset:
    return load_dataset(config)


class Images:
    """A network on images, exactly as `experiments.train` builds it: weights, batches, normalisation and loss."""

    def __init__(
        self, *, seed: int, device: torch.device, dataset: Mapping[str, Any], model: Mapping[str, Any], batch_size: int
    ) -> None:
        data = _cached_dataset(load_section(DatasetConfig, dataset, "dataset"))
        config = Config(
            dataset=load_section(DatasetConfig, dataset, "dataset"),
            model=load_component(model, "model"),
            optimizer=Component("SGD", {"lr": 0.0}),  # the trainer's own, never used
            steps=1,
            batch_size=batch_size,
            seed=seed,
        )
        self._trainer = Trainer(config, data, device)
        self.model = self._trainer.model
        self.metric_name = "test accuracy" if self._trainer.task.has_accuracy else "test loss"

    def next_batch(self) -> Tensor:
        """Indices into the training set."""
        return self._trainer.batches.draw()

    def loss(self, batch: Tensor) -> Tensor:
        """Mean over the batch."""
        trainer, train = self._trainer, self._trainer.data.train
        indices = batch.to(trainer.device)
        inputs = trainer.task.prepare(train.images[indices])
        return trainer.task.loss(trainer.forward(inputs), inputs, train.targets[indices])

    def metric(self) -> float:
        """Accuracy as a fraction, or the loss of a reconstruction, over the whole test set."""
        evaluation = self._trainer.evaluate()
        return evaluation.loss if evaluation.accuracy is None else evaluation.accuracy


@functools.lru_cache(maxsize=1)
def load_text(source: str) -> tuple[Tensor, int]:
    """Text that ships with Python as tokens, int64, and the size of the vocabulary (the characters that occur).

    "topics" are the help texts of the language (0.5 MB), "stdlib" the top-level modules of the standard library
    (5 MB). Both depend on the version of Python: compare runs of one version only.
    """
    if source == "topics":
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics))
    elif source == "stdlib":
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    else:
        raise ConfigError(f"unknown text source '{source}'{near_matches(source, ('topics', 'stdlib'))}")
    characters = torch.tensor([min(ord(character), 127) for character in text])  # what is not ASCII is one token
    vocabulary, tokens = torch.unique(characters, return_inverse=True)
    return tokens, len(vocabulary)


class Text:
    """Next-character prediction; the last tenth of the text is for validation."""

    metric_name = "validation loss"

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        model: Mapping[str, Any],
        source: str = "topics",
        context: int = 64,
        batch_size: int = 16,
    ) -> None:
        tokens, vocabulary = load_text(source)
        split = len(tokens) * 9 // 10
        self._train = tokens[:split].to(device)
        windows = tokens[split:].unfold(0, context + 1, context + 1)
        # 256 windows spread over the validation text: enough for two digits of the loss.
        self._validation = windows[:: max(1, len(windows) // 256)].to(device)
        self._offsets = torch.arange(context + 1, device=device)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        component = load_component(model, "model")
        torch.manual_seed(seed)
        self.model = SEQUENCE_MODELS[component.name](vocabulary, context, **component.keywords).to(device)

    def next_batch(self) -> Tensor:
        """Windows of context + 1 tokens at random places of the training text."""
        last = len(self._train) - len(self._offsets)
        starts = torch.randint(0, last + 1, (self._batch_size, 1), generator=self._generator)
        return self._train[starts.to(self._train.device) + self._offsets]

    def loss(self, batch: Tensor) -> Tensor:
        """Cross-entropy in nats per character."""
        logits = self.model(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def metric(self) -> float:
        """The loss on the validation windows."""
        parts = self._validation.split(32)
        total = sum(float(self.loss(part)) * len(part) for part in parts)
        return total / len(self._validation)


class Regression:
    """An MLP fitted to a random tanh network whose inputs are then scaled badly: coordinate i by c^(1/2 - i/(n-1)).

    `condition` c is the ratio of the largest to the smallest input scale. The data are the same for every seed.
    """

    metric_name = "test error"

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        condition: float = 1e3,
        inputs: int = 32,
        width: int = 128,
        samples: int = 8192,
        batch_size: int = 128,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        plain = torch.randn(samples + samples // 4, inputs, generator=generator)
        hidden = torch.tanh(plain @ torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs))
        targets = hidden @ torch.randn(inputs, 1, generator=generator)
        scales = condition ** torch.linspace(0.5, -0.5, inputs)
        self._inputs = (plain * scales).to(device)
        self._targets = ((targets - targets.mean()) / targets.std()).to(device)
        self._samples = samples
        self._batches = BatchSampler(samples, batch_size=batch_size, seed=seed)
        torch.manual_seed(seed)
        self.model = mlp((1, 1, inputs), 1, hidden=(width, width)).to(device)

    def next_batch(self) -> Tensor:
        """Indices into the training samples."""
        return self._batches.draw().to(self._inputs.device)

    def loss(self, batch: Tensor) -> Tensor:
        """Mean squared error; the targets have variance 1."""
        return functional.mse_loss(self.model(self._inputs[batch]), self._targets[batch])

    @torch.no_grad()
    def metric(self) -> float:
        """Mean squared error on held-out samples."""
        held_out = slice(self._samples, None)
        return float(functional.mse_loss(self.model(self._inputs[held_out]), self._targets[held_out]))


class Poisson:
    """A physics-informed tanh network for -u'' = f on [-1, 1] with u = 0 at both ends, full batch.

    The solution is u(x) = sin(pi x) + sin(4 pi x) / 10. The loss is the mean squared residual of the equation at
    equidistant points over the mean of f^2, plus the mean of u^2 at the ends; u'' comes from double backward.
    """

    metric_name = "relative error"

    def __init__(self, *, seed: int, device: torch.device, width: int = 64, layers: int = 3, points: int = 256) -> None:
        self._x = torch.linspace(-1, 1, points, device=device).unsqueeze(1).requires_grad_()
        x = self._x.detach()
        self._solution = torch.sin(math.pi * x) + torch.sin(4 * math.pi * x) / 10
        self._force = math.pi**2 * torch.sin(math.pi * x) + 1.6 * math.pi**2 * torch.sin(4 * math.pi * x)
        torch.manual_seed(seed)
        widths = [1, *[width] * layers]
        stages: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            stages += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.model: nn.Module = nn.Sequential(*stages, nn.Linear(width, 1)).to(device)

    def next_batch(self) -> object:
        """Nothing: every step sees all points."""
        return None

    def loss(self, batch: object) -> Tensor:
        """Residual of the equation plus the boundary values, both squared."""
        u = self.model(self._x)
        (slope,) = torch.autograd.grad(u.sum(), self._x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), self._x, create_graph=True)
        residual: Tensor = (bend + self._force).square().mean() / self._force.square().mean()
        return residual + u[[0, -1]].square().mean()

    @torch.no_grad()
    def metric(self) -> float:
        """|u_model - u| / |u| over the points."""
        return float((self.model(self._x) - self._solution).norm() / self._solution.norm())


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "images": Images,
    "text": Text,
    "regression": Regression,
    "poisson": Poisson,
    "dqn": DQN,
    "ppo": PPO,
    "gan": GAN,
}


def check_problem(config: Component, key: str) -> None:
    """Checks the names of a problem, its keywords, data set and model; `key` is its place in the file.

    Raises:
        ConfigError: an unknown name or a missing keyword.
    """
    if config.name not in PROBLEMS:
        raise ConfigError(f"unknown problem '{config.name}' ({key}.name){near_matches(config.name, PROBLEMS)}")
    parameters = inspect.signature(PROBLEMS[config.name]).parameters
    known = {name: item.default for name, item in parameters.items() if name not in ("seed", "device")}
    for name in config.keywords:
        if name not in known:
            raise ConfigError(f"problem '{config.name}' has no keyword '{key}.{name}'{near_matches(name, known)}")
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in config.keywords:
            raise ConfigError(f"missing key '{key}.{name}'")
    if "dataset" in known:
        load_section(DatasetConfig, config.keywords["dataset"], f"{key}.dataset")
        check_model(load_component(config.keywords["model"], f"{key}.model"))
    elif "model" in known:
        check_model(load_component(config.keywords["model"], f"{key}.model"), SEQUENCE_MODELS)


def build_problem(config: Component, *, seed: int, device: torch.device) -> Problem:
    """Builds a checked problem.

    Raises:
        ConfigError: the data are absent, or a value does not fit them.
    """
    return PROBLEMS[config.name](seed=seed, device=device, **config.keywords)

"""Model, optimizer, schedule and batches of one run: a step, an evaluation, and the state between steps."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiments.config import Config, ConfigError
from experiments.data import BatchSampler, Dataset
from experiments.models import RECONSTRUCTION_MODELS, build_model
from experiments.optimizers import build_optimizer, build_scheduler, evaluating
from experiments.tasks import Classification, Reconstruction, Task

_EVALUATION_BATCH = 1000
_FINAL_LOSSES = 20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results on the whole test set; `accuracy` is a fraction, None for a reconstruction."""

    loss: float
    accuracy: float | None


def choose_device(name: str) -> torch.device:
    """Resolves "auto" and checks that CUDA is there when asked for.

    Raises:
        ConfigError: "cuda" without a CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device is 'cuda', but torch sees no CUDA device; use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


class Trainer:
    """Model, optimizer, schedule and batches of one run, with their common state.

    Seeds the global generator, which the initial weights come from.

    Args:
        config: the run; its dataset section is not read.
        data: the data set; it is moved to the device.
        device: where to train.

    Raises:
        ConfigError: the model, the optimizer or the batch size does not fit.
    """

    def __init__(self, config: Config, data: Dataset, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.data = data.to(device)
        is_reconstruction = config.model.name in RECONSTRUCTION_MODELS
        self.task: Task = Reconstruction(self.data) if is_reconstruction else Classification(self.data)
        self.batches = BatchSampler(len(data.train.targets), batch_size=config.batch_size, seed=config.seed)
        torch.manual_seed(config.seed)
        self.model: nn.Module = build_model(config.model, data.image_shape, data.num_classes).to(device, self.dtype)
        self.optimizer: Optimizer = build_optimizer(config.optimizer, self.model.named_parameters())
        self.scheduler: LambdaLR = build_scheduler(self.optimizer, config.schedule, config.steps)
        self.step = 0
        self.seconds = 0.0
        self.recent_losses: deque[float] = deque(maxlen=_FINAL_LOSSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """The output of the model for float32 inputs, in float32 as the losses want it."""
        output: Tensor = self.model(inputs.to(self.dtype))
        return output.float()

    def train_step(self) -> Tensor:
        """Takes one step and returns the loss before it, a scalar on the device."""
        indices = self.batches.draw().to(self.device)
        inputs = self.task.prepare(self.data.train.images[indices])
        self.optimizer.zero_grad()
        loss = self.task.loss(self.forward(inputs), inputs, self.data.train.targets[indices])
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Loss and accuracy over the test set; changes no state."""
        with evaluating([self.optimizer]):
            return self._evaluate()

    def _evaluate(self) -> Evaluation:
        self.model.eval()
        test = self.data.test
        loss, correct = 0.0, 0
        for images, targets in zip(
            torch.split(test.images, _EVALUATION_BATCH), torch.split(test.targets, _EVALUATION_BATCH), strict=True
        ):
            inputs = self.task.prepare(images)
            output = self.forward(inputs)
            loss += float(self.task.loss(output, inputs, targets)) * len(targets)
            if self.task.has_accuracy:
                correct += int(self.task.num_correct(output, targets))
        self.model.train()
        count = len(test.targets)
        return Evaluation(loss / count, correct / count if self.task.has_accuracy else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-identical continuation needs: tensors and plain values only."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "recent_losses": list(self.recent_losses),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "cpu_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state; a state of another configuration raises what its part raises."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["cpu_generator"])
        if self.device.type == "cuda" and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self.device)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.recent_losses = deque(state["recent_losses"], maxlen=_FINAL_LOSSES)

"""Small classifiers of digits with their exact gradient and Hessian, as functions of one flat vector."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from experiments.config import DatasetConfig
from experiments.data import Split, load_dataset

HESSIAN_CHUNK = 64
"""Hessian-vector products computed at a time."""


class Objective:
    """Mean cross-entropy of a classifier plus ``l2 / 2 |theta|^2``, in float64.

    The classifier is a chain of linear layers with tanh between them, its parameters in the order of torch: weight
    ``(out, in)`` and bias ``(out,)`` of each layer. Without hidden layers: logistic regression.

    Args:
        split: images ``(count, 1, height, width)`` and classes.
        hidden: widths of the hidden layers.
        l2: regularisation, biases included; the Hessian of a linear classifier is at least ``l2 I``.
        max_value: pixel value of full intensity.
        num_classes: classes.
    """

    def __init__(
        self, split: Split, *, hidden: Sequence[int] = (), l2: float, max_value: int = 16, num_classes: int = 10
    ) -> None:
        self.inputs = split.images.flatten(1).double() / max_value
        self.targets = split.targets
        self.l2 = l2
        widths = [self.inputs.shape[1], *hidden, num_classes]
        layers = itertools.pairwise(widths)
        self.shapes = [torch.Size(shape) for fan_in, out in layers for shape in ((out, fan_in), (out,))]
        self.n = sum(shape.numel() for shape in self.shapes)

    def parameters(self, theta: Tensor) -> list[Tensor]:
        """Weights and biases, views of ``theta`` of shape ``(n,)``."""
        pieces = theta.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def start(self, seed: int) -> Tensor:
        """Weights of variance 1 / fan-in, biases zero; all zero for a linear classifier, which is convex."""
        theta = torch.zeros(self.n, dtype=torch.float64)
        if len(self.shapes) > 2:
            generator = torch.Generator().manual_seed(seed)
            for weight in self.parameters(theta)[::2]:
                weight.normal_(std=1 / math.sqrt(weight.shape[1]), generator=generator)
        return theta

    def logits(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """Outputs ``(count, classes)`` for inputs ``(count, features)``."""
        weight, bias, *others = self.parameters(theta)
        outputs = linear(inputs, weight, bias)
        for weight, bias in zip(others[::2], others[1::2], strict=True):
            outputs = linear(outputs.tanh(), weight, bias)
        return outputs

    def loss(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """The objective on all samples, or on some ``rows``."""
        inputs, targets = (self.inputs, self.targets) if rows is None else (self.inputs[rows], self.targets[rows])
        return cross_entropy(self.logits(theta, inputs), targets) + self.l2 / 2 * theta.square().sum()

    def gradient(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """Gradient of ``loss``, shape ``(n,)``."""
        result: Tensor = torch.func.grad(self.loss)(theta, rows)
        return result

    def sample_gradients(self, theta: Tensor) -> Tensor:
        """Gradients of the cross-entropy of each sample alone, without regularisation, shape ``(count, n)``."""

        def single(theta: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(self.logits(theta, inputs[None]), target[None])

        result: Tensor = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0))(
            theta, self.inputs, self.targets
        )
        return result

    def product(self, theta: Tensor, vectors: Tensor) -> Tensor:
        """``H v`` for the rows of ``vectors``, shape ``(count, n)``; a few gradients each."""

        def single(vector: Tensor) -> Tensor:
            product: Tensor = torch.func.jvp(self.gradient, (theta,), (vector,))[1]
            return product

        result: Tensor = torch.func.vmap(single, chunk_size=HESSIAN_CHUNK)(vectors)
        return result

    def hessian(self, theta: Tensor) -> Tensor:
        """The exact Hessian, ``(n, n)``; n products."""
        dense = self.product(theta, torch.eye(self.n, dtype=torch.float64))
        return (dense + dense.T) / 2

    def minimum(self, theta: Tensor, *, tolerance: float = 1e-9, limit: int = 2000) -> Tensor:
        """A minimum by L-BFGS with a line search: largest gradient entry below ``tolerance``, or ``limit`` steps."""
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=limit,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(theta)
            loss.backward()
            return loss

        optimizer.step(closure)
        return theta.detach()


def digits_objectives(*, hidden: Sequence[int] = (), l2: float) -> tuple[Objective, Objective]:
    """The objective on the training samples of digits (1,437), and on the test samples (360)."""
    data = load_dataset(DatasetConfig(name="digits"))
    train, test = (
        Objective(split, hidden=hidden, l2=l2, max_value=data.max_value, num_classes=data.num_classes)
        for split in (data.train, data.test)
    )
    return train, test

"""What is trained for: how raw images become inputs, the loss, and the accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import Dataset


class Classification:
    """Cross-entropy on images normalised to mean 0 and deviation 1 per channel of the training set."""

    has_accuracy = True

    def __init__(self, data: Dataset) -> None:
        images = data.train.images
        total = torch.zeros(2, images.shape[1], dtype=torch.float64, device=images.device)
        for chunk in torch.split(images, 4096):  # in chunks: a whole data set in float64 is 8 times its memory
            values = chunk.double()
            total += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        mean, square = total / (images.numel() / images.shape[1])
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        # A channel without any variation is only centred.
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        self.mean = mean.float().view(1, -1, 1, 1)
        self.deviation = deviation.float().view(1, -1, 1, 1)

    def prepare(self, images: Tensor) -> Tensor:
        """Raw uint8 (N, C, H, W) to the float32 input of the model."""
        centred: Tensor = images.float() - self.mean
        return centred / self.deviation

    def loss(self, output: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch."""
        return functional.cross_entropy(output, targets)

    def num_correct(self, output: Tensor, targets: Tensor) -> Tensor:
        """Number of images whose largest output is their class, a scalar tensor."""
        hits: Tensor = output.argmax(1) == targets
        return hits.sum()


class Reconstruction:
    """Binary cross-entropy of pixel logits, summed over an image's pixels and divided by 100."""

    has_accuracy = False

    def __init__(self, data: Dataset) -> None:
        self.max_value = data.max_value

    def prepare(self, images: Tensor) -> Tensor:
        """Raw uint8 (N, C, H, W) to float32 in [0, 1]."""
        return images.float() / self.max_value

    def loss(self, output: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; the classes are not used."""
        inputs = inputs.flatten(1)
        return functional.binary_cross_entropy_with_logits(output, inputs) * (inputs.shape[1] / 100)

    def num_correct(self, output: Tensor, targets: Tensor) -> Tensor:
        """Never called: `has_accuracy` is false."""
        raise NotImplementedError("a reconstruction has no accuracy")


Task = Classification | Reconstruction

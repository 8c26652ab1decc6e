"""Data sets as in-memory tensors, and reproducible mini-batches of them.

Layout everywhere: images are uint8 of shape (N, C, H, W), targets int64 of shape (N,).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.config import ConfigError, DatasetConfig


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Split:
        """Moves both tensors."""
        return Split(self.images.to(device), self.targets.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split; `max_value` is the pixel value of full intensity."""

    train: Split
    test: Split
    num_classes: int
    max_value: int = 255

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> Dataset:
        """Moves both splits."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))


def load_dataset(config: DatasetConfig) -> Dataset:
    """Loads the data set of the configuration into memory.

    Raises:
        ConfigError: the data are absent or unreadable; the message says how to get them.
    """
    loaders: dict[str, Callable[[], Dataset]] = {
        "digits": _load_digits,
        "mnist": lambda: _load_torchvision("MNIST", config),
        "cifar10": lambda: _load_torchvision("CIFAR10", config),
        "folder": lambda: _load_folder(Path(config.root)),
    }
    return loaders[config.name]()


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(targets)), test_size=0.2, random_state=0, stratify=digits.target)
    return Dataset(Split(images[train], targets[train]), Split(images[test], targets[test]), 10, max_value=16)


def _torchvision_datasets() -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"torchvision does not import ({error}); install torch and torchvision together") from error
    return datasets


def _load_torchvision(name: str, config: DatasetConfig) -> Dataset:
    dataset_class = getattr(_torchvision_datasets(), name)
    try:
        train = dataset_class(config.root, train=True, download=config.download)
        test = dataset_class(config.root, train=False, download=config.download)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if config.download:
            raise ConfigError(f"cannot download {name} to dataset.root={config.root}: {error}") from error
        raise ConfigError(
            f"no usable {name} data under dataset.root={config.root}: "
            "get them with dataset.download=true, or name another folder with dataset.root=..."
        ) from error
    return Dataset(_torchvision_split(train), _torchvision_split(test), len(train.classes))


def _torchvision_split(source: Any) -> Split:
    images = torch.as_tensor(source.data)
    # MNIST has no channel axis, CIFAR-10 has it last.
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(source.targets, dtype=torch.int64))


def _load_folder(root: Path) -> Dataset:
    """Reads root/train/<class>/* and root/test/<class>/*, all images of one size, as RGB."""
    datasets = _torchvision_datasets()
    sources = {}
    for part in ("train", "test"):
        try:
            sources[part] = datasets.ImageFolder(root / part)
        except OSError as error:
            raise ConfigError(
                f"no image folder {root / part}: dataset.root must hold train/<class>/ and test/<class>/ ({error})"
            ) from error
    if sources["train"].classes != sources["test"].classes:
        odd = sorted(set(sources["train"].classes) ^ set(sources["test"].classes))
        raise ConfigError(f"{root}: train and test have different classes: {', '.join(odd[:5])}")
    train = _decode(sources["train"].samples, None)
    test = _decode(sources["test"].samples, train.images.shape[2:])
    return Dataset(train, test, len(sources["train"].classes))


def _decode(samples: list[tuple[str, int]], size: torch.Size | None) -> Split:
    """Decodes image files in parallel into one tensor; PIL releases the interpreter lock while decoding."""
    from PIL import Image

    def read(path: str) -> Tensor:
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise ConfigError(f"cannot read the image {path}: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    size = read(samples[0][0]).shape[1:] if size is None else size
    images = torch.empty(len(samples), 3, *size, dtype=torch.uint8)

    def store(index: int) -> None:
        path = samples[index][0]
        image = read(path)
        if image.shape[1:] != size:
            found, wanted = ("x".join(map(str, reversed(shape))) for shape in (image.shape[1:], size))
            raise ConfigError(f"{path} is {found} pixels, other images are {wanted}: all must have one size")
        images[index] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in tqdm(pool.map(store, range(len(samples))), "decoding images", len(samples), leave=False):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Split(images, torch.tensor([target for _, target in samples]))


class BatchSampler:
    """Draws index batches, a new seeded permutation every epoch; an epoch's incomplete last batch is dropped.

    Args:
        num_samples: size of the training set.
        batch_size: indices per batch, at most `num_samples`.
        seed: seed of the sampler's own generator.

    Raises:
        ConfigError: `batch_size` exceeds `num_samples`.
    """

    def __init__(self, num_samples: int, *, batch_size: int, seed: int) -> None:
        if batch_size > num_samples:
            raise ConfigError(f"batch_size ({batch_size}) is larger than the training set ({num_samples})")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self._start_epoch()

    def _start_epoch(self) -> None:
        # The state before the draw, with the position, says everything: no permutation is stored.
        self.epoch_state = self.generator.get_state()
        self.order = torch.randperm(self.num_samples, generator=self.generator)
        self.position = 0

    def draw(self) -> Tensor:
        """Returns the next batch of indices, int64 of shape (batch_size,), on the CPU."""
        if self.position + self.batch_size > self.num_samples:
            self._start_epoch()
        batch = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to draw the same batches next."""
        return {"epoch_state": self.epoch_state, "position": self.position, "num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state.

        Raises:
            ValueError: the training set has another size.
        """
        if state["num_samples"] != self.num_samples:
            raise ValueError(f"the training set had {state['num_samples']} samples, now {self.num_samples}")
        self.generator.set_state(state["epoch_state"])
        self._start_epoch()
        self.position = state["position"]

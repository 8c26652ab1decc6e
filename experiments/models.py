"""The networks, built by name for a given image shape."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from experiments.config import Component, ConfigError, near_matches
from experiments.sequence_models import VisionTransformer

ImageShape = tuple[int, int, int]


def _check_widths(key: str, widths: Sequence[int]) -> None:
    if not isinstance(widths, (list, tuple)) or not all(type(width) is int and width > 0 for width in widths):
        raise ConfigError(f"model.{key} must be a list of positive whole numbers, got {widths!r}")


def _linear_stack(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers with ReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return layers[:-1]


def mlp(shape: ImageShape, num_classes: int, *, hidden: Sequence[int] = (256, 128)) -> nn.Module:
    """Multilayer perceptron on the flattened image."""
    _check_widths("hidden", hidden)
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), *_linear_stack([pixels, *hidden, num_classes]))


def autoencoder(shape: ImageShape, num_classes: int, *, widths: Sequence[int] = (256, 64, 16)) -> nn.Module:
    """Symmetric autoencoder with a linear code of `widths[-1]` numbers; the output are pixel logits, flat."""
    del num_classes  # the same signature for every model
    _check_widths("widths", widths)
    if not widths:
        raise ConfigError("model.widths must hold at least the width of the code")
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), *_linear_stack([pixels, *widths]), *_linear_stack([*reversed(widths), pixels]))


def cnn(shape: ImageShape, num_classes: int, *, channels: Sequence[int] = (32, 64, 128)) -> nn.Module:
    """3x3 convolutions with ReLU, each followed by 2x2 max-pooling, then one linear layer."""
    _check_widths("channels", channels)
    depth, height, width = shape
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise([depth, *channels]):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    height, width = height >> len(channels), width >> len(channels)
    if not height or not width:
        raise ConfigError(f"model.channels has {len(channels)} layers, too many for {shape[1]}x{shape[2]} images")
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(([depth, *channels])[-1] * height * width, num_classes))


def resnet18(shape: ImageShape, num_classes: int) -> nn.Module:
    """Torchvision's ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pooling."""
    try:
        from torchvision.models import resnet18 as build
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"torchvision does not import ({error}); install torch and torchvision together") from error
    model: nn.Module = build(num_classes=num_classes)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit(
    shape: ImageShape, num_classes: int, *, patch: int = 4, width: int = 192, layers: int = 12, heads: int = 3
) -> nn.Module:
    """Vision transformer; the defaults are ViT-Tiny with 4x4 patches, for 32x32 images."""
    if shape[1] % patch or shape[2] % patch:
        raise ConfigError(f"model.patch ({patch}) must divide the image size {shape[1]}x{shape[2]}")
    return VisionTransformer(shape, num_classes, patch=patch, width=width, layers=layers, heads=heads)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "autoencoder": autoencoder,
    "cnn": cnn,
    "resnet18": resnet18,
    "vit": vit,
}
RECONSTRUCTION_MODELS = frozenset({"autoencoder"})


def check_model(config: Component, models: Mapping[str, Callable[..., nn.Module]] = MODELS) -> None:
    """Checks the name and the keyword names before any data are loaded.

    Raises:
        ConfigError: unknown model or keyword.
    """
    if config.name not in models:
        raise ConfigError(f"unknown model '{config.name}' (model.name){near_matches(config.name, models)}")
    parameters = inspect.signature(models[config.name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for key in config.keywords:
        if key not in known:
            raise ConfigError(f"model '{config.name}' has no keyword 'model.{key}'{near_matches(key, known)}")


def build_model(config: Component, shape: ImageShape, num_classes: int) -> nn.Module:
    """Builds the model; its initial weights come from the global generator.

    Raises:
        ConfigError: unknown model or keyword, or a value that does not fit the images.
    """
    check_model(config)
    return MODELS[config.name](shape, num_classes, **config.keywords)

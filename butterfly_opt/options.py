"""Hyper-parameters of a parameter group: their defaults, bounds and error messages."""

from typing import Any, TypedDict

from torch import Tensor

from butterfly_opt.backend import BACKENDS
from butterfly_opt.layout import STRUCTURES

DIAGONALS = ("secant", "innovation")
PAIRS = ("ema", "same_batch")
SCALINGS = ("adam", "newton")
ON_NONFINITE = ("skip", "raise")


class Options(TypedDict):
    """The keys of a parameter group beside ``params``."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    structure: str
    depth: int
    diagonal: str
    pairs: str
    scaling: str
    refit_every: int
    refit_steps: int
    refit_lr: float
    max_update: float
    block_size: int | None
    decoupled_weight_decay: bool
    maximize: bool
    capturable: bool
    on_nonfinite: str
    stochastic_rounding: bool
    seed: int
    backend: str


def has_clean_pairs(options: Options) -> bool:
    """Whether the pairs are (nearly) free of noise: taken on one batch, or in a full- or large-batch run."""
    return options["pairs"] == "same_batch" or options["scaling"] == "newton"


def validate(group: dict[str, Any]) -> None:
    """Checks the hyper-parameters of a group.

    Raises:
        ValueError: naming the first hyper-parameter out of its bounds, its value and the bound.
    """
    _validate_lr(group["lr"])
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"Invalid betas: {betas!r}, expected a pair (beta1, beta2)")
    for index, beta in enumerate(betas):
        if not (_is_number(beta) and 0.0 <= beta < 1.0):
            raise ValueError(f"Invalid beta parameter at index {index}: {beta!r}, expected 0 <= beta < 1")
    for name in ("eps", "weight_decay", "refit_lr"):
        if not (_is_number(group[name]) and 0.0 <= group[name] < float("inf")):
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected a finite number >= 0")
    if not (_is_number(group["max_update"]) and group["max_update"] > 0.0):
        raise ValueError(f"Invalid max_update value: {group['max_update']!r}, expected a number > 0")
    for name, least in (("depth", 1), ("refit_every", 1), ("refit_steps", 0), ("seed", 0)):
        if not (_is_integer(group[name]) and group[name] >= least):
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected an integer >= {least}")
    for name, choices in (
        ("structure", STRUCTURES),
        ("diagonal", DIAGONALS),
        ("pairs", PAIRS),
        ("scaling", SCALINGS),
        ("on_nonfinite", ON_NONFINITE),
        ("backend", BACKENDS),
    ):
        if group[name] not in choices:
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected one of {', '.join(choices)}")
    for name in ("decoupled_weight_decay", "maximize", "capturable", "stochastic_rounding"):
        if not isinstance(group[name], bool):
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected True or False")
    _validate_together(group)


def _validate_together(group: dict[str, Any]) -> None:
    block_size = group["block_size"]
    if block_size is not None:
        if not _is_integer(block_size) or block_size < 2 or block_size & (block_size - 1):
            raise ValueError(f"Invalid block_size value: {block_size!r}, expected None or a power of two >= 2")
        if group["structure"] != "flat":
            raise ValueError(f"block_size = {block_size} needs structure='flat', got {group['structure']!r}")
    if group["diagonal"] == "innovation":
        for name, value in (("scaling", "newton"), ("pairs", "same_batch")):
            if group[name] == value:
                raise ValueError(
                    f"{name}={value!r} needs diagonal='secant': diagonal='innovation' keeps no displacements "
                    "and has no inverse-Hessian units"
                )
    if group["capturable"]:
        if group["on_nonfinite"] == "raise":
            raise ValueError("on_nonfinite='raise' reads the gradient on the host and cannot be capturable=True")
        for name, value in (("scaling", "newton"), ("pairs", "same_batch")):
            if group[name] == value:
                raise ValueError(f"{name}={value!r} decides on the host and cannot be capturable=True")


def _validate_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        if lr.dim() != 0:
            raise ValueError(f"Tensor lr must be 0-dimensional, got shape {tuple(lr.shape)}")
        if lr.device.type != "cpu":
            return
        lr = lr.item()
    if not (_is_number(lr) and 0.0 <= lr < float("inf")):  # type: ignore[operator]
        raise ValueError(f"Invalid learning rate: {lr!r}, expected a finite number >= 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_parameter(param: Tensor) -> None:
    """Raises unless ``param`` is of a kind the optimizer can step.

    Raises:
        TypeError: for a parameter that is not real floating point.
        NotImplementedError: for a distributed tensor.
    """
    if not isinstance(param, Tensor):
        return  # torch's own message is better
    if not param.is_floating_point():
        raise TypeError(
            f"Butterfly needs real floating point parameters, got {param.dtype}; "
            "optimize torch.view_as_real(parameter) for complex ones"
        )
    if type(param).__name__ == "DTensor" or param.is_sparse:
        raise NotImplementedError(f"Butterfly does not support {type(param).__name__} or sparse parameters")

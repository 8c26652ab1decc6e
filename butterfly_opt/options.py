"""Hyper-parameters of a parameter group: their defaults, bounds and error messages."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from butterfly_opt.layout import STRUCTURES
from butterfly_opt.plan import check_plan

DIAGONALS = ("innovation", "secant", "newton")
ON_NONFINITE = ("skip", "raise")
BACKENDS = ("auto", "torch", "triton")

MAX_GRAD = 1e15
"""Gradients from here on count as non-finite: second moments, summed over an axis, would overflow float32."""

Options = dict[str, Any]
"""The keys of a parameter group beside ``params``."""


def validate(group: Options) -> None:
    """Checks the hyper-parameters of a group; NumPy numbers and integers for switches become Python's, in place.

    Raises:
        ValueError: naming the first hyper-parameter out of its bounds, its value and the bound.
    """
    group["lr"] = _number(group["lr"], "lr", "learning rate", "a finite number >= 0", lambda x: 0.0 <= x < math.inf)
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"Invalid betas: {betas!r}, expected a pair (beta1, beta2)")
    group["betas"] = tuple(
        _number(beta, f"betas[{i}]", f"beta parameter at index {i}", "0 <= beta < 1", lambda x: 0.0 <= x < 1.0)
        for i, beta in enumerate(betas)
    )
    for name in ("eps", "weight_decay"):
        bound = "a finite number >= 0"
        group[name] = _number(group[name], name, f"{name} value", bound, lambda x: 0.0 <= x < math.inf)
    for name, low in (("refit_every", 1), ("batch_dims", 0), ("block", 2), ("lead", 1)):
        value = group[name]
        if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
            raise ValueError(f"Invalid {name} value: {value!r}, expected an integer >= {low}")
        group[name] = int(value)
    check_plan(group["block"], group["lead"])
    choices = {"structure": STRUCTURES, "diagonal": DIAGONALS, "on_nonfinite": ON_NONFINITE, "backend": BACKENDS}
    for name, known in choices.items():
        if group[name] not in known:
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected one of {', '.join(known)}")
    for name in ("decoupled_weight_decay", "maximize", "capturable", "stochastic_rounding", "cross_shard"):
        if group[name] not in (0, 1):
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected True or False")
        group[name] = bool(group[name])
    for name in ("foreach", "fused"):
        if group[name] not in (None, False, True):
            raise ValueError(f"Invalid {name} value: {group[name]!r}, expected None, True or False")
    _validate_together(group)


def _validate_together(group: Options) -> None:
    for name in ("amsgrad", "differentiable"):
        if group[name]:
            raise ValueError(
                f"Butterfly does not support {name}=True; leave it out"
                + (", the curvature estimate takes its place" if name == "amsgrad" else ", or use torch.optim.Adam")
            )
    if group["fused"] is False and group["backend"] == "triton":
        raise ValueError("fused=False means the torch path and contradicts backend='triton'; leave one of them out")
    if group["structure"] == "flat" and group["batch_dims"]:
        raise ValueError(f"batch_dims = {group['batch_dims']} needs structure='axes', got 'flat'")
    if group["capturable"] and group["on_nonfinite"] == "raise":
        raise ValueError("on_nonfinite='raise' reads the gradient on the host and cannot be capturable=True")
    if group["diagonal"] == "newton" and (group["batch_dims"] or group["lead"] == group["block"]):
        raise ValueError(
            f"diagonal='newton' needs batch_dims = 0 and lead < block, got {group['batch_dims']}, "
            f"lead = {group['lead']} and block = {group['block']}"
        )
    if group["capturable"] and group["diagonal"] == "newton":
        raise ValueError("diagonal='newton' decides on the host and cannot be capturable=True")


def _number(value: object, keyword: str, name: str, bound: str, is_valid: Any) -> float | Tensor:
    """A real number within its bound: a Python number, or a tensor of one element as it is."""
    number = value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {keyword} must be 1-element, got shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return value  # Reading it would wait for the device.
        number = value.item()
    if not isinstance(number, Real) or isinstance(number, bool) or not is_valid(number):
        raise ValueError(f"Invalid {name}: {number!r}, expected {bound}")
    if isinstance(value, Tensor) or type(value) in (int, float):
        return value  # type: ignore[return-value]
    return float(number)


def check_parameter(param: object) -> None:
    """Raises unless ``param`` is of a kind the optimizer can step, or is frozen.

    Raises:
        TypeError: for a trainable parameter that is not real floating point.
        NotImplementedError: for a sparse tensor, and for a slice that hides the matrix it is cut from.
    """
    if not isinstance(param, Tensor) or not (param.requires_grad or param.is_floating_point()):
        return  # for what is no tensor torch's own message is better
    if not param.is_floating_point():
        raise TypeError(
            f"Butterfly needs real floating point parameters, got {param.dtype}; "
            "optimize torch.view_as_real(parameter) for complex ones"
        )
    if param.layout != torch.strided:
        raise NotImplementedError(f"Butterfly does not support sparse parameters, got layout {param.layout}")
    if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter":
        raise NotImplementedError(
            "FullyShardedDataParallel flattens its parameters, which hides the matrices that Butterfly rotates; "
            "shard the model with torch.distributed.fsdp.fully_shard"
        )
    if hasattr(param, "ds_id"):
        raise NotImplementedError(
            "DeepSpeed's ZeRO stage 3 keeps slices of flattened parameters, which hide the matrices that Butterfly "
            "rotates; shard the model with torch.distributed.fsdp.fully_shard"
        )


def check_sharded(group: Options) -> None:
    """Raises unless the options of a group fit parameters that are cut over processes.

    Raises:
        ValueError: naming the option.
    """
    if group["structure"] == "flat" or group["diagonal"] == "newton":
        name = "structure" if group["structure"] == "flat" else "diagonal"
        raise ValueError(f"{name}={group[name]!r} needs whole parameters, got DTensors that are cut over processes")
    if group["lead"] == group["block"]:
        raise ValueError(f"DTensors that are cut over processes need lead < block, got lead = block = {group['lead']}")
    if group["backend"] == "triton":
        raise ValueError("backend='triton' needs whole parameters; use backend='auto'")

"""Chooses what carries out a step: torch, or the fused Triton kernels; both give equal results.

The only module that imports ``fused``, which alone imports the kernels, and only when a kernel is wanted.
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from butterfly_opt import step
from butterfly_opt.collectives import Request
from butterfly_opt.options import Options
from butterfly_opt.stack import Stack

Step = Coroutine[Request, Tensor, None]


def steps_of(pairs: Sequence[tuple[Stack, Tensor]]) -> list[Step]:
    """The steps of stacks of whole tensors with what is usable of them, to be run: the kernels' one for many stacks."""
    together: dict[Any, list[tuple[Stack, Tensor]]] = defaultdict(list)
    for stack, usable in pairs:
        layout = stack.layouts[0]
        take = choose_step(stack.options, layout.owner.device, layout.dtype)
        alone = stack if take is step.take_step_ else stack.options
        together[take, id(alone), layout.owner.device].append((stack, usable))
    return [take(*members[0]) if take is step.take_step_ else take(members) for (take, *_), members in together.items()]


def choose_step(options: Options, device: torch.device, dtype: torch.dtype) -> Callable[..., Step]:
    """What steps whole tensors: ``step.take_step_`` a stack, or ``fused.take_steps_``, its equal, all of a group.

    Args:
        options: of the group: ``backend`` and ``fused``.
        device: of the parameters.
        dtype: of the state.

    Raises:
        RuntimeError: for "triton" where Triton or the kernels are not installed.
        ValueError: for "triton" on a device that has no Triton, outside its interpreter, or for a larger ``block``
            than the kernels take ("auto" then steps in torch).
        TypeError: for "triton" with float64 parameters.
    """
    name = options["backend"]
    if name == "torch" or options["fused"] is False:
        return step.take_step_
    if name == "auto":
        if device.type != "cuda" or dtype != torch.float32 or missing_kernels():
            return step.take_step_
    elif missing_kernels():
        raise RuntimeError(f"backend='triton' needs {missing_kernels()}; or use backend='auto'")
    elif device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"backend='triton' needs parameters on a CUDA device, got {device}; use backend='auto', "
            "or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    elif dtype != torch.float32:
        raise TypeError(
            f"backend='triton' keeps float32 state and does not take {dtype} parameters; use backend='auto'"
        )
    from butterfly_opt import fused

    if options["block"] > fused.MAX_BLOCK:
        if name == "auto":
            return step.take_step_
        raise ValueError(
            f"backend='triton' takes block <= {fused.MAX_BLOCK}, got block = {options['block']}; use backend='auto'"
        )
    return fused.take_steps_


@cache
def missing_kernels() -> str:
    """What the kernels lack here, and how to get it; empty if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed (pip install triton)"
    if importlib.util.find_spec("butterfly_opt.triton_kernels") is None:
        return "the kernels, which a checkout on PYTHONPATH does not have; install it (pip install -e .)"
    return ""

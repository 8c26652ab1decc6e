"""Chooses what carries out a step: torch, or the fused Triton kernels; both give equal results.

The only module that imports ``fused``, which alone imports the kernels, and only when a kernel is wanted.
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from functools import cache

import torch
from torch import Tensor

from butterfly_opt import newton, step
from butterfly_opt.collectives import Request
from butterfly_opt.options import Options
from butterfly_opt.stack import Stack

Step = Coroutine[Request, Tensor, None]


def steps_of(pairs: Sequence[tuple[Stack, Tensor]]) -> list[Step]:
    """The steps of stacks with what is usable of them, to be run: one a stack, the kernels' one a group and device."""
    steps: list[Step] = []
    together: dict[tuple[int, torch.device], list[tuple[Stack, Tensor]]] = defaultdict(list)
    for stack, usable in pairs:
        layout, options = stack.layouts[0], stack.options
        device = layout.owner.device
        if options["diagonal"] == "newton":
            steps.append(newton.take_step_(stack, usable))
        elif layout.cuts or not takes_kernels(options, device, layout.dtype, layout.shape[1] * layout.shape[2]):
            steps.append(step.take_step_(stack, usable))
        else:
            # The options are the group's own dictionary, whose id tells groups apart.
            together[id(options), device].append((stack, usable))
    if together:
        from butterfly_opt import fused

        steps += map(fused.take_steps_, together.values())
    return steps


def takes_kernels(options: Options, device: torch.device, dtype: torch.dtype, numel: int = 1) -> bool:
    """Whether ``fused.take_steps_`` steps whole tensors, or ``step.take_step_``, its equal.

    Args:
        options: of the group: ``backend`` and ``fused``.
        device: of the parameters.
        dtype: of the state.
        numel: elements of a matrix.

    Raises:
        RuntimeError: for "triton" where Triton or the kernels are not installed.
        ValueError: for "triton" on a device that has no Triton, outside its interpreter, or for a larger ``block``
            or matrix than the kernels take ("auto" then steps in torch).
        TypeError: for "triton" with float64 parameters.
    """
    name = options["backend"]
    if name == "torch" or options["fused"] is False or (name == "auto" and device.type != "cuda"):
        return False
    refusal = _refusal(options["block"], device, dtype, numel)
    if refusal and name == "triton":
        raise refusal
    return refusal is None


def _refusal(block: int, device: torch.device, dtype: torch.dtype, numel: int) -> Exception | None:
    """Why the kernels cannot step these tensors."""
    if missing_kernels():
        return RuntimeError(f"backend='triton' needs {missing_kernels()}; or use backend='auto'")
    if device.type != ("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
        return ValueError(
            "backend='triton' needs parameters on a CUDA device, or on the CPU with TRITON_INTERPRET=1, which runs the "
            f"kernels in Triton's interpreter, got {device}; use backend='auto'"
        )
    if dtype != torch.float32:
        return TypeError(
            f"backend='triton' keeps float32 state and does not take {dtype} parameters; use backend='auto'"
        )
    from butterfly_opt import fused

    if block > fused.MAX_BLOCK:
        return ValueError(f"backend='triton' takes block <= {fused.MAX_BLOCK}, got block = {block}; use backend='auto'")
    if numel > fused.MAX_NUMEL:
        return ValueError(
            f"backend='triton' takes matrices of at most {fused.MAX_NUMEL} elements, got {numel}; use backend='auto'"
        )
    return None


@cache
def missing_kernels() -> str:
    """What the kernels lack here, and how to get it; empty if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed (pip install triton)"
    if importlib.util.find_spec("butterfly_opt.triton_kernels") is None:
        return "the kernels, which a checkout on PYTHONPATH does not have; install it (pip install -e .)"
    return ""

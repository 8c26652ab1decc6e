"""What an estimate says of itself, as plain numbers; computed only when asked."""

from typing import Any

import torch
from torch import Tensor

from butterfly_opt.dtensor import local
from butterfly_opt.estimate import curvature
from butterfly_opt.rotation import Rotation
from butterfly_opt.stack import Stack

QUANTILES = (0.1, 0.5, 0.9)

MAX_SAMPLE = 1 << 16
"""Entries that a quantile is taken of: evenly spaced ones of longer tensors."""


def describe(stack: Stack) -> dict[str, Any]:
    """Numbers of the only tensor of a stack; the keys are those of ``Butterfly.diagnostics``."""
    state = stack.states[0]
    numbers: dict[str, Any] = {
        "shape": tuple(n for n in stack.shape if n > 1),
        "steps": int(state["step"].item()),
        "nonfinite_steps": int(state["skipped"].item()),
        "state_bytes": sum(local(v).numel() * v.element_size() for v in state.values() if isinstance(v, Tensor)),
    }
    if "exp_avg_sq" in stack.averages and stack.averages["exp_avg_sq"].numel():
        numbers["noise_quantiles"] = _quantiles(stack.averages["exp_avg_sq"].sqrt())
    # Shards would first have to agree on their means.
    if stack.options["diagonal"] == "secant" and not stack.layouts[0].groups:
        found = curvature(stack)
        if (found.tau > 0).all():
            numbers["noise_quantiles"] = _quantiles(found.noise.sqrt())
            numbers["curvature_quantiles"] = _quantiles(found.slope / found.tau)
    if stack.options["diagonal"] == "newton":
        numbers |= {name: int(state[name].item()) for name in ("negative", "halvings")}
    if stack.rotations:
        numbers["off_diagonal"] = [off_diagonal_share(rotation) for _, rotation in stack.whole_rotations]
    return numbers


def off_diagonal_share(rotation: Rotation) -> float:
    """Share of the squares of ``B^T C B``, over all groups, that lies off the diagonals: 0 for a perfect fit."""
    off, total = 0.0, 0.0
    assert rotation.moments is not None
    views = zip(rotation.plan.views(rotation.matrices), rotation.plan.views(rotation.moments), strict=True)
    for matrix, moment in (pair for stage in views for pair in zip(*stage, strict=True)):
        rotated = matrix.mT @ moment @ matrix
        squares = rotated.square().sum().item()
        total += squares
        off += squares - rotated.diagonal(dim1=-2, dim2=-1).square().sum().item()
    return off / total if total > 0 else 0.0


def _quantiles(values: Tensor) -> list[float]:
    flat = values.flatten()
    sample = flat[:: max(1, -(-flat.numel() // MAX_SAMPLE))].float()
    return torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device)).tolist()

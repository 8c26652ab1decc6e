"""What an estimate says of itself, as plain numbers; computed only when asked."""

from typing import Any

import torch
from torch import Tensor

from butterfly_opt.diagonal import regress
from butterfly_opt.estimate import angle_states, rotated_axes
from butterfly_opt.options import has_clean_pairs
from butterfly_opt.refit import last_angle_step
from butterfly_opt.rotation import rotate
from butterfly_opt.update import TensorStep

QUANTILES = (0.1, 0.5, 0.9)

MAX_SAMPLE = 1 << 16
"""Entries that a quantile is taken of: evenly spaced ones of longer tensors."""


def describe(tensor: TensorStep) -> dict[str, Any]:
    """Numbers of one tensor; the keys are those of ``Butterfly.diagnostics``. Cost: a few passes, and it waits."""
    state, options = tensor.state, tensor.options
    steps = int(state["step"].item())
    numbers: dict[str, Any] = {
        "shape": tensor.layout.shape,
        "steps": steps,
        "nonfinite_steps": int(state["skipped"].item()),
        "restarts": int(state["restarts"].item()),
        "state_bytes": sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor)),
        "noise_quantiles": _quantiles(state["grad_sq"].sqrt()),
    }
    if options["diagonal"] == "secant":
        found = regress(state["grad_sq"], state["disp_sq"], state["cross"], beta2=options["betas"][1], step=steps)
        if found.tau > 0:
            numbers["noise_quantiles"] = _quantiles(found.noise.sqrt())
            numbers["curvature_quantiles"] = _quantiles(found.slope / found.tau)
    if tensor.layout.rotated and not has_clean_pairs(options):
        taken = state["angle_steps"]
        if taken > 0:
            lengths = [last_angle_step(axis, options["refit_lr"], taken) for axis in angle_states(tensor.layout, state)]
            numbers["angle_change"] = [tensor.refit_steps * length.abs().mean().item() for length in lengths]
        sketches = [
            rotate(state[f"sketch{axis}"], angles, dim=0, transpose=True)
            for axis, (_, angles) in enumerate(rotated_axes(tensor.layout, state))
        ]
        numbers["off_diagonal"] = [off_diagonal_share(sketch).item() for sketch in sketches]
    return numbers


def off_diagonal_share(sketch: Tensor) -> Tensor:
    """Share of ``||C||_F^2`` that lies off the diagonal of ``C = E[Z Z^T]``, from one sketch ``Z`` (n, k), 0-d.

    The k columns are independent with covariance about ``C / k``, so that ``||Z Z^T||_F^2`` exceeds ``||C||_F^2``
    by ``tr(C)^2 / k`` or so: subtracted, with the diagonal's part. Rough for small k: 0 is found as 0 to 0.1.
    """
    columns = sketch.shape[1]
    energy = sketch.square().sum(1)
    whole = (sketch.mT @ sketch).square().sum()
    off = whole - energy.square().sum()
    spurious = (energy.sum().square() - energy.square().sum()) / columns
    total = whole - spurious
    return torch.where(total > 0, (off - spurious) / total, 0.0).clamp(0.0, 1.0)


def _quantiles(values: Tensor) -> list[float]:
    flat = values.flatten()
    sample = flat[:: max(1, -(-flat.numel() // MAX_SAMPLE))].float()
    return torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device)).tolist()

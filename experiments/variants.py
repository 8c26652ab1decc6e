"""Optimizers with one piece replaced, by name as any optimizer: `experiments.variants.X`.

`Butterfly` without one of its parts, for ablations, and a Muon that a CPU can run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from butterfly_opt import Butterfly, layout, rotation

NEGLIGIBLE = 1e-20
"""Of the largest entry of a gradient: far below its rounding, and no exact zero."""


class UnrotatedButterfly(Butterfly):
    """Without rotation: the diagonal of innovations in the original coordinates."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in which every axis counts as too long to be rotated."""
        with mock.patch.object(layout, "MAX_ELONGATION", 0):
            return super().step(closure)


class UntransportedButterfly(Butterfly):
    """Without transport: a group keeps its second moments when the outputs of its children have turned."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in which `T` is the identity."""
        with mock.patch.object(rotation, "_transport", lambda change, matrix: matrix):
            return super().step(closure)


class ZeroMovingButterfly(Butterfly):
    """Without the rule of exact zeros: entries that never had a gradient are moved by those they are mixed with."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on gradients whose zeros are `NEGLIGIBLE` instead, so that the rule finds none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            grad: Tensor = param.grad
            param.grad = grad.masked_fill(grad == 0, NEGLIGIBLE * grad.abs().amax())
        super().step()
        return loss


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` whose products are in float32: CPUs without bfloat16 emulate them at twenty times the time."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in which a matrix that should become bfloat16 is copied."""
        with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
            return super().step(closure)

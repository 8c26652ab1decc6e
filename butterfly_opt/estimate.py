"""The running estimate of one tensor: its state, how a pair updates it, what it says.

All averages but the sketches live in the rotated basis, which is what saves rotations: a step rotates the gradient
forth and the update back, and only a refit moves the averages to the new basis. The state is a plain
dictionary of tensors and numbers, in the form that ``torch.optim.Optimizer.state`` keeps:

    step          0-d, steps taken                 skipped      0-d, steps skipped as non-finite
    restarts      0-d, times the parameters were changed by hand, so that s restarted
    calls         int, gradients seen              version      int, format of this state
    signature     list, what the state was made for
    fingerprint   0-d, norm of the parameters after the last write; < 0: unknown (secant)
    mean_grad     gbar                             grad_sq      A = E[u^2]
    displacement  s (secant)                       disp_sq, cross   B = E[w^2], C = E[u w] (secant)
    angles{i}     angles of the i-th rotated axis  angle_steps  0-d, angle steps taken
    angle_mean{i}, angle_square{i}                 averages of their gradients (noisy pairs)
    sketch{i}     (n_i, SKETCH_COLUMNS)            running sketch of its second moment, in original
                                                   coordinates (noisy pairs)
    angle_curvature{i}                             average of their curvatures (clean pairs, matrices)
    angle_moments{i}                               averages behind them (clean pairs, vectors)
    energy        0-d, E[mean u^2] (same_batch)

Memory: 2 numbers a coordinate with ``innovation``, 5 with ``secant``, and
``1.5 depth num_stages + SKETCH_COLUMNS`` numbers for each index of a rotated axis.
"""

from typing import Any

import torch
from torch import Tensor

from butterfly_opt.backend import TORCH, Backend, Rotation
from butterfly_opt.basis import Basis
from butterfly_opt.layout import TensorLayout
from butterfly_opt.pairs import average_weight
from butterfly_opt.refit import CURVATURE_BETA, AngleState, refit_jacobi_, refit_pair_, two_sided_scale
from butterfly_opt.rotation import rotate
from butterfly_opt.sketch import random_signs, update_sketch_

State = dict[str, Any]
Weight = float | Tensor

STATE_VERSION = 3
COUNTERS = ("step", "skipped", "restarts", "angle_steps")
"""0-d float32, on the device of the parameters: counted without the host."""

UNKNOWN = -1.0
"""Fingerprint before the first write."""

SKETCH_COLUMNS = 24
SKETCH_BETA = 0.7
"""Decay of the sketches, in steps that add to them; beta1 where that is smaller."""


def new_state(layout: TensorLayout, *, depth: int, diagonal: str, pairs: str, clean: bool) -> State:
    """The state of a tensor before its first gradient.

    Args:
        layout: the tensor.
        depth: butterflies on each axis.
        diagonal: "secant" or "innovation".
        pairs: "ema" or "same_batch".
        clean: whether the angles are refitted from clean pairs, rather than from sketches of noisy ones.
    """
    owner, dtype = layout.owner, layout.dtype

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=owner.device)

    names = ["mean_grad", "grad_sq"]
    if diagonal == "secant":
        names += ["disp_sq", "cross"]
        if pairs == "ema":
            names.append("displacement")
    state: State = {"version": STATE_VERSION, "calls": 0}
    state |= {name: torch.zeros((), device=owner.device) for name in COUNTERS}
    state |= {name: zeros(*layout.shape) for name in names}
    for axis, (dim, shape) in enumerate(zip(layout.rotated, layout.angles_shapes(depth), strict=True)):
        state[f"angles{axis}"] = zeros(*shape)
        if not clean:
            state |= {f"{name}{axis}": zeros(*shape) for name in ("angle_mean", "angle_square")}
            state[f"sketch{axis}"] = zeros(layout.shape[dim], SKETCH_COLUMNS)
        elif len(layout.shape) == 1:
            state[f"angle_moments{axis}"] = zeros(7, *shape)
        else:
            state[f"angle_curvature{axis}"] = zeros(*shape)
    if pairs == "same_batch":
        state["energy"] = zeros()
    if "displacement" in state:
        state["fingerprint"] = zeros().fill_(UNKNOWN)
    return state


def move_state_(state: State, layout: TensorLayout) -> None:
    """Follows a model that was moved to another device or dtype (bfloat16 and float32 share one state)."""
    device, dtype = layout.owner.device, layout.dtype
    if state["mean_grad"].device == device and state["mean_grad"].dtype == dtype:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            state[key] = value.to(device, torch.float32 if key in COUNTERS else dtype)


def migrate_state(state: State) -> State:
    """A saved state in the present format: of an earlier version, or with its counters saved as numbers.

    Raises:
        ValueError: if the format is not known, or the state is that of another optimizer.
    """
    if "version" not in state:
        if "step" in state:
            raise ValueError(f"this state was not written by Butterfly: it holds {', '.join(map(str, state))}")
        return state
    if state["version"] not in range(1, STATE_VERSION + 1):
        raise ValueError(
            f"this state has format version {state['version']}, this Butterfly reads up to {STATE_VERSION}"
        )
    old = state["version"] < STATE_VERSION
    counters = {name: torch.as_tensor(float(state.get(name, 0.0))) for name in COUNTERS}
    state = {**state, **counters, "version": STATE_VERSION}
    if "displacement" in state:
        state.setdefault("fingerprint", state["displacement"].new_full((), UNKNOWN))
    # Sketches had other numbers of columns: zeros leave Z Z^T as it is, and any of the columns estimate it up to
    # a factor, which a refit ignores. They were in rotated coordinates. The averages of a scalar parameter were 0-d.
    for name in [name for name in state if name.startswith("sketch") and old]:
        sketch = rotate(state[name], state[name.replace("sketch", "angles")], dim=0)
        state[name] = torch.nn.functional.pad(sketch, (0, SKETCH_COLUMNS - sketch.shape[1]))
    averages = ("mean_grad", "grad_sq", "disp_sq", "cross", "displacement")
    return state | {name: state[name].reshape(1) for name in averages if name in state and state[name].dim() == 0}


def rotated_axes(layout: TensorLayout, state: State) -> list[tuple[int, Tensor]]:
    """The rotated dimensions with their angles."""
    return [(dim, state[f"angles{axis}"]) for axis, dim in enumerate(layout.rotated)]


def angle_states(layout: TensorLayout, state: State) -> list[AngleState]:
    """Angles and averages of each rotated axis (noisy pairs)."""
    names = ("angles", "angle_mean", "angle_square")
    return [AngleState(*(state[f"{name}{axis}"] for name in names)) for axis in range(len(layout.rotated))]


def refit_clean_(layout: TensorLayout, state: State, basis: Basis, u: Tensor, w: Tensor) -> None:
    """Fits the angles to one clean pair, rotated by ``basis``; the moments know it already."""
    state["angle_steps"] += 1
    weight = float(average_weight(CURVATURE_BETA, state["angle_steps"].item()))
    if len(layout.shape) == 1:
        y, s = basis.from_rotated(u), basis.from_rotated(w)
        refit_jacobi_(y, s, state["angles0"], state["angle_moments0"], weight=weight)
        return
    axes = [
        (dim, angles, state[f"angle_curvature{axis}"]) for axis, (dim, angles) in enumerate(rotated_axes(layout, state))
    ]
    refit_pair_(u, w, axes, scale=two_sided_scale(state["grad_sq"], state["disp_sq"]), weight=weight)


def update_moments_(state: State, u: Tensor, w: Tensor | None, *, weight: Weight, pair_weight: Weight) -> None:
    """Averages ``A``, and with ``w`` given ``B`` and ``C``, in place.

    Args:
        state: the state.
        u: rotated delta_grad.
        w: rotated delta_theta.
        weight: weight of this value in ``A``.
        pair_weight: its weight in ``B`` and ``C``.
    """
    _average_product_(state["grad_sq"], u, u, weight)
    if w is not None:
        _average_product_(state["disp_sq"], w, w, pair_weight)
        _average_product_(state["cross"], u, w, pair_weight)


def update_axis_sketch_(
    sketch: Tensor,
    u: Tensor,
    grad_sq: Tensor,
    rotation: Rotation,
    *,
    dim: int,
    seed: int,
    stream: int,
    step: int | Tensor,
    weight: Weight,
    backend: Backend = TORCH,
) -> None:
    """Takes stacked ``u`` into the running sketches of one rotated axis, in place.

    The columns are weighted by ``mean(A)^(-1/4)`` along the axis, so that no few columns of large
    gradients decide the basis of all (each enters ``Y Y^T`` by the root of its energy); by the nearest
    power of two, which keeps the product exact on every device.

    Args:
        sketch: ``(B, n, SKETCH_COLUMNS)``, in original coordinates: those outlast the basis.
        u: rotated innovations ``(B, *shape)``.
        grad_sq: ``A``, the same shape.
        rotation: of the axis.
        dim: the axis, counted with the stack, >= 1.
        seed: as for ``random_signs``, like ``stream`` and ``step``.
        stream: see there.
        step: see there.
        weight: weight of ``u``.
        backend: what makes the product.
    """
    energy = grad_sq.mean(dim).reshape(len(u), -1, 1)
    count = energy.shape[:2].numel()
    signs = random_signs(count, SKETCH_COLUMNS, seed=seed, stream=stream, step=step, device=u.device)
    magnitude = energy.clamp_min_(torch.finfo(u.dtype).tiny).log2_()
    # Relative to their mean: the rounding must not depend on the scale of the loss.
    scale = (magnitude - magnitude.mean(1, keepdim=True)).mul_(-0.25).round_().exp2_()
    weighted = signs.view(len(u), -1, SKETCH_COLUMNS) * scale
    product = backend.sketch_product(u, weighted, dim=dim)
    update_sketch_(sketch, rotation.rotate(product, dim=1), weight=weight)


def pair_weights(step: Weight, betas: tuple[float, float]) -> tuple[Weight, Weight, Weight]:
    """Weights of a new value in ``gbar``, in ``A``, and in ``B`` and ``C``, which start one step later."""
    later = step.clamp_min(2) - 1 if isinstance(step, Tensor) else max(step - 1, 1)
    return average_weight(betas[0], step), average_weight(betas[1], step), average_weight(betas[1], later)


def _average_product_(average: Tensor, x: Tensor, y: Tensor, weight: Weight) -> None:
    """``average <- (1 - weight) average + weight x y``, in place."""
    if isinstance(weight, Tensor):
        average.mul_(1 - weight).addcmul_(x, y * weight)
    else:
        average.mul_(1 - weight).addcmul_(x, y, value=weight)

"""Chooses what carries out the rotations: torch, or the fused Triton kernels; both give equal results.

The only module that imports ``butterfly_opt.triton_kernels``, and only when a kernel is wanted.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from butterfly_opt import rotation
from butterfly_opt.blocks import RotationBlocks
from butterfly_opt.sketch import sketch_product

MAX_DENSE_LENGTH = 128
"""Axes up to this length are rotated by the dense ``Q``, one product, whatever the depth; twice as long ones
that few columns share, too."""

MIN_BLOCK_COLUMNS = 16
"""Longer ones need this many columns for grouped stages to beat single stages.
(All measured by ``python -m experiments.bench_rotation``.)"""

BACKENDS = ("auto", "torch", "triton")


class Rotation(Protocol):
    """The rotation of one axis, with its angles fixed."""

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        ...


class FusedStep(NamedTuple):
    """What the tensors of a fused step share: options of the group, and whether ``s`` advances by the update."""

    eps: float
    max_update: float
    beta2: float
    advance: bool


class FusedWrite(NamedTuple):
    """What the parameters of a fused write share.

    Attributes:
        weight_decay: decoupled decay.
        streams: a random stream for each parameter.
        rounding_seed: seed of stochastic rounding of bfloat16 parameters; None rounds to nearest.
    """

    weight_decay: float
    streams: Sequence[int]
    rounding_seed: int | None


class Backend:
    """The torch path."""

    name = "torch"

    max_stacked = 1 << 14
    """Tensors of equal shape up to this size are stacked into one (measured: beyond, the copies cost more)."""

    chunk = 1 << 16
    """Elements whose steps are taken together, one phase after the other (measured: beyond, the copies cost more)."""

    short_stages = 64
    """Axes of up to so many stages are refitted apart from longer ones: here all together."""

    def rotation(self, angles: Tensor, n: int, *, columns: int) -> Rotation:
        """The rotation of an axis of length ``n`` that ``columns`` columns share.

        On a GPU no matrix products: their precision would depend on torch's global setting (TF32).
        """
        if angles.is_cuda:
            return StageRotation(angles, self)
        if n <= MAX_DENSE_LENGTH or (n <= 2 * MAX_DENSE_LENGTH and columns < MAX_DENSE_LENGTH):
            return DenseRotation(angles, n)
        if columns >= MIN_BLOCK_COLUMNS and angles.dim() == 3:
            return RotationBlocks(angles, n)
        return StageRotation(angles, self)

    def rotate(self, x: Tensor, angles: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """As ``rotation.rotate``."""
        return rotation.rotate(x, angles, dim=dim, transpose=transpose)

    def angle_gradient(self, u: Tensor, grad_u: Tensor, angles: Tensor, *, dim: int) -> Tensor:
        """As ``rotation.angle_gradient``."""
        return rotation.angle_gradient(u, grad_u, angles, dim=dim)

    def sketch_product(self, x: Tensor, signs: Tensor, *, dim: int) -> Tensor:
        """As ``sketch.sketch_product``."""
        return sketch_product(x, signs, dim=dim)


class TritonBackend(Backend):
    """The fused kernels, for float32 state on a GPU (or on the CPU in Triton's interpreter)."""

    name = "triton"
    max_stacked = 1 << 18
    chunk = 1 << 26
    short_stages = 10

    def rotation(self, angles: Tensor, n: int, *, columns: int) -> Rotation:
        """The rotation of an axis of length ``n``."""
        return StageRotation(angles, self)

    def rotate(self, x: Tensor, angles: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """As ``rotation.rotate``."""
        from butterfly_opt.triton_kernels.rotate import rotate_columns

        turned = rotate_columns(_columns(x, angles, dim), angles.cos(), angles.sin(), transpose=transpose)
        return turned.view(x.shape)

    def angle_gradient(self, u: Tensor, grad_u: Tensor, angles: Tensor, *, dim: int) -> Tensor:
        """As ``rotation.angle_gradient``."""
        from butterfly_opt.triton_kernels.rotate import angle_gradient

        return angle_gradient(_columns(u, angles, dim), _columns(grad_u, angles, dim), angles.cos(), angles.sin())

    def sketch_product(self, x: Tensor, signs: Tensor, *, dim: int) -> Tensor:
        """As ``sketch.sketch_product``, in one read for 8 columns."""
        from butterfly_opt.triton_kernels import sketch

        pre, post = x.shape[1:dim].numel(), x.shape[dim + 1 :].numel()
        unfolded = x.view(len(x), pre, x.shape[dim], post)
        parts = signs.split(sketch.MAX_WEIGHTS, dim=2)
        return torch.cat([sketch.sketch_product(unfolded, part.contiguous()) for part in parts], 2)

    def fused_averages_(
        self,
        states: Sequence[Mapping[str, Tensor]],
        grads: Sequence[Tensor],
        updates: Sequence[Tensor],
        rows: Tensor,
        step: FusedStep,
    ) -> None:
        """Averages and directions of a step of many tensors, in two launches, three for secant.

        Args:
            states: the averages of each tensor, updated in place.
            grads: rotated gradients, overwritten with the innovations ``u``.
            updates: receive the rotated updates, ``-lr`` times the directions.
            rows: ``(tensors, 6)``, the fields of ``batch.Scalars``.
            step: numbers that all share.
        """
        from butterfly_opt.triton_kernels.step import direction_, direction_table, moments_, moments_table

        def column(name: str) -> list[Tensor]:
            return [state[name] for state in states]

        averages = column("mean_grad"), column("grad_sq")
        secant = {"disp_sqs": column("disp_sq"), "crosses": column("cross")} if "disp_sq" in states[0] else {}
        moved = {"displacements": column("displacement")} if secant else {}
        sums = moments_(moments_table(grads, *averages, **secant, **moved), rows)
        table = direction_table(updates, *averages, **secant, **(moved if step.advance else {}))
        direction_(table, rows, eps=step.eps, max_update=step.max_update, beta2=step.beta2, sums=sums)

    def fused_write_(
        self,
        params: Sequence[Tensor],
        updates: Sequence[Tensor],
        written: Sequence[Tensor] | None,
        rows: Tensor,
        write: FusedWrite,
    ) -> None:
        """Adds updates to the parameters in one launch.

        Args:
            params: contiguous parameters of one dtype.
            updates: of their shapes, float32.
            written: receive the changes of the parameters after rounding, float32.
            rows: ``(len(params), 6)``, the fields of ``batch.Scalars``.
            write: how.
        """
        from butterfly_opt.triton_kernels.write import write_, write_table

        table = write_table(params, updates, written=written, streams=write.streams)
        write_(table, rows, weight_decay=write.weight_decay, rounding_seed=write.rounding_seed)

    def fused_angle_step_(
        self,
        sketch: Tensor,
        state: tuple[Tensor, Tensor, Tensor],
        *,
        refit_lr: float,
        taken: Tensor,
        owned: Tensor | None,
    ) -> None:
        """An angle step of ``refit.refit_sketch_``, in one or a few launches."""
        from butterfly_opt.triton_kernels.refit import refit_sketch_

        whole = state[0].shape
        taken = taken.expand(whole).contiguous() if taken.dim() else taken
        owned = None if owned is None else owned.expand(whole).contiguous()
        refit_sketch_(sketch.contiguous(), *state, steps=1, refit_lr=refit_lr, taken=taken, owned=owned)


class DenseRotation:
    """As a dense matrix (a stack of them), built once for each set of angles: for short axes."""

    def __init__(self, angles: Tensor, n: int) -> None:
        if angles.dim() == 3:
            self.matrix = RotationBlocks(angles, n).rotate(
                torch.eye(n, dtype=angles.dtype, device=angles.device), dim=0
            )
        else:
            self.matrix = rotation.dense_rotation(angles, n)

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        matrix = self.matrix.mT if transpose else self.matrix
        if dim % x.dim() == x.dim() - 2:
            return matrix @ x
        return (x.movedim(dim, -1) @ matrix.mT).movedim(-1, dim)


class StageRotation:
    """Stage by stage: in torch for axes that few columns share, in the kernels for all."""

    def __init__(self, angles: Tensor, backend: Backend) -> None:
        self.angles = angles.clone()  # a basis stays what it was while its angles are refitted
        self.backend = backend

    def rotate(self, x: Tensor, *, dim: int, transpose: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, along axis ``dim``."""
        return self.backend.rotate(x, self.angles, dim=dim, transpose=transpose)


TORCH = Backend()
TRITON = TritonBackend()


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for state of one dtype on one device.

    Args:
        name: "torch"; "triton"; or "auto", which takes the kernels where they can run and torch elsewhere.
        device: device of the parameters.
        dtype: dtype of the state.

    Raises:
        RuntimeError: for "triton" where Triton is not installed.
        ValueError: for "triton" on a device that has no Triton, outside its interpreter.
        TypeError: for "triton" with float64 parameters.
    """
    if name == "torch":
        return TORCH
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    installed = importlib.util.find_spec("triton") is not None
    if name == "auto":
        return TRITON if installed and device.type == "cuda" and dtype == torch.float32 else TORCH
    if not installed:
        raise RuntimeError("backend='triton' needs the package triton, which is not installed; use backend='auto'")
    if device.type != "cuda" and not (device.type == "cpu" and interpreting):
        raise ValueError(
            f"backend='triton' needs parameters on a CUDA device, got {device}; use backend='auto', "
            "or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    if dtype != torch.float32:
        raise TypeError(
            f"backend='triton' keeps float32 state and does not take {dtype} parameters; use backend='auto'"
        )
    return TRITON


def _columns(x: Tensor, angles: Tensor, dim: int) -> Tensor:
    """``(*batch, pre, n, post)`` view of a contiguous tensor around axis ``dim``, a copy of any other."""
    axis, batch = dim % x.dim(), angles.dim() - 3
    return x.contiguous().view(
        *x.shape[:batch], x.shape[batch:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel()
    )

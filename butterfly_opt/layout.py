"""How the parameters of a group become the tensors that are rotated.

Every tensor is ``(batch, rows, columns)``. ``axes``: a parameter is one tensor, ``(out, everything else)``, and both
axes are rotated; leading ``batch_dims`` dimensions (experts) are a batch, each with its own basis. Vectors, also
``(n, 1)`` and ``(1, n)``, are not rotated: their diagonal alone is kept, as Adam's. An axis more than MAX_ELONGATION
times as long as the other is not rotated either.

Of a ``DTensor`` this process steps its shard: ``shape`` is that of the shard; what a shape decides, that of the whole
decides. An axis that is cut over processes has a ``Cut``.

``flat``: the parameters of a group, in order, are one vector whose only axis is rotated (the paper's form). Its state
lies under the first parameter.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from butterfly_opt.collectives import Group
from butterfly_opt.dtensor import is_sharded, local

STRUCTURES = ("axes", "flat")

MAX_ELONGATION = 32
"""An axis of n indices keeps about 170 n numbers of basis: against m n parameters that pays for m >= n / 32 only."""


@dataclass(frozen=True)
class Cut:
    """How an axis is cut over processes: as ``torch.chunk`` cuts, in equal parts but for the last ones.

    Attributes:
        n: length of the whole axis.
        unit: coordinates that stay together: 9 for ``(out, in, 3, 3)`` cut along ``in``.
        shards: number of parts.
        index: the part of this process.
        mesh_dim: the dimension of the device mesh that cuts it.
        group: the processes that hold the parts.
    """

    n: int
    unit: int
    shards: int
    index: int
    mesh_dim: int
    group: Group

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each part."""
        # In whole units: what is cut is an axis of the parameter, not of the matrix.
        part = -(-self.n // self.unit // self.shards) * self.unit
        return tuple(max(0, min(part, self.n - i * part)) for i in range(self.shards))


@dataclass(frozen=True)
class TensorLayout:
    """One rotated tensor and the parameters it is made of.

    Attributes:
        params: parameters, in order.
        shape: ``(batch, rows, columns)``, with as many elements as the parameters together.
        rotated: its rotated dimensions, of -2 (rows) and -1 (columns).
        cuts: the dimensions (-3 for the batch) that are cut over processes.
        groups: the processes that must agree on a step of this tensor, for each dimension of their mesh.
        cross_shard: whether shards hear of each other.
    """

    params: tuple[Tensor, ...]
    shape: tuple[int, int, int]
    rotated: tuple[int, ...]
    cuts: tuple[tuple[int, Cut], ...] = ()
    groups: tuple[Group, ...] = ()
    cross_shard: bool = True

    @property
    def owner(self) -> Tensor:
        """The parameter under which the state is kept."""
        return self.params[0]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
        return torch.promote_types(self.owner.dtype, torch.float32)

    @property
    def state_shape(self) -> torch.Size:
        """Shape of the averages: that of the parameter, of a shard as of the whole, or the group's as a vector."""
        return self.owner.shape if len(self.params) == 1 else torch.Size((self.shape[1],))

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors in the shapes of the parameters as ``(count, rows, columns)``, in the arithmetic dtype; may alias.

        Args:
            tensors: one for each parameter; of one parameter also those of several that are laid out like it.
        """
        batch, rows, columns = self.shape
        if len(self.params) > 1:
            return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self.dtype).view(self.shape)
        together = tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))
        return together.to(self.dtype).reshape(len(tensors) * batch, rows, columns)

    def scatter(self, tensor: Tensor, count: int = 1) -> Sequence[Tensor]:
        """The inverse of ``gather``: views (where possible) in the shapes of the parameters, or of their shards.

        Args:
            tensor: ``(count * batch, rows, columns)``.
            count: tensors that are laid out like this one.
        """
        if len(self.params) == 1:
            return tensor.reshape(count, *local(self.owner).shape).unbind()
        parts = tensor.reshape(-1).split([param.numel() for param in self.params])
        return [part.view(param.shape) for part, param in zip(parts, self.params, strict=True)]


def axes_layout(param: Tensor, batch_dims: int, *, cross_shard: bool = True) -> TensorLayout:
    """The layout of one parameter in structure ``axes``.

    Raises:
        NotImplementedError: for a ``DTensor`` that is cut in another way than along its batch, rows or columns.
    """
    batch, rows, columns = whole = _matrix(param.shape, batch_dims)
    lengths = {-2: (rows, columns), -1: (columns, rows)}
    rotated = tuple(dim for dim, (n, other) in lengths.items() if n <= MAX_ELONGATION * other)
    is_vector = min(rows, columns) <= 1 or not param.numel()
    if is_vector:
        whole, rotated = (batch, 1, rows * columns), ()
    if not is_sharded(param):
        return TensorLayout((param,), whole, rotated)
    found = list(_cuts(param, batch_dims))
    # A vector is one row, whichever of its axes is cut.
    cuts = tuple((-1 if is_vector and dim > -3 else dim, cut) for dim, cut in found)
    groups = tuple(cut.group for _, cut in found if cross_shard and cut.shards > 1)
    shape = _matrix(local(param).shape, batch_dims)
    shape = (shape[0], 1, shape[1] * shape[2]) if is_vector else shape
    return TensorLayout((param,), shape, rotated, cuts, groups, cross_shard)


def _matrix(shape: torch.Size, batch_dims: int) -> tuple[int, int, int]:
    """``(batch, rows, columns)``."""
    inner = shape[batch_dims:]
    return shape[:batch_dims].numel(), inner[0] if inner else 1, inner[1:].numel()


def _cuts(param: Any, batch_dims: int) -> Iterator[tuple[int, Cut]]:
    """The dimensions (-3 for the batch) along which a ``DTensor`` is cut."""
    mesh, seen = param.device_mesh, set()
    for mesh_dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        # Of type Shard itself: a strided shard is no run of neighbours.
        dim = placement.dim - batch_dims - 2 if type(placement).__name__ == "Shard" else 0
        if dim < -2:
            # Of several dimensions of experts the first: parts of a later one are no runs of matrices.
            dim = -3 if placement.dim == 0 else 0
        if not -3 <= dim <= -1 or dim in seen:
            raise NotImplementedError(
                f"Butterfly takes DTensors that are replicated, or cut along their batch, rows or columns by one mesh "
                f"dimension each, got placements {param.placements} of shape {tuple(param.shape)}; "
                "shard with fully_shard, or along dimension 0 or 1"
            )
        seen.add(dim)
        behind = {-3: param.shape[1:batch_dims], -2: (), -1: param.shape[placement.dim + 1 :]}[dim]
        unit = math.prod(behind)
        n, index, group = param.shape[placement.dim] * unit, mesh.get_local_rank(mesh_dim), mesh.get_group(mesh_dim)
        yield dim, Cut(n, unit, mesh.size(mesh_dim), index, mesh_dim, group)


def flat_layout(params: Sequence[Tensor]) -> TensorLayout:
    """The layout of a whole group in structure ``flat``.

    Raises:
        ValueError: if the parameters differ in dtype or device.
    """
    first = params[0]
    for param in params:
        if param.dtype != first.dtype or param.device != first.device:
            raise ValueError(
                "structure='flat' needs one dtype and device in a group, got "
                f"{first.dtype} on {first.device} and {param.dtype} on {param.device}; make one group of each"
            )
    n = sum(param.numel() for param in params)
    return TensorLayout(tuple(params), (1, n, 1), (-2,) if n > 1 else ())

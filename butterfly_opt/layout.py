"""How the parameters of a group become the tensors that are rotated.

``axes``: every parameter is a tensor of its own, of shape ``(out, everything else)``; its two axes
are rotated. Vectors and scalars are not rotated: their diagonal alone is kept, as Adam's.

``flat``: the parameters of a group, in order, are one vector, cut into blocks of ``block_size``
coordinates that rotate independently (one block if None). State lives under the first parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from butterfly_opt.rotation import angles_shape

STRUCTURES = ("axes", "flat")


@dataclass(frozen=True)
class TensorLayout:
    """One rotated tensor and the parameters it is made of.

    Attributes:
        params: parameters, in order.
        shape: shape of the rotated tensor, with as many elements as the parameters together.
        rotated: its rotated axes.
        stages: stages kept on each of them; all if None.
    """

    params: tuple[Tensor, ...]
    shape: tuple[int, ...]
    rotated: tuple[int, ...]
    stages: int | None = None

    @property
    def owner(self) -> Tensor:
        """The parameter under which the state is kept."""
        return self.params[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
        return torch.promote_types(self.owner.dtype, torch.float32)

    def angles_shapes(self, depth: int) -> list[tuple[int, int, int]]:
        """Shapes of the angles of each rotated axis."""
        return [angles_shape(self.shape[dim], depth=depth, stages=self.stages) for dim in self.rotated]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter, as one tensor of ``shape`` in the arithmetic dtype; it may alias."""
        if len(tensors) == 1:
            return tensors[0].to(self.dtype).reshape(self.shape)
        return torch.cat([tensor.to(self.dtype).reshape(-1) for tensor in tensors])

    def scatter(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of ``gather``: views (where possible) in the shapes of the parameters."""
        if len(self.params) == 1:
            return [tensor.reshape(self.owner.shape)]
        parts = tensor.split([param.numel() for param in self.params])
        return [part.view(param.shape) for part, param in zip(parts, self.params, strict=True)]


def axes_layout(param: Tensor) -> TensorLayout:
    """The layout of one parameter in structure ``axes``."""
    if param.dim() < 2 or param.numel() == 0:
        return TensorLayout((param,), tuple(param.shape) or (1,), ())
    shape = (param.shape[0], param.numel() // param.shape[0])
    return TensorLayout((param,), shape, tuple(dim for dim in (0, 1) if shape[dim] > 1))


def flat_layout(params: Sequence[Tensor], block_size: int | None) -> TensorLayout:
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
    stages = None if block_size is None else block_size.bit_length() - 1
    return TensorLayout(tuple(params), (n,), (0,) if n > 1 else (), stages)

"""How the parameters of a group become the tensors that are rotated.

Every tensor is ``(batch, rows, columns)``. ``axes``: a parameter is one tensor, ``(out, everything else)``, and both
axes are rotated; leading ``batch_dims`` dimensions (experts) are a batch, each with its own basis. Vectors, also
``(n, 1)`` and ``(1, n)``, are not rotated: their diagonal alone is kept, as Adam's. An axis more than MAX_ELONGATION
times as long as the other is not rotated either.

``flat``: the parameters of a group, in order, are one vector whose only axis is rotated (the paper's form). Its state
lies under the first parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRUCTURES = ("axes", "flat")

MAX_ELONGATION = 32
"""An axis of n indices keeps about 170 n numbers of basis: against m n parameters that pays for m >= n / 32 only."""


@dataclass(frozen=True)
class TensorLayout:
    """One rotated tensor and the parameters it is made of.

    Attributes:
        params: parameters, in order.
        shape: ``(batch, rows, columns)``, with as many elements as the parameters together.
        rotated: its rotated dimensions, of -2 (rows) and -1 (columns).
    """

    params: tuple[Tensor, ...]
    shape: tuple[int, int, int]
    rotated: tuple[int, ...]

    @property
    def owner(self) -> Tensor:
        """The parameter under which the state is kept."""
        return self.params[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
        return torch.promote_types(self.owner.dtype, torch.float32)

    @property
    def state_shape(self) -> torch.Size:
        """Shape of the averages: that of the parameter, or that of the group as a vector."""
        return self.owner.shape if len(self.params) == 1 else torch.Size((self.shape[1],))

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter, as one tensor of ``shape`` in the arithmetic dtype; it may alias."""
        if len(tensors) == 1:
            return tensors[0].to(self.dtype).reshape(self.shape)
        return torch.cat([tensor.to(self.dtype).reshape(-1) for tensor in tensors]).view(self.shape)

    def scatter(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of ``gather``: views (where possible) in the shapes of the parameters."""
        if len(self.params) == 1:
            return [tensor.reshape(self.owner.shape)]
        parts = tensor.reshape(-1).split([param.numel() for param in self.params])
        return [part.view(param.shape) for part, param in zip(parts, self.params, strict=True)]


def axes_layout(param: Tensor, batch_dims: int) -> TensorLayout:
    """The layout of one parameter in structure ``axes``."""
    batch = param.shape[:batch_dims].numel()
    inner = param.shape[batch_dims:]
    rows = inner[0] if inner else 1
    columns = inner[1:].numel()
    if min(rows, columns) <= 1 or not param.numel():
        return TensorLayout((param,), (batch, 1, inner.numel()), ())
    lengths = {-2: (rows, columns), -1: (columns, rows)}
    rotated = tuple(dim for dim, (n, other) in lengths.items() if n <= MAX_ELONGATION * other)
    return TensorLayout((param,), (batch, rows, columns), rotated)


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

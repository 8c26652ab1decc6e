"""What this process holds of a ``torch.distributed.tensor.DTensor``; of an ordinary tensor that is the tensor itself.

``DTensor`` itself is imported by its users only: builds of torch without distributed have none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_sharded(tensor: Any) -> bool:
    """Whether it is a ``DTensor``."""
    # The types first: a tensor takes long to find that it lacks an attribute.
    return type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """The shard of this process, which shares its memory; an ordinary tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_gradient(param: Any, grad: Any) -> Tensor:
    """The shard of a gradient that belongs to that of its parameter; partial sums are summed."""
    if is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def like(state: Any, own: Tensor) -> Tensor:
    """``own`` as the shard of a tensor that lies as ``state`` does."""
    if not is_sharded(state):
        return own
    # Given, or torch would take all shards for equally long.
    kept = {"shape": state.shape, "stride": state.stride()}
    return type(state).from_local(own, state.device_mesh, state.placements, run_check=False, **kept)


def placed(own: Tensor, mesh: Any, dims: Mapping[int, int], shape: torch.Size) -> Tensor:
    """``own`` as the shard of a contiguous tensor of a shape.

    Args:
        own: what this process holds.
        mesh: the ``DeviceMesh``.
        dims: dimensions of the mesh that cut, with the dimension of the tensor that each cuts; others replicate.
        shape: of all shards together.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(dims[i]) if i in dims else Replicate() for i in range(mesh.ndim)]
    stride = torch.empty(shape, device="meta").stride()
    # Not checked: that would be a collective.
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)

"""What must not reach the state: gradients that are not finite, displacements that are not ours.

A gradient is usable if all its entries, and their squares in float32, are finite. A displacement is ours if
the parameters are still what the last step wrote: their norm, kept as a fingerprint, tells (a change that
keeps the norm, as a permutation does, goes unnoticed). Both are decided on the device of the parameters.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from butterfly_opt.update import TensorStep

MAX_GRAD = 1.8e19
"""Gradients from here on count as non-finite: their squares overflow float32."""


def keep_usable(tensors: Sequence[TensorStep]) -> list[TensorStep]:
    """The tensors whose step can be taken; counts the others.

    Where the host may not read (a GPU, ``capturable``) all are kept, with their ``usable`` set.

    Raises:
        FloatingPointError: for a gradient that is not usable, with ``on_nonfinite="raise"``; nothing is counted.

    Cost: one pass over the gradients.
    """
    places: dict[tuple[torch.device, bool], list[TensorStep]] = defaultdict(list)
    for tensor in tensors:
        places[tensor.layout.owner.device, tensor.is_on_device].append(tensor)
    largest = {place: _largest_entries(there) for place, there in places.items()}
    for place, there in places.items():
        if any(tensor.options["on_nonfinite"] == "raise" for tensor in there):
            _raise_unusable(there, largest[place].tolist())
    kept: list[TensorStep] = []
    for (device, on_device), there in places.items():
        flags = largest[device, on_device] < MAX_GRAD
        if on_device:
            torch._foreach_add_([tensor.state["skipped"] for tensor in there], list((~flags).float().unbind()))
            kept += [replace(tensor, usable=flag) for tensor, flag in zip(there, flags.unbind(), strict=True)]
            continue
        for tensor, flag in zip(there, flags.tolist(), strict=True):
            if flag:
                kept.append(tensor)
            else:
                tensor.state["skipped"] += 1
    return kept


def _raise_unusable(tensors: Sequence[TensorStep], largest: Sequence[float]) -> None:
    for tensor, value in zip(tensors, largest, strict=True):
        if tensor.options["on_nonfinite"] == "raise" and not value < MAX_GRAD:
            raise FloatingPointError(
                f"non-finite gradient (largest entry {value}) of the tensor of shape {tensor.layout.shape}; "
                "on_nonfinite='skip' leaves such steps out"
            )


def _largest_entries(tensors: Sequence[TensorStep]) -> Tensor:
    """Largest absolute gradient entry of each tensor, NaN where one is: float32 ``(len(tensors),)``."""
    owners = [i for i, tensor in enumerate(tensors) for param in tensor.layout.params if _entries(param)]
    largest = _largest([param.grad for tensor in tensors for param in tensor.layout.params if _entries(param)])
    if owners == list(range(len(tensors))):
        return largest
    worst = torch.zeros(len(tensors), device=largest.device)
    for i, value in zip(owners, largest.unbind(), strict=True):
        worst[i] = torch.maximum(worst[i], value)
    return worst


def _entries(param: Tensor) -> bool:
    return param.grad is not None and param.grad.numel() > 0


def _largest(grads: Sequence[Tensor | None]) -> Tensor:
    """Largest absolute entries, NaN where an entry is: float32 ``(len(grads),)``."""
    given = [grad for grad in grads if grad is not None]
    if given[0].is_cuda:
        return torch.stack(list(torch._foreach_norm(given, float("inf"), dtype=torch.float32)))
    # An infinity norm takes twenty times as long on a CPU.
    ends = torch.stack([end.float() for grad in given for end in torch.aminmax(grad)]).view(-1, 2)
    return torch.maximum(-ends[:, 0], ends[:, 1])


def fingerprints(tensors: Sequence[TensorStep]) -> Tensor:
    """Norms of the parameters of each tensor, all on one device: ``(len(tensors),)``. Cost: one pass."""
    params = [param.detach() for tensor in tensors for param in tensor.layout.params]
    norms = torch.stack(list(torch._foreach_norm(params, 2, dtype=tensors[0].layout.dtype)))
    if len(params) == len(tensors):
        return norms
    counts = [len(tensor.layout.params) for tensor in tensors]
    return torch.stack([torch.linalg.vector_norm(part) for part in norms.split(counts)])


def restart_displacements_(tensors: Sequence[TensorStep]) -> None:
    """Sets the displacement of tensors that were changed by hand to zero, and counts them."""
    for there in _tracked(tensors):
        known = torch.stack([tensor.state["fingerprint"] for tensor in there])
        changed = (fingerprints(there) != known) & (known >= 0)
        if there[0].is_on_device:
            torch._foreach_mul_([tensor.state["displacement"] for tensor in there], list((~changed).unbind()))
            torch._foreach_add_([tensor.state["restarts"] for tensor in there], list(changed.float().unbind()))
            continue
        for tensor, flag in zip(there, changed.tolist(), strict=True):
            if flag:
                tensor.state["displacement"].zero_()
                tensor.state["restarts"] += 1


def remember_fingerprints_(tensors: Sequence[TensorStep]) -> None:
    """Keeps the norms of the parameters as the step leaves them."""
    for there in _tracked(tensors):
        torch._foreach_copy_([tensor.state["fingerprint"] for tensor in there], list(fingerprints(there).unbind()))


def _tracked(tensors: Sequence[TensorStep]) -> list[list[TensorStep]]:
    """The tensors of a group that keep a displacement, by device and dtype."""
    places: dict[tuple[torch.device, torch.dtype], list[TensorStep]] = defaultdict(list)
    for tensor in tensors:
        if "fingerprint" in tensor.state:
            places[tensor.layout.owner.device, tensor.layout.dtype].append(tensor)
    return list(places.values())

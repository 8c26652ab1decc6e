"""Collectives that the steps of many tensors ask for, joined into one of each kind.

A step that needs to hear of other processes is a coroutine: it awaits a ``Gather`` or a ``Sum``. ``run`` carries all
steps of an optimizer to their next ``await``, joins what they ask for, sends it, and goes on, so that the number of
collectives does not grow with the number of tensors. A step that asks for nothing runs through at once.

Every process must run the same steps in the same order.
"""

from collections import defaultdict
from collections.abc import Coroutine, Generator, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed.ProcessGroup``; builds of torch without distributed have no such name."""


class Request:
    """What a step asks of other processes, to be awaited.

    Args:
        value: of the same shape in every process.
        group: the processes.
    """

    def __init__(self, value: Tensor, group: Group) -> None:
        self.value, self.group = value, group
        self.shape: tuple[int, ...] = value.shape

    def __await__(self) -> Generator["Request", Tensor, Tensor]:
        answer = yield self
        return answer.reshape(self.shape)


class Gather(Request):
    """``await Gather(x, group)``: the ``x`` of every process of a group, stacked along a new first dimension."""

    def __init__(self, value: Tensor, group: Group) -> None:
        super().__init__(value, group)
        self.shape = (-1, *value.shape)


class Sum(Request):
    """``await Sum(x, group)``: the sum of the ``x`` of every process of a group."""


def run(steps: Iterable[Coroutine[Request, Tensor, Any]]) -> list[Any]:
    """Runs coroutines to their ends, all at once, and returns their results in order.

    Cost: as many rounds as the coroutine with the most ``await`` has; in each round at most one all-gather and one
    all-reduce for every group and dtype.
    """
    running: dict[int, Coroutine[Request, Tensor, Any]] = dict(enumerate(steps))
    results: list[Any] = [None] * len(running)
    answers: dict[int, Any] = dict.fromkeys(running)
    while running:
        requests: dict[int, Request] = {}
        for i, step in list(running.items()):
            try:
                requests[i] = step.send(answers[i])
            except StopIteration as stop:
                results[i] = stop.value
                del running[i]
        answers = _exchange(requests)
    return results


def all_gather(gathered: Tensor, own: Tensor, *, group: Group) -> None:
    """The ``own`` of all processes one after the other; torch renamed the function in 2.14."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(gathered, own, group=group)


def _exchange(requests: dict[int, Request]) -> dict[int, Tensor]:
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, request in requests.items():
        alike[type(request), id(request.group), request.value.dtype].append(i)
    answers: dict[int, Tensor] = {}
    for (kind, _, _), members in alike.items():
        parts = [requests[i].value.reshape(-1) for i in members]
        # A copy of one alone too: ``all_reduce`` writes in place.
        joined = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        group, sizes = requests[members[0]].group, [len(part) for part in parts]
        if kind is Gather:
            gathered = joined.new_empty(dist.get_world_size(group) * len(joined))
            all_gather(gathered, joined, group=group)
            joined = gathered.view(-1, len(joined))
        elif len(joined):
            dist.all_reduce(joined, group=group)
        answers.update(zip(members, joined.split(sizes, dim=-1), strict=True))
    return answers


def all_reduce_max(values: Tensor, group: Group) -> Tensor:
    """The largest of every process of a group, element by element; ``values`` may be overwritten."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values

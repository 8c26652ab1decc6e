"""Plans: which coordinates of an axis each small rotation of a wide butterfly mixes.

A rotation of ``n`` coordinates is a list of *stages*; a stage rotates disjoint *groups* of at most ``block``
coordinates, each by an orthogonal matrix of its own. After M. Mathieu and Y. LeCun, "Fast Approximation of Rotations
and Hessians Matrices", arXiv:1404.7195 (2014), whose butterfly is ``block = lead = 2``.

``lead < block``, the *leading* plan. The first stage takes neighbours in groups of nearly equal length (the *leaves*);
of the outputs of each group the first ``lead`` go on, and neighbouring groups' outputs meet in a group of the next
stage, up to one root. ``ceil(log_{block/lead}(n / block)) + 1`` stages, O(n block) work and memory.
``n <= block`` is one dense group.

``lead = block``, the *full* plan. Every output goes on, as in a fast Fourier transform of radix ``r = block``: stage
``l`` mixes coordinates whose indices differ in digit ``l`` base r. Where ``n`` is no power of r, the last groups are
smaller. ``ceil(log_r n)`` stages.

Glossary, used throughout the package:

    n            length of the rotated axis
    block, lead  the largest group, and how many of its outputs go on
    group        coordinates that one small orthogonal matrix mixes
    run          consecutive groups of one size, which one batched product rotates
    Q            the rotation, n x n; its columns are the basis vectors, Q^T y rotated coordinates
    delta_theta  s, a change of parameters
    delta_grad   y, the change of gradient that belongs to it
    D            diagonal of the inverse-Hessian estimate Q diag(D) Q^T
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Run(NamedTuple):
    """Consecutive ``groups`` of ``size`` coordinates each."""

    # In this order: a run is the shape (groups, size) that ``unflatten`` takes.
    groups: int
    size: int

    @property
    def span(self) -> int:
        """Coordinates of all groups together."""
        return self.groups * self.size

    @property
    def numel(self) -> int:
        """Numbers of their matrices."""
        return self.groups * self.size * self.size


@dataclass(frozen=True, eq=False)
class Stage:
    """Groups that are rotated at once.

    Attributes:
        runs: the groups in order, at most three different sizes.
        index: int64, the coordinates of the groups one after the other, on the CPU; None for ``0 .. n - 1``.
    """

    runs: tuple[Run, ...]
    index: Tensor | None

    def index_on(self, device: torch.device) -> Tensor | None:
        """``index`` on a device."""
        if self.index is None or type(torch.empty(0, device=device)) is Tensor:
            return self._kept_on(device)
        return torch.tensor(self.index.tolist(), device=device)  # under ``FakeTensorMode``: not to be kept

    @lru_cache(maxsize=8)  # noqa: B019 - plans are few and live as long as the process
    def _kept_on(self, device: torch.device) -> Tensor | None:
        return None if self.index is None else self.index.to(device)


# Equal by identity: what is made of plans is cached by them (``fused``).
@dataclass(frozen=True, eq=False)
class Plan:
    """The stages of a rotation of ``n`` coordinates; equal arguments of ``make_plan`` give the same object.

    Attributes:
        n: length of the axis.
        block: the largest group.
        lead: outputs of a group that go on.
        stages: in the order in which ``Q^T`` applies them.
    """

    n: int
    block: int
    lead: int
    stages: tuple[Stage, ...]

    @property
    def is_full(self) -> bool:
        """Whether every output goes on."""
        return self.lead == self.block

    @property
    def numel(self) -> int:
        """Numbers of all matrices: what a rotation keeps, once for Q and once for its statistics."""
        return sum(run.numel for stage in self.stages for run in stage.runs)

    def views(self, flat: Tensor) -> list[list[Tensor]]:
        """The matrices of each stage and run, ``(*batch, count, size, size)`` views of ``(*batch, numel)``."""
        sizes = [run.numel for stage in self.stages for run in stage.runs]
        parts = iter(flat.split(sizes, dim=-1))
        return [[next(parts).unflatten(-1, (run.groups, run.size, run.size)) for run in s.runs] for s in self.stages]


def make_plan(n: int, block: int, lead: int) -> Plan:
    """The plan of an axis.

    Args:
        n: its length, >= 1.
        block: the largest group, >= 2.
        lead: outputs of a group that go on: ``block`` for the full plan, else from 1 to ``block // 2``.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_plan(block, lead)
    if n < 1:
        raise ValueError(f"a rotation needs n >= 1 coordinates, got n = {n}")
    # What is kept for later must not be fake, nor lie where new tensors happen to be made just now.
    with _disable_current_modes(), torch.device("cpu"):
        return _plan(n, block, lead)


@lru_cache(maxsize=1024)
def _plan(n: int, block: int, lead: int) -> Plan:
    return Plan(n, block, lead, _full_stages(n, block) if lead == block else _leading_stages(n, block, lead))


TILE = 64
"""Coordinates of the largest tile of the kernels, which take a share as whole tiles."""

SHARES = 4
"""Shares of an axis that take turns in the second moments of the other one's leaves, the costliest: from a quarter of
the columns of every gradient they learn what they learn from all, and not from all of every fourth gradient
(experiments/NOTES.md)."""


def share_bounds(n: int, plan: Plan | None) -> list[int]:
    """Where the shares of an axis begin, and its length: as many as there are TILE coordinates, at most SHARES.

    Args:
        n: length of the axis.
        plan: of its rotation; None if it is not rotated.
    """
    starts: list[int] = []
    first = 0
    for run in plan.stages[0].runs if plan is not None and plan.stages else ():
        starts += range(first, first + run.span, run.size * max(1, TILE // run.size))
        first += run.span
    starts += range(first, n, TILE)
    count = max(1, min(SHARES, n // TILE, len(starts)))
    return [*(starts[i * len(starts) // count] for i in range(count)), n]


def check_plan(block: int, lead: int) -> None:
    """Checks the two numbers of a plan.

    Raises:
        ValueError: naming the one out of range.
    """
    for name, value, low in (("block", block, 2), ("lead", lead, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"Invalid {name} value: {value!r}, expected an integer >= {low}")
    if block // 2 < lead != block:
        raise ValueError(
            f"Invalid lead value: {lead}, expected at most block // 2 = {block // 2}, or block = {block} "
            "for the full butterfly of that radix"
        )


def _leading_stages(n: int, block: int, lead: int) -> tuple[Stage, ...]:
    children = block // lead
    runs = _leaf_runs(n, block)
    stages = [Stage(runs, None)]
    firsts = _first_coordinates(runs)
    while len(firsts) > 1:
        count = len(firsts)
        groups = -(-count // children)
        sizes = [size * lead for size in _balanced(count, groups)]
        runs = tuple(Run(sizes.count(size), size) for size in sorted(set(sizes), reverse=True))
        index = (torch.tensor(firsts)[:, None] + torch.arange(lead)).reshape(-1)
        stages.append(Stage(runs, index))
        # A parent writes where its children's leading outputs lay: its own first ones lie at its first child.
        heads = [0]
        for size in sizes[:-1]:
            heads.append(heads[-1] + size // lead)
        firsts = [firsts[head] for head in heads]
    return tuple(stages)


def _leaf_runs(n: int, block: int) -> tuple[Run, ...]:
    """Neighbours in groups: equal ones where a divisor of n between block / 2 and block exists, else balanced."""
    for size in range(min(n, block), block // 2 - 1, -1):
        if n % size == 0:
            return (Run(n // size, size),)
    sizes = _balanced(n, -(-n // block))
    return tuple(Run(sizes.count(size), size) for size in sorted(set(sizes), reverse=True))


def _balanced(total: int, parts: int) -> list[int]:
    """``total`` in parts that differ by at most one, the larger first."""
    small, more = divmod(total, parts)
    return [small + 1] * more + [small] * (parts - more)


def _first_coordinates(runs: tuple[Run, ...]) -> list[int]:
    firsts: list[int] = []
    start = 0
    for run in runs:
        firsts += range(start, start + run.span, run.size)
        start += run.span
    return firsts


def _full_stages(n: int, radix: int) -> tuple[Stage, ...]:
    stages = []
    stride = 1
    while stride < n:
        coordinates = torch.arange(n)
        digit = coordinates // stride % radix
        group = coordinates // (stride * radix) * stride + coordinates % stride
        order = (group * radix + digit).argsort()
        sizes = group.bincount()[group[order]]
        # Coordinates without a partner stay as they are; sizes never grow along the axis, so runs are consecutive.
        index = order[sizes > 1]
        counts = torch.unique_consecutive(sizes[sizes > 1], return_counts=True)
        runs = tuple(Run(span // size, size) for size, span in zip(*(c.tolist() for c in counts), strict=True))
        stages.append(Stage(runs, None if torch.equal(index, torch.arange(n)) else index))
        stride *= radix
    return tuple(stages)

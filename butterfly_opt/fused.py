"""One step by the Triton kernels: equals ``butterfly_opt.step.take_step_``, which is also its documentation.

The only importer of the kernels. Tensors of any shapes step together, in lists of equal dtypes and rotated axes. The
way of a list, a launch for each level of the butterflies, of which both axes' are turned together:

    forth       averages of gradients (and parameters), changes rotated, second moments of what enters a level,
                averages and direction of the coordinates that no later level turns
    observe     the second moments of all levels, averaged
    back        from the roots to the leaves; there the exact-zero rule, decay, rounding, the parameters

Tensors whose bases are refitted take their second moments beforehand, in a pass of their own through the first two.
The first fit (eigenvectors) is left to torch. So are gradients and parameters that are no plain matrices in memory -
several parameters in one tensor (``structure="flat"``), other strides (channels_last), gradients of several dtypes:
``step.gradients``, ``step.parameters`` and ``step.write_`` gather and scatter them, about 20 bytes a parameter more.

Results do not depend on the run; they agree with torch's to rounding. The means are kept from step to step beside the
tables, and taken of the averages where those are not as the step before left them.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from butterfly_opt import diagonal, step
from butterfly_opt.plan import Plan, share_bounds
from butterfly_opt.rotation import SHIFT, Rotation
from butterfly_opt.stack import Numbers, Stack

if TYPE_CHECKING:  # under its name in the repository, where the type checker finds it
    from triton_kernels import refit, tables, tiles
    from triton_kernels import step as kernels
else:
    from butterfly_opt.triton_kernels import refit, tables, tiles
    from butterfly_opt.triton_kernels import step as kernels

MAX_BLOCK = tiles.MAX_BLOCK
"""The largest ``block`` that the kernels take."""

MAX_NUMEL = tiles.MAX_NUMEL
"""Elements of the largest matrix that they take."""

MAX_LIST = 1 << 26
"""Elements of a list of several stacks: launches are few, and scratch takes 20 bytes an element, secant's 24."""


class Member(NamedTuple):
    """A stack in a step.

    Attributes:
        stack: tensors of one shape.
        usable: bool ``(tensors,)``.
        part: what the kernels know of it.
        gradients: one tensor a tensor of the stack, or gathered ones.
        parameters: the same.
        gathered: whether torch gathered them, and will write.
        rows: addresses of gradient and parameter of each matrix.
        aligned: see ``Part``; of these as well.
        observed: BEFORE if its bases are refitted (in a captured step, where that is due), WITHIN if their second
            moments alone change, else None.
    """

    stack: Stack
    usable: Tensor
    part: tables.Part
    gradients: Sequence[Tensor]
    parameters: Sequence[Tensor]
    gathered: bool
    rows: list[tuple[int, int]]
    aligned: tuple[bool, bool]
    observed: int | None


class Known(NamedTuple):
    """What is kept of a list from step to step.

    Attributes:
        stacks: of the list.
        tables: of the stacks.
        means: of B and |C| of each matrix.
        versions: of B and C when these were their means.
        rows: addresses of gradients and parameters.
        addresses: the same, on the device.
    """

    stacks: list[ref[Stack]]
    tables: tables.Tables
    means: Tensor
    versions: list[int]
    rows: list[tuple[int, int]]
    addresses: Tensor


# Weak: what is known of a stack goes with it.
_PARTS: WeakKeyDictionary[Stack, tables.Part] = WeakKeyDictionary()
_KNOWN: WeakKeyDictionary[Stack, Known] = WeakKeyDictionary()


async def take_steps_(pairs: Sequence[tuple[Stack, Tensor]]) -> None:
    """Steps stacks of one group and device: state and parameters change in place.

    Args:
        pairs: tensors whose parameters hold their gradients, float32 state, ``block`` at most MAX_BLOCK, each with
            ``usable``, bool ``(tensors,)``; a tensor where it is False keeps its state and parameters, bit for bit.

    Raises:
        ValueError: if a group of a rotation is larger than MAX_BLOCK, or an average is not contiguous.
        TypeError: if the state is not float32.
    """
    # Triton launches on the current GPU.
    with torch.cuda.device_of(pairs[0][1]):
        lists = _lists([_member(*pair) for pair in pairs])
        counts = [sum(own.part.shape[0] for own in members) for members in lists]
        numbers = _numbers([own for members in lists for own in members]).split(counts)
        for members, own_numbers in zip(lists, numbers, strict=True):
            _step_list_(members, own_numbers)


def _member(stack: Stack, usable: Tensor) -> Member:
    part = _PARTS.get(stack) or _PARTS.setdefault(stack, _part(stack))
    batch, rows, columns = stack.shape
    parameters: Sequence[Tensor] = [layout.params[0] for layout in stack.layouts]
    gradients: Sequence[Tensor] = [param.grad for param in parameters if param.grad is not None]
    plain = len(gradients) == len(parameters) and len(stack.layouts[0].params) == 1
    plain = plain and len({grad.dtype for grad in gradients}) == 1
    if not plain or not all(tensor.is_contiguous() for tensor in (*gradients, *parameters)):
        plain = False
        gradients = step.gradients(stack).contiguous().split(batch)
        parameters = step.parameters(stack).contiguous().split(batch)
    of_grad, of_param = (rows * columns * tensors[0].element_size() for tensors in (gradients, parameters))
    starts = [(grad.data_ptr(), param.data_ptr()) for grad, param in zip(gradients, parameters, strict=True)]
    if batch > 1:
        starts = [(grad + i * of_grad, param + i * of_param) for grad, param in starts for i in range(batch)]
    observed = None
    if stack.rotations and stack.calls > 1:
        observed = tables.BEFORE if stack.refits() else tables.WITHIN
    aligned = part.aligned[0], part.aligned[1] and not any((grad | param) % 16 for grad, param in starts)
    return Member(stack, usable, part, gradients, parameters, not plain, starts, aligned, observed)


def _lists(members: Sequence[Member]) -> list[list[Member]]:
    """Members that one launch can serve: alike in what kernels are compiled for, of at most MAX_LIST elements."""
    alike: dict[Any, list[list[Member]]] = defaultdict(list)
    for own in members:
        axes = tuple((axis.width, axis.matrices is None) for axis in own.part.axes)
        compiled = own.gradients[0].dtype, own.parameters[0].dtype, own.aligned, own.part.alone, axes
        lists = alike[own.gathered, compiled]
        if not lists or sum(known.part.numel for known in (*lists[-1], own)) > MAX_LIST:
            lists.append([])
        lists[-1].append(own)
    return [members for lists in alike.values() for members in lists]


def _step_list_(members: Sequence[Member], numbers: Tensor) -> None:
    for own in members:
        if own.stack.calls == 1:
            _start_(own)
    operands = _operands(members, numbers)
    observed = {own.observed for own in members}
    if tables.BEFORE in observed:
        _forth_(operands, tables.BEFORE, is_step=False, observed=tables.BEFORE)
        refit.refit_(operands, gate=tables.BEFORE, shift=SHIFT[torch.float32])
    # A captured step launches both: on the device the weights of one of them are 0.
    capturable = members[0].stack.options["capturable"] and observed != {None}
    within = tables.WITHIN if tables.WITHIN in observed or capturable else None
    _forth_(operands, tables.USABLE, is_step=True, observed=within)
    gathered, stochastic = members[0].gathered, members[0].stack.options["stochastic_rounding"]
    kernels.back_(operands, stochastic=stochastic, write=not gathered)
    changed: list[Tensor] = []
    changes = operands.values[0].split([own.part.numel for own in members])
    for own, change in zip(members, changes, strict=True):
        changed += [*own.part.averages.values(), *([] if gathered else own.parameters)]
        if gathered:
            step.write_(own.stack, change.view_as(own.stack.averages["exp_avg"]))
        if own.observed:
            # Rotation.dense notices new matrices by their version.
            changed += [x for axis in own.part.axes for x in (axis.matrices, axis.moments) if x is not None]
    # Kernels write past torch, which must notice.
    torch.autograd.graph.increment_version(changed)
    # After that: only writes of others make the means be taken anew.
    _KNOWN[members[0].stack].versions[:] = _versions(members)


def _start_(own: Member) -> None:
    """The first fit, of bases that have seen nothing."""
    y = step.gradients(own.stack) - own.stack.averages["exp_avg"]
    y = torch.where(own.stack.per_tensor(own.usable), y, 0.0)
    for dim, rotation in own.stack.whole_rotations:
        rotation.start_(y if dim == -2 else y.mT)
        rotation.scale_leaves_(1 / own.stack.shares(dim))


def _forth_(operands: tables.Operands, gate: int, *, is_step: bool, observed: int | None) -> None:
    """The way forth; with ``observed`` the second moments of what enters each level."""
    kernels.forth_(operands, gate=gate, step=is_step, observe=observed is not None)
    if observed is not None:
        refit.observe_(operands, gate=observed)


def _operands(members: Sequence[Member], numbers: Tensor) -> tables.Operands:
    first, averages, known = members[0], members[0].stack.averages, _known(members)
    options, made, new = first.stack.options, known.tables, averages["exp_avg"].new_empty
    # A tensor on a GPU is not asked whether it is 0.
    decays = isinstance(options["weight_decay"], Tensor) or options["weight_decay"] != 0
    values = new(3 if "cross" in averages else 2, made.volume)
    regression = (diagonal.MIN_STEPS, diagonal.MAX_RIDGE, diagonal.ROUNDING[torch.float32])
    observed = any(own.observed for own in members)
    return tables.Operands(
        tables=made,
        addresses=known.addresses,
        numbers=numbers,
        # What kernels leave out is no change.
        values=values.zero_() if first.gathered else values,
        flags=new(len(made.levels[0].programs), dtype=torch.int32),
        means=known.means,
        sums=new(made.programs, 2, dtype=torch.float64),
        # Pool i has the width of axis i; where both share pool 0, pool 1 is empty.
        partials=[
            new(count if observed else 0, axis.width, axis.width)
            for count, axis in zip(made.partials, made.axes, strict=True)
        ],
        dtypes=(first.gradients[0].dtype, first.parameters[0].dtype),
        aligned=first.aligned,
        decays=decays and not options["decoupled_weight_decay"] and not first.gathered,
        signal=step.SIGNAL,
        regression=regression if "cross" in averages else None,
    )


def _numbers(members: Sequence[Member]) -> Tensor:
    """``numbers`` of members, see ``tables.NUMBERS``: by few operations, however many they are."""
    rows = [own.stack.per_tensor(own.stack.rows)[..., 0, 0] for own in members]
    n = Numbers(*torch.cat(rows, dim=1).float())
    counts, zeros, options = [own.part.shape[0] for own in members], torch.zeros_like(n.lr), members[0].stack.options
    parts = list(zip(members, *(x.split(counts) for x in (n.moment, zeros, n.step)), strict=True))
    observed = map(torch.cat, zip(*(_observed(*part) for part in parts), strict=True))
    decay, decoupled = options["weight_decay"], options["decoupled_weight_decay"]
    keep, l2 = 1 - n.lr * (decay if decoupled else 0.0), zeros + (0.0 if decoupled else decay)
    # What torch gathered has its sign already.
    sign = zeros + 1
    if options["maximize"]:
        sign = torch.cat([zero + (1 if member.gathered else -1) for member, _, zero, _ in parts])
    # As ``Stack.share`` counts.
    clock = n.step
    if not options["capturable"]:
        clock = torch.cat([zero + own.stack.calls for own, _, zero, _ in parts])
    columns = *n[:5], n.usable, keep, n.floor, *observed, sign, l2, zeros + (1 - options["betas"][1]), clock
    return torch.stack(columns, dim=1).float()


def _observed(own: Member, weight: Tensor, zero: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the innovation in second moments that are taken before the step, for a refit, and within it."""
    if own.observed is None:
        return zero, zero
    if own.stack.options["capturable"]:
        due = own.stack.is_due(count)
        return weight.where(due, zero), weight.where(~due, zero)
    return (weight, zero) if own.observed == tables.BEFORE else (zero, weight)


def _known(members: Sequence[Member]) -> Known:
    """What the step before left; addresses anew if one has changed, all if other stacks step."""
    # Weak: else what is known of a stack would keep its own key alive.
    rows, stacks = [row for own in members for row in own.rows], [ref(own.stack) for own in members]
    first, device = members[0].stack, members[0].usable.device
    known = _KNOWN.get(first)
    if known is None or known.stacks != stacks:
        made = tables.make_tables([own.part for own in members], device)
        kept, addresses = torch.zeros(len(made.matrices), 2, device=device), tiles.address_table(rows, device)
        known = _KNOWN[first] = Known(stacks, made, kept, [], rows, addresses)
    elif known.rows != rows:
        known = _KNOWN[first] = known._replace(rows=rows, addresses=tiles.address_table(rows, device))
    if known.versions != _versions(members):
        # In float64, as the kernels add them up: a resumed run goes on with the same bits.
        means = [x.abs().mean((1, 2), dtype=torch.float64) for x in _pairs(members)]
        known.means.copy_(torch.stack([torch.cat(means[::2]), torch.cat(means[1::2])], dim=1))
    return known


def _pairs(members: Sequence[Member]) -> list[Tensor]:
    """B and C of each stack in turn, where they are kept."""
    names = [name for name in ("disp_sq", "cross") if name in members[0].part.averages]
    return [own.part.averages[name] for own in members for name in names]


def _versions(members: Sequence[Member]) -> list[int]:
    return [average._version for average in _pairs(members)]


def _part(stack: Stack) -> tables.Part:
    """A stack as the kernels see it: without a rotated axis, matrices of one row."""
    (count, rows, columns), rotations = stack.averages["exp_avg"].shape, dict(stack.whole_rotations)
    device, widths = stack.layouts[0].owner.device, [tiles.width_of(rows), tiles.width_of(columns)]
    if not rotations:
        rows, columns, widths = 1, rows * columns, [1, tiles.VECTOR_WIDTH]
    axes = _axis(rows, widths[0], rotations.get(-2), device), _axis(columns, widths[1], rotations.get(-1), device)
    averages = {name: average.view(count, rows, columns) for name, average in stack.averages.items()}
    by_row, by_column = (all(stage.aligned for stage in (*axis.stages, axis.rest)) for axis in axes)
    kept = *averages.values(), *(axis.matrices for axis in axes if axis.matrices is not None)
    at_16 = all(x.data_ptr() % 16 == 0 for x in kept)
    # In ``flat`` torch rounds; for the kernels each stream is that of as many matrices.
    streams = stack.streams[: len(stack.layouts)]
    return tables.Part((count, rows, columns), averages, axes, streams, (by_row and at_16, by_column and at_16))


def _axis(length: int, width: int, rotation: Rotation | None, device: torch.device) -> tables.Axis:
    every, rest = (tiles.make_stage((), None, length, 0, width, lead=0, visited=v) for v in (True, False))
    shares = len(share_bounds(length, None if rotation is None else rotation.plan)) - 1
    if rotation is None:
        return tables.Axis(width, [every], rest, shares=shares)
    lead = 0 if rotation.plan.is_full else rotation.plan.lead
    stages = _stages(rotation.plan, width, device)
    return tables.Axis(width, stages, rest, lead, shares, rotation.matrices, rotation.moments)


@lru_cache(maxsize=1024)
def _stages(plan: Plan, width: int, device: torch.device) -> tuple[tiles.Stage, ...]:
    stages, offset, every = [], 0, torch.arange(plan.n)
    for i, stage in enumerate(plan.stages):
        is_last = i == len(plan.stages) - 1
        all_go_on = tiles.ALL if plan.is_full and not is_last else 0
        # Leaves are neighbours; a later stage is followed by what it does not turn, which in a leading plan is done.
        index = None
        if i > 0:
            own = every if stage.index is None else stage.index
            left = torch.ones(plan.n, dtype=torch.bool).index_fill_(0, own, False)
            index = torch.cat([own, every[left]])
        lead = all_go_on if plan.is_full or is_last else plan.lead
        stages.append(tiles.make_stage(
            stage.runs, index, plan.n, offset, width, lead=lead, plain_lead=all_go_on,
            visited=i == 0 or plan.is_full, device=device,
        ))  # fmt: skip
        offset += sum(run.numel for run in stage.runs)
    return tuple(stages)

"""One step by the Triton kernels: equals ``butterfly_opt.step.take_step_``, which is also its documentation.

The only importer of the kernels. The way of a plain step, one launch each:

    forth             averages of gradients (and parameters), changes rotated by the leaves of both axes,
                      averages and direction of the coordinates that no later stage turns
    later stages      of one axis after the other, in place, all rotated vectors together
    rest              averages and direction of all others (secant: sums, then directions)
    later stages      from the root back
    back              the leaves backwards, the exact-zero rule, decay, rounding, the parameters

Every step makes ``y`` beforehand and observes it, and some refit, stage by stage. The first fit (eigenvectors)
is left to torch. So are gradients and parameters that are no plain matrices in memory - several parameters in one
tensor (``structure="flat"``), other strides (channels_last), gradients of several dtypes: ``step.gradients``,
``step.parameters`` and ``step.write_`` gather and scatter them, about 20 bytes a parameter more.

Results do not depend on the run; they agree with torch's to rounding.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from butterfly_opt import diagonal, step
from butterfly_opt.plan import Plan, make_plan
from butterfly_opt.rotation import SHIFT, Rotation
from butterfly_opt.stack import Stack

if TYPE_CHECKING:  # under its name in the repository, where the type checker finds it
    from triton_kernels import refit, rotate, tiles
    from triton_kernels import step as kernels
else:
    from butterfly_opt.triton_kernels import refit, rotate, tiles
    from butterfly_opt.triton_kernels import step as kernels

MAX_BLOCK = tiles.MAX_BLOCK
"""The largest ``block`` that the kernels take."""


class Source(NamedTuple):
    """Where gradients and parameters lie.

    Attributes:
        gradients: one tensor a tensor of the stack, or gathered ones.
        parameters: the same.
        gathered: whether torch gathered them, and will write.
    """

    gradients: Sequence[Tensor]
    parameters: Sequence[Tensor]
    gathered: bool


class Table(NamedTuple):
    """Addresses of a stack's gradients and parameters, ``tiles.address_table``, and the numbers it was made of."""

    rows: list[tuple[int, ...]]
    tensor: Tensor


_TABLES: WeakKeyDictionary[Stack, Table] = WeakKeyDictionary()


async def take_step_(stack: Stack, usable: Tensor) -> None:
    """Steps the tensors of a stack: state and parameters change in place.

    Args:
        stack: tensors whose parameters hold their gradients, float32 state, ``block`` at most MAX_BLOCK.
        usable: bool ``(tensors,)``; a tensor where it is False keeps its state and parameters, bit for bit.

    Raises:
        ValueError: if a group of a rotation is larger than MAX_BLOCK, or no kernel can run on the device.
        TypeError: if the state is not float32.
    """
    source = _source(stack)
    operands = _operands(stack, source, usable)
    _fit_basis_(stack, operands)
    kernels.forth_(operands)
    count, rows, columns = stack.averages["exp_avg"].shape
    values = operands.values.view(-1, count, rows, columns)
    for dim, rotation in stack.whole_rotations:
        _later_stages_(values, rotation, dim=dim, back=False)
    sums = kernels.take_rest_(operands)
    for dim, rotation in stack.whole_rotations:
        _later_stages_(values[1:2], rotation, dim=dim, back=True)
    stochastic = stack.options["stochastic_rounding"] and operands.dtypes[1] == torch.bfloat16
    kernels.back_(operands, sums, stochastic=stochastic, write=not source.gathered)
    if source.gathered:
        step.write_(stack, values[0], stack.numbers)
    else:
        torch.autograd.graph.increment_version(list(source.parameters))


def _source(stack: Stack) -> Source:
    owners = [layout.owner.detach() for layout in stack.layouts]
    grads = [layout.owner.grad for layout in stack.layouts]
    kept = [grad for grad in grads if grad is not None]
    plain = len(kept) == len(stack.layouts) and all(len(layout.params) == 1 for layout in stack.layouts)
    if plain and len({grad.dtype for grad in kept}) == 1 and all(t.is_contiguous() for t in (*kept, *owners)):
        return Source(kept, owners, gathered=False)
    batch = stack.shape[0]
    return Source(step.gradients(stack).split(batch), step.parameters(stack).contiguous().split(batch), gathered=True)


def _operands(stack: Stack, source: Source, usable: Tensor) -> kernels.Operands:
    options, averages, n, geometry = stack.options, stack.averages, stack.numbers, _geometry(stack)
    decays, decoupled = _is_on(options["weight_decay"]), options["decoupled_weight_decay"]
    keep = 1 - n.lr * options["weight_decay"] if decays and decoupled else torch.ones_like(n.lr)
    l2 = 0.0 if decoupled else options["weight_decay"]
    table = _table(stack, source)
    new = averages["exp_avg"].new_empty
    return kernels.Operands(
        geometry=geometry,
        averages={name: average.view(geometry.shape) for name, average in averages.items()},
        addresses=table.tensor,
        numbers=torch.cat([*n[:-1], stack.per_tensor(usable).to(n.lr.dtype), keep, n.floor], dim=1).view(-1, 8),
        constants=_constants(l2, 1 - options["betas"][1], keep.device),
        values=new(3 if "cross" in averages else 2, *geometry.shape),
        flags=new(geometry.programs, dtype=torch.int32),
        sums=new(geometry.programs, 2),
        dtypes=(source.gradients[0].dtype, source.parameters[0].dtype),
        aligned=all(address % 16 == 0 for row in table.rows for address in row[:2]),
        maximize=options["maximize"] and not source.gathered,
        decays=decays and not decoupled and not source.gathered,
        regression=(diagonal.MIN_STEPS, diagonal.MAX_RIDGE, diagonal.ROUNDING[torch.float32]),
    )


def _is_on(decay: float | Tensor) -> bool:
    """Whether there is a decay; a tensor on a GPU is not asked."""
    return isinstance(decay, Tensor) or decay != 0


def _table(stack: Stack, source: Source) -> Table:
    """The addresses of this step: the table of the step before, unless one has changed."""
    size = stack.shape[1] * stack.shape[2]
    rows = [
        (*(x.data_ptr() + first * x.element_size() for x in (grad, param)), stream, first)
        for grad, param, stream in zip(source.gradients, source.parameters, stack.streams, strict=True)
        for first in range(0, size * stack.shape[0], size)
    ]
    known = _TABLES.get(stack)
    if known is None or known.rows != rows:
        known = _TABLES[stack] = Table(rows, tiles.address_table(rows, stack.averages["exp_avg"].device))
    return known


def _constants(l2: float | Tensor, newest: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(l2, Tensor) or isinstance(newest, Tensor):
        return torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device).view(()) for x in (l2, newest)])
    return _fixed_constants(l2, newest, device)


@lru_cache(maxsize=64)
def _fixed_constants(l2: float, newest: float, device: torch.device) -> Tensor:
    # Filled on the device, so that it works while a graph is captured.
    return torch.stack([torch.full((), number, device=device) for number in (l2, newest)])


class Stage(NamedTuple):
    """A stage as the kernels see it: its tiles, its coordinates, and the number of its groups."""

    tiles: tiles.Tiles
    coordinates: Tensor | None
    groups: int


@lru_cache(maxsize=1024)
def _stages(plan: Plan, device: torch.device) -> tuple[Stage, ...]:
    stages, offset = [], 0
    for i, stage in enumerate(plan.stages):
        is_last = i == len(plan.stages) - 1
        lead = 0 if is_last else tiles.ALL if plan.is_full else plan.lead
        # Leaves are neighbours and cover the axis, with what is in no group; later stages touch their coordinates only.
        length, index = (plan.n, None) if i == 0 else (sum(run.span for run in stage.runs), stage.index_on(device))
        cut = tiles.stage_tiles(stage.runs, length, offset, lead, device)
        stages.append(Stage(cut, index, sum(run.groups for run in stage.runs)))
        offset += sum(run.numel for run in stage.runs)
    return tuple(stages)


def _geometry(stack: Stack) -> kernels.Geometry:
    count, rows, columns = stack.averages["exp_avg"].shape
    device = stack.averages["exp_avg"].device
    if not stack.whole_rotations:
        row, pieces = tiles.plain_tiles(1, 1, device), tiles.plain_tiles(rows * columns, tiles.VECTOR_WIDTH, device)
        return kernels.Geometry((count, 1, rows * columns), row, pieces, None, None)
    rotations = dict(stack.whole_rotations)
    cuts = [
        _stages(rotations[dim].plan, device)[0].tiles if dim in rotations
        else tiles.plain_tiles(length, tiles.other_width(length), device)
        for dim, length in ((-2, rows), (-1, columns))
    ]  # fmt: skip
    matrices = [rotations[dim].matrices if dim in rotations else None for dim in (-2, -1)]
    return kernels.Geometry((count, rows, columns), cuts[0], cuts[1], matrices[0], matrices[1])


def _later_stages_(values: Tensor, rotation: Rotation, *, dim: int, back: bool) -> None:
    """All stages but the leaves, in place; ``values`` is ``(values, count, rows, columns)``."""
    later = _stages(rotation.plan, values.device)[1:]
    for stage in reversed(later) if back else later:
        rotate.rotate_stage_(values, rotation.matrices, stage.tiles, stage.coordinates, dim=dim, transpose=not back)


def _fit_basis_(stack: Stack, operands: kernels.Operands) -> None:
    """``step.fit_basis_``."""
    if not stack.rotations or not stack.calls:
        return
    y = kernels.innovations(operands)
    if stack.calls == 1:
        for dim, rotation in stack.whole_rotations:
            rotation.start_(y if dim == -2 else y.mT)
        return
    refits, weights = stack.refits(), step.observation_weight(stack.numbers)
    usable = operands.numbers[:, 5].contiguous()
    for dim, rotation in stack.whole_rotations:
        # y stays rotated by this axis: the sums over it, for the other axis, are the same.
        _observe_(y, rotation, weights, dim=dim)
        if refits:
            _refit_(rotation, usable)


def _observe_(y: Tensor, rotation: Rotation, weights: Tensor, *, dim: int) -> None:
    """``Rotation.observe_``; ``y`` is rotated by all stages but the last."""
    stages = _stages(rotation.plan, y.device)
    for stage in stages:
        rotate.observe_stage_(
            y, rotation.matrices, _moments(rotation), weights, stage.tiles, stage.coordinates, dim=dim,
            turn=stage is not stages[-1],
        )  # fmt: skip
    torch.autograd.graph.increment_version(_moments(rotation))


def _refit_(rotation: Rotation, usable: Tensor) -> None:
    """``Rotation.refit_``."""
    below, moments = None, _moments(rotation)
    lead = 0 if rotation.plan.is_full else rotation.plan.lead
    for stage in _stages(rotation.plan, usable.device):
        change = refit.refit_stage_(
            rotation.matrices,
            moments,
            usable,
            stage.tiles,
            groups=stage.groups,
            lead=lead,
            below=below,
            shift=SHIFT[torch.float32],
        )
        below = change if lead else None
    # Rotation.dense notices new matrices by their version.
    torch.autograd.graph.increment_version([rotation.matrices, moments])


def _moments(rotation: Rotation) -> Tensor:
    if rotation.moments is None:
        raise ValueError("this rotation keeps no second moments")
    return rotation.moments


def step_bytes(
    rows: int,
    columns: int,
    *,
    diagonal: str,
    block: int = 64,
    lead: int = 16,
    rotated: tuple[int, ...] = (-2, -1),
    itemsize: int = 4,
) -> dict[str, float]:
    """Bytes a parameter that a step without a refit moves, launch by launch, and ``together``.

    Matrices of groups count once a pass: the programs that share one find it in the second-level cache.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        diagonal: "innovation" or "secant".
        block: largest group.
        lead: outputs of a group that go on.
        rotated: the rotated axes.
        itemsize: bytes of a number of parameters and gradients.
    """
    plans = [(plan, other) for dim, plan, other in (
        (-2, make_plan(rows, block, lead), columns), (-1, make_plan(columns, block, lead), rows)
    ) if dim in rotated]  # fmt: skip
    touched = [sum(run.span for run in plan.stages[1].runs) / plan.n for plan, _ in plans if len(plan.stages) > 1]
    final = 1.0
    for share in touched:
        final *= 1 - share
    others, secant = 1 - final, diagonal == "secant"
    values = 3 if secant else 2
    leaf_matrices = sum(4 * sum(run.numel for run in plan.stages[0].runs) / (rows * columns) for plan, _ in plans)
    later = sum(8 * sum(run.span for run in stage.runs) / plan.n for plan, _ in plans for stage in plan.stages[1:])
    later_matrices = sum(4 * sum(r.numel for r in s.runs) / (rows * columns) for p, _ in plans for s in p.stages[1:])
    if secant:
        forth = 2 * itemsize + 4 + 8 + 4 + 4 + final * 24 + others * 8
        rest = others * (32 + 20)
        back = 2 * itemsize + final * 16 + others * 4
    else:
        forth = itemsize + 8 + final * 12 + others * 8
        rest = others * 20
        back = 2 * itemsize + 4
    observed = itemsize + 8.0 if plans else 0.0
    for plan, _ in plans:
        for stage in plan.stages:
            # The last stage reads what enters it; the others turn it as well.
            passes = 4 if stage is plan.stages[-1] else 8
            observed += passes * sum(run.span for run in stage.runs) / plan.n
        observed += 12 * plan.numel / (rows * columns)
    found = {
        "observe": observed,
        "forth": forth + leaf_matrices,
        "later stages": values * later + later_matrices,
        "rest": rest,
        "later stages back": later + later_matrices,
        "back": back + leaf_matrices,
    }
    return {**found, "together": sum(found.values())}

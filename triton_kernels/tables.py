"""Tables in device memory, so that one launch serves matrices of any shapes.

A *list* is what one launch works on: *parts*, each some matrices of one shape one behind the other in memory. Its parts
agree in what a kernel is compiled for: dtypes, widths of tiles, and which axes are rotated. All else stands in tables:

    matrices   int64, a row a matrix, see MATRIX
    tiles      int64, a row a tile of an axis, see ``tiles.TILE``
    programs   int32, what each program does: matrix and tile, and the tile of the columns (passes over the leaves), or
               the first and the last chunk of the other axis (later stages)
    groups     int32, of a stage a row a tile: matrix, tile, and where its partial second moments are: the first, the
               distance from one to the next, their number

They are made once for a list. Gradients get new addresses in every step: theirs and the parameters' are a table of
their own, ``(matrices, 2)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .tiles import Stage

MATRIX = ("exp_avg", "exp_avg_sq", "param_avg", "disp_sq", "cross", "first", "columns", "size", "stream", "position",
          "program", "programs")  # fmt: skip
"""A row of the table of matrices: addresses of its averages (0: none), its first element in the scratch of a list,
columns, elements, stream of random numbers, position of its first element in the parameter, and its programs in the
passes over the leaves."""

NUMBERS = ("mean", "square", "pair", "step", "lr", "usable", "keep", "floor", "before", "within", "sign", "l2",
           "newest")  # fmt: skip
"""A row of ``numbers``: those of a stack; whether the gradient is usable; 1 - lr weight_decay; ``step.floor``; the
weight of the innovation in the second moments if they are taken before the step, or within it, else 0; the sign of
gradients; L2 decay; and ``1 - beta2``."""

USABLE, BEFORE, WITHIN = (NUMBERS.index(name) for name in ("usable", "before", "within"))


class Axis(NamedTuple):
    """An axis of the matrices of a part.

    Attributes:
        width: coordinates a tile has room for.
        stages: of its rotation, or one of plain tiles.
        lead: outputs of a group that go on; 0 in a full plan.
        matrices: ``(count, numel)``; None if the axis is not rotated.
        moments: the same.
    """

    width: int
    stages: Sequence[Stage]
    lead: int = 0
    matrices: Tensor | None = None
    moments: Tensor | None = None


class Part(NamedTuple):
    """Matrices of one shape.

    Attributes:
        shape: ``(count, rows, columns)``.
        averages: of this shape, by name.
        axes: rows and columns.
        streams: of random numbers, one a parameter; each holds as many of the matrices.
        even: every tile of the columns is full, and every row and average aligned: accesses are 16 bytes wide.
    """

    shape: tuple[int, int, int]
    averages: dict[str, Tensor]
    axes: tuple[Axis, Axis]
    streams: Sequence[int]
    even: bool

    @property
    def numel(self) -> int:
        """Elements of all."""
        return self.shape[0] * self.shape[1] * self.shape[2]


class Pass(NamedTuple):
    """A stage of one axis of all matrices: its tables, and the place of the first partial moment of its programs."""

    programs: Tensor
    groups: Tensor
    first: int


class Tables(NamedTuple):
    """The tables of a list.

    Attributes:
        parts: what they were made of.
        matrices: see the module; so ``tiles``, and ``programs``, those of the passes over the leaves.
        passes: the stages of the rows and those of the columns; the leaves alone where an axis is not rotated.
        groups: of rows and columns, those of all stages.
        partials: how many partial moments rows and columns have.
        changes: numbers that a refit hands on from stage to stage.
        volume: elements of all matrices.
    """

    parts: Sequence[Part]
    matrices: Tensor
    tiles: Tensor
    programs: Tensor
    passes: list[list[Pass]]
    groups: list[Tensor]
    partials: list[int]
    changes: int
    volume: int

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Those of the first part, for what all have in common."""
        return self.parts[0].axes

    @property
    def rotated(self) -> list[int]:
        """Which axes are rotated."""
        return [i for i, axis in enumerate(self.axes) if axis.matrices is not None]


class Operands(NamedTuple):
    """What one step of a list reads and writes.

    Attributes:
        tables: of the list.
        addresses: int64 ``(matrices, 2)``, of gradients and parameters.
        numbers: float32, see NUMBERS.
        values: float32 ``(2 or 3, volume)``, scratch: u and m, and with secant w; d takes the place of m.
        flags: int32, one a program over the leaves, scratch.
        means: float32 ``(matrices, 2)``, of B and |C| before this step, and after it those of it (secant).
        sums: float64, one pair a program over the leaves, scratch: of B and |C|.
        partials: of rows and columns, scratch ``(partials, width, width)``.
        dtypes: of gradients and parameters.
        even: every access is 16 bytes wide.
        decays: L2 decay is added to gradients.
        regression: ``MIN_STEPS``, ``MAX_RIDGE`` and ``ROUNDING`` of ``butterfly_opt.diagonal``; None for innovation.
    """

    tables: Tables
    addresses: Tensor
    numbers: Tensor
    values: Tensor
    flags: Tensor
    means: Tensor
    sums: Tensor
    partials: Sequence[Tensor]
    dtypes: tuple[torch.dtype, torch.dtype]
    even: bool
    decays: bool
    regression: tuple[float, float, float] | None


def make_tables(parts: Sequence[Part], device: torch.device) -> Tables:
    """The tables of a list. Cost: some 60 small operations a part on the host, once.

    Raises:
        TypeError: if an average is not float32.
        ValueError: if one is not contiguous.
    """
    for part in parts:
        tiles.check(part.averages)
    tile_rows, numbers, changes = _tile_rows(parts)
    counts = [part.shape[0] for part in parts]
    matrices = torch.arange(sum(counts)).split(counts)
    spans = torch.tensor([rows[0].shape[1] * columns[0].shape[1] for rows, columns in numbers])
    spans = spans.repeat_interleave(torch.tensor(counts))
    starts = spans.cumsum(0) - spans
    leaves: list[list[Tensor]] = [[], [], []]
    for matrix, ((row, *_), (column, *_)) in zip(matrices, numbers, strict=True):
        own, first, height, width = matrix[:, None], starts[matrix][:, None], row.shape[1], column.shape[1]
        leaves[0].append(_table(own[..., None], row[..., None], column[:, None]))
        leaves[1].append(_table(own, row, first + torch.arange(height) * width, 1, width))
        leaves[2].append(_table(own, column, first + torch.arange(width), width, height))
    programs, *of_leaves = (torch.cat(tables) for tables in leaves)
    passes: list[list[Pass]] = []
    partials: list[int] = []
    for axis in (0, 1):
        stages, place = [Pass(programs, of_leaves[axis], 0)], len(programs)
        for stage in range(1, max(len(own[axis]) for own in numbers)):
            members = [
                (matrix, own[axis][stage], -(-part.shape[2 - axis] // part.axes[1 - axis].width))
                for part, matrix, own in zip(parts, matrices, numbers, strict=True)
                if stage < len(own[axis])
            ]
            stages.append(_later_pass(members, place))
            place += len(stages[-1].programs)
        passes.append([
            Pass(tiles.to_device(own.programs, device), tiles.to_device(own.groups, device), own.first)
            for own in stages
        ])  # fmt: skip
        partials.append(place)
    groups = [torch.cat([own.groups for own in stages]) for stages in passes]
    rows, tile_rows = (tiles.to_device(x, device) for x in (_matrix_rows(parts, starts, spans), tile_rows))
    volume = sum(part.numel for part in parts)
    return Tables(parts, rows, tile_rows, passes[0][0].programs, passes, groups, partials, changes, volume)


def _table(*columns: Tensor | int) -> Tensor:
    """Columns, broadcast, as a table of int32."""
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, columns)), dim=-1).flatten(0, -2).int()


def _later_pass(members: Sequence[tuple[Tensor, Tensor, int]], first: int) -> Pass:
    """A later stage of all parts: numbers of its matrices ``(count,)``, of its tiles ``(count, tiles)``, and chunks."""
    each = tiles.share(sum(tile.numel() * chunks for _, tile, chunks in members))
    programs, groups, place = [], [], first
    for matrix, tile, chunks in members:
        starts = torch.arange(0, chunks, each)
        programs.append(_table(matrix[:, None, None], tile[..., None], starts, (starts + each).clamp_max(chunks)))
        places = place + torch.arange(tile.numel()).view(tile.shape) * len(starts)
        groups.append(_table(matrix[:, None], tile, places, 1, len(starts)))
        place += len(programs[-1])
    return Pass(torch.cat(programs), torch.cat(groups), first)


def _matrix_rows(parts: Sequence[Part], starts: Tensor, spans: Tensor) -> Tensor:
    rows: list[list[int]] = []
    first = 0
    for part in parts:
        addresses = [part.averages[name].data_ptr() if name in part.averages else 0 for name in MATRIX[:5]]
        count, size = part.shape[0], part.shape[1] * part.shape[2]
        batch = count // len(part.streams)
        for i in range(count):
            own = first + i * size, part.shape[2], size, part.streams[i // batch], i % batch * size
            rows.append([*(x + 4 * i * size for x in addresses), *own])
        first += part.numel
    return torch.cat([torch.tensor(rows), starts[:, None], spans[:, None]], dim=1)


def _tile_rows(parts: Sequence[Part]) -> tuple[Tensor, list[list[list[Tensor]]], int]:
    """The table of tiles; of each part, axis and stage the numbers ``(count, tiles)`` of its tiles; all changes."""
    rows: list[Tensor] = []
    numbers: list[list[list[Tensor]]] = []
    total = changes = 0
    for part in parts:
        numbers.append([[], []])
        own = torch.arange(part.shape[0])[:, None]
        for axis, known in zip(part.axes, numbers[-1], strict=True):
            below: Tensor | int = 0
            for stage in axis.stages:
                start, length, offset, size, group = stage.tiles.unbind(1)
                matrix, moment = (
                    torch.tensor(0) if x is None
                    else torch.where(offset < 0, 0, x.data_ptr() + 4 * (own * x.shape[1] + offset))
                    for x in (axis.matrices, axis.moments)
                )  # fmt: skip
                change = changes + own * stage.groups * axis.lead**2
                index = torch.tensor(0 if stage.coordinates is None else stage.coordinates.data_ptr())
                columns = (start, length, matrix, moment, size, torch.tensor(stage.lead), change + group * axis.lead**2,
                           below + start * axis.lead, index)  # fmt: skip
                rows.append(torch.stack([x.expand(len(own), len(start)) for x in columns], dim=-1).flatten(0, 1))
                known.append(total + torch.arange(len(rows[-1])).view(len(own), -1))
                total, changes, below = total + len(rows[-1]), changes + len(own) * stage.groups * axis.lead**2, change
    return torch.cat(rows), numbers, changes

"""Tables in device memory that let one launch serve matrices of any shapes.

A *list* is what one launch works on: *parts*, each some matrices of one shape one behind the other in memory. All parts
have the dtypes, the rotated axes and the widths of tiles that a kernel is compiled for; everything else stands in
tables, which are made once for a list:

    matrices   int64, a row a matrix, see MATRIX       tiles      int64, a row a tile of an axis, see ``tiles.TILE``
    programs   int32 ``(programs, 4)``: matrix, tile, first and last tile (or chunk) of the other axis: what a program
               does. In the passes over the leaves it takes a tile of the rows and a *strip* of tiles of the columns.
    groups     int32 ``(tiles, 5)`` of a stage: matrix, tile, and where its partial second moments are: the first, the
               distance from one to the next, their number

Gradients get new addresses in every step: theirs and the parameters' are a table of their own, ``(matrices, 2)``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles
from .tiles import Stage

MATRIX = ("exp_avg", "exp_avg_sq", "param_avg", "disp_sq", "cross", "first", "columns", "size", "stream", "position",
          "program", "programs")  # fmt: skip
"""A row of the table of matrices: addresses of its averages (0: none), its first element in the scratch of a list,
columns, elements, stream of random numbers, position of its first element in the parameter, and its programs in the
passes over the leaves."""

NUMBERS = ("mean", "square", "pair", "step", "lr", "usable", "keep", "floor", "before", "within")
"""A row of ``numbers``: those of a stack, whether the gradient is usable, 1 - lr weight_decay, ``step.floor``, and the
weight of the innovation in the second moments if these are taken before the step, or within it; else 0."""

_TORCH_STEP = "butterfly_opt.step.take_step_"

USABLE, BEFORE, WITHIN = (NUMBERS.index(name) for name in ("usable", "before", "within"))

CONSTANTS = ("l2", "newest")
"""L2 decay and ``1 - beta2``."""


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
        averages: float32, of this shape and contiguous, by name.
        axes: rows and columns.
        streams: of random numbers, one a matrix.
        positions: of the first element of each in its parameter.
    """

    shape: tuple[int, int, int]
    averages: dict[str, Tensor]
    axes: tuple[Axis, Axis]
    streams: Sequence[int]
    positions: Sequence[int]

    @property
    def numel(self) -> int:
        """Elements of all."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def is_even(self) -> bool:
        """Whether all tiles of the columns are full and all rows aligned, so that accesses are 16 bytes wide."""
        aligned = all(average.data_ptr() % 16 == 0 for average in self.averages.values())
        starts, totals = self.axes[1].stages[0].tiles[:, :2].unbind(1)
        full = bool(((starts % 16 == 0) & (totals == self.axes[1].width)).all())
        return aligned and self.shape[2] % 16 == 0 and full


class Pass(NamedTuple):
    """A stage of one axis of all matrices of a list.

    Attributes:
        programs: what turns it; of the leaves the strips.
        groups: a row a tile.
        first: the first partial moment of its programs.
    """

    programs: Tensor
    groups: Tensor
    first: int


class Tables(NamedTuple):
    """The tables of a list.

    Attributes:
        parts: what they were made of.
        matrices: see the module.
        tiles: see the module.
        passes: the stages of the rows and those of the columns; the leaves alone where an axis is not rotated.
        groups: of rows and columns, those of all stages one after the other.
        partials: partial second moments of rows and columns.
        changes: numbers that a refit keeps for the next stage.
        volume: elements of all matrices.
    """

    parts: Sequence[Part]
    matrices: Tensor
    tiles: Tensor
    passes: list[list[Pass]]
    groups: list[Tensor]
    partials: list[int]
    changes: int
    volume: int

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Those of the first part: in widths and ``lead``, and whether they are rotated, all agree."""
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
        numbers: float32 ``(matrices, 10)``, see NUMBERS.
        constants: float32 ``(2,)``, see CONSTANTS.
        values: float32 ``(2 or 3, volume)``, scratch: u and m, and with secant w; d takes the place of m.
        flags: int32, one a tile of a strip, scratch.
        sums: float32 ``(programs, 2)``, scratch.
        partials: of rows and columns, scratch ``(partials, width, width)``.
        dtypes: of gradients and parameters.
        even: every access may be 16 bytes wide.
        maximize: gradients count with the opposite sign.
        decays: L2 decay is added to them.
        regression: ``MIN_STEPS``, ``MAX_RIDGE`` and ``ROUNDING`` of ``butterfly_opt.diagonal``.
    """

    tables: Tables
    addresses: Tensor
    numbers: Tensor
    constants: Tensor
    values: Tensor
    flags: Tensor
    sums: Tensor
    partials: Sequence[Tensor]
    dtypes: tuple[torch.dtype, torch.dtype]
    even: bool
    maximize: bool
    decays: bool
    regression: tuple[int, float, float]

    @property
    def secant(self) -> bool:
        """Whether pairs are kept."""
        return "cross" in self.tables.parts[0].averages


def make_tables(parts: Sequence[Part], device: torch.device) -> Tables:
    """The tables of a list of parts. Cost: some 60 small operations a part, on the host, once.

    Raises:
        TypeError: if an average is not float32.
        ValueError: if an average is not contiguous or elsewhere, or no kernel can run on the device.
    """
    for part in parts:
        tiles.check(_TORCH_STEP, device, **{name: (x, part.shape) for name, x in part.averages.items()})
    tile_rows, numbers, changes = _tile_rows(parts)
    counts = [part.shape[0] for part in parts]
    matrices = torch.arange(sum(counts)).split(counts)
    programs = torch.tensor([own[0][0].shape[1] * own[1][0].shape[1] for own in numbers]).repeat_interleave(
        torch.tensor(counts)
    )
    starts = programs.cumsum(0) - programs
    leaves: list[list[Tensor]] = [[], [], []]
    for matrix, ((row, *_), (column, *_)) in zip(matrices, numbers, strict=True):
        first, height, width = starts[matrix][:, None], row.shape[1], column.shape[1]
        matrix = matrix[:, None]
        leaves[0].append(_table(matrix[..., None], row[..., None], column[:, None]))
        leaves[1].append(_table(matrix, row, first + torch.arange(height) * width, 1, width))
        leaves[2].append(_table(matrix, column, first + torch.arange(width), width, height))
    partials = [int(programs.sum())] * 2
    tile_programs, *groups = (torch.cat(tables) for tables in leaves)
    passes = [[Pass(tile_programs, groups[0], 0)], [Pass(tile_programs[:0], groups[1], 0)]]
    for axis, stages in enumerate(passes):
        width = parts[0].axes[1 - axis].width
        for stage in range(1, max(len(own[axis]) for own in numbers)):
            members = [
                (matrix, own[axis][stage], -(-part.shape[2 - axis] // width))
                for part, matrix, own in zip(parts, matrices, numbers, strict=True)
                if stage < len(own[axis])
            ]
            each = tiles.share(sum(tile.numel() * chunks for _, tile, chunks in members))
            stages.append(_joined([_shared_out(*member, each) for member in members], partials[axis]))
            partials[axis] += len(stages[-1].programs)
    groups = [tiles.on_gpu(torch.cat([own.groups for own in stages]), device) for stages in passes]
    for stages, together in zip(passes, groups, strict=True):
        cut = together.split([len(own.groups) for own in stages])
        stages[:] = [
            Pass(tiles.on_gpu(own.programs, device), part, own.first) for own, part in zip(stages, cut, strict=True)
        ]
    rows = tiles.on_gpu(_matrix_rows(parts, starts, programs), device)
    volume = sum(part.numel for part in parts)
    return Tables(parts, rows, tiles.on_gpu(tile_rows, device), passes, groups, partials, changes, volume)


def _table(*columns: Tensor | int) -> Tensor:
    """Columns, broadcast, as a table of int32."""
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, columns)), dim=-1).flatten(0, -2).int()


def _shared_out(matrix: Tensor, tile: Tensor, chunks: int, each: int) -> tuple[Tensor, Tensor]:
    """Programs and groups of a later stage of one part, its partial moments counted from 0.

    Args:
        matrix: ``(count,)``, the numbers of its matrices.
        tile: ``(count, tiles)``, those of its tiles.
        chunks: of the other axis.
        each: how many a program takes.
    """
    starts = torch.arange(0, chunks, each)
    programs = _table(matrix.view(-1, 1, 1), tile[..., None], starts, (starts + each).clamp_max(chunks))
    places = torch.arange(tile.numel()).view(tile.shape) * len(starts)
    return programs, _table(matrix[:, None], tile, places, 1, len(starts))


def _joined(found: Sequence[tuple[Tensor, Tensor]], first: int) -> Pass:
    """A stage of all parts, whose partial moments begin at ``first``."""
    place = first
    for programs, groups in found:
        groups[:, 2] += place
        place += len(programs)
    return Pass(*(torch.cat(tables) for tables in zip(*found, strict=True)), first)


def _matrix_rows(parts: Sequence[Part], starts: Tensor, programs: Tensor) -> Tensor:
    sizes = torch.tensor([part.shape[1] * part.shape[2] for part in parts for _ in range(part.shape[0])])
    rows = []
    for part in parts:
        size = part.shape[1] * part.shape[2]
        addresses = [part.averages[name].data_ptr() if name in part.averages else 0 for name in MATRIX[:5]]
        for i, (stream, position) in enumerate(zip(part.streams, part.positions, strict=True)):
            rows.append([*(x + 4 * i * size for x in addresses), 0, part.shape[2], size, stream, position, 0, 0])
    table = torch.tensor(rows)
    table[:, 5], table[:, 10], table[:, 11] = sizes.cumsum(0) - sizes, starts, programs
    return table


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
                addresses = [
                    0 if x is None else torch.where(offset < 0, 0, x.data_ptr() + 4 * (own * x.shape[1] + offset))
                    for x in (axis.matrices, axis.moments)
                ]
                first = changes + own * stage.groups * axis.lead**2
                index = 0 if stage.index is None else stage.index.data_ptr()
                fields = (start, length, *addresses, size, stage.lead, first + group * axis.lead**2,
                          below + start * axis.lead, index)  # fmt: skip
                fields = torch.broadcast_tensors(own * 0 + start * 0, *map(torch.as_tensor, fields))[1:]
                rows.append(torch.stack(fields, dim=-1).flatten(0, 1))
                known.append(total + torch.arange(len(rows[-1])).view(len(own), -1))
                total, changes, below = total + len(rows[-1]), changes + len(own) * stage.groups * axis.lead**2, first
    return torch.cat(rows), numbers, changes

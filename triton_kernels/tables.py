"""Tables in device memory, so that one launch serves matrices of any shapes.

A *list* is what one launch works on: *parts*, each some matrices of one shape one behind the other in memory. Its parts
agree in what a kernel is compiled for: dtypes, widths of tiles, and which axes are rotated. All else stands in tables:

    matrices   int64, a row a matrix, see MATRIX
    tiles      int64, a row a tile of an axis in a stage, see ``tiles.TILE``
    programs   int32, what each program of a level does, see PROGRAM
    groups     int32, a row a rotated tile, see GROUP

A *level* turns the first stages of both axes, the second, and so on: a tile of the rows times one of the columns, of
which one may be plain, with all entries that level is to turn. What neither axis turns any more has left before.

They are made once for a list. Gradients get new addresses in every step: theirs and the parameters' are a table of
their own, ``(matrices, 2)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .tiles import TILE, Stage

MATRIX = ("exp_avg", "exp_avg_sq", "param_avg", "disp_sq", "cross", "first", "columns", "size", "stream", "position",
          "program", "programs")  # fmt: skip
"""A row of the table of matrices: addresses of its averages (0: none), its first element in the scratch of a list,
columns, elements, stream of random numbers, position of its first element in the parameter, and its programs: the first
place of their sums, their number."""

PROGRAM = ("matrix", "row", "column", "place", "row_partial", "column_partial", "row_schedule", "column_schedule")
"""A row of the table of programs: matrix, tile of the rows and of the columns, where it leaves sums and partial second
moments, and a schedule of the moments: bit i is that of steps of ``clock`` i modulo PERIOD (0: a tile that is not
rotated)."""

GROUP = ("matrix", "tile", "first", "programs", "shares")
"""A row of the table of groups: matrix, tile, where its partial second moments begin, how many programs have one, and
in how many shares they take turns."""

NUMBERS = ("mean", "square", "pair", "step", "lr", "usable", "keep", "floor", "before", "within", "sign", "l2",
           "newest", "clock")  # fmt: skip
"""A row of ``numbers``: those of a stack; whether the gradient is usable; 1 - lr weight_decay; ``step.floor``; the
weight of the innovation in the second moments if they are taken before the step, or within it, else 0; the sign of
gradients; L2 decay; ``1 - beta2``; and the gradients seen, by which shares take turns."""

USABLE, BEFORE, WITHIN = (NUMBERS.index(name) for name in ("usable", "before", "within"))

PERIOD = 12
"""Steps after which the turns of 1, 2, 3 and 4 shares come again."""


class Axis(NamedTuple):
    """An axis of the matrices of a part.

    Attributes:
        width: coordinates a tile has room for.
        stages: of its rotation, or one of plain tiles.
        rest: all of the axis as plain tiles, for levels after its last stage.
        lead: outputs of a group that go on; 0 in a full plan.
        shares: of its tiles, that take turns in the second moments of the other axis's leaves.
        matrices: ``(count, numel)``; None if the axis is not rotated.
        moments: the same.
    """

    width: int
    stages: Sequence[Stage]
    rest: Stage
    lead: int = 0
    shares: int = 1
    matrices: Tensor | None = None
    moments: Tensor | None = None


class Part(NamedTuple):
    """Matrices of one shape.

    Attributes:
        shape: ``(count, rows, columns)``.
        averages: of this shape, by name.
        axes: rows and columns.
        streams: of random numbers, one a parameter; each holds as many of the matrices.
        aligned: of rows and columns, whether all lies in fours, so that accesses are 16 bytes wide: groups, and of
            columns tiles and averages too.
    """

    shape: tuple[int, int, int]
    averages: dict[str, Tensor]
    axes: tuple[Axis, Axis]
    streams: Sequence[int]
    aligned: tuple[bool, bool]

    @property
    def numel(self) -> int:
        """Elements of all."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def alone(self) -> bool:
        """Whether no tile holds two groups."""
        return all(stage.alone for axis in self.axes for stage in axis.stages)

    def levels(self) -> list[tuple[Stage, Stage]]:
        """What rows and columns do at each level."""
        depth = max(len(axis.stages) for axis in self.axes)
        rows, columns = ([*axis.stages, *[axis.rest] * (depth - len(axis.stages))] for axis in self.axes)
        return list(zip(rows, columns, strict=True))


class Level(NamedTuple):
    """What a launch does: its programs, and of each pool the groups of tiles that it rotates."""

    programs: Tensor
    groups: list[Tensor]


class Tables(NamedTuple):
    """The tables of a list.

    Attributes:
        parts: what they were made of.
        matrices: see the module; so ``tiles``.
        levels: from the leaves to the roots.
        pools: of rows and columns, where their groups and partial moments are: in one if their tiles have one width, so
            that a launch serves both.
        groups: of each pool, those of all levels.
        partials: how many partial moments each pool has.
        programs: of all levels.
        changes: numbers that a refit hands on from level to level.
        volume: elements of all matrices.
    """

    parts: Sequence[Part]
    matrices: Tensor
    tiles: Tensor
    levels: list[Level]
    pools: tuple[int, int]
    groups: list[Tensor]
    partials: list[int]
    programs: int
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

    @property
    def widths(self) -> dict[int, int]:
        """The widths of tiles of pools that have any."""
        return {self.pools[i]: self.axes[i].width for i in self.rotated}


class Operands(NamedTuple):
    """What one step of a list reads and writes.

    Attributes:
        tables: of the list.
        addresses: int64 ``(matrices, 2)``, of gradients and parameters.
        numbers: float32, see NUMBERS.
        values: float32 ``(2 or 3, volume)``, scratch: u and m, and with secant w; d takes the place of m.
        flags: int32, one a program of the leaves, scratch.
        means: float32 ``(matrices, 2)``, of B and |C| before this step, and after it those of it (secant).
        sums: float64, one pair a program, scratch: of B and |C|.
        partials: of each pool, scratch ``(partials, width, width)``.
        dtypes: of gradients and parameters.
        aligned: see ``Part``; of gradients and parameters as well.
        decays: L2 decay is added to gradients.
        signal: weight of ``m^2`` in the scale.
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
    aligned: tuple[bool, bool]
    decays: bool
    signal: float
    regression: tuple[float, float, float] | None


def make_tables(parts: Sequence[Part], device: torch.device) -> Tables:
    """The tables of a list. Cost: some 60 small operations a part on the host, once.

    Raises:
        TypeError: if an average is not float32.
        ValueError: if one is not contiguous.
    """
    for part in parts:
        tiles.check(part.averages)
    rows, numbers, changes = _tile_rows(parts)
    counts = [part.shape[0] for part in parts]
    matrices = torch.arange(sum(counts)).split(counts)
    programs = [
        torch.cat([_pairs(matrix, *own[i]) for matrix, own in zip(matrices, numbers, strict=True) if i < len(own)])
        for i in range(max(map(len, numbers)))
    ]
    # Sums of a matrix lie side by side, whatever the level of their programs.
    of_all = torch.cat(programs)[:, 0]
    # Stable, as in ``_slots``: what a kernel adds up has one order.
    places = torch.empty_like(of_all).index_copy_(0, of_all.argsort(stable=True), torch.arange(len(of_all)))
    sums = of_all.bincount()
    shares = [torch.tensor([part.axes[1 - i].shares for part in parts]).repeat_interleave(torch.tensor(counts))
              for i in (0, 1)]  # fmt: skip
    levels: list[Level] = []
    partials = [0, 0]
    pools = 0, int(parts[0].axes[0].width != parts[0].axes[1].width)
    for own, place in zip(programs, places.split(list(map(len, programs))), strict=True):
        # At the leaves alone: later levels' coordinates are of many columns.
        own_shares = [x if not levels else torch.ones_like(x) for x in shares]
        slots, schedules, groups = zip(
            *(_slots(own, i, rows, own_shares[i], partials, pools[i]) for i in (0, 1)), strict=True
        )
        own = torch.cat([own, torch.stack([place, *slots, *schedules], dim=1)], dim=1).int()
        pooled = [torch.cat([groups[i] for i in (0, 1) if pools[i] == pool] or [groups[0][:0]]) for pool in (0, 1)]
        on_device = [tiles.to_device(x, device) for x in (own, *pooled)]
        levels.append(Level(on_device[0], on_device[1:]))
    of_matrices = torch.cat([_matrix_rows(parts), torch.stack([sums.cumsum(0) - sums, sums], dim=1)], dim=1)
    return Tables(
        # They keep alive what the tables point to.
        parts=parts,
        matrices=tiles.to_device(of_matrices, device),
        tiles=tiles.to_device(rows, device),
        levels=levels,
        pools=pools,
        groups=[torch.cat([level.groups[pool] for level in levels]) for pool in (0, 1)],
        partials=partials,
        programs=len(of_all),
        changes=changes,
        volume=sum(part.numel for part in parts),
    )


def _pairs(matrix: Tensor, rows: "Tiles", columns: "Tiles") -> Tensor:
    """Matrix, tile of the rows and tile of the columns of each program of a part in a level, ``(programs, 3)``."""
    i, j = (rows.visited[:, None] | columns.visited).nonzero(as_tuple=True)
    own = matrix[:, None].expand(-1, len(i)), rows.numbers[:, i], columns.numbers[:, j]
    return torch.stack(own, dim=-1).flatten(0, 1)


def _slots(
    programs: Tensor, axis: int, rows: Tensor, shares: Tensor, partials: list[int], pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the programs of a level leave their partial moments of an axis, and when; and the groups.

    Those of a tile lie side by side; shares of them, in as many steps, have the same places. ``partials`` of the pool
    counts on.
    """
    own = programs[:, 1 + axis]
    turned = (rows[own, TILE.index("matrix")] != 0).nonzero().view(-1)
    turned = turned[own[turned].argsort(stable=True)]
    tile, counts = own[turned].unique_consecutive(return_counts=True)
    last = counts.cumsum(0)
    matrix = programs[turned, 0][last - counts]
    share_of, room = shares[matrix], -(-counts // shares[matrix])
    firsts = partials[pool] + room.cumsum(0) - room
    partials[pool] += int(room.sum())
    # Share i is the programs from ``i counts // shares`` on, as ``butterfly_opt.plan.share_bounds`` cuts tiles.
    number = torch.arange(len(turned)) - (last - counts).repeat_interleave(counts)
    first, count, of = (x.repeat_interleave(counts) for x in (firsts, counts, share_of))
    share = ((number + 1) * of - 1) // count
    bits = (torch.arange(PERIOD) % of[:, None] == share[:, None]) << torch.arange(PERIOD)
    slots = torch.zeros_like(own).index_copy_(0, turned, first + number - share * count // of)
    schedule = torch.zeros_like(own).index_copy_(0, turned, bits.sum(1))
    return slots, schedule, torch.stack([matrix, tile, firsts, counts, share_of], dim=1).int()


def _matrix_rows(parts: Sequence[Part]) -> Tensor:
    rows: list[list[int]] = []
    first = 0
    for part in parts:
        addresses = [part.averages[name].data_ptr() if name in part.averages else 0 for name in MATRIX[:5]]
        count, size = part.shape[0], part.shape[1] * part.shape[2]
        batch = count // len(part.streams)
        for i in range(count):
            own = first + i * size, part.shape[2], size, part.streams[i // batch], i % batch * size
            # 4 bytes: ``tiles.check`` has seen to float32.
            rows.append([*(x + 4 * i * size for x in addresses), *own])
        first += part.numel
    return torch.tensor(rows)


class Tiles(NamedTuple):
    """Tiles of a part in a stage: their numbers ``(count, tiles)``, and which a level has to visit, ``(tiles,)``."""

    numbers: Tensor
    visited: Tensor


def _tile_rows(parts: Sequence[Part]) -> tuple[Tensor, list[list[tuple[Tiles, Tiles]]], int]:
    """The table of tiles; of each part and level the tiles of rows and columns; all changes."""
    rows: list[Tensor] = []
    numbers: list[list[tuple[Tiles, Tiles]]] = []
    total = changes = 0
    for part in parts:
        known: list[list[Tiles]] = [[], []]
        own = torch.arange(part.shape[0])[:, None]
        for i, axis in enumerate(part.axes):
            below: Tensor | int = 0
            for level in part.levels():
                stage = level[i]
                start, length, offset, size, group, lead, visited = stage.tiles.unbind(1)
                matrix, moment = (
                    torch.tensor(0) if x is None
                    else torch.where(offset < 0, 0, x.data_ptr() + 4 * (own * x.shape[1] + offset))
                    for x in (axis.matrices, axis.moments)
                )  # fmt: skip
                change = changes + own * stage.groups * axis.lead**2
                index = torch.tensor(0 if stage.coordinates is None else stage.coordinates.data_ptr())
                # A child brings ``lead`` coordinates: that at ``start`` is child ``start / lead``, of lead^2 numbers.
                columns = (start, length, matrix, moment, size, lead, change + group * axis.lead**2,
                           below + start * axis.lead, index)  # fmt: skip
                rows.append(torch.stack([x.expand(len(own), len(start)) for x in columns], dim=-1).flatten(0, 1))
                known[i].append(Tiles(total + torch.arange(len(rows[-1])).view(len(own), -1), visited > 0))
                total, changes, below = total + len(rows[-1]), changes + len(own) * stage.groups * axis.lead**2, change
        numbers.append(list(zip(*known, strict=True)))
    return torch.cat(rows), numbers, changes

"""Operands of the kernels for tests: one part with one rotated axis."""

from collections.abc import Sequence

import torch
from torch import Tensor

from butterfly_opt import fused
from butterfly_opt.rotation import Rotation
from butterfly_opt.triton_kernels import tables, tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_operands(
    rotations: Sequence[Rotation | None],
    gradient: Tensor,
    weights: Sequence[float],
    *,
    values: int = 2,
    names: Sequence[str] = ("exp_avg",),
) -> tables.Operands:
    """Operands of matrices ``(count, rows, columns)`` whose averages are 0.

    Args:
        rotations: of rows and columns, float32.
        gradient: float32, to be kept by the caller.
        weights: of each matrix in the second moments; those with 0 are not refitted.
        values: number of rotated vectors.
        names: of the averages.
    """
    count, rows, columns = gradient.shape
    axes = [
        fused._axis(length, tiles.width_of(length), rotation, DEVICE)
        for length, rotation in zip((rows, columns), rotations, strict=True)
    ]
    averages = {name: torch.zeros_like(gradient) for name in names}
    part = tables.Part((count, rows, columns), averages, (axes[0], axes[1]), [0], (False, False))
    made = tables.make_tables([part], DEVICE)
    numbers = torch.zeros(count, len(tables.NUMBERS), device=DEVICE)
    numbers[:, tables.USABLE] = 1.0
    numbers[:, tables.NUMBERS.index("sign")] = 1.0
    numbers[:, tables.BEFORE] = torch.tensor(weights)
    addresses = [(gradient[i].data_ptr(), gradient[i].data_ptr()) for i in range(count)]
    return tables.Operands(
        tables=made,
        addresses=tiles.address_table(addresses, DEVICE),
        numbers=numbers,
        values=gradient.new_zeros(values, made.volume),
        flags=torch.zeros(len(made.levels[0].programs), dtype=torch.int32, device=DEVICE),
        means=gradient.new_zeros(count, 2),
        sums=torch.zeros(made.programs, 2, dtype=torch.float64, device=DEVICE),
        partials=[
            gradient.new_zeros(number, axis.width, axis.width) for number, axis in zip(made.partials, axes, strict=True)
        ],
        dtypes=(torch.float32, torch.float32),
        aligned=(False, False),
        decays=False,
        signal=0.25,
        regression=None,
    )


def observe_(rotations: Sequence[Rotation | None], gradient: Tensor, weights: Sequence[float]) -> None:
    """Takes gradients into the second moments, in a pass that changes nothing else."""
    operands = make_operands(rotations, gradient, weights, values=1)
    fused._forth_(operands, tables.BEFORE, is_step=False, observed=tables.BEFORE)

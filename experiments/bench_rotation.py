"""Times three ways to rotate one axis of a matrix on this machine: stages, grouped stages, dense.

python -m experiments.bench_rotation [--repeats 15]

These figures set ``MAX_DENSE_LENGTH`` and ``MIN_BLOCK_COLUMNS`` in ``butterfly_opt.backend``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from butterfly_opt.backend import TORCH, DenseRotation, StageRotation
from butterfly_opt.blocks import RotationBlocks
from butterfly_opt.rotation import angles_shape

SIZES = (
    (256, 1),
    (1024, 1),
    (64, 64),
    (64, 256),
    (128, 512),
    (256, 784),
    (784, 16),
    (784, 256),
    (1000, 256),
    (1024, 1024),
    (4096, 64),
)


def milliseconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and range of the time of one call."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), max(times) - min(times)


def main(argv: list[str] | None = None) -> None:
    """Prints a Markdown table of median milliseconds (and range)."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_rotation", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args(argv).repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, ms (range)\n")
    print("| axis | n | columns | depth | stages | grouped | dense |\n|---|---|---|---|---|---|---|")
    for (n, columns), dim, depth in itertools.product(SIZES, (0, 1), (1, 2)):
        x = torch.randn(n, columns) if dim == 0 else torch.randn(columns, n)
        angles = torch.randn(angles_shape(n, depth=depth))
        ways = (StageRotation(angles, TORCH), RotationBlocks(angles, n), DenseRotation(angles, n))
        cells = []
        for way in ways:
            median, spread = milliseconds(partial(way.rotate, x, dim=dim, transpose=True), repeats)
            cells.append(f"{median:.3f} ({spread:.3f})")
        print(f"| {dim} | {n} | {columns} | {depth} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

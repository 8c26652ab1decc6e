"""Times two ways to rotate one axis of a matrix on this machine: stage by stage, and as a dense product.

python -m experiments.bench_rotation [--repeats 15]

These figures set ``MAX_DENSE_LENGTH`` in ``butterfly_opt.rotation``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from butterfly_opt import Rotation, rotation

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
    print("| axis | n | columns | lead | stages | dense | a refit |\n|---|---|---|---|---|---|---|")
    for (n, columns), dim, lead in itertools.product(SIZES, (-2, -1), (16, 32)):
        x = torch.randn(1, n, columns) if dim == -2 else torch.randn(1, columns, n)
        rotated = Rotation.identity(n, lead=lead)
        rotated.start_(x if dim == -2 else x.mT)
        cells = []
        for limit in (0, n):
            rotation.MAX_DENSE_LENGTH = limit
            cells.append(milliseconds(partial(rotated.to_rotated, x, dim=dim), repeats))
        cells.append(milliseconds(rotated.refit_, repeats))
        shown = " | ".join(f"{median:.3f} ({spread:.3f})" for median, spread in cells)
        print(f"| {dim} | {n} | {columns} | {lead} | {shown} |", flush=True)


if __name__ == "__main__":
    main()

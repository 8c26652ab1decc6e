"""Shared pieces of the benchmarks: timing, the device's limits, CSV rows and the command line."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch

FLOAT32_LANES = 128
"""float32 lanes of a multiprocessor since Ampere's GA102 and Hopper; each does a multiply-add a cycle."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 20th and 80th percentile, and how many samples they are of."""

    median: float
    low: float
    high: float
    samples: int


def summarize(seconds: Sequence[float], calls: int = 1) -> Timing:
    """The timing of one call from samples of ``calls`` calls each."""
    ordered = sorted(second / calls for second in seconds)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def measure(function: Callable[[], object], device: torch.device, *, milliseconds: int = 200, calls: int = 1) -> Timing:
    """Times ``function``, which makes ``calls`` calls of what is measured.

    On a GPU with ``triton.testing.do_bench``: CUDA events, the L2 cache cleared before each sample. On a
    CPU with ``time.perf_counter``, after one call that is not counted: at least 3 samples, and more while
    they fit in ``milliseconds``.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        samples = do_bench(function, warmup=25, rep=milliseconds, return_mode="all")
        return summarize([sample / 1e3 for sample in samples], calls)
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < milliseconds / 1e3:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return summarize(seconds, calls)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of a copy within the device's memory (1 GiB, on a CPU 64 MiB)."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device)
    return 2 * source.numel() * source.element_size() / timing.median


def float32_peak(device: torch.device) -> tuple[float | None, str]:
    """Peak float32 operations a second without tensor cores, and what was assumed; None where unknown."""
    if device.type != "cuda":
        return None, "float32 peak unknown on a CPU"
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", None)
    if not kilohertz:
        return None, "float32 peak unknown: this torch does not report the clock rate"
    peak = properties.multi_processor_count * FLOAT32_LANES * 2 * kilohertz * 1e3
    return peak, (
        f"float32 peak {peak / 1e12:.1f} Tflop/s assumed: {properties.multi_processor_count} multiprocessors x "
        f"{FLOAT32_LANES} lanes x 2 x {kilohertz / 1e6:.3f} GHz"
    )


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement depends on: device, versions and commit."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = ""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "threads": "" if gpu else str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "triton": triton_version,
        "commit": commit_of(Path(__file__).resolve().parent),
    }


def describe_environment(device: torch.device) -> str:
    """Python, torch, device and commit, for the head of a page."""
    found = environment(device)
    commit = f", commit {found['commit']}" if found["commit"] else ""
    return f"Python {found['python']}, torch {found['torch']}, {found['device']}{commit}"


def commit_of(folder: Path) -> str:
    """The short commit of a checkout, with a + where files differ from it; empty outside git."""
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return finished.stdout.strip()


class RowWriter:
    """Writes rows as CSV as they come, each with the columns of the environment at its end."""

    def __init__(self, file: TextIO, columns: Sequence[str], environment: Mapping[str, str]) -> None:
        self._file = file
        self._environment = environment
        self._writer = csv.DictWriter(file, [*columns, *environment], lineterminator="\n")
        self._writer.writeheader()

    def write(self, row: Mapping[str, object]) -> None:
        """Writes a row; floats with six digits, None as an empty field."""
        shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        self._writer.writerow({**shown, **self._environment})
        self._file.flush()


def note(line: str) -> None:
    """Prints a remark on stderr: stdout is for rows."""
    print(line, file=sys.stderr)


def parse_arguments(name: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of both benchmarks: ``output`` (a path or None), ``device``, ``milliseconds``."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=description)
    parser.add_argument("--output", type=Path, help="CSV file to write, by default standard output")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="by default a GPU if any")
    parser.add_argument("--milliseconds", type=int, default=None, help="time to spend on the samples of a row")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if arguments.milliseconds is not None and arguments.milliseconds < 1:
        parser.error(f"--milliseconds must be >= 1, got {arguments.milliseconds}")
    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    arguments.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    return arguments

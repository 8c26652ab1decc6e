"""Checks and times everything that needs a GPU in one call.

python -m experiments.on_gpu [--out FOLDER] [--minutes 9]

Part by part, the most important first: the tests of the kernels compiled, not interpreted; each kernel's share of
the copy bandwidth; a step beside fused AdamW, SOAP and Kron on the lists of real models; a 10M-parameter GPT. Every
part is a process of its own, ends with the time that is left, and writes into the folder; `summary.md` says how each
ended. Without a GPU nothing runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.benchmarking import environment

GPT_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of this interpreter, and the seconds it may take at most."""

    name: str
    arguments: tuple[str, ...]
    limit: float


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a part ended: its exit status (None where its time was over), seconds, and the last line it printed."""

    part: Part
    status: int | None
    seconds: float
    last: str


def parts(out: Path) -> list[Part]:
    """What is run, in order."""
    tests = ("test_kernels_rotate", "test_kernels_refit", "test_kernels_step", "test_backends", "test_contract_device")
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-n", "8")
    gpt = [f"tasks.gpt_10m.steps={GPT_STEPS}", "seeds=[0]", "lr_grid.points=1", "lr_grid.max_points=1"]
    gpt += ["fractions=[1.0]", "robust=[]", "baselines=[adam_99]"]
    chosen = [word for name in ("adam_99", "butterfly", "soap") for word in ("--optimizer", name)]
    suite = ("-m", "experiments.compare", "--suite", "configs/suites/full.yaml", "--task", "gpt_10m", *chosen)
    return [
        Part("tests", (*pytest, *(f"tests/{name}.py" for name in tests)), 150),
        Part("kernels", ("-m", "experiments.bench_kernels", "--output", str(out / "kernels.csv")), 120),
        Part("steps", ("-m", "experiments.bench_step", "--output", str(out / "steps.csv")), 180),
        Part("gpt", (*suite, "--out", str(out / "gpt"), *gpt), 90),
    ]


def run(part: Part, out: Path, seconds: float) -> Ended:
    """Runs a part in the present folder for so many seconds at most; its output goes to `<name>.log`."""
    log, start = out / f"{part.name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            command = [sys.executable, *part.arguments]
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Ended(part, status, time.monotonic() - start, lines[-1].strip() if lines else "")


def summary(ended: Sequence[Ended], described: dict[str, str]) -> str:
    """A Markdown page."""
    lines = [", ".join(f"{name} {value}" for name, value in described.items() if value), ""]
    lines += ["| part | ended | seconds | last line |", "|---|---|---|---|"]
    for one in ended:
        how = "out of time" if one.status is None else "well" if one.status == 0 else f"with status {one.status}"
        lines.append(f"| {one.part.name} | {how} | {one.seconds:.0f} | {one.last.replace('|', '/')[:200]} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts; 0 if each ended well."""
    parser = argparse.ArgumentParser(prog="python -m experiments.on_gpu", description="Check and time on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="output folder (default: runs/on_gpu)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default: 9)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: there is nothing to measure")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    end, ended = time.monotonic() + 60 * arguments.minutes, []
    for part in parts(arguments.out):
        left = end - time.monotonic()
        ended.append(run(part, arguments.out, min(part.limit, left)) if left > 0 else Ended(part, None, 0.0, ""))
        page = summary(ended, environment(torch.device("cuda")))
        (arguments.out / "summary.md").write_text(page, encoding="utf-8")
    print(page)
    return int(any(one.status != 0 for one in ended))


if __name__ == "__main__":
    sys.exit(main())

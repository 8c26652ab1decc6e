"""Times the Triton kernels against the device's limits: `python -m experiments.bench_kernels [--output FILE]`.

A row gives the time of one call and the bytes it moves as a fraction of what a device-to-device copy of the same run
moves: of every launch of a plain step, of a refit, and of whole steps of the torch path and the fused one on a list of
tensors. Without a GPU small cases run in Triton's interpreter: that checks the kernels, its
times mean nothing. The bytes a parameter of each launch (`step_bytes`) are printed first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from experiments.bench_step import gpt2_shapes, resnet18_shapes
from experiments.benchmarking import RowWriter, copy_bandwidth, environment, measure, note, parse_arguments

if TYPE_CHECKING:
    from butterfly_opt.stack import Stack

COLUMNS = (
    "kernel",
    "shapes",
    "diagonal",
    "bytes",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "samples",
    "bytes_per_s",
    "copy_bytes_per_s",
    "copy_fraction",
)
Shapes = tuple[tuple[int, ...], ...]

GPU_LISTS: dict[str, tuple[Shapes, int]] = {
    "GPT-2 124M": (tuple(gpt2_shapes()), 0),
    "ResNet-18": (tuple(resnet18_shapes()), 0),
    "4096x4096": (((4096, 4096),), 0),
    "50304x768": (((50304, 768),), 0),
    "32 experts of 2048x1024": (((32, 2048, 1024),), 1),
}
"""Shapes of parameters, and how many of their leading dimensions are a batch."""
CPU_LISTS: dict[str, tuple[Shapes, int]] = {"20x13 twice, 13": (((20, 13), (20, 13), (13,)), 0)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a call, and the bytes it moves."""

    kernel: str
    bytes: float
    call: Callable[[], object]


def make_stacks(shapes: Shapes, batch_dims: int, device: torch.device, diagonal: str) -> list[Stack]:
    """The stacks of a list of parameters with gradients, in a late step with a learning rate of 0."""
    from butterfly_opt import step
    from butterfly_opt.layout import axes_layout
    from butterfly_opt.stack import Cohort, Gate, make_stacks, new_state

    block, lead = (64, 16) if device.type == "cuda" else (8, 2)
    options: dict[str, Any] = {
        "lr": 0.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False,
        "maximize": False, "capturable": False, "stochastic_rounding": False, "diagonal": diagonal, "block": block,
        "lead": lead, "refit_every": 10, "structure": "axes", "batch_dims": batch_dims,
        "cross_shard": True, "backend": "triton", "fused": None,
    }  # fmt: skip
    params = [torch.randn(shape, device=device) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    layouts = [axes_layout(param, batch_dims if param.dim() > 2 else 0) for param in params]
    states = [new_state(layout, options) for layout in layouts]
    for state in states:
        state["calls"] = 1001
    stacks = make_stacks(layouts, states, options)
    usable = torch.ones(len(layouts), dtype=torch.bool, device=device)
    step.count_steps_(Cohort(stacks), Gate(usable, usable, usable.float()))
    return stacks


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
    """Bytes a parameter that a step without a refit moves, pass by pass, and ``together``.

    Matrices of groups count once a level: the programs that share one find it in the second-level cache.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        diagonal: "innovation" or "secant".
        block: largest group.
        lead: outputs of a group that go on.
        rotated: the rotated axes.
        itemsize: bytes of a number of parameters and gradients.
    """
    from butterfly_opt.fused import tiles
    from butterfly_opt.plan import make_plan, share_bounds

    sides = [(make_plan(n, block, lead), other) for dim, n, other in ((-2, rows, columns), (-1, columns, rows))
             if dim in rotated]  # fmt: skip
    plans = {plan.n: plan for plan, _ in sides}
    # Vectors that are averaged, u and w; vectors that are rotated, m too; averages of products: A, B and C.
    vectors, products = (2, 3) if diagonal == "secant" else (1, 1)
    found = dict.fromkeys(("leaves", "later levels", "moments", "back, later", "back, leaves"), 0.0)
    found["leaves"], found["back, leaves"] = vectors * (itemsize + 8.0), 2 * itemsize + 4.0
    depth = max((len(plan.stages) for plan, _ in sides), default=1)
    # The share of the matrix that a level turns: all at the leaves, then what any axis still turns.
    shares = [1.0] + [
        1 - math.prod(1 - (sum(run.span for run in plan.stages[i].runs) / plan.n if i < len(plan.stages) else 0)
                      for plan, _ in sides)
        for i in range(1, depth)
    ] + [0.0]  # fmt: skip
    for i, (here, further) in enumerate(itertools.pairwise(shares)):
        name, back = ("later levels", "back, later") if i else ("leaves", "back, leaves")
        read = 4 * (vectors + 1) * here if i else 0.0
        found[name] += read + (here - further) * (8 * products + 4) + further * 4 * (vectors + 1)
        # With secant u and w of final coordinates that were turned wait in scratch, too.
        found[name] += (here - further) * 4 * vectors if diagonal == "secant" and sides else 0.0
        found[back] += 8 * here if i else 0.0
        for plan, other in sides:
            if i < len(plan.stages):
                share = sum(run.span for run in plan.stages[i].runs) / plan.n
                matrices = 4 * sum(run.numel for run in plan.stages[i].runs) / (rows * columns)
                # Half a moment, in fours, for each tile whose turn it is: written and read.
                turns = len(share_bounds(other, plans.get(other))) - 1 if i == 0 else 1
                partial = 4 * share * (tiles.width_of(plan.n) + 4) / tiles.width_of(other)
                found["moments"] += partial / turns + 2 * matrices
                found[name] += matrices
                found[back] += matrices
    return {**found, "together": sum(found.values())}


def kernel_cases(stacks: Sequence[Stack], diagonal: str) -> Iterator[Case]:
    """Every launch of a step, each over all stacks."""
    from butterfly_opt import fused
    from butterfly_opt.fused import kernels, refit, tables

    pairs = [(stack, stack.active) for stack in stacks]
    members = fused._lists([fused._member(*pair) for pair in pairs])
    lists = [fused._operands(own, fused._numbers(own)) for own in members]
    moved = {"": 0.0}
    for stack in stacks:
        counts = step_bytes(
            stack.shape[1], stack.shape[2], diagonal=diagonal, block=stack.options["block"],
            lead=stack.options["lead"], rotated=tuple(dim for dim, _ in stack.whole_rotations),
        )  # fmt: skip
        numel = stack.averages["exp_avg"].numel()
        for name, count in counts.items():
            moved[name] = moved.get(name, 0.0) + count * numel
    numel = sum(stack.averages["exp_avg"].numel() for stack in stacks)
    entries = sum(rotation.matrices.numel() for stack in stacks for _, rotation in stack.whole_rotations)
    note("bytes a parameter, " + diagonal + ": " + ", ".join(f"{k} {v / numel:.1f}" for k, v in moved.items() if k))

    forth_ = functools.partial(kernels.forth_, gate=tables.USABLE, step=True, observe=True)
    observe_ = functools.partial(refit.observe_, gate=tables.WITHIN)
    refit_ = functools.partial(refit.refit_, gate=tables.WITHIN, shift=1e-6)
    forth = moved["leaves"] + moved["later levels"] + moved["moments"] / 2
    yield Case("forth", forth, functools.partial(_each, forth_, lists))
    yield Case("observe", moved["moments"] / 2, functools.partial(_each, observe_, lists))
    write_ = functools.partial(kernels.back_, stochastic=False, write=True)
    yield Case("back", moved["back, later"] + moved["back, leaves"], functools.partial(_each, write_, lists))
    yield Case("refit", 16 * entries, functools.partial(_each, refit_, lists))
    yield Case("plain step", moved["together"], functools.partial(_plain_step, "triton", stacks))


def _each(function: Callable[..., object], lists: Sequence[Any]) -> None:
    for operands in lists:
        function(operands)


def _plain_step(backend: str, stacks: Sequence[Stack]) -> None:
    """A step that observes and does not refit."""
    from butterfly_opt.backend import steps_of
    from butterfly_opt.collectives import run

    stacks[0].options["backend"] = backend
    for stack in stacks:
        stack.phase = 0
        for state in stack.states:
            state["calls"] = 1001
    run(steps_of([(stack, stack.active) for stack in stacks]))


def all_cases(device: torch.device) -> Iterator[tuple[str, str, Case]]:
    """Every measurement for a device, made when its turn comes: shapes, diagonal, case."""
    for label, (shapes, batch_dims) in (GPU_LISTS if device.type == "cuda" else CPU_LISTS).items():
        for diagonal in ("innovation", "secant"):
            stacks = make_stacks(shapes, batch_dims, device, diagonal)
            for case in kernel_cases(stacks, diagonal):
                yield label, diagonal, case
            plain = functools.partial(_plain_step, "torch", stacks)
            yield label, diagonal, Case("plain step, torch", case.bytes, plain)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see the module docstring."""
    arguments = parse_arguments("bench_kernels", "Time the Triton kernels.", argv)
    device: torch.device = arguments.device
    gpu = device.type == "cuda"
    if not gpu:
        # Before triton is imported, which the imports inside the functions above do.
        os.environ["TRITON_INTERPRET"] = "1"
        note(f"no GPU used: {', '.join(GPU_LISTS)} are skipped; {', '.join(CPU_LISTS)} runs in Triton's interpreter, "
             "whose times mean nothing")  # fmt: skip
    copy = copy_bandwidth(device)
    note(f"{environment(device)['device']}: copy {copy / 1e9:.1f} GB/s (read + written)")
    milliseconds = arguments.milliseconds or (200 if gpu else 20)
    with contextlib.ExitStack() as opened, torch.no_grad():
        file = opened.enter_context(arguments.output.open("w", newline="")) if arguments.output else sys.stdout
        writer = RowWriter(file, COLUMNS, environment(device))
        for label, diagonal, case in all_cases(device):
            timing = measure(case.call, device, milliseconds=milliseconds)
            rate = case.bytes / timing.median
            numbers = (case.bytes, timing.median * 1e3, timing.low * 1e3, timing.high * 1e3, timing.samples, rate)
            row = (case.kernel, label, diagonal, *numbers, copy, rate / copy)
            writer.write(dict(zip(COLUMNS, row, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

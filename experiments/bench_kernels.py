"""Times the Triton kernels against the device's limits: `python -m experiments.bench_kernels [--output FILE]`.

A row gives the time of one call and the bytes it moves as a fraction of what a device-to-device copy of the same run
moves: of every launch of a plain step, of an observation, of a refit, and of whole steps of the torch path and the
fused one on a list of tensors. Without a GPU small cases run in Triton's interpreter: that checks the kernels, its
times mean nothing. The bytes a parameter of each launch (`butterfly_opt.fused.step_bytes`) are printed first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from experiments.benchmarking import RowWriter, copy_bandwidth, environment, measure, note, parse_arguments

if TYPE_CHECKING:
    from butterfly_opt.backend import TakeStep
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

GPT2_BLOCK: Shapes = ((2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), *[(768,)] * 5)
GPT2: Shapes = ((50304, 768), (1024, 768), *GPT2_BLOCK * 12, (768,), (768,))
"""GPT-2 124M, the head tied to the embedding."""


def resnet18() -> Shapes:
    """Parameters of torchvision's ResNet-18."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    entering = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, entering, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and entering != width:
                shapes += [(width, entering, 1, 1), (width,), (width,)]
            entering = width
    return (*shapes, (1000, 512), (1000,))


GPU_LISTS: dict[str, tuple[Shapes, int]] = {
    "GPT-2 124M": (GPT2, 0),
    "ResNet-18": (resnet18(), 0),
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
    from butterfly_opt.stack import make_stacks, new_state

    block, lead = (64, 16) if device.type == "cuda" else (8, 2)
    options: dict[str, Any] = {
        "lr": 0.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False,
        "maximize": False, "capturable": False, "stochastic_rounding": False, "diagonal": diagonal, "block": block,
        "lead": lead, "refit_every": 10, "structure": "axes", "batch_dims": batch_dims,
        "cross_shard": True,
    }  # fmt: skip
    params = [torch.randn(shape, device=device) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    layouts = [axes_layout(param, batch_dims if param.dim() > 2 else 0) for param in params]
    states = [new_state(layout, options) for layout in layouts]
    for state in states:
        state["calls"] = 1001
    stacks = make_stacks(layouts, states, options)
    step.count_steps_(stacks, [stack.active for stack in stacks])
    return stacks


def kernel_cases(stacks: Sequence[Stack], diagonal: str) -> Iterator[Case]:
    """Every launch of a step, each over all stacks."""
    from butterfly_opt import fused
    from butterfly_opt.fused import kernels

    operands = [fused._operands(stack, fused._source(stack), stack.active) for stack in stacks]
    sums = [kernels.take_rest_(own) for own in operands]
    rotated = [(stack, own) for stack, own in zip(stacks, operands, strict=True) if stack.whole_rotations]
    moved = {"": 0.0}
    for stack in stacks:
        counts = fused.step_bytes(
            stack.shape[1], stack.shape[2], diagonal=diagonal, block=stack.options["block"],
            lead=stack.options["lead"], rotated=tuple(dim for dim, _ in stack.whole_rotations),
        )  # fmt: skip
        numel = stack.averages["exp_avg"].numel()
        for name, count in counts.items():
            moved[name] = moved.get(name, 0.0) + count * numel
    numel = sum(stack.averages["exp_avg"].numel() for stack in stacks)
    note("bytes a parameter, " + diagonal + ": " + ", ".join(f"{k} {v / numel:.1f}" for k, v in moved.items() if k))

    def later(back: bool) -> None:
        for stack, own in rotated:
            values = own.values[1:2] if back else own.values
            for dim, rotation in stack.whole_rotations:
                fused._later_stages_(values, rotation, dim=dim, back=back)

    yield Case("forth", moved["forth"], functools.partial(_each, kernels.forth_, operands))
    yield Case("later stages", moved["later stages"], functools.partial(later, False))
    yield Case("rest", moved["rest"], functools.partial(_each, kernels.take_rest_, operands))
    yield Case("later stages back", moved["later stages back"], functools.partial(later, True))
    write_ = functools.partial(kernels.back_, stochastic=False, write=True)
    yield Case("back", moved["back"], functools.partial(_each, write_, operands, sums))
    yield Case("innovations", 12.0 * numel, functools.partial(_each, kernels.innovations, operands))
    yield from fit_cases(rotated)
    take_step_ = functools.partial(_plain_step, fused.take_step_)
    yield Case("plain step", moved["together"], functools.partial(_each, take_step_, stacks))


def fit_cases(rotated: Sequence[tuple[Stack, Any]]) -> Iterator[Case]:
    """An observation of both axes, and a refit."""
    from butterfly_opt import fused

    rotations = [(stack, dim, rotation) for stack, _ in rotated for dim, rotation in stack.whole_rotations]
    observed, entries = 0.0, 0.0
    for stack, _, rotation in rotations:
        shares = [sum(run.span for run in s.runs) / rotation.plan.n for s in rotation.plan.stages]
        numel = stack.averages["exp_avg"].numel()
        # The last stage is read alone.
        observed += (8 * sum(shares) - 4 * shares[-1]) * numel + 12 * rotation.matrices.numel()
        entries += rotation.matrices.numel()
    buffers = {id(stack): torch.randn_like(stack.averages["exp_avg"]) for stack, _ in rotated}

    def observe() -> None:
        for stack, dim, rotation in rotations:
            weights = rotation.matrices.new_full((rotation.count,), 0.1)
            fused._observe_(buffers[id(stack)], rotation, weights, dim=dim)

    def refit() -> None:
        for _, _, rotation in rotations:
            fused._refit_(rotation, rotation.matrices.new_ones(rotation.count))

    yield Case("observe", observed, observe)
    yield Case("refit", 16 * entries, refit)


def _each(function: Callable[..., object], *lists: Sequence[Any]) -> None:
    for arguments in zip(*lists, strict=True):
        function(*arguments)


def _plain_step(take_step_: TakeStep, stack: Stack) -> None:
    """A step that neither observes nor refits."""
    from butterfly_opt.collectives import run

    stack.phase = 0
    for state in stack.states:
        state["calls"] = 1001
    run([take_step_(stack, stack.active)])


def all_cases(device: torch.device) -> Iterator[tuple[str, str, Case]]:
    """Every measurement for a device, made when its turn comes: shapes, diagonal, case."""
    from butterfly_opt import step

    for label, (shapes, batch_dims) in (GPU_LISTS if device.type == "cuda" else CPU_LISTS).items():
        for diagonal in ("innovation", "secant"):
            stacks = make_stacks(shapes, batch_dims, device, diagonal)
            for case in kernel_cases(stacks, diagonal):
                yield label, diagonal, case
            plain = functools.partial(_plain_step, step.take_step_)
            yield label, diagonal, Case("plain step, torch", case.bytes, functools.partial(_each, plain, stacks))


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

"""Times the Triton kernels against the device's limits: `python -m experiments.bench_kernels [--output FILE]`.

A row gives the time of one call, the bytes it moves as a fraction of what a device-to-device copy of the
same run moves, and its operations as a fraction of the float32 peak. The torch function that a kernel
equals is timed beside it, with the bytes of the kernel. Without a GPU small cases run in Triton's
interpreter: that checks the kernels, its times mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from experiments.benchmarking import (
    RowWriter,
    copy_bandwidth,
    environment,
    float32_peak,
    measure,
    note,
    parse_arguments,
)

COLUMNS = (
    "kernel",
    "implementation",
    "shape",
    "variant",
    "bytes",
    "flops",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "samples",
    "bytes_per_s",
    "copy_bytes_per_s",
    "copy_fraction",
    "flops_per_s",
    "peak_fraction",
)
GPU_SHAPES = ((4096, 4096), (50304, 768), (768, 3072), (256, 256))
CPU_SHAPES = ((16, 12),)
# A ResNet block's worth of tensors of very different sizes, for the list forms.
GPU_LIST = ((512, 4608), (256, 2304), (128, 1152), (64, 576), (1000, 512), *[(n,) for n in (512, 256, 128, 64) * 8])
CPU_LIST = ((20, 30), (30,), (7,))
Row = dict[str, object]
SCALARS = {"mean_weight": 0.1, "grad_weight": 0.01, "pair_weight": 0.01, "step": 100, "lr": 0.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement; `bytes` and `flops` are those of the kernel, also for torch."""

    kernel: str
    shape: str
    variant: str
    bytes: int
    flops: int
    fused: Callable[[], object]
    plain: Callable[[], object] | None = None


def rotation_cases(shape: tuple[int, int], device: torch.device) -> Iterator[Case]:
    """Rotations (each axis; depth 1, 2; 1, 2, 3 tensors) and angle gradients of a matrix."""
    from butterfly_opt import rotation
    from butterfly_opt.triton_kernels import launch
    from butterfly_opt.triton_kernels.rotate import angle_gradient, rotate_columns

    elements = shape[0] * shape[1]
    for axis in (0, 1):
        n, view = shape[axis], ((1, *shape) if axis == 0 else (*shape, 1))
        tensors = [torch.randn(shape, device=device).view(view) for _ in range(3)]
        for depth in (1, 2):
            angles = torch.randn(rotation.angles_shape(n, depth=depth), device=device)
            cos, sin = angles.cos(), angles.sin()
            passes = len(launch.stage_passes(angles.shape[-2], post=view[2]))
            launches = 1 if passes == 1 else passes * depth
            work = elements * angles.shape[-2] * depth
            for count in (1, 2, 3):
                inputs = tensors[:count]
                yield Case(
                    "rotate",
                    _text(shape),
                    f"axis {axis} depth {depth} tensors {count}",
                    bytes=count * 8 * elements * launches + 8 * angles.numel(),
                    flops=count * 3 * work,
                    fused=functools.partial(rotate_columns, inputs, cos, sin, transpose=True, out=inputs),
                    plain=functools.partial(rotation.rotate, inputs[0], angles, dim=1) if count == 1 else None,
                )
            yield Case(
                "angle_gradient",
                _text(shape),
                f"axis {axis} depth {depth}",
                bytes=8 * elements + 16 * elements * (launches - 1) + 8 * angles.numel(),
                flops=8 * work,
                fused=functools.partial(angle_gradient, tensors[0], tensors[1], cos, sin),
                plain=functools.partial(rotation.angle_gradient, tensors[0], tensors[1], angles, dim=1),
            )


def step_cases(shapes: Sequence[tuple[int, ...]], device: torch.device) -> Iterator[Case]:
    """The step kernels: on one tensor, or in the list form where there are several shapes."""
    for secant in (False, True):
        yield from _moments_and_direction(shapes, device, secant)
    for dtype in (torch.float32, torch.bfloat16):
        for track in (False, True):
            yield _write(shapes, device, dtype, track)


def all_cases(device: torch.device) -> Iterator[Case]:
    """Every measurement for a device, made when its turn comes."""
    gpu = device.type == "cuda"
    for shape in GPU_SHAPES if gpu else CPU_SHAPES:
        yield from rotation_cases(shape, device)
        yield from step_cases([shape], device)
    yield from step_cases(GPU_LIST if gpu else CPU_LIST, device)


def _moments_and_direction(shapes: Sequence[tuple[int, ...]], device: torch.device, secant: bool) -> Iterator[Case]:
    from butterfly_opt.diagonal import regress
    from butterfly_opt.estimate import update_moments_
    from butterfly_opt.pairs import advance_displacement_, update_mean_grad_
    from butterfly_opt.triton_kernels import step

    names = ["grad", "mean_grad", "grad_sq", *(["displacement", "disp_sq", "cross"] if secant else [])]
    states = [{name: torch.rand(shape, device=device) for name in names} for shape in shapes]
    outs = [torch.empty_like(state["grad"]) for state in states]
    scalars = step.pack_scalars(**SCALARS, device=device)
    numbers = {"eps": 1e-8, "max_update": 3.0, "beta2": 0.99}
    sums = torch.ones(len(shapes), 2, device=device) if secant else None

    def plain_moments() -> None:
        for state in states:
            u = update_mean_grad_(state["mean_grad"], state["grad"].clamp(-1e18, 1e18), 0.1)
            update_moments_(state, u, state.get("displacement"), weight=0.01, pair_weight=0.01)

    def plain_direction() -> None:
        for state in states:
            energy = state["grad_sq"]
            if secant:
                energy = regress(energy, state["disp_sq"], state["cross"], beta2=0.99, step=100).energy
            update = (state["mean_grad"] / energy.sqrt().add_(1e-8)).clamp_(-3, 3).mul_(-0.0)
            if secant:
                advance_displacement_(state["displacement"], update, 0.1)

    column = {name: [state[name] for state in states] for name in names}
    fused_moments: Callable[[], object]
    fused_direction: Callable[[], object]
    if len(shapes) == 1:
        kept = {name: states[0][name] for name in names[3:]}
        total = {"sums": sums[0], **kept} if sums is not None else {}
        first = states[0]

        def fused_moments() -> None:
            partial = step.fused_moments_(first["grad"], first["mean_grad"], first["grad_sq"], scalars, **kept)
            if partial is not None:
                partial.sum(0)

        def fused_direction() -> None:
            step.fused_direction_(outs[0], first["mean_grad"], first["grad_sq"], scalars, **numbers, **total)
    else:
        lists = {f"{name}es" if name == "cross" else f"{name}s": column[name] for name in names[3:]}
        of_moments = step.moments_table(column["grad"], column["mean_grad"], column["grad_sq"], **lists)
        of_direction = step.direction_table(outs, column["mean_grad"], column["grad_sq"], **lists)

        def fused_moments() -> None:
            step.fused_moments_many_(of_moments, scalars)

        def fused_direction() -> None:
            step.fused_direction_many_(of_direction, scalars, **numbers, sums=sums)

    size = sum(out.numel() for out in outs)
    label, diagonal = _text(*shapes), "secant" if secant else "innovation"
    yield Case("moments", label, diagonal, (44 if secant else 24) * size, (14 if secant else 8) * size,
               fused_moments, plain_moments)  # fmt: skip
    yield Case("direction", label, diagonal, (28 if secant else 12) * size, (35 if secant else 6) * size,
               fused_direction, plain_direction)  # fmt: skip


def _write(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype, track: bool) -> Case:
    from butterfly_opt.triton_kernels import step

    params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    updates = [torch.zeros(shape, device=device) for shape in shapes]
    written = [torch.empty_like(update) for update in updates] if track else None
    table = step.write_table(params, updates, written=written)

    def fused() -> None:
        if len(params) == 1:
            step.fused_write_(params[0], updates[0], written=written[0] if written is not None else None)
        else:
            step.fused_write_many_(table)

    def plain() -> None:
        for param, update in zip(params, updates, strict=True):
            before = param.clone() if track else None
            param.add_(update)
            if before is not None:
                param.float() - before.float()

    size = sum(param.numel() for param in params)
    moved = 2 * params[0].element_size() + 4 + (4 if track else 0)
    variant = f"{str(dtype).removeprefix('torch.')}{' written' if track else ''}"
    return Case("write", _text(*shapes), variant, moved * size, (3 if track else 2) * size, fused, plain)


def _text(*shapes: tuple[int, ...]) -> str:
    if len(shapes) == 1:
        return "x".join(map(str, shapes[0]))
    return f"{len(shapes)} tensors of {sum(torch.Size(shape).numel() for shape in shapes)}"


def run_case(case: Case, device: torch.device, *, milliseconds: int, copy: float, peak: float | None) -> Iterator[Row]:
    """Measures a kernel and the torch function it equals."""
    name = "triton" if device.type == "cuda" else "triton interpreter"
    for implementation, function in ((name, case.fused), ("torch", case.plain)):
        if function is None:
            continue
        timing = measure(function, device, milliseconds=milliseconds)
        yield {
            "kernel": case.kernel,
            "implementation": implementation,
            "shape": case.shape,
            "variant": case.variant,
            "bytes": case.bytes,
            "flops": case.flops,
            "median_ms": timing.median * 1e3,
            "p20_ms": timing.low * 1e3,
            "p80_ms": timing.high * 1e3,
            "samples": timing.samples,
            "bytes_per_s": case.bytes / timing.median,
            "copy_bytes_per_s": copy,
            "copy_fraction": case.bytes / timing.median / copy,
            "flops_per_s": case.flops / timing.median,
            "peak_fraction": None if peak is None else case.flops / timing.median / peak,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see the module docstring."""
    arguments = parse_arguments("bench_kernels", "Time the Triton kernels.", argv)
    device: torch.device = arguments.device
    gpu = device.type == "cuda"
    if not gpu:
        # Before triton is imported, which the imports inside the functions above do.
        os.environ["TRITON_INTERPRET"] = "1"
        note(f"no GPU used: shapes {', '.join(_text(shape) for shape in GPU_SHAPES)} and the list of {len(GPU_LIST)} "
             "tensors are skipped; small ones run in Triton's interpreter, whose times mean nothing")  # fmt: skip
    copy = copy_bandwidth(device)
    peak, assumed = float32_peak(device)
    note(f"copy {copy / 1e9:.1f} GB/s (read + written); {assumed}")
    milliseconds = arguments.milliseconds or (200 if gpu else 20)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(arguments.output.open("w", newline="")) if arguments.output else sys.stdout
        writer = RowWriter(file, COLUMNS, environment(device))
        for case in all_cases(device):
            for row in run_case(case, device, milliseconds=milliseconds, copy=copy, peak=peak):
                writer.write(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from typing import Any

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
# Lengths of axes refitted together: those of four layers of GPT-2 that fit on chip, and those that do not.
GPU_PACKS = ((768,) * 20, (3072, 2304) * 4, (50304,))
CPU_PACKS = ((16, 12, 5),)
REFIT_STEPS = 4
SKETCH_COLUMNS = 8
Row = dict[str, object]


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
    """The step kernels on a list of tensors, all usable."""
    for secant in (False, True):
        yield from _moments_and_direction(shapes, device, secant)
    for dtype, seed in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 0)):
        for track in (False, True):
            yield _write(shapes, device, dtype, track, seed)


def sketch_cases(shape: tuple[int, int], device: torch.device) -> Iterator[Case]:
    """The product of the sketch of each axis of a matrix."""
    from butterfly_opt import sketch
    from butterfly_opt.triton_kernels.sketch import sketch_product

    x = torch.randn(shape, device=device)
    for axis in (0, 1):
        n, columns = shape[axis], shape[1 - axis]
        signs = torch.randn(1, columns, SKETCH_COLUMNS, device=device).sign()
        yield Case(
            "sketch",
            _text(shape),
            f"axis {axis}",
            bytes=4 * (x.numel() + signs.numel() + n * SKETCH_COLUMNS),
            flops=2 * SKETCH_COLUMNS * x.numel(),
            fused=functools.partial(sketch_product, x.view((1, 1, *shape) if axis == 0 else (1, *shape, 1)), signs),
            plain=functools.partial(sketch.sketch_product, x[None], signs, dim=axis + 1),
        )


def refit_case(lengths: Sequence[int], device: torch.device) -> Case:
    """A refit of a pack of axes; the bytes are those of one read and one write of everything."""
    from butterfly_opt import refit, rotation
    from butterfly_opt.triton_kernels.refit import fits_on_chip, refit_sketch_

    packing = refit.pack_axes(lengths)
    sketch = torch.randn(packing.total, SKETCH_COLUMNS, device=device)
    parts = [torch.zeros(rotation.angles_shape(n, depth=2), device=device) for n in lengths]
    state = refit.AngleState(*(refit.pack_angles(packing, parts) for _ in range(3)))
    owned = refit.pack_angles(packing, [torch.ones_like(part) for part in parts])
    options: dict[str, Any] = {
        "steps": REFIT_STEPS,
        "refit_lr": 0.0,
        "taken": torch.zeros((), device=device),
        "owned": owned,
    }
    work = sketch.numel() * packing.stages * 2
    return Case(
        "refit",
        _pack_text(lengths),
        f"{'on chip' if fits_on_chip(packing.stages, SKETCH_COLUMNS) else 'passes'} depth 2 steps {REFIT_STEPS}",
        bytes=8 * sketch.numel() + 28 * state.angles.numel(),
        flops=(3 * (REFIT_STEPS + 1) + 8 * REFIT_STEPS) * work,
        fused=functools.partial(refit_sketch_, sketch, *state, **options),
        plain=functools.partial(refit.refit_sketch_, sketch, state, **options),
    )


def all_cases(device: torch.device) -> Iterator[Case]:
    """Every measurement for a device, made when its turn comes."""
    gpu = device.type == "cuda"
    for shape in GPU_SHAPES if gpu else CPU_SHAPES:
        yield from rotation_cases(shape, device)
        yield from sketch_cases(shape, device)
        yield from step_cases([shape], device)
    yield from step_cases(GPU_LIST if gpu else CPU_LIST, device)
    for lengths in GPU_PACKS if gpu else CPU_PACKS:
        yield refit_case(lengths, device)


def _rows(count: int, device: torch.device) -> torch.Tensor:
    """Scalars of a late step with a learning rate of 0, so that repeated steps change nothing."""
    return torch.tensor([[0.1, 0.01, 0.01, 100, 0.0, 1]] * count, device=device)


def _moments_and_direction(shapes: Sequence[tuple[int, ...]], device: torch.device, secant: bool) -> Iterator[Case]:
    from butterfly_opt.diagonal import regress
    from butterfly_opt.pairs import advance_displacement_, update_mean_grad_
    from butterfly_opt.triton_kernels import step

    names = ["grad", "mean_grad", "grad_sq", *(["displacement", "disp_sq", "cross"] if secant else [])]
    states = [{name: torch.rand(shape, device=device) for name in names} for shape in shapes]
    column = {name: [state[name] for state in states] for name in names}
    outs = [torch.empty_like(grad) for grad in column["grad"]]
    scalars = _rows(len(shapes), device)
    sums = torch.ones(len(shapes), 2, device=device) if secant else None
    lists = {f"{name}es" if name == "cross" else f"{name}s": column[name] for name in names[3:]}
    of_moments = step.moments_table(column["grad"], column["mean_grad"], column["grad_sq"], **lists)
    of_direction = step.direction_table(outs, column["mean_grad"], column["grad_sq"], **lists)

    def plain_moments() -> None:
        for state in states:
            u = update_mean_grad_(state["mean_grad"], state["grad"].clamp(-1e18, 1e18), 0.1)
            state["grad_sq"].mul_(0.99).addcmul_(u, u, value=0.01)
            if secant:
                w = state["displacement"]
                state["disp_sq"].mul_(0.99).addcmul_(w, w, value=0.01)
                state["cross"].mul_(0.99).addcmul_(u, w, value=0.01)

    def plain_direction() -> None:
        for state in states:
            energy = state["grad_sq"]
            if secant:
                energy = regress(energy, state["disp_sq"], state["cross"], beta2=0.99, step=100).energy
            update = (state["mean_grad"] / energy.sqrt().add_(1e-8)).clamp_(-3, 3).mul_(-0.0)
            if secant:
                advance_displacement_(state["displacement"], update, 0.1)

    size = sum(out.numel() for out in outs)
    label, diagonal = _text(*shapes), "secant" if secant else "innovation"
    yield Case("moments", label, diagonal, step.MOMENTS_BYTES[diagonal] * size, (14 if secant else 8) * size,
               functools.partial(step.moments_, of_moments, scalars), plain_moments)  # fmt: skip
    advancing = "secant advancing" if secant else "innovation"
    fused = functools.partial(step.direction_, of_direction, scalars, eps=1e-8, max_update=3.0, beta2=0.99, sums=sums)
    yield Case("direction", label, advancing, step.DIRECTION_BYTES[advancing] * size, (35 if secant else 6) * size,
               fused, plain_direction)  # fmt: skip


def _write(
    shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype, track: bool, seed: int | None
) -> Case:
    from butterfly_opt.triton_kernels import write

    params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    updates = [torch.zeros(shape, device=device) for shape in shapes]
    written = [torch.empty_like(update) for update in updates] if track else None
    table = write.write_table(params, updates, written=written, streams=range(len(params)))
    scalars = _rows(len(shapes), device)

    def plain() -> None:
        for param, update in zip(params, updates, strict=True):
            before = param.clone() if track else None
            param.add_(update)
            if before is not None:
                param.float() - before.float()

    size = sum(param.numel() for param in params)
    moved = write.write_bytes(dtype, track=track)
    variant = f"{str(dtype).removeprefix('torch.')}{' stochastic' if seed is not None else ''}"
    return Case(
        "write",
        _text(*shapes),
        variant + (" written" if track else ""),
        bytes=moved * size,
        flops=(3 if track else 2) * size,
        fused=functools.partial(write.write_, table, scalars, rounding_seed=seed),
        plain=plain if seed is None else None,
    )


def _text(*shapes: tuple[int, ...]) -> str:
    if len(shapes) == 1:
        return "x".join(map(str, shapes[0]))
    return f"{len(shapes)} tensors of {sum(torch.Size(shape).numel() for shape in shapes)}"


def _pack_text(lengths: Sequence[int]) -> str:
    return f"axes {sum(lengths)} in {len(lengths)}"


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
        note(f"no GPU used: shapes {', '.join(_text(shape) for shape in GPU_SHAPES)}, the list of {len(GPU_LIST)} "
             f"tensors and the refits of {', '.join(_pack_text(lengths) for lengths in GPU_PACKS)} are "
             "skipped; small ones run in Triton's interpreter, whose times mean nothing")  # fmt: skip
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

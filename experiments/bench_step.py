"""Times one optimizer step: `python -m experiments.bench_step [--output FILE]`.

Butterfly (both diagonals, and twice as many leading directions) beside fused
AdamW and, where pytorch_optimizer is installed, SOAP and Kron, on lists of parameters of real models
with random gradients; and counts the bytes of their states. Work that is not done in every step is
spread over the steps: a sample is `steps` steps, after `warmup` steps that are not counted. Without a
GPU small lists run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.benchmarking import RowWriter, Timing, copy_bandwidth, environment, measure, note, parse_arguments
from experiments.measure import state_bytes

COLUMNS = (
    "parameters",
    "tensors",
    "elements",
    "optimizer",
    "options",
    "steps",
    "warmup",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "samples",
    "elements_per_s",
    "copied_bytes_per_element",
    "copy_bytes_per_s",
    "state_bytes_per_element",
)
REFIT_WARMUP = 100
REFIT_EVERY = 10
Shapes = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer to time: `steps` in a sample cover its rare work, `warmup` comes before; `captured` as a graph."""

    name: str
    options: str
    build: Callable[[list[Tensor]], Optimizer]
    steps: int
    warmup: int
    captured: bool = False


def gpt2_shapes(*, vocabulary: int = 50304, context: int = 1024, width: int = 768, layers: int = 12) -> Shapes:
    """The parameters of GPT-2 (124M as given), its head tied to the embedding, the vocabulary padded."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width), *[*norm, *attention, *norm, *mlp] * layers, *norm]


def resnet18_shapes() -> Shapes:
    """Parameters of torchvision's ResNet-18."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    entering = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, entering, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and entering != width:
                shapes += [(width, entering, 1, 1), (width,), (width,)]
            entering = width
    return [*shapes, (1000, 512), (1000,)]


def gpu_lists() -> Iterator[tuple[str, Shapes]]:
    """The parameter lists of real models."""
    yield "GPT-2 124M", gpt2_shapes()
    yield "ResNet-18", resnet18_shapes()
    yield "matrix 4096x4096", [(4096, 4096)]
    yield "embedding 50304x768", [(50304, 768)]


def cpu_lists() -> Iterator[tuple[str, Shapes]]:
    """Small lists, the autoencoder of `configs/mnist_autoencoder.yaml`, and a long axis."""
    widths = [784, 256, 64, 16, 64, 256, 784]
    yield "matrix 256x256", [(256, 256)]
    yield "MLP 64-128-64-10", [(128, 64), (128,), (64, 128), (64,), (10, 64), (10,)]
    yield "autoencoder 784-256-64-16", [shape for i, o in itertools.pairwise(widths) for shape in ((o, i), (o,))]
    yield "embedding 50000x64", [(50000, 64)]


def entries(device: torch.device) -> Iterator[Entry]:
    """The optimizers, the slowest last.

    A refit of Butterfly happens in every second of the first 100 steps, then every tenth.
    """
    from butterfly_opt import Butterfly

    yield Entry("AdamW", "fused", lambda params: torch.optim.AdamW(params, fused=True), steps=10, warmup=10)
    variants: list[dict[str, Any]] = [
        {"diagonal": "innovation"},
        {"diagonal": "secant"},
        {"diagonal": "innovation", "lead": 32},
    ]
    for options in variants:
        yield Entry(
            "Butterfly",
            " ".join(f"{name}={value}" for name, value in options.items()),
            functools.partial(Butterfly, **options),
            steps=REFIT_EVERY,
            warmup=REFIT_WARMUP,
        )
    if device.type == "cuda":
        for diagonal in ("innovation", "secant"):
            build = functools.partial(Butterfly, diagonal=diagonal, capturable=True)
            yield Entry("Butterfly", f"diagonal={diagonal}, a CUDA graph", build, REFIT_EVERY, REFIT_WARMUP, True)
    if importlib.util.find_spec("pytorch_optimizer") is None:
        note("pytorch_optimizer is not installed: the rows of SOAP and Kron are skipped")
        return
    import pytorch_optimizer

    yield Entry("SOAP", "precondition_frequency=10",
                lambda params: pytorch_optimizer.SOAP(params, precondition_frequency=10),
                steps=10, warmup=11)  # fmt: skip
    if not torch.backends.opt_einsum.is_available():
        # Left to right, its products of four matrices would form tensors of rows^2 columns^2 entries.
        note("opt_einsum is not installed, without which Kron is unusably slow: its rows are skipped")
        return
    # Kron draws at random when to update its preconditioner; 0.03 is where its schedule ends.
    yield Entry("Kron", "pre_conditioner_update_probability=0.03",
                lambda params: pytorch_optimizer.Kron(params, pre_conditioner_update_probability=0.03),
                steps=100, warmup=20)  # fmt: skip


def time_entry(entry: Entry, shapes: Shapes, device: torch.device, *, milliseconds: int) -> tuple[Timing, int]:
    """Seconds of one step, and bytes of state. Two sets of gradients take turns: constant ones have no innovation."""
    generator = torch.Generator(device).manual_seed(0)
    params: list[Tensor] = [
        torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) * 0.02) for shape in shapes
    ]
    sets = [[torch.randn(shape, device=device, generator=generator) * 1e-3 for shape in shapes] for _ in range(2)]
    turns = itertools.cycle(sets)
    optimizer = entry.build(params)

    def advance(steps: int) -> None:
        for _ in range(steps):
            for param, grad in zip(params, next(turns), strict=True):
                param.grad = grad
            optimizer.step()

    def replay(steps: int) -> None:
        for _ in range(steps):
            graph.replay()

    advance(entry.warmup)
    if entry.captured:
        graph = torch.cuda.CUDAGraph()
        # The gradients of the last step stay where they are.
        with torch.cuda.graph(graph):
            optimizer.step()
    run = functools.partial(replay if entry.captured else advance, entry.steps)
    return measure(run, device, milliseconds=milliseconds, calls=entry.steps), state_bytes([optimizer])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see the module docstring."""
    arguments = parse_arguments("bench_step", "Time one step of Butterfly and of other optimizers.", argv)
    device: torch.device = arguments.device
    gpu = device.type == "cuda"
    if not gpu:
        note("no GPU used: 4096x4096, 50304x768, ResNet-18 and GPT-2 124M are skipped, small lists run instead")
    copy = copy_bandwidth(device)
    note(f"copy {copy / 1e9:.1f} GB/s (read + written); fused AdamW moves 28 bytes an element")
    milliseconds = arguments.milliseconds or (2000 if gpu else 100)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(arguments.output.open("w", newline="")) if arguments.output else sys.stdout
        writer = RowWriter(file, COLUMNS, environment(device))
        lists = list(gpu_lists() if gpu else cpu_lists())
        for entry in entries(device):
            for label, shapes in lists:
                elements = sum(torch.Size(shape).numel() for shape in shapes)
                try:
                    timing, held = time_entry(entry, shapes, device, milliseconds=milliseconds)
                except torch.OutOfMemoryError:
                    note(f"{entry.name} ({entry.options}) on {label} is skipped: out of memory")
                    continue
                writer.write({
                    "parameters": label,
                    "tensors": len(shapes),
                    "elements": elements,
                    "optimizer": entry.name,
                    "options": entry.options,
                    "steps": entry.steps,
                    "warmup": entry.warmup,
                    "median_ms": timing.median * 1e3,
                    "p20_ms": timing.low * 1e3,
                    "p80_ms": timing.high * 1e3,
                    "samples": timing.samples,
                    "elements_per_s": elements / timing.median,
                    "copied_bytes_per_element": timing.median * copy / elements,
                    "copy_bytes_per_s": copy,
                    "state_bytes_per_element": held / elements,
                })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

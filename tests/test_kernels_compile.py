"""Every kernel compiles for a GPU, on a machine without one: Triton's interpreter checks no types and no layouts.

Run as a program with a compute capability, this file takes steps as users do, on CPU tensors, with Triton's launch
replaced by its compilation; it prints the kernels that came out.
"""

import os
import subprocess
import sys
from typing import Any

import pytest

KERNELS = {"_forth_kernel", "_means_kernel", "_back_kernel", "_observe_kernel", "_refit_kernel"}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize(
    "capability",
    ["90", pytest.param("80", marks=pytest.mark.skipif("BUTTERFLY_ALL_LENGTHS" not in os.environ, reason="minutes"))],
)
def test_kernels_compile_for_a_gpu(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    finished = subprocess.run(
        [sys.executable, __file__, capability], env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert set(finished.stdout.split()) == KERNELS


def compile_all(capability: int) -> set[str]:
    """Takes steps of both diagonals and plans; returns the names of the kernels that were compiled."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from butterfly_opt import collectives, fused, step
    from butterfly_opt.layout import axes_layout
    from butterfly_opt.stack import Cohort, Gate, Stack, new_state

    class Driver:
        """What a compilation asks of the driver of a GPU."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    compiled = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, warmup=True, **options)
        assert kernel.asm["cubin"]
        # More than a multiprocessor lends to one program could not be launched: 99 KiB where it lends least.
        assert kernel.metadata.shared <= 101376
        compiled.add(kernel.name)

    driver.set_active(Driver())
    JITFunction.run = compile_only
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((70, 128), {"diagonal": "secant", "weight_decay": 0.1, "maximize": True}),
        ((12, 14), {"block": 8, "lead": 2, "capturable": True, "dtype": torch.bfloat16, "stochastic_rounding": True}),
        ((7, 300), {"block": 2, "lead": 2, "dtype": torch.float16, "weight_decay": 0.1}),
        ((1,), {"diagonal": "secant"}),
    ]
    defaults = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False,
                "maximize": False, "capturable": False, "stochastic_rounding": False, "diagonal": "innovation",
                "block": 64, "lead": 16, "refit_every": 2, "structure": "axes", "batch_dims": 0,
                "cross_shard": True}  # fmt: skip
    # The older generation compiles the largest tiles only: what it has less of is shared memory.
    for shape, own in cases if capability == 90 else cases[:1]:
        options = {**defaults, **own}
        dtype, pairs = options.pop("dtype", torch.float32), []
        # Of two phases: one refits, the other takes its moments within the step.
        for phase in (0, 1):
            param = torch.zeros(shape, dtype=dtype)
            param.grad = torch.ones_like(param)
            layout = axes_layout(param, 0)
            state = new_state(layout, options)
            state["calls"] = 2
            pairs.append((Stack([layout], [state], options, phase), torch.ones(1, dtype=torch.bool)))
        stacks = [stack for stack, _ in pairs]
        usable = torch.ones(len(stacks), dtype=torch.bool)
        step.count_steps_(Cohort(stacks), Gate(usable, usable, usable.float()))
        collectives.run([fused.take_steps_(pairs)])
    return compiled


if __name__ == "__main__":
    print(*sorted(compile_all(int(sys.argv[1]))))

"""Every kernel compiles for a GPU, on a machine without one: Triton's interpreter checks no types and no layouts.

Run as a program, this file launches each wrapper as its users do, on CPU tensors, with Triton's launch replaced
by its compilation for compute capability 9.0; it prints the kernels that came out.
"""

import os
import subprocess
import sys
from typing import Any

import pytest

KERNELS = {"_rotate_kernel", "_gradient_kernel", "_refit_kernel", "_angles_kernel", "_moments_kernel",
           "_sum_partials_kernel", "_direction_kernel", "_write_kernel", "_product_kernel",
           "_fill_kernel"}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    finished = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert set(finished.stdout.split()) == KERNELS


def compile_all() -> set[str]:
    """Launches every wrapper; returns the names of the kernels that were compiled."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from butterfly_opt.triton_kernels import launch, refit, rotate, sketch, step, table, write

    class Driver:
        """What a compilation asks of the driver of a GPU."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    compiled = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, warmup=True, **options)
        assert kernel.asm["cubin"]
        compiled.add(kernel.name)

    driver.set_active(Driver())
    JITFunction.run = compile_only
    launch.can_launch_on = lambda device: True

    for shape in ((3, 20, 1), (1, 20, 9)):
        x, cos = torch.zeros(shape), torch.ones(2, 5, 10)
        for columns in (x, [x.bfloat16(), x.half(), x]):
            rotate.rotate_columns(columns, cos, cos)
            rotate.rotate_columns(columns, cos, cos, transpose=True, max_tile=32)
        rotate.angle_gradient(x, x.bfloat16(), cos, cos, max_tile=32)
    columns, angles = torch.zeros(20, 8), torch.zeros(2, 5, 10)
    for refit.MAX_WINDOW in (8192, 16):
        for taken, owned in ((torch.tensor(0.0), None), (angles, angles)):
            options = {"steps": 1, "refit_lr": 0.1, "taken": taken, "owned": owned, "max_tile": 128}
            refit.refit_sketch_(columns, angles, angles, angles, **options)
    for shape in ((1, 1, 20, 9), (2, 9, 20, 1), (1, 3, 20, 16)):
        sketch.sketch_product(torch.zeros(shape), torch.zeros(shape[0], shape[1] * shape[3], 8))
    table._fill(range(10), torch.device("cpu"))
    x, scalars = [torch.zeros(5000)], torch.zeros(1, 6)
    sums = torch.zeros(1, 2)
    numbers = {"eps": 1e-8, "max_update": 3.0}
    step.moments_(step.moments_table(x, x, x), scalars)
    step.moments_(step.moments_table(x, x, x, displacements=x, disp_sqs=x, crosses=x), scalars)
    step.direction_(step.direction_table(x, x, x), scalars, **numbers)
    for moved in (None, x):
        directions = step.direction_table(x, x, x, disp_sqs=x, crosses=x, displacements=moved)
        step.direction_(directions, scalars, **numbers, beta2=0.9, sums=sums)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tracked in (None, x):
            params = [x[0].to(dtype)]
            writes = write.write_table(params, x, written=tracked, streams=[1 << 31])
            write.write_(writes, scalars, weight_decay=0.1)
            if dtype == torch.bfloat16:
                for seed in (0, 1, 1 << 32):
                    write.write_(writes, scalars, rounding_seed=seed)
    return compiled


if __name__ == "__main__":
    print(*sorted(compile_all()))

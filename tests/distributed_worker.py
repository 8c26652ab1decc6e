"""One process of ``test_distributed.py``, started by torchrun: ``distributed_worker.py REPORT.json``.

Rank 0 writes what was found; the test judges it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from butterfly_opt import Butterfly

REPLICA_STEPS, LONG_STEPS, SMOOTH_STEPS, CONTROL_STEPS = 200, 400, 20, 5
MODES: dict[str, dict[str, Any]] = {
    "axes, innovation": {},
    "axes, secant, several stages": {"diagonal": "secant", "block": 4, "lead": 2},
    "flat, secant": {"structure": "flat", "diagonal": "secant"},
}


def network(activation: type[nn.Module], dtype: torch.dtype) -> nn.Sequential:
    """The same on every rank, without touching the global generator."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 5), activation(), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=dtype) / param.shape[-1] ** 0.5)
    return model


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The joint batch of a step: 32 noisy samples."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(32, 6, generator=generator, dtype=dtype)
    noise = torch.randn(32, 3, generator=generator, dtype=dtype)
    return inputs, inputs[:, :3].sin() + 0.1 * noise


def train(model: nn.Module, optimizer: Butterfly, steps: int, share: Callable[[Tensor], Tensor]) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        inputs, targets = map(share, batch(step, dtype))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def own_share(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def train_replica(options: dict[str, Any], steps: int, activation: type[nn.Module], dtype: torch.dtype) -> Any:
    model = network(activation, dtype)
    optimizer = Butterfly(model.parameters(), **{"lr": 0.01, **options})
    train(DistributedDataParallel(model), optimizer, steps, own_share)
    return model, optimizer


def replicas_differ(model: nn.Module, optimizer: Butterfly) -> int:
    """Numbers of parameters and state in which some rank differs from rank 0."""
    tensors = [p.detach() for p in model.parameters()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    flat = torch.cat([tensor.flatten().double() for tensor in tensors])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    assert not flat.isnan().any()
    return max(int((other != gathered[0]).sum()) for other in gathered)


def distance_from_one_process(options: dict[str, Any]) -> tuple[float, float]:
    """Largest difference to the run on the joint batch, and largest motion of that run."""
    replica, _ = train_replica(options, SMOOTH_STEPS, nn.Tanh, torch.float64)
    alone, start = network(nn.Tanh, torch.float64), network(nn.Tanh, torch.float64)
    train(alone, Butterfly(alone.parameters(), **{"lr": 0.01, **options}), SMOOTH_STEPS, lambda x: x)

    def largest(left: nn.Module, right: nn.Module) -> float:
        pairs = zip(left.parameters(), right.parameters(), strict=True)
        return max((x.detach() - y.detach()).abs().max().item() for x, y in pairs)

    return largest(replica, alone), largest(alone, start)


def uneven_replicas_differ() -> int:
    """Replicas after LONG_STEPS steps with shares of different sizes and a layer that is frozen."""
    model = network(nn.ReLU, torch.float32)
    model[2].requires_grad_(False)
    optimizer = Butterfly(model.parameters(), lr=0.01)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = [32 // ranks - 3] * (ranks - 1)
    train(DistributedDataParallel(model), optimizer, LONG_STEPS, lambda x: x.split([*sizes, 32 - sum(sizes)])[rank])
    return replicas_differ(model, optimizer)


def main() -> None:
    """Runs all checks and writes the report."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report: dict[str, Any] = {"world_size": dist.get_world_size(), "replicas": {}, "smooth": {}}
    for name, options in MODES.items():
        report["replicas"][name] = replicas_differ(*train_replica(options, REPLICA_STEPS, nn.ReLU, torch.float32))
        report["smooth"][name] = distance_from_one_process(options)
    refits = {"refit_every": 1 + dist.get_rank() % 2}
    report["control"] = replicas_differ(*train_replica(refits, CONTROL_STEPS, nn.ReLU, torch.float32))
    report["uneven"] = uneven_replicas_differ()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()  # gloo's threads may abort where one process leaves while another still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

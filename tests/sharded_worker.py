"""One process of ``test_sharded.py``, started by torchrun: ``sharded_worker.py FOLDER``.

Rank 0 writes what was found to ``FOLDER/<processes>.json``; the test judges it.
"""

import copy
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_reference import rotate_in_segments
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from butterfly_opt import Butterfly, sharding

SMALL: dict[str, Any] = {"lr": 0.01, "block": 8, "lead": 2}
"""Small blocks: small shards then have stages of their own."""

STEPS = 24
"""Of a run: a start, and refits in every second step."""

SHAPES = [(40, 12), (30, 20), (9, 24), (3, 5), (17,), (24, 16)]
"""Equal, uneven, short and (on four processes) empty shards."""


def chunks(n: int, parts: int) -> list[int]:
    """The lengths of ``torch.chunk``, empty parts included."""
    part = -(-n // parts)
    return [max(0, min(part, n - i * part)) for i in range(parts)]


def start(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) / 3 for shape in shapes]


def gradient_of(weights: list[Tensor], step: int) -> list[Tensor]:
    """The noisy gradient of a quadratic that couples neighbouring rows."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for w in weights:
        scale = torch.arange(1, w.numel() + 1, dtype=w.dtype).view(w.shape).sqrt() / w.numel()
        noise = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        found.append((w.roll(1, 0) + w + 0.1 * noise) * scale)
    return found


def sharded_run(
    weights: list[Tensor], mesh: Any, placements: list[Any], steps: int, **options: Any
) -> tuple[list[nn.Parameter], Butterfly]:
    """Parameters after some steps, and their optimizer."""
    params = [nn.Parameter(distribute_tensor(w.clone(), mesh, placements)) for w in weights]
    optimizer = Butterfly([{"params": params, **options}], **SMALL)
    for step in range(steps):
        whole = [p.detach().full_tensor() for p in params]
        for param, grad in zip(params, gradient_of(whole, step), strict=True):
            param.grad = distribute_tensor(grad, mesh, placements)
        optimizer.step()
    return params, optimizer


def whole_run(weights: list[Tensor], steps: int, **options: Any) -> list[nn.Parameter]:
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Butterfly([{"params": params, **options}], **SMALL)
    for step in range(steps):
        for param, grad in zip(params, gradient_of([p.detach() for p in params], step), strict=True):
            param.grad = grad
        optimizer.step()
    return params


def segments(shapes: list[tuple[int, ...]], mesh_shape: tuple[int, ...], placements: list[Any]) -> dict[Any, list[int]]:
    """The parts of every axis that is cut: (length, dim) -> lengths."""
    found = {}
    for shape in (shape for shape in shapes if len(shape) > 1):
        for parts, placement in zip(mesh_shape, placements, strict=True):
            if isinstance(placement, Shard) and parts > 1:
                unit = torch.Size(shape[2:]).numel() if placement.dim == 1 else 1
                own = [n * unit for n in chunks(shape[placement.dim], parts)]
                found[sum(own), placement.dim - 2] = own
    return found


def distance_from_one_process(
    shapes: Any, mesh_shape: Any, placements: Any, *, most: int = SMALL["lead"], **options: Any
) -> tuple[float, float]:
    """Largest difference to the run of one process with the same plan, and its largest motion."""
    mesh, weights = init_device_mesh("cpu", mesh_shape), start(shapes)
    params, _ = sharded_run(weights, mesh, placements, STEPS, **options)
    found = [p.detach().full_tensor() for p in params]
    if dist.get_rank():
        return 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        rotate_in_segments(patch, segments(shapes, mesh_shape, placements), most=most)
        alone = whole_run(weights, STEPS, **options)
    largest = max((a - b).abs().max().item() for a, b in zip(found, alone, strict=True))
    return largest, max((a - b).abs().max().item() for a, b in zip(weights, alone, strict=True))


def distances(ranks: int) -> dict[str, tuple[float, float]]:
    matrices, secant = [shape for shape in SHAPES if len(shape) > 1], {"diagonal": "secant"}
    if ranks == 2:
        return {
            "rows, secant": distance_from_one_process(SHAPES, (2,), [Shard(0)], **secant),
            "columns, secant": distance_from_one_process(matrices, (2,), [Shard(1)], **secant),
            "input channels": distance_from_one_process([(16, 6, 3, 3), (24, 10)], (2,), [Shard(1)]),
            "replicated": distance_from_one_process(SHAPES, (2,), [Replicate()]),
            "shares": distance_from_one_process([(130, 12)], (2,), [Shard(0)]),
        }
    with pytest.MonkeyPatch.context() as patch:
        # As of many shards: one output of each goes on.
        patch.setattr(sharding, "MAX_MEETING", 1)
        few = distance_from_one_process(SHAPES, (4,), [Shard(0)], most=1)
    return {
        "few heads": few,
        "rows": distance_from_one_process(SHAPES, (4,), [Shard(0)]),
        "experts": distance_from_one_process([(5, 12, 9), (2, 20, 6)], (4,), [Shard(0)], batch_dims=1),
        "replicas of shards": distance_from_one_process(SHAPES, (2, 2), [Replicate(), Shard(0)]),
        "rows and columns": distance_from_one_process(matrices, (2, 2), [Shard(0), Shard(1)], **secant),
    }


def local_tensors(params: Any, optimizer: Butterfly) -> list[Tensor]:
    tensors = [p.detach() for p in params]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def replicas_differ() -> int:
    """Numbers in which replicas of shards differ, in float32 with noise of their own rounding."""
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Replicate(), Shard(0)]
    own = local_tensors(*sharded_run(start(SHAPES, torch.float32), mesh, placements, STEPS, diagonal="secant"))
    flat = torch.cat([tensor.flatten().double() for tensor in own])
    gathered = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(gathered, flat, group=mesh.get_group(0))
    assert not flat.isnan().any()
    return int((gathered[0] != gathered[1]).sum())


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives that are called meanwhile."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_single", "all_gather_into_tensor", "all_gather", "broadcast"):
            if hasattr(dist, name):
                patch.setattr(dist, name, counting(counts, name, getattr(dist, name)))
        yield counts


def counting(counts: Counter[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **keywords: Any) -> Any:
        counts[name] += 1
        return call(*args, **keywords)

    return wrapper


def collectives(mesh: Any, copies: int, **options: Any) -> list[int]:
    """How many collectives each of 12 steps takes, of a list of so many copies of all shapes."""
    params = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in start(SHAPES * copies)]
    optimizer = Butterfly([{"params": params, **options}], **SMALL)
    counts = []
    for step in range(12):
        for param, grad in zip(params, gradient_of(start(SHAPES * copies), step), strict=True):
            param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        with counted() as own:
            optimizer.step()
        counts.append(own.total())
    return counts


def shards_alone(mesh: Any) -> bool:
    """Whether without ``cross_shard`` a shard steps as a matrix of its own, bit for bit."""
    same = True
    for weight in start([(40, 12), (30, 20), (17,)]):
        (param,), optimizer = sharded_run([weight], mesh, [Shard(0)], 0, cross_shard=False)
        own = nn.Parameter(param.detach().to_local().clone())
        alone = Butterfly([own], **SMALL)
        for step in range(30):
            param.grad = distribute_tensor(gradient_of([weight], step)[0], mesh, [Shard(0)])
            own.grad = param.grad.to_local().clone()
            optimizer.step()
            alone.step()
        same &= torch.equal(param.detach().to_local(), own)
    return same


def skips(mesh: Any) -> dict[str, Any]:
    """A non-finite gradient in one shard: every process skips the step of that tensor, and of it alone."""
    params, optimizer = sharded_run(start(SHAPES), mesh, [Shard(0)], 5)
    before = [p.detach().full_tensor().clone() for p in params]
    for i, param in enumerate(params):
        grad = torch.ones(param.shape, dtype=param.dtype)
        if i == 0:
            grad.view(-1)[0] = float("nan")
        param.grad = distribute_tensor(grad, mesh, [Shard(0)])
    with warnings.catch_warnings(record=True):
        optimizer.step()
    still = [torch.equal(p.detach().full_tensor(), old) for p, old in zip(params, before, strict=True)]
    numbers = optimizer.diagnostics()[0]["tensors"]
    return {"still": still, "skipped": [t["nonfinite_steps"] for t in numbers], "steps": [t["steps"] for t in numbers]}


def model() -> nn.Sequential:
    """The same on every rank, without touching the global generator."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 26), nn.Tanh(), nn.Linear(26, 3))
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / param.shape[-1] ** 0.5)
    return net


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The joint batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(32, 10, generator=generator)
    return inputs, inputs[:, :3].sin()


def own_share(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def sharded_model(wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> Any:
    net = wrap(model())
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(net)


def train(net: nn.Module, optimizer: Any, steps: range, **how: Any) -> float:
    """The loss after the last step, on data that all processes share."""
    scaler, clip = how.get("scaler"), how.get("clip")
    for step in steps:
        inputs, targets = map(own_share, batch(step))
        optimizer.zero_grad() if optimizer else None
        loss = nn.functional.mse_loss(net(inputs), targets)
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        elif optimizer:
            optimizer.step()
    with torch.no_grad():
        inputs, targets = batch(1000)
        return nn.functional.mse_loss(net(inputs), targets).item()


def recipes() -> dict[str, float]:
    """The last loss of training with what else scripts use beside FSDP2."""
    # Refits in every step: those of an optimizer for each parameter would come at other steps.
    options: dict[str, Any] = {"lr": 0.01, "refit_every": 1}
    found, steps = {}, range(30)
    net = sharded_model()
    found["plain"] = train(net, Butterfly(net.parameters(), **options), steps)
    net = sharded_model()
    found["clipped"] = train(net, Butterfly(net.parameters(), **options), steps, clip=0.5)
    net = sharded_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found["scaled"] = train(net, Butterfly(net.parameters(), **options), steps, scaler=scaler)
    net = torch.compile(sharded_model(), backend="eager")
    found["compiled"] = train(net, Butterfly(net.parameters(), **options), steps)
    net = sharded_model(lambda m: nn.Sequential(*(checkpoint_wrapper(x) if isinstance(x, nn.Linear) else x for x in m)))
    found["checkpointed"] = train(net, Butterfly(net.parameters(), **options), steps)
    net = sharded_model()
    own = {param: Butterfly([param], **options) for param in net.parameters()}
    for param in net.parameters():

        def step_in_backward(p: Any) -> None:
            own[p].step()
            own[p].zero_grad()

        param.register_post_accumulate_grad_hook(step_in_backward)
    found["in backward"] = train(net, None, steps)
    net = DistributedDataParallel(model())
    zero = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=Butterfly, **options)
    found["ZeroRedundancyOptimizer"] = train(net, zero, steps)
    net = DistributedDataParallel(model())
    found["DistributedDataParallel"] = train(net, Butterfly(net.parameters(), **options), steps)
    return found


def whole(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().full_tensor().flatten() for p in net.parameters()])


def momentum(optimizer: Butterfly) -> Tensor:
    return torch.cat([state["exp_avg"].full_tensor().flatten() for state in optimizer.state.values()])


def save(net: Any, optimizer: Butterfly, folder: Path, *, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {"m": get_model_state_dict(net), "o": get_optimizer_state_dict(net, optimizer, options=options)}
    dcp.save(state, checkpoint_id=folder)


def load(folder: Path, *, flatten: bool) -> tuple[Any, Butterfly, list[str]]:
    """A fresh model and optimizer with a saved state, and what was warned of."""
    net = sharded_model()
    optimizer = Butterfly(net.parameters(), **SMALL)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    found = {"m": get_model_state_dict(net), "o": get_optimizer_state_dict(net, optimizer, options=options)}
    dcp.load(found, checkpoint_id=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_model_state_dict(net, found["m"])
        set_optimizer_state_dict(net, optimizer, found["o"], options=options)
    return net, optimizer, [str(w.message) for w in caught if "states are those" in str(w.message)]


def first_save(folder: Path) -> dict[str, Any]:
    """Saves a run in the middle; goes on, and is resumed on as many processes."""
    net = sharded_model()
    optimizer = Butterfly(net.parameters(), **SMALL)
    train(net, optimizer, range(40))
    found: dict[str, Any] = {}
    for flatten in (False, True):
        save(net, optimizer, folder / f"flat{flatten}", flatten=flatten)
    found["weights"], found["momentum"] = whole(net).tolist(), momentum(optimizer).tolist()
    resumed = [load(folder / f"flat{flatten}", flatten=flatten) for flatten in (False, True)]
    found["loss"] = train(net, optimizer, range(40, 60))
    for again, again_optimizer, warned in resumed:
        assert not warned
        train(again, again_optimizer, range(40, 60))
    found["resumed"] = [torch.equal(whole(again), whole(net)) for again, _, _ in resumed]
    return found


def resharded(folder: Path, into: Path) -> dict[str, Any]:
    """Loads what was saved on another number of processes, saves it again, and trains on."""
    net, optimizer, warned = load(folder, flatten=False)
    found = {"weights": whole(net).tolist(), "momentum": momentum(optimizer).tolist(), "warned": len(warned)}
    save(net, optimizer, into, flatten=False)
    found["loss"] = train(net, optimizer, range(40, 60))
    return found


def full_state() -> dict[str, Any]:
    """Through an ordinary, whole state dict: into one process, and back."""
    net = sharded_model()
    optimizer = Butterfly(net.parameters(), **SMALL)
    train(net, optimizer, range(20))
    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    weights = get_model_state_dict(net, options=options)
    alone = model()
    set_model_state_dict(alone, weights)
    single = Butterfly(alone.parameters(), **SMALL)
    with warnings.catch_warnings(record=True):
        set_optimizer_state_dict(alone, single, state, options=options)
    taken = torch.cat([s["exp_avg"].flatten() for s in single.state.values()])
    again = sharded_model()
    back = Butterfly(again.parameters(), **SMALL)
    with warnings.catch_warnings(record=True):
        set_optimizer_state_dict(again, back, get_optimizer_state_dict(alone, single, options=options), options=options)
    train(again, back, range(20, 22))
    return {"alone": torch.equal(taken, momentum(optimizer)), "finite": bool(whole(again).isfinite().all())}


def refusals(mesh: Any) -> dict[str, str]:
    """What is said to parameters that hide their matrix, and to options that need whole ones."""
    said = {}
    cut = [nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))]

    def flattened(*, use_orig_params: bool) -> Any:
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model(), use_orig_params=use_orig_params, device_id=cpu).parameters()

    cases: dict[str, Callable[[], Any]] = {
        "FSDP1": lambda: Butterfly(flattened(use_orig_params=False)),
        "FSDP1, original": lambda: Butterfly(flattened(use_orig_params=True)),
        "flat": lambda: Butterfly(cut, structure="flat"),
        "newton": lambda: Butterfly(cut, diagonal="newton"),
        "full plan": lambda: Butterfly(cut, block=4, lead=4),
        "second axis of experts": lambda: Butterfly(
            [{"params": [nn.Parameter(distribute_tensor(torch.ones(2, 4, 3, 3), mesh, [Shard(1)]))], "batch_dims": 2}]
        ),
        "third axis": lambda: Butterfly([nn.Parameter(distribute_tensor(torch.ones(4, 4, 4), mesh, [Shard(2)]))]),
    }
    for name, make in cases.items():
        try:
            make()
        except (NotImplementedError, ValueError) as error:
            said[name] = str(error)
    return said


def main() -> None:
    """Runs the checks for this number of processes and writes the report."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, ranks = Path(sys.argv[1]), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    name = str(ranks)
    if ranks == 4 and (folder / "4.json").exists():
        name, report = "4 again", {"resharded": resharded(folder / "from1", folder / "from1to4")}
    elif ranks == 4:
        report = {
            "distances": distances(ranks),
            "replicas": replicas_differ(),
            "collectives": {copies: collectives(mesh, copies) for copies in (1, 3)},
            "silent": sum(collectives(mesh, 1, cross_shard=False)),
            "alone": shards_alone(mesh),
            "skips": skips(mesh),
            "saved": first_save(folder),
            "full": full_state(),
        }
    elif ranks == 2:
        report = {
            "resharded": resharded(folder / "flatFalse", folder / "from2"),
            "distances": distances(ranks),
            "recipes": recipes(),
            "refusals": refusals(mesh),
        }
    else:
        report = {"resharded": resharded(folder / "from2", folder / "from1")}
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

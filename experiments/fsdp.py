"""Training with FSDP2 on several processes beside one: `python -m experiments.fsdp`.

The transformer of the quick suite, on text that ships with Python, is trained from the same weights on the same joint
batches

    one process         the whole model
    shards that meet    N processes, `fully_shard` over gloo on this machine: rows are cut, their leading outputs meet
    shards alone        the same with `cross_shard=False`: every shard is a matrix of its own, no communication
    Adam, one process   at the rate of the suite, for a sense of the differences

The plan of a cut axis has other groups than that of a whole one, so the losses of the first two are close and not
equal. A process receives of an all-gather what the others send, and of an all-reduce of `b` bytes twice
`b (N - 1) / N`, as in a ring. Milliseconds are the median of `optimizer.step` on rank 0; processes that share cores
wait for each other. Writes into the output folder

    fsdp.csv    one row a run
    fsdp.md     the table, means over the seeds
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from butterfly_opt import Butterfly
from butterfly_opt.dtensor import local
from experiments.config import ConfigError
from experiments.optimizers import build_scheduler
from experiments.problems import Problem, build_problem
from experiments.suite import TaskConfig, code_digest, load_suite
from experiments.train import Parser, exit_code

SUITE = Path(__file__).parent.parent / "configs" / "suites" / "quick.yaml"
CASES = ("one process", "shards that meet", "shards alone", "Adam, one process")
COLLECTIVES = tuple(
    name
    for name in ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast")
    if hasattr(dist, name)
)
"""Of ``torch.distributed``, as far as this torch has them."""

WATCHED = 20
"""Two periods of refits; past the first 100 steps, in which there are more."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: its loss over the last tenth of the steps, and what a step of rank 0 costs.

    Attributes:
        case: of CASES.
        processes: number of them.
        seed: of weights and batches.
        steps: number of them.
        lr: largest rate of the schedule.
        loss: training loss of the joint batches, the mean over the last tenth of the steps.
        validation: loss on the validation text after the last step, of the whole model.
        step_ms: median time of ``optimizer.step``.
        collectives: calls a step, the mean over the last WATCHED steps.
        received: bytes a step, the mean over the same.
        state_bytes: of the optimizer, in this process.
    """

    case: str
    processes: int
    seed: int
    steps: int
    lr: float
    loss: float
    validation: float
    step_ms: float
    collectives: float
    received: float
    state_bytes: int


@dataclasses.dataclass
class Traffic:
    """Collectives called, and bytes that this process received by them."""

    calls: int = 0
    received: float = 0.0


@contextlib.contextmanager
def watched_traffic() -> Iterator[Traffic]:
    """Counts the collectives of ``torch.distributed`` that are called meanwhile.

    Those of the optimizer: FSDP's own, in forward and backward, are not called there.
    """
    traffic = Traffic()
    known = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            ranks = dist.get_world_size(keywords.get("group"))
            traffic.calls += 1
            traffic.received += received(name, args[0], ranks)
            return known[name](*args, **keywords)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield traffic
    finally:
        for name, original in known.items():
            setattr(dist, name, original)


def received(name: str, output: Any, ranks: int) -> float:
    """Bytes that each of so many processes receives by one collective with this output."""
    tensors = output if isinstance(output, Sequence) else [output]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Of a sum in a ring every process receives each part once to add to it, and once as it ends up.
    return size * (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks


def load_task() -> TaskConfig:
    """The transformer of the quick suite."""
    return load_suite(SUITE, []).tasks["transformer"]


def build_optimizer(case: str, model: nn.Module, lr: float) -> Optimizer:
    """The optimizer of a case."""
    if case == CASES[3]:
        return torch.optim.Adam(model.parameters(), lr=lr)
    group = {"params": list(model.parameters()), "cross_shard": case != CASES[2]}
    return Butterfly([group], lr=lr)


def build(case: str, seed: int) -> Problem:
    """The problem, with its model in shards where there are several processes."""
    problem = build_problem(load_task().problem, seed=seed, device=torch.device("cpu"))
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard  # slow to import

        for block in problem.model.get_submodule("blocks").children():
            fully_shard(block)
        fully_shard(problem.model)
    return problem


def train(case: str, *, seed: int, steps: int, lr: float) -> Trial:
    """Trains in this process, and in all others of its group if there is one; the trial is that of rank 0."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    problem = build(case, seed)
    optimizer = build_optimizer(case, problem.model, lr)
    usual = load_task().schedule
    schedule = dataclasses.replace(usual, warmup_steps=min(usual.warmup_steps, steps // 8))
    scheduler = build_scheduler(optimizer, schedule, steps)
    losses, seconds, traffic = [], [], []
    for _ in range(steps):
        # Every process draws the joint batch and takes its part, of equal size: the mean of the means is the mean.
        loss = problem.loss(problem.next_batch().chunk(ranks)[rank])
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        with watched_traffic() as own:
            optimizer.step()
        seconds.append(time.perf_counter() - start)
        scheduler.step()
        losses.append(loss.detach())
        traffic.append(own)
    joint, late = torch.stack(losses), traffic[-WATCHED:]
    if ranks > 1:
        dist.all_reduce(joint)
    trial = Trial(
        case=case,
        processes=ranks,
        seed=seed,
        steps=steps,
        lr=lr,
        loss=float(joint[-max(1, steps // 10) :].mean()) / ranks,
        validation=problem.metric(),
        step_ms=1e3 * statistics.median(seconds),
        collectives=statistics.fmean(item.calls for item in late),
        received=statistics.fmean(item.received for item in late),
        state_bytes=state_bytes(optimizer),
    )
    if rank == 0:
        print(f"{case}, seed {seed}: loss {trial.loss:.4f}, {trial.step_ms:.0f} ms a step", flush=True)
    return trial


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state in this process."""
    own = [local(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _work(rank: int, processes: int, folder: str, seeds: Sequence[int], steps: int, lr: float) -> None:
    """One of several processes: trains the two cases that are cut; rank 0 writes its trials."""
    torch.set_num_threads(1)
    # Logits are a view, as those of every linear layer on sequences; nothing is written into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    store = dist.FileStore(str(Path(folder) / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    try:
        trials = [train(case, seed=seed, steps=steps, lr=lr) for seed in seeds for case in CASES[1:3]]
    finally:
        dist.destroy_process_group()
    if rank == 0:
        write_csv(Path(folder) / "trials.csv", trials)


def train_sharded(processes: int, seeds: Sequence[int], steps: int, lr: float) -> list[Trial]:
    """The trials of both cases that are cut, each process on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        # Spawned: gloo does not survive a fork. Where one process fails, the others are ended and its error is raised.
        torch.multiprocessing.spawn(_work, args=(processes, folder, list(seeds), steps, lr), nprocs=processes)
        return read_csv(Path(folder) / "trials.csv")


def write_csv(path: Path, trials: Sequence[Trial]) -> None:
    """One row a trial."""
    from experiments.paper_files import write_rows  # matplotlib is slow to import

    write_rows(path, trials)


def read_csv(path: Path) -> list[Trial]:
    """What `write_csv` wrote."""
    kinds = {"str": str, "int": int, "float": float}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    fields = dataclasses.fields(Trial)
    return [Trial(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields}) for row in rows]


def format_page(trials: Sequence[Trial]) -> str:
    """The Markdown page: what was run and the table, means over the seeds."""
    header = ("run", "processes", "lr", "loss", "of seeds", "validation loss", "ms a step", "collectives a step",
              "KB received a step", "state KB a process")  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for case in CASES:
        own = [trial for trial in trials if trial.case == case]
        mean = {name: statistics.fmean(getattr(t, name) for t in own)
                for name in ("loss", "validation", "step_ms", "collectives", "received", "state_bytes")}  # fmt: skip
        cells = [case, str(own[0].processes), f"{own[0].lr:g}", f"{mean['loss']:.4f}",
                 " ".join(f"{trial.loss:.4f}" for trial in own), f"{mean['validation']:.4f}",
                 f"{mean['step_ms']:.1f}", f"{mean['collectives']:.1f}", f"{mean['received'] / 1e3:.1f}",
                 f"{mean['state_bytes'] / 1e3:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    differences = [paired(trials, case) for case in CASES[1:]]
    processes = max(trial.processes for trial in trials)
    seeds = ", ".join(str(trial.seed) for trial in trials if trial.case == CASES[0])
    return "\n".join([
        f"# FSDP2 on {processes} processes beside one",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, gloo, one thread a process on "
        f"{os.cpu_count()} cores; butterfly_opt {code_digest()}. The transformer of the quick suite, the same weights "
        f"and joint batches for all, {trials[0].steps} steps, seeds {seeds}. Loss: training loss over the last tenth "
        f"of the steps. Milliseconds (median), collectives and bytes (means of the last {WATCHED}) are those "
        "of `optimizer.step` on rank 0; more processes than cores wait for each other. Of `shards that meet` the plan "
        "is cut at the borders of the shards: it is close to that of one process, and not the same.",
        "",
        *lines,
        "",
        "Loss above one process, mean over the seeds (range): " + "; ".join(differences) + ".",
        "",
    ])  # fmt: skip


def paired(trials: Sequence[Trial], case: str) -> str:
    """The differences of a case to one process with the same seed, in words."""
    first = {trial.seed: trial.loss for trial in trials if trial.case == CASES[0]}
    found = [trial.loss - first[trial.seed] for trial in trials if trial.case == case]
    return f"{case} {statistics.fmean(found):+.4f} ({min(found):+.4f} to {max(found):+.4f})"


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for an option out of its bounds."""
    batch = load_task().problem.keywords["batch_size"]
    processes = arguments.processes
    if not 2 <= processes <= batch or batch % processes:
        raise ConfigError(f"--processes must be a divisor of the batch of {batch}, 2 or more, got {processes}")
    if arguments.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {arguments.steps}")
    if not 0 < arguments.lr < float("inf"):
        raise ConfigError(f"--lr must be positive, got {arguments.lr}")


def _command(argv: Sequence[str] | None) -> int:
    rates = load_task().rates
    parser = Parser(prog="python -m experiments.fsdp", description="FSDP2 on several processes beside one.")
    parser.add_argument("--processes", type=int, default=4, help="number of shards (default: 4)")
    parser.add_argument("--steps", type=int, default=120, help="steps of a run (default: 120)")
    parser.add_argument("--lr", type=float, default=rates["butterfly"], help="of Butterfly (default: the suite's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp"), help="output folder")
    arguments: argparse.Namespace = parser.parse_args(argv)
    _check(arguments)
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError("this build of torch has no gloo")
    torch.set_num_threads(1)
    steps, seeds = arguments.steps, list(dict.fromkeys(arguments.seeds))
    adams = rates["adam_99"]
    trials = [train(CASES[0], seed=seed, steps=steps, lr=arguments.lr) for seed in seeds]
    trials += train_sharded(arguments.processes, seeds, steps, arguments.lr)
    trials += [train(CASES[3], seed=seed, steps=steps, lr=adams) for seed in seeds]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "fsdp.csv", trials)
    page = format_page(trials)
    (arguments.out / "fsdp.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

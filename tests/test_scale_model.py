"""experiments.scale_model.

Oracle: the state and the collectives of a real optimizer on the first of eight shards, whose peers a fake process group
stands for; the published sizes of the models.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract import made_stacks
from torch import nn

from butterfly_opt import Butterfly
from butterfly_opt.sharding import ShardedRotation
from experiments import scale_model
from experiments.fsdp import state_bytes, watched_traffic
from experiments.scale_model import MODELS, Weight, butterfly, muon, shard, soap

RANKS = 8

WEIGHTS = [
    Weight((400, 150)),  # both axes in stages, of the shard too
    Weight((90, 40), copies=2),  # uneven shards, dense axes
    Weight((40, 24)),  # a shard hardly longer than lead
    Weight((3000, 16)),  # long rows, not rotated
    Weight((70,)),
    Weight((16, 24, 12), batch_dims=1),  # cut along the experts
    Weight((3, 60, 20), batch_dims=1),  # cut along the rows of each
]
"""Of small blocks: every kind of layout."""


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Eight ranks, of which this process is the first; the others answer what it sends."""
    testing = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    if not dist.is_available():
        pytest.skip("needs torch.distributed")
    dist.init_process_group("fake", store=testing.FakeStore(), rank=0, world_size=RANKS)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    finally:
        dist.destroy_process_group()


def parameter(weight: Weight, mesh: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    dim = 1 if weight.batch_dims and weight.shape[0] < RANKS else 0
    own = list(weight.shape)
    own[dim] = math.ceil(own[dim] / RANKS)
    whole = {"shape": torch.Size(weight.shape), "stride": torch.empty(weight.shape).stride()}
    return nn.Parameter(DTensor.from_local(torch.randn(own), mesh, [Shard(dim)], run_check=False, **whole))


def groups(weights: list[Weight], mesh: Any) -> list[dict[str, Any]]:
    made = [(w, [parameter(w, mesh) for _ in range(w.copies)]) for w in weights]
    params = {dims: [p for w, own in made if w.batch_dims == dims for p in own] for dims in (0, 1)}
    return [{"params": own, "batch_dims": dims} for dims, own in params.items() if own]


def traffic_of_steps(optimizer: Butterfly, mesh: Any, steps: int) -> list[float]:
    """Bytes received in each step past the first 100, of which two are taken."""
    generator = torch.Generator().manual_seed(0)
    received = []
    for step in range(steps + 2):
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            local = torch.randn(param.to_local().shape, generator=generator)
            whole = {"shape": param.shape, "stride": param.stride()}
            param.grad = type(param.data).from_local(local, mesh, param.placements, run_check=False, **whole)
        if step == 2:
            for state in optimizer.state.values():
                state["calls"] = 100
        with watched_traffic() as traffic:
            optimizer.step()
        received.append(traffic.received)
    return received[2:]


@pytest.mark.parametrize(("diagonal", "cross_shard"), [("innovation", True), ("secant", True), ("secant", False)])
def test_state_and_traffic_of_a_real_optimizer(mesh: Any, diagonal: str, cross_shard: bool) -> None:
    own = [{**group, "cross_shard": cross_shard} for group in groups(WEIGHTS, mesh)]
    optimizer = Butterfly(own, diagonal=diagonal, block=16, lead=4, lr=1e-3)
    received = traffic_of_steps(optimizer, mesh, 20)
    costs = [butterfly(w, RANKS, optimizer.param_groups[0], cross_shard=cross_shard) * w.copies for w in WEIGHTS]
    total = sum(costs, scale_model.Cost())
    assert state_bytes(optimizer) == total.state
    assert sum(received) / 20 == pytest.approx(total.mean, rel=1e-12)
    assert (total.mean > 0) == cross_shard
    assert sum(outer_bytes(optimizer)) == total.beside


def test_traffic_of_a_plain_step(mesh: Any) -> None:
    optimizer = Butterfly(groups(WEIGHTS[:1], mesh), block=16, lead=4, lr=1e-3)
    cost = butterfly(WEIGHTS[0], RANKS, optimizer.param_groups[0])
    received = traffic_of_steps(optimizer, mesh, 10)
    assert sorted(received)[:5] == pytest.approx([cost.plain] * 5, rel=1e-12)
    assert max(received) > cost.plain


def outer_bytes(optimizer: Butterfly) -> Iterator[int]:
    """Bytes of the rotations of leading rows that are kept whole."""
    for stack in made_stacks(optimizer):
        for _, rotation in stack.rotations:
            if isinstance(rotation, ShardedRotation) and rotation.meeting is not None:
                outer = rotation.meeting._outer
                assert outer is not None and outer.moments is not None
                yield 4 * (outer.matrices.numel() + outer.moments.numel())


def test_one_rank_keeps_the_state_of_an_ordinary_optimizer() -> None:
    weights = [Weight((200, 70)), Weight((30,)), Weight((4, 20, 30), batch_dims=1)]
    params = [{"params": [nn.Parameter(torch.randn(w.shape))], "batch_dims": w.batch_dims} for w in weights]
    optimizer = Butterfly(params)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.randn_like(group["params"][0])
    optimizer.step()
    costs = [butterfly(w, 1, optimizer.param_groups[0]) for w in weights]
    assert state_bytes(optimizer) == sum(cost.state for cost in costs)
    assert all(cost.mean == cost.plain == cost.beside == 0 for cost in costs)


@pytest.mark.parametrize(
    ("model", "millions"), [("gpt2", 124.4), ("llama-1b", 1235.8), ("llama-7b", 6738.4), ("moe-32", 20914.8)]
)
def test_published_sizes(model: str, millions: float) -> None:
    assert sum(weight.numel for weight in MODELS[model]()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_experts_are_cut_along_the_experts_while_there_are_enough() -> None:
    weight = Weight((32, 60, 90), batch_dims=1)
    assert shard(weight, 8).shape == (4, 60, 90)
    assert shard(weight, 32).shape == (1, 60, 90)
    assert shard(weight, 40).shape == (32, 2, 90)


def test_peers_by_hand() -> None:
    weight = Weight((20, 10), copies=6)
    one, gathered, owned = (soap(weight, ranks, how) for ranks, how in ((1, "owned"), (4, "gathered"), (4, "owned")))
    assert one.state == gathered.state == 4 * (2 * 200 + 2 * 500)
    assert gathered.mean == 4 * 200 * 3 / 4
    # Two of the six matrices are the first rank's.
    assert owned.state * 6 == 2 * one.state
    assert owned.mean * 6 == 2 * 2 * gathered.mean
    assert soap(weight, 4, "alone").state == 4 * (2 * 50 + 2 * (25 + 100))
    assert soap(Weight((20_000, 10)), 1, "gathered").state == 4 * (2 * 200_000 + 2 * 100)
    newton_schulz = 5 * (4 * 100 * 20 + 2 * 1000)
    assert muon(weight, 4, "gathered").flops == newton_schulz + scale_model.ELEMENTWISE["muon"] * 50
    assert muon(weight, 4, "gathered").mean == 2 * 200 * 3 / 4
    assert muon(weight, 4, "owned").mean * 6 == 2 * 2 * 2 * 200 * 3 / 4
    assert muon(weight, 4, "owned").state == 4 * 50
    assert muon(Weight((20, 10), is_lookup=True), 4, "owned").state == 8 * 50


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "gpt2", "--ranks", "1", "16", "--shards", "8", "--out", str(tmp_path / "out")]
    assert scale_model.main(arguments) == 0
    page = (tmp_path / "out" / "scale_model.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out[:-1]
    assert "## gpt2: 124M parameters" in page
    assert "| 16 (8 shards) | Butterfly |" in page
    with (tmp_path / "out" / "scale_model.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert {row["optimizer"] for row in rows if row["ranks"] == "1" and float(row["mean"])} == set()


@pytest.mark.parametrize("option", ["--ranks", "--shards"])
def test_numbers_out_of_bounds(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale_model.main([option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err

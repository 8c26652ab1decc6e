"""butterfly_opt.Butterfly on DTensors and under FSDP2, in processes started by torchrun (``sharded_worker.py``).

Oracles: one process that rotates segments as shards do (``sharded_reference.py``); replicas, bit for bit; the run that
was not interrupted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from butterfly_opt import Butterfly
from butterfly_opt.plan import make_plan
from butterfly_opt.sharding import heads, inner_plan, row_numbers, share_bounds

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

SAME_PLAN_TOLERANCE = 1e-9
"""In float64: sums are taken in another order."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four, two, one and again four processes found; each loads what the one before has saved."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes(folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("4", "2", "1", "4 again")}


def run_processes(folder: Path) -> None:
    worker = Path(__file__).with_name("sharded_worker.py")
    for processes in (4, 2, 1, 4):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
                *(str(worker), str(folder)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("processes", ["2", "4"])
def test_shards_step_as_one_process_with_the_same_plan(reports: dict[str, Any], processes: str) -> None:
    found = reports[processes]["distances"]
    assert len(found) == {"2": 5, "4": 5}[processes]
    for name, (distance, motion) in found.items():
        assert distance <= SAME_PLAN_TOLERANCE, name
        assert motion > 0.1, name


def test_replicas_of_shards_stay_bit_identical(reports: dict[str, Any]) -> None:
    assert reports["4"]["replicas"] == 0


def test_the_number_of_collectives_does_not_grow_with_the_number_of_tensors(reports: dict[str, Any]) -> None:
    few, many = reports["4"]["collectives"]["1"], reports["4"]["collectives"]["3"]
    assert few == many
    assert max(few) <= 9


def test_without_cross_shard_nothing_is_communicated(reports: dict[str, Any]) -> None:
    assert reports["4"]["silent"] == 0
    assert reports["4"]["alone"]


def test_processes_agree_on_the_tensors_that_are_skipped(reports: dict[str, Any]) -> None:
    found = reports["4"]["skips"]
    assert found["still"] == [True, *[False] * 5]
    assert found["skipped"] == [1, *[0] * 5]
    assert found["steps"] == [5, *[6] * 5]


def test_a_run_on_as_many_processes_goes_on_bit_for_bit(reports: dict[str, Any]) -> None:
    assert reports["4"]["saved"]["resumed"] == [True, True]


@pytest.mark.parametrize("processes", ["2", "1", "4 again"])
def test_a_checkpoint_reshards(reports: dict[str, Any], processes: str) -> None:
    saved, found = reports["4"]["saved"], reports[processes]["resharded"]
    assert found["weights"] == saved["weights"]
    assert found["momentum"] == saved["momentum"]
    assert found["warned"] == 1
    # From 0.6 at the start. The bases are those of a few steps, and the run goes on as well.
    assert found["loss"] < 2 * saved["loss"] < 0.05


def test_whole_state_dicts_go_into_one_process_and_back(reports: dict[str, Any]) -> None:
    assert reports["4"]["full"] == {"alone": True, "finite": True}


def test_with_what_scripts_use_beside(reports: dict[str, Any]) -> None:
    found = reports["2"]["recipes"]
    for name in ("scaled", "compiled", "checkpointed", "in backward"):
        assert found[name] == pytest.approx(found["plain"], rel=1e-3), name
    assert all(loss < 0.15 for loss in found.values())


def test_what_hides_a_matrix_is_refused(reports: dict[str, Any]) -> None:
    said = reports["2"]["refusals"]
    assert "fully_shard" in said["FSDP1"] and "fully_shard" in said["FSDP1, original"]
    assert "structure='flat' needs whole parameters" in said["flat"]
    assert "diagonal='newton' needs whole parameters" in said["newton"]
    assert "need lead < block" in said["full plan"]
    assert "dimension 0 or 1" in said["third axis"]
    assert "dimension 0 or 1" in said["second axis of experts"]


def test_flat_slices_in_place_of_matrices_are_refused() -> None:
    """As DeepSpeed's ZeRO 1 and 2 replace them, after construction."""
    opt = Butterfly(nn.Linear(4, 4).parameters())
    flat = nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    opt.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="fully_shard"):
        opt.step()
    slice_of_stage_3 = nn.Parameter(torch.zeros(10))
    slice_of_stage_3.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="fully_shard"):
        Butterfly([slice_of_stage_3])


def test_a_state_before_the_first_gradient() -> None:
    model = nn.Linear(6, 4)
    opt = Butterfly(model.parameters(), diagonal="secant")
    opt.init_state()
    made = {key: value.shape for key, value in opt.state[model.weight].items() if isinstance(value, torch.Tensor)}
    untouched = Butterfly([p.detach().clone().requires_grad_() for p in model.parameters()], diagonal="secant")
    for optimizer in (opt, untouched):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
    assert {key: value.shape for key, value in opt.state[model.weight].items() if key in made} == made
    assert torch.equal(model.weight, untouched.param_groups[0]["params"][0])


@pytest.mark.parametrize(("block", "lead"), [(64, 16), (64, 32), (8, 2), (8, 1), (4, 2), (2, 1)])
def test_rows_hold_what_a_shard_saves(block: int, lead: int) -> None:
    """The groups of a shard and its share of those above fit into its rows, for any length and number of shards."""
    for n in [*range(1, 4 * block), 4 * block + 1, 1000, 1023, 4097, 50_257]:
        for shards in (2, 3, 4, 7, 8, 16, 64, 1000):
            part = -(-n // shards)
            sizes = [max(0, min(part, n - i * part)) for i in range(shards)]
            own_heads = heads(sizes, lead)
            bounds = share_bounds(make_plan(sum(own_heads), block, lead), own_heads)
            for i in (0, sum(size > 0 for size in sizes) - 1, shards - 1):
                own = inner_plan(sizes[i], block, lead, own_heads[i]).numel + bounds[i + 1] - bounds[i]
                assert own <= sizes[i] * row_numbers(block, lead), (n, shards, i)

"""butterfly_opt.Butterfly under DistributedDataParallel, in processes started by torchrun (``distributed_worker.py``).

Oracles: the other replicas, bit for bit; the single-process run on the joint batch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import MODES, REPLICA_STEPS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

# The order in which gradients are summed differs, in float64; the bound is the one the project promises.
JOINT_BATCH_TOLERANCE = 1e-6


PROCESSES = 4


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the workers found; ``--standalone`` takes a free port."""
    file = tmp_path_factory.mktemp("distributed") / "report.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    worker = Path(__file__).with_name("distributed_worker.py")
    done = subprocess.run(
        [*command, str(worker), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["world_size"] == PROCESSES
    return found


@pytest.mark.parametrize("mode", MODES)
def test_replicas_stay_bit_identical(report: dict[str, Any], mode: str) -> None:
    assert REPLICA_STEPS >= 200
    assert report["replicas"][mode] == 0


def test_replicas_that_refit_at_different_steps_would_be_noticed(report: dict[str, Any]) -> None:
    assert report["control"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_replicas_equal_the_run_on_the_joint_batch(report: dict[str, Any], mode: str) -> None:
    difference, motion = report["smooth"][mode]
    assert motion > 0.05
    assert difference < JOINT_BATCH_TOLERANCE


def test_replicas_with_uneven_batches_and_a_frozen_layer_stay_bit_identical(report: dict[str, Any]) -> None:
    assert report["uneven"] == 0

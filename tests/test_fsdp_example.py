"""experiments.fsdp, two processes and two steps.

Oracle: the first loss, which no optimizer has touched; shards of half the state; no traffic without the meeting.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import fsdp
from experiments.fsdp import CASES, Trial, paired, received

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The command takes one thread; other tests keep theirs."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_two_processes_and_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    assert fsdp.main(["--processes", "2", "--steps", "2", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert not torch.distributed.is_initialized()
    with (tmp_path / "fsdp.csv").open(encoding="utf-8") as file:
        alone, meeting, apart, adam = list(csv.DictReader(file))
    assert [row["case"] for row in (alone, meeting, apart, adam)] == list(CASES)
    assert [row["processes"] for row in (alone, meeting, apart, adam)] == ["1", "2", "2", "1"]
    # The second loss: after one small step of the warm-up, all are near log(vocabulary).
    assert float(meeting["loss"]) == pytest.approx(float(alone["loss"]), abs=0.05)
    assert float(apart["collectives"]) == float(alone["collectives"]) == 0
    assert 0 < float(meeting["collectives"]) < 12
    assert float(meeting["received"]) > 1e5
    assert 0.5 < int(meeting["state_bytes"]) / int(alone["state_bytes"]) < 0.75
    page = (tmp_path / "fsdp.md").read_text(encoding="utf-8")
    assert page.startswith("# FSDP2 on 2 processes beside one\n")
    assert page in capsys.readouterr().out


def test_bytes_received() -> None:
    numbers = torch.zeros(8, 10)
    assert received("all_gather_into_tensor", numbers, 4) == 320 * 3 / 4
    assert received("all_gather", list(numbers), 4) == 320 * 3 / 4
    assert received("all_reduce", numbers, 4) == 2 * 320 * 3 / 4


def test_differences_are_of_the_same_seed() -> None:
    def trial(case: str, seed: int, loss: float) -> Trial:
        return Trial(case, 1, seed, 1, 0.1, loss, 0.0, 0.0, 0.0, 0.0, 0)

    trials = [trial(CASES[0], 0, 1.0), trial(CASES[0], 1, 2.0), trial(CASES[1], 1, 2.5), trial(CASES[1], 0, 1.1)]
    assert paired(trials, CASES[1]) == f"{CASES[1]} +0.3000 (+0.1000 to +0.5000)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "3"], "--processes must be a divisor of the batch of 16, 2 or more, got 3"),
        (["--processes", "1"], "--processes must be a divisor of the batch of 16, 2 or more, got 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lr", "0"], "--lr must be positive, got 0.0"),
    ],
)
def test_options_out_of_bounds(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fsdp.main(arguments) == 2
    assert message in capsys.readouterr().err

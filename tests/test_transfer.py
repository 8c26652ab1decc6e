"""experiments.transfer, on a tiny suite.

Oracle: the update of SGD, whose size over the rate is that of the gradient, and the run made by `measure` alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import transfer
from experiments.measure import measure
from experiments.suite import build_run, load_suite
from experiments.transfer import Comparison, Trial, format_page, watched_updates

TINY = """
seeds: [0]
lr_grid: {factor: 2, points: 3, max_points: 4}
baselines: [adam]
target: butterfly
tasks:
  narrow:
    problem: {name: poisson, width: 4, layers: 1, points: 8}
    steps: 4
  wide:
    problem: {name: poisson, width: 8, layers: 1, points: 8}
    steps: 4
optimizers:
  adam: {optimizer: {name: Adam}, lr: 1e-2}
  butterfly: {optimizer: {name: Butterfly}, lr: 1e-2}
"""


@pytest.fixture
def tiny(suite_file: Callable[[str], Path]) -> Path:
    return suite_file(TINY)


def trial(lr: float, loss: float) -> Trial:
    return Trial(task="narrow", optimizer="adam", lr=lr, seed=0, final_loss=loss, metric=None, update_rms=0.5)


def test_size_of_an_update_over_its_rate() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 1e-3}]
    with watched_updates() as sizes:
        for scale in (1.0, 2.0):
            params[0].grad, params[1].grad = torch.full((3,), scale), torch.full((1,), 3.0 * scale)
            torch.optim.SGD(groups).step()
    torch.optim.SGD(groups).step()
    assert sizes == pytest.approx([math.sqrt(3.0), 2 * math.sqrt(3.0)], rel=1e-5)


def test_files(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transfer.main(["--suite", str(tiny), "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("results: out/transfer.md\n")
    with Path("out/transfer.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["optimizer"]) for row in rows} == {
        (task, name) for task in ("narrow", "wide") for name in ("adam", "butterfly")
    }
    assert Path("out/transfer.png").read_bytes().startswith(b"\x89PNG")
    page = Path("out/transfer.md").read_text(encoding="utf-8")
    assert page.count("\n| narrow |") == page.count("\n| wide |") == 1
    assert "![Final loss against the rate](transfer.png)" in page
    suite = load_suite(tiny)
    lowest = min((row for row in rows if row["task"] == "wide"), key=lambda row: float(row["lr"]))
    alone = measure(build_run(suite, "wide", lowest["optimizer"], lr=float(lowest["lr"]), seed=0))
    assert float(lowest["final_loss"]) == alone.final_loss


def test_a_second_call_trains_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suite", str(tiny), "--out", "out", "--task", "narrow", "lr_grid.points=1", "lr_grid.max_points=1"]
    assert transfer.main(arguments) == 0
    page = Path("out/transfer.md").read_text(encoding="utf-8")
    assert not Path("out/transfer.png").exists()  # one rate is no curve
    monkeypatch.setattr(transfer, "measure", None)
    capsys.readouterr()
    assert transfer.main(arguments) == 0
    assert capsys.readouterr().out == "results: out/transfer.md\n"
    assert Path("out/transfer.md").read_text(encoding="utf-8") == page


def test_ratio_and_what_is_kept() -> None:
    found = Comparison(adam=trial(0.01, 4.0), own=trial(0.04, 1.0), at_adams=trial(0.01, 2.0))
    assert (found.ratio, found.kept) == (4.0, 0.5)
    assert math.isnan(Comparison(adam=trial(0.01, 1.0), own=trial(0.04, 4.0), at_adams=trial(0.01, 2.0)).kept)
    assert "median 4, from 4 to 4" in format_page([found], has_figure=False)


def test_the_shipped_suite_has_four_widths_on_one_grid() -> None:
    suite = load_suite(transfer.WIDTHS)
    widths = [task.problem.keywords["model"]["widths"][0] for task in suite.tasks.values()]
    assert widths == [64, 128, 256, 512]
    assert len({entry.lr for entry in suite.optimizers.values()}) == 1


def test_an_unknown_optimizer_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transfer.main(["--suite", str(tiny), "--optimizer", "buterfly"]) == 2
    assert "unknown optimizer 'buterfly'" in capsys.readouterr().err

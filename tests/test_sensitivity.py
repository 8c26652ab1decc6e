"""experiments.sensitivity and experiments.variants, on a tiny suite."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
import torch

from experiments import parallel, sensitivity
from experiments.config import Component
from experiments.measure import Result, Store, measure
from experiments.optimizers import build_optimizer
from experiments.sensitivity import PARTS, VALUES, Effect, default_of, relative_losses, trials
from experiments.suite import Run, load_suite

TINY = """
seeds: [0, 1]
lr_grid: {factor: 2, points: 3, max_points: 3}
baselines: [adam]
target: adam
tasks:
  poisson:
    problem: {name: poisson, width: 4, layers: 1, points: 8}
    steps: 3
optimizers:
  adam: {optimizer: {name: Adam}, lr: 1e-2}
  butterfly: {optimizer: {name: Butterfly}, lr: 1e-2}
"""


@pytest.fixture
def tiny(suite_file: Callable[[str], Path]) -> Path:
    return suite_file(TINY)


def run(path: Path, *arguments: str) -> int:
    return sensitivity.main(["--suite", str(path), "--out", "out", "--workers", "1", *arguments])


def test_every_default_is_among_the_values() -> None:
    """The series share the run of the defaults: without it a loss could not be compared with anything."""
    for name, values in VALUES.items():
        assert default_of(name) in values


def test_files(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny) == 0
    assert capsys.readouterr().out == "results: out/sensitivity.md\n"
    with Path("out/sensitivity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = [row for row in rows if row["shown"] == "True"]
    assert len(shown) == sum(len(values) for values in VALUES.values())
    assert len(rows) == len(shown) + 2 * len(VALUES["part"])  # of three rates
    # Six series share the run of the defaults; it and two multiples of lr are among the rates that are searched.
    assert len(list(Path("out/runs/poisson").iterdir())) == len(rows) - (len(VALUES) - 1) - 2
    assert Path("out/sensitivity.png").read_bytes().startswith(b"\x89PNG")
    page = Path("out/sensitivity.md").read_text(encoding="utf-8")
    assert page.count("\n| part | ") == len(PARTS)
    assert page.count("\n| refit_every | ") == len(VALUES["refit_every"]) - 1


def test_changed_value_reaches_the_optimizer_and_ratios_are_of_the_defaults(tiny: Path) -> None:
    assert run(tiny, "--vary", "lr", "--vary", "betas") == 0
    suite = load_suite(tiny)
    wanted = list(trials(suite, "butterfly", ["poisson"], [0]))
    by_value = {(trial.name, trial.value): trial.run for trial in wanted}
    assert by_value["lead", 4].component.keywords["lead"] == 4
    assert by_value["block", 32].component.keywords.items() >= {("block", 32), ("lead", 8)}
    assert by_value["lr", 4].lr == pytest.approx(4e-2)
    assert by_value["lead", default_of("lead")].key == by_value["lr", 1].key
    store = Store(Path("out"))
    default = store.loss_of(by_value["lr", 1])
    other = store.loss_of(by_value["betas", (0.8, 0.95)])
    assert default is not None
    assert other is not None
    assert default != other
    series = dict(relative_losses(wanted, store)["betas", "poisson"])
    assert series[0.9, 0.95].ratio == 1.0
    assert series[0.8, 0.95].ratio == pytest.approx(other / default)


def test_the_rate_of_the_task_is_the_usual_one(tiny: Path) -> None:
    suite = load_suite(tiny, ["tasks.poisson.rates.butterfly=0.5"])
    assert {trial.run.lr for trial in trials(suite, "butterfly", ["poisson"], [0], names=["lead"])} == {0.5}


@pytest.mark.parametrize("value", VALUES["part"])
def test_among_parts_rates_are_searched_with_the_first_seed(tiny: Path, value: str) -> None:
    suite = load_suite(tiny)

    def found(loss_of: Callable[[Run], float | None]) -> set[tuple[float, int, bool]]:
        wanted = trials(suite, "butterfly", ["poisson"], [0, 1], names=["part"], loss_of=loss_of)
        return {(trial.run.lr, trial.run.seed, trial.is_shown) for trial in wanted if trial.value == value}

    assert found(lambda run: None) == {(0.005, 0, False), (0.01, 0, False), (0.02, 0, False)}
    searched = {(0.005, 0, False), (0.01, 0, False), (0.02, 0, True), (0.02, 1, True)}
    assert found(lambda run: 1 / run.lr if run.seed == 0 else None) == searched


def test_the_effect_is_tested_seed_by_seed() -> None:
    effect = Effect.of((2.0, 4.0, 9.0), (1.0, 2.0, 4.0))
    assert effect.ratio == pytest.approx(9 ** (1 / 3))
    assert effect.low < effect.ratio < effect.high
    assert effect.p < 0.05
    few = Effect.of((2.0, 8.0), (1.0, 1.0))
    assert few[:3] == pytest.approx((4.0, 4.0, 4.0))
    assert math.isnan(few.p)
    assert Effect.of((2.0, math.inf, 1.0), (1.0, 1.0, 1.0)).ratio == math.inf
    assert Effect.of((0.0, 3.0, 3.0), (4.0, 4.0, 4.0))[:3] == (0.5, 0.5, 0.5)
    assert math.isnan(Effect.of((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)).ratio)


def steps(name: str, *, dead: bool, count: int = 12) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A 40 x 40 matrix after some noisy steps in blocks of 8; a row whose gradient is always zero is `dead`."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(40, 40))
    optimizer = build_optimizer(Component(name, {"lr": 0.1, "block": 8, "lead": 4, "refit_every": 1}), [param])
    for _ in range(count):
        param.grad = torch.randn(40, 40, generator=generator)
        param.grad[0] *= not dead
        optimizer.step()
    return param.detach(), optimizer


def test_without_rotation_there_is_no_basis() -> None:
    _, optimizer = steps("experiments.variants.UnrotatedButterfly", dead=False)
    (state,) = optimizer.state.values()
    assert "exp_avg_sq" in state
    assert not [key for key in state if key.startswith("rotation")]
    (state,) = steps("Butterfly", dead=False)[1].state.values()
    assert [key for key in state if key.startswith("rotation")] == ["rotation0", "rotation1"]


def test_without_transport_the_second_stage_differs_and_nothing_before_its_first_refit() -> None:
    """Twice: the first refit happens before anything has turned that a group could have transported."""
    name = "experiments.variants.UntransportedButterfly"
    torch.testing.assert_close(steps(name, dead=False, count=1)[0], steps("Butterfly", dead=False, count=1)[0])
    assert (steps(name, dead=False)[0] - steps("Butterfly", dead=False)[0]).abs().max() > 1e-3


def test_without_the_rule_of_zeros_a_dead_row_moves_and_nothing_else_changes() -> None:
    name = "experiments.variants.ZeroMovingButterfly"
    assert steps("Butterfly", dead=True)[0][0].abs().max() == 0
    with_rule, without = steps("Butterfly", dead=True)[0], steps(name, dead=True)[0]
    assert without[0].abs().max() > 0
    torch.testing.assert_close(without[1:], with_rule[1:], atol=1e-3, rtol=0)
    torch.testing.assert_close(steps(name, dead=False)[0], steps("Butterfly", dead=False)[0], atol=0, rtol=0)


def test_it_goes_on_where_it_was_stopped(tiny: Path) -> None:
    assert run(tiny) == 0
    files = sorted(Path("out/runs/poisson").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert run(tiny) == 0
    after = [file.stat().st_mtime_ns for file in files]
    assert after[1:] == before[1:]
    assert after[0] != before[0]


def test_a_task_without_data_is_skipped(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = "problem: {name: images, dataset: {name: mnist, root: none}, model: {name: mlp}, batch_size: 4}"
    text = TINY.replace("tasks:\n", f"tasks:\n  images:\n    {images}\n    steps: 3\n")
    tiny.write_text(text, encoding="utf-8")
    assert run(tiny) == 0
    captured = capsys.readouterr()
    assert captured.err.count("Task images is skipped: ") == 1
    assert captured.out == "results: out/sensitivity.md\n"
    assert len(list(Path("out/runs/poisson").iterdir())) > 10


def test_a_dead_worker_ends_it_and_the_figure_shows_what_is_done(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Run] = []

    def dies(item: Run) -> Result:
        made.append(item)
        if len(made) > 4:
            raise BrokenExecutor("killed")
        return measure(item)

    monkeypatch.setattr(parallel, "measure", dies)
    assert run(tiny) == 1
    captured = capsys.readouterr()
    assert "Stopped: a worker process died while poisson/" in captured.err
    assert captured.out == "results: out/sensitivity.md\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam"], "must name a Butterfly"),
        (["--optimizer", "buterfly"], "unknown optimizer 'buterfly'"),
        (["--task", "posson"], "unknown task 'posson'"),
        (["--vary", "leed"], "unknown hyper-parameter 'leed'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seeds", "3"], "--seeds must be at most 2, the suite's number, got 3"),
        (["--out", "tiny.yaml"], "cannot make the output folder tiny.yaml"),
    ],
)
def test_mistakes(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(tiny, *arguments) == 2
    assert message in capsys.readouterr().err

"""experiments.sensitivity, on a tiny suite."""

from __future__ import annotations

import csv
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from experiments import parallel, sensitivity
from experiments.measure import Result, Store, measure
from experiments.sensitivity import VALUES, default_of, relative_losses, trials
from experiments.suite import Run, load_suite

TINY = """
seeds: [0, 1]
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
    assert capsys.readouterr().out == "results: out/sensitivity.png\n"
    with Path("out/sensitivity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(values) for values in VALUES.values())
    assert len(list(Path("out/runs/poisson").iterdir())) == len(rows) - len(VALUES) + 1
    assert Path("out/sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_changed_value_reaches_the_optimizer_and_ratios_are_of_the_defaults(tiny: Path) -> None:
    assert run(tiny) == 0
    suite = load_suite(tiny)
    wanted = list(trials(suite, "butterfly", ["poisson"], [0]))
    by_value = {(trial.name, trial.value): trial.run for trial in wanted}
    assert by_value["lead", 4].component.keywords["lead"] == 4
    assert by_value["lr", 4].lr == pytest.approx(4e-2)
    assert by_value["lead", default_of("lead")].key == by_value["lr", 1].key
    store = Store(Path("out"))
    default = store.loss_of(by_value["lr", 1])
    other = store.loss_of(by_value["betas", (0.8, 0.95)])
    assert default is not None
    assert other is not None
    assert default != other
    series = dict(relative_losses(wanted, store)["betas", "poisson"])
    assert series[0.9, 0.95] == 1.0
    assert series[0.8, 0.95] == pytest.approx(other / default)


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
    assert captured.out == "results: out/sensitivity.png\n"
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
    assert captured.out == "results: out/sensitivity.png\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam"], "must name a Butterfly"),
        (["--optimizer", "buterfly"], "unknown optimizer 'buterfly'"),
        (["--task", "posson"], "unknown task 'posson'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seeds", "3"], "--seeds must be at most 2, the suite's number, got 3"),
        (["--out", "tiny.yaml"], "cannot make the output folder tiny.yaml"),
    ],
)
def test_mistakes(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(tiny, *arguments) == 2
    assert message in capsys.readouterr().err

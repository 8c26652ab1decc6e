"""experiments.compare and its parts. Oracles: curves and results made by hand, and runs that must equal one another."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import scipy.stats
import torch
from torch import nn

import butterfly_opt
from experiments import compare, optimizers, parallel, problems
from experiments import measure as measuring
from experiments.config import Component, ConfigError, DatasetConfig
from experiments.data import Dataset, Split
from experiments.measure import Result, Store, measure, smooth, take_step
from experiments.problems import Poisson, build_problem
from experiments.report import COLUMNS, Report, Spread, format_report, paired_test, time_to_level
from experiments.sequence_models import Transformer
from experiments.suite import USES, LrGrid, Run, Suite, build_run, load_suite, plan, search_rates

ROOT = Path(__file__).resolve().parent.parent
SUITES = sorted((ROOT / "configs" / "suites").glob("*.yaml"))
CPU = torch.device("cpu")

TINY = """
seeds: [0, 1]
lr_grid: {factor: 3.0, points: 3, max_points: 3}
baselines: [adam]
target: momentum
fractions: [0.5, 1.0]
shortened: [butterfly]
robust: [butterfly]
tasks:
  digits:
    problem: {name: images, dataset: {name: digits}, model: {name: mlp, hidden: [8]}, batch_size: 32}
    steps: 8
    schedule: {warmup_steps: 2, decay: linear}
  poisson:
    problem: {name: poisson, width: 8, layers: 1, points: 16}
    steps: 6
    without: [momentum]
optimizers:
  adam: {optimizer: {name: Adam}, lr: 1e-2}
  butterfly: {optimizer: {name: Butterfly, block: 16, lead: 4}, lr: 1e-2}
  momentum: {optimizer: {name: SGD, momentum: 0.9}, lr: 3e-2}
"""
# Search 3, one more seed 1; butterfly also 2 seeds at half the steps and 3 other rates, each with Adam's run beside it.
# Best times 4 and a quarter of it never lie on a grid of factor 3.
RUNS_DIGITS = 3 * (3 + 1) + 2 + 2 * 3
RUNS_POISSON = 2 * (3 + 1) + 2 + 2 * 3


@pytest.fixture
def tiny(suite_file: Callable[[str], Path]) -> Path:
    return suite_file(TINY)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "draw_all", lambda report, folder: [])


def run(path: Path, *arguments: str) -> int:
    return compare.main(["--suite", str(path), "--out", "out", "--workers", "1", *arguments])


def rows() -> list[dict[str, str]]:
    with Path("out/runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def count_runs(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda number: None) -> list[Run]:
    """Records the runs that are really made; `before` is called with how many there were."""
    made: list[Run] = []

    def counted(item: Run) -> Result:
        before(len(made))
        made.append(item)
        return measure(item)

    monkeypatch.setattr(parallel, "measure", counted)
    return made


def test_a_suite_runs_once_and_leaves_its_files(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_runs(monkeypatch)
    assert run(tiny) == 0
    table = rows()
    assert tuple(table[0]) == COLUMNS
    assert len({item.key for item in made}) == len(made) == len(table) == RUNS_DIGITS + RUNS_POISSON
    assert {row["status"] for row in table} == {"ok"}
    assert sorted(row["task"] for row in table) == ["digits"] * RUNS_DIGITS + ["poisson"] * RUNS_POISSON
    halves = [row for row in table if row["roles"] == "fraction 0.5"]
    assert sorted((row["optimizer"], row["steps"], row["seed"]) for row in halves) == [
        ("butterfly", steps, seed) for steps in "34" for seed in "01"
    ]
    at_usual = [row for row in table if "butterfly at lr 0.001" in row["roles"]]
    assert {(row["task"], row["optimizer"]) for row in at_usual} == {
        (task, name) for task in ("digits", "poisson") for name in ("adam", "butterfly")
    }
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert all(f"\n## {title}" in report for title in ("digits", "poisson", "Shorter runs", "Other learning rates"))
    assert "adam (Adam)" in report
    for name in ("loss-digits.png", "loss-poisson.png", "overview.png"):
        content = (Path("out") / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    made.clear()
    monkeypatch.setattr(compare, "draw_all", lambda report, folder: [])
    assert run(tiny) == 0
    assert not made
    assert rows() == table
    # Only what a change concerns is made again.
    assert run(tiny, "tasks.poisson.steps=5", "--optimizer", "adam") == 0
    assert {(item.task, item.optimizer, item.steps) for item in made} == {("poisson", "adam", 5)}


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_and_resume(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        first = count_runs(patch, interrupt)
        assert run(tiny, "--task", "poisson") == 130
    assert len(first) == len(rows()) == 5
    second = count_runs(monkeypatch)
    assert run(tiny, "--task", "poisson") == 0
    assert len(second) == RUNS_POISSON - 5
    assert not {item.key for item in first} & {item.key for item in second}


@pytest.mark.usefixtures("no_figures")
def test_a_killed_suite_goes_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "experiments.compare", "--suite", str(tiny), "--out", "out", "--workers", "2"]
    with subprocess.Popen(
        # More steps: the kill must come before the end.
        [*command, "tasks.poisson.steps=60", "--task", "poisson"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while not (done := list(Path("out/runs").rglob("*.json"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert done
    for path in Path("out/runs").rglob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["status"] == "ok"
    made = count_runs(monkeypatch)
    assert run(tiny, "tasks.poisson.steps=60", "--task", "poisson") == 0
    assert 0 < len(made) <= RUNS_POISSON - len(done)


@pytest.mark.usefixtures("no_figures")
def test_divergence_and_exceptions_are_results(tiny: Path) -> None:
    tiny.write_text(
        TINY.replace("robust: [butterfly]", "robust: []")
        .replace("{name: SGD, momentum: 0.9}, lr: 3e-2", "{name: SGD}, lr: 1e30")
        .replace("{name: Butterfly, block: 16, lead: 4}", "{name: SparseAdam}"),
        encoding="utf-8",
    )
    assert run(tiny, "--task", "digits") == 0
    status = {row["optimizer"]: (row["status"], row["final_loss"]) for row in rows()}
    assert status.pop("adam")[0] == "ok"
    assert status == {"momentum": ("diverged", ""), "butterfly": ("failed", "")}
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "momentum diverged: lr 3.333e+29 seed 0, lr 1e+30 seed 0, lr 3e+30 seed 0." in report
    assert "butterfly failed (RuntimeError: SparseAdam does not support dense gradients" in report


@pytest.mark.usefixtures("no_figures")
def test_missing_packages_and_data_are_skipped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    text = TINY.replace("{name: SGD, momentum: 0.9}", "{name: pytorch_optimizer.SOAP}")
    tiny.write_text(text.replace("{name: digits}", "{name: mnist, root: nowhere}"), encoding="utf-8")
    assert run(tiny) == 0
    errors = capsys.readouterr().err
    assert "Optimizer momentum is skipped: pytorch_optimizer does not import" in errors
    assert "Task digits is skipped: no usable MNIST data under dataset.root=nowhere" in errors
    assert {row["task"] for row in rows()} == {"poisson"}
    assert "Task digits is skipped" in Path("out/report.md").read_text(encoding="utf-8")


def test_kron_needs_opt_einsum(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", lambda: False)
    with pytest.raises(optimizers.MissingPackageError, match="needs opt_einsum"):
        optimizers.build_optimizer(Component("pytorch_optimizer.Kron"), [nn.Parameter(torch.ones(2, 2))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "digit"), r"unknown task 'digit'; did you mean 'digits'\?"),
        (("--optimizer", "adm"), r"unknown optimizer 'adm'; did you mean 'adam'\?"),
        (("--workers", "0"), r"--workers must be at least 1, got 0"),
        (("--out", "tiny.yaml"), r"cannot make the output folder tiny.yaml: File exists"),
        (
            ("--optimizer", "adam", "tasks.digits.without=[adam]", "tasks.poisson.without=[adam]"),
            r"the suite leaves 'adam' out of digits, poisson \(`without`\)",
        ),
        (("tasks.digit.steps=3",), r"unknown task 'digit'; did you mean 'digits'\?"),
        (("target=soup",), r"unknown optimizer 'soup'; choose from adam, butterfly, momentum"),
        (("tasks.digits.without=[adm]",), r"unknown optimizer 'adm'"),
        (("tasks.digits.problem.name=image",), r"unknown problem 'image' \(tasks.digits.problem.name\).*'images'"),
        (("tasks.digits.problem.model.name=mpl",), r"unknown model 'mpl'"),
        (("tasks.digits.problem.dataset.name=digit",), r"tasks.digits.problem.dataset.name must be one of"),
        (("tasks.poisson.problem.widht=3",), r"no keyword 'tasks.poisson.problem.widht'; did you mean 'width'\?"),
        (("tasks.digits.problem={name: images}",), r"missing key 'tasks.digits.problem.dataset'"),
        (("tasks.digits.schedule.warmup_steps=9",), r"tasks.digits needs steps >= 1 and 0 <= schedule.warmup_steps"),
        (("optimizers.adam.optimizer.name=Adan",), r"optimizers.adam: unknown optimizer 'Adan'"),
        (("optimizers.adam.optimizer.beta=3",), r"optimizers.adam: torch.optim.Adam has no keyword 'beta'"),
        (("optimizers.adam.lr=-1",), r"optimizers.adam.lr must be a finite number >= 0, got -1"),
        (("seeds=[]",), r"seeds must hold at least one seed"),
        (("seeds=[-1]",), r"seeds must be at least 0, got \[-1\]"),
        (("seeds=3",), r"seeds must be a list, got 3 \(int\)"),
        (("seeds=[0.5]",), r"seeds\[0\] must be a whole number"),
        (("baselines=[]",), r"baselines must name at least one optimizer"),
        (("fractions=[1.5]",), r"fractions must be above 0 and at most 1, got \[1.5\]"),
        (("lr_grid.factor=1",), r"lr_grid needs factor > 1"),
        (("lr_gird={}",), r"unknown key 'lr_gird'; did you mean 'lr_grid'\?"),
        (("dataset.rot=x",), r"unknown key 'tasks.digits.problem.dataset.rot'; did you mean 'root'\?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not Path("out").exists()


def test_the_optimizer_changes_neither_weights_nor_batches(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of 0 the loss curve shows the initial weights and the batches, nothing else."""
    kinds = [
        Component("SGD"), Component("Adam"), Component("Butterfly"), Component("Muon"),
        Component("Butterfly", {"structure": "flat", "block": 16, "lead": 4}),
    ]  # fmt: skip
    suite = load_suite(tiny)
    task = suite.tasks["digits"]
    text = Component("text", {"model": {"name": "transformer", "width": 8, "layers": 1}, "context": 8})

    def curve(problem: Component, component: Component, seed: int) -> list[float]:
        keywords = {**component.keywords, "lr": 0.0}
        item = Run("t", "o", problem, Component(component.name, keywords), 0.0, seed, 5, task.schedule, 2, "cpu")
        return measure(item).losses

    for problem in (task.problem, text):
        curves = [curve(problem, component, 0) for component in kinds]
        assert all(other == curves[0] for other in curves[1:])
        assert len(set(curves[0])) == 5
        assert curve(problem, kinds[0], 1) != curves[0]
        with monkeypatch.context() as patch:  # an optimizer that draws random numbers
            patch.setattr(measuring, "take_step", lambda *args: (take_step(*args), torch.rand(7))[0])
            assert curve(problem, kinds[0], 0) == curves[0]


def test_gradient_evaluations_are_counted(tiny: Path) -> None:
    search = Component("LBFGS", {"lr": 1.0, "line_search_fn": "strong_wolfe", "max_iter": 4})
    poisson = load_suite(tiny).tasks["poisson"]
    item = Run("t", "o", poisson.problem, search, 1.0, 0, 30, poisson.schedule, 5, "cpu")
    result = measure(item)
    assert result.evaluations[0] == 1
    gaps = [after - before for before, after in zip(result.evaluations, result.evaluations[1:], strict=False)]
    assert all(2 <= gap <= 6 for gap in gaps)  # 4 iterations, and max_eval = 5 of them plus the first
    assert result.evaluations[-1] <= 30
    adam = measure(Run("t", "o", poisson.problem, Component("Adam"), 1e-3, 0, 6, poisson.schedule, 5, "cpu"))
    assert adam.evaluations == [1, 2, 3, 4, 5, 6]
    # Two moments of every parameter in float32, and a counter for each of the four tensors.
    assert adam.state_bytes == 2 * 4 * adam.num_params + 4 * 4


def test_smoothing_and_crossing() -> None:
    losses = [10.0, 8.0, 6.0, 4.0, 2.0, 9.0]
    assert smooth(losses, [1, 2, 3, 4, 5, 6], 1) == losses
    assert smooth(losses, [1, 2, 3, 4, 5, 6], 3) == pytest.approx([10, 9, 8, 6, 4, 5])
    # Evaluations 1, 11, 21, ...: a window of 20 holds two of them.
    assert smooth(losses, [1, 11, 21, 31, 41, 51], 20) == pytest.approx([10, 9, 7, 5, 3, 5.5])
    # A huge loss leaves no rounding error behind.
    assert smooth([1e30, 1.0, 1.0], [1, 2, 3], 1) == [1e30, 1.0, 1.0]
    result = Result("ok", 5.0, None, "m", losses, [1, 2, 3, 4, 5, 6], [0.5, 1, 1.5, 2, 2.5, 3], 500.0, 0, 1)
    assert time_to_level(result, 6.0, 3) == (4, 2)
    assert time_to_level(result, 9.5, 3) == (2, 1)
    assert time_to_level(result, 4.5, 3) == (math.inf, math.inf)  # crossed at 5, but not to stay
    assert time_to_level(dataclasses.replace(result, status="diverged"), 9.5, 3) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("loss_of", "max_points", "rates", "best"),
    [
        (lambda lr: abs(lr - 1.0), 7, [0.5, 1.0, 2.0], 1.0),
        (lambda lr: abs(lr - 4.0), 7, [0.5, 1.0, 2.0, 4.0, 8.0], 4.0),
        (lambda lr: abs(lr - 0.25), 7, [0.125, 0.25, 0.5, 1.0, 2.0], 0.25),
        (lambda lr: -lr, 5, [0.5, 1.0, 2.0, 4.0, 8.0], 8.0),
        (lambda lr: -lr if lr < 3 else math.inf, 7, [0.5, 1.0, 2.0, 4.0], 2.0),
        (lambda lr: math.inf, 4, [0.25, 0.5, 1.0, 2.0], 0.25),
        (lambda lr: None if lr == 4.0 else -lr, 7, [0.5, 1.0, 2.0, 4.0], None),
    ],
)
def test_the_rate_is_searched_past_the_edges(
    loss_of: Callable[[float], float | None], max_points: int, rates: list[float], best: float | None
) -> None:
    assert search_rates(1.0, LrGrid(2.0, 3, max_points), loss_of) == (rates, best)


def test_paired_tests_say_what_scipy_says() -> None:
    """Known numbers: every loss twice the other's, and one pair that is not."""
    ratio, low, high, p = paired_test([1.0, 2.0, 4.0, 3.0], [2.0, 4.0, 8.0, 6.6])
    assert ratio == pytest.approx(2 * 1.1**0.25)
    assert 1 < low < ratio < high
    logs = torch.tensor([2.0, 2.0, 2.0, 2.2]).log()
    t = logs.mean() / (logs.std() / 2)
    assert p == pytest.approx(2 * scipy.stats.t.sf(t.item(), 3), rel=1e-4)


def test_a_loss_of_zero_is_not_tested(tiny: Path, tmp_path: Path) -> None:
    """It has no logarithm; the other seeds are."""
    overrides = ["subject=butterfly", "seeds=[0, 1, 2, 3]", "lr_grid.points=1", "lr_grid.max_points=1", "robust=[]"]
    suite: Suite = load_suite(tiny, overrides)
    store = Store(tmp_path / "made")
    losses = {"adam": (2.0, 2.2, 1.9, 1.0), "butterfly": (1.0, 1.0, 1.0, 0.0)}
    for name, seed in itertools.product(losses, range(4)):
        item = build_run(suite, "digits", name, lr=suite.optimizers[name].lr, seed=seed)
        store.save(item, made_up(losses[name][seed], 50))
    lines = format_report(Report(suite, store), notes=[]).splitlines()
    assert [line for line in lines if line.startswith("| digits | adam | 2.033 +- ")]


def test_shorter_runs_shrink_the_schedule(tiny: Path) -> None:
    half = build_run(load_suite(tiny), "digits", "butterfly", lr=0.1, seed=1, fraction=0.5)
    assert (half.steps, half.schedule.warmup_steps, half.schedule.decay, half.window) == (4, 1, "linear", 1)
    fixed = load_suite(tiny, ["optimizers.adam.scheduled=false"])
    assert build_run(fixed, "digits", "adam", lr=0.1, seed=1).schedule.decay == "none"


def test_a_result_counts_for_its_configuration(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(*overrides: str) -> tuple[str, str]:
        suite = load_suite(tiny, overrides)
        return tuple(build_run(suite, "digits", name, lr=0.1, seed=1).key for name in ("adam", "butterfly"))  # type: ignore[return-value]

    adam, butterfly = keys()
    assert keys("dataset.root=elsewhere") == (adam, butterfly)
    assert keys("seeds=[1, 2]", "tasks.poisson.steps=7") == (adam, butterfly)
    assert keys("tasks.digits.problem.batch_size=16")[0] != adam
    assert keys("optimizers.adam.optimizer.eps=1e-6")[0] != adam
    assert keys("dataset.name=mnist")[0] != adam
    monkeypatch.setattr("experiments.suite.code_digest", lambda: "other code")
    assert keys()[0] == adam
    assert keys()[1] != butterfly


@pytest.mark.parametrize("diagonal", ["innovation", "secant", "newton"])
def test_a_step_calls_no_module_that_its_digest_leaves_out(diagonal: str) -> None:
    package, called = Path(butterfly_opt.__file__).parent, set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if Path(frame.f_code.co_filename).parent == package:
            called.add(Path(frame.f_code.co_filename).stem)

    param = nn.Parameter(torch.randn(4, 3))
    optimizer = butterfly_opt.Butterfly([param], diagonal=diagonal, backend="torch")
    sys.setprofile(note)
    try:
        for _ in range(4):
            param.grad = torch.randn(4, 3)
            optimizer.step()
    finally:
        sys.setprofile(None)
    assert "step" in called
    assert not called & USES


def test_overrides_of_one_task_win(tiny: Path) -> None:
    tiny.write_text(TINY.replace("poisson:\n    problem:", "other:\n    problem:"), encoding="utf-8")
    suite = load_suite(tiny, ["tasks.digits.problem.dataset.root=/b", "dataset.root=/a", "dataset.name=mnist"])
    assert suite.tasks["digits"].problem.keywords["dataset"] == {"name": "mnist", "root": "/b"}
    assert "dataset" not in suite.tasks["other"].problem.keywords


def made_up(final: float, crossing: int, *, status: str = "ok") -> Result:
    """100 steps of 10 ms: loss 10 up to `crossing`, `final` from there on."""
    steps = range(1, 101)
    losses = [10.0 if step < crossing else final for step in steps]
    seconds = [0.01 * step for step in steps]
    final = final if status == "ok" else math.inf
    return Result(status, final, 0.5, "test loss", losses, list(steps), seconds, 10.0, 1200, 100)


def test_the_numbers_of_the_report(tiny: Path, tmp_path: Path) -> None:
    suite: Suite = load_suite(
        tiny,
        [
            "tasks.digits.steps=100",
            "tasks.digits.schedule.decay=none",
            "lr_grid.points=1",
            "lr_grid.max_points=1",
            "seeds=[0, 1, 2]",
            "baselines=[adam, adam2]",
            "optimizers.adam2={optimizer: {name: Adam}, lr: 0.1}",
        ],
    )
    store = Store(tmp_path / "made")
    table = {
        # The window is 5 steps: a jump to exactly Adam's loss at step n is seen at n + 4.
        "adam": [made_up(1.5, 76), made_up(1.0, 96), made_up(2.0, 96)],
        "adam2": [made_up(3.0, 90), made_up(0.5, 90), made_up(3.0, 90)],
        "butterfly": [made_up(1.0, 46), made_up(0.75, 40), made_up(4.0, 10)],
        "momentum": [made_up(0.5, 50), made_up(0.5, 50), made_up(9.0, 50, status="diverged")],
    }
    for name, results in table.items():
        for seed, result in enumerate(results):
            store.save(build_run(suite, "digits", name, lr=suite.optimizers[name].lr, seed=seed), result)
    for seed in range(3):
        short = build_run(suite, "digits", "butterfly", lr=1e-2, seed=seed, fraction=0.5)
        store.save(short, made_up(1.0, 21 + seed))
    report = Report(suite, store)
    assert report.adam("digits") == "adam"  # median 1.5 against 3.0
    summaries = {summary.optimizer: summary for summary in report.summaries}
    adam, butterfly, momentum = (summaries[name] for name in ("adam", "butterfly", "momentum"))
    assert adam.steps_full == Spread(1.0, 1.0, 1.0)
    assert adam.seconds_ratio == Spread(1.0, 1.0, 1.0)
    assert butterfly.final_loss == Spread(1.0, 0.75, 4.0)
    # Seed 0: below 1.5 while the window still holds no 10, 46 + 4. Seed 1: 40 + 4. Seed 2 never gets to 2.
    # Over Adam's own 76 + 4 steps, or 100.
    assert butterfly.steps_full == Spread(0.625, 0.44, math.inf)
    # At half the length 21 + 4, 22 + 4 (1.0 is Adam's loss there), 23 + 4.
    assert butterfly.steps_any == Spread(0.27, 0.26, 0.3125)
    assert butterfly.seconds.median == pytest.approx(0.26)
    assert butterfly.seconds_ratio == pytest.approx((0.27, 0.26, 0.3125))
    assert butterfly.covered == pytest.approx(0.5)  # from 1.5 to momentum's 0.5
    assert (butterfly.step_ms, butterfly.mean_step_ms) == pytest.approx((10, 10))
    assert butterfly.bytes_per_param == 12
    assert (momentum.num_ok, momentum.num_seeds, momentum.covered) == (2, 3, 1.0)
    text = format_report(report, notes=["A note."])
    assert "A note." in text
    assert "| butterfly | 0.01 | 1 [0.75, 4] | 0.5 | 0.62 [0.44, never] | 0.27 [0.26, 0.31] |" in text
    assert "0.5 [0.5, diverged] (1 of 3 lost)" in text


def test_two_roles_at_one_rate_are_one_row(tiny: Path, tmp_path: Path) -> None:
    overrides = ["tasks.digits.steps=100", "lr_grid.points=1", "lr_grid.max_points=1", "robustness.lr=2.5e-3"]
    suite: Suite = load_suite(tiny, overrides)
    store = Store(tmp_path / "made")
    for name, final in (("adam", 2.0), ("butterfly", 1.0)):
        for lr in (1e-2, 2.5e-3, 4e-2):
            store.save(build_run(suite, "digits", name, lr=lr, seed=0), made_up(final, 50))
    rows = [line for line in format_report(Report(suite, store), notes=[]).splitlines() if "butterfly at" in line]
    assert rows == [
        "| digits | butterfly at lr 0.0025, best x0.25 | 0.0025 | 1 | 2 | yes |",
        "| digits | butterfly at best x4 | 0.04 | 1 | 2 | yes |",
    ]


@pytest.mark.usefixtures("no_figures")
def test_without_a_baseline_there_is_no_loss_to_reach(tiny: Path) -> None:
    assert run(tiny, "--task", "poisson", "--optimizer", "butterfly") == 0
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert "never" not in text
    assert text.count("Of adam none has run") == 1


def fake_images(config: DatasetConfig) -> Dataset:
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, *shapes[config.name]), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.tensor([0, 1, 2, 9]))
    return Dataset(split, split, 10)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_task_of_the_suites_takes_a_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny widths, for time."""
    monkeypatch.setattr(problems, "_cached_dataset", fake_images)
    # The text is read whole otherwise.
    tokens = torch.arange(3000) % 50
    monkeypatch.setattr(problems, "load_text", lambda source: (tokens, 50))
    small = {"width": 12, "layers": 2, "heads": 3, "context": 8, "batch_size": 2}
    suite = load_suite(path)
    assert {*suite.baselines, "butterfly", "soap"} <= suite.optimizers.keys()
    for name in suite.tasks:
        item = build_run(suite, name, "butterfly", lr=1e-3, seed=0, fraction=1e-9)
        keywords = dict(item.problem.keywords)
        model = dict(keywords.get("model", {}))
        keywords |= {key: small[key] for key in keywords.keys() & small.keys()}
        keywords |= {"model": model | {key: small[key] for key in model.keys() & small.keys()}} if model else {}
        tiny_run = Run(**{**vars(item), "problem": Component(item.problem.name, keywords), "device": "cpu"})
        result = measure(tiny_run)
        assert (result.status, len(result.losses)) == ("ok", 1), (name, result.error)
        assert result.metric is not None
        assert math.isfinite(result.metric)


def test_the_shipped_text_is_deterministic() -> None:
    tokens, vocabulary = problems.load_text("topics")
    assert len(tokens) > 100_000
    assert 60 < vocabulary <= 128
    assert int(tokens.max()) == vocabulary - 1
    with pytest.raises(ConfigError, match=r"unknown text source 'topic'; did you mean 'topics'\?"):
        problems.load_text("topic")


def test_a_position_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = Transformer(11, 6, width=8, layers=2, heads=2)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = torch.tensor([[1, 2, 3, 9, 9, 9]])
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_the_solution_solves_the_equation() -> None:
    class Solution(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(math.pi * x) + torch.sin(4 * math.pi * x) / 10

    problem = Poisson(seed=0, device=CPU, points=64)
    assert float(problem.loss(None).detach()) > 0.1
    problem.model = Solution()
    assert float(problem.loss(None).detach()) < 1e-10
    assert problem.metric() < 1e-6


def test_regression_inputs_have_the_condition() -> None:
    problem = build_problem(Component("regression", {"condition": 1e4, "inputs": 8}), seed=0, device=CPU)
    deviations = problem._inputs.std(0)  # type: ignore[attr-defined]
    assert float(deviations[0] / deviations[-1]) == pytest.approx(1e4, rel=0.05)


@pytest.mark.parametrize("name", ["Muon", "experiments.variants.Float32Muon"])
def test_muon_gets_the_matrices_only(name: str) -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.Conv2d(1, 2, 3))
    muon, adam = optimizers.build_optimizers(Component(name, {"lr": 0.1}), model)
    assert [tuple(item.shape) for item in muon.param_groups[0]["params"]] == [(5, 4)]
    assert sorted(item.ndim for item in adam.param_groups[0]["params"]) == [1, 1, 2, 4]
    assert (type(adam).__name__, adam.param_groups[0]["lr"]) == ("Adam", 0.1)


def test_float32_muon_is_muon() -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(2)]
    gradient = torch.randn(8, 6)
    for param, name in zip(params, ("Muon", "experiments.variants.Float32Muon"), strict=True):
        optimizer = optimizers.build_optimizer(Component(name, {"lr": 1.0, "weight_decay": 0.0}), [param])
        param.grad = gradient.clone()
        optimizer.step()
    bfloat16, float32 = (param.detach() for param in params)
    torch.testing.assert_close(float32, bfloat16, rtol=0, atol=0.03)
    assert not torch.equal(float32, bfloat16)


class Averaging(torch.optim.SGD):
    """A schedule-free optimizer as far as its modes go: while it is evaluated the parameters are 7."""

    @torch.no_grad()
    def eval(self) -> None:
        self._kept = [param.clone() for param in self.param_groups[0]["params"]]
        torch._foreach_zero_(self.param_groups[0]["params"])
        torch._foreach_add_(self.param_groups[0]["params"], 7.0)

    @torch.no_grad()
    def train(self) -> None:
        torch._foreach_copy_(self.param_groups[0]["params"], self._kept)


@torch.no_grad()
def test_a_schedule_free_optimizer_is_evaluated_at_its_average() -> None:
    param = nn.Parameter(torch.ones(2))
    switching, plain = Averaging([param], lr=0.1), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(KeyError), optimizers.evaluating([switching, plain]):
        assert param.tolist() == [7.0, 7.0]
        raise KeyError
    assert param.tolist() == [1.0, 1.0]


def test_the_metric_of_a_run_is_that_of_the_average(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[float]] = []

    def metric(problem: Poisson) -> float:
        seen.append({item for param in problem.model.parameters() for item in param.flatten().tolist()})
        return 1.0

    monkeypatch.setattr(Poisson, "metric", metric)
    monkeypatch.setattr(torch.optim, "SGD", Averaging)
    item = build_run(load_suite(tiny), "poisson", "momentum", lr=1e-3, seed=0)
    assert measure(item).status == "ok"
    assert seen == [{7.0}]


def test_the_plan_waits_for_the_search(tiny: Path) -> None:
    suite = load_suite(tiny)
    empty = plan(suite, lambda item: None)
    assert {role for _, role in empty.runs} == {"search"}
    assert empty.num_to_come["digits", "butterfly"] == 3
    hopeless = plan(suite, lambda item: math.inf)
    assert {role for _, role in hopeless.runs} == {"search"}
    assert not hopeless.best_rates

"""experiments.lightbench on a checkout of two small tasks, written here; the page on outcomes that are known."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import lightbench
from experiments.config import Component, ConfigError
from experiments.lightbench import OPTIMIZERS, Row, climb, format_page, rates
from experiments.lightbench_tasks import attempt, build_task, levels_of, opened, tasks_of

UTILS = """
import heavyball.utils
import optuna
from heavyball import chainable as C
from heavyball.helpers import AutoSampler

def trial(model: str | C.BaseOpt, *arguments, **keywords):
    raise AssertionError("the benchmark's own search")
"""
BOWL = """
import typer
from heavyball.utils import set_torch
import torch
from torch import nn
from lightbench.utils import trial

app = typer.Typer()
set_torch()
configs = {"trivial": {"target": 1.0}, "easy": {"target": -1.0}, "medium": {"target": 1e-30}, "hard": {"size": 2}}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.param = nn.Parameter(torch.randn(3))

    def forward(self, inputs):
        return self.param.square().mean() + 0 * inputs.sum()

@app.command()
def main(dtype: str = typer.Option("float64"), steps: int = 10, opt: str = "", config: str = None):
    target = configs[config]["target"]
    model = Model().cuda().double()

    def data():
        return torch.randn(2, device="cuda"), 0.0

    trial(model, data, lambda loss, shift: loss + shift, lambda model, loss: (loss <= target, {}), steps, opt, 0,
          group=4, dtype=dtype)
"""
LINE = """
from lightbench.utils import trial
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.param = nn.Parameter(torch.full((1,), 3.0))

    def forward(self):
        return (4 * self.param).exp().exp().sum()

def main(steps, config):
    trial(Model(), None, None, lambda model, loss: (model.param.item() < 0, {}), steps, "", 0)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "lightbench"
    folder.mkdir(parents=True)
    for name, text in {"__init__": "", "utils": UTILS, "bowl": BOWL, "line": LINE, "MNIST": BOWL}.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder.parent


@pytest.fixture(autouse=True)
def torch_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SOAP needs a package."""
    known = {name: Component(name, {"betas": [0.9, 0.95]}) for name in ("Butterfly", "Adam")}
    monkeypatch.setattr(lightbench, "OPTIMIZERS", known)


def row(level: str, optimizer: str, won: bool, seed: int = 0) -> Row:
    return Row("bowl", level, seed, optimizer, won, 0.1 if won else None, 0.95 if won else None, 1, 0.0, "")


def test_files(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "--checkout",
        str(checkout),
        "--task",
        "bowl",
        "--steps",
        "80",
        "--trials",
        "3",
        "--beta2",
        "--out",
        str(out),
    ]
    assert lightbench.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"results: {out / 'lightbench.md'}\n"
    assert "bowl hard is left out: 'target'" in captured.err
    with (out / "lightbench.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Behind `easy`, which nobody wins, `medium` is not tried.
    assert [(item["level"], item["won"]) for item in rows] == [
        ("trivial", "True"), ("easy", "False"), ("medium", "False"),
    ] * 2  # fmt: skip
    assert [item["trials"] for item in rows if item["level"] != "trivial"] == ["3", "0"] * 2
    page = (out / "lightbench.md").read_text(encoding="utf-8")
    assert "--checkout LightBench --task bowl" in page and str(checkout) not in page
    assert "\n| bowl | 3 | 1 (1) | 1 (1) |" in page and "| decided | 0 | 0 (0) | 0 (0) |" in page


def test_the_model_is_float32_and_of_the_seed(checkout: Path) -> None:
    with opened(checkout) as load:
        bowl = load("bowl")
        first, again, other = (build_task(bowl, "trivial", seed=seed, steps=7) for seed in (0, 0, 1))
    (param,) = first.model.parameters()
    assert param.dtype == torch.float32
    assert param.equal(next(again.model.parameters())) and not param.equal(next(other.model.parameters()))
    assert (first.steps, first.group) == (7, 4)


def test_nothing_is_left_of_the_checkout(checkout: Path) -> None:
    before = list(sys.path)
    names = ("lightbench", "lightbench.utils", "heavyball", "optuna", "typer")
    modules = {name: sys.modules.get(name) for name in names}
    with opened(checkout) as load:
        assert load("bowl").main is not None
        assert sys.modules["heavyball"] is not modules["heavyball"]
    assert sys.path == before
    assert {name: sys.modules.get(name) for name in names} == modules


def test_an_attempt(checkout: Path) -> None:
    with opened(checkout) as load:
        bowl = build_task(load("bowl"), "trivial", seed=0, steps=400)
        line = build_task(load("line"), "trivial", seed=0, steps=4)
    start = next(bowl.model.parameters()).clone()
    assert attempt(bowl, Component("Adam"), 0.1, seed=0)
    assert next(bowl.model.parameters()).equal(start)  # a copy was trained
    assert not attempt(line, Component("Adam"), 0.1, seed=0)  # its loss is infinite


def test_levels(checkout: Path) -> None:
    assert tasks_of(checkout) == ["bowl", "line"]
    with opened(checkout) as load:
        assert levels_of(load("bowl")) == ["trivial", "easy", "medium", "hard"]
        assert levels_of(load("line")) == ["trivial"]


def test_rates_go_out_from_the_last_that_won() -> None:
    assert rates(6, 7.0) == pytest.approx([10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4])
    assert rates(6, 0.12) == pytest.approx([0.1, 1.0, 0.01, 10.0, 1e-3, 1e-4])


@pytest.mark.parametrize(("every", "tried"), [(False, [4, 0]), (True, [4, 4])])
def test_levels_are_climbed(monkeypatch: pytest.MonkeyPatch, every: bool, tried: list[int]) -> None:
    def fails(*_: Any, **__: Any) -> bool:
        raise RuntimeError("no gradient\nat all")

    monkeypatch.setattr(lightbench, "attempt", fails)
    tasks: dict[str, Any] = {"trivial": None, "easy": None}
    rows = list(climb("bowl", tasks, "Adam", seed=0, trials=2, decays=[0.95, 0.99], every=every))
    assert [item.trials for item in rows] == tried
    assert (rows[0].won, rows[0].lr, rows[0].error) == (False, None, "RuntimeError: no gradient")


def test_page() -> None:
    rows = [row("trivial", name, True, seed) for name in ("Butterfly", "Adam") for seed in (0, 1)]
    rows += [row("easy", "Butterfly", True, 0), row("easy", "Butterfly", False, 1)]  # half is not most
    rows += [dataclasses.replace(row("easy", "Adam", True, seed), beta2=0.999) for seed in (0, 1)]
    rows += [row("hard", name, False, seed) for name in ("Butterfly", "Adam") for seed in (0, 1)]
    lost, _, rest = format_page(rows, "head").partition("## Counts")
    assert lost.count("| bowl |") == 1 and "| bowl | easy | lost | won |" in lost
    assert "| decided | 1 | 0 (0) | 1 (0) |\n| all | 3 | 1 (1) | 2 (1) |\n| bowl | 3 | 1 (1) | 2 (1) |" in rest
    assert "## What Butterfly wins and another loses\n\nNone." in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "1"], "--steps must be at least 1, --trials 2, got 512 and 1"),
        (["--task", "bow"], "did you mean 'bowl'?"),
        (["--level", "easier"], "level"),
    ],
)
def test_mistakes(checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert lightbench.main(["--checkout", str(checkout), "--out", str(checkout / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tasks in a folder lightbench"):
        tasks_of(tmp_path)


def test_the_optimizers_start_from_their_defaults() -> None:
    """The entries of the command, which the other tests replace."""
    for name, package in (("Butterfly", "butterfly_opt"), ("Adam", "torch.optim"), ("SOAP", "pytorch_optimizer")):
        if importlib.util.find_spec(package) is None:
            continue
        optimizer = getattr(importlib.import_module(package), name)([torch.nn.Parameter(torch.ones(2))])
        assert tuple(OPTIMIZERS[name].keywords["betas"]) == optimizer.defaults["betas"]

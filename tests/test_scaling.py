"""experiments.scaling, on tiny matrices; the crossover on times that are known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from butterfly_opt.rotation import Rotation
from experiments import scaling
from experiments.config import Component
from experiments.scaling import Row, crossover, describe_crossovers, sweep, time_steps


@pytest.fixture(autouse=True)
def torch_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SOAP needs a package."""
    monkeypatch.setattr(scaling, "OPTIMIZERS", {"Adam": Component("Adam"), "Butterfly": Component("Butterfly")})


def row(optimizer: str, width: int, mean_ms: float) -> Row:
    return Row("width", width, 4, optimizer, 10, mean_ms, mean_ms, 8.0)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--widths", "16", "8", "--depths", "1", "2", "--seconds", "0.001", "--out", str(tmp_path / "out")]
    assert scaling.main(arguments) == 0
    assert capsys.readouterr().out == f"results: {tmp_path / 'out' / 'scaling.md'}\n"
    with (tmp_path / "out" / "scaling.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [("width", "8", "4"), ("width", "16", "4"), ("depth", "128", "1"), ("depth", "128", "2")]
    for name in ("Adam", "Butterfly"):
        own = [item for item in rows if item["optimizer"] == name]
        assert [(item["sweep"], item["width"], item["layers"]) for item in own] == expected
    page = (tmp_path / "out" / "scaling.md").read_text(encoding="utf-8")
    assert page.count("\n| 4 x 8 x 8 |") == page.count("\n| 2 x 128 x 128 |") == 1
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_cycle_holds_one_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two axes; in its first 100 steps Butterfly would refit in every second."""
    refits: list[int] = []
    refit = Rotation.refit_

    def counted(*arguments: Any, **keywords: Any) -> Any:
        refits.append(1)
        return refit(*arguments, **keywords)

    monkeypatch.setattr(Rotation, "refit_", counted)
    pass_warmup = scaling._pass_warmup
    monkeypatch.setattr(scaling, "_pass_warmup", lambda optimizer: (pass_warmup(optimizer), refits.clear()))
    times, _ = time_steps(Component("Butterfly"), 16, 1, seconds=0.0)
    assert (len(times), len(refits)) == (scaling.CYCLE, 2)


def test_the_state_is_counted() -> None:
    assert time_steps(Component("Adam"), 16, 2, seconds=0.0)[1] == pytest.approx(8 + 4 / 256)  # and a counter


def test_what_would_take_too_long_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = sweep("width", [(8, 1), (4096, 1)], ["Adam"], limit=1.0, seconds=0.0)
    assert [item.width for item in rows] == [8]
    assert "Adam at 4096 x 4096 x 1 is left out: more than 1 s" in capsys.readouterr().err


def test_crossover() -> None:
    butterfly = [row("Butterfly", width, 4.0) for width in (64, 256, 1024)]
    others = {"Adam": (1.0, 1.0, 1.0), "SOAP": (1.0, 2.0, 8.0), "Muon": (5.0, 5.0, 5.0)}
    rows = butterfly + [
        row(name, width, ms) for name, times in others.items() for width, ms in zip((64, 256, 1024), times, strict=True)
    ]
    assert crossover(rows, "Adam") is None
    assert crossover(rows, "SOAP") == pytest.approx(512)  # half of the way from 2 to 8 in logarithms
    assert crossover(rows, "Muon") == 64
    text = describe_crossovers(rows, "width")
    assert (
        "Adam: its mean step stays the shorter one. SOAP: Butterfly's mean step is shorter from width 512 on." in text
    )


def test_sizes_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--widths", "0"]) == 2
    assert "widths and depths must be at least 1" in capsys.readouterr().err

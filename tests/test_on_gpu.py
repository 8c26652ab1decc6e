"""experiments.on_gpu, without one."""

from pathlib import Path

import pytest
import torch

from experiments import on_gpu
from experiments.on_gpu import Part


def test_parts_fit_their_time_and_name_what_exists(tmp_path: Path) -> None:
    parts = on_gpu.parts(tmp_path)
    assert sum(part.limit for part in parts) <= 540
    for part in parts:
        for word in part.arguments:
            if word.endswith((".py", ".yaml")):
                assert Path(__file__).parents[1].joinpath(word).is_file(), word


def test_a_part_is_run_and_ended(tmp_path: Path) -> None:
    well = on_gpu.run(Part("well", ("-c", "print('a | b'); print()"), 9), tmp_path, 60)
    wrong = on_gpu.run(Part("wrong", ("-c", "import sys; print('no'); sys.exit(3)"), 9), tmp_path, 60)
    late = on_gpu.run(Part("late", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 9), tmp_path, 2)
    assert [one.status for one in (well, wrong, late)] == [0, 3, None]
    page = on_gpu.summary([well, wrong, late], {"device": "card", "cuda": ""})
    assert page.splitlines()[0] == "device card"
    assert [line.split(" | ")[1] for line in page.splitlines()[4:]] == ["well", "with status 3", "out of time"]
    assert "a / b" in page
    assert "begun" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_ended_badly_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "environment", lambda device: {"device": "card"})
    good, bad = Part("good", ("-c", "pass"), 60), Part("bad", ("-c", "raise SystemExit(1)"), 60)
    for wanted, status in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(on_gpu, "parts", lambda out, wanted=wanted: wanted)
        assert on_gpu.main(["--out", str(tmp_path)]) == status
    monkeypatch.setattr(on_gpu, "parts", lambda out: [good])
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "0"]) == 1
    assert "out of time" in (tmp_path / "summary.md").read_text()

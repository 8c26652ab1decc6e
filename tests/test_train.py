"""experiments.train and experiments.sweep, called in-process; oracle of a resumed run: the run without interruption."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from experiments import loop, sweep, train
from experiments.config import Component, ConfigError, DatasetConfig, load_config
from experiments.data import BatchSampler, Dataset, Split, load_dataset
from experiments.models import build_model
from experiments.optimizers import build_optimizer
from experiments.tasks import Classification
from experiments.trainer import Trainer

QUICK = (
    "steps=6", "batch_size=32", "eval_every=3", "checkpoint_every=3", "schedule.warmup_steps=2",
    "optimizer.name=Adam", "optimizer.lr=3e-3", "model.hidden=[16]", "device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the drawing, most of the time of such short runs."""
    monkeypatch.setattr("experiments.run_folder.draw_curves", lambda rows, file, title: None)


def read_rows(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(folder: str) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder)]


def load(folder: str) -> dict[str, Any]:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def assert_same_state(left: Any, right: Any) -> None:
    """Bit for bit, apart from the clock."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"seconds"}:
            assert_same_state(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same_state(*pair)
    else:
        assert left == right


def expect_error(capsys: pytest.CaptureFixture[str], main: Callable[..., int], *argv: str) -> str:
    """Runs the command, which must fail with one line and write nothing; returns the line."""
    before = sorted(Path().rglob("*"))
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert sorted(Path().rglob("*")) == before
    return lines[0]


def test_a_run_leaves_its_files_and_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("digits_mlp-")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.csv", "checkpoint.pt", "curves.png", "tensorboard"}
    with Image.open(folder / "curves.png") as image:
        assert image.width > 1000
    rows = read_rows(str(folder))
    assert list(rows[0]) == ["step", "train_loss", "lr", "test_loss", "test_accuracy", "seconds"]
    assert [row["step"] for row in rows] == list("123456")
    assert [bool(row["test_loss"]) for row in rows] == [False, False, True] * 2
    assert [float(row["lr"]) for row in rows[:3]] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    out = capsys.readouterr().out
    mean = sum(float(row["train_loss"]) for row in rows) / 6
    assert f"train loss {mean:.4f}" in out
    assert f"test accuracy {float(rows[-1]['test_accuracy']):.2%}" in out
    assert f"run folder: {folder}" in out
    assert out.count("\n") == 1
    # The written configuration is complete: it starts the same run again.
    assert train.main(["--config", str(folder / "config.yaml"), "run_dir=again"]) == 0
    assert without_time("again") == without_time(str(folder))


@pytest.mark.usefixtures("no_curves")
def test_the_default_optimizer_learns(capsys: pytest.CaptureFixture[str]) -> None:
    butterfly_opt = pytest.importorskip("butterfly_opt")
    if not hasattr(butterfly_opt, "Butterfly"):
        pytest.skip("butterfly_opt.Butterfly is not there yet")
    arguments = ["steps=15", "schedule.warmup_steps=3", "model.hidden=[16]", "device=cpu", "run_dir=a"]
    assert train.main(arguments) == 0
    losses = [float(row["train_loss"]) for row in read_rows("a")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("no_curves")
def test_the_seed_decides_the_run() -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train.main([*QUICK, f"seed={seed}", f"run_dir={folder}"]) == 0
    assert without_time("a") == without_time("b")
    assert_same_state(load("a"), load("b"))
    assert without_time("a") != without_time("c")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Calls `act` in the middle of the given training step."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> torch.Tensor:
        if self.step + 1 == step:
            act()
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", ["Adam", "SGD", "Butterfly"])
def test_ctrl_c_then_resume_equals_one_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "Butterfly" and not hasattr(pytest.importorskip("butterfly_opt"), "Butterfly"):
        pytest.skip("butterfly_opt.Butterfly is not there yet")
    # An epoch of 1437 images is 7 steps of 200: one ends before and one after the interruption at step 9.
    arguments = [*QUICK, f"optimizer.name={name}", "steps=16", "batch_size=200", "eval_every=6", "checkpoint_every=6"]
    assert train.main([*arguments, "run_dir=whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, press_ctrl_c)
        capsys.readouterr()
        assert train.main([*arguments, "run_dir=cut"]) == 130
    assert "python -m experiments.train --resume cut" in capsys.readouterr().err
    assert load("cut")["step"] == 9
    assert [row["step"] for row in read_rows("cut")][-1] == "9"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(12345)
    assert train.main(["--resume", "cut"]) == 0
    assert without_time("cut") == without_time("whole")
    assert_same_state(load("cut"), load("whole"))


@pytest.mark.usefixtures("no_curves")
def test_a_second_ctrl_c_leaves_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    assert train.main([*QUICK, "run_dir=whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, press_twice)
        assert train.main([*QUICK, "run_dir=cut"]) == 130
    assert "the checkpoint is at step 3 of 6" in capsys.readouterr().err
    assert train.main(["--resume", "cut", "--device", "cpu"]) == 0
    assert without_time("cut") == without_time("whole")
    assert_same_state(load("cut"), load("whole"))


def test_an_interruption_before_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: DatasetConfig) -> Dataset:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_dataset", interrupted)
    assert train.main([*QUICK, "run_dir=a"]) == 130
    assert "before the training began" in capsys.readouterr().err
    assert not Path("a").exists()


@pytest.mark.usefixtures("no_curves")
def test_later_rows_are_dropped_on_resume() -> None:
    arguments = [*QUICK, "steps=8", "eval_every=4"]
    assert train.main([*arguments, "run_dir=a"]) == 0
    whole = without_time("a")
    # As after a crash between steps 6 and 8: the newest checkpoint is older than the last rows.
    assert train.main([*arguments, "steps=8", "run_dir=b", "checkpoint_every=100"]) == 0
    (Path("b") / "checkpoint.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6, press_ctrl_c)
        assert train.main([*arguments, "run_dir=c"]) == 130
    (Path("c") / "checkpoint.pt").rename(Path("b") / "checkpoint.pt")
    with (Path("b") / "metrics.csv").open("a") as file:
        file.write("9,0.5")
    assert train.main(["--resume", "b"]) == 0
    assert without_time("b") == whole


@pytest.mark.usefixtures("no_curves")
def test_steps_may_grow_without_a_decay(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "schedule.decay=none"]
    assert train.main([*arguments, "steps=9", "run_dir=whole"]) == 0
    assert train.main([*arguments, "run_dir=part"]) == 0
    assert train.main(["--resume", "part", "steps=9"]) == 0
    assert without_time("part") == without_time("whole")
    assert load_config(Path("part/config.yaml")).steps == 9
    capsys.readouterr()
    assert train.main(["--resume", "part"]) == 0
    captured = capsys.readouterr()
    assert "nothing left to do" in captured.err
    assert "test accuracy" in captured.out
    assert without_time("part") == without_time("whole")
    line = expect_error(capsys, train.main, "--resume", "part", "steps=7")
    assert "steps is 7, but the checkpoint in part is at step 9 already" in line


@pytest.mark.usefixtures("no_curves")
def test_what_a_resumed_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK, "run_dir=a"]) == 0
    capsys.readouterr()
    cases = {
        ("a", "optimizer.lr=1"): "'optimizer.lr' cannot change in a resumed run",
        ("a", "steps=9"): "'steps' cannot change in a resumed run whose schedule.decay is cosine",
        ("a", "--config", "a/config.yaml"): "--config and --resume exclude each other",
        ("b",): "there is no run folder b",
        (".",): "the run folder . has no checkpoint.pt",
    }
    for argv, message in cases.items():
        assert message in expect_error(capsys, train.main, "--resume", *argv)
    changed = Path("a/config.yaml").read_text().replace("- 16", "- 17")
    Path("a/config.yaml").write_text(changed)
    assert "does not fit its config.yaml" in expect_error(capsys, train.main, "--resume", "a")
    torch.save({"model": 1}, "a/checkpoint.pt")
    assert "is not a checkpoint of experiments.train" in expect_error(capsys, train.main, "--resume", "a")
    Path("a/checkpoint.pt").write_bytes(b"broken")
    assert "cannot read the checkpoint a/checkpoint.pt" in expect_error(capsys, train.main, "--resume", "a")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("stepz=3",), "unknown key 'stepz'; did you mean 'steps'?"),
        (("steps",), "cannot read the argument 'steps': write key=value"),
        (("--confg", "x"), "unknown option --confg; did you mean '--config'?"),
        (("--config",), "argument --config: expected one argument"),
        (("--config", "none.yaml"), "cannot read the configuration 'none.yaml': no such file"),
        (("--device", "gpu"), "device must be one of auto, cpu, cuda, got 'gpu'"),
        (("optimizer.name=Adamm",), "unknown optimizer 'Adamm' (optimizer.name); did you mean 'Adam'"),
        (("optimizer.name=adam",), "did you mean 'Adam'"),
        (("optimizer.name=torch.optim.Butterfy",), "did you mean 'Butterfly' or 'ButterflyW'?"),
        (("optimizer.name=os.path",), "unknown optimizer 'os.path': no package 'os'"),
        (("optimizer.name=Optimizer",), "unknown optimizer 'Optimizer'"),
        (("optimizer.name=SGD", "optimizer.momentun=1"), "SGD has no keyword 'momentun'; did you mean 'momentum'?"),
        (("optimizer.name=SGD", "optimizer.lr=fast"), "optimizer.lr of torch.optim.SGD must be a number, got 'fast'"),
        (("optimizer.name=SGD", "optimizer.nesterov=1"), "optimizer.nesterov of torch.optim.SGD must be true or false"),
        (("optimizer.name=Adam", "optimizer.betas=0.9"), "must be a list of 2 values, got 0.9"),
        (("optimizer.name=Adam", "optimizer.lr=-1"), "Adam refuses its keywords {'lr': -1}: Invalid"),
        (("optimizer.name=Adam", "optimizer.params=1"), "torch.optim.Adam has no keyword 'params'"),
        (("optimizer.name=LBFGS",), "optimizer 'LBFGS' cannot train these models"),
        (("optimizer.name=SparseAdam",), "optimizer 'SparseAdam' cannot train these models"),
        (("optimizer.name=Adam", "model.name=mpl"), "unknown model 'mpl' (model.name); did you mean 'mlp'?"),
        (("optimizer.name=Adam", "model.hiden=[3]"), "model 'mlp' has no keyword 'model.hiden'; did you mean"),
        (("optimizer.name=Adam", "model.hidden=[0]"), "model.hidden must be a list of positive whole numbers, got [0]"),
        (("optimizer.name=Adam", "model={name: autoencoder, widths: []}"), "model.widths must hold at least"),
        (("optimizer.name=Adam", "model={name: cnn, channels: [4, 4, 4, 4]}"), "too many for 8x8 images"),
        (("optimizer.name=Adam", "dataset.name=mnits"), "dataset.name must be one of"),
        (("optimizer.name=Adam", "dataset.name=mnist", "dataset.root=here"), "get them with dataset.download=true"),
        (("optimizer.name=Adam", "dataset.name=cifar10", "dataset.root=here"), "no usable CIFAR10 data under"),
        (("optimizer.name=Adam", "dataset.name=folder", "dataset.root=here"), "no image folder here/train"),
        (("optimizer.name=Adam", "batch_size=5000"), "batch_size (5000) is larger than the training set (1437)"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in expect_error(capsys, train.main, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no CUDA device" in expect_error(capsys, train.main, *QUICK, "--device", "cuda")


def test_a_failing_download_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **keywords: object) -> None:
        raise RuntimeError("no network\nhere")

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    line = expect_error(capsys, train.main, *QUICK, "dataset.name=mnist", "dataset.download=true")
    assert line == "error: cannot download MNIST to dataset.root=data: no network here"


def test_run_dir_must_be_new(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    line = expect_error(capsys, train.main, *QUICK, "run_dir=full")
    assert "run_dir full is not empty: continue it with --resume full" in line
    assert "run_dir full/file is a file" in expect_error(capsys, train.main, *QUICK, "run_dir=full/file")
    line = expect_error(capsys, train.main, *QUICK, "run_dir=full/file/under")
    assert "cannot write the run folder full/file/under" in line


@pytest.mark.usefixtures("no_curves")
def test_divergence_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "steps=30", "optimizer.name=SGD", "optimizer.lr=1e30"]
    assert train.main([*arguments, "run_dir=a"]) == 1
    assert "try a lower optimizer.lr (run folder: a)" in capsys.readouterr().err
    assert read_rows("a")[-1]["train_loss"] in ("nan", "inf")
    assert load("a")["step"] < 30


@pytest.mark.usefixtures("no_curves")
def test_a_run_in_another_thread_needs_no_signals() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train.main([*QUICK, "run_dir=a"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_autoencoder_has_no_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK[:-2], "model={name: autoencoder, widths: [8, 4]}", "device=cpu", "run_dir=a"]) == 0
    assert {row["test_accuracy"] for row in read_rows("a")} == {""}
    assert "accuracy" not in capsys.readouterr().out
    with Image.open("a/curves.png") as image:
        assert image.width < 1000


@pytest.mark.usefixtures("no_curves")
def test_bfloat16_parameters() -> None:
    assert train.main([*QUICK, "dtype=bfloat16", "run_dir=a"]) == 0
    checkpoint = torch.load("a/checkpoint.pt", weights_only=True)
    assert {value.dtype for value in checkpoint["model"].values()} == {torch.bfloat16}
    assert all(0 < float(row["train_loss"]) < 10 for row in read_rows("a"))


@pytest.mark.usefixtures("no_curves")
def test_diagnostics_reach_tensorboard() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train.main([*QUICK, "optimizer={name: Butterfly, lr: 0.01}", "run_dir=a"]) == 0
    events = EventAccumulator("a/tensorboard").Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("optimizer/")}
    weights = ("1.weight", "3.weight")
    assert tags == {"optimizer/nonfinite_steps"} | {
        f"optimizer/{kind}/{name}" for kind in ("noise", "off_diagonal") for name in weights
    }
    assert [(event.step, event.value) for event in events.Scalars("optimizer/nonfinite_steps")] == [(3, 0.0), (6, 0.0)]


def test_a_failed_write_keeps_the_old_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.run_folder import RunFolder

    folder = RunFolder(Path("a"), load_config(train.find_config(train.DEFAULT_CONFIG)))
    folder.save_checkpoint({"step": 1})

    def half(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        folder.save_checkpoint({"step": 2})
    folder.close()
    assert load("a") == {"step": 1}
    assert not list(Path("a").glob("*.tmp")) + list(Path("a").glob(".*"))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("moment", ["while writing", "before the rename", "after the rename"])
def test_kill_9_during_a_checkpoint_loses_no_earlier_one(moment: str) -> None:
    """The process dies in the save of step 4; what it leaves resumes to the same end as a run of its own."""
    arguments = [*QUICK, "checkpoint_every=2"]
    assert train.main([*arguments, "run_dir=whole"]) == 0

    def die_at_step_4() -> None:
        save, replace = torch.save, Path.replace

        def write(state: dict[str, Any], file: Any) -> None:
            save(state, file)
            if state["step"] == 4:
                if moment == "while writing":
                    file.truncate(file.tell() // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                Path.replace = move  # type: ignore[method-assign]

        def move(self: Path, target: Path) -> Path:
            if moment == "after the rename":
                replace(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
            return target

        torch.save = write
        train.main([*arguments, "run_dir=cut"])

    process = multiprocessing.get_context("fork").Process(target=die_at_step_4)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert load("cut")["step"] == (4 if moment == "after the rename" else 2)
    assert train.main(["--resume", "cut"]) == 0
    assert without_time("cut") == without_time("whole")
    assert_same_state(load("cut"), load("whole"))


def make_images(root: str, *, count: int = 2, size: tuple[int, int] = (6, 5)) -> None:
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (Path(root) / part / name).mkdir(parents=True)
            for index in range(count):
                color = (100 * number, 10 * index, 7)
                Image.new("RGB", size, color).save(Path(root) / part / name / f"{index}.png")


def test_image_folders() -> None:
    make_images("images")
    data = load_dataset(DatasetConfig("folder", "images"))
    assert (data.image_shape, data.num_classes) == ((3, 5, 6), 2)
    assert data.train.targets.tolist() == [0, 0, 1, 1]
    assert data.test.images[:, :, 4, 5].tolist() == [[0, 0, 7], [0, 10, 7], [100, 0, 7], [100, 10, 7]]
    assert data.train.images.dtype == torch.uint8


def test_image_folders_that_do_not_fit() -> None:
    config = DatasetConfig("folder", "images")
    make_images("images")
    Image.new("RGB", (7, 5)).save("images/test/dog/odd.png")
    with pytest.raises(ConfigError, match=r"odd\.png is 7x5 pixels, other images are 6x5: all must have one size"):
        load_dataset(config)
    Path("images/test/dog/odd.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cannot read the image .*odd\.png"):
        load_dataset(config)
    Path("images/test/dog/odd.png").unlink()
    Path("images/test/dog").rename("images/test/cow")
    with pytest.raises(ConfigError, match="train and test have different classes: cow, dog"):
        load_dataset(config)


def test_batches_are_permutations_and_resume() -> None:
    batches = BatchSampler(10, batch_size=3, seed=0)
    epochs = [torch.cat([batches.draw() for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    batches.draw()
    state = batches.state_dict()
    expected = [batches.draw().tolist() for _ in range(7)]
    other = BatchSampler(10, batch_size=3, seed=99)
    other.load_state_dict(state)
    assert [other.draw().tolist() for _ in range(7)] == expected
    with pytest.raises(ValueError, match="the training set had 10 samples, now 11"):
        BatchSampler(11, batch_size=3, seed=0).load_state_dict(state)


def test_inputs_are_normalised_per_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5000, 3, 2, 2), dtype=torch.uint8, generator=generator)
    images[:, 2] = 9
    split = Split(images, torch.zeros(5000, dtype=torch.int64))
    inputs = Classification(Dataset(split, split, 1)).prepare(images)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    deviation = inputs.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_lists_become_tuples() -> None:
    optimizer = build_optimizer(Component("Adam", {"betas": [0.8, 0.9]}), [torch.nn.Parameter(torch.ones(1))])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match="pytorch_optimizer does not import"):
        build_optimizer(Component("pytorch_optimizer.SOAP"), [torch.nn.Parameter(torch.ones(1))])


def test_resnet_keeps_the_resolution() -> None:
    model = build_model(Component("resnet18"), (3, 32, 32), 10)
    stem = torch.nn.Sequential(model.conv1, model.maxpool)
    assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


def test_sweep_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--lr", "3e-3", "1e-2", *QUICK[:5], *QUICK[7:], "--seeds", "0", "1"]
    argv += ["--optimizer", "Adam betas=[0.9, 0.99] steps=8", "--optimizer", "SGD lr=0.5"]
    assert sweep.main(argv) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| optimizer | lr | steps | seeds | train loss |")
    assert set(rule) == {"|", "-"}
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:4] for row in cells] == [
        ["Adam betas=[0.9, 0.99]", "0.003", "8", "2"],
        ["Adam betas=[0.9, 0.99]", "0.01", "8", "2"],
        ["SGD", "0.5", "6", "2"],
    ]
    assert not Path("runs").exists()
    for row in cells:
        for cell in row[4:]:
            median, low, high = (float(word.strip("[],%")) for word in cell.split())
            assert low <= median <= high


@pytest.mark.usefixtures("no_curves")
def test_sweep_and_train_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK, "run_dir=a"]) == 0
    test_loss = float(read_rows("a")[-1]["test_loss"])
    capsys.readouterr()
    assert sweep.main([*QUICK]) == 0
    assert f"| {test_loss:.4f} |" in capsys.readouterr().out


def test_sweep_reports_divergence_and_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*QUICK[:5], "steps=30", "--optimizer", "SGD lr=1e30", "--optimizer", "SGD lr=0.1"]
    assert sweep.main(argv) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert "diverged" in rows[0]
    assert "diverged" not in rows[1]

    def interrupt(*args: object, **keywords: object) -> loop.Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "fit", interrupt)
    assert sweep.main(argv) == 130
    assert "interrupted: the table holds the finished runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--lr", "fast"), "--lr takes numbers, got 'fast'"),
        (("--seeds", "0.5"), "--seeds takes whole numbers, got '0.5'"),
        (("--seeds", "-1", "--optimizer", "SGD"), "seed must be at least 0"),
        (("--optimizer", ""), 'cannot read --optimizer ""'),
        (("--optimizer", "Adam lr"), 'cannot read --optimizer "Adam lr"'),
        (("--optimizer", "Adam steps=x"), 'steps in --optimizer "Adam steps=x" must be a whole number'),
        (("--optimizer", "Adam steps=9"), "schedule.warmup_steps must be between 0 and steps (9), got 20"),
        (("--optimizer", "Adam foo=1"), "torch.optim.Adam has no keyword 'foo'"),
        (("--optimizer", "Adam", "optimizer.betas=[0,0]"), "'optimizer.betas' has no effect beside --optimizer"),
        (("--optimiser", "Adam"), "unknown option --optimiser; did you mean '--optimizer'?"),
    ],
)
def test_sweep_mistakes_are_one_line(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in expect_error(capsys, sweep.main, *argv)

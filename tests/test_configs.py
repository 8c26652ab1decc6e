"""experiments.config, and every YAML file in configs/: it loads, its model runs forward and its parts fit together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments.config import Component, ConfigError, apply_overrides, config_from_dict, load_config, parse_value
from experiments.data import Dataset, Split
from experiments.optimizers import lr_factor
from experiments.trainer import Trainer

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
MINIMAL = "dataset: {name: digits}\nmodel: {name: mlp}\noptimizer: {name: Adam, lr: 1e-3}\nsteps: 5\n"
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def write(folder: Path, text: str) -> Path:
    path = folder / "case.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_model_runs(path: Path) -> None:
    config = load_config(path)
    assert config.optimizer.name == "Butterfly"
    assert config.optimizer.keywords.keys() == {"lr"}
    assert not config.dataset.download
    shape = SHAPES[config.dataset.name]
    images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.tensor([0, 1, 2, 9]))
    # SGD: what is tested are the file and the model.
    small = dataclasses.replace(config, batch_size=4, optimizer=Component("SGD", {"lr": 0.0}))
    trainer = Trainer(small, Dataset(split, split, 10), torch.device("cpu"))
    output = trainer.model(trainer.task.prepare(images))
    assert output.shape == (4, 10 if trainer.task.has_accuracy else shape[0] * shape[1] * shape[2])
    assert torch.isfinite(trainer.task.loss(output, trainer.task.prepare(images), split.targets))


def test_autoencoder_is_the_documented_network() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "mnist_autoencoder"))
    assert (config.steps, config.batch_size, config.schedule.warmup_steps, config.schedule.decay) == (
        400,
        128,
        50,
        "linear",
    )
    split = Split(torch.zeros(128, 1, 28, 28, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64))
    small = dataclasses.replace(config, optimizer=Component("SGD", {"lr": 0.0}))
    trainer = Trainer(small, Dataset(split, split, 10), torch.device("cpu"))
    layers = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == [256, 64, 16, 64, 256, 784]
    # The code is linear: layer 5 (the 16 numbers) is followed by a linear layer, not by ReLU.
    kinds = [type(module).__name__ for module in trainer.model.children()]
    assert kinds == ["Flatten", *["Linear", "ReLU"] * 2, "Linear", *["Linear", "ReLU"] * 2, "Linear"]
    # Logits 0 give log 2 per pixel, times 784/100.
    inputs = trainer.task.prepare(split.images)
    loss = trainer.task.loss(torch.zeros(128, 784), inputs, split.targets)
    torch.testing.assert_close(loss, torch.tensor(2.0).log() * 7.84)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("7", 7),
        ("true", True),
        ("no", "no"),
        ("null", None),
        ("", None),
        ("2024-01-02", "2024-01-02"),
        ("12:30", "12:30"),
        ("[0.9, 1e-2]", [0.9, 1e-2]),
        ("{name: SGD}", {"name": "SGD"}),
    ],
)
def test_scalars_read_as_one_expects(text: str, value: object) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_overrides_reach_into_sections_and_keep_text_as_text(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=3e-3", "run_dir=7", "dataset.root=1e3", "schedule.decay=none", "model.hidden=[3]"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.optimizer == Component("Adam", {"lr": 3e-3})
    assert (config.run_dir, config.dataset.root, config.schedule.decay) == ("7", "1e3", "none")
    assert config.model == Component("mlp", {"hidden": [3]})
    assert load_config(write(tmp_path, MINIMAL), ["run_dir=null"]).run_dir is None
    replaced = load_config(write(tmp_path, MINIMAL), ["optimizer={name: SGD, momentum: 0.9}"])
    assert replaced.optimizer == Component("SGD", {"momentum": 0.9})


def test_dictionary_round_trip(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["optimizer.betas=[0.9,0.99]"])
    assert config_from_dict(config.to_dict()) == config


def test_overrides_leave_the_mapping_alone() -> None:
    raw = {"model": {"name": "mlp"}}
    assert apply_overrides(raw, ["model.name=cnn"]) == {"model": {"name": "cnn"}}
    assert raw == {"model": {"name": "mlp"}}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("stepz: 3", r"unknown key 'stepz'; did you mean 'steps'\?"),
        ("schedule: {warmup: 3}", r"unknown key 'schedule.warmup'; did you mean 'warmup_steps'\?"),
        ("seed: 0.5", r"seed must be a whole number, got 0.5 \(float\)"),
        ("seed: true", r"seed must be a whole number, got True \(bool\)"),
        ("run_dir: 3", r"run_dir must be text, got 3 \(int\)"),
        ("batch_size: 0", r"batch_size must be at least 1"),
        ("seed: -1", r"seed must be at least 0"),
        ("device: cude", r"device must be one of auto, cpu, cuda, got 'cude' \(str\); did you mean 'cud"),
        ("device: [cpu]", r"device must be one of auto, cpu, cuda, got \['cpu'\] \(list\)"),
        ("schedule: {decay: cosinus}", r"schedule.decay must be one of .*did you mean 'cosine'\?"),
        ("schedule: 3", r"schedule must be a section of keys, got 3 \(int\)"),
        ("schedule:", r"schedule must be a section of keys, got nothing"),
        ("schedule: {warmup_steps: 6}", r"schedule.warmup_steps must be between 0 and steps \(5\), got 6"),
        ("1: 2", r"key 1 of the configuration must be text"),
        ("steps: 6", r"line 1: key 'steps' is given twice"),
        ("seed: [", r"is not valid YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, extra: str, message: str) -> None:
    path = write(tmp_path, MINIMAL + extra)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3", r"missing key 'dataset'"),
        ("- 3", r"must hold a mapping of keys to values, got \[3\]"),
        ("", r"must hold a mapping of keys to values, got nothing"),
        (MINIMAL.replace("name: mlp", "hidden: [3]"), r"missing key 'model.name'"),
        (MINIMAL.replace("{name: digits}", "{download: true}"), r"missing key 'dataset.name'"),
        (MINIMAL.replace("digits", "digitz"), r"dataset.name must be one of .*did you mean 'digits'\?"),
    ],
)
def test_an_incomplete_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", r"cannot read the argument 'steps': write key=value"),
        ("=3", r"cannot read the argument '=3'"),
        ("a..b=3", r"cannot read the argument 'a..b=3'"),
        ("stepz=3", r"unknown key 'stepz'; did you mean 'steps'\?"),
        ("dataset.nam=x", r"unknown key 'dataset.nam'; did you mean 'name'\?"),
        ("steps.x=3", r"unknown key 'steps.x': 'steps' is not a section"),
        ("steps=many", r"steps must be a whole number, got 'many' \(str\)"),
        ("steps=1e3", r"steps must be a whole number, got 1000.0 \(float\)"),
        ("steps=", r"steps must be a whole number, got nothing"),
        ("optimizer.betas=[0.9", r"cannot read the value '\[0.9'"),
        ("dataset.download=yes", r"dataset.download must be true or false, got 'yes' \(str\)"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])


def test_a_missing_file_has_near_matches(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"no configuration file .*cas\.yaml; did you mean '.*case\.yaml'\?"):
        load_config(tmp_path / "cas.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "binary.yaml")


def test_schedule_values(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "schedule: {warmup_steps: 2, decay: linear}\n")

    def factors(*overrides: str) -> list[float]:
        config = load_config(path, overrides)
        return [lr_factor(step, steps=config.steps, schedule=config.schedule) for step in range(config.steps + 1)]

    assert factors("steps=6") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    assert factors("steps=6", "schedule.decay=none") == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])
    half = 0.5**0.5
    cosine = [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
    assert factors("steps=6", "schedule.decay=cosine") == pytest.approx(cosine)
    assert factors("steps=2") == pytest.approx([0.5, 1, 1])

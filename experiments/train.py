"""Trains one model: `python -m experiments.train [--config FILE] [--resume RUN_DIR] [key=value ...]`.

Exit codes: 0 done, 1 the loss became infinite or not a number, 2 a mistake in the configuration, the
arguments or the data (one line on stderr, nothing written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from experiments.config import (
    Config,
    ConfigError,
    apply_overrides,
    config_from_dict,
    load_config,
    near_matches,
    split_override,
)
from experiments.data import load_dataset
from experiments.loop import DivergedError, Outcome, StoppedError, fit
from experiments.models import check_model
from experiments.optimizers import check_optimizer
from experiments.run_folder import RunFolder, check_new_folder, default_folder, load_checkpoint
from experiments.trainer import Trainer, choose_device

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_CONFIG = "digits_mlp"


def find_config(name: str) -> Path:
    """The file that `--config` names: a path, or the name of a file in configs/ (with or without .yaml).

    Raises:
        ConfigError: if there is neither, with the names that exist.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise ConfigError(
        f"cannot read the configuration '{name}': no such file, and none of that name in {CONFIGS}"
        f"{near_matches(Path(name).stem, known)}"
    )


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `ConfigError`s, with near matches of unknown options."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as a `ConfigError`, without argparse's usage lines."""
        match = re.match(r"unrecognized arguments: (-\S*)", message)
        if match:
            options = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option {match[1]}{near_matches(match[1].partition('=')[0], options)}"
        raise ConfigError(f"{message} (--help shows the usage)")


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    keys = ", ".join(field.name for field in dataclasses.fields(Config))
    parser = Parser(
        prog="python -m experiments.train",
        description="Train a model.",
        epilog=f"configurations: {', '.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}; keys: {keys}",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"a name from configs/ or a YAML file, by default {DEFAULT_CONFIG}")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue a run from its checkpoint")
    parser.add_argument("--device", metavar="{auto,cpu,cuda}", help="where to train, the same as device=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=0.02 steps=500")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.device is not None:
        arguments.overrides.append(f"device={arguments.device}")
    return arguments


def check_config(config: Config) -> None:
    """Checks what can be checked before the data are loaded."""
    choose_device(config.device)
    check_model(config.model)
    check_optimizer(config.optimizer)


def _prepare_new(arguments: argparse.Namespace) -> tuple[Trainer, Path]:
    config_path = find_config(arguments.config or DEFAULT_CONFIG)
    config = load_config(config_path, arguments.overrides)
    check_config(config)
    folder = Path(config.run_dir) if config.run_dir is not None else default_folder(config_path)
    check_new_folder(folder)
    return _build(config), folder


def _prepare_resumed(arguments: argparse.Namespace) -> tuple[Trainer, Path]:
    folder: Path = arguments.resume
    if arguments.config is not None:
        raise ConfigError("--config and --resume exclude each other: a resumed run keeps its own config.yaml")
    state = load_checkpoint(folder)
    config = load_config(folder / "config.yaml")
    for override in arguments.overrides:
        key, _ = split_override(override)
        if key not in ("device", "steps"):
            raise ConfigError(f"'{key}' cannot change in a resumed run; only device, and steps without a decay, can")
        if key == "steps" and config.schedule.decay != "none":
            raise ConfigError(
                f"'steps' cannot change in a resumed run whose schedule.decay is {config.schedule.decay}: "
                "the learning rates so far depend on it"
            )
    config = config_from_dict(apply_overrides(config.to_dict(), arguments.overrides))
    if config.steps < state["step"]:
        raise ConfigError(f"steps is {config.steps}, but the checkpoint in {folder} is at step {state['step']} already")
    check_config(config)
    trainer = _build(config)
    try:
        trainer.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"the checkpoint in {folder} does not fit its config.yaml: {error}") from error
    return trainer, folder


def _build(config: Config) -> Trainer:
    device = choose_device(config.device)
    resolved = dataclasses.replace(config, device="cuda" if device.type == "cuda" else "cpu")
    return Trainer(resolved, load_dataset(config.dataset), device)


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, since an update cut in two leaves no usable state; the second one raises."""
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        print("\ninterrupted: finishing this step (Ctrl-C again stops at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: requested  # signals cannot be handled here
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)


def summary(outcome: Outcome) -> str:
    """One line of the results."""
    accuracy = outcome.evaluation.accuracy
    return (
        f"train loss {outcome.train_loss:.4f} (mean of the last 20 steps), test loss {outcome.evaluation.loss:.4f}, "
        + (f"test accuracy {accuracy:.2%}, " if accuracy is not None else "")
        + f"{outcome.seconds:.1f} s"
    )


def _run(trainer: Trainer, path: Path) -> int:
    start = trainer.step
    if start:
        note = "nothing left to do" if start == trainer.config.steps else f"continuing after step {start}"
        print(f"{path}: {note}", file=sys.stderr)
    try:
        folder = RunFolder(path, trainer.config, resume_step=start)
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {path}: {error.strerror or error}") from error
    try:
        # The curves are drawn inside too: a late Ctrl-C must not cut them off.
        with _interrupt_flag() as should_stop, contextlib.closing(folder):
            outcome = fit(trainer, folder, should_stop=should_stop)
    except (StoppedError, KeyboardInterrupt):
        saved = load_checkpoint(path)["step"]
        print(
            f"stopped; the checkpoint is at step {saved} of {trainer.config.steps}; "
            f"continue with: python -m experiments.train --resume {path}",
            file=sys.stderr,
        )
        return 130
    except DivergedError as error:
        print(f"error: {error} (run folder: {path})", file=sys.stderr)
        return 1
    print(f"{summary(outcome)}, run folder: {path}")
    return 0


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; turns its mistakes and interruptions into one line on stderr and an exit code."""
    try:
        return command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the training began", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def command() -> int:
        arguments = _parse_arguments(argv)
        trainer, path = (_prepare_resumed if arguments.resume else _prepare_new)(arguments)
        return _run(trainer, path)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())

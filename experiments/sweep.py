"""Compares optimizers and learning rates on one configuration and prints a Markdown table.

python -m experiments.sweep --config configs/mnist_autoencoder.yaml --lr 3e-3 1e-2 \
    --optimizer Butterfly --optimizer "Adam betas=[0.9,0.99] steps=800" --seeds 0 1 2

No files are written. `eval_every` and `checkpoint_every` are not used: the test set is evaluated at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable, Sequence

from experiments.config import (
    Component,
    Config,
    ConfigError,
    config_from_dict,
    load_config,
    parse_value,
    split_override,
)
from experiments.data import Dataset, load_dataset
from experiments.loop import DivergedError, NullRecorder, Outcome, fit
from experiments.train import DEFAULT_CONFIG, Parser, check_config, exit_code, find_config
from experiments.trainer import Trainer, choose_device


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table: a configuration (its seed is not used) and what to call it."""

    label: str
    config: Config


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.sweep", description="Compare optimizers.", allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=f"as in experiments.train; default: {DEFAULT_CONFIG}")
    parser.add_argument("--lr", nargs="+", default=[], help="learning rates; default: the configuration's")
    parser.add_argument(
        "--optimizer",
        action="append",
        default=[],
        metavar="SPEC",
        help='name and keywords, also its own lr and steps: "Adam betas=[0.9,0.99] steps=800"; may be repeated',
    )
    parser.add_argument("--seeds", nargs="+", default=[], help="default: the configuration's seed")
    parser.add_argument("--device", metavar="{auto,cpu,cuda}", help="the same as device=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in experiments.train")
    arguments = parser.parse_intermixed_args(argv)
    # `--lr 1e-2 steps=50`: what follows a list of numbers and has a "=" is an override.
    for name in ("lr", "seeds"):
        words = getattr(arguments, name)
        arguments.overrides += [word for word in words if "=" in word]
        setattr(arguments, name, [word for word in words if "=" not in word])
    if arguments.device is not None:
        arguments.overrides.append(f"device={arguments.device}")
    return arguments


def parse_spec(spec: str, config: Config) -> tuple[Component, int]:
    """Reads "Name key=value ..." into the optimizer and its number of steps."""
    # Values such as [0.9, 0.99] may hold spaces: only a space before the next key separates.
    name, *items = re.split(r"\s+(?=[A-Za-z_][\w.]*=)", spec.strip())
    if not re.fullmatch(r"[\w.]+", name):
        raise ConfigError(f'cannot read --optimizer "{spec}": write a name, then key=value with spaces between')
    pairs = [split_override(item) for item in items]
    keywords = {key: parse_value(value) for key, value in pairs}
    steps = keywords.pop("steps", config.steps)
    if type(steps) is not int:
        raise ConfigError(f'steps in --optimizer "{spec}" must be a whole number, got {steps!r}')
    return Component(name, keywords), steps


def _numbers(words: Sequence[str], option: str, kind: type[int] | type[float]) -> list[float]:
    values = [parse_value(word) for word in words]
    for word, value in zip(words, values, strict=True):
        if type(value) is not int and not (kind is float and type(value) is float):
            raise ConfigError(f"{option} takes {'numbers' if kind is float else 'whole numbers'}, got {word!r}")
    return values


def build_entries(config: Config, specs: Sequence[str], rates: Sequence[float]) -> list[Entry]:
    """Every optimizer with every rate; an `lr` inside a spec is used instead of the rates.

    A spec starts from the optimizer's own defaults: the configuration's optimizer section is used only without specs.
    """
    bases = [parse_spec(spec, config) for spec in specs] or [(config.optimizer, config.steps)]
    entries = []
    for component, steps in bases:
        keywords = {key: value for key, value in component.keywords.items() if key != "lr"}
        label = " ".join([component.name, *(f"{key}={value}" for key, value in keywords.items())])
        own_rates = [component.keywords["lr"]] if specs and "lr" in component.keywords else list(rates)
        if not own_rates:
            own_rates = [component.keywords.get("lr", config.optimizer.keywords.get("lr"))]
        for rate in own_rates:
            with_rate = {**keywords, "lr": rate} if rate is not None else keywords
            optimizer = Component(component.name, with_rate)
            entry = dataclasses.replace(config, optimizer=optimizer, steps=steps, eval_every=steps)
            # Through the checks again: the spec's steps may contradict the warm-up.
            entries.append(Entry(label, config_from_dict(entry.to_dict())))
    return entries


def _train(config: Config, data: Dataset, label: str) -> Outcome | None:
    """Returns None when the run diverged."""
    try:
        return fit(Trainer(config, data, choose_device(config.device)), NullRecorder(), label=label)
    except DivergedError as error:
        print(f"{label}: {error}", file=sys.stderr)
        return None


def _cell(outcomes: Sequence[Outcome | None], read: Callable[[Outcome], float | None], style: str) -> str:
    """Median and, with several seeds, [min, max]."""
    values = [read(outcome) for outcome in outcomes if outcome is not None]
    numbers = [value for value in values if value is not None]
    lost = len(outcomes) - len(values)
    if not values:
        return "diverged"
    if not numbers:
        return "-"
    text = format(statistics.median(numbers), style)
    if len(numbers) > 1:
        text += f" [{min(numbers):{style}}, {max(numbers):{style}}]"
    return text + (f" ({lost} diverged)" if lost else "")


def format_table(results: Sequence[tuple[Entry, Sequence[Outcome | None]]]) -> str:
    """The Markdown table; the median over the seeds, with the smallest and the largest value."""
    lines = [
        "| optimizer | lr | steps | seeds | train loss | test loss | test accuracy | ms per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry, outcomes in results:
        cells = (
            entry.label,
            str(entry.config.optimizer.keywords.get("lr", "default")),
            str(entry.config.steps),
            str(len(outcomes)),
            _cell(outcomes, lambda outcome: outcome.train_loss, ".4f"),
            _cell(outcomes, lambda outcome: outcome.evaluation.loss, ".4f"),
            _cell(outcomes, lambda outcome: outcome.evaluation.accuracy, ".2%"),
            _cell(outcomes, lambda outcome: outcome.step_ms, ".2f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sweep(entries: Sequence[Entry], seeds: Sequence[int], data: Dataset) -> int:
    results: list[tuple[Entry, list[Outcome | None]]] = []
    code = 0
    try:
        for entry in entries:
            outcomes: list[Outcome | None] = []
            for seed in seeds:
                label = f"{entry.label} lr={entry.config.optimizer.keywords.get('lr', 'default')} seed={seed}"
                outcomes.append(_train(dataclasses.replace(entry.config, seed=seed), data, label))
                if len(outcomes) == 1:
                    results.append((entry, outcomes))
    except KeyboardInterrupt:
        print("interrupted: the table holds the finished runs", file=sys.stderr)
        code = 130
    print(format_table(results))
    return code


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parse_arguments(argv)
    if arguments.optimizer:
        for key in (split_override(override)[0] for override in arguments.overrides):
            if key.partition(".")[0] == "optimizer":
                raise ConfigError(f"'{key}' has no effect beside --optimizer: put the keyword into its SPEC")
    config = load_config(find_config(arguments.config), arguments.overrides)
    rates = _numbers(arguments.lr, "--lr", float)
    seeds = [int(seed) for seed in _numbers(arguments.seeds, "--seeds", int)] or [config.seed]
    entries = build_entries(config, arguments.optimizer, rates)
    for entry in entries:
        for seed in seeds:
            config_from_dict({**entry.config.to_dict(), "seed": seed})
        check_config(entry.config)
    data = load_dataset(config.dataset).to(choose_device(config.device))
    return _sweep(entries, seeds, data)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

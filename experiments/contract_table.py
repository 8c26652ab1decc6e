"""Runs what a torch optimizer promises on several optimizers and prints a Markdown table of yes and no.

python -m experiments.contract_table [--why]

The rows are the probes of `experiments.contract_probes` and `experiments.contract_life`: small CPU runs, the
same for every optimizer, with its defaults (no weight decay). A probe that raises is a no. SOAP and Kron are
those of `pytorch_optimizer`; without that package their columns are left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer

import experiments.contract_life  # noqa: F401  registers its rows
from butterfly_opt import Butterfly
from experiments.contract_probes import PROBES, Maker, answer

PEERS = ("SOAP", "Kron")


def contenders() -> dict[str, Maker]:
    """The columns of the table."""
    classes: dict[str, type[Optimizer]] = {"Butterfly": Butterfly, "torch Adam": torch.optim.Adam}
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        print(f"without {' and '.join(PEERS)}: pytorch_optimizer does not import ({error})", file=sys.stderr)
    else:
        classes |= {name: getattr(package, name) for name in PEERS}
    return {name: Maker(kind) for name, kind in classes.items()}


def run(makers: dict[str, Maker], report: Callable[[str], None]) -> dict[str, dict[str, bool]]:
    """Asks every probe of every optimizer; ``report`` gets a line for each that raised.

    Returns:
        Row -> column -> yes or no.
    """
    answers: dict[str, dict[str, bool]] = {}
    for name, probe in PROBES.items():
        answers[name] = {}
        for column, make in makers.items():
            answers[name][column], reason = answer(probe, make)
            if reason:
                report(f"{column}: {name}: {reason}")
    return answers


def markdown(answers: dict[str, dict[str, bool]]) -> str:
    """The table, with a line of sums."""
    columns = list(next(iter(answers.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in answers.items():
        lines.append(f"| {name} | {' | '.join('yes' if row[column] else 'no' for column in columns)} |")
    sums = [f"{sum(row[column] for row in answers.values())} of {len(answers)}" for column in columns]
    return "\n".join([*lines, f"| **yes** | {' | '.join(sums)} |"])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; with ``--why`` also what was raised, on standard error."""
    parser = argparse.ArgumentParser(prog="python -m experiments.contract_table", description="Who keeps the contract.")
    parser.add_argument("--why", action="store_true", help="print what each probe that raised has raised")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are tiny
    print(markdown(run(contenders(), lambda line: print(line, file=sys.stderr) if arguments.why else None)))


if __name__ == "__main__":
    main()

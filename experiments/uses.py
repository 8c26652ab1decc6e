"""Uses of the inverse Hessian after training.

python -m experiments.uses {influence,laplace,preconditioner,large} [--block 64] [--lead 16] [--n 256] [--seed 0]

Each example prints a Markdown table that compares estimates from several sources (`experiments/uses_model.py`) with the
exact inverse on a small model, where they help and where they do not; `large` does so on 50,826 parameters with
conjugate gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from experiments.uses_influence import influence
from experiments.uses_laplace import laplace
from experiments.uses_large import large
from experiments.uses_model import all_estimates, trained
from experiments.uses_preconditioner import fitted_systems, held_out_systems

L2 = {"influence": 0.01, "laplace": 0.001, "preconditioner": 0.001}
"""Regularisation of the model of each example. The flatter the minimum, the wider the posterior."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one example."""
    parser = argparse.ArgumentParser(prog="python -m experiments.uses", description="Uses of the inverse Hessian.")
    parser.add_argument("use", choices=[*L2, "large"])
    parser.add_argument("--block", type=int, default=64, help="coordinates of a group (default: 64)")
    parser.add_argument("--lead", type=int, default=16, help="outputs of a group that go on (default: 16)")
    parser.add_argument("--n", type=int, default=256, help="order of the synthetic matrices (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of probes and samples (default: 0)")
    arguments = parser.parse_args(argv)
    plan, seed = {"block": arguments.block, "lead": arguments.lead}, arguments.seed
    if arguments.use == "large":
        large(**plan, seed=seed)
        return
    model = trained(L2[arguments.use])
    estimates = all_estimates(model, **plan, seed=seed)
    if arguments.use == "influence":
        influence(model, estimates)
    elif arguments.use == "laplace":
        laplace(model, estimates, seed=seed)
    else:
        print("| system | preconditioner | iterations |\n|---|---|---|")
        fitted_systems(n=arguments.n, **plan, seed=seed)
        held_out_systems(model, estimates)


if __name__ == "__main__":
    main()

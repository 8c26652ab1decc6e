"""Uses of the inverse Hessian after training.

python -m experiments.uses {influence,laplace,preconditioner} [--depth 4] [--steps 100] [--n 256] [--seed 0]

Each example prints a Markdown table that compares estimates from several sources (`experiments/uses_model.py`) with the
exact inverse on a small model, where they help and where they do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from experiments.uses_influence import influence
from experiments.uses_laplace import laplace
from experiments.uses_model import all_estimates, trained
from experiments.uses_preconditioner import fitted_systems, held_out_systems

L2 = {"influence": 0.01, "laplace": 0.001, "preconditioner": 0.001}
"""Regularisation of the model of each example. The flatter the minimum, the wider the posterior."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one example."""
    parser = argparse.ArgumentParser(prog="python -m experiments.uses", description="Uses of the inverse Hessian.")
    parser.add_argument("use", choices=L2)
    parser.add_argument("--depth", type=int, default=4, help="butterflies of a fit (default: 4)")
    parser.add_argument("--steps", type=int, default=100, help="angle steps of a fit (default: 100)")
    parser.add_argument("--n", type=int, default=256, help="order of the synthetic matrices (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of probes and samples (default: 0)")
    arguments = parser.parse_args(argv)
    depth, steps, seed = arguments.depth, arguments.steps, arguments.seed
    model = trained(L2[arguments.use])
    estimates = all_estimates(model, depth=depth, steps=steps, seed=seed)
    if arguments.use == "influence":
        influence(model, estimates)
    elif arguments.use == "laplace":
        laplace(model, estimates, seed=seed)
    else:
        print("| system | preconditioner | iterations |\n|---|---|---|")
        fitted_systems(n=arguments.n, depth=depth, steps=steps, seed=seed)
        held_out_systems(model, estimates)


if __name__ == "__main__":
    main()

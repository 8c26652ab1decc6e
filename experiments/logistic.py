"""Quasi-Newton steps on a convex problem: gradient evaluations of L2-regularised logistic regression.

python -m experiments.logistic [--l2 0.01] [--limit 1000]

Digits, full batch, float64, from zero. Counts gradient evaluations until the gradient norm is 1e-4 of
its start, for each optimizer at its best learning rate of a grid. L-BFGS and BFGS are printed beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch import Tensor

from butterfly_opt import Butterfly

TARGET = 1e-4


@dataclass
class Problem:
    """Mean cross-entropy of a linear classifier with bias, plus ``l2 / 2 |W|^2``."""

    l2: float

    def __post_init__(self) -> None:
        digits = load_digits()
        inputs = torch.tensor(digits.data / 16, dtype=torch.float64)
        self.inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        self.targets = torch.tensor(digits.target)

    def loss(self, weight: Tensor) -> Tensor:
        """The objective of a (10, 65) weight."""
        return (
            torch.nn.functional.cross_entropy(self.inputs @ weight.T, self.targets)
            + self.l2 / 2 * weight.square().sum()
        )

    def evaluations(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], limit: int) -> int | None:
        """Gradient evaluations to the target; None if not within ``limit`` steps."""
        weight = torch.zeros(10, 65, dtype=torch.float64, requires_grad=True)
        optimizer = make([weight])
        norms: list[float] = []

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss(weight)
            loss.backward()
            assert weight.grad is not None
            norms.append(weight.grad.norm().item())
            return loss.item()

        for _ in range(limit):
            optimizer.step(closure)
            if min(norms) < TARGET * norms[0]:
                return next(i for i, norm in enumerate(norms, 1) if norm < TARGET * norms[0])
            if not norms[-1] < 1e6:
                return None
        return None


def contenders() -> dict[str, tuple[list[float], Callable[[float], Callable[[list[Tensor]], torch.optim.Optimizer]]]]:
    """Optimizers with their learning-rate grids."""
    return {
        "Butterfly newton, one dense block": (
            [1.0],
            lambda lr: lambda p: Butterfly(p, lr=lr, diagonal="newton", structure="flat", block=650, lead=64),
        ),
        "Butterfly newton, blocks of 64": (
            [1.0],
            lambda lr: lambda p: Butterfly(p, lr=lr, diagonal="newton", structure="flat"),
        ),
        "Adam betas=(0.9, 0.99)": (
            [0.01, 0.03, 0.1, 0.3],
            lambda lr: lambda p: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.99)),
        ),
        "Adam": ([0.01, 0.03, 0.1, 0.3], lambda lr: lambda p: torch.optim.Adam(p, lr=lr)),
        "SGD momentum 0.9": ([0.3, 1.0, 3.0, 10.0], lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9)),
        "torch LBFGS": ([1.0], lambda lr: lambda p: torch.optim.LBFGS(p, lr=lr, max_iter=1)),
    }


def scipy_evaluations(problem: Problem) -> int:
    """Evaluations of scipy's BFGS to the same gradient norm."""
    norms: list[float] = []

    def value_and_gradient(flat):  # type: ignore[no-untyped-def]
        weight = torch.from_numpy(flat).view(10, 65).clone().requires_grad_()
        loss = problem.loss(weight)
        loss.backward()
        assert weight.grad is not None
        norms.append(weight.grad.norm().item())
        return loss.item(), weight.grad.flatten().numpy()

    minimize(value_and_gradient, torch.zeros(650, dtype=torch.float64).numpy(), jac=True, method="BFGS")
    return next(i for i, norm in enumerate(norms, 1) if norm < TARGET * norms[0])


def main(argv: list[str] | None = None) -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.logistic", description=__doc__)
    parser.add_argument("--l2", type=float, default=0.01, help="regularisation (default: 0.01)")
    parser.add_argument("--limit", type=int, default=1000, help="give up after so many steps (default: 1000)")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.l2 < float("inf"):
        parser.error(f"--l2 must be a finite number >= 0, got {arguments.l2}")
    if arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")
    problem = Problem(arguments.l2)
    print("| optimizer | best lr | gradient evaluations |\n|---|---|---|")
    for name, (grid, make) in contenders().items():
        counts = [(count, lr) for lr in grid if (count := problem.evaluations(make(lr), arguments.limit)) is not None]
        row = "{1} | {0}".format(*min(counts)) if counts else f"- | more than {arguments.limit}"
        print(f"| {name} | {row} |", flush=True)
    print(f"| scipy BFGS | line search | {scipy_evaluations(problem)} |")


if __name__ == "__main__":
    main()

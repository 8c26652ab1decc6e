"""Quasi-Newton steps on full batches, beside L-BFGS, BFGS, Adam and SGD, in float64.

python -m experiments.full_batch {logistic,mlp,pinn} [--l2 0.01] [--evaluations 300]

`logistic`: L2-regularised logistic regression on digits (650 parameters, convex). `mlp`: a tanh network on digits, 32
hidden units (2,410). `pinn`: a physics-informed network for -u'' = f (481). One gradient evaluation is the unit: a
table shows the loss after a third and all of them, and how many it took to a gradient norm of 1e-4 of its start.
First-order optimizers are at their best learning rate of a grid.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from butterfly_opt import Butterfly
from experiments.paper_models import digits_objectives
from experiments.problems import Poisson

TARGET = 1e-4

MAX_DENSE = 1000
"""Parameters in one dense block: its eigendecompositions take the third power of them."""

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass
class Problem:
    """Parameters at their start, and the loss there."""

    params: list[Tensor]
    loss: Callable[[], Tensor]


def digits(*, hidden: tuple[int, ...], l2: float) -> Problem:
    """Mean cross-entropy of a classifier of digits plus ``l2 / 2 |theta|^2``."""
    train, _ = digits_objectives(hidden=hidden, l2=l2)
    params = [param.clone().requires_grad_() for param in train.parameters(train.start(0))]
    return Problem(params, lambda: train.loss(torch.cat([param.flatten() for param in params])))


def pinn() -> Problem:
    """`experiments.problems.Poisson` with two layers of 20, in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        problem = Poisson(seed=0, device=torch.device("cpu"), width=20, layers=2, points=128)
    finally:
        torch.set_default_dtype(default)
    return Problem(list(problem.model.parameters()), lambda: problem.loss(None))


@dataclass
class History:
    """Losses and gradient norms of a run, one an evaluation."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def add(self, loss: Tensor, gradient: Iterable[Tensor]) -> Tensor:
        """Takes in an evaluation; returns the gradient as one vector."""
        flat = torch.cat([part.flatten() for part in gradient])
        self.losses.append(loss.item())
        self.norms.append(flat.norm().item())
        return flat

    def evaluations(self) -> int | None:
        """Gradient evaluations to the target; None if it was not met."""
        return next((i for i, norm in enumerate(self.norms, 1) if norm < TARGET * self.norms[0]), None)

    def lowest(self, count: int) -> float:
        """The lowest loss in the first so many evaluations; infinite if the run ended before."""
        return min(self.losses[:count]) if len(self.losses) >= count or self.evaluations() else math.inf


class EnoughError(Exception):
    """A run has had as many evaluations as asked for."""


def run(problem: Problem, make: Make, evaluations: int) -> History:
    """Steps until so many evaluations, or to a gradient that is rounding."""
    optimizer, history = make(problem.params), History()

    def closure() -> Any:
        if len(history.losses) == evaluations:
            raise EnoughError
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        history.add(loss, [param.grad for param in problem.params if param.grad is not None])
        return loss

    with contextlib.suppress(EnoughError):
        while not history.norms or 1e-12 * history.norms[0] < history.norms[-1] < 1e6:
            optimizer.step(closure)
    return history


def run_bfgs(problem: Problem, evaluations: int) -> History:
    """The BFGS of scipy, a dense inverse Hessian."""
    history, sizes = History(), [param.numel() for param in problem.params]

    def value_and_gradient(theta):  # type: ignore[no-untyped-def]
        if len(history.losses) == evaluations:
            raise EnoughError
        with torch.no_grad():
            for param, part in zip(problem.params, torch.from_numpy(theta).split(sizes), strict=True):
                param.copy_(part.view_as(param))
        loss = problem.loss()
        return loss.item(), history.add(loss, torch.autograd.grad(loss, problem.params)).numpy()

    start = torch.cat([param.detach().flatten() for param in problem.params]).numpy()
    with contextlib.suppress(EnoughError):
        minimize(value_and_gradient, start, jac=True, method="BFGS", options={"gtol": 0.0, "maxiter": evaluations})
    return history


def contenders(n: int) -> dict[str, tuple[list[float], Callable[[float], Make]]]:
    """Optimizers with their learning rates, for n parameters."""
    adam = [0.003, 0.01, 0.03, 0.1, 0.3]
    newton: dict[str, dict[str, Any]] = {
        "Butterfly newton, flat, blocks of 64": {"structure": "flat"},
        "Butterfly newton, axes": {},
    }
    if n <= MAX_DENSE:
        newton[f"Butterfly newton, one dense block of {n}"] = {"structure": "flat", "block": n, "lead": 16}

    def quasi_newton(options: dict[str, Any]) -> Callable[[float], Make]:
        return lambda lr: lambda p: Butterfly(p, lr=lr, diagonal="newton", **options)

    return {
        **{name: ([1.0], quasi_newton(options)) for name, options in newton.items()},
        "torch LBFGS, strong Wolfe": (
            [1.0],
            lambda lr: lambda p: torch.optim.LBFGS(
                p, lr=lr, max_iter=10**6, history_size=50, tolerance_grad=0.0, tolerance_change=0.0,
                line_search_fn="strong_wolfe",
            ),
        ),
        "torch LBFGS, no line search": ([1.0], lambda lr: lambda p: torch.optim.LBFGS(p, lr=lr, max_iter=1)),
        "Butterfly": (adam, lambda lr: lambda p: Butterfly(p, lr=lr)),
        "Adam betas=(0.9, 0.99)": (adam, lambda lr: lambda p: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.99))),
        "SGD momentum 0.9": (
            [0.03, 0.1, 0.3, 1.0, 3.0],
            lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        ),
    }  # fmt: skip


def best(histories: Iterable[tuple[float, History]], evaluations: int) -> tuple[float, History]:
    """The rate that met the target first, else the one of the lowest loss."""
    return min(histories, key=lambda pair: (pair[1].evaluations() or math.inf, pair[1].lowest(evaluations)))


def main(argv: list[str] | None = None) -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.full_batch", description="Steps on full batches.")
    parser.add_argument("problem", choices=("logistic", "mlp", "pinn"))
    parser.add_argument("--l2", type=float, default=None, help="regularisation (default: logistic 0.01, mlp 0.0001)")
    parser.add_argument("--evaluations", type=int, default=300, help="gradient evaluations of a run (default: 300)")
    arguments = parser.parse_args(argv)
    l2 = {"logistic": 0.01, "mlp": 1e-4, "pinn": 0.0}[arguments.problem] if arguments.l2 is None else arguments.l2
    if not 0 <= l2 < math.inf:
        parser.error(f"--l2 must be a finite number >= 0, got {l2}")
    if arguments.problem == "pinn" and l2:
        parser.error("--l2 is not for pinn")
    if arguments.evaluations < 3:
        parser.error(f"--evaluations must be at least 3, got {arguments.evaluations}")
    limit = arguments.evaluations
    make_problem: dict[str, Callable[[], Problem]] = {
        "logistic": lambda: digits(hidden=(), l2=l2),
        "mlp": lambda: digits(hidden=(32,), l2=l2),
        "pinn": pinn,
    }
    fresh = make_problem[arguments.problem]
    n = sum(param.numel() for param in fresh().params)
    print(f"| optimizer | rate | loss after {limit // 3} | after {limit} | evaluations to a gradient of {TARGET:g} |")
    print("|---|---|---|---|---|")

    def show(name: str, rate: str, history: History) -> None:
        met = history.evaluations() or f"more than {limit}"
        print(
            f"| {name} | {rate} | {history.lowest(limit // 3):.3g} | {history.lowest(limit):.3g} | {met} |", flush=True
        )

    for name, (rates, make) in contenders(n).items():
        rate, history = best(((lr, run(fresh(), make(lr), limit)) for lr in rates), limit)
        show(name, f"{rate:g}", history)
    show("scipy BFGS", "line search", run_bfgs(fresh(), limit))


if __name__ == "__main__":
    main()

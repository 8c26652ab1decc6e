"""An operator as the preconditioner of ``scipy.sparse.linalg.cg``: iterations with and without.

Two uses: matrices that are at hand, preconditioned by their own fit; and Newton steps with the Hessian of held-out
samples, ``(H + lambda I) x = g``, which is only multiplied with, preconditioned by an estimate from training samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg
from torch import Tensor

from butterfly_opt import fit_symmetric
from butterfly_opt.operators import SymmetricOperator
from experiments.paper_models import digits_objectives
from experiments.paper_synthetic import FAMILIES
from experiments.uses_model import Trained, damped, diagonal

RTOL = 1e-8
LIMIT = 5000


@dataclasses.dataclass(frozen=True)
class PreconditionerRow:
    """Iterations of conjugate gradients until the residual is 1e-8 of the right side."""

    system: str
    preconditioner: str
    iterations: int


def solve(
    system: LinearOperator,
    right: Tensor,
    preconditioner: LinearOperator | None,
    *,
    rtol: float = RTOL,
    limit: int = LIMIT,
) -> tuple[Tensor, int]:
    """Runs ``cg`` from zero; the solution and the number of iterations.

    Raises:
        RuntimeError: it did not converge.
    """
    count = 0

    def callback(solution: np.ndarray) -> None:
        nonlocal count
        count += 1

    solution, code = cg(system, right.numpy(), rtol=rtol, maxiter=limit, M=preconditioner, callback=callback)
    if code:
        raise RuntimeError(f"cg did not converge in {limit} iterations")
    return torch.from_numpy(solution), count


def iterations(system: LinearOperator, right: Tensor, preconditioner: SymmetricOperator | None) -> int:
    """The iterations of ``solve``; raises as that."""
    return solve(system, right, None if preconditioner is None else preconditioner.to_scipy())[1]


def matrices(n: int, seed: int) -> dict[str, Tensor]:
    """Positive definite matrices of condition 1e3 (the last: as the data have it)."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: FAMILIES[name](n, generator).double() for name in ("planted", "wide", "haar")}
    inputs = digits_objectives(l2=0.0)[0].inputs
    centred = inputs - inputs.mean(0)
    covariance = centred.T @ centred / len(centred)
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    return {**{name: (matrix + matrix.T) / 2 for name, matrix in found.items()}, "ridge on digits": covariance + ridge}


def _compare(
    name: str, system: LinearOperator, right: Tensor, candidates: Mapping[str, SymmetricOperator]
) -> list[PreconditionerRow]:
    rows = []
    for label, candidate in {"none": None, **candidates}.items():
        rows.append(PreconditionerRow(name, label, iterations(system, right, candidate)))
        print(f"| {name} | {label} | {rows[-1].iterations} |", flush=True)
    return rows


def held_out_system(model: Trained, damping: float) -> LinearOperator:
    """``H + damping I`` of the test samples by Hessian-vector products."""

    def product(x: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(x.reshape(1, -1))
        result: np.ndarray = (model.test.product(model.theta, vector) + damping * vector)[0].numpy()
        return result

    return LinearOperator((model.test.n, model.test.n), matvec=product, dtype=np.float64)


def fitted_systems(*, n: int, block: int, lead: int, seed: int) -> list[PreconditionerRow]:
    """Matrices, preconditioned by fits to themselves; prints lines of a Markdown table."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, matrix in matrices(n, seed).items():
        candidates: dict[str, SymmetricOperator] = {"diagonal": diagonal(matrix)}
        for label, plan in (("radix 2", (2, 2)), ("wide", (block, lead))):
            fit = fit_symmetric(matrix, block=plan[0], lead=plan[1], criterion="logdet")
            candidates[f"butterfly, {label}"] = fit.operator.inverse()
        right = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
        rows += _compare(f"{name}, n {len(matrix)}", aslinearoperator(matrix.numpy()), right, candidates)
    return rows


def held_out_systems(
    model: Trained, estimates: Mapping[str, SymmetricOperator], *, dampings: Sequence[float] = (0.0, 0.01)
) -> list[PreconditionerRow]:
    """Newton steps on the test samples, preconditioned from the training samples; prints lines of a Markdown table."""
    rows = []
    for damping in dampings:
        candidates = {name: damped(estimate, damping) for name, estimate in estimates.items()}
        name = f"held-out Hessian, damping {damping:g}"
        rows += _compare(name, held_out_system(model, damping), model.test.gradient(model.theta), candidates)
    return rows

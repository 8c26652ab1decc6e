"""The inverse Hessian of a network of 50,826 parameters, where no dense inverse exists.

Damped systems ``(H + lambda I) x = g``, H the Hessian of the training loss at a minimum and g the gradient of the test
loss: iterations of conjugate gradients with each preconditioner, and how far one product ``P g`` alone is from x.
Beside it KFAC and EKFAC of curvlinops (F. Dangel et al., arXiv:2501.19183), where that is installed: they see the
layers and the Gauss-Newton matrix, we see only products with H.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from butterfly_opt.operators import SymmetricOperator
from experiments import uses_preconditioner
from experiments.paper_models import Objective, digits_objectives
from experiments.uses_model import damped, probed

HIDDEN = (256, 128)
L2 = 1e-3
PROBES = (30, 100)
DAMPINGS = (0.01, 0.1)
RTOL = 1e-6
LIMIT = 2000

Inverse = Callable[[Tensor], Tensor]
"""A product with an estimate of ``(H + lambda I)^-1``."""


@dataclasses.dataclass(frozen=True)
class LargeRow:
    """One preconditioner at one damping.

    Attributes:
        damping: lambda.
        preconditioner: its source.
        seconds: to make it.
        iterations: of conjugate gradients, to a residual of RTOL of g.
        error: ``|P g - x| / |x|``.
        cosine: of ``P g`` and x.
    """

    damping: float
    preconditioner: str
    seconds: float
    iterations: int
    error: float
    cosine: float


def by_damping(make: Callable[[], SymmetricOperator]) -> Callable[[float], Inverse]:
    """An estimate of ``H^-1``, made here, by damping."""
    estimate = make()
    return lambda damping: damped(estimate, damping).__matmul__


def identity() -> Callable[[float], Inverse]:
    """No preconditioner."""
    return lambda damping: torch.clone


def kronecker(train: Objective, theta: Tensor, name: str) -> Callable[[float], Inverse]:
    """KFAC or EKFAC of curvlinops, by damping; the regularisation, which it does not see, is added to the damping."""
    curvlinops = importlib.import_module("curvlinops")

    layers: list[nn.Module] = []
    pieces = train.parameters(theta)
    for weight, bias in zip(pieces[::2], pieces[1::2], strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=theta.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        layers += [layer, nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    operator = getattr(curvlinops, f"{name}LinearOperator")(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(train.inputs, train.targets)],
        fisher_type="type-2",
        check_deterministic=False,
    )
    operator @ torch.zeros(train.n, dtype=theta.dtype)  # the factors are computed at the first product

    def inverse_at(damping: float) -> Inverse:
        inverse = curvlinops.KFACInverseLinearOperator(operator, damping=damping + train.l2, use_exact_damping=True)
        return lambda vector: torch.as_tensor(inverse @ vector)

    return inverse_at


def solve(train: Objective, theta: Tensor, damping: float, right: Tensor, inverse: Inverse) -> tuple[Tensor, int]:
    """Conjugate gradients from zero; the solution and the number of iterations."""

    def operator(product: Inverse) -> LinearOperator:
        def matvec(x: object) -> object:
            return product(torch.as_tensor(x).reshape(-1)).numpy()

        return LinearOperator((train.n, train.n), matvec=matvec, dtype=right.numpy().dtype)

    system = operator(lambda vector: train.product(theta, vector[None])[0] + damping * vector)
    return uses_preconditioner.solve(system, right, operator(inverse), rtol=RTOL, limit=LIMIT)


def large(*, block: int, lead: int, seed: int, hidden: tuple[int, ...] = HIDDEN, limit: int = 400) -> list[LargeRow]:
    """Compares preconditioners; prints a Markdown table.

    Args:
        block: coordinates of a group.
        lead: outputs of a group that go on.
        seed: of weights and probes.
        hidden: widths of the hidden layers.
        limit: steps of L-BFGS to the minimum.
    """
    train, test = digits_objectives(hidden=hidden, l2=L2)
    theta = train.minimum(train.start(seed), limit=limit, tolerance=1e-7)
    right = test.gradient(theta)
    sources: dict[str, Callable[[], Callable[[float], Inverse]]] = {"none": identity}
    for k in PROBES:
        probe = partial(probed, train, theta, probes=k, block=block, lead=lead, seed=seed)
        sources[f"probe_inverse, {k}"] = partial(by_damping, probe)
    if importlib.util.find_spec("curvlinops"):
        for name in ("KFAC", "EKFAC"):
            sources[name] = partial(kronecker, train, theta, name)
    else:
        print("curvlinops is not installed (pip install curvlinops-for-pytorch): no KFAC and EKFAC")
    made: dict[str, tuple[Callable[[float], Inverse], float]] = {}
    for name, make in sources.items():
        start = time.perf_counter()
        made[name] = make(), time.perf_counter() - start
    print(f"{train.n} parameters")
    print("| damping | preconditioner | seconds to make | iterations | error of P g | cosine |")
    print("|---|---|---|---|---|---|")
    rows = []
    for damping in DAMPINGS:
        for name, (inverse_at, seconds) in made.items():
            inverse = inverse_at(damping)
            solution, count = solve(train, theta, damping, right, inverse)
            guess = inverse(right)
            error = (torch.linalg.norm(guess - solution) / torch.linalg.norm(solution)).item()
            cosine = torch.nn.functional.cosine_similarity(guess, solution, dim=0).item()
            rows.append(LargeRow(damping, name, seconds, count, error, cosine))
            print(f"| {damping:g} | {name} | {seconds:.1f} | {count} | {error:.2f} | {cosine:.3f} |", flush=True)
    return rows

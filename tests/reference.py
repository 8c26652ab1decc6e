"""Oracles in float64 numpy, dense and naive. Imports nothing of the project.

Everything is written as the formula reads, from explicit matrices and full histories: slow, and as
independent as possible of the code it judges.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def stage_count(n: int) -> int:
    """Smallest L with 2**L >= n."""
    count = 0
    while 2**count < n:
        count += 1
    return count


def stage_pairs(n: int, stage: int) -> list[tuple[int, int]]:
    """Pairs ``(i, i + 2**stage)`` with bit ``stage`` of i zero and both inside the vector, i ascending."""
    stride = 2**stage
    return [(i, i + stride) for i in range(n) if (i // stride) % 2 == 0 and i + stride < n]


def givens(n: int, i: int, j: int, angle: float) -> Array:
    """The n x n rotation of the plane (i, j): column i becomes ``cos e_i + sin e_j``."""
    matrix = np.eye(n)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def dense_rotation(angles: ArrayLike, n: int) -> Array:
    """``Q = G_0 G_1 ...`` of angles ``(depth, stages, n // 2)``, one Givens factor after another.

    A factor changes two columns of the product so far, and only those are multiplied.
    """
    angles = np.asarray(angles, dtype=np.float64)
    product = np.eye(n)
    for butterfly in angles:
        for stage, row in enumerate(butterfly):
            for slot, (i, j) in enumerate(stage_pairs(n, stage)):
                c, s = np.cos(row[slot]), np.sin(row[slot])
                product[:, [i, j]] = product[:, [i, j]] @ np.array([[c, -s], [s, c]])
    return product


def apply_along(matrix: Array, x: ArrayLike, dim: int) -> Array:
    """``matrix`` applied to every vector of ``x`` along ``dim``."""
    moved = np.moveaxis(np.asarray(x, dtype=np.float64), dim, 0)
    return np.moveaxis(np.tensordot(matrix, moved, axes=(1, 0)), 0, dim)


def bfgs_update(inverse: Array, s: Array, y: Array) -> Array:
    """Nocedal and Wright, Numerical Optimization (2006), equation 6.17, as it stands there."""
    rho = 1.0 / (y @ s)
    eye = np.eye(len(s))
    return (eye - rho * np.outer(s, y)) @ inverse @ (eye - rho * np.outer(y, s)) + rho * np.outer(s, s)


def bfgs_inverse(pairs: Iterable[tuple[Array, Array]]) -> Array:
    """Dense BFGS over all pairs, from the initial scaling of equation 6.20."""
    inverse: Array | None = None
    for s, y in pairs:
        if inverse is None:
            inverse = np.eye(len(s)) * (s @ y) / (y @ y)
        inverse = bfgs_update(inverse, s, y)
    assert inverse is not None
    return inverse


def spread(preconditioner: Array, hessian: Array) -> tuple[float, float]:
    """Least and greatest eigenvalue of ``P^(1/2) H P^(1/2)``, over their geometric mean."""
    root = np.linalg.cholesky(preconditioner)
    values = np.linalg.eigvalsh(root.T @ hessian @ root)
    centre = np.sqrt(values[0] * values[-1])
    return float(values[0] / centre), float(values[-1] / centre)


def condition(preconditioner: Array, hessian: Array) -> float:
    """Condition number of ``P H``."""
    low, high = spread(preconditioner, hessian)
    return high / low


def exponential_average(history: Sequence[ArrayLike], beta: float) -> Array:
    """``sum_j beta^(t-j) v_j / sum_j beta^(t-j)`` over the whole history, newest last."""
    powers = [beta ** (len(history) - 1 - j) for j in range(len(history))]
    return sum(p * np.asarray(v, dtype=np.float64) for p, v in zip(powers, history, strict=True)) / sum(powers)


def weighted_average(history: Sequence[ArrayLike], weights: Sequence[float]) -> Array:
    """``sum_j a_j prod_{i>j} (1 - a_i) v_j``: value j enters with weight a_j and is diluted by all later ones."""
    total = np.zeros_like(np.asarray(history[0], dtype=np.float64))
    for j, value in enumerate(history):
        share = weights[j] * float(np.prod([1 - a for a in weights[j + 1 :]]))
        total = total + share * np.asarray(value, dtype=np.float64)
    return total


def secant_regression(
    A: ArrayLike, B: ArrayLike, C: ArrayLike, beta2: float, *, rounding: float
) -> tuple[Array, Array, float]:
    """``h``, ``nu2`` and ``tau2`` from the averages of u^2, w^2 and u w, one coordinate at a time.

    With everything at rest (B = 0) the slope is 0 and all energy is noise.
    """
    A, B, C = (np.asarray(x, dtype=np.float64) for x in (A, B, C))
    tau2 = float(B.mean())
    h, nu2 = np.zeros_like(A), np.zeros_like(A)
    if tau2 == 0:
        return h, A.copy(), tau2
    hbar = float(np.abs(C).sum() / B.sum())
    for index in np.ndindex(A.shape):
        a, b, c = A[index], B[index], C[index]
        unexplained = max(0.0, a - c * c / b) if b > 0 else a
        ridge = (1 - beta2) * unexplained / hbar**2 + rounding * tau2
        h[index] = (c + ridge * hbar) / (b + ridge)
        nu2[index] = max(0.0, a - 2 * h[index] * c + h[index] ** 2 * b)
    return h, nu2, tau2

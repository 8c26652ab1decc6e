"""butterfly_opt.secant against dense BFGS on noise-free pairs. Oracles: ``reference.bfgs_inverse``, exact Hessians.

Quality is what a preconditioner ``P`` does to a Hessian ``H``: the eigenvalues of ``P^(1/2) H P^(1/2)`` up to
one common factor. ``EXACT`` is 1 %. Every test prints ours beside the yardstick (``pytest -rP``).

Pairs ``y = H s``, all in float64. ``isotropic``: s standard normal. ``path``: s along an optimisation path,
``theta -= 0.5 P g`` with our own P (gradient descent in the first five steps), each step perturbed by 10 % of
its length, starting afresh every fifth step. Dense BFGS sees the same pairs.

What holds and what does not. Hessians with a butterfly eigenbasis are found exactly, from isotropic pairs and
along a path: vectors by closed-form angles within 170 pairs up to condition 1e4, matrices (angles shared along the
other axis) by Newton steps within 500 pairs up to condition 1e3. Two stiff factors of joint condition 2e3 are not
found along a path, where the pairs are nearly parallel and the two-sided criterion is flat. Dense BFGS solves a
2 x 2 problem with two pairs.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch

from butterfly_opt.secant import SecantEstimate

Array = np.ndarray
EXACT = (0.99, 1.01)
EVERY = 10
PATH_NOISE, RESTART, FIRST_STEPS, PATH_LR = 0.1, 5, 5, 0.5


def rotated_2x2(angle: float, condition: float, scale: float = 1.0) -> Array:
    """Eigenvalues ``scale`` and ``scale * condition``."""
    turn = reference.givens(2, 0, 1, angle)
    return scale * turn @ np.diag([condition, 1.0]) @ turn.T


def blocks(*parts: Array) -> Array:
    """2 x 2 blocks on the aligned pairs (2 j, 2 j + 1)."""
    matrix = np.zeros((2 * len(parts), 2 * len(parts)))
    for j, part in enumerate(parts):
        matrix[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = part
    return matrix


class Run:
    """An estimate and the pairs it has seen."""

    def __init__(self, hessian: Array, shape: tuple[int, ...], seed: int, depth: int = 1) -> None:
        self.hessian, self.shape = hessian, shape
        self.rng = np.random.default_rng(seed)
        self.estimate = SecantEstimate(shape, depth=depth, dtype=torch.float64)
        self.pairs: list[tuple[Array, Array]] = []

    def feed(self, steps: Iterator[Array], count: int) -> None:
        for _ in range(count):
            s = next(steps)
            y = self.hessian @ s
            self.pairs.append((s, y))
            self.estimate.update(*(torch.from_numpy(x).view(self.shape) for x in (s, y)))

    def isotropic(self) -> Iterator[Array]:
        while True:
            yield self.rng.standard_normal(len(self.hessian))

    def path(self) -> Iterator[Array]:
        n, top = len(self.hessian), np.linalg.eigvalsh(self.hessian)[-1]
        theta = np.zeros(n)
        while True:
            if len(self.pairs) % RESTART == 0:
                theta = self.rng.standard_normal(n)
            grad = self.hessian @ theta
            if len(self.pairs) < FIRST_STEPS:
                s = -grad / top
            else:
                s = -PATH_LR * (self.estimate.inverse_hessian() @ torch.from_numpy(grad)).numpy()
            s = s + PATH_NOISE * np.linalg.norm(s) / math.sqrt(n) * self.rng.standard_normal(n)
            theta = theta + s
            yield s

    def dense(self) -> Array:
        return self.estimate.inverse_hessian().to_dense().numpy()

    def pairs_until_exact(self, kind: str, most: int) -> int | None:
        """Pairs after which every tenth estimate up to ``most`` is exact; None if the last one is not."""
        steps, first = (self.isotropic() if kind == "isotropic" else self.path()), None
        while len(self.pairs) < most:
            self.feed(steps, EVERY)
            low, high = reference.spread(self.dense(), self.hessian)
            if not (low >= EXACT[0] and high <= EXACT[1]):
                first = None
            elif first is None:
                first = len(self.pairs)
        return first


def check(name: str, hessian: Array, shape: tuple[int, ...], kind: str, seed: int, most: int) -> None:
    run = Run(hessian, shape, seed)
    first = run.pairs_until_exact(kind, most)
    ours = reference.condition(run.dense(), hessian)
    bfgs = reference.condition(reference.bfgs_inverse(run.pairs), hessian)
    print(
        f"{name}, {kind}, seed {seed}: condition {np.linalg.cond(hessian):.4g}; exact after {first} pairs; "
        f"condition of P H after {most}: ours {ours:.5g}, dense BFGS {bfgs:.5g}"
    )
    assert first is not None


ROWS = blocks(rotated_2x2(0.4, 10), rotated_2x2(-0.9, 5, 2.0))
COLUMNS = blocks(rotated_2x2(1.1, 20), rotated_2x2(0.2, 3, 4.0))
MILD_BLOCKS = blocks(
    rotated_2x2(0.3, 10), rotated_2x2(math.pi / 4, 3, 5), rotated_2x2(-0.7, 5, 0.5), rotated_2x2(1.2, 10, 2)
)
STIFF_BLOCKS = blocks(
    rotated_2x2(0.3, 1e3), rotated_2x2(math.pi / 4, 3, 5), rotated_2x2(-0.7, 100, 0.1), rotated_2x2(1.2, 10, 20)
)
HESSIANS: dict[str, tuple[Array, tuple[int, ...]]] = {
    "diagonal 8, condition 1e3": (np.diag(np.logspace(0, 3, 8)), (8,)),
    "[[2, 1], [1, 2]]": (np.array([[2.0, 1.0], [1.0, 2.0]]), (2,)),
    "2x2, condition 10": (rotated_2x2(0.3, 10), (2,)),
    "2x2, condition 1e3, 0.01 rad": (rotated_2x2(0.01, 1e3), (2,)),
    "2x2, condition 1e3, 0.3 rad": (rotated_2x2(0.3, 1e3), (2,)),
    "2x2, condition 1e3, pi / 4": (rotated_2x2(math.pi / 4, 1e3), (2,)),
    "2x2, condition 1e3, 1.2 rad": (rotated_2x2(1.2, 1e3), (2,)),
    "2x2, condition 1e3, pi / 2": (rotated_2x2(math.pi / 2, 1e3), (2,)),
    "2x2 blocks, n = 8": (MILD_BLOCKS, (8,)),
    "2x2 blocks, n = 8, condition 1e4": (STIFF_BLOCKS, (8,)),
    "2x2 (x) 2x2": (np.kron(rotated_2x2(0.3, 10), rotated_2x2(1.0, 20)), (2, 2)),
    "2x2 (x) 2x2, condition 2e3": (np.kron(rotated_2x2(0.3, 1e3), rotated_2x2(1.0, 2)), (2, 2)),
    "diagonal 4 (x) 2x2": (np.kron(np.diag([1.0, 3.0, 10.0, 30.0]), rotated_2x2(0.8, 30)), (4, 2)),
    "blocks 4 (x) blocks 4": (np.kron(ROWS, COLUMNS), (4, 4)),
}
SEEDS = pytest.mark.parametrize("seed", range(2))


# Pairs allowed: about 1.5 times the most measured over two or three seeds, which stands beside it.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("diagonal 8, condition 1e3", 20),  # 10, the first check
        ("[[2, 1], [1, 2]]", 100),  # 60
        ("2x2, condition 1e3, 0.01 rad", 200),  # 110
        ("2x2, condition 1e3, 0.3 rad", 400),  # 200
        ("2x2, condition 1e3, pi / 4", 400),  # 250
        ("2x2, condition 1e3, 1.2 rad", 400),  # 270
        ("2x2, condition 1e3, pi / 2", 20),  # 10
        ("2x2 blocks, n = 8", 200),  # 120
        ("2x2 (x) 2x2", 150),  # 100
        ("2x2 (x) 2x2, condition 2e3", 280),  # 180
        ("diagonal 4 (x) 2x2", 180),  # 120
        ("blocks 4 (x) blocks 4", 150),  # 100
    ],
)
@SEEDS
def test_isotropic_pairs_reach_the_inverse_hessian(name: str, most: int, seed: int) -> None:
    check(name, *HESSIANS[name], "isotropic", seed, most)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("diagonal 8, condition 1e3", 20),  # 10
        ("[[2, 1], [1, 2]]", 100),  # 60
        ("2x2, condition 10", 100),  # 60
        ("2x2, condition 1e3, 0.3 rad", 250),  # 130
        ("2x2, condition 1e3, pi / 4", 250),  # 120
        ("2x2, condition 1e3, pi / 2", 20),  # 10
        ("2x2 blocks, n = 8", 200),  # 120
        ("2x2 (x) 2x2", 500),  # 370
        ("diagonal 4 (x) 2x2", 650),  # 450
        ("blocks 4 (x) blocks 4", 700),  # 500
    ],
)
@SEEDS
def test_pairs_along_a_path_reach_the_inverse_hessian(name: str, most: int, seed: int) -> None:
    check(name, *HESSIANS[name], "path", seed, most)


@pytest.mark.xfail(strict=True, reason="shared angles, nearly parallel pairs: no basis after 700 pairs")
def test_pairs_along_a_path_for_two_stiff_factors() -> None:
    name = "2x2 (x) 2x2, condition 2e3"
    check(name, *HESSIANS[name], "path", 0, 700)


def test_isotropic_pairs_for_stiff_blocks() -> None:
    name = "2x2 blocks, n = 8, condition 1e4"
    check(name, *HESSIANS[name], "isotropic", 0, 400)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_hessian_is_out_of_reach(seed: int, depth: int) -> None:
    """Haar eigenbasis, n = 64, condition 1e3: no more than Jacobi scaling ``diag(1 / H_ii)``, and far from BFGS.

    Jacobi scaling stands for the best diagonal: on a Haar basis, where all diagonal entries are alike, it is
    close to no scaling at all. Measured condition(Jacobi) / condition(ours) after 100 to 1,000 isotropic pairs:
    0.79 to 1.10, depth 1 and 2. A butterfly has 192 angles here, the rotation 2,016. The factor asserted says
    only that the estimate does no harm.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    hessian = (basis * np.logspace(0, 3, 64)) @ basis.T
    run = Run(hessian, (64,), seed, depth)
    run.feed(run.isotropic(), 120)
    ours = reference.condition(run.dense(), hessian)
    jacobi = reference.condition(np.diag(1 / np.diag(hessian)), hessian)
    bfgs = reference.condition(reference.bfgs_inverse(run.pairs), hessian)
    print(f"Haar 64, depth {depth}, seed {seed}: ours {ours:.0f}, Jacobi {jacobi:.0f}, dense BFGS {bfgs:.1f}")
    assert jacobi / ours > 0.6


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_the_estimate_is_symmetric_positive_definite(shape: tuple[int, ...]) -> None:
    """Also for an indefinite Hessian, whose negative curvatures enter by their absolute value."""
    n = math.prod(shape)
    matrix = np.random.default_rng(0).standard_normal((n, n))
    run = Run(matrix + matrix.T, shape, 0)
    run.feed(run.isotropic(), 30)
    dense = run.dense()
    np.testing.assert_allclose(dense, dense.T, atol=1e-12 * abs(dense).max())
    assert np.linalg.eigvalsh(dense)[0] > 0
    damped = run.estimate.inverse_hessian(damping=2.0).to_dense().numpy()
    assert np.linalg.eigvalsh(damped)[-1] <= 0.5 + 1e-12

"""Tests of triton_kernels/refit.py. Oracles: ``torch.linalg.qr`` and ``Rotation.refit_`` in float64."""

import os

import pytest
import torch
from kernels import DEVICE, make_operands
from torch import Tensor

from butterfly_opt import rotation
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import SHIFT, Rotation, orthogonalize
from butterfly_opt.triton_kernels import refit, tables

ORTHOGONAL = 2e-6
"""Largest entry of ``Q^T Q - I`` in float32."""
CASES = [(3, 2, 2), (5, 64, 16), (31, 8, 2), (65, 64, 16), (20, 4, 4)]
if os.environ.get("BUTTERFLY_ALL_LENGTHS"):
    CASES += [(96, 16, 8), (127, 2, 2), (1000, 64, 16), (1000, 64, 32), (4097, 64, 16)]


def refit_(ours: Rotation, weights: list[float], shift: float = SHIFT[torch.float32]) -> None:
    operands = make_operands([ours, None], torch.zeros(ours.count, ours.plan.n, 1, device=DEVICE), weights)
    refit.refit_(operands, gate=tables.BEFORE, shift=shift)


def factor(a: Tensor) -> Tensor:
    """The factor of ``A``, as one group whose second moment is A and whose matrix is the identity."""
    n = a.shape[-1]
    q = torch.eye(n).view(1, -1).to(DEVICE)
    refit_(Rotation(make_plan(n, 64, 16), q, a.float().reshape(1, -1).to(DEVICE)), [1.0], shift=0.0)
    return q.view(n, n).cpu().double()


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 64])
def test_factor_is_that_of_qr(n):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double()
    q = factor(a)
    assert largest(q - orthogonalize(a)) <= 1e-4, "as float32 follows from the condition of a random matrix"
    assert largest(q.T @ q - torch.eye(n)) <= ORTHOGONAL
    r = q.T @ a
    assert largest(r.tril(-1)) <= 1e-5 * largest(a) and (r.diagonal() > -1e-5).all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("power", [6, 12])
def test_factor_is_orthogonal_whatever_the_condition_and_scale(power, scale):
    """Energies of gradients span six and more orders of magnitude; a Gram matrix would square them."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    a = (scale * basis * torch.logspace(0, -power, 24, dtype=torch.float64) @ basis.T).float().double()
    q = factor(a)
    assert largest(q.T @ q - torch.eye(24)) <= ORTHOGONAL
    assert largest((q.T @ a).tril(-1)) <= 1e-6 * largest(a)
    reference = torch.linalg.qr(a.float()).Q.double()
    assert largest((q.T @ a).tril(-1)) <= 4 * largest((reference.T @ a).tril(-1)) + 1e-8 * scale


def test_columns_of_zero_are_completed_to_a_basis():
    a = torch.zeros(5, 5)
    assert torch.equal(factor(a), torch.eye(5).double())
    a[:, 2], a[1, 0] = 1.0, -3.0
    q = factor(a)
    assert largest(q.T @ q - torch.eye(5)) <= ORTHOGONAL
    assert largest(q - orthogonalize(a.double())) <= ORTHOGONAL


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refit_is_that_of_the_rotation(case, monkeypatch):
    """Short ones twice, so that a transport follows a transport; one of the rotations is left out."""
    # The oracle in float64, with the shift of the float32 that the kernels compute.
    monkeypatch.setitem(rotation.SHIFT, torch.float64, rotation.SHIFT[torch.float32])
    n, block, lead = case
    exact = Rotation.identity(n, block=block, lead=lead, count=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(n)
    energies = torch.logspace(1, -1, n, dtype=torch.float64)[:, None]
    x = torch.randn(2, n, 3 * n, generator=generator, dtype=torch.float64) * energies
    exact.observe_(x, 1.0)
    matrices, moments = exact.matrices.float().to(DEVICE), exact.moments.float().to(DEVICE)
    exact.moments.copy_(moments)
    ours, before = Rotation(exact.plan, matrices, moments), (matrices.clone(), moments.clone())
    for _ in range(2 if n < 64 else 1):
        refit_(ours, [0.25, 0.0])
        exact.refit_(torch.tensor([True, False]))
    assert largest(ours.matrices.cpu() - exact.matrices) <= 1e-4
    assert largest(ours.moments.cpu() - exact.moments) <= 1e-5 * largest(exact.moments)
    assert torch.equal(ours.matrices[1], before[0][1]) and torch.equal(ours.moments[1], before[1][1])


def test_repeated_refits_stay_orthogonal_and_find_eigenvectors():
    ours = Rotation.identity(5, block=8, lead=4, dtype=torch.float32, device=DEVICE)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    ours.moments.copy_((basis * 10.0 ** -torch.arange(5) @ basis.T).reshape(1, -1))
    for _ in range(8):
        refit_(ours, [1.0])
    q = ours.matrices.view(5, 5).cpu()
    assert largest(q.T @ q - torch.eye(5)) <= ORTHOGONAL
    # The rounding of C over its smallest gap, 1e-7 / 1e-4.
    assert largest((basis.T @ q).abs() - torch.eye(5)) <= 5e-3

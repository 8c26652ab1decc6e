"""Tests of triton_kernels/refit.py. Oracles: ``torch.linalg.qr`` and ``Rotation.refit_`` in float64."""

import os

import pytest
import torch
from torch import Tensor

from butterfly_opt import fused, rotation
from butterfly_opt.rotation import Rotation, orthogonalize
from butterfly_opt.triton_kernels import refit, tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORTHOGONAL = 2e-6
"""Largest entry of ``Q^T Q - I`` in float32."""
CASES = [(3, 2, 2), (5, 64, 16), (31, 8, 2), (65, 64, 16), (20, 4, 4)]
if os.environ.get("BUTTERFLY_ALL_LENGTHS"):
    CASES += [(96, 16, 8), (127, 2, 2), (1000, 64, 16), (1000, 64, 32), (4097, 64, 16)]


def factor(a: Tensor) -> Tensor:
    """The factor of ``A``, as one group whose second moment is A and whose matrix is the identity."""
    n = a.shape[-1]
    stage = tiles.stage_tiles(((1, n),), n, 0, 0, DEVICE)
    q = torch.eye(n).view(1, -1).to(DEVICE)
    usable = torch.ones(1, device=DEVICE)
    refit.refit_stage_(q, a.float().reshape(1, -1).to(DEVICE), usable, stage, groups=1, lead=0, below=None, shift=0.0)
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
    version = matrices._version
    for _ in range(2 if n < 64 else 1):
        fused._refit_(ours, torch.tensor([1.0, 0.0], device=DEVICE))
        exact.refit_(torch.tensor([True, False]))
    assert largest(ours.matrices.cpu() - exact.matrices) <= 1e-4
    assert largest(ours.moments.cpu() - exact.moments) <= 1e-5 * largest(exact.moments)
    assert torch.equal(ours.matrices[1], before[0][1]) and torch.equal(ours.moments[1], before[1][1])
    assert ours.matrices._version > version, "Rotation.dense must notice"


def test_repeated_refits_stay_orthogonal_and_find_eigenvectors():
    ours = Rotation.identity(5, block=8, lead=4, dtype=torch.float32, device=DEVICE)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    ours.moments.copy_((basis * 10.0 ** -torch.arange(5) @ basis.T).reshape(1, -1))
    for _ in range(8):
        fused._refit_(ours, torch.ones(1, device=DEVICE))
    q = ours.matrices.view(5, 5).cpu()
    assert largest(q.T @ q - torch.eye(5)) <= ORTHOGONAL
    # The rounding of C over its smallest gap, 1e-7 / 1e-4.
    assert largest((basis.T @ q).abs() - torch.eye(5)) <= 5e-3


def test_unfit_tensors_are_refused():
    stage = tiles.stage_tiles(((1, 3),), 3, 0, 0, DEVICE)
    flat, usable = torch.zeros(1, 9, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=r"usable must be contiguous of shape \(1,\)"):
        refit.refit_stage_(flat, flat, usable[:0], stage, groups=1, lead=0, below=None, shift=0.0)
    with pytest.raises(TypeError, match=r"moments must be torch.float32"):
        refit.refit_stage_(flat, flat.double(), usable, stage, groups=1, lead=0, below=None, shift=0.0)

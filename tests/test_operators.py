"""butterfly_opt.operators: one suite that every operator passes. Oracle: dense float64 linear algebra."""

import io
import math

import numpy as np
import pytest
import reference
import scipy.sparse.linalg
import torch

from butterfly_opt import Butterfly
from butterfly_opt.angle_basis import AngleBasis
from butterfly_opt.backend import TORCH
from butterfly_opt.basis import Basis
from butterfly_opt.operators import DirectSum, RotatedDiagonal, SymmetricOperator
from butterfly_opt.rotation import angles_shape
from butterfly_opt.sketch import random_signs

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
}
"""A few hundred roundings of numbers of order 1; the inverse adds a condition of about 5."""


def used_angles(n, depth, generator):
    angles = torch.zeros(angles_shape(n, depth=depth), dtype=torch.float64)
    for stage in range(angles.shape[1]):
        pairs = len(reference.stage_pairs(n, stage))
        angles[:, stage, :pairs] = torch.randn(depth, pairs, generator=generator, dtype=torch.float64)
    return angles


def rotated_diagonal(shape, *, depth=1, axes=None, seed=0, plain=False):
    """An operator with eigenvalues in [0.5, 2.5], and its matrix from explicit Givens factors."""
    generator = torch.Generator().manual_seed(seed)
    axes = range(len(shape)) if axes is None else axes
    angles = {dim: used_angles(shape[dim], depth, generator) for dim in axes}
    diagonal = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    Q = np.ones((1, 1))
    for dim, n in enumerate(shape):
        Q = np.kron(Q, reference.dense_rotation(angles[dim], n) if dim in angles else np.eye(n))
    pairs = list(angles.items())
    basis = Basis(shape, pairs, TORCH) if plain else AngleBasis(shape, pairs)
    dense = torch.from_numpy(Q @ np.diag(diagonal.flatten()) @ Q.T)
    return RotatedDiagonal(basis, diagonal), dense


def direct_sum(*parts):
    operators, matrices = zip(*parts, strict=True)
    return DirectSum([((), operator) for operator in operators]), torch.block_diag(*matrices)


OPERATORS = {
    "one coordinate": lambda: rotated_diagonal((1,)),
    "scalar": lambda: rotated_diagonal(()),
    "vector": lambda: rotated_diagonal((16,)),
    "odd vector": lambda: rotated_diagonal((13,)),
    "deep vector": lambda: rotated_diagonal((11,), depth=3),
    "long vector": lambda: rotated_diagonal((300,)),
    "unrotated": lambda: rotated_diagonal((7,), axes=()),
    "two axes": lambda: rotated_diagonal((4, 6)),
    "two deep axes": lambda: rotated_diagonal((5, 3), depth=2),
    "second axis": lambda: rotated_diagonal((3, 5), axes=(1,)),
    "three axes": lambda: rotated_diagonal((2, 3, 5)),
    "plain basis": lambda: rotated_diagonal((6, 5), plain=True),
    "direct sum": lambda: direct_sum(rotated_diagonal((3,)), rotated_diagonal((2, 4), depth=2, seed=1)),
    "nested sum": lambda: direct_sum(
        direct_sum(rotated_diagonal((3,)), rotated_diagonal((1,))), rotated_diagonal((6,))
    ),
}
WITH_ANGLES = [name for name in OPERATORS if name != "plain basis"]
every = pytest.mark.parametrize("name", OPERATORS)
every_with_angles = pytest.mark.parametrize("name", WITH_ANGLES)


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs), **TOLERANCE[ours.dtype])


@every
def test_products(name):
    operator, dense = OPERATORS[name]()
    n = dense.shape[0]
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(operator.to_dense(), dense)
    close(operator @ x, dense @ x)
    close(operator @ x[:, 0], dense @ x[:, 0])
    close(operator.T @ x, dense.T @ x)
    close(operator.quadratic(x), (x * (dense @ x)).sum(0))
    close(operator.quadratic(x[:, 0]), x[:, 0] @ dense @ x[:, 0])
    close(operator.from_eigenbasis(operator.to_eigenbasis(x)), x)
    assert (operator @ x[:, :0]).shape == (n, 0)
    assert operator.shape == (n, n)
    assert operator.dtype == torch.float64
    assert operator.device.type == "cpu"
    with pytest.raises(ValueError, match=rf"operator of shape \({n}, {n}\) cannot multiply .* shape \({n + 1},\)"):
        operator @ torch.randn(n + 1)
    with pytest.raises(ValueError, match=r"cannot multiply a tensor of shape \(1, 1, 1\)"):
        operator @ torch.randn(1, 1, 1)


@every
def test_functions_of_the_matrix(name):
    operator, dense = OPERATORS[name]()
    eye = torch.eye(dense.shape[0], dtype=torch.float64)
    close(operator.inverse().to_dense(), torch.linalg.inv(dense))
    close(operator.sqrt().to_dense() @ operator.sqrt().to_dense(), dense)
    assert torch.linalg.eigvalsh(operator.sqrt().to_dense()).min() > 0
    close(operator.shifted(0.3).to_dense(), dense + 0.3 * eye)
    damped = operator.inverse().shifted(0.3).inverse()
    close(damped.to_dense(), torch.linalg.inv(torch.linalg.inv(dense) + 0.3 * eye))
    close(operator.map_eigenvalues(torch.square).to_dense(), dense @ dense)
    close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)
    close(operator.trace(), dense.trace())
    close(operator.diagonal(), dense.diagonal())
    close(operator.eigenvalues().sort().values, torch.linalg.eigvalsh(dense))


@every
def test_samples(name):
    operator, dense = OPERATORS[name]()
    n = dense.shape[0]
    ours = operator.sample((2, 3), generator=torch.Generator().manual_seed(2))
    # The same normal numbers through the symmetric square root of the dense matrix have the same norm in its metric.
    z = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert ours.shape == (2, 3, n)
    close(operator.inverse().quadratic(ours.reshape(6, n).T), z.square().sum(0))
    assert operator.sample().shape == (n,)


@pytest.mark.parametrize("name", ["two deep axes", "direct sum"])
def test_samples_have_the_covariance(name):
    operator, dense = OPERATORS[name]()
    count = 40_000
    samples = operator.sample((count,), generator=torch.Generator().manual_seed(3))
    deviation = torch.outer(dense.diagonal(), dense.diagonal()).add(dense.square()).div(count).sqrt()
    assert ((samples.T @ samples / count - dense).abs() < 5 * deviation).all()
    assert (samples.mean(0).abs() < 5 * (dense.diagonal() / count).sqrt()).all()


@every_with_angles
def test_dtype_and_state(name):
    operator, dense = OPERATORS[name]()
    single = operator.to(torch.float32)
    assert single.dtype == torch.float32
    x = torch.randn(dense.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert (single @ x).dtype == torch.float32
    for ours, theirs in (
        (single @ x, dense @ x),
        (single.inverse() @ x, torch.linalg.solve(dense, x)),
        (single.logdet(), torch.linalg.slogdet(dense).logabsdet),
        (single.diagonal(), dense.diagonal()),
    ):
        close(ours, theirs)
    close(operator.to(device="cpu").to_dense(), dense)
    file = io.BytesIO()
    torch.save(operator.state_dict(), file)
    file.seek(0)
    again = SymmetricOperator.from_state_dict(torch.load(file, weights_only=True))
    assert type(again) is type(operator)
    assert torch.equal(again.to_dense(), operator.to_dense())
    assert torch.equal(again.diagonal(), operator.diagonal())
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch.bfloat16"):
        operator.to(torch.bfloat16)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy(name, dtype):
    operator, dense = OPERATORS[name]()
    if dtype == torch.float32:
        if name not in WITH_ANGLES:
            pytest.skip("a plain basis keeps its dtype")
        operator = operator.to(dtype)
    linear = operator.to_scipy()
    n, tolerance = dense.shape[0], TOLERANCE[dtype]
    assert linear.dtype == np.dtype(str(dtype).removeprefix("torch."))
    x = np.random.default_rng(0).standard_normal((n, 2)).astype(linear.dtype)
    for product in (linear @ x, linear.T @ x, linear.H @ x):
        np.testing.assert_allclose(product, dense.numpy() @ x, **tolerance)
    np.testing.assert_allclose(linear @ x[:, 0], dense.numpy() @ x[:, 0], **tolerance)
    np.testing.assert_allclose(linear @ x[:, :1], dense.numpy() @ x[:, :1], **tolerance)
    np.testing.assert_allclose(linear.T @ x[:, 0], dense.numpy() @ x[:, 0], **tolerance)
    found, info = scipy.sparse.linalg.cg(linear, x[:, 0], rtol=1e-6)
    assert info == 0
    np.testing.assert_allclose(found, np.linalg.solve(dense.numpy(), x[:, 0]), rtol=1e-3, atol=1e-4)


@every
def test_gradients_of_the_diagonal_and_the_argument(name):
    operator, dense = OPERATORS[name]()
    if dense.shape[0] > 30:
        pytest.skip("numerical derivatives of every entry")
    d = operator.eigenvalues().clone().requires_grad_()
    x = torch.randn(dense.shape[0], 2, dtype=torch.float64, requires_grad=True)

    def values(d, x):
        parts = iter(d.split([part.numel() for part in leaves(operator)]))
        ours = operator.map_eigenvalues(lambda old: next(parts).view(old.shape))
        sample = ours.sample((2,), generator=torch.Generator().manual_seed(0))
        return ours @ x, ours.logdet(), ours.trace(), ours.diagonal(), ours.quadratic(x), sample

    assert torch.autograd.gradcheck(values, (d, x))


def leaves(operator):
    if isinstance(operator, DirectSum):
        return [leaf for index in range(len(operator)) for leaf in leaves(operator[index])]
    return [operator.eigenvalues()]


@pytest.mark.parametrize(("shape", "depth"), [((6,), 1), ((5,), 2), ((3, 4), 1)])
def test_gradients_of_the_angles(shape, depth):
    generator = torch.Generator().manual_seed(0)
    angles = [used_angles(n, depth, generator).requires_grad_() for n in shape]
    diagonal = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5
    x = torch.randn(math.prod(shape), 2, dtype=torch.float64, generator=generator)

    def values(*angles):
        operator = RotatedDiagonal(AngleBasis(shape, list(enumerate(angles))), diagonal)
        return operator @ x, operator.quadratic(x), operator.diagonal()

    assert torch.autograd.gradcheck(values, tuple(angles))


def test_float32_gradients():
    angles = torch.randn(angles_shape(8), requires_grad=True)
    d = (torch.rand(8) + 0.5).requires_grad_()
    operator = RotatedDiagonal.from_angles(angles, d)
    (operator @ torch.randn(8)).sum().backward()
    operator.logdet().backward()
    assert angles.grad.dtype == d.grad.dtype == torch.float32
    assert angles.grad.abs().sum() > 0


def test_the_basis_stays_when_its_angles_change():
    angles = torch.randn(angles_shape(8), dtype=torch.float64)
    operator = RotatedDiagonal.from_angles(angles, torch.arange(1.0, 9.0, dtype=torch.float64))
    before = operator.diagonal(), operator.to_dense()
    angles.zero_()
    assert torch.equal(operator.diagonal(), before[0])
    assert torch.equal(operator.to_dense(), before[1])
    assert torch.equal(SymmetricOperator.from_state_dict(operator.state_dict()).to_dense(), before[1])


def test_squares_in_slices(monkeypatch):
    operator, dense = rotated_diagonal((40,), depth=2)
    monkeypatch.setattr("butterfly_opt.angle_basis.MAX_SQUARE_NUMBERS", 7 * 40)
    close(operator.diagonal(), dense.diagonal())


@pytest.mark.parametrize("name", ["vector", "direct sum"])
def test_indefinite_singular_and_broken_operators_are_named(name):
    operator, _ = OPERATORS[name]()
    indefinite = operator.map_eigenvalues(lambda d: d - 1)
    smallest = f"{indefinite.eigenvalues().min().item():.3g}"
    with pytest.raises(ValueError, match=rf"square root needs a positive semi-definite .* eigenvalue {smallest}"):
        indefinite.sqrt()
    with pytest.raises(ValueError, match=rf"covariance needs a positive semi-definite .* eigenvalue {smallest}"):
        indefinite.sample()
    with pytest.raises(ValueError, match=rf"logdet needs a positive definite .* eigenvalue {smallest}.*shifted"):
        indefinite.logdet()
    assert torch.isfinite(indefinite.inverse().eigenvalues()).all()
    singular = operator.map_eigenvalues(lambda d: d - d.flatten()[0])
    with pytest.raises(ValueError, match=r"inverse needs eigenvalues .* smallest magnitude 0; use shifted"):
        singular.inverse()
    with pytest.raises(ValueError, match="logdet needs a positive definite"):
        operator.map_eigenvalues(torch.zeros_like).logdet()
    assert not operator.map_eigenvalues(torch.zeros_like).sample().any()
    broken = operator.map_eigenvalues(lambda d: torch.where(d == d.flatten()[0], float("nan"), d))
    for method in ("inverse", "sqrt", "logdet", "sample"):
        with pytest.raises(ValueError, match="an eigenvalue nan"):
            getattr(broken, method)()


def test_direct_sums_are_indexed_by_parameter_and_number():
    (first, _), (second, _) = rotated_diagonal((3,)), rotated_diagonal((2, 4), seed=1)
    params = [torch.empty(3), torch.empty(2, 4)]
    total = DirectSum([((params[0],), first), ((params[1],), second)])
    assert len(total) == 2
    assert total[params[1]] is second
    assert total[0] is first
    assert total.inverse()[params[0]].shape == (3, 3)
    assert repr(total) == "DirectSum(RotatedDiagonal(n=3, tensor=(3,)), RotatedDiagonal(n=8, tensor=(2, 4)))"
    with pytest.raises(KeyError, match=r"no operator for a parameter of shape \(7,\)"):
        total[torch.empty(7)]
    with pytest.raises(IndexError):
        total[2]


def test_what_the_constructors_refuse():
    operator, _ = rotated_diagonal((3,), plain=True)
    with pytest.raises(ValueError, match=r"diagonal must have shape \(3,\), got \(2,\)"):
        RotatedDiagonal(operator.basis, torch.ones(2))
    for method in (operator.to, operator.state_dict):
        with pytest.raises(TypeError, match="needs a basis that keeps its angles, got Basis"):
            method()
    with pytest.raises(TypeError, match=r"angles must be float32 or float64, got torch.float16"):
        AngleBasis((4,), [(0, torch.zeros(angles_shape(4), dtype=torch.float16))])
    with pytest.raises(ValueError, match=r"axis 1 is out of range for tensors of shape \(4,\)"):
        AngleBasis((4,), [(1, torch.zeros(angles_shape(4)))])
    with pytest.raises(ValueError, match="got kind = 'Banana'"):
        SymmetricOperator.from_state_dict({"kind": "Banana"})


def test_estimates_that_do_not_exist_yet():
    param = torch.randn(4, 3, requires_grad=True)
    optimizer = Butterfly([param])
    with pytest.raises(KeyError, match="no estimate for this parameter"):
        optimizer.preconditioner(param)
    param.grad = torch.randn(4, 3)
    optimizer.step()
    assert torch.linalg.eigvalsh(optimizer.preconditioner(param).to_dense()).min() > 0
    with pytest.raises(ValueError, match="the parameters have not moved for enough steps"):
        optimizer.inverse_hessian(param)


def test_a_group_is_a_direct_sum():
    params = [torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
    optimizer = Butterfly([{"params": [params[0]]}, {"params": [params[1]], "structure": "flat"}])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.preconditioner(optimizer.param_groups[1]).shape == (5, 5)
    assert optimizer.preconditioner().shape == (17, 17)


def test_capturable_with_raise_is_refused():
    with pytest.raises(ValueError, match="reads the gradient on the host and cannot be capturable"):
        Butterfly([torch.zeros(2, requires_grad=True)], capturable=True, on_nonfinite="raise")


def test_sketches_have_a_largest_width():
    with pytest.raises(ValueError, match="at most 32 columns, got columns = 33"):
        random_signs(4, 33, seed=0, stream=0, step=1, device=torch.device("cpu"))

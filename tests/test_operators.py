"""butterfly_opt.operators: one suite that every operator passes. Oracle: dense float64 linear algebra."""

import io
import math
import re

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from butterfly_opt.basis import Basis
from butterfly_opt.operators import DirectSum, RotatedDiagonal, SymmetricOperator
from butterfly_opt.rotation import Rotation, orthogonalize

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
}
"""A few hundred roundings of numbers of order 1; the inverse adds a condition of about 5."""


def rotation(n, block, lead, generator):
    made = Rotation.identity(n, block=block, lead=lead, dtype=torch.float64)
    for view in (view for runs in made.plan.views(made.matrices) for view in runs):
        view.copy_(orthogonalize(torch.randn(view.shape, generator=generator, dtype=torch.float64)))
    return made


def rotated_diagonal(shape, *, block=8, lead=2, axes=None, seed=0):
    """An operator with eigenvalues in [0.5, 2.5], and its matrix from the dense factors of its axes."""
    generator = torch.Generator().manual_seed(seed)
    axes = range(len(shape)) if axes is None else axes
    rotations = [(dim, rotation(shape[dim], block, lead, generator)) for dim in axes]
    diagonal = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    Q = torch.ones(1, 1, dtype=torch.float64)
    for dim, n in enumerate(shape):
        factor = torch.eye(n, dtype=torch.float64)
        for axis, made in rotations:
            factor = factor @ made.dense()[0] if axis == dim else factor
        Q = torch.kron(Q, factor)
    return RotatedDiagonal(Basis(shape, rotations), diagonal), Q @ torch.diag(diagonal.flatten()) @ Q.T


def direct_sum(*parts):
    """The sum of operators, and the block-diagonal matrices of what their batches broadcast to."""
    operators, matrices = zip(*parts, strict=True)
    n, start, dense = sum(matrix.shape[-1] for matrix in matrices), 0, 0
    for matrix in matrices:
        rest = n - start - matrix.shape[-1]
        dense = dense + torch.nn.functional.pad(matrix, (start, rest, start, rest))
        start += matrix.shape[-1]
    return DirectSum([((), operator) for operator in operators]), dense


def batch(shape, *members, shared=False):
    """Operators of one shape and plan as a batch of the given shape; with one rotation where it is shared."""
    operators, matrices = zip(*members, strict=True)
    bases = [operator.basis for operator in operators]
    rotations = [
        (dim, Rotation(r.plan, torch.cat([basis.rotations[i][1].matrices for basis in bases])))
        for i, (dim, r) in enumerate(bases[0].rotations)
    ]
    basis = bases[0] if shared else Basis(bases[0].shape, rotations)
    diagonal = torch.stack([operator.d for operator in operators]).view(*shape, *basis.shape)
    if shared:
        Q = operators[0].from_eigenbasis(torch.eye(len(matrices[0]), dtype=torch.float64))
        matrices = [Q @ torch.diag(operator.d.flatten()) @ Q.T for operator in operators]
    return RotatedDiagonal(basis, diagonal), torch.stack(matrices).view(*shape, *matrices[0].shape)


def seeds(number, *args, **options):
    return [rotated_diagonal(*args, **options, seed=seed) for seed in range(number)]


OPERATORS = {
    "one coordinate": lambda: rotated_diagonal((1,)),
    "scalar": lambda: rotated_diagonal(()),
    "vector": lambda: rotated_diagonal((16,)),
    "odd vector": lambda: rotated_diagonal((13,)),
    "radix 2": lambda: rotated_diagonal((13,), block=2, lead=2),
    "two rotations": lambda: rotated_diagonal((11,), block=3, lead=3, axes=(0, 0, 0)),
    "long vector": lambda: rotated_diagonal((300,), block=64, lead=16),
    "unrotated": lambda: rotated_diagonal((7,), axes=()),
    "two axes": lambda: rotated_diagonal((4, 6)),
    "two axes, twice": lambda: rotated_diagonal((5, 3), block=2, lead=2, axes=(0, 1, 0)),
    "second axis": lambda: rotated_diagonal((3, 5), axes=(1,)),
    "three axes": lambda: rotated_diagonal((2, 3, 5)),
    "direct sum": lambda: direct_sum(rotated_diagonal((3,)), rotated_diagonal((2, 4), block=2, lead=2, seed=1)),
    "nested sum": lambda: direct_sum(
        direct_sum(rotated_diagonal((3,)), rotated_diagonal((1,))), rotated_diagonal((6,))
    ),
}
BATCHES = {
    "rotations": lambda: batch((3,), *seeds(3, (13,))),
    "diagonals": lambda: batch((3,), *seeds(3, (13,)), shared=True),
    "one": lambda: batch((1,), *seeds(1, (5,))),
    "matrices of two axes": lambda: batch((2, 3), *seeds(6, (4, 3), block=2, lead=2)),
    "two rotations in a row": lambda: batch((2,), *seeds(2, (11,), block=3, lead=3, axes=(0, 0))),
    "axes of length one": lambda: batch((2, 1, 2), *seeds(4, (6,))),
    "long": lambda: batch((2,), *seeds(2, (300,), block=64, lead=16)),
    "unrotated": lambda: batch((2, 2), *seeds(4, (3,), axes=())),
    "direct sum": lambda: direct_sum(
        batch((2, 1), *seeds(2, (3,))), rotated_diagonal((4,)), batch((3,), *seeds(3, (2,)))
    ),
}
BATCHES = {f"batch: {name}": make for name, make in BATCHES.items()}
SINGLE, OPERATORS = OPERATORS, OPERATORS | BATCHES
every = pytest.mark.parametrize("name", OPERATORS)
every_single = pytest.mark.parametrize("name", SINGLE)


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs), **TOLERANCE[ours.dtype])


def right_hand_sides(dense):
    """``(n,)`` and ``(*batch, n, 3)`` of batches that broadcast with those of the operator."""
    n, own = dense.shape[-1], dense.shape[:-2]
    shapes = {(n,), (n, 3), (*own, n, 3), (2, *(1 for _ in own), n, 3), (2, *own, n, 3), (*own[1:], n, 3)}
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in sorted(shapes)]


def quadratic(x, y):
    """``x^T y``, column by column."""
    return (x * y).sum(-1 if x.dim() == 1 else -2)


@every
def test_products(name):
    operator, dense = OPERATORS[name]()
    n = dense.shape[-1]
    close(operator.to_dense(), dense)
    for x in right_hand_sides(dense):
        close(operator @ x, dense @ x)
        close(operator.T @ x, dense @ x)
        close(x.mT @ operator if x.dim() > 1 else x @ operator, x.mT @ dense if x.dim() > 1 else x @ dense)
        close(operator.quadratic(x), quadratic(x, dense @ x))
        if x.dim() > 1:
            u = operator.to_eigenbasis(x)
            assert u.shape == (dense @ x).shape
            close(operator.from_eigenbasis(u), x.expand(u.shape))
    assert (operator @ torch.ones(n, 0, dtype=torch.float64)).shape == (*dense.shape[:-1], 0)
    assert operator.shape == dense.shape
    assert operator.dtype == torch.float64
    assert operator.device.type == "cpu"
    apart = [(7, *dense.shape[1:-1], 1)] if dense.dim() > 2 and dense.shape[0] > 1 else []
    for wrong in ((n + 1,), (n + 1, n), (), *apart):
        shapes = f"operator of shape {tuple(dense.shape)} cannot multiply a tensor of shape {wrong}"
        with pytest.raises(ValueError, match=re.escape(shapes)):
            operator @ torch.ones(wrong)


@every
def test_functions_of_the_matrix(name):
    operator, dense = OPERATORS[name]()
    eye = torch.eye(dense.shape[-1], dtype=torch.float64)
    close(operator.inverse().to_dense(), torch.linalg.inv(dense))
    close(operator.sqrt().to_dense() @ operator.sqrt().to_dense(), dense)
    assert torch.linalg.eigvalsh(operator.sqrt().to_dense()).min() > 0
    close(operator.shifted(0.3).to_dense(), dense + 0.3 * eye)
    damped = operator.inverse().shifted(0.3).inverse()
    close(damped.to_dense(), torch.linalg.inv(torch.linalg.inv(dense) + 0.3 * eye))
    close(operator.map_eigenvalues(torch.square).to_dense(), dense @ dense)
    close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)
    close(operator.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1))
    close(operator.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    close(operator.eigenvalues().sort(-1).values, torch.linalg.eigvalsh(dense))


@every
def test_samples(name):
    operator, dense = OPERATORS[name]()
    *own, n, _ = dense.shape
    ours = operator.sample((2, 3), generator=torch.Generator().manual_seed(2))
    # The same normal numbers through the symmetric square root of the dense matrix have the same norm in its metric.
    z = torch.randn(*own, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert ours.shape == (2, 3, *own, n)
    close(operator.inverse().quadratic(ours.flatten(0, 1).movedim(0, -1)), z.square().sum(-2))
    assert operator.sample().shape == (*own, n)


@pytest.mark.parametrize("name", ["two axes, twice", "direct sum"])
def test_samples_have_the_covariance(name):
    operator, dense = OPERATORS[name]()
    count = 40_000
    samples = operator.sample((count,), generator=torch.Generator().manual_seed(3))
    deviation = torch.outer(dense.diagonal(), dense.diagonal()).add(dense.square()).div(count).sqrt()
    assert ((samples.T @ samples / count - dense).abs() < 5 * deviation).all()
    assert (samples.mean(0).abs() < 5 * (dense.diagonal() / count).sqrt()).all()


@every
def test_dtype_and_state(name):
    operator, dense = OPERATORS[name]()
    single = operator.to(torch.float32)
    assert single.dtype == torch.float32
    x = torch.randn(dense.shape[-1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert (single @ x).dtype == torch.float32
    for ours, theirs in (
        (single @ x, dense @ x),
        (single.inverse() @ x, torch.linalg.inv(dense) @ x),
        (single.logdet(), torch.linalg.slogdet(dense).logabsdet),
        (single.diagonal(), dense.diagonal(dim1=-2, dim2=-1)),
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


@every_single
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy(name, dtype):
    operator, dense = OPERATORS[name]()
    if dtype == torch.float32:
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
    if dense.shape[-1] > 30:
        pytest.skip("numerical derivatives of every entry")
    diagonals = [d.clone().requires_grad_() for d in leaves(operator)]
    x = torch.randn(dense.shape[-1], 2, dtype=torch.float64, requires_grad=True)

    def values(x, *diagonals):
        new = iter(diagonals)
        ours = operator.map_eigenvalues(lambda _: next(new))
        sample = ours.sample((2,), generator=torch.Generator().manual_seed(0))
        return ours @ x, ours.logdet(), ours.trace(), ours.diagonal(), ours.quadratic(x), sample

    assert torch.autograd.gradcheck(values, (x, *diagonals), fast_mode=dense.dim() > 2)


def leaves(operator):
    if isinstance(operator, DirectSum):
        return [leaf for index in range(len(operator)) for leaf in leaves(operator[index])]
    return [operator.eigenvalues()]


@every
def test_solves_and_what_gaussian_processes_ask_for(name):
    """The two methods are those of ``linear_operator``."""
    operator, dense = OPERATORS[name]()
    close(operator.inv_quad_logdet(logdet=True)[1], torch.logdet(dense))
    for b in right_hand_sides(dense):
        solved = torch.linalg.inv(dense) @ b
        close(operator.solve(b), solved)
        each = quadratic(b, solved)
        close(operator.inv_quad_logdet(b)[0], each if b.dim() == 1 else each.sum(-1))
        close(operator.inv_quad_logdet(b, reduce_inv_quad=False)[0], each)
    for nothing in operator.inv_quad_logdet():
        torch.testing.assert_close(nothing, torch.zeros(dense.shape[:-2], dtype=torch.float64))


def test_a_batch_of_shifts_makes_a_batch():
    operator, dense = SINGLE["two axes"]()
    shifts = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
    close(operator.shifted(shifts).to_dense(), dense + shifts[..., None, None] * torch.eye(24, dtype=torch.float64))
    operator, dense = BATCHES["batch: rotations"]()
    shifts = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    close(operator.shifted(shifts).to_dense(), dense + shifts[..., None, None] * torch.eye(13, dtype=torch.float64))
    with pytest.raises(ValueError, match="scipy knows no batches, got an operator of shape \\(3, 13, 13\\)"):
        operator.to_scipy()


@pytest.mark.parametrize(("block", "lead"), [(2, 2), (8, 8), (64, 16), (64, 32)])
def test_the_diagonal_takes_memory_of_order_n_block(block, lead):
    """The largest tensor that it makes, in a batch too: of a dense matrix there would be n^2 numbers each."""
    n, members = 4096, 3
    made = Rotation.identity(n, block=block, lead=lead, count=members)
    operator = RotatedDiagonal.from_rotation(made, torch.rand(members, n))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Watch():
        diagonal = operator.diagonal()
    torch.testing.assert_close(diagonal, operator.eigenvalues())
    assert largest <= 2 * members * n * block


@pytest.mark.parametrize("name", ["odd vector", "two axes", "direct sum"])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", ["float32", "float64", "int64", "complex64", "complex128"])
def test_numpy_arrays_of_any_dtype_and_layout(name, own, other):
    operator, dense = OPERATORS[name]()
    operator, dense, n = operator.to(own), dense.numpy(), dense.shape[0]
    rng = np.random.default_rng(0)
    imaginary = 1j * rng.standard_normal((n, 4)) if "complex" in other else 0
    base = (4 * rng.standard_normal((n, 4)) + imaginary).astype(other)
    wanted = np.result_type(base.dtype, np.dtype(str(own).removeprefix("torch.")))
    # float64 input on a float32 operator: the operator's own rounding stays.
    tolerance = TOLERANCE[own] if wanted in (np.float64, np.complex128) else TOLERANCE[torch.float32]
    linear = operator.to_scipy()
    for x in (base, base[::-1, ::2], base[:, ::-1], np.asfortranarray(base), base[:, 0], base[::-1, 0]):
        x = x.view()
        x.flags.writeable = False
        for product in (linear @ x, operator @ x, (x.T @ operator).T):
            assert product.dtype == wanted
            np.testing.assert_allclose(product, dense @ x, **tolerance)


def test_complex_tensors_are_multiplied_part_by_part():
    operator, dense = OPERATORS["two axes"]()
    x = torch.randn(24, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator @ x, dense.to(x.dtype) @ x)
    torch.testing.assert_close(operator.quadratic(x), (x.conj() * (dense.to(x.dtype) @ x)).sum(0).real)
    torch.testing.assert_close(x.T @ operator, x.T @ dense.to(x.dtype))


@pytest.mark.parametrize(("shape", "plan"), [((6,), (2, 2)), ((7,), (4, 2)), ((3, 4), (8, 2))])
def test_gradients_of_the_matrices(shape, plan):
    generator = torch.Generator().manual_seed(0)
    rotations = [rotation(n, *plan, generator) for n in shape]
    diagonal = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5
    x = torch.randn(math.prod(shape), 2, dtype=torch.float64, generator=generator)

    def values(*matrices):
        pairs = zip(rotations, matrices, strict=True)
        basis = Basis(shape, [(dim, Rotation(r.plan, m)) for dim, (r, m) in enumerate(pairs)])
        operator = RotatedDiagonal(basis, diagonal)
        return operator @ x, operator.quadratic(x), operator.diagonal()

    assert torch.autograd.gradcheck(values, tuple(r.matrices.clone().requires_grad_() for r in rotations))


def test_stacks_of_tensors_are_rotated_each_by_itself():
    generator, x = torch.Generator().manual_seed(0), torch.randn(2, 4, 5, 3, dtype=torch.float64)
    rotations = [(dim, rotation(n, 4, 2, generator)) for dim, n in enumerate((4, 5))]
    stack = Basis((4, 5), [(d, Rotation(r.plan, torch.cat((r.matrices, r.matrices)))) for d, r in rotations])
    one = Basis((4, 5), rotations)
    for method in ("to_rotated", "from_rotated", "squared"):
        both = getattr(stack, method)(x)
        for i in range(2):
            torch.testing.assert_close(both[i], getattr(one, method)(x[i]))
            torch.testing.assert_close(both[i : i + 1], getattr(one, method)(x[i : i + 1]))
    torch.testing.assert_close(stack.from_rotated(stack.to_rotated(x)), x)
    again = Basis.from_state_dict(stack.to(dtype=torch.float32).state_dict())
    assert again.to_rotated(x.float()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"a basis of 2 x \(4, 5\) cannot rotate shape \(4, 5\)"):
        stack.to_rotated(x[0, ..., 0])
    wanted = r"diagonal must have shape \(\*batch, 4, 5\), of a batch of the 2 of the basis, got "
    for shape in ((4, 5), (3, 4, 5)):
        with pytest.raises(ValueError, match=wanted + re.escape(str(shape))):
            RotatedDiagonal(stack, torch.ones(shape))


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
    with pytest.raises(ValueError, match="inv_quad_logdet needs a positive definite"):
        indefinite.inv_quad_logdet()
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


def test_what_is_refused():
    operator, _ = rotated_diagonal((3,))
    with pytest.raises(ValueError, match=r"diagonal must have shape \(\*batch, 3\), .* got \(2,\)"):
        RotatedDiagonal(operator.basis, torch.ones(2))
    turn = Rotation.identity(4, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"rotations must be float32 or float64, got torch.float16"):
        Basis((4,), [(0, Rotation(turn.plan, turn.matrices.half()))])
    with pytest.raises(ValueError, match=r"axis 1 is out of range for tensors of shape \(4,\)"):
        Basis((4,), [(1, turn)])
    with pytest.raises(ValueError, match=r"axis 0 of 1 x \(5,\) needs 1 rotations of length 5, got 1 of length 4"):
        Basis((5,), [(0, turn)])
    with pytest.raises(ValueError, match="got kind = 'Banana'"):
        SymmetricOperator.from_state_dict({"kind": "Banana"})
    for product in (lambda: operator @ [1.0, 2.0, 3.0], lambda: [1.0, 2.0, 3.0] @ operator):
        with pytest.raises(TypeError, match="an operator multiplies tensors and NumPy arrays, got list"):
            product()
    for product in (lambda x: operator @ x, lambda x: operator.to_scipy().matvec(x)):
        with pytest.raises(TypeError, match=r"multiplies real and complex numbers, got an array of (object|\|O)"):
            product(np.array([1, 2, None], dtype=object))

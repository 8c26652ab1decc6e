"""Symmetric operators ``A = Q diag(d) Q^T`` and their direct sums, as objects.

``Q`` is orthogonal and fast, so what needs an eigendecomposition of a dense matrix acts on ``d``
alone: inverse, square root, determinant, samples, a shift of the diagonal. Source: M. Mathieu and
Y. LeCun, arXiv:1404.7195 (2014), section 2.

Every operator is a ``SymmetricOperator`` of order n, or a batch of them, and multiplies as ``torch.matmul`` does: with
``(n,)`` or ``(*batch, n, columns)``, the batches broadcast. Its arithmetic is done in its own dtype, float32 or
float64: other input is converted. Products, ``logdet``, ``trace``, ``diagonal``, ``eigenvalues`` and ``sample`` are
differentiable in ``d``, in the argument and in the matrices of the rotations.
Complex vectors are multiplied part by part; NumPy arrays give NumPy arrays, by the rules of ``to_scipy``.

With an estimate P of an inverse Hessian, ``(H + lambda I)^-1`` is ``P.inverse().shifted(lam).inverse()``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from butterfly_opt.basis import Basis
from butterfly_opt.rotation import Rotation

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SymmetricOperator(ABC):
    """A symmetric n x n operator with a known eigenbasis Q and eigenvalues d."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """``d``, shape ``(*batch, n)``, in the order of the columns of Q (not sorted)."""

    @abstractmethod
    def _rotate(self, x: Tensor, *, transpose: bool) -> Tensor:
        """``Q x`` or ``Q^T x`` for ``x`` of shape ``(*batch, n, columns)`` in the dtype of the operator."""

    @abstractmethod
    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> "SymmetricOperator":
        """``Q diag(function(d)) Q^T``, an operator of the same class that shares Q.

        Args:
            function: of ``d``, ``(*batch, n)``, element-wise, such as ``torch.log`` or ``lambda d: d.clamp_min(0)``.
        """

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of the n x n matrix, shape ``(*batch, n)``, exact: ``(Q o Q) d``.

        Cost: O(n block^2) for the leading plan and O(n block) for the full one, memory O(n block) at most
            (``Rotation.squared``); O(m^2) memory where an axis of length m is rotated several times.
        """

    @abstractmethod
    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "SymmetricOperator":
        """The operator in another dtype, float32 or float64, or on another device.

        Raises:
            TypeError: for any other dtype.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, for ``torch.save`` and ``torch.load(weights_only=True)``."""

    @property
    def shape(self) -> torch.Size:
        """``(*batch, n, n)``."""
        d = self.eigenvalues()
        return torch.Size((*d.shape, d.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic."""
        return self.eigenvalues().dtype

    @property
    def device(self) -> torch.device:
        """Device of ``d``."""
        return self.eigenvalues().device

    @property
    def T(self) -> "SymmetricOperator":
        """The transpose: the operator itself."""
        return self

    __array_ufunc__ = None  # NumPy leaves ``array @ operator`` to us

    def to_eigenbasis(self, x: Tensor) -> Tensor:
        """``Q^T x``, shapes as in ``A @ x``. Cost: one rotation a column."""
        return self._columns(x, partial(self._rotate, transpose=True))

    def from_eigenbasis(self, u: Tensor) -> Tensor:
        """``Q u``, shapes as in ``A @ u``."""
        return self._columns(u, partial(self._rotate, transpose=False))

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: NDArray[Any]) -> NDArray[Any]: ...
    def __matmul__(self, x: Any) -> Any:
        """``A x`` for ``x`` of shape ``(n,)`` or ``(*batch, n, columns)``. Cost: two rotations a column.

        Raises:
            TypeError: if ``x`` is neither a tensor nor a NumPy array.
            ValueError: for any other shape, and for batches that do not broadcast.
        """
        if isinstance(x, np.ndarray):
            return _numpy_product(self, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"an operator multiplies tensors and NumPy arrays, got {type(x).__name__}")
        d = self.eigenvalues().unsqueeze(-1)
        return self._columns(x, lambda c: self._rotate(d * self._rotate(c, transpose=True), transpose=False))

    def __rmatmul__(self, x: Any) -> Any:
        """``x A`` for ``x`` of shape ``(n,)`` or ``(*batch, rows, n)``, see ``A @ x``."""
        if not isinstance(x, Tensor | np.ndarray):
            raise TypeError(f"an operator multiplies tensors and NumPy arrays, got {type(x).__name__}")
        return (self @ x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else self @ x

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``, shapes as in ``A @ b``; two rotations a column.

        Raises:
            ValueError: see ``inverse``.
        """
        return self.inverse() @ b

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool = False, reduce_inv_quad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``tr(b^T A^-1 b)`` and ``log det A``, as in ``linear_operator``; what is not asked for is 0.

        Args:
            inv_quad_rhs: b, shapes as in ``A @ b``.
            logdet: whether the second is asked for.
            reduce_inv_quad: sum over the columns.

        Raises:
            ValueError: if the operator is not positive definite.
        """
        d = self.eigenvalues()
        self._check_positive("inv_quad_logdet")
        quad = zero = d.new_zeros(d.shape[:-1])
        if inv_quad_rhs is not None:
            quad = self._weighted_squares(d.reciprocal(), inv_quad_rhs)
            quad = quad.sum(-1) if reduce_inv_quad and inv_quad_rhs.dim() > 1 else quad
        return quad, self.logdet() if logdet else zero

    def quadratic(self, x: Tensor) -> Tensor:
        """``x^H A x``: ``(*batch,)`` for ``x`` of shape ``(n,)``, else ``(*batch, columns)``; one rotation a column."""
        return self._weighted_squares(self.eigenvalues(), x)

    def inverse(self) -> "SymmetricOperator":
        """``A^-1``.

        Raises:
            ValueError: if an eigenvalue is zero (or so small that its inverse overflows), or not finite.
        """
        d = self.eigenvalues()
        if not torch.isfinite(d.reciprocal()).all() or not torch.isfinite(d).all():
            raise ValueError(
                f"the inverse needs eigenvalues that are finite and not zero, got {_worst(d)}; use shifted(...)"
            )
        return self.map_eigenvalues(torch.reciprocal)

    def sqrt(self) -> "SymmetricOperator":
        """The symmetric positive semi-definite square root: ``A.sqrt() @ (A.sqrt() @ x) = A @ x``.

        Raises:
            ValueError: if an eigenvalue is negative.
        """
        self._check_positive("the square root", "semi-definite")
        return self.map_eigenvalues(torch.sqrt)

    def shifted(self, shift: float | Tensor) -> "SymmetricOperator":
        """``A + shift I``, the damped operator; a batch of them for a batch of shifts."""
        return self.map_eigenvalues(lambda d: d + (shift.unsqueeze(-1) if isinstance(shift, Tensor) else shift))

    def logdet(self) -> Tensor:
        """``log det A = sum log d``, ``(*batch,)``. Cost: O(n).

        Raises:
            ValueError: if an eigenvalue is not positive.
        """
        self._check_positive("logdet")
        return self.eigenvalues().log().sum(-1)

    def trace(self) -> Tensor:
        """``tr A = sum d``, ``(*batch,)``. Cost: O(n)."""
        return self.eigenvalues().sum(-1)

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Samples of N(0, A): ``Q diag(sqrt d) z``, z standard normal.

        Args:
            sample_shape: shape of the samples of each operator.
            generator: of ``z``, on the operator's device; torch's global one if None.

        Returns:
            ``(*sample_shape, *batch, n)``, differentiable in ``d``. Cost: one rotation a sample.

        Raises:
            ValueError: if an eigenvalue is negative.
        """
        self._check_positive("a covariance", "semi-definite")
        d, count = self.eigenvalues(), torch.Size(sample_shape).numel()
        z = torch.randn(*d.shape, count, dtype=d.dtype, device=d.device, generator=generator)
        return self.from_eigenbasis(d.sqrt().unsqueeze(-1) * z).movedim(-1, 0).reshape((*sample_shape, *d.shape))

    def to_dense(self) -> Tensor:
        """The matrix, ``(*batch, n, n)``. Cost: n products, n^2 memory."""
        return self @ torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> "LinearOperator":
        """A ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays, detached from the graph.

        Results have NumPy's common dtype of operator and vector, and the arithmetic its precision: float64 vectors on
        a float32 operator are multiplied in float64. Any layout goes, read-only arrays and negative strides too.

        Raises:
            ImportError: if scipy is not installed.
            ValueError: for a batch of operators.
        """
        from scipy.sparse.linalg import LinearOperator

        if len(self.shape) > 2:
            raise ValueError(f"scipy knows no batches, got an operator of shape {tuple(self.shape)}")
        # One copy in float64, made when a vector asks for it.
        double = cache(lambda: self.to(torch.float64))

        def product(x: NDArray[Any]) -> NDArray[Any]:
            return _numpy_product(self, x, double)

        return LinearOperator(
            tuple(self.shape),
            # scipy hands on vectors as columns too.
            matvec=lambda x: product(x.reshape(-1)),
            rmatvec=lambda x: product(x.reshape(-1)),
            matmat=product,
            rmatmat=product,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> "SymmetricOperator":
        """The operator that ``state_dict`` describes. The parts of a direct sum come without their parameters.

        Raises:
            ValueError: if ``state`` describes no operator.
        """
        kind = state.get("kind")
        if kind == "RotatedDiagonal":
            return RotatedDiagonal(Basis.from_state_dict(state["basis"]), state["diagonal"])
        if kind == "DirectSum":
            return DirectSum([((), SymmetricOperator.from_state_dict(part)) for part in state["parts"]])
        raise ValueError(f"state must be the state_dict of an operator, got kind = {kind!r}")

    def _check_positive(self, what: str, kind: str = "definite") -> None:
        d = self.eigenvalues()
        if not (d > 0 if kind == "definite" else d >= 0).all():
            raise ValueError(f"{what} needs a positive {kind} operator, got {_worst(d)}; use shifted(...)")

    def _columns(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A linear function of ``(*batch, n, columns)``; a vector is one column, complex numbers are two."""
        if x.is_complex():
            return torch.complex(self._columns(x.real, function), self._columns(x.imag, function))
        shape = self.shape
        try:
            _broadcast(shape[:-2], x.shape[:-2])
            # Without axes the index is -0: an IndexError.
            fits = x.shape[-min(x.dim(), 2)] == shape[-1]
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            raise ValueError(f"operator of shape {tuple(shape)} cannot multiply a tensor of shape {tuple(x.shape)}")
        x = x.to(self.dtype)
        return function(x.unsqueeze(-1)).squeeze(-1) if x.dim() == 1 else function(x)

    def _weighted_squares(self, weights: Tensor, x: Tensor) -> Tensor:
        """``sum_i weights_i |(Q^T x)_i|^2``."""
        u = self.to_eigenbasis(x if x.dim() > 1 else x.unsqueeze(-1))
        energy = u.real.square() + u.imag.square() if u.is_complex() else u.square()
        squares = (weights.unsqueeze(-2) @ energy).squeeze(-2)
        return squares if x.dim() > 1 else squares.squeeze(-1)


class RotatedDiagonal(SymmetricOperator):
    """The symmetric operator ``Q diag(d) Q^T`` of order n on flattened tensors of one shape, or a batch of them.

    Args:
        basis: the rotation of tensors of ``basis.shape``; ``n = basis.shape.numel()``. Its count is that of the batch,
            in order, or 1 where all share it.
        diagonal: ``d`` in rotated coordinates, of shape ``(*batch, *basis.shape)``, float32 or float64.

    Raises:
        ValueError: if the shapes do not belong together.

    Example:
        >>> operator = RotatedDiagonal.from_rotation(Rotation.identity(64), torch.rand(64))
        >>> operator.sqrt() @ torch.randn(64)
    """

    def __init__(self, basis: Basis, diagonal: Tensor) -> None:
        dims = diagonal.dim() - len(basis.shape)
        if dims < 0 or diagonal.shape[dims:] != basis.shape or basis.count not in (1, diagonal.shape[:dims].numel()):
            raise ValueError(
                f"diagonal must have shape (*batch, {', '.join(map(str, basis.shape))}), of a batch of the "
                f"{basis.count} of the basis, got {tuple(diagonal.shape)}"
            )
        self.basis = basis
        self.d = diagonal

    @classmethod
    def from_rotation(cls, rotation: Rotation, diagonal: Tensor) -> "RotatedDiagonal":
        """The operator of a rotation of vectors, ``diagonal`` of shape ``(*batch, n)``."""
        return cls(Basis(diagonal.shape[-1:], [(0, rotation)]), diagonal)

    def eigenvalues(self) -> Tensor:
        """``d``, see ``SymmetricOperator``."""
        return self.d.reshape(*self._batch, self.basis.shape.numel())

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> "RotatedDiagonal":
        """``Q diag(function(d)) Q^T``, see ``SymmetricOperator``."""
        d = function(self.eigenvalues())
        return RotatedDiagonal(self.basis, d.reshape((*d.shape[:-1], *self.basis.shape)))

    def diagonal(self) -> Tensor:
        """The diagonal of the matrix, see ``SymmetricOperator``."""
        return self._stacked(self.eigenvalues().unsqueeze(-1), self.basis.squared).squeeze(-1)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "RotatedDiagonal":
        """The operator in another dtype or on another device, see ``SymmetricOperator``."""
        wanted = self.dtype if dtype is None else dtype
        if wanted not in (torch.float32, torch.float64):
            raise TypeError(f"an operator must be float32 or float64, got {wanted}")
        return RotatedDiagonal(self.basis.to(dtype=wanted, device=device), self.d.to(device=device, dtype=wanted))

    def state_dict(self) -> dict[str, Any]:
        """See ``SymmetricOperator``."""
        return {"kind": "RotatedDiagonal", "basis": self.basis.state_dict(), "diagonal": self.d.detach()}

    @property
    def _batch(self) -> torch.Size:
        return self.d.shape[: self.d.dim() - len(self.basis.shape)]

    def _rotate(self, x: Tensor, *, transpose: bool) -> Tensor:
        batch = _broadcast(self._batch, x.shape[:-2])
        rotated = self._stacked(x, self.basis.to_rotated if transpose else self.basis.from_rotated)
        # Where one basis serves a batch of d, x was rotated once.
        return rotated.expand(*batch, *x.shape[-2:])

    def _stacked(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of ``(count, *basis.shape, columns)``; axes of a batch that share a rotation are columns."""
        own = self._batch if self.basis.count > 1 else torch.Size()
        batch = _broadcast(own, x.shape[:-2])
        dims = len(batch)
        # An axis of length 1 has one rotation for all: it is shared too.
        stack = [dims - len(own) + i for i, size in enumerate(own) if size > 1]
        shared = [dim for dim in range(dims) if dim not in stack]
        order = [*stack, dims, *shared, dims + 1]
        x = x.expand(*batch, *x.shape[-2:]).permute(order)
        columns = x.shape[len(stack) + 1 :].numel()
        y = function(x.reshape(self.basis.count, *self.basis.shape, columns)).reshape(x.shape)
        return y.permute([order.index(dim) for dim in range(dims + 2)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.shape[0]}, tensor={tuple(self.basis.shape)})"


class DirectSum(SymmetricOperator):
    """The direct sum of the operators of several tensors, indexed by parameter or by number.

    Args:
        parts: in order, the parameters that each operator covers (may be none), and the operator.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Tensor], SymmetricOperator]]) -> None:
        self._parts = [(tuple(params), part) for params, part in parts]

    def __getitem__(self, key: Tensor | int) -> SymmetricOperator:
        if isinstance(key, int):
            return self._parts[key][1]
        for params, part in self._parts:
            if any(key is covered for covered in params):
                return part
        raise KeyError(f"no operator for a parameter of shape {tuple(key.shape)}")

    def __len__(self) -> int:
        return len(self._parts)

    def eigenvalues(self) -> Tensor:
        """``d`` of the parts, one behind the other."""
        return _cat([part.eigenvalues() for _, part in self._parts], dim=-1)

    def _rotate(self, x: Tensor, *, transpose: bool) -> Tensor:
        pieces = x.split([part.shape[-1] for _, part in self._parts], dim=-2)
        turned = zip(self._parts, pieces, strict=True)
        return _cat([part._rotate(piece, transpose=transpose) for (_, part), piece in turned], dim=-2)

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> "DirectSum":
        """``Q diag(function(d)) Q^T``, see ``SymmetricOperator``."""
        return DirectSum([(params, part.map_eigenvalues(function)) for params, part in self._parts])

    def diagonal(self) -> Tensor:
        """The diagonals of the parts, see ``SymmetricOperator``."""
        return _cat([part.diagonal() for _, part in self._parts], dim=-1)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "DirectSum":
        """Every part in another dtype or on another device, see ``SymmetricOperator``."""
        return DirectSum([(params, part.to(dtype, device)) for params, part in self._parts])

    def state_dict(self) -> dict[str, Any]:
        """See ``SymmetricOperator``; the parameters are not part of it."""
        return {"kind": "DirectSum", "parts": [part.state_dict() for _, part in self._parts]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, (part for _, part in self._parts)))})"


def _worst(d: Tensor) -> str:
    """The eigenvalue to name in an error: the first that is not finite, else the smallest."""
    broken = d[~torch.isfinite(d)]
    if broken.numel():
        return f"an eigenvalue {broken[0].item():.3g}"
    return f"a smallest eigenvalue {d.min().item():.3g} and a smallest magnitude {d.abs().min().item():.3g}"


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    """``torch.broadcast_shapes``, which takes as long as a small product, where there is anything to broadcast."""
    return torch.broadcast_shapes(a, b) if a and b else a or b


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenates along a negative axis; the axes before it broadcast."""
    batch = torch.broadcast_shapes(*(part.shape[:dim] for part in parts))
    return torch.cat([part.expand(*batch, *part.shape[dim:]) for part in parts], dim)


def _numpy_product(
    operator: SymmetricOperator, x: NDArray[Any], double: Callable[[], SymmetricOperator] | None = None
) -> NDArray[Any]:
    """``A x`` in the common dtype of both; ``double`` makes the operator in float64, or has it."""
    own = np.dtype(str(operator.dtype).removeprefix("torch."))
    wanted = np.result_type(x.dtype, own)
    if wanted not in (np.float32, np.float64, np.complex64, np.complex128):
        raise TypeError(f"an operator of dtype {own} multiplies real and complex numbers, got an array of {x.dtype}")
    if wanted in (np.float64, np.complex128) and own == np.float32:
        operator = double() if double else operator.to(torch.float64)
    with torch.no_grad():
        # A copy: torch takes neither negative strides nor read-only memory.
        return (operator @ torch.from_numpy(np.array(x, dtype=wanted)).to(operator.device)).cpu().numpy()

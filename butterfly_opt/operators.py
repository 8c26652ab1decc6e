"""Symmetric operators ``A = Q diag(d) Q^T`` and their direct sums, as objects.

``Q`` is orthogonal and fast, so what needs an eigendecomposition of a dense matrix acts on ``d``
alone: inverse, square root, determinant, samples, a shift of the diagonal. Source: M. Mathieu and
Y. LeCun, arXiv:1404.7195 (2014), section 2.

Every operator is a ``SymmetricOperator`` of order n. Its arithmetic is done in its own dtype,
float32 or float64: other input is converted. Products, ``logdet``, ``trace``, ``diagonal``,
``eigenvalues`` and ``sample`` are differentiable in ``d``, in the argument and in the matrices of the rotations.
Complex vectors are multiplied part by part; NumPy arrays give NumPy arrays, by the rules of ``to_scipy``.

With an estimate P of an inverse Hessian, ``(H + lambda I)^-1`` is ``P.inverse().shifted(lam).inverse()``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
        """``d``, shape ``(n,)``, in the order of the columns of Q (not sorted)."""

    @abstractmethod
    def to_eigenbasis(self, x: Tensor) -> Tensor:
        """``Q^T x`` for ``x`` of shape ``(n,)`` or ``(n, columns)``. Cost: one rotation a column."""

    @abstractmethod
    def from_eigenbasis(self, u: Tensor) -> Tensor:
        """``Q u``, the inverse of ``to_eigenbasis``."""

    @abstractmethod
    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> "SymmetricOperator":
        """``Q diag(function(d)) Q^T``, an operator of the same class that shares Q.

        Args:
            function: element-wise, such as ``torch.log`` or ``lambda d: d.clamp_min(0)``.
        """

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of the n x n matrix, shape ``(n,)``, exact: ``(Q o Q) d``.

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
        """``(n, n)``."""
        n = self.eigenvalues().numel()
        return torch.Size((n, n))

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

    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: NDArray[Any]) -> NDArray[Any]: ...
    def __matmul__(self, x: Any) -> Any:
        """``A x`` for ``x`` of shape ``(n,)`` or ``(n, columns)``. Cost: two rotations a column.

        Raises:
            TypeError: if ``x`` is neither a tensor nor a NumPy array.
            ValueError: for any other shape.
        """
        if isinstance(x, np.ndarray):
            return _numpy_product(self, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"an operator multiplies tensors and NumPy arrays, got {type(x).__name__}")
        rotated = self.to_eigenbasis(x)
        d = self.eigenvalues()
        return self.from_eigenbasis((d if rotated.dim() == 1 else d[:, None]) * rotated)

    def __rmatmul__(self, x: Any) -> Any:
        """``x A`` for ``x`` of shape ``(n,)`` or ``(rows, n)``, see ``A @ x``."""
        if not isinstance(x, Tensor | np.ndarray):
            raise TypeError(f"an operator multiplies tensors and NumPy arrays, got {type(x).__name__}")
        return (self @ (x.T if x.ndim == 2 else x)).T if x.ndim == 2 else self @ x

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``b`` of shape ``(n,)`` or ``(n, columns)``; two rotations a column.

        Raises:
            ValueError: see ``inverse``.
        """
        return self.inverse() @ b

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool = False, reduce_inv_quad: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``tr(b^T A^-1 b)`` and ``log det A``, as in ``linear_operator``; what is not asked for is 0.

        Args:
            inv_quad_rhs: b, ``(n,)`` or ``(n, columns)``.
            logdet: whether the second is asked for.
            reduce_inv_quad: sum over the columns.

        Raises:
            ValueError: if the operator is not positive definite.
        """
        d = self.eigenvalues()
        self._check_definite("inv_quad_logdet")
        quad = d.new_zeros(())
        if inv_quad_rhs is not None:
            quad = d.reciprocal() @ _energy(self.to_eigenbasis(inv_quad_rhs))
            quad = quad.sum() if reduce_inv_quad else quad
        return quad, self.logdet() if logdet else d.new_zeros(())

    def quadratic(self, x: Tensor) -> Tensor:
        """``x^H A x``: 0-d for ``x`` of shape ``(n,)``, ``(columns,)`` for ``(n, columns)``; one rotation a column."""
        return self.eigenvalues() @ _energy(self.to_eigenbasis(x))

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
        self._check_semidefinite("the square root")
        return self.map_eigenvalues(torch.sqrt)

    def shifted(self, shift: float | Tensor) -> "SymmetricOperator":
        """``A + shift I``, the damped operator."""
        return self.map_eigenvalues(lambda d: d + shift)

    def logdet(self) -> Tensor:
        """``log det A = sum log d``, 0-d. Cost: O(n).

        Raises:
            ValueError: if an eigenvalue is not positive.
        """
        self._check_definite("logdet")
        return self.eigenvalues().log().sum()

    def trace(self) -> Tensor:
        """``tr A = sum d``, 0-d. Cost: O(n)."""
        return self.eigenvalues().sum()

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Samples of N(0, A): ``Q diag(sqrt d) z``, z standard normal.

        Args:
            sample_shape: shape of the samples.
            generator: of ``z``, on the operator's device; torch's global one if None.

        Returns:
            ``(*sample_shape, n)``, differentiable in ``d``. Cost: one rotation a sample.

        Raises:
            ValueError: if an eigenvalue is negative.
        """
        self._check_semidefinite("a covariance")
        d, count = self.eigenvalues(), torch.Size(sample_shape).numel()
        z = torch.randn(d.numel(), count, dtype=d.dtype, device=d.device, generator=generator)
        return self.from_eigenbasis(d.sqrt()[:, None] * z).T.reshape(*sample_shape, d.numel())

    def to_dense(self) -> Tensor:
        """The n x n matrix. Cost: n products, n^2 memory."""
        d = self.eigenvalues()
        return self @ torch.eye(d.numel(), dtype=d.dtype, device=d.device)

    def to_scipy(self) -> "LinearOperator":
        """A ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays, detached from the graph.

        Results have NumPy's common dtype of operator and vector, and the arithmetic its precision: float64 vectors on
        a float32 operator are multiplied in float64. Any layout goes, read-only arrays and negative strides too.

        Raises:
            ImportError: if scipy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        doubled: list[SymmetricOperator] = []

        def product(x: NDArray[Any]) -> NDArray[Any]:
            # A copy in float64 is made once.
            if self.dtype == torch.float32 and np.result_type(x.dtype, np.float32) != np.float32 and not doubled:
                doubled.append(self.to(torch.float64))
            return _numpy_product(self, x, *doubled)

        return LinearOperator(
            tuple(self.shape),
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

    def _check_definite(self, what: str) -> None:
        d = self.eigenvalues()
        if not (d > 0).all():
            raise ValueError(f"{what} needs a positive definite operator, got {_worst(d)}; use shifted(...)")

    def _check_semidefinite(self, what: str) -> None:
        d = self.eigenvalues()
        if not (d >= 0).all():
            raise ValueError(f"{what} needs a positive semi-definite operator, got {_worst(d)}; use shifted(...)")

    def _check_shape(self, x: Tensor) -> None:
        n = self.shape[0]
        if x.dim() not in (1, 2) or x.shape[0] != n:
            raise ValueError(f"operator of shape ({n}, {n}) cannot multiply a tensor of shape {tuple(x.shape)}")


class RotatedDiagonal(SymmetricOperator):
    """The symmetric operator ``Q diag(d) Q^T`` of order n on flattened tensors of one shape.

    Args:
        basis: the rotation of tensors of ``basis.shape``, of count 1; ``n = basis.shape.numel()``.
        diagonal: ``d`` in rotated coordinates, of shape ``basis.shape``, float32 or float64.

    Raises:
        ValueError: if the shapes differ, or the basis is that of several tensors.

    Example:
        >>> operator = RotatedDiagonal.from_rotation(Rotation.identity(64), torch.rand(64))
        >>> operator.sqrt() @ torch.randn(64)
    """

    def __init__(self, basis: Basis, diagonal: Tensor) -> None:
        if diagonal.shape != basis.shape:
            raise ValueError(f"diagonal must have shape {tuple(basis.shape)}, got {tuple(diagonal.shape)}")
        if basis.count != 1:
            raise ValueError(f"an operator needs the basis of one tensor, got one of {basis.count}")
        self.basis = basis
        self.d = diagonal

    @classmethod
    def from_rotation(cls, rotation: Rotation, diagonal: Tensor) -> "RotatedDiagonal":
        """The operator of one rotation on vectors, ``diagonal`` of shape ``(n,)``."""
        return cls(Basis(diagonal.shape, [(0, rotation)]), diagonal)

    def eigenvalues(self) -> Tensor:
        """``d``, shape ``(n,)``, in the order of the columns of Q (not sorted)."""
        return self.d.reshape(-1)

    def to_eigenbasis(self, x: Tensor) -> Tensor:
        """``Q^T x``, see ``SymmetricOperator``."""
        return self._rotate(x, transpose=True)

    def from_eigenbasis(self, u: Tensor) -> Tensor:
        """``Q u``, see ``SymmetricOperator``."""
        return self._rotate(u, transpose=False)

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> "RotatedDiagonal":
        """``Q diag(function(d)) Q^T``, see ``SymmetricOperator``."""
        return RotatedDiagonal(self.basis, function(self.d))

    def diagonal(self) -> Tensor:
        """The diagonal of the matrix, see ``SymmetricOperator``."""
        return self.basis.squared(self.d).reshape(-1)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "RotatedDiagonal":
        """The operator in another dtype or on another device, see ``SymmetricOperator``."""
        wanted = self.dtype if dtype is None else dtype
        if wanted not in (torch.float32, torch.float64):
            raise TypeError(f"an operator must be float32 or float64, got {wanted}")
        return RotatedDiagonal(self.basis.to(dtype=wanted, device=device), self.d.to(device=device, dtype=wanted))

    def state_dict(self) -> dict[str, Any]:
        """See ``SymmetricOperator``."""
        return {"kind": "RotatedDiagonal", "basis": self.basis.state_dict(), "diagonal": self.d.detach()}

    def _rotate(self, x: Tensor, *, transpose: bool) -> Tensor:
        """``Q x`` or ``Q^T x``, all columns at once, in the shape that the basis rotates."""
        self._check_shape(x)
        if x.is_complex():
            return torch.complex(self._rotate(x.real, transpose=transpose), self._rotate(x.imag, transpose=transpose))
        rotated = x.to(self.d.dtype).reshape((*self.basis.shape, *x.shape[1:]))
        return (self.basis.to_rotated if transpose else self.basis.from_rotated)(rotated).reshape(x.shape)

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
        return torch.cat([part.eigenvalues() for _, part in self._parts])

    def to_eigenbasis(self, x: Tensor) -> Tensor:
        """``Q^T x``, see ``SymmetricOperator``."""
        return torch.cat([part.to_eigenbasis(piece) for part, piece in self._pieces(x)])

    def from_eigenbasis(self, u: Tensor) -> Tensor:
        """``Q u``, see ``SymmetricOperator``."""
        return torch.cat([part.from_eigenbasis(piece) for part, piece in self._pieces(u)])

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> "DirectSum":
        """``Q diag(function(d)) Q^T``, see ``SymmetricOperator``."""
        return DirectSum([(params, part.map_eigenvalues(function)) for params, part in self._parts])

    def diagonal(self) -> Tensor:
        """The diagonals of the parts, see ``SymmetricOperator``."""
        return torch.cat([part.diagonal() for _, part in self._parts])

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "DirectSum":
        """Every part in another dtype or on another device, see ``SymmetricOperator``."""
        return DirectSum([(params, part.to(dtype, device)) for params, part in self._parts])

    def state_dict(self) -> dict[str, Any]:
        """See ``SymmetricOperator``; the parameters are not part of it."""
        return {"kind": "DirectSum", "parts": [part.state_dict() for _, part in self._parts]}

    def to_dense(self) -> Tensor:
        """The block-diagonal n x n matrix."""
        return torch.block_diag(*(part.to_dense() for _, part in self._parts))

    def _pieces(self, x: Tensor) -> list[tuple[SymmetricOperator, Tensor]]:
        self._check_shape(x)
        pieces = x.split([part.shape[0] for _, part in self._parts])
        return [(part, piece) for (_, part), piece in zip(self._parts, pieces, strict=True)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, (part for _, part in self._parts)))})"


def _worst(d: Tensor) -> str:
    """The eigenvalue to name in an error: the first that is not finite, else the smallest."""
    broken = d[~torch.isfinite(d)]
    if broken.numel():
        return f"an eigenvalue {broken[0].item():.3g}"
    return f"a smallest eigenvalue {d.min().item():.3g} and a smallest magnitude {d.abs().min().item():.3g}"


def _energy(x: Tensor) -> Tensor:
    """``|x|^2``, entry by entry."""
    return x.real.square() + x.imag.square() if x.is_complex() else x.square()


def _numpy_product(
    operator: SymmetricOperator, x: NDArray[Any], doubled: SymmetricOperator | None = None
) -> NDArray[Any]:
    """``A x`` in the common dtype of both; ``doubled`` is the operator in float64 where it is at hand."""
    own = np.dtype(str(operator.dtype).removeprefix("torch."))
    wanted = np.result_type(x.dtype, own)
    if wanted not in (np.float32, np.float64, np.complex64, np.complex128):
        raise TypeError(f"an operator of dtype {own} multiplies real and complex numbers, got an array of {x.dtype}")
    if wanted in (np.float64, np.complex128) and own == np.float32:
        operator = doubled or operator.to(torch.float64)
    with torch.no_grad():
        # A copy: torch takes neither negative strides nor read-only memory.
        return (operator @ torch.from_numpy(np.array(x, dtype=wanted)).to(operator.device)).cpu().numpy()

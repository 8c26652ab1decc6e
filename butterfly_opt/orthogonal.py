"""Learnable orthogonal maps: a wide butterfly as a differentiable function of free parameters.

The matrix of every group is ``exp(S)``, S skew-symmetric with the ``size (size - 1) / 2`` parameters of the group above
its diagonal. With ``block = lead = 2`` a group has one parameter, the angle of M. Mathieu and Y. LeCun, arXiv:1404.7195
(2014); with other full plans the map is the butterfly factor of BOFT (W. Liu et al., arXiv:2311.06243). Plain torch
operations: derivatives of any order, ``torch.func`` and ``torch.compile`` work.
"""

import torch
from torch import Tensor, nn

from butterfly_opt.plan import Plan, make_plan
from butterfly_opt.rotation import Rotation


def num_skew(n: int, *, block: int = 64, lead: int = 16) -> int:
    """Number of parameters of a rotation of n coordinates.

    Raises:
        ValueError: see ``make_plan``.
    """
    return _num_skew(make_plan(n, block, lead))


def num_angles(plan: Plan) -> int:
    """Free angles of a rotation: those among the leading outputs of a group are its parent's too, and count once."""
    shared = 0 if plan.is_full else plan.lead * (plan.lead - 1) // 2
    groups = sum(run.groups for stage in plan.stages[:-1] for run in stage.runs)
    return _num_skew(plan) - shared * groups


def butterfly_rotation(
    x: Tensor, skew: Tensor, *, block: int = 64, lead: int = 16, dim: int = -1, transpose: bool = False
) -> Tensor:
    """``Q x`` (``Q^T x`` with ``transpose``) along one axis, differentiable in ``x`` and ``skew``.

    Args:
        x: real tensor whose axis ``dim`` has length n.
        skew: ``(num_skew(n, block=block, lead=lead),)``: stage by stage and group by group the entries above the
            diagonal of S, row by row. Zeros are the identity.
        block: coordinates of a group, see ``butterfly_opt.plan``.
        lead: outputs of a group that go on; ``block`` for the full plan.
        dim: the rotated axis.
        transpose: apply the inverse.

    Returns:
        A tensor of the shape of ``x`` in the promoted dtype of ``x`` and ``skew``, at least float32.

    Raises:
        TypeError: if ``x`` or ``skew`` is not real floating point.
        ValueError: if the shapes do not belong together, or a number of the plan is out of range.

    Cost: a matrix exponential of every group, then as ``Rotation.to_rotated``.

    Example:
        >>> skew = torch.nn.Parameter(torch.zeros(num_skew(100)))
        >>> y = butterfly_rotation(x, skew)
    """
    for name, tensor in (("x", x), ("skew", skew)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be real floating point, got {tensor.dtype}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim = {dim} is out of range for x of shape {tuple(x.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, skew.dtype), torch.float32)
    plan = make_plan(x.shape[dim], block, lead)
    columns = x.to(dtype).movedim(dim, 0)
    rotation = Rotation(plan, group_matrices(plan, skew.to(dtype)))
    flat = columns.reshape(1, plan.n, columns.shape[1:].numel())
    turned = rotation.to_rotated(flat) if transpose else rotation.from_rotated(flat)
    return turned.reshape(columns.shape).movedim(0, dim)


def group_matrices(plan: Plan, skew: Tensor) -> Tensor:
    """``exp(S)`` of every group, ``(1, plan.numel)``, as ``Rotation`` takes them.

    Raises:
        ValueError: if ``skew`` is not of the shape that the plan needs.
    """
    if skew.shape != (_num_skew(plan),):
        raise ValueError(
            f"skew must have shape ({_num_skew(plan)},) for n = {plan.n}, block = {plan.block}, lead = {plan.lead}, "
            f"got {tuple(skew.shape)}"
        )
    # A full plan of n = 1 has no stage, and nothing else to concatenate.
    parts, start = [skew.new_zeros(0)], 0
    for run in (run for stage in plan.stages for run in stage.runs):
        number = run.size * (run.size - 1) // 2
        own = skew[start : start + run.groups * number].view(run.groups, number)
        start += run.groups * number
        if run.size == 2:
            # Exact and cheap: [[cos, -sin], [sin, cos]].
            c, s = own.cos(), own.sin()
            parts.append(torch.cat((c, -s, s, c), dim=1).flatten())
            continue
        rows, columns = torch.triu_indices(run.size, run.size, 1, device=skew.device)
        at = (rows * run.size + columns).expand(run.groups, -1)
        upper = skew.new_zeros(run.groups, run.size * run.size).scatter(1, at, own).view(-1, run.size, run.size)
        # Minus: of two coordinates this is the rotation by the angle above.
        parts.append(torch.linalg.matrix_exp(upper.mT - upper).flatten())
    return torch.cat(parts)[None]


class ButterflyOrthogonal(nn.Module):
    """Multiplies by a learnable orthogonal ``Q``, in the sense of BOFT; the identity at the start.

    As a layer it rotates the last axis of its input. As a parametrization (``torch.nn.utils.parametrize``) of a weight
    ``(out, in)`` with ``dim=0`` it is orthogonal fine-tuning: ``W = Q W_0``, W_0 the weight that was there. Angles
    between the neurons, and all singular values, stay.

    Args:
        n: length of the rotated axis.
        block: coordinates of a group; see ``butterfly_opt.plan``.
        lead: outputs of a group that go on; ``block`` for the full plan.
        dim: the rotated axis.
        dtype: of the parameters; torch's default if None.
        device: of the parameters.

    Raises:
        ValueError: see ``make_plan``.

    Example:
        >>> weight = linear.weight.requires_grad_(False)
        >>> rotation = ButterflyOrthogonal(len(weight), block=32, lead=8, dim=0)
        >>> parametrize.register_parametrization(linear, "weight", rotation)
    """

    def __init__(
        self,
        n: int,
        *,
        block: int = 64,
        lead: int = 16,
        dim: int = -1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.n, self.block, self.lead, self.dim = n, block, lead, dim
        self.skew = nn.Parameter(torch.zeros(num_skew(n, block=block, lead=lead), dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``Q x`` along ``dim``, see ``butterfly_rotation``."""
        if x.shape[self.dim] != self.n:
            raise ValueError(f"axis {self.dim} must have length n = {self.n}, got shape {tuple(x.shape)}")
        return butterfly_rotation(x, self.skew, block=self.block, lead=self.lead, dim=self.dim)

    def extra_repr(self) -> str:
        """The plan."""
        return f"{self.n}, block={self.block}, lead={self.lead}, dim={self.dim}"


def _num_skew(plan: Plan) -> int:
    return sum(run.groups * (run.size * (run.size - 1) // 2) for stage in plan.stages for run in stage.runs)

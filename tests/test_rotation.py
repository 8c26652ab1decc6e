"""butterfly_opt.plan and butterfly_opt.rotation: one suite that every plan passes. Oracle: dense float64 algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from butterfly_opt import rotation as rotation_module
from butterfly_opt.plan import Plan, make_plan, share_bounds
from butterfly_opt.rotation import Rotation, orthogonalize

PLANS = [(64, 16), (64, 32), (8, 2), (7, 3), (4, 1), (2, 2), (3, 3), (8, 8)]
LENGTHS = [1, 2, 3, 5, 31, 64, 65, 96, 100, 127]
LONG = [784, 1000, 4097, 50257]
# Relative error of a norm: a product of matrices adds about one rounding a stage, of which there are up to 7 here.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}

every_plan = pytest.mark.parametrize(("block", "lead"), PLANS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_rotation(n: int, block: int, lead: int, *, count: int = 1, seed: int = 0, **options) -> Rotation:
    rotation = Rotation.identity(n, block=block, lead=lead, count=count, **{"dtype": torch.float64, **options})
    for view in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
        view.copy_(orthogonalize(normal(*view.shape, seed=seed)))
    return rotation


def explicit(plan: Plan, matrices: Tensor) -> Tensor:
    """``Q`` of one rotation as the product of whole n x n factors, group by group."""
    q = torch.eye(plan.n, dtype=torch.float64)
    for stage, runs in zip(plan.stages, plan.views(matrices[0].double()), strict=True):
        factor = torch.eye(plan.n, dtype=torch.float64)
        index = list(range(plan.n)) if stage.index is None else stage.index.tolist()
        for groups in runs:
            for group in groups:
                own, index = torch.tensor(index[: len(group)]), index[len(group) :]
                factor[own[:, None], own] = group
        q = q @ factor
    return q


def off_diagonal(rotation: Rotation, matrix: Tensor) -> float:
    q = rotation.dense()[0]
    turned = q.T @ matrix @ q
    return ((turned - torch.diag(turned.diagonal())).norm() / matrix.norm()).item()


def spiked(n: int, *, seed: int = 0) -> Tensor:
    """Columns with a second moment of a few large eigenvalues over a flat tail."""
    basis = orthogonalize(normal(n, n, seed=seed))
    return basis * torch.cat((torch.linspace(10, 3, 4), torch.ones(n))).double()[:n]


@every_plan
@pytest.mark.parametrize("n", [*LENGTHS, 784, 1000])
def test_groups_cover_every_coordinate_once(n: int, block: int, lead: int) -> None:
    plan = make_plan(n, block, lead)
    assert plan is make_plan(n, block, lead)
    assert plan.numel == sum(run.numel for stage in plan.stages for run in stage.runs)
    for stage in plan.stages:
        index = torch.arange(n) if stage.index is None else stage.index
        assert len(index.unique()) == len(index) == sum(run.span for run in stage.runs)
        assert all(1 <= run.size <= block for run in stage.runs)
        assert len(stage.runs) <= 3
    reached = explicit(plan, random_rotation(n, block, lead).matrices) if n < 200 else torch.eye(n)
    if block > 2 and not plan.is_full:
        assert len(plan.stages[-1].runs) == plan.stages[-1].runs[0].groups == 1, "one root"
    if plan.is_full and n in (block, block**2, block**3, block**6):
        assert (reached != 0).all(), "every output depends on every coordinate"


@every_plan
@every_dtype
@pytest.mark.parametrize("n", LENGTHS)
def test_both_ways_equal_the_product_of_explicit_matrices(
    n: int, block: int, lead: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotation = random_rotation(n, block, lead, dtype=dtype)
    q = explicit(rotation.plan, rotation.matrices)
    x = normal(1, n, 3, dtype=dtype)
    tolerance = TOLERANCE[dtype]
    for limit in (128, 0):  # by one dense product, and by stages
        monkeypatch.setattr("butterfly_opt.rotation.MAX_DENSE_LENGTH", limit)
        for ours, expected in (
            (rotation.dense()[0], q),
            (rotation.to_rotated(x)[0], q.T @ x[0].double()),
            (rotation.from_rotated(x)[0], q @ x[0].double()),
            (rotation.to_rotated(x.mT, dim=-1)[0], x[0].T.double() @ q),
            (rotation.from_rotated(x.mT, dim=-1)[0], x[0].T.double() @ q.T),
        ):
            assert ours.dtype == dtype
            assert (ours - expected).norm() <= tolerance * expected.norm()
    assert (q.T @ q - torch.eye(n)).norm() <= tolerance * n**0.5
    squared = rotation.squared(x.square())
    assert (squared[0] - rotation.dense()[0].square() @ x[0].square()).norm() <= 10 * tolerance * squared.norm()


@pytest.mark.parametrize(("block", "lead"), [(64, 16), (2, 2)])
@pytest.mark.parametrize("n", LONG)
def test_long_axes(n: int, block: int, lead: int) -> None:
    rotation = random_rotation(n, block, lead, dtype=torch.float32)
    x, z = normal(1, n, 1, dtype=torch.float32), normal(1, n, 1, seed=1, dtype=torch.float32)
    u = rotation.to_rotated(x)
    assert (rotation.from_rotated(u) - x).norm() <= 2e-6 * x.norm()
    assert u.norm().item() == pytest.approx(x.norm().item(), rel=2e-6)
    assert (u * z).sum().item() == pytest.approx((x * rotation.from_rotated(z)).sum().item(), abs=2e-5 * n**0.5)
    if not rotation.plan.is_full:
        assert rotation.plan.numel < 1.5 * n * block


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 70), plan=st.sampled_from(PLANS), count=st.integers(1, 3), seed=st.integers(0, 2**31 - 1))
def test_properties(n: int, plan: tuple[int, int], count: int, seed: int) -> None:
    """The inverse, the norm, the adjoint; a stack of rotations is each by itself."""
    rotation = random_rotation(n, *plan, count=count, seed=seed)
    x, z = normal(count, n, 2, seed=seed), normal(count, n, 2, seed=seed + 1)
    u = rotation.to_rotated(x)
    torch.testing.assert_close(rotation.from_rotated(u), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u.norm(), x.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close((u * z).sum(), (x * rotation.from_rotated(z)).sum(), rtol=1e-11, atol=1e-11)
    for i in range(count):
        one = Rotation(rotation.plan, rotation.matrices[i : i + 1])
        torch.testing.assert_close(one.to_rotated(x[i : i + 1])[0], u[i], rtol=1e-12, atol=1e-12)


@every_plan
def test_a_stack_is_fitted_as_each_by_itself(block: int, lead: int) -> None:
    n, values = 100, normal(2, 100, 150)
    stack = Rotation.identity(n, block=block, lead=lead, count=2, dtype=torch.float64)
    ones = [Rotation.identity(n, block=block, lead=lead, dtype=torch.float64) for _ in range(2)]
    for seed, method in enumerate(("start_", "observe_", "refit_", "observe_", "refit_")):
        parts = () if method == "refit_" else (values + seed * normal(2, n, 150, seed=seed),)
        weight = (0.3,) if method == "observe_" else ()
        getattr(stack, method)(*parts, *weight)
        for i, one in enumerate(ones):
            getattr(one, method)(*(part[i : i + 1] for part in parts), *weight)
    for i, one in enumerate(ones):
        # Up to the signs of eigenvectors, which a decomposition of several matrices may choose otherwise.
        torch.testing.assert_close(stack.dense()[i].abs(), one.dense()[0].abs(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(stack.moments[i].abs(), one.moments[0].abs(), rtol=1e-9, atol=1e-9)


def test_weights_and_refits_of_one_of_a_stack() -> None:
    stack = random_rotation(20, 8, 2, count=2)
    stack.observe_(normal(2, 20, 30), torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert not stack.moments[0].any()
    before = stack.matrices.clone()
    stack.refit_(torch.tensor([False, True]))
    assert torch.equal(stack.matrices[0], before[0])
    assert not torch.equal(stack.matrices[1], before[1])


@every_plan
def test_leaves_may_see_other_columns_than_later_stages(block: int, lead: int) -> None:
    values, leaves = normal(2, 100, 30), normal(2, 100, 5, seed=1)
    found, of_values, of_leaves = (random_rotation(100, block, lead, count=2) for _ in range(3))
    found.observe_(values, 1.0, leaves=leaves)
    of_values.observe_(values, 1.0)
    of_leaves.observe_(leaves, 1.0)
    first = sum(run.numel for run in found.plan.stages[0].runs)
    torch.testing.assert_close(found.moments[:, :first], of_leaves.moments[:, :first])
    torch.testing.assert_close(found.moments[:, first:], of_values.moments[:, first:])
    torch.testing.assert_close(found.second_moments(values, leaves=leaves), found.moments)


@pytest.mark.parametrize("n", [1, 63, 96, 128, 200, 784, 1000, 4097])
@pytest.mark.parametrize("plan", [None, (64, 16), (8, 2), (2, 2), (100, 25)])
def test_shares_are_all_of_an_axis_in_whole_groups(n: int, plan: tuple[int, int] | None) -> None:
    made = None if plan is None else make_plan(n, *plan)
    bounds = share_bounds(n, made)
    assert (bounds[0], bounds[-1]) == (0, n)
    assert bounds == sorted(set(bounds))
    assert len(bounds) - 1 <= max(1, min(4, n // 64))
    if plan == (64, 16):
        assert len(bounds) - 1 == max(1, min(4, n // 64))
        sizes = [run.size for run in made.stages[0].runs for _ in range(run.groups)]
        assert set(bounds) <= {sum(sizes[:i]) for i in range(len(sizes) + 1)}


@every_plan
@every_dtype
def test_the_two_tensors_are_the_whole_state(block: int, lead: int, dtype: torch.dtype) -> None:
    n, values = 65, normal(1, 65, 20, dtype=dtype)
    first = Rotation.identity(n, block=block, lead=lead, dtype=dtype)
    assert torch.equal(first.dense()[0], torch.eye(n, dtype=dtype))
    first.start_(values)
    again = Rotation(make_plan(n, block, lead), first.matrices.clone(), first.moments.clone())
    for rotation in (first, again):
        rotation.observe_(values.flip(-1).cumsum(-1), 0.1)
        rotation.refit_()
    assert torch.equal(first.to_rotated(values), again.to_rotated(values))
    assert torch.equal(first.dense()[0] @ values[0], again.dense()[0] @ values[0])
    q = first.dense()[0].double()
    assert (q.T @ q - torch.eye(n)).norm() < TOLERANCE[dtype] * n**0.5


@pytest.mark.parametrize(("block", "lead"), [plan for plan in PLANS if plan[0] > 4])
@pytest.mark.parametrize("n", [2, 31, 64, 100])
def test_refits_find_back_from_a_perturbed_basis(n: int, block: int, lead: int) -> None:
    values = spiked(n)
    matrix = values @ values.T
    rotation = Rotation.identity(n, block=block, lead=lead, dtype=torch.float64)
    rotation.start_(values[None])
    fitted = off_diagonal(rotation, matrix)
    assert fitted < off_diagonal(Rotation.identity(n, block=block, lead=lead, dtype=torch.float64), matrix)
    for view in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
        view.copy_(orthogonalize(view + 0.2 * normal(*view.shape, seed=3) / view.shape[-1] ** 0.5))
    perturbed = off_diagonal(rotation, matrix)
    for _ in range(20):
        rotation.observe_(values[None], 0.5)
        rotation.refit_()
    assert off_diagonal(rotation, matrix) < 0.1 * fitted + 0.9 * perturbed


@pytest.mark.parametrize(("n", "block", "lead"), [(5, 64, 16), (64, 64, 16), (32, 32, 32), (31, 64, 32), (2, 2, 2)])
def test_up_to_one_block_it_is_the_dense_eigenbasis(n: int, block: int, lead: int) -> None:
    values = normal(1, n, 3 * n) * torch.linspace(3, 1, n)[:, None]
    moment = (values @ values.mT)[0]
    rotation = Rotation.identity(n, block=block, lead=lead, dtype=torch.float64)
    rotation.start_(values)
    q = rotation.dense()[0]
    energies = torch.linalg.eigvalsh(moment).flip(0)
    torch.testing.assert_close(q.T @ moment @ q, torch.diag(energies), rtol=1e-10, atol=1e-9 * energies[0].item())


@pytest.mark.parametrize(("n", "block", "lead"), [(24, 8, 2), (96, 64, 16), (100, 12, 3), (23, 4, 2)])
def test_transport_of_a_change_within_the_leading_outputs_is_exact(n: int, block: int, lead: int) -> None:
    """Leaves whose leading outputs are turned among themselves leave the parents' directions as they were."""
    turned, still = (random_rotation(n, block, lead) for _ in range(2))
    for rotation in (turned, still):
        moments = rotation.plan.views(rotation.moments)
        for stage, (runs, matrices) in enumerate(zip(moments, rotation.plan.views(rotation.matrices), strict=True)):
            for moment, matrix in zip(runs, matrices, strict=True):
                part = normal(*moment.shape, seed=5)
                if stage == 0:
                    part[..., :lead, lead:] = part[..., lead:, :lead] = 0
                    inner = part @ part.mT + torch.eye(moment.shape[-1])
                    if rotation is still:
                        inner = torch.eye(moment.shape[-1], dtype=torch.float64)
                    moment.copy_(matrix @ inner @ matrix.mT)
                else:
                    moment.copy_(part @ part.mT)
        rotation.refit_()
    root = still.plan.stages[1].index
    assert not torch.allclose(turned.plan.views(turned.matrices)[0][0], still.plan.views(still.matrices)[0][0])
    torch.testing.assert_close(turned.dense()[0][:, root], still.dense()[0][:, root], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("condition", [1.0, 1e6, 1e30])
def test_orthogonal_factors_are_accurate_at_any_condition(condition: float) -> None:
    matrix = normal(3, 64, 64) @ torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), 64).double())
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
        q = orthogonalize(matrix.to(dtype))
        assert (q.mT @ q - torch.eye(64, dtype=dtype)).norm() < tolerance
    r = q.mT @ matrix
    assert (r.diagonal(dim1=-2, dim2=-1) >= 0).all()
    assert r.tril(-1).norm() < 1e-12 * matrix.norm()
    zero = orthogonalize(torch.zeros(4, 4))
    assert torch.equal(zero.abs(), torch.eye(4))


def test_squares_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, d = random_rotation(100, 8, 2), normal(1, 100, 7)
    whole = rotation.squared(d)
    monkeypatch.setattr("butterfly_opt.rotation.MAX_SQUARE_NUMBERS", 1)
    torch.testing.assert_close(rotation.squared(d), whole, rtol=1e-12, atol=1e-12)


@every_plan
@pytest.mark.parametrize("dense", [0, 128], ids=["stages", "dense"])
def test_derivatives_reach_the_matrices(block: int, lead: int, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation_module, "MAX_DENSE_LENGTH", dense)
    rotation, x = random_rotation(9, block, lead), normal(1, 9, 2)
    x.requires_grad_()

    def values(matrices: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        turned = Rotation(rotation.plan, matrices)
        rows, columns = turned.to_rotated(x), turned.to_rotated(x.mT, dim=-1)
        return rows, columns, turned.from_rotated(rows), turned.from_rotated(x.mT, dim=-1), turned.squared(x)

    inputs = rotation.matrices.clone().requires_grad_(), x
    assert torch.autograd.gradcheck(values, inputs)
    assert torch.autograd.gradgradcheck(values, inputs)


@pytest.mark.parametrize(
    ("n", "block", "lead", "message"),
    [
        (0, 64, 16, "needs n >= 1 coordinates, got n = 0"),
        (4, 1, 1, "Invalid block value: 1, expected an integer >= 2"),
        (4, True, 1, "Invalid block value: True"),
        (4, 8.5, 2, "Invalid block value: 8.5"),
        (4, 8, 0, "Invalid lead value: 0, expected an integer >= 1"),
        (4, 8, 5, r"Invalid lead value: 5, expected at most block // 2 = 4, or block = 8"),
        (4, 8, 9, "Invalid lead value: 9"),
    ],
)
def test_plans_that_are_refused(n: int, block: int, lead: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(n, block, lead)


def test_a_rotation_without_statistics_is_not_fitted() -> None:
    rotation = Rotation(make_plan(4, 8, 2), torch.eye(4).view(1, 16))
    for call in (lambda: rotation.observe_(torch.ones(1, 4, 1), 0.1), lambda: rotation.start_(torch.ones(1, 4, 1))):
        with pytest.raises(ValueError, match="keeps no second moments"):
            call()
    with pytest.raises(ValueError, match="keeps no second moments"):
        rotation.refit_()


@pytest.mark.parametrize(("dtype", "noise", "bound"), [(torch.float64, 1e-15, 1e-10), (torch.float32, 1e-7, 1e-3)])
@pytest.mark.parametrize("n", [40, 100])
def test_directions_without_energy_do_not_follow_rounding(
    n: int, dtype: torch.dtype, noise: float, bound: float
) -> None:
    """One vector has energy in one direction: the others are the same after a change of the size of rounding."""
    values = normal(1, n, 1).to(dtype)
    found = []
    for change in (0.0, noise):
        rotation = Rotation.identity(n, block=64, lead=16, dtype=dtype)
        rotation.start_(values * (1 + change * normal(1, n, 1, seed=1).to(dtype)))
        found.append(rotation.dense()[0])
    assert (found[0].abs() - found[1].abs()).abs().max() <= bound

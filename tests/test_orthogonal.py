"""butterfly_opt.orthogonal. Oracles: explicit Givens factors (``reference``), the dense product of groups, autograd."""

import copy

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.utils import parametrize

from butterfly_opt.orthogonal import ButterflyOrthogonal, butterfly_rotation, group_matrices, num_skew
from butterfly_opt.plan import make_plan

PLANS = [(64, 16), (4, 2), (4, 1), (2, 2), (3, 3), (8, 8)]
every_plan = pytest.mark.parametrize(("block", "lead"), PLANS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13, 64, 100])
def test_radix_2_is_the_butterfly_of_the_paper(n: int) -> None:
    plan = make_plan(n, 2, 2)
    skew = normal(num_skew(n, block=2, lead=2))
    angles, rest = torch.zeros(1, reference.stage_count(n), max(1, n // 2), dtype=torch.float64), skew
    for stage in range(len(plan.stages)):
        count = len(reference.stage_pairs(n, stage))
        angles[0, stage, :count], rest = rest[:count], rest[count:]
    assert not rest.numel()
    q = torch.from_numpy(reference.dense_rotation(angles, n))
    x = normal(3, n, seed=1)
    for transpose, expected in ((False, x @ q.T), (True, x @ q)):
        ours = butterfly_rotation(x, skew, block=2, lead=2, transpose=transpose)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@every_plan
@pytest.mark.parametrize("n", [1, 2, 5, 16, 100])
def test_it_is_orthogonal_and_zero_is_the_identity(n: int, block: int, lead: int) -> None:
    skew = normal(num_skew(n, block=block, lead=lead))
    options = {"block": block, "lead": lead}
    eye = torch.eye(n, dtype=torch.float64)
    q = butterfly_rotation(eye, skew, dim=0, **options)
    torch.testing.assert_close(q.T @ q, eye, rtol=1e-12, atol=1e-12)
    assert torch.linalg.det(q).item() == pytest.approx(1.0)
    x = normal(2, n, 3, seed=1)
    turned = butterfly_rotation(x, skew, dim=1, **options)
    torch.testing.assert_close(turned, q @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(butterfly_rotation(turned, skew, dim=-2, transpose=True, **options), x)
    torch.testing.assert_close(butterfly_rotation(x, torch.zeros_like(skew), dim=1, **options), x)
    plan = make_plan(n, block, lead)
    assert group_matrices(plan, skew).shape == (1, plan.numel)
    assert butterfly_rotation(x.bfloat16(), skew.bfloat16(), dim=1, **options).dtype == torch.float32


@every_plan
@pytest.mark.parametrize("transpose", [False, True])
def test_derivatives_of_first_and_second_order(block: int, lead: int, transpose: bool) -> None:
    skew, x = normal(num_skew(7, block=block, lead=lead)), normal(2, 7, seed=1)

    def turn(x: Tensor, skew: Tensor) -> Tensor:
        return butterfly_rotation(x, skew, block=block, lead=lead, transpose=transpose)

    inputs = x.requires_grad_(), skew.requires_grad_()
    assert torch.autograd.gradcheck(turn, inputs)
    assert torch.autograd.gradgradcheck(turn, inputs)


@every_plan
@pytest.mark.parametrize("n", [7, 150])
def test_function_transforms(n: int, block: int, lead: int) -> None:
    skew, x = 0.1 * normal(num_skew(n, block=block, lead=lead)), normal(3, n, seed=1)

    def turn(skew: Tensor, x: Tensor = x) -> Tensor:
        return butterfly_rotation(x, skew, block=block, lead=lead)

    def loss(skew: Tensor, x: Tensor = x) -> Tensor:
        return turn(skew, x).pow(3).sum()

    (expected,) = torch.autograd.grad(loss(skew.requires_grad_()), skew)
    torch.testing.assert_close(grad(loss)(skew), expected)
    each = vmap(grad(loss), (None, 0))(skew, x)
    torch.testing.assert_close(each.sum(0), expected)
    several = torch.stack((skew.detach(), -skew.detach()))
    torch.testing.assert_close(vmap(turn)(several)[1], turn(several[1]))
    if n < 10:
        assert jacrev(turn)(skew).shape == (3, n, skew.numel())
        torch.testing.assert_close(hessian(loss)(skew), torch.autograd.functional.hessian(loss, skew))


def test_a_layer_learns_a_rotation_it_can_represent() -> None:
    target = ButterflyOrthogonal(20, block=8, lead=2, dtype=torch.float64)
    target.skew.data = 0.3 * normal(*target.skew.shape)
    layer, x = copy.deepcopy(target), normal(64, 20, seed=1)
    layer.skew.data.zero_()
    assert torch.equal(layer(x), x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6
    assert repr(layer) == "ButterflyOrthogonal(20, block=8, lead=2, dim=-1)"
    again = ButterflyOrthogonal(20, block=8, lead=2, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_as_a_parametrization_it_keeps_the_singular_values() -> None:
    """Orthogonal fine-tuning: only ``skew`` learns."""
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 10), torch.randn(4, 6)
    before, values = linear(x), torch.linalg.svdvals(linear.weight)
    linear.weight.requires_grad_(False)
    parametrize.register_parametrization(linear, "weight", ButterflyOrthogonal(10, block=4, lead=2, dim=0))
    torch.testing.assert_close(linear(x), before)
    linear.parametrizations.weight[0].skew.data.normal_()
    linear(x).sum().backward()
    assert linear.parametrizations.weight[0].skew.grad.abs().sum() > 0
    assert linear.parametrizations.weight.original.grad is None
    assert not torch.allclose(linear(x), before)
    torch.testing.assert_close(torch.linalg.svdvals(linear.weight), values)
    params = dict(linear.named_parameters())
    torch.testing.assert_close(functional_call(linear, params, (x,)), linear(x))


@pytest.mark.parametrize(
    ("x", "skew", "options", "error", "message"),
    [
        (torch.ones(4, dtype=torch.int64), torch.zeros(6), {}, TypeError, "x must be real floating point"),
        (torch.ones(4), torch.zeros(6, dtype=torch.complex64), {}, TypeError, "skew must be real floating point"),
        (torch.ones(4), torch.zeros(6), {"dim": 1}, ValueError, "dim = 1 is out of range for x of shape"),
        (
            torch.ones(4),
            torch.zeros(5),
            {},
            ValueError,
            r"skew must have shape \(6,\) for n = 4, block = 64, lead = 16",
        ),
        (torch.ones(4), torch.zeros(2, 3), {}, ValueError, r"got \(2, 3\)"),
        (torch.ones(4), torch.zeros(6), {"block": 1}, ValueError, "Invalid block value: 1"),
    ],
)
def test_what_is_refused(x: Tensor, skew: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        butterfly_rotation(x, skew, **options)


def test_a_layer_names_a_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"axis -1 must have length n = 4, got shape \(2, 3\)"):
        ButterflyOrthogonal(4)(torch.ones(2, 3))

"""Tests of triton_kernels/step.py: innovations, the write and its rounding, sums, and what is refused.

Oracles: the formulas in float64, torch's own rounding, and ``butterfly_opt.rounding``. Whole steps are compared in
test_backends.py. Without a GPU the kernels run in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_opt import fused, rounding, step
from butterfly_opt.collectives import run
from butterfly_opt.layout import axes_layout, flat_layout
from butterfly_opt.stack import Cohort, Gate, Stack, new_state
from butterfly_opt.triton_kernels import step as kernels
from butterfly_opt.triton_kernels import tables
from experiments.bench_kernels import step_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Half a unit in the last place and some, relative."""
OPTIONS: dict[str, Any] = {
    "lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False,
    "maximize": False, "capturable": False, "stochastic_rounding": False, "diagonal": "innovation", "block": 8,
    "lead": 2, "refit_every": 5, "structure": "axes", "batch_dims": 0, "cross_shard": True,
}  # fmt: skip


def make_stack(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, **own: Any) -> tuple[Stack, Tensor]:
    """Tensors in their third step, with gradients, averages, bases and a usable flag of each."""
    options = {**OPTIONS, **own}
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    params = [random(shape).to(dtype) for shape in shapes]
    for param in params:
        param.grad = random(param.shape).to(dtype)
    layouts = [axes_layout(param, options["batch_dims"]) for param in params]
    stack = Stack(layouts, [new_state(layout, options) for layout in layouts], options, 0)
    for state in stack.states:
        state["calls"] = 3
    for name, average in stack.averages.items():
        average.copy_(random(average.shape).abs() if name.endswith("sq") else random(average.shape))
    for _, rotation in stack.rotations:
        for matrices in (view for runs in rotation.plan.views(rotation.matrices) for view in runs):
            matrices.copy_(torch.linalg.qr(random(matrices.shape)).Q)
    usable = torch.ones(len(shapes), dtype=torch.bool, device=DEVICE)
    return stack, usable


def operands_of(stack: Stack, usable: Tensor) -> tables.Operands:
    step.count_steps_(Cohort([stack]), Gate(usable, usable, usable.float()))
    members = [fused._member(stack, usable)]
    return fused._operands(members, fused._numbers(members))


async def take_fused_step_(stack: Stack, usable: Tensor) -> None:
    await fused.take_steps_([(stack, usable)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximize, decay", [(False, 0.0), (True, 0.25)])
def test_gradients_are_averaged(dtype, maximize, decay):
    stack, usable = make_stack([(5, 3), (5, 3)], dtype, maximize=maximize, weight_decay=decay)
    usable[1] = False
    operands, before = operands_of(stack, usable), stack.averages["exp_avg"].clone()
    kernels.forth_(operands, gate=tables.USABLE, step=True, observe=False)
    param, after = stack.layouts[0].owner, stack.averages["exp_avg"]
    gradient = (-1.0 if maximize else 1.0) * param.grad.double() + decay * param.double()
    expected = before[0].double().lerp(gradient, stack.numbers.mean[0].double())
    torch.testing.assert_close(after[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (31,), (1025,), (3, 5), (65, 2)], ids=str)
def test_write_rounds_once_and_decays(shape, dtype):
    """A direction of known values, without rotation."""
    stack, usable = make_stack([shape], dtype, weight_decay=0.5, decoupled_weight_decay=True)
    for _, rotation in stack.rotations:
        rotation.matrices.copy_(rotation.identity(rotation.plan.n, block=8, lead=2).matrices)
    operands = operands_of(stack, usable)
    before = stack.layouts[0].owner.clone()
    change = torch.randn(before.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    operands.values[1].copy_((change / -0.5).view(-1))
    operands.flags.zero_()
    kernels.back_(operands, stochastic=False, write=True)
    after = stack.layouts[0].owner
    # A fused multiply-add rounds once where two operations round twice.
    torch.testing.assert_close(
        after, (before.float() * 0.75 + change).to(dtype), rtol=0, atol=3e-7 if dtype == torch.float32 else 0
    )
    exact = before.double() * 0.75 + change.double()
    assert (after.double() - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max()


@pytest.mark.parametrize("size", [1, 100, 1030])
def test_stochastic_rounding_has_the_bits_of_torch(size):
    stack, usable = make_stack([(size,)], torch.bfloat16, stochastic_rounding=True)
    stack.streams[0] = (3 << 16) + 5
    operands = operands_of(stack, usable)
    before = stack.layouts[0].owner.clone()
    change = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    change[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])[:size]
    operands.values[1].copy_(change / -0.5)
    operands.flags.zero_()
    kernels.back_(operands, stochastic=True, write=True)
    step_of = stack.numbers.step.view(())
    expected = rounding.round_stochastically(before.float() + change, stream=stack.streams[0], step=step_of)
    assert torch.equal(stack.layouts[0].owner.nan_to_num(7.0), expected.bfloat16().nan_to_num(7.0))


def test_nearest_is_to_even_and_keeps_what_is_not_finite():
    exact = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, torch.inf, torch.nan])
    stack, usable = make_stack([(8,)], torch.bfloat16)
    stack.layouts[0].owner.zero_()
    operands = operands_of(stack, usable)
    operands.numbers[:, 4] = 1.0  # the learning rate
    operands.values[1].copy_(-exact)
    operands.flags.zero_()
    kernels.back_(operands, stochastic=False, write=True)
    assert torch.equal(stack.layouts[0].owner.nan_to_num(7.0), exact.bfloat16().to(DEVICE).nan_to_num(7.0))


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_entries_without_a_gradient_are_not_moved(diagonal):
    stack, usable = make_stack([(20, 13)], diagonal=diagonal)
    param = stack.layouts[0].owner
    for zeroed in (stack.averages["exp_avg"][0], param.grad):
        zeroed[3, 4], zeroed[7] = 0.0, 0.0
    before = param.clone()
    operands_of(stack, usable)
    run([take_fused_step_(stack, usable)])
    still = stack.averages["exp_avg"][0] == 0
    assert still.sum() == 14
    assert torch.equal(param == before, still)


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
@pytest.mark.parametrize("strides", ["plain", "transposed"])
def test_one_step_of_any_state_equals_torch(strides, diagonal):
    """Random averages, so that every coordinate of leaves and of later stages matters; skipped ones bit for bit."""
    found = []
    for take_step_ in (step.take_step_, take_fused_step_):
        stack, usable = make_stack([(20, 13)] * 2, diagonal=diagonal)
        stack.counters["step"] += 9
        usable[1] = False
        if strides == "transposed":
            for layout in stack.layouts:
                owner, grad = layout.owner, layout.owner.grad
                owner.grad = None
                owner.set_(owner.mT.contiguous().mT)
                owner.grad = grad
            assert not stack.layouts[0].owner.is_contiguous()
        stack.layouts[1].owner.grad.fill_(torch.nan)
        before = [stack.layouts[1].owner.clone(), *(average[1].clone() for average in stack.averages.values())]
        operands_of(stack, usable)
        run([take_step_(stack, usable)])
        after = [stack.layouts[1].owner, *(average[1] for average in stack.averages.values())]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        found.append([stack.layouts[0].owner, *(average[0] for average in stack.averages.values())])
    for reference, ours in zip(*found, strict=True):
        assert (ours - reference).norm() <= 2e-5 * reference.norm()


def means_of(stack: Stack) -> Tensor:
    pair = [stack.averages[name].abs().double().mean((1, 2)) for name in ("disp_sq", "cross")]
    return torch.stack(pair, dim=1).float()


def test_means_are_kept_for_the_next_step():
    """Those of a skipped tensor too; and taken anew where somebody else changed what they are of."""
    stack, usable = make_stack([(20, 13)] * 2, diagonal="secant")
    usable[1] = False
    kept = operands_of(stack, usable).means
    before = kept.clone()
    assert torch.equal(before, means_of(stack))
    run([take_fused_step_(stack, usable)])
    assert operands_of(stack, usable).means is kept
    assert torch.equal(kept, means_of(stack))
    assert torch.equal(kept[1], before[1]) and not torch.equal(kept[0], before[0])
    stack.averages["cross"].mul_(2)
    assert operands_of(stack, usable).means is kept
    assert torch.equal(kept, means_of(stack))


def test_means_follow_a_stack_from_list_to_list():
    first, usable = make_stack([(9, 5)], diagonal="secant")
    second, _ = make_stack([(5, 9)], diagonal="secant")
    for stack in (first, second):
        alone = operands_of(stack, usable).means
        run([take_fused_step_(stack, usable)])
    run([fused.take_steps_([(first, usable), (second, usable)])])
    assert operands_of(second, usable).means is alone
    assert torch.equal(alone, means_of(second))


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_several_parameters_are_one_vector(diagonal):
    """``structure="flat"``, one of them without a gradient; from any state, since vectors have a rank of one."""
    found = []
    for take_step_ in (step.take_step_, take_fused_step_):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((7, 3), (9,), (4,))]
        for param in params[:2]:
            param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
        options = {**OPTIONS, "structure": "flat", "diagonal": diagonal, "weight_decay": 0.1}
        layout = flat_layout(params)
        stack = Stack([layout], [new_state(layout, options)], options, 0)
        stack.states[0]["calls"] = 3
        stack.counters["step"] += 9
        for average in stack.averages.values():
            average.copy_(torch.rand(average.shape, generator=generator))
        usable, kept = torch.ones(1, dtype=torch.bool, device=DEVICE), params[2].clone()
        operands_of(stack, usable)
        run([take_step_(stack, usable)])
        assert torch.equal(params[2], kept)
        found.append([*params, *stack.averages.values()])
    for reference, ours in zip(*found, strict=True):
        assert (ours - reference).norm() <= 2e-5 * reference.norm()


def test_tables_are_built_again_only_when_something_changes():
    stack, usable = make_stack([(4, 3)] * 2)
    first = operands_of(stack, usable)
    again = operands_of(stack, usable)
    assert again.tables is first.tables and again.addresses is first.addresses
    stack.layouts[1].owner.grad = torch.ones(4, 3, device=DEVICE)
    moved = operands_of(stack, usable)
    grads = [layout.owner.grad.data_ptr() for layout in stack.layouts]
    assert moved.tables is first.tables and moved.addresses[:, 0].tolist() == grads
    batch, usable = make_stack([(3, 4, 5)], batch_dims=1)
    owner, operands = batch.layouts[0].owner, operands_of(batch, usable)
    places = [20 * i for i in range(3)]
    assert operands.addresses.tolist() == [[x.data_ptr() + 4 * i for x in (owner.grad, owner)] for i in places]
    assert operands.tables.matrices[:, tables.MATRIX.index("position")].tolist() == places
    members = [fused._member(own, own.active) for own in (stack, batch)]
    assert fused._operands(members, fused._numbers(members)).tables is not first.tables


@pytest.mark.parametrize("rows, columns", [(4096, 4096)])
def test_bytes_of_a_step_are_within_their_bounds(rows, columns):
    for diagonal, bound in (("innovation", 56), ("secant", 97)):
        found = step_bytes(rows, columns, diagonal=diagonal)
        assert found["moments"] <= 6
        assert found["together"] <= bound


def test_unfit_gradients_are_refused():
    operands = operands_of(*make_stack([(4, 3)]))._replace(dtypes=(torch.float64, torch.float32))
    with pytest.raises(TypeError, match=r"gradients must be one of torch.float32.*got torch.float64; use"):
        kernels.forth_(operands, gate=tables.USABLE, step=True, observe=False)

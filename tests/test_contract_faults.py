"""butterfly_opt.Butterfly: gradients that are not finite, extreme or sparse.

Oracle: the parameters and the state before the step, bit for bit.
"""

import copy
import math
from typing import Any

import pytest
import torch
from contract import (
    NAN,
    all_finite,
    assert_same,
    build,
    copies,
    every_mode,
    make_params,
    set_grads,
    snapshot,
    through_state_dict,
    train,
    values,
)
from torch import Tensor, nn

from butterfly_opt import Butterfly

pytestmark = pytest.mark.filterwarnings("ignore:.*their step was skipped")

COUNTERS = ("skipped",)
BAD_VALUES = [NAN, math.inf, -math.inf, 1e30]


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("first", [False, True])
@every_mode
def test_a_non_finite_gradient_is_skipped(options: dict[str, Any], first: bool, bad: float) -> None:
    """One bad element: no bit of the parameters and the state changes, counters apart; the rest goes on."""
    params = make_params(((6, 5), (4,)))
    opt = build(params, **options)
    if not first:
        train(opt, params, range(6))
    before, kept = values(params), snapshot(opt)

    def closure() -> Tensor:
        loss = set_grads(params, 6)
        params[0].grad[2, 3] = bad
        return loss

    opt.step(closure)
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1]) == (options.get("structure") == "flat")
    after = snapshot(opt)
    if not first:
        assert_same(after[0], kept[0], skip=COUNTERS)
    assert after[0]["skipped"] == 1
    assert after[0]["step"] == (0 if first else 6)
    train(opt, params, range(7, 10))
    assert all_finite(opt)
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize(("at", "bad"), [(0, NAN), (1, math.inf), (7, 1e30), (8, NAN)])
@every_mode
def test_the_run_goes_on_as_if_a_bad_step_had_not_been(options: dict[str, Any], at: int, bad: float) -> None:
    """Bit for bit, and after a checkpoint as well: the schedule of refits has not moved either."""
    params = make_params()
    others = copies(params)
    opt, plain = build(params, **options), build(others, **options)
    for step in range(12):
        set_grads(others, step)
        if step == at:
            set_grads(params, 99)
            for param in params:
                param.grad.view(-1)[-1] = bad
            opt.step()
            if options.get("structure") != "flat":
                resumed = build(params, **options)
                resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
                opt = resumed
        set_grads(params, step)
        opt.step()
        plain.step()
    assert_same(values(params), values(others))
    for own, other in zip(snapshot(opt), snapshot(plain), strict=True):
        assert_same(own, other, skip=COUNTERS)


@pytest.mark.parametrize("at", [0, 1, 4, 5])
@every_mode
def test_a_bad_step_of_one_tensor_among_its_like(options: dict[str, Any], at: int) -> None:
    """They share their operations: the state of the bad one keeps every bit, and a checkpoint goes on equally."""
    params = make_params(((3, 4, 2),) * 3)
    flat = options.get("structure") == "flat"
    opt = build(params, **options)
    train(opt, params, range(at))
    before, kept = values(params), snapshot(opt)
    set_grads(params, at)
    params[1].grad[0, 0, 0] = NAN
    opt.step()
    assert [torch.equal(param, old) for param, old in zip(params, before, strict=True)] == [flat, True, flat]
    if at and not flat:
        assert_same(opt.state[params[1]], kept[1], skip=COUNTERS)
    resumed, new = through_state_dict(opt, params, options)
    train(opt, params, range(at + 1, at + 9))
    train(resumed, new, range(at + 1, at + 9))
    assert_same(values(params), values(new))
    assert_same(snapshot(opt), snapshot(resumed))
    assert [int(state["step"]) for state in snapshot(opt)] == ([at + 8] if flat else [at + 9, at + 8, at + 9])


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_a_non_finite_gradient_raises_if_asked(bad: float, structure: str) -> None:
    params = make_params(((6, 5),))
    opt = Butterfly(params, on_nonfinite="raise", structure=structure)
    train(opt, params, range(3))
    before, kept = values(params), snapshot(opt)
    set_grads(params, 3)
    params[0].grad[0, 0] = bad
    with pytest.raises(FloatingPointError, match=r"non-finite gradient .* of the tensor of shape \((6, 5|30,)\)"):
        opt.step()
    assert_same(values(params), before)
    assert_same(snapshot(opt), kept, skip=COUNTERS)


@pytest.mark.parametrize("scale", [1e18, 1e-30])
@every_mode
def test_extreme_gradients_keep_everything_finite(options: dict[str, Any], scale: float) -> None:
    params = make_params()
    opt = build(params, **options)

    def closure(step: int) -> Tensor:
        loss = set_grads(params, step)
        for param in params:
            param.grad.clamp_(-1, 1).mul_(scale)
        return loss

    for step in range(8):
        opt.step(lambda step=step: closure(step))
    assert all_finite(opt)


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_sparse_gradients_are_refused(structure: str) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    opt = Butterfly(embedding.parameters(), structure=structure)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; use dense ones"):
        opt.step()
    assert torch.equal(embedding.weight, before)

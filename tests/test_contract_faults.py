"""butterfly_opt.Butterfly: gradients that are not finite, extreme or sparse.

Oracle: the parameters and the state before the step, bit for bit.
"""

import math
from typing import Any

import pytest
import torch
from contract import NAN, assert_same, every_mode, make_params, set_grads, snapshot, train, values
from torch import Tensor, nn

from butterfly_opt import Butterfly

COUNTERS = ("calls", "skipped")
BAD_VALUES = [NAN, math.inf, -math.inf, 1e30]


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("first", [False, True])
@every_mode
def test_a_non_finite_gradient_is_skipped(options: dict[str, Any], first: bool, bad: float) -> None:
    """One bad element: no bit of the parameters and the state changes, counters apart; the rest goes on."""
    params = make_params(((6, 5), (4,)))
    opt = Butterfly(params, **options)
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
    assert all(torch.isfinite(v).all() for s in snapshot(opt) for v in s.values() if isinstance(v, Tensor))
    assert not torch.equal(params[0], before[0])


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
    opt = Butterfly(params, **options)

    def closure(step: int) -> Tensor:
        loss = set_grads(params, step)
        for param in params:
            param.grad.clamp_(-1, 1).mul_(scale)
        return loss

    for step in range(8):
        opt.step(lambda step=step: closure(step))
    assert all(torch.isfinite(param).all() for param in params)
    assert all(torch.isfinite(v).all() for s in snapshot(opt) for v in s.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_sparse_gradients_are_refused(structure: str) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    opt = Butterfly(embedding.parameters(), structure=structure)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; use dense ones"):
        opt.step()
    assert torch.equal(embedding.weight, before)

"""Probes of `experiments.contract_table` on what an optimizer lives through: precision, checkpoints, compilers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.contract_probes import (
    LR,
    Maker,
    equal,
    finite,
    make_params,
    row,
    seed_everything,
    set_grads,
    state_is_float32,
    state_tensors,
    through_file,
    train,
    trained,
    values,
)


@row("bf16 parameters: float32 state while training")
def float32_state(make: Maker) -> bool:
    """And parameters that stay bf16 and finite."""
    optimizer, params = trained(make, dtype=torch.bfloat16)
    return state_is_float32(optimizer) and finite(params) and {p.dtype for p in params} == {torch.bfloat16}


@row("... after `load_state_dict`")
def float32_state_loaded(make: Maker) -> bool:
    """Into an optimizer of bf16 parameters; it trains on."""
    optimizer, params = trained(make, dtype=torch.bfloat16)
    loaded = make(params)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    as_loaded = state_is_float32(loaded)
    train(loaded, params, range(12, 15))
    return as_loaded and state_is_float32(loaded)


@row("... after the model is cast from float32 to bf16")
def float32_state_cast(make: Maker) -> bool:
    """As `model.bfloat16()` does it; it trains on."""
    optimizer, params = trained(make)
    for param in params:
        param.grad = None
        param.data = param.data.bfloat16()
    train(optimizer, params, range(12, 15))
    return state_is_float32(optimizer) and finite(params)


@row("Stochastic rounding of bf16 writes")
def stochastic_rounding(make: Maker) -> bool:
    """Steps of 2^-11 on parameters whose neighbours are 2^-7 away: the mean moves by what was asked, within 30 %."""
    params = [nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16)), nn.Parameter(torch.full((64, 64), 1.5))]
    moved = []
    for param, keywords in zip(params, ({"stochastic_rounding": True}, {}), strict=True):
        optimizer = make([param], lr=2.0**-11, **keywords)
        for step in range(20):
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            param.grad = (1 + noise).to(param.dtype)
            optimizer.step()
        moved.append((param.detach().float() - 1.5).mean().item())
    return moved[1] < 0 and abs(moved[0] / moved[1] - 1) < 0.3


@row("`GradScaler`: a skipped step leaves no trace")
def grad_scaler(make: Maker) -> bool:
    """With `unscale_` and clipping; equal to the run in which the skipped step never was."""

    def run(steps: list[int | None]) -> list[Tensor]:
        params = make_params()
        optimizer = make(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000, backoff_factor=1.0 - 1e-9)
        for step in steps:
            set_grads(params, step or 0)
            scaler.scale(torch.ones(()))  # as scaler.scale(loss).backward() prepares it
            for param in params:
                if param.grad is not None:
                    param.grad.mul_(scaler.get_scale() if step is not None else torch.inf)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
            seed_everything(step or 0)
            scaler.step(optimizer)
            scaler.update(4.0)
        return values(params) + state_tensors(optimizer)

    return equal(run([0, 1, 2, None, 3, 4]), run([0, 1, 2, 3, 4]))


def _continues(make: Maker, way: Callable[[Optimizer, list[Tensor]], tuple[Optimizer, list[Tensor]]]) -> bool:
    """Whether a copy takes the same eight steps, bit for bit, apart from the original."""
    optimizer, params = trained(make)
    copied, others = way(optimizer, params)
    if any(left is right for left, right in zip(params, others, strict=True)):
        return False
    for each, own in ((optimizer, params), (copied, others)):
        seed_everything(1)
        train(each, own, range(12, 20))
    return equal(values(params) + state_tensors(optimizer), values(others) + state_tensors(copied))


@row("State loads with `weights_only=True`")
def weights_only(make: Maker) -> bool:
    """Saved, and loaded into a new optimizer."""
    optimizer, params = trained(make)
    loaded = make(params)
    loaded.load_state_dict(through_file(optimizer.state_dict(), weights_only=True))
    return equal(state_tensors(loaded), state_tensors(optimizer))


@row("A resumed run equals the uninterrupted one bit for bit")
def resume(make: Maker) -> bool:
    """Through a file, global random state restored."""

    def way(optimizer: Optimizer, params: list[Tensor]) -> tuple[Optimizer, list[Tensor]]:
        others: list[Tensor] = [nn.Parameter(param.detach().clone()) for param in params]
        loaded = make(others)
        loaded.load_state_dict(through_file(optimizer.state_dict(), weights_only=False))
        return loaded, others

    return _continues(make, way)


@row("`copy.deepcopy`")
def deepcopy(make: Maker) -> bool:
    """The copy goes on as the original."""
    return _continues(make, lambda optimizer, params: copy.deepcopy((optimizer, params)))


@row("pickle")
def pickled(make: Maker) -> bool:
    """The copy goes on as the original."""
    return _continues(make, lambda optimizer, params: pickle.loads(pickle.dumps((optimizer, params))))


@row("State dicts without younger flags, and to and from named parameters, load")
def older_state(make: Maker) -> bool:
    """`maximize` is deleted from the groups; each is stepped afterwards."""
    optimizer, params = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group.pop("maximize", None)
    for target in (params, [(f"name{i}", param) for i, param in enumerate(params)]):
        loaded = make(target)
        loaded.load_state_dict(copy.deepcopy(saved))
        train(loaded, params, range(12, 14))
        saved = copy.deepcopy(loaded.state_dict())
    unnamed = make(params)
    unnamed.load_state_dict(saved)
    train(unnamed, params, range(14, 16))
    return finite(params)


@row("A model whose parameters come in another order loads by their names")
def reordered(make: Maker) -> bool:
    """Both sides have names; every parameter gets its own state, and trains on."""
    params = make_params()
    optimizer = make([("weight", params[0]), ("bias", params[1])])
    train(optimizer, params, range(12))
    others: list[Tensor] = [nn.Parameter(param.detach().clone()) for param in params]
    loaded = make([("bias", others[1]), ("weight", others[0])])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(params, others, strict=True):
        left, right = optimizer.state[param], loaded.state[other]
        if left.keys() != right.keys() or any(
            not torch.equal(*map(torch.as_tensor, (left[k], right[k]))) for k in left
        ):
            return False
    train(loaded, others, range(12, 20))
    return finite(others)


@row("`add_param_group` in mid-training, with options of its own")
def add_group(make: Maker) -> bool:
    """The new group trains; the old one goes on as if it were alone; parameters that repeat are refused."""
    (optimizer, params), (alone, others) = trained(make), trained(make)
    added: list[Tensor] = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]
    optimizer.add_param_group({"params": added[:1], "lr": LR / 2})
    optimizer.add_param_group({"params": added[1:], "lr": 0.0})
    for step in range(12, 18):
        set_grads(added, step)
        seed_everything(step)
        train(optimizer, params, range(step, step + 1))
        seed_everything(step)
        train(alone, others, range(step, step + 1))
    try:
        optimizer.add_param_group({"params": [params[0]]})
    except ValueError:
        still = torch.equal(added[1], torch.ones(5)) and not torch.equal(added[0], torch.ones(3, 4))
        return still and finite(added) and equal(values(params), values(others))
    return False


@row("Freezing, unfreezing and new hyper-parameters in mid-training")
def change_group(make: Maker) -> bool:
    """A frozen parameter stands still although it has momentum; lr 0 stops everything; both go on afterwards."""
    optimizer, params = trained(make)
    frozen = values(params)
    for step in range(12, 16):
        set_grads(params, step)
        params[0].grad = None
        optimizer.step()
    stands = torch.equal(params[0], frozen[0]) and not torch.equal(params[1], frozen[1])
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(params)
    train(optimizer, params, range(16, 20))
    stands &= equal(values(params), before)
    optimizer.param_groups[0]["lr"] = LR
    train(optimizer, params, range(20, 24))
    return stands and finite(params) and not any(map(torch.equal, params, before))


@row("`torch.compile` of a step with the optimizer in it: same trajectory, no recompilation after 3 steps")
def compiled_step(make: Maker) -> bool:
    """Twenty steps, traced and run by dynamo's "eager" backend."""

    def parts() -> tuple[Callable[[Tensor], None], nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = make(model.parameters())

        def step(inputs: Tensor) -> None:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), inputs[:, :3].sin()).backward()
            optimizer.step()

        return step, model

    def run(step: Callable[[Tensor], None], steps: range) -> None:
        for index in steps:
            seed_everything(index)
            step(torch.randn(16, 6))

    (step, model), (other_step, other) = parts(), parts()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(other_step, backend="eager")
        run(compiled, range(3))
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(compiled, range(3, 20))
    finally:
        torch._dynamo.reset()
    run(step, range(20))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in pairs)


@row("`capturable=True` is accepted, for CUDA graphs")
def capturable(make: Maker) -> bool:
    """The keyword only: capturing takes a GPU."""
    return bool(make(make_params(), capturable=True).param_groups[0]["capturable"])


@row("`diagnostics()`: plain numbers on each group")
def diagnostics(make: Maker) -> bool:
    """Numbers, text, lists and dictionaries, one entry a group."""
    optimizer: Any = trained(make)[0]

    def is_plain(value: Any) -> bool:
        if isinstance(value, dict | list | tuple):
            return all(map(is_plain, value.values() if isinstance(value, dict) else value))
        return value is None or type(value) in (int, float, bool, str)

    found = optimizer.diagnostics()
    return len(found) == 1 and is_plain(found)

"""Short programmatic probes of what a torch optimizer promises; the rows of `experiments.contract_table`.

A probe gets a way to build the optimizer and says yes or no; one that raises says no. The same probe, on the
same small problem, judges every optimizer. Only keywords that the optimizer declares are used: a `**kwargs`
that swallows a name does not count as a feature. Each probe runs with global random state of its own.
"""

from __future__ import annotations

import inspect
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

LR = 2.0**-7
"""Exact in float32, so that a tensor and a number are the same learning rate."""

SHAPES = ((6, 5), (4,))

PROBES: dict[str, Callable[[Maker], bool]] = {}
"""Row of the table -> probe, in the order of the table."""


class Maker:
    """Builds one kind of optimizer, with ``lr=LR`` and without weight decay unless told otherwise."""

    def __init__(self, optimizer_class: type[Optimizer]) -> None:
        self.optimizer_class: Any = optimizer_class
        self.keywords = set(inspect.signature(optimizer_class).parameters)

    def __call__(self, params: Any, **keywords: Any) -> Optimizer:
        """Raises TypeError for a keyword that is not in the signature."""
        unknown = keywords.keys() - self.keywords
        if unknown:
            raise TypeError(f"no keyword {', '.join(sorted(unknown))}")
        plain = {"lr": LR} | ({"weight_decay": 0.0} if "weight_decay" in self.keywords else {})
        optimizer: Optimizer = self.optimizer_class(params, **{**plain, **keywords})
        return optimizer


def row(name: str) -> Callable[[Callable[[Maker], bool]], Callable[[Maker], bool]]:
    """Registers a probe as a row of the table."""

    def register(probe: Callable[[Maker], bool]) -> Callable[[Maker], bool]:
        PROBES[name] = probe
        return probe

    return register


def answer(probe: Callable[[Maker], bool], make: Maker) -> tuple[bool, str]:
    """Yes or no, and for a probe that raised what it raised; global random state is put back."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed_everything(0)
            return bool(probe(make)), ""
    except Exception as error:  # whatever an optimizer raises here, it does not keep the promise
        return False, f"{type(error).__name__}: {error}".split("\n")[0]
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def make_params(*, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A matrix and a vector, always the same."""
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_grads(params: list[Tensor], step: int, *, scale: float = 1.0) -> None:
    """Gradients of a noisy quadratic, a function of parameters and step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        weights = torch.linspace(0.5, 2.0, param.numel()).view(param.shape)
        noise = torch.randn(param.shape, generator=generator)
        param.grad = (scale * (weights * param.detach().float() + noise)).to(param.dtype)


def train(optimizer: Optimizer, params: list[Tensor], steps: range) -> None:
    """Steps on the noisy quadratic."""
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def trained(
    make: Maker, steps: int = 12, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Optimizer, list[Tensor]]:
    """An optimizer after some steps, and its parameters; ``seed`` is that of the global generators."""
    seed_everything(seed)
    params = make_params(dtype=dtype)
    optimizer = make(params)
    train(optimizer, params, range(steps))
    return optimizer, params


def values(params: list[Tensor]) -> list[Tensor]:
    """Copies of the parameters."""
    return [param.detach().clone() for param in params]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Copies of the floating tensors of the state with more than one entry: counters are left out."""

    def walk(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)

    found = walk(optimizer.state_dict()["state"])
    return [tensor.detach().clone() for tensor in found if tensor.is_floating_point() and tensor.numel() > 1]


def state_is_float32(optimizer: Optimizer) -> bool:
    """Whether there is any state, and all of it is float32."""
    return {tensor.dtype for tensor in state_tensors(optimizer)} == {torch.float32}


def through_file(state_dict: dict[str, Any], *, weights_only: bool) -> dict[str, Any]:
    """Saved and loaded again."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=weights_only)
    return loaded


def _survives(make: Maker, entry: float, *, whole: bool = False) -> bool:
    """One bad gradient changes neither parameters nor state, and training goes on."""
    optimizer, params = trained(make)
    before = values(params) + state_tensors(optimizer)
    set_grads(params, 12)
    for param in params:
        if param.grad is not None:
            (param.grad if whole else param.grad.view(-1)[1:2]).fill_(entry)
    optimizer.step()
    after = values(params) + state_tensors(optimizer)
    train(optimizer, params, range(13, 16))
    return equal(before, after) and finite(params) and not equal(values(params), before[: len(params)])


@row("A NaN gradient leaves parameters and state untouched")
def nan_gradient(make: Maker) -> bool:
    """All entries are NaN."""
    return _survives(make, math.nan, whole=True)


@row("One infinite entry does so, too")
def infinite_entry(make: Maker) -> bool:
    """One entry of each gradient."""
    return _survives(make, math.inf)


@row("One entry whose square overflows (1e20) does so, too")
def overflowing_square(make: Maker) -> bool:
    """One entry of each gradient; it is finite itself."""
    return _survives(make, 1e20)


@row("Huge gradients (1e18): everything stays finite")
def huge_gradients(make: Maker) -> bool:
    """Ten steps at 1e18."""
    params = make_params()
    optimizer = make(params)
    for step in range(10):
        set_grads(params, step, scale=1e18)
        optimizer.step()
    return finite(params + state_tensors(optimizer))


@row("Tiny gradients (1e-30): finite, no motion")
def tiny_gradients(make: Maker) -> bool:
    """Ten steps at 1e-30, far below eps."""
    params = make_params()
    start, optimizer = values(params), make(params)
    for step in range(10):
        set_grads(params, step, scale=1e-30)
        optimizer.step()
    return equal(values(params), start) and finite(state_tensors(optimizer))


@row("A loss scale that jumps by 1e6: finite, no step above 10 lr an entry")
def loss_scale_jump(make: Maker) -> bool:
    """Twenty steps before the jump, ten after it."""
    optimizer, params = trained(make, 20)
    for step in range(20, 30):
        before = values(params)
        set_grads(params, step, scale=1e6)
        optimizer.step()
        moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(params, before, strict=True)])
        if not moved.norm() <= 10 * LR * moved.numel() ** 0.5:
            return False
    return finite(params + state_tensors(optimizer))


@row("A constant gradient: steps stay below 5 lr an entry")
def constant_gradient(make: Maker) -> bool:
    """300 steps on a linear loss."""
    params = make_params()
    optimizer = make(params)
    for _ in range(300):
        before = values(params)
        for param in params:
            param.grad = torch.linspace(-3.0, 2.0, param.numel()).view(param.shape)
        optimizer.step()
        moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(params, before, strict=True)])
        if not moved.norm() <= 5 * LR * moved.numel() ** 0.5:
            return False
    return finite(params)


@row("Zero gradients from the start change nothing, exactly")
def zero_gradients(make: Maker) -> bool:
    """Ten steps, then training as usual."""
    params = make_params()
    start, optimizer = values(params), make(params)
    for _ in range(10):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    unmoved = equal(values(params), start)
    train(optimizer, params, range(5))
    return unmoved and finite(params) and not equal(values(params), start)


@row("A dummy step of zeros on a new optimizer leaves no trace")
def dummy_step(make: Maker) -> bool:
    """As loaders make it, to have a state to load into: the run after it is that of a new optimizer, bit for bit."""
    runs = []
    for dummy in (False, True):
        seed_everything(0)
        params = make_params()
        optimizer = make(params)
        if dummy:
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        seed_everything(1)
        train(optimizer, params, range(8))
        runs.append(values(params))
    return equal(*runs)


@row("An entry that never had a gradient never moves, exactly")
def masked_gradient(make: Maker) -> bool:
    """Twenty steps with half of each gradient masked; the rest moves."""
    params = make_params()
    start, optimizer = values(params), make(params)
    masks = [torch.arange(param.numel()).view(param.shape) % 2 > 0 for param in params]
    for step in range(20):
        set_grads(params, step)
        for param, mask in zip(params, masks, strict=True):
            if param.grad is not None:
                param.grad *= mask
        optimizer.step()
    pairs = list(zip(params, start, masks, strict=True))
    return all(torch.equal(p[~m], old[~m]) and not bool((p[m] == old[m]).any()) for p, old, m in pairs)


@row("A gradient that appears late, or goes missing")
def late_gradient(make: Maker) -> bool:
    """The vector has a gradient in steps 5 to 9 only: it moves in these and is left alone in the others."""
    params = make_params()
    optimizer = make(params)
    moves = []
    for step in range(15):
        before = values(params)
        set_grads(params, step)
        if not 5 <= step < 10:
            params[1].grad = None
        optimizer.step()
        moves.append(not torch.equal(params[1], before[1]))
    # An optimizer may spend its first gradient on setting up.
    return not any(moves[:5] + moves[10:]) and all(moves[6:10]) and finite(params)


@row("Sparse and complex gradients: a clear error, or support")
def sparse_and_complex(make: Maker) -> bool:
    """An error has to name the kind and leave the parameters alone; support has to reduce the sum of squares."""

    def is_clear(kind: str, dtype: torch.dtype) -> bool:
        param = nn.Parameter(torch.ones(4, 3, dtype=dtype))
        start = param.detach().clone()
        try:
            optimizer = make([param])
            for _ in range(5):
                grad = param.detach().clone()
                param.grad = grad.to_sparse() if kind == "sparse" else grad
                optimizer.step()
        except Exception as error:  # any class will do, if it says what is wrong
            return kind in str(error).lower() and torch.equal(param, start)
        return finite([torch.view_as_real(param) if dtype.is_complex else param]) and bool(param.norm() < start.norm())

    return is_clear("sparse", torch.float32) and is_clear("complex", torch.complex64)


@row("Gradients are never written (`maximize`, L2 decay)")
def gradients_not_written(make: Maker) -> bool:
    """The gradient is the same tensor with the same values after every step."""
    every_keywords: list[dict[str, Any]] = [{}, {"weight_decay": 0.1}, {"maximize": True}]
    for keywords in every_keywords:
        params = make_params()
        optimizer = make(params, **keywords)
        for step in range(5):
            set_grads(params, step)
            kept = [(param.grad, param.grad.clone()) for param in params if param.grad is not None]
            optimizer.step()
            for param, (grad, value) in zip(params, kept, strict=True):
                if param.grad is not grad or not torch.equal(grad, value):
                    return False
    return True


@row("Parameters changed by hand (half of them pruned): trains on as a new optimizer does")
def changed_by_hand(make: Maker) -> bool:
    """After 30 more steps the sum of squares is at most twice that of an optimizer built after the change."""

    def prune(params: list[Tensor]) -> None:
        with torch.no_grad():
            for param in params:
                param.view(-1)[::2] = 5.0
                param.view(-1)[1::2] = 0.0

    optimizer, params = trained(make, 40)
    prune(params)
    others = make_params()
    fresh = make(others)
    prune(others)
    train(optimizer, params, range(40, 70))
    train(fresh, others, range(40, 70))
    found, wanted = (sum(p.square().sum().item() for p in run) for run in (params, others))
    return found <= 2 * wanted


@row("Negative and NaN hyper-parameters: a `ValueError` before anything is built")
def error_inputs(make: Maker) -> bool:
    """Of lr, betas, eps and weight_decay, as far as declared; the iterator of parameters is not touched."""
    bad: dict[str, list[Any]] = {name: [-1.0, math.nan] for name in ("lr", "eps", "weight_decay")}
    bad["betas"] = [(1.5, 0.9), (0.9, -0.1), (math.nan, 0.9), (0.9, math.nan)]
    for name in bad.keys() & make.keywords:
        for value in bad[name]:
            params = iter(make_params())
            try:
                make(params, **{name: value})
            except ValueError:
                if len(list(params)) == len(SHAPES):
                    continue
            return False
    return True


@row("`maximize` is minimising the negative")
def maximize(make: Maker) -> bool:
    """Bit for bit."""
    params, others = make_params(), make_params()
    up, down = make(params, maximize=True), make(others)
    for step in range(10):
        set_grads(others, step)
        for param, other in zip(params, others, strict=True):
            param.grad = -other.grad if other.grad is not None else None
        for optimizer in (up, down):
            seed_everything(step)
            optimizer.step()
    return equal(values(params), values(others))


@row("`lr` as a 0-d tensor: the trajectory of the number, schedules included")
def tensor_lr(make: Maker) -> bool:
    """Up to rounding, under a one-cycle schedule."""
    runs = []
    for lr in (LR, torch.tensor(LR)):
        seed_everything(0)
        params = make_params()
        optimizer = make(params, lr=lr)
        schedule = OneCycleLR(optimizer, max_lr=4 * LR, total_steps=20, cycle_momentum=False)
        for step in range(15):
            train(optimizer, params, range(step, step + 1))
            schedule.step()
        runs.append(values(params))
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(*runs, strict=True))


@row("The layout in memory does not matter")
def memory_layout(make: Maker) -> bool:
    """A strided matrix takes the steps of a contiguous one, up to rounding."""
    runs = []
    for strided in (False, True):
        seed_everything(0)
        start = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
        param = nn.Parameter(torch.stack((start, start), -1)[..., 0] if strided else start)
        train(make([param]), [param], range(10))
        runs.append(param.detach())
    return torch.allclose(runs[0], runs[1], rtol=1e-4, atol=1e-6)


@row("Replicas with equal gradients stay equal bit for bit, whatever the global random state")
def replicas(make: Maker) -> bool:
    """200 steps of two replicas, as on two ranks."""
    return equal(*(values(trained(make, 200, seed=rank)[1]) for rank in range(2)))

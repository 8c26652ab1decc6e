"""The life of a butterfly_opt.Butterfly in any order: groups, faults, checkpoints, casts, hand-made changes.

Oracle: invariants. Parameters and state stay finite, of their shape and dtype; no step is longer than its bound;
what has no gradient, or none that is usable, keeps its parameters and its state bit for bit; gradients are never
written; a reloaded or copied optimizer is equal and goes on equally.

200 examples; more with HYPOTHESIS_EXAMPLES=5000 (a new seed each time).
"""

import copy
import io
import math
import os
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from contract import assert_same
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from butterfly_opt import Butterfly

SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3), (4, 2), (1, 3), (2, 1, 2), (0,)]
KINDS: list[dict[str, Any]] = [
    {},
    {"diagonal": "secant"},
    {"structure": "flat"},
    {"structure": "flat", "diagonal": "secant", "block": 4, "lead": 2},
    {"block": 2, "lead": 2, "diagonal": "secant"},
    {"capturable": True},
    {"capturable": True, "structure": "flat", "diagonal": "secant"},
    {"stochastic_rounding": True},
    {"batch_dims": 1, "diagonal": "secant"},
]
CHANGES: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 0.1],
    "betas": [(0.9, 0.99), (0.0, 0.5), (0.95, 0.999)],
    "eps": [0.0, 1e-8],
    "weight_decay": [0.0, 0.1],
    "decoupled_weight_decay": [False, True],
    "maximize": [False, True],
    "refit_every": [1, 7],
}
RESTARTS: dict[str, list[Any]] = {"block": [64, 32], "diagonal": ["innovation", "secant"]}
"""Changes after which the estimate starts anew, where the state is of another shape then."""

HUGE, MAX_GRAD = 1e14, 1e15
# Kinds of gradients; the factor of the usable ones.
USABLE = {"normal": 1.0, "zero": 0.0, "tiny": 1e-30, "huge": HUGE}
BAD = {"nan": math.nan, "inf": -math.inf, "square overflows": 1e20}
MOST_PARAMS = 6

# What a step may write without taking it.
BOOKKEEPING = ("calls", "skipped")

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make_gradient(param: Tensor, kind: str, generator: torch.Generator) -> Tensor | None:
    noise = torch.randn(param.shape, generator=generator)
    if kind == "none" or not param.requires_grad:
        return None
    if kind in USABLE:
        return (noise.clamp(-2, 2) * USABLE[kind]).to(param.dtype)
    if noise.numel():
        noise.view(-1)[-1] = BAD[kind]
    return noise.to(param.dtype)


def is_usable(grad: Tensor) -> bool:
    return not grad.numel() or bool(grad.float().abs().max() < MAX_GRAD)


class Life(RuleBasedStateMachine):
    """``params`` are those of ``opt`` in order; ``restarting`` holds positions of parameters."""

    @initialize(kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def begin(self, kind: dict[str, Any], dtype: torch.dtype) -> None:
        self.opt = Butterfly([{"params": make_params([(3, 2), (4,)], dtype), **kind}], lr=0.01)
        self.restarting: set[int] = set()
        self.steps = 0

    @property
    def params(self) -> list[nn.Parameter]:
        return [param for group in self.opt.param_groups for param in group["params"]]

    def units(self, opt: Butterfly) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
        """What is stepped as one: every parameter, or the group in ``flat``."""
        return [
            (group, params)
            for group in opt.param_groups
            for params in ([group["params"]] if group["structure"] == "flat" else [[p] for p in group["params"]])
        ]

    def take_step(self, opt: Butterfly, kinds: list[str], seed: int) -> None:
        params = [param for group in opt.param_groups for param in group["params"]]
        grads: list[Tensor | None] = []

        def closure() -> float:
            generator = torch.Generator().manual_seed(seed)
            grads[:] = [make_gradient(p, kind, generator) for p, kind in zip(params, kinds, strict=False)]
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else grad.clone()
            return 1.0

        assert opt.step(closure) == 1.0
        for param, grad in zip(params, grads, strict=True):
            assert (param.grad is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)

    @rule(
        kinds=st.lists(st.sampled_from(["normal", "none", *USABLE, *BAD]), min_size=MOST_PARAMS, max_size=MOST_PARAMS),
        seed=st.integers(0, 2**20),
    )
    def step(self, kinds: list[str], seed: int) -> None:
        before, kept = [p.detach().clone() for p in self.params], copy.deepcopy(dict(self.opt.state))
        states = {id(param): kept_state for param, kept_state in zip(self.opt.state, kept.values(), strict=True)}
        self.take_step(self.opt, kinds, seed)
        self.steps += 1
        old = {id(param): value for param, value in zip(self.params, before, strict=True)}
        position = {id(param): i for i, param in enumerate(self.params)}
        for group, params in self.units(self.opt):
            grads = [param.grad for param in params if param.grad is not None]
            usable = bool(grads) and all(map(is_usable, grads))
            places = {position[id(param)] for param in params}
            for param in params:
                if not usable or param.grad is None:
                    assert torch.equal(param, old[id(param)])
            if usable:
                self.check_length(group, params, [old[id(param)] for param in params])
            elif params[0] in self.opt.state and id(params[0]) in states and not (places & self.restarting and grads):
                assert_same(self.opt.state[params[0]], states[id(params[0])], skip=BOOKKEEPING if grads else ())
            if grads:
                self.restarting -= places

    @staticmethod
    def check_length(group: dict[str, Any], params: list[nn.Parameter], before: list[Tensor]) -> None:
        """``|delta| <= sqrt(n) lr / sqrt(0.3)``, besides decoupled decay and rounding of the parameters."""
        square, allowed = 0.0, 0.0
        decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        for param, old in zip(params, before, strict=True):
            square += (param.detach().double() - old.double()).square().sum().item()
            room = group["lr"] / 0.3**0.5 + old.double().abs() * (group["lr"] * decay + 4 * UNIT_ROUNDOFF[param.dtype])
            allowed += room.square().sum().item()
        assert math.sqrt(square) <= math.sqrt(allowed) * (1 + 1e-2) + 1e-30

    def continue_as(self, opt: Butterfly, seed: int) -> None:
        """The new optimizer equals the old one, steps as it does, and replaces it."""
        new = [param for group in opt.param_groups for param in group["params"]]
        for _ in range(2):
            assert_same([p.detach() for p in new], [p.detach() for p in self.params])
            assert_same(opt.state_dict(), self.opt.state_dict())
            assert [p.requires_grad for p in new] == [p.requires_grad for p in self.params]
            for each in (self.opt, opt):
                self.take_step(each, ["normal"] * MOST_PARAMS, seed)
        assert_same([p.detach() for p in new], [p.detach() for p in self.params])
        self.opt = opt
        place = {id(param): i for i, param in enumerate(new)}
        for _, params in self.units(opt):
            if any(param.grad is not None for param in params):
                self.restarting -= {place[id(param)] for param in params}

    @rule(seed=st.integers(0, 2**20))
    def save_and_load(self, seed: int) -> None:
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        groups = [{"params": [copy.deepcopy(p) for p in group["params"]]} for group in self.opt.param_groups]
        opt = Butterfly(groups)
        opt.load_state_dict(torch.load(file, weights_only=True))
        self.continue_as(opt, seed)

    @rule(seed=st.integers(0, 2**20), pickled=st.booleans())
    def copy_whole(self, seed: int, pickled: bool) -> None:
        self.continue_as(pickle.loads(pickle.dumps(self.opt)) if pickled else copy.deepcopy(self.opt), seed)

    @precondition(lambda self: len(self.params) < MOST_PARAMS)
    @rule(kind=st.sampled_from(KINDS), shape=st.sampled_from(SHAPES), half=st.booleans())
    def add_group(self, kind: dict[str, Any], shape: tuple[int, ...], half: bool) -> None:
        before = self.opt.state_dict()["state"]
        params = make_params([shape], torch.bfloat16 if half else torch.float32)
        # The group's own options, for a kind is valid as a whole.
        base = {"structure": "axes", "diagonal": "innovation", "block": 64, "lead": 16, "batch_dims": 0,
                "capturable": False, "stochastic_rounding": False}  # fmt: skip
        self.opt.add_param_group({"params": params, **base, **kind})
        assert_same(self.opt.state_dict()["state"], before)

    @rule(index=st.integers(0, MOST_PARAMS), change=st.sampled_from(sorted(CHANGES)), choice=st.integers(0, 2))
    def change_hyper_parameter(self, index: int, change: str, choice: int) -> None:
        group = self.opt.param_groups[index % len(self.opt.param_groups)]
        group[change] = CHANGES[change][choice % len(CHANGES[change])]

    @rule(index=st.integers(0, MOST_PARAMS), change=st.sampled_from(sorted(RESTARTS)), choice=st.integers(0, 1))
    def change_what_restarts(self, index: int, change: str, choice: int) -> None:
        group = self.opt.param_groups[index % len(self.opt.param_groups)]
        if change == "block" and group["lead"] != 16:
            return
        if group[change] != RESTARTS[change][choice]:
            ids = {id(param) for param in group["params"]}
            self.restarting |= {i for i, param in enumerate(self.params) if id(param) in ids}
        group[change] = RESTARTS[change][choice]

    @rule(index=st.integers(0, MOST_PARAMS), dtype=st.sampled_from(sorted(UNIT_ROUNDOFF, key=str)))
    def cast(self, index: int, dtype: torch.dtype) -> None:
        """As ``model.to(dtype)``: the data of a group change, the parameters are the same objects."""
        group = self.opt.param_groups[index % len(self.opt.param_groups)]
        for param in group["params"]:
            param.grad = None
            param.data = param.data.to(dtype)

    @rule(index=st.integers(0, MOST_PARAMS), factor=st.sampled_from([0.0, 0.5, -1.0]))
    def edit_by_hand(self, index: int, factor: float) -> None:
        index %= len(self.params)
        with torch.no_grad():
            self.params[index].mul_(factor)

    @rule(index=st.integers(0, MOST_PARAMS))
    def freeze_or_unfreeze(self, index: int) -> None:
        self.params[index % len(self.params)].requires_grad_(not self.params[index % len(self.params)].requires_grad)

    @invariant()
    def parameters_and_state_are_sound(self) -> None:
        for param in self.params:
            assert torch.isfinite(param).all()
            assert param.abs().max() < 1e4 if param.numel() else True
        for _, params in self.units(self.opt):
            state = self.opt.state.get(params[0], {})
            assert not any(param in self.opt.state for param in params[1:])
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    assert value.dtype == torch.float32
                    assert torch.isfinite(value).all()
            if state:
                assert state["exp_avg"].numel() == sum(param.numel() for param in params)
                # The host's clock stands still where it knows that a gradient does not count.
                assert 0 <= state["step"] <= state["calls"] <= state["step"] + state["skipped"] + self.steps
                for name in ("exp_avg_sq", "disp_sq"):
                    assert name not in state or not state[name].numel() or state[name].min() >= 0


# Hypothesis: the same 200 examples on every run; a longer run is a search, with fresh ones.
EXAMPLES = os.environ.get("HYPOTHESIS_EXAMPLES")
TestLife = pytest.mark.filterwarnings("ignore:.*restarts", "ignore:.*their step was skipped")(Life.TestCase)
TestLife.settings = settings(
    max_examples=int(EXAMPLES or 200),
    stateful_step_count=20,
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

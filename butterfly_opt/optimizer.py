"""The ``Butterfly`` optimizer: hyper-parameters, state and bookkeeping around ``step``."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from butterfly_opt import newton
from butterfly_opt.backend import steps_of
from butterfly_opt.collectives import all_reduce_max, run
from butterfly_opt.diagnostics import describe
from butterfly_opt.dtensor import is_sharded
from butterfly_opt.estimate import inverse_hessian_of, preconditioner_of
from butterfly_opt.layout import TensorLayout, axes_layout, flat_layout
from butterfly_opt.operators import DirectSum, RotatedDiagonal
from butterfly_opt.options import MAX_GRAD, Options, check_parameter, check_sharded, validate
from butterfly_opt.stack import (
    COUNTERS,
    Cohort,
    Gate,
    Stack,
    State,
    check_state,
    make_cohorts,
    move_state_,
    new_state,
)
from butterfly_opt.step import count_steps_, gradient

_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

_ADAM_KEYS = {"step", "exp_avg", "exp_avg_sq"}


class Butterfly(Optimizer):
    r"""Preconditions every step with ``Q diag(D) Q^T``, wide butterfly rotations and a diagonal.

    A drop-in for ``torch.optim.Adam``: each matrix of parameters gets an orthogonal basis for each of its axes, a
    product of stages of small rotations, fitted online in closed form to the changes of the gradient, and the step is
    Adam's in that basis:

        theta -= lr Q ( m / (sqrt(V + 0.3 m^2) + eps) ),   m = Q^T (beta1 gbar + (1 - beta1) g)

    with ``gbar`` Adam's bias-corrected momentum and ``V`` the energy of what the gradient changes by, in rotated
    coordinates (``butterfly_opt.diagonal``). Source: M. Mathieu and Y. LeCun, "Fast Approximation of Rotations and
    Hessians Matrices", arXiv:1404.7195 (2014).

    Args:
        params: parameters or parameter groups, as for every torch optimizer. A group may also hold ``batch_dims``: so
            many leading dimensions of its parameters (experts) are a batch of matrices, each with its own basis; and
            ``cross_shard``: whether shards of a ``DTensor`` hear of each other (True) or are matrices of their own.
        lr: learning rate, a number or a tensor of one element.
        betas: decays of the averages behind the pairs (Adam's momentum) and of the squares.
        eps: added to the denominator, gradient units.
        weight_decay: decay coefficient; L2 (added to the gradient) unless ``decoupled_weight_decay``.
        amsgrad: only False.
        maximize: ascend.
        foreach: accepted and ignored: many tensors are always stepped together.
        capturable: make ``step`` safe to capture in a CUDA graph: nothing is read on the host. Every step is alike:
            the kernels of a refit return at once where none is due, torch computes it all the same.
        differentiable: only False.
        fused: False takes the torch path; None and True follow ``backend``.
        decoupled_weight_decay: AdamW's decay.
        diagonal: "innovation" keeps 2 numbers a parameter, as Adam. "secant" regresses gradient changes on parameter
            changes and keeps 5: it gives an inverse Hessian. "newton" takes quasi-Newton steps ``lr P g`` from pairs
            without noise, for full or large batches: lr = 1 is a full step.
        structure: "axes" rotates the two axes of every matrix (a convolution is out x everything else);
            "flat" rotates the group as one vector, as in the paper.
        block: coordinates that one small rotation mixes; state and work of an axis grow with it.
        lead: outputs of a block that go on to the next stage; ``lead = block`` is the full butterfly of that radix.
        refit_every: steps between two refits of a basis (at most 2 during the first 100).
        on_nonfinite: "skip" leaves out the step of a tensor (in "flat", of its group) whose gradient is not
            finite, and counts it (see ``diagnostics``); "raise" raises, and on a GPU waits for it.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias.
        backend: "auto" takes the Triton kernels where they can run, "torch" never, "triton" or an error.

    Raises:
        ValueError: for a hyper-parameter out of its bounds, naming it.
        TypeError: for trainable parameters that are complex or integer.
        NotImplementedError: for sparse parameters, flattened shards, and a ``DTensor`` cut otherwise than by one
            mesh dimension each along its batch, rows or columns.

    Cost, for an m x n matrix in float32: 8 bytes a parameter ("innovation") or 20 ("secant") and about ``8 block / (1 -
    lead / block)`` bytes for each row and column; two ("innovation") or three rotations forth and one back a step, of
    some ``2.7 block`` flops a coordinate and axis.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        diagonal: str = "innovation",
        structure: str = "axes",
        block: int = 64,
        lead: int = 16,
        refit_every: int = 10,
        on_nonfinite: str = "skip",
        stochastic_rounding: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults: Options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "diagonal": diagonal,
            "structure": structure,
            "block": block,
            "lead": lead,
            "refit_every": refit_every,
            "on_nonfinite": on_nonfinite,
            "stochastic_rounding": stochastic_rounding,
            "backend": backend,
            "batch_dims": 0,
            "cross_shard": True,
        }
        validate(defaults)
        # First: torch calls ``add_param_group``, which notes matrices.
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drops what is derived from the state."""
        # Of each group, with what they were made of.
        self._cohorts: dict[int, tuple[Any, list[Cohort]]] = {}
        self._known_skips = 0
        self._has_matrix: dict[int, bool] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Groups saved by an older version, or by Adam, lack options.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyper-parameters and parameters; see ``Optimizer``."""
        merged = {**self.defaults, **param_group}
        validate(merged)
        params = param_group["params"]
        if not isinstance(params, Tensor | set):
            # Once and for all: torch would find a generator used up.
            param_group["params"] = params = list(params)
        tensors = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
        for param in tensors:
            check_parameter(param)
        if all(isinstance(param, Tensor) for param in tensors):
            # For its errors, before the group is added.
            _layouts({**merged, "params": tensors})
        super().add_param_group({**param_group, **{k: merged[k] for k in param_group if k != "params"}})
        self._has_matrix[len(self.param_groups) - 1] = any(param.dim() > 1 for param in tensors)

    def init_state(self) -> None:
        """Makes the state of every trainable parameter before its first gradient.

        A checkpoint can then be loaded into it in place, as ``torch.distributed.checkpoint`` does.
        """
        for group in self.param_groups:
            for layout in _layouts(group):
                if any(param.requires_grad for param in layout.params):
                    self._state_of(layout, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; its tensors keep their own dtype (float32) also beside bfloat16 parameters.

        Where both sides have names, a group's parameters are matched by them. The state of ``torch.optim.Adam`` or
        ``AdamW`` is taken over: its momentum goes on, the squares and the basis start afresh. So do those of a
        parameter that was cut over another number of processes.

        Raises:
            ValueError: if the state is that of another optimizer, or of a ``flat`` group in another order; nothing has
                changed then.

        Warns:
            UserWarning: if a state of Adam, or of another number of processes, is taken over, or names differ.
        """
        prepared: list[dict[str, Any]] = []

        def prepare(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            prepared.append(self._match_names(incoming))
            self._check_states(prepared[-1])
            return prepared[-1]

        # Registered last: it sees what hooks of the user make of the state.
        handle = self.register_load_state_dict_pre_hook(prepare)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._adopt_states(prepared[-1], options)

    def _match_names(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with the parameters of each group in the order of their names here."""
        groups, renamed = [], []
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            theirs, ours = saved.get("param_names"), own.get("param_names")
            if theirs and ours and theirs != ours:
                if set(theirs) != set(ours):
                    renamed += [(o, t) for o, t in zip(ours, theirs, strict=False) if o != t]
                elif own["structure"] == "flat":
                    raise ValueError(
                        "structure='flat' estimates all parameters of a group as one vector, in order, and their order "
                        f"is another one than in the state: {', '.join(theirs)}"
                    )
                else:
                    ids = dict(zip(theirs, saved["params"], strict=True))
                    saved = {**saved, "params": [ids[name] for name in ours], "param_names": list(ours)}
            groups.append(saved)
        if renamed:
            _warn(
                f"names differ, so states are loaded in order: {renamed[0][0]!r}, for one, takes what was saved as "
                f"{renamed[0][1]!r}"
            )
        return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        """Raises for the states of optimizers other than this one and Adam."""
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for state in (state_dict["state"].get(i) for i in saved["params"]):
                if not state or "calls" in state:
                    continue
                if not _ADAM_KEYS <= set(state) <= {*_ADAM_KEYS, "max_exp_avg_sq"}:
                    raise ValueError(
                        "this state was not written by Butterfly, Adam or AdamW: it holds "
                        f"{', '.join(map(str, state))}; start without it"
                    )
                if own["structure"] == "flat":
                    raise ValueError("structure='flat' cannot take over a state of Adam; use structure='axes'")

    def _adopt_states(self, state_dict: dict[str, Any], options: list[Options]) -> None:
        """Undoes torch's cast of the state to the parameters' dtype, and takes over states of Adam."""
        adopted = resharded = 0
        for group, saved_group, own in zip(self.param_groups, state_dict["param_groups"], options, strict=True):
            decays = [float(beta) for beta in group["betas"]]
            states = [state_dict["state"].get(i, {}) for i in saved_group["params"]]
            is_adam = any(state and "calls" not in state for state in states)
            if is_adam:
                kept = ("lr", "initial_lr", "weight_decay", "decoupled_weight_decay")
                group.update({key: value for key, value in own.items() if key not in kept or key not in saved_group})
            for param, saved in zip(group["params"], states, strict=True):
                for key, value in saved.items():
                    if key in COUNTERS:
                        value = torch.as_tensor(value, dtype=torch.float32)  # torch once saved numbers
                    if isinstance(value, Tensor):
                        # A copy: steps must not write into the dict that was loaded.
                        self.state[param][key] = value.detach().clone().to(param.device)
                if saved and is_adam:
                    self.state[param] = _taken_over(param, saved, group, decays[0])
                    adopted += 1
                elif "calls" in saved and _is_resharded(param, self.state[param], group):
                    self.state[param] = _resharded(param, self.state[param], group)
                    resharded += 1
        if adopted:
            _warn(
                f"{adopted} states of Adam were taken over: the momentum goes on; squares and bases start afresh, and "
                "all options but lr and weight decay are those of this optimizer"
            )
        if resharded:
            _warn(
                f"{resharded} states are those of parameters that were cut over another number of processes: the "
                "momentum goes on; squares and bases start afresh"
            )

    @torch._disable_dynamo  # Traced, a step would be compiled again with every change of its schedule.
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: evaluates the model and returns the loss. With ``diagonal="newton"`` it is evaluated again, at half
                of the last step, where that step was too long.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: for a sparse gradient.
            FloatingPointError: for a non-finite gradient with ``on_nonfinite="raise"``; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        cohorts = [cohort for index in range(len(self.param_groups)) for cohort in self._cohorts_of(index)]
        stacks = [stack for cohort in cohorts for stack in cohort.stacks]
        full_batch = [stack for stack in stacks if stack.options["diagonal"] == "newton"]
        if full_batch and closure is not None and loss is not None:
            loss = newton.backtrack(full_batch, closure, loss)
        # All pass the gate before anything changes.
        gates = [self._gate(cohort) for cohort in cohorts]
        counted: list[tuple[Stack, Tensor]] = []
        for cohort, gate in zip(cohorts, gates, strict=True):
            count_steps_(cohort, gate)
            counted += cohort.count_calls_(gate)
        # Where one is skipped the last step stays the one that the next loss is compared with.
        if full_batch and all(any(stack is own for own, _ in counted) for stack in full_batch):
            newton.remember_loss_(full_batch, loss)
        run(steps_of(counted))
        return loss

    def _cohorts_of(self, index: int) -> list[Cohort]:
        """Those of a group's tensors that have a gradient: those of the step before, if nothing has changed."""
        group = self.param_groups[index]
        described, (made_of, known) = _described(group), self._cohorts.get(index, (None, []))
        stacks = [stack for cohort in known for stack in cohort.stacks]
        if described == made_of and all(stack.is_current() for stack in stacks):
            return known
        if self._has_matrix.get(index) and all(param.dim() < 2 for param in group["params"]):
            raise RuntimeError(
                "the matrices of this group were replaced by flat vectors, as DeepSpeed's ZeRO does, which hides what "
                "Butterfly rotates; shard the model with torch.distributed.fsdp.fully_shard"
            )
        for stack in stacks:
            stack.release()
        layouts = [layout for layout in _layouts(group) if any(_has_gradient(param) for param in layout.params)]
        states = [self._state_of(layout, group) for layout in layouts]
        self._cohorts[index] = described, make_cohorts(layouts, states, group, index)
        return self._cohorts[index][1]

    def _state_of(self, layout: TensorLayout, group: Options) -> State:
        """The state of a tensor, made at its first gradient, and anew where it fits no more."""
        state = self.state[layout.owner]
        if "calls" in state and not check_state(state, layout, group):
            _warn(
                "the parameters of a group, or its structure, batch_dims, diagonal, block or lead, changed since the "
                f"last step: the estimate of the tensor of shape {tuple(layout.state_shape)} restarts"
            )
            for key in [key for key, value in state.items() if isinstance(value, Tensor) or key == "calls"]:
                del state[key]
        if "calls" not in state:
            state.update(new_state(layout, group))
            if group["diagonal"] == "newton":
                state.update(newton.new_state(layout, group))
        move_state_(state, layout)
        return state

    def _gate(self, cohort: Cohort) -> Gate:
        """Which tensors may step: the only gate there is.

        A tensor whose gradients have all been zero so far is not ``active``: a dummy step of zeros on a fresh
        optimizer, as loaders make it, leaves no trace but decoupled decay.

        Cost: one pass over the gradients. On a GPU nothing is read on the host.
        """
        largest = _largest_entries(cohort.layouts, cohort.options)
        finite = largest < MAX_GRAD
        # Fake and meta tensors have no numbers.
        has_data = type(finite) is Tensor and finite.device.type != "meta"
        raises = has_data and cohort.options["on_nonfinite"] == "raise"
        # Asked of the CPU, or where the user wants it: of a GPU it waits. There ``diagnostics`` warns.
        if (raises or cohort.is_readable) and not bool(finite.all()):
            if raises:
                raise FloatingPointError(
                    f"non-finite gradient (largest entry {largest[~finite][0].item()}) of the tensor of shape "
                    f"{tuple(cohort.layouts[int((~finite).long().argmax())].state_shape)}; "
                    "on_nonfinite='skip' leaves such steps out"
                )
            # Once; ``diagnostics`` tells of later ones.
            if not self._known_skips:
                self._warn_of_skips(int((~finite).sum()))
        # One that has stepped goes on also with a gradient of zeros.
        goes_on = torch.maximum(largest, cohort.counters["step"]) > 0
        return Gate(finite, finite & goes_on, largest)

    def _warn_of_skips(self, skips: int) -> None:
        self._known_skips += skips
        _warn(
            f"{skips} tensors had a gradient that is not finite, and their step was skipped; "
            "Butterfly.diagnostics() counts such steps"
        )

    def diagnostics(self) -> list[dict[str, Any]]:
        """Plain numbers on the state of each group and tensor, to be logged; computed now, and it waits for the GPU.

        Returns:
            For each group a dictionary of ``steps`` (the most of its tensors), ``nonfinite_steps``,
            ``state_bytes`` (sums) and ``tensors``, a list of dictionaries: ``name`` (None without names),
            ``shape`` (as rotated), ``steps`` (taken), ``nonfinite_steps`` (skipped), ``state_bytes``,
            ``noise_quantiles`` (10, 50 and 90 %; standard deviation of the gradient in rotated coordinates), and where
            known ``curvature_quantiles`` (loss units by parameter units squared; see ``inverse_hessian``) and
            ``off_diagonal`` (of each rotated axis, the share of the energy of its second moment off the diagonal), and
            for "newton" ``negative`` (directions of negative curvature; they step by its absolute value) and
            ``halvings``.

        Warns:
            UserWarning: if steps were skipped since the last look because a gradient was not finite.
        """
        groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            by_owner = dict(zip(map(id, group["params"]), names, strict=True))
            tensors = [
                {"name": by_owner[id(stack.layouts[0].owner)], **describe(stack)}
                for stack in self._single_stacks(group)
            ]
            sums = {key: sum(t[key] for t in tensors) for key in ("nonfinite_steps", "state_bytes")}
            groups.append({"steps": max((t["steps"] for t in tensors), default=0), **sums, "tensors": tensors})
        skips = sum(group["nonfinite_steps"] for group in groups)
        if skips > self._known_skips:
            self._warn_of_skips(skips - self._known_skips)
        return groups

    def preconditioner(self, target: Tensor | dict[str, Any] | None = None) -> RotatedDiagonal | DirectSum:
        """What a step multiplies the momentum with, but for ``lr``: ``Q diag(1 / (sqrt(V + 0.3 m^2) + eps)) Q^T``.

        With ``m = Q^T gbar``: a step also leans to the newest gradient, by the share ``1 - beta1``. For "secant" with
        the mean displacement and curvature of now, where a step takes those of the step before.

        Args:
            target: a parameter, a parameter group, or None for all groups.

        Returns:
            For a parameter a symmetric positive definite operator on it, flattened (in ``flat``: on the whole
            group); else the direct sum over all parameters with an estimate, indexable by parameter.

        Raises:
            KeyError: if the parameter has no estimate yet.
        """
        return self._operators(target, preconditioner_of)

    def inverse_hessian(
        self, target: Tensor | dict[str, Any] | None = None, *, damping: float = 0.0, corrected: bool = False
    ) -> RotatedDiagonal | DirectSum:
        """The current estimate of the inverse Hessian, ``Q diag(1 / (sqrt(h^2 + nu2 / tau2) + damping)) Q^T``.

        In parameter units squared by loss units. Read it with care in noisy training: the gradient noise
        ``nu2`` enters the diagonal, which therefore shrinks towards ``tau / nu`` where noise dominates, and
        past noise moved the parameters, so that the regression finds curvature where there is none (about
        ``0.1 / c`` for steps ``c m``). ``corrected`` gives ``1 / (|h| + damping)`` instead, after
        subtracting that bias to first order, ``C <- C - c nu2 (1 + beta1 (1 - beta1)) / (2 (1 + beta1))``;
        where the curvature is small it needs a damping.

        Args:
            target: a parameter, a parameter group, or None for all groups.
            damping: added to the curvature, ``(H + damping I)^-1``; loss units by parameter units squared.
            corrected: whether to remove noise and bias (no effect for "newton", whose pairs have none).

        Raises:
            ValueError: for ``diagonal="innovation"``, which has no such units, for ``damping < 0``, or while
                nothing has moved yet.
            KeyError: if the parameter has no estimate yet.
        """
        if not 0.0 <= damping < float("inf"):
            raise ValueError(f"Invalid damping value: {damping!r}, expected a finite number >= 0")
        return self._operators(target, lambda stack: inverse_hessian_of(stack, damping=damping, corrected=corrected))

    def _operators(
        self, target: Tensor | dict[str, Any] | None, operator_of: Callable[[Stack], RotatedDiagonal]
    ) -> RotatedDiagonal | DirectSum:
        groups = [target] if isinstance(target, dict) else self.param_groups
        parts = [
            (stack.layouts[0].params, operator_of(stack))
            for group in groups
            for stack in self._single_stacks(group)
            if not isinstance(target, Tensor) or any(target is param for param in stack.layouts[0].params)
        ]
        if not isinstance(target, Tensor):
            return DirectSum(parts)
        if not parts:
            raise KeyError(f"no estimate for this parameter of shape {tuple(target.shape)}: it took no step yet")
        return parts[0][1]

    def _single_stacks(self, group: Options) -> list[Stack]:
        """Every tensor of a group that has a state, by itself."""
        known = [(layout, self.state.get(layout.owner, {})) for layout in _layouts(group)]
        return [Stack([layout], [state], group, 0) for layout, state in known if "calls" in state]


class ButterflyW(Butterfly):
    """``Butterfly`` with decoupled weight decay, to it what ``torch.optim.AdamW`` is to ``Adam``.

    ``theta <- theta (1 - lr weight_decay)`` before the step of ``Butterfly``; see there for all other arguments.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        diagonal: str = "innovation",
        structure: str = "axes",
        block: int = 64,
        lead: int = 16,
        refit_every: int = 10,
        on_nonfinite: str = "skip",
        stochastic_rounding: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True, diagonal=diagonal,
            structure=structure, block=block, lead=lead, refit_every=refit_every, on_nonfinite=on_nonfinite,
            stochastic_rounding=stochastic_rounding, backend=backend,
        )  # fmt: skip


def _warn(message: str) -> None:
    """Warns at the first line outside torch and this package: the caller's, however ``step`` is wrapped."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _taken_over(param: Tensor, saved: State, group: Options, beta: float) -> State:
    """A new state with the momentum of Adam, which averages without bias correction, with decay ``beta``."""
    state = new_state(axes_layout(param, group["batch_dims"]), group)
    steps = torch.as_tensor(saved["step"], dtype=torch.float32).to(param.device)
    # A state may be of no step yet: 0 / 0.
    state["exp_avg"].copy_(saved["exp_avg"] / (1 - beta ** steps.clamp_min(1)))
    return {**state, "earlier_steps": steps.item()}


def _is_resharded(param: Tensor, state: State, group: Options) -> bool:
    """Whether a state is one of this parameter, cut over another number of processes."""
    if group["structure"] == "flat" or group["diagonal"] == "newton" or not param.is_floating_point():
        return False
    layout = axes_layout(param, group["batch_dims"], cross_shard=group["cross_shard"])
    was_cut = any(key.startswith("shard_") for key in state)
    return (was_cut or bool(layout.cuts)) and not check_state(state, layout, group)


def _resharded(param: Tensor, saved: State, group: Options) -> State:
    """A new state with the averages that live in original coordinates."""
    state = new_state(axes_layout(param, group["batch_dims"], cross_shard=group["cross_shard"]), group)
    for name in ("exp_avg", "param_avg"):
        if name in state:
            state[name].copy_(saved[name])
    return {**state, "earlier_steps": saved["step"].item() + saved["earlier_steps"]}


def _layouts(group: Options) -> list[TensorLayout]:
    """The tensors of a group; frozen parameters that are not floating point are left alone."""
    params = [param for param in group["params"] if param.is_floating_point()]
    if group["structure"] == "flat":
        layouts = [flat_layout(params)] if params else []
    else:
        layouts = [axes_layout(param, group["batch_dims"], cross_shard=group["cross_shard"]) for param in params]
    if any(layout.cuts for layout in layouts) or (group["structure"] == "flat" and any(map(is_sharded, params))):
        check_sharded(group)
    # Its estimate brings a basis of its own.
    return [replace(layout, rotated=()) for layout in layouts] if group["diagonal"] == "newton" else layouts


def _described(group: Options) -> tuple[Any, ...]:
    """What the stacks of a group are made of, beside states."""
    names = ("structure", "batch_dims", "cross_shard", "diagonal", "block", "lead", "capturable", "backend")
    params = [(id(p), p.shape, p.dtype, p.device) for p in group["params"] if _has_gradient(p)]
    return id(group), [group[name] for name in names], params


def _has_gradient(param: Tensor) -> bool:
    grad = param.grad
    if grad is not None and grad.is_sparse:
        raise RuntimeError("Butterfly does not support sparse gradients; use dense ones (sparse=False)")
    return grad is not None and param.numel() > 0


def _largest_entries(layouts: list[TensorLayout], options: Options) -> Tensor:
    """Largest absolute gradient entry of each tensor, NaN or infinite where one is: float32 ``(len(layouts),)``.

    Of all shards: processes agree on which tensors step.
    """
    given = [
        [gradient(p, p.grad, options, layout.dtype) for p in layout.params if p.grad is not None and p.numel()]
        for layout in layouts
    ]
    # A process may hold an empty shard.
    grads = [grad if grad.numel() else grad.new_zeros(1) for own in given for grad in own]
    if grads[0].device.type == "cpu":
        # An infinity norm takes twenty times as long on a CPU.
        ends = torch.stack([end for grad in grads for end in torch.aminmax(grad)]).float()
        largest = ends.abs_().view(-1, 2).amax(1)
    else:
        largest = torch.stack(list(torch._foreach_norm(grads, float("inf"), dtype=torch.float32)))
    if len(grads) != len(layouts):
        largest = torch.stack([part.amax() for part in largest.split([len(own) for own in given])])
    # In one order in every process, as collectives need it.
    for process_group in dict.fromkeys(g for layout in layouts for g in layout.groups):
        # As infinity: the maximum with a NaN is anything.
        at = torch.tensor([i for i, layout in enumerate(layouts) if process_group in layout.groups])
        largest[at] = all_reduce_max(largest[at].nan_to_num(nan=torch.inf), process_group)
    return largest

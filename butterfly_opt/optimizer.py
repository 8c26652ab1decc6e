"""The ``Butterfly`` optimizer: schedules and bookkeeping around ``update`` and ``refit``."""

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from butterfly_opt.angle_basis import AngleBasis
from butterfly_opt.backend import Backend, choose_backend
from butterfly_opt.basis import Basis
from butterfly_opt.batch import Batch, make_batches, move_averages_, take_steps
from butterfly_opt.diagnostics import describe
from butterfly_opt.estimate import (
    STATE_VERSION,
    State,
    angle_states,
    migrate_state,
    move_state_,
    new_state,
    refit_clean_,
    rotated_axes,
    update_moments_,
)
from butterfly_opt.guard import keep_usable, remember_fingerprints_, restart_displacements_
from butterfly_opt.layout import STRUCTURES, TensorLayout, axes_layout, flat_layout
from butterfly_opt.operators import DirectSum, RotatedDiagonal
from butterfly_opt.options import DIAGONALS, PAIRS, Options, check_parameter, has_clean_pairs, validate
from butterfly_opt.refit import refit_pack_
from butterfly_opt.update import CleanStep, TensorStep, known_displacement, take_clean_step

_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class _KnownBasis(NamedTuple):
    """A basis with the owners of its tensors, and the angles with the versions that it was built from."""

    owners: list[Tensor]
    made_of: list[tuple[Tensor, int]]
    basis: Basis


class Butterfly(Optimizer):
    r"""Preconditions every step with ``Q diag(D) Q^T``, a butterfly rotation and a diagonal.

    A drop-in for ``torch.optim.Adam``: each matrix of parameters gets an orthogonal basis of Givens
    rotations, refitted online from secant pairs (change of parameters, change of gradient), and the
    step is Adam's in that basis:

        theta -= lr Q clip( Q^T gbar / (sqrt(V) + eps), +-max_update )

    with ``gbar`` Adam's bias-corrected momentum and ``V`` the energy of curvature and noise in rotated
    coordinates (``butterfly_opt.diagonal``). Source: M. Mathieu and Y. LeCun, "Fast Approximation of
    Rotations and Hessians Matrices", arXiv:1404.7195 (2014).

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a 0-d tensor. It means what Adam's means.
        betas: decays of the averages behind the pairs (Adam's momentum) and of the squares.
        eps: added to the denominator, gradient units.
        weight_decay: decay coefficient; L2 (added to the gradient) unless ``decoupled_weight_decay``.
        structure: "axes" rotates the two axes of every matrix (a convolution is out x everything else);
            "flat" rotates the group as one vector, as in the paper.
        depth: butterflies multiplied with one another on each axis.
        diagonal: "secant" regresses gradient changes on parameter changes and keeps 5 numbers a
            parameter; "innovation" keeps 2, as Adam.
        pairs: "ema" takes the pairs from averages; "same_batch" calls the closure a second time after
            the step, for clean pairs at the cost of a gradient.
        scaling: "adam" makes a dimensionless step; "newton" makes the step ``lr D g`` in parameter units:
            lr = 1 is a full quasi-Newton step, for full or large batches.
        refit_every: steps between two refits of the basis (at most 2 during the first 100).
        refit_steps: angle steps in a refit.
        refit_lr: length of an angle step in radians; it shrinks as the basis settles.
        max_update: no rotated coordinate moves by more than ``lr * max_update`` in one step.
        block_size: for "flat": a power of two, the length of independent blocks; None for one block.
        decoupled_weight_decay: AdamW's decay.
        maximize: ascend.
        capturable: make ``step`` safe to capture in a CUDA graph: nothing is read on the host, and every step
            refits the basis (replays are all alike) with half of ``refit_steps``, at the cost of about two
            more rotations a step.
        on_nonfinite: "skip" leaves out the step of a tensor (in "flat", of its group) whose gradient is not
            finite, and counts it (see ``diagnostics``); "raise" raises, and on a GPU waits for it.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias.
        seed: seed of the random sketches.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: for a hyper-parameter out of its bounds, naming it.
        TypeError: for complex or integer parameters.
        NotImplementedError: for what is not implemented yet, and for distributed or sparse parameters.

    Cost, for an m x n matrix in float32: 8 bytes a parameter ("innovation") or 20 ("secant") and about
    ``6 depth log2(n) + 96`` bytes for each row and column; two rotations a step and a refit, whose work
    grows with ``m + n`` only.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        structure: str = "axes",
        depth: int = 2,
        diagonal: str = "secant",
        pairs: str = "ema",
        scaling: str = "adam",
        refit_every: int = 20,
        refit_steps: int = 8,
        refit_lr: float = 0.05,
        max_update: float = 3.0,
        block_size: int | None = None,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        on_nonfinite: str = "skip",
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        defaults: Options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "structure": structure,
            "depth": depth,
            "diagonal": diagonal,
            "pairs": pairs,
            "scaling": scaling,
            "refit_every": refit_every,
            "refit_steps": refit_steps,
            "refit_lr": refit_lr,
            "max_update": max_update,
            "block_size": block_size,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "on_nonfinite": on_nonfinite,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "backend": backend,
        }
        validate(cast(dict[str, Any], defaults))
        self._bases: dict[Tensor, _KnownBasis] = {}
        self._known_skips = 0
        super().__init__(params, cast(dict[str, Any], defaults))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in Options.__annotations__:  # a state of before an option existed
                group.setdefault(name, self.defaults[name])
        for own in self.state.values():  # a pickle of before the present format
            # Hooks may leave other things in a state.
            if isinstance(own, dict) and own.get("version", STATE_VERSION) < STATE_VERSION:
                own.update(migrate_state(own))
        self._bases = {}
        self._known_skips = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyper-parameters and parameters; see ``Optimizer``."""
        validate({**self.defaults, **param_group})
        params = param_group["params"]
        if not isinstance(params, Tensor) and not isinstance(params, set):
            param_group["params"] = params = list(params)
        tensors = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
        for param in tensors:
            check_parameter(param)
        merged = {**self.defaults, **param_group}
        if merged["structure"] == "flat" and tensors:
            flat_layout(tensors, merged["block_size"])
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; its tensors keep their own dtype (float32) also beside bfloat16 parameters.

        Raises:
            ValueError: if the state was written in a format this version does not know.
        """
        saved = state_dict["state"].items()
        migrated = {key: migrate_state(state) if isinstance(state, dict) else state for key, state in saved}
        state_dict = {**state_dict, "state": migrated}
        final: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, incoming: final.append(incoming))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._restore_dtypes(final[-1])

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undoes the cast of floating state to the parameters' dtype that torch makes on loading."""
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for saved_id, param in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.state[param][key] = value.detach().clone().to(param.device)

    @torch._disable_dynamo  # Traced, a step would be compiled again with every change of its schedule.
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: evaluates the model and returns the loss. With ``pairs="same_batch"`` it is required
                and called a second time after the step, on the same batch.

        Returns:
            What the closure returned the first time.

        Raises:
            RuntimeError: for a sparse gradient, or if ``pairs="same_batch"`` has no closure.
            FloatingPointError: for a non-finite gradient with ``on_nonfinite="raise"``.
        """
        if closure is None and any(group["pairs"] == "same_batch" for group in self.param_groups):
            raise RuntimeError("pairs='same_batch' needs step(closure): the gradient is evaluated again after the step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        prepared: list[list[TensorStep]] = []
        streams = 0
        for group in self.param_groups:
            prepared.append(list(self._prepare_group(group, first_stream=streams)))
            streams += len(group["params"])
        everything = [tensor for tensors in prepared for tensor in tensors]
        usable = keep_usable(everything)
        if len(usable) < len(everything) and not self._known_skips:
            self._warn_of_skips(len(everything) - len(usable))
        waiting: list[tuple[TensorStep, CleanStep]] = []
        for group, tensors in zip(self.param_groups, prepared, strict=True):
            restart_displacements_(tensors)
            taken = [tensor for tensor in usable if tensor.options is group]
            if has_clean_pairs(cast(Options, group)):
                waiting += [(tensor, take_clean_step(tensor, self._basis([tensor]))) for tensor in taken]
            else:
                self._take_steps(taken)
            remember_fingerprints_(tensors)
        for tensor, taken_step in waiting:
            if taken_step.pair is not None:
                self._refit_clean(tensor, taken_step.pair)
        if closure is not None and any(step.pair is None for _, step in waiting):
            with torch.enable_grad():
                closure()
            self._learn_same_batch([(tensor, step) for tensor, step in waiting if step.pair is None])
        return loss

    def diagnostics(self) -> list[dict[str, Any]]:
        """Plain numbers on the state of each group and tensor, to be logged; computed now, and it waits for the GPU.

        Returns:
            For each group a dictionary of ``steps`` (the most of its tensors), ``nonfinite_steps``, ``restarts``,
            ``state_bytes`` (sums) and ``tensors``, a list of dictionaries: ``name`` (None without names),
            ``shape`` (as rotated), ``steps`` (pairs used), ``nonfinite_steps`` (skipped), ``restarts`` (times the
            parameters were found changed by hand), ``state_bytes``, ``noise_quantiles`` (10, 50 and 90 %;
            standard deviation of the gradient in rotated coordinates), and where known
            ``curvature_quantiles`` (loss units by parameter units squared; see ``inverse_hessian``),
            ``angle_change`` (mean change of the angles of each rotated axis in a refit, radians) and
            ``off_diagonal`` (share of the energy of the second moment along each axis off its diagonal).

        Warns:
            UserWarning: if steps were skipped since the last look because a gradient was not finite.
        """
        groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            by_owner = dict(zip(group["params"], names, strict=True))
            states = [(layout, self.state.get(layout.owner, {})) for layout in _layouts(group)]
            tensors = [
                {"name": by_owner[layout.owner], **describe(TensorStep(layout, state, cast(Options, group), 0))}
                for layout, state in states
                if "signature" in state
            ]
            sums = {key: sum(t[key] for t in tensors) for key in ("nonfinite_steps", "restarts", "state_bytes")}
            groups.append({"steps": max((t["steps"] for t in tensors), default=0), **sums, "tensors": tensors})
        self._warn_of_skips(sum(group["nonfinite_steps"] for group in groups))
        return groups

    def _warn_of_skips(self, skips: int) -> None:
        if skips > self._known_skips:
            _warn(f"{skips - self._known_skips} steps of tensors were skipped since a gradient was not finite")
        self._known_skips = skips

    def preconditioner(self, target: Tensor | dict[str, Any] | None = None) -> RotatedDiagonal | DirectSum:
        """What the next step multiplies by, ``Q diag(1 / (sqrt(V) + eps)) Q^T`` ("newton": ``Q diag(D) Q^T``).

        Args:
            target: a parameter, a parameter group, or None for all groups.

        Returns:
            For a parameter a symmetric positive definite operator on it, flattened (in ``flat``: on the whole
            group); else the direct sum over all parameters with an estimate, indexable by parameter.

        Raises:
            KeyError: if the parameter has no estimate yet.
        """

        def applied(tensor: TensorStep) -> Tensor:
            scale, tau = tensor.normalizer()
            scale += tensor.options["eps"]
            return 1 / scale if tensor.options["scaling"] == "adam" else known_displacement(tau) / scale

        return self._operators(target, applied)

    def inverse_hessian(
        self, target: Tensor | dict[str, Any] | None = None, *, damping: float = 0.0, corrected: bool = False
    ) -> RotatedDiagonal | DirectSum:
        """The current estimate of the inverse Hessian, ``Q diag(1 / (sqrt(h^2 + nu2 / tau2) + damping)) Q^T``.

        In parameter units squared by loss units. Read it with care in noisy training: the gradient noise
        ``nu2`` enters the diagonal, which therefore shrinks towards ``tau / nu`` where noise dominates, and
        past noise moved the parameters, so that the regression finds curvature where there is none (about
        ``0.1 / c`` for steps ``c gbar``). ``corrected`` gives ``1 / (|h| + damping)`` instead, after
        subtracting that bias to first order, ``C <- C - c nu2 / (2 (1 + beta1))``; where the curvature
        is small it needs a damping.

        Args:
            target: a parameter, a parameter group, or None for all groups.
            damping: added to the curvature, ``(H + damping I)^-1``; loss units by parameter units squared.
            corrected: whether to remove noise and bias (pairs "ema" with scaling "adam"; no effect otherwise).

        Raises:
            ValueError: for ``diagonal="innovation"``, which has no such units, for ``damping < 0``, or while
                nothing has moved yet.
            KeyError: if the parameter has no estimate yet.
        """
        if not 0.0 <= damping < float("inf"):
            raise ValueError(f"Invalid damping value: {damping!r}, expected a finite number >= 0")
        return self._operators(target, lambda tensor: 1 / (tensor.hessian_diagonal(corrected=corrected) + damping))

    def _operators(
        self, target: Tensor | dict[str, Any] | None, diagonal: Callable[[TensorStep], Tensor]
    ) -> RotatedDiagonal | DirectSum:
        parts: list[tuple[tuple[Tensor, ...], RotatedDiagonal]] = []
        for group in [target] if isinstance(target, dict) else self.param_groups:
            for layout in _layouts(group):
                wanted = not isinstance(target, Tensor) or any(target is param for param in layout.params)
                state = self.state.get(layout.owner, {})
                if wanted and "signature" in state:
                    tensor = TensorStep(layout, state, cast(Options, group), 0)
                    basis = AngleBasis(layout.shape, rotated_axes(layout, state), self._backend(tensor))
                    parts.append((layout.params, RotatedDiagonal(basis, diagonal(tensor))))
        if not isinstance(target, Tensor):
            return DirectSum(parts)
        if not parts:
            raise KeyError(f"no estimate for this parameter of shape {tuple(target.shape)}: it took no step yet")
        return parts[0][1]

    def _prepare_group(self, group: dict[str, Any], *, first_stream: int) -> Iterator[TensorStep]:
        """The tensors of a group that have a gradient in this step."""
        for stream, layout in enumerate(_layouts(group), first_stream):
            if any(param.grad is not None and param.numel() for param in layout.params):
                yield self._prepare(group, layout, stream=stream)

    def _prepare(self, group: dict[str, Any], layout: TensorLayout, *, stream: int) -> TensorStep:
        """State (made at the first gradient) and basis of a tensor."""
        for param in layout.params:
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError("Butterfly does not support sparse gradients; use dense ones (sparse=False)")
        state = self.state[layout.owner]
        signature = _signature(group, layout)
        if state.get("signature", signature) != signature:
            _warn(
                "the parameters of a group, or its structure, block_size, depth, diagonal, pairs or scaling, "
                f"changed since the last step: the estimate of the tensor of shape {layout.shape} restarts"
            )
            for key in _own_keys(state):
                del state[key]
        if "signature" not in state:
            fresh = new_state(
                layout,
                depth=group["depth"],
                diagonal=group["diagonal"],
                pairs=group["pairs"],
                clean=has_clean_pairs(cast(Options, group)),
            )
            state.update(fresh, signature=signature)
        move_state_(state, layout)
        state["calls"] += 1
        return TensorStep(layout, state, cast(Options, group), stream)

    def _basis(self, tensors: Sequence[TensorStep]) -> Basis:
        """The common basis of tensors of one shape, built again whenever one of their angles has changed.

        With ``capturable`` it is built anew each time: a captured graph must read the present angles.
        """
        first = tensors[0]
        axes = [rotated_axes(tensor.layout, tensor.state) for tensor in tensors]
        made_of = [(angle, angle._version) for tensor_axes in axes for _, angle in tensor_axes]
        owners = [tensor.layout.owner for tensor in tensors]
        known = self._bases.get(owners[0])
        if known is not None and [(id(a), v) for a, v in known.made_of] == [(id(a), v) for a, v in made_of]:
            return known.basis
        stacked = axes[0]
        if len(tensors) > 1:
            stacked = [(same[0][0], torch.stack([angle for _, angle in same])) for same in zip(*axes, strict=True)]
        basis = Basis(first.layout.shape, stacked, self._backend(first))
        if not first.options["capturable"]:
            # A tensor is in one basis only: what it shared with others goes, or freezing would leave stacks behind.
            for outdated in [self._bases[owner] for owner in owners if owner in self._bases]:
                for owner in outdated.owners:
                    self._bases.pop(owner, None)
            self._bases |= dict.fromkeys(owners, _KnownBasis(owners, made_of, basis))
        return basis

    @staticmethod
    def _backend(tensor: TensorStep) -> Backend:
        return choose_backend(tensor.options["backend"], tensor.layout.owner.device, tensor.layout.dtype)

    def _take_steps(self, tensors: Sequence[TensorStep]) -> None:
        """The steps of the tensors of a group, and the refits of those that are due."""
        by_device: dict[torch.device, list[TensorStep]] = defaultdict(list)
        for tensor in tensors:
            by_device[tensor.layout.owner.device].append(tensor)
        for there in by_device.values():
            backend = self._backend(there[0])
            batches = make_batches(there, self._basis, backend)
            take_steps(batches, backend)
            self._refit([batch for batch in batches if batch.tensors[0].refit_is_due], backend)

    def _refit(self, batches: Sequence[Batch], backend: Backend) -> None:
        """Refits all axes of the batches, packed into one butterfly for each dtype, and moves the averages."""
        packs: dict[Any, list[tuple[TensorStep, int]]] = defaultdict(list)
        for batch in batches:
            for tensor in batch.tensors:
                for axis, (_, stages, _) in enumerate(tensor.layout.angles_shapes(depth=1)):
                    packs[tensor.layout.dtype, tensor.layout.stages, stages <= backend.short_stages].append(
                        (tensor, axis)
                    )
        for axes in packs.values():
            options = axes[0][0].options
            refit_pack_(
                [
                    (t.state[f"sketch{axis}"], angle_states(t.layout, t.state)[axis], t.state["angle_steps"])
                    for t, axis in axes
                ],
                steps=axes[0][0].refit_steps,
                refit_lr=options["refit_lr"],
                usable=[t.usable for t, _ in axes if t.usable is not None] or None,
                backend=backend,
            )
        for batch in batches:
            for tensor in batch.tensors:
                steps = tensor.refit_steps
                tensor.state["angle_steps"] += steps if tensor.usable is None else steps * tensor.usable
            move_averages_(batch.tensors, batch.basis, self._basis(batch.tensors))

    def _learn_same_batch(self, waiting: Sequence[tuple[TensorStep, CleanStep]]) -> None:
        """Takes the clean pairs into the estimates; the gradients are those after the step, on the same batch."""
        usable = {id(tensor.state) for tensor in keep_usable([tensor for tensor, _ in waiting])}
        for tensor, step in waiting:
            if id(tensor.state) in usable:
                u = tensor.rotated_gradient(self._basis([tensor])).sub_(step.grad)
                update_moments_(tensor.state, u, step.written, weight=step.weight, pair_weight=step.weight)
                self._refit_clean(tensor, (u, step.written))

    def _refit_clean(self, tensor: TensorStep, pair: tuple[Tensor, Tensor]) -> None:
        """Refits the basis of one tensor to a clean pair, if it is due."""
        if tensor.refit_is_due:
            basis = self._basis([tensor])
            refit_clean_(tensor.layout, tensor.state, basis, *pair)
            move_averages_([tensor], basis, self._basis([tensor]))


def _warn(message: str) -> None:
    """Warns at the first line outside torch and this package: the caller's, however ``step`` is wrapped."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _layouts(group: dict[str, Any]) -> list[TensorLayout]:
    """The tensors of a group."""
    if group["structure"] == "flat":
        return [flat_layout(group["params"], group["block_size"])] if group["params"] else []
    return [axes_layout(param) for param in group["params"]]


def _signature(group: dict[str, Any], layout: TensorLayout) -> list[Any]:
    """What the state of a tensor is made for; any change restarts it.

    Numbers only: ``Optimizer.load_state_dict`` rebuilds every iterable in a state, and breaks strings.
    """
    kinds = [STRUCTURES.index(group["structure"]), DIAGONALS.index(group["diagonal"]), PAIRS.index(group["pairs"])]
    kinds.append(int(has_clean_pairs(cast(Options, group))))
    return [*kinds, group["depth"], group["block_size"] or 0, [list(param.shape) for param in layout.params]]


def _own_keys(state: State) -> Iterable[str]:
    """Keys of ours in a state that may hold keys of others (hooks)."""
    return [
        key for key, value in state.items() if isinstance(value, Tensor) or key in ("version", "calls", "signature")
    ]

"""The ``Butterfly`` optimizer: schedules and bookkeeping around ``update`` and ``refit``."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from butterfly_opt.backend import choose_backend
from butterfly_opt.basis import Basis
from butterfly_opt.estimate import (
    COUNTERS,
    STATE_VERSION,
    State,
    angle_states,
    new_state,
    refit_clean_,
    rotated_axes,
    update_moments_,
)
from butterfly_opt.layout import STRUCTURES, TensorLayout, axes_layout, flat_layout
from butterfly_opt.operators import DirectSum, RotatedDiagonal
from butterfly_opt.options import DIAGONALS, PAIRS, Options, check_parameter, has_clean_pairs, validate
from butterfly_opt.refit import AngleState, refit_pack_
from butterfly_opt.update import Stepped, TensorStep, known_displacement

MAX_GRAD = 1.8e19
"""Gradients from here on count as non-finite: their squares overflow float32."""

REFIT_WARMUP = 100
"""First steps of a tensor, in each of which its basis is refitted: most of the fit happens there."""


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
        refit_every: steps between two refits of the basis (every step during the first 100).
        refit_steps: angle steps in a refit.
        refit_lr: length of an angle step in radians; it shrinks as the basis settles.
        max_update: no rotated coordinate moves by more than ``lr * max_update`` in one step.
        block_size: for "flat": a power of two, the length of independent blocks; None for one block.
        decoupled_weight_decay: AdamW's decay.
        maximize: ascend.
        capturable: not implemented yet.
        on_nonfinite: "skip" leaves out the step of a tensor whose gradient is not finite, and counts it;
            "raise" raises.
        stochastic_rounding: not implemented yet.
        seed: seed of the random sketches.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: for a hyper-parameter out of its bounds, naming it.
        TypeError: for complex or integer parameters.
        NotImplementedError: for what is not implemented yet, and for distributed or sparse parameters.

    Cost, for an m x n matrix in float32: 8 bytes a parameter ("innovation") or 20 ("secant") and about
    ``6 depth log2(n) + 32`` bytes for each row and column; two rotations a step and a refit, whose work
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
        refit_every: int = 10,
        refit_steps: int = 4,
        refit_lr: float = 0.06,
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
        self._bases: dict[Tensor, Basis] = {}
        super().__init__(params, cast(dict[str, Any], defaults))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bases = {}

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
        for saved in state_dict["state"].values():
            if saved.get("version", STATE_VERSION) != STATE_VERSION:
                raise ValueError(
                    f"this state has format version {saved['version']}, this Butterfly reads {STATE_VERSION}"
                )
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
                    device = torch.device("cpu") if key in COUNTERS else param.device
                    self.state[param][key] = value.detach().clone().to(device)

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
        waiting: list[tuple[TensorStep, Stepped]] = []
        prepared: list[list[TensorStep]] = []
        streams = 0
        for group in self.param_groups:  # no comprehension: its frame would shift the stacklevel of the warning
            prepared.append(list(self._prepare_group(group, first_stream=streams)))
            streams += len(group["params"])
        usable = self._finite([tensor for tensors in prepared for tensor in tensors])
        for group, tensors in zip(self.param_groups, prepared, strict=True):
            taken = [
                (tensor, tensor.take(_gradients(tensor.layout))) for tensor in tensors if tensor.layout.owner in usable
            ]
            if group["pairs"] == "same_batch":
                waiting += taken
            elif has_clean_pairs(cast(Options, group)):
                for tensor, stepped in taken:
                    self._refit_clean(tensor, stepped.pair)
            else:
                self._refit_sketches([tensor for tensor, _ in taken if _refit_is_due(tensor)], group)
        if waiting and closure is not None:
            with torch.enable_grad():
                closure()
            self._learn_same_batch(waiting)
        return loss

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
                    tensor = TensorStep(layout, state, cast(Options, group), self._basis(group, layout, state), 0)
                    parts.append((layout.params, RotatedDiagonal(tensor.basis, diagonal(tensor))))
        if not isinstance(target, Tensor):
            return DirectSum(parts)
        if not parts:
            raise KeyError(f"no estimate for this parameter of shape {tuple(target.shape)}: it took no step yet")
        return parts[0][1]

    def _prepare_group(self, group: dict[str, Any], *, first_stream: int) -> Iterator[TensorStep]:
        """The tensors of a group that have a gradient in this step."""
        for stream, layout in enumerate(_layouts(group), first_stream):
            if layout.owner.numel() + len(layout.params) > 1 and any(param.grad is not None for param in layout.params):
                yield self._prepare(group, layout, stream=stream)

    def _prepare(self, group: dict[str, Any], layout: TensorLayout, *, stream: int) -> TensorStep:
        """State (made at the first gradient) and basis of a tensor."""
        for param in layout.params:
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError("Butterfly does not support sparse gradients; use dense ones (sparse=False)")
        state = self.state[layout.owner]
        signature = _signature(group, layout)
        if state.get("signature", signature) != signature:
            warnings.warn(
                "the parameters of a group, or its structure, block_size, depth, diagonal, pairs or scaling, "
                f"changed since the last step: the estimate of the tensor of shape {layout.shape} restarts",
                stacklevel=6,
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
            self._bases.pop(layout.owner, None)
        state["calls"] += 1
        return TensorStep(layout, state, cast(Options, group), self._basis(group, layout, state), stream)

    def _basis(self, group: dict[str, Any], layout: TensorLayout, state: State) -> Basis:
        if layout.owner not in self._bases:
            axes = rotated_axes(layout, state)
            backend = choose_backend(group["backend"], layout.owner.device, layout.dtype)
            self._bases[layout.owner] = Basis(layout.shape, axes, backend)
        return self._bases[layout.owner]

    def _finite(self, tensors: list[TensorStep]) -> set[Tensor]:
        """Owners of the tensors whose gradients, and their squares, are all finite; counts the others.

        Cost: one pass over the gradients and, on a GPU, one synchronisation for all of them.
        """
        owners, norms = [], []
        for tensor in tensors:
            for param in tensor.layout.params:
                if param.grad is not None and param.grad.numel():
                    owners.append((tensor, param))
                    norms.append(torch.linalg.vector_norm(param.grad, float("inf")).float())
        by_device: dict[torch.device, list[int]] = defaultdict(list)
        for index, norm in enumerate(norms):
            by_device[norm.device].append(index)
        largest = [0.0] * len(norms)
        for indices in by_device.values():
            values = torch.stack([norms[index] for index in indices]).tolist()
            for index, value in zip(indices, values, strict=True):
                largest[index] = value
        bad: dict[Tensor, TensorStep] = {}
        for (tensor, param), value in zip(owners, largest, strict=True):
            if not value < MAX_GRAD:
                if tensor.options["on_nonfinite"] == "raise":
                    raise FloatingPointError(
                        f"non-finite gradient (largest entry {value}) of a parameter of shape {tuple(param.shape)}; "
                        "on_nonfinite='skip' leaves such steps out"
                    )
                bad[tensor.layout.owner] = tensor
        for tensor in bad.values():
            tensor.state["skipped"] += 1
        return {tensor.layout.owner for tensor in tensors} - set(bad)

    def _rebase(self, tensor: TensorStep) -> None:
        """Moves the averages from the basis of ``tensor`` to that of the current angles."""
        layout, state = tensor.layout, tensor.state
        del self._bases[layout.owner]
        basis = self._basis(cast(dict[str, Any], tensor.options), layout, state)
        for name in ("mean_grad", "displacement"):
            if name in state:
                state[name].copy_(basis.to_rotated(tensor.basis.from_rotated(state[name])))

    def _refit_sketches(self, tensors: list[TensorStep], group: dict[str, Any]) -> None:
        """Refits all axes of all due tensors of a group, packed into one butterfly a device and dtype."""
        packs: dict[Any, list[tuple[Tensor, AngleState, float]]] = defaultdict(list)
        tensors = [tensor for tensor in tensors if tensor.layout.rotated]
        for tensor in tensors:
            for axis, angles in enumerate(angle_states(tensor.layout, tensor.state)):
                sketch = tensor.state[f"sketch{axis}"]
                key = (sketch.device, sketch.dtype, sketch.shape[1], tensor.layout.stages)
                packs[key].append((sketch, angles, tensor.state["angle_steps"].item()))
        for axes in packs.values():
            backend = choose_backend(group["backend"], axes[0][0].device, axes[0][0].dtype)
            refit_pack_(axes, steps=group["refit_steps"], refit_lr=group["refit_lr"], backend=backend)
        for tensor in tensors:
            tensor.state["angle_steps"] += group["refit_steps"]
            self._rebase(tensor)

    def _learn_same_batch(self, waiting: list[tuple[TensorStep, Stepped]]) -> None:
        """Takes the clean pairs into the estimates; the gradients are those after the step, on the same batch."""
        usable = self._finite([tensor for tensor, _ in waiting])
        for tensor, stepped in waiting:
            if tensor.layout.owner in usable:
                u = tensor.rotated(tensor.gradient(_gradients(tensor.layout))).sub_(stepped.grad)
                update_moments_(tensor.state, u, stepped.written, weight=stepped.weight, pair_weight=stepped.weight)
                self._refit_clean(tensor, (u, stepped.written))

    def _refit_clean(self, tensor: TensorStep, pair: tuple[Tensor, Tensor] | None) -> None:
        """Refits the basis of one tensor to a clean pair, if it is due and the tensor is rotated."""
        if pair is not None and tensor.layout.rotated and _refit_is_due(tensor):
            refit_clean_(tensor.layout, tensor.state, tensor.basis, *pair)
            self._rebase(tensor)


def _layouts(group: dict[str, Any]) -> list[TensorLayout]:
    """The tensors of a group."""
    if group["structure"] == "flat":
        return [flat_layout(group["params"], group["block_size"])] if group["params"] else []
    return [axes_layout(param) for param in group["params"]]


def _gradients(layout: TensorLayout) -> list[Tensor | None]:
    return [param.grad for param in layout.params]


def _refit_is_due(tensor: TensorStep) -> bool:
    calls, options = tensor.state["calls"], tensor.options
    return options["refit_steps"] > 0 and (calls <= REFIT_WARMUP or calls % options["refit_every"] == 0)


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

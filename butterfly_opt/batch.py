"""The default step (pairs "ema", scaling "adam") of many tensors: phase after phase, stacked where small.

    theta -= lr Q clip( Q^T gbar / (sqrt(V) + eps), +-kappa )

with ``V`` the diagonal estimate (``diagonal``) and ``kappa = max_update``. The clip matters: ``V`` holds the
energy of innovations only, and on a constant gradient they vanish.

Tensors of equal shape form a ``Batch``: small ones are stacked and rotated together; a large one is a batch of its
own, updated in place. Where tensors of other shapes are small too, all share every operation between the rotations:
they lie behind one another in one vector. The numbers of a step (``Scalars``) are plain numbers where the
host knows them. On a GPU and with ``capturable`` they are tensors, and nothing is read on the host: a step
that must be skipped then has weights and learning rate 0, which leaves state and parameters as they were.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from butterfly_opt.backend import Backend, FusedStep, FusedWrite, TritonBackend
from butterfly_opt.basis import Basis
from butterfly_opt.diagonal import regress, spread
from butterfly_opt.estimate import (
    SKETCH_BETA,
    Weight,
    pair_weights,
    update_axis_sketch_,
    update_moments_,
)
from butterfly_opt.options import Options
from butterfly_opt.pairs import advance_displacement_, average_
from butterfly_opt.rounding import round_stochastically
from butterfly_opt.update import MAX_ROTATED_GRAD, TensorStep

ROUNDING_STREAMS = 1 << 31
"""Random streams from here on round parameters; those below are of sketches."""


class Scalars(NamedTuple):
    """The numbers of a step: plain, or tensors that broadcast against a stack ``(B, *shape)``.

    Attributes:
        mean: weight ``a`` of this gradient in ``gbar``.
        square: weight of this innovation in ``A``.
        pair: weight of this pair in ``B`` and ``C``.
        step: steps so far, including this one.
        lr: learning rate.
        usable: whether the step is taken; None where the host has left out all others.
    """

    mean: Weight
    square: Weight
    pair: Weight
    step: Weight
    lr: Weight
    usable: Tensor | None

    @property
    def sketch(self) -> Weight:
        """Weight of this innovation in the sketches."""
        if isinstance(self.mean, Tensor):
            return torch.where(self.mean > 0, self.mean.clamp_min(1 - SKETCH_BETA), 0.0)
        return max(1 - SKETCH_BETA, self.mean)

    def whole_step(self, row: int) -> int | Tensor:
        """Steps of one tensor of the batch, as an integer."""
        return self.step[row].view(()).long() if isinstance(self.step, Tensor) else int(self.step)


def device_scalars(tensors: Sequence[TensorStep]) -> Tensor:
    """Counts the step of tensors of one group and device, where usable, and makes its numbers without the host.

    Returns:
        The fields of ``Scalars`` as columns, float32 ``(len(tensors), 6)``: weights and learning rate are 0
        where a step is not usable.
    """
    options = tensors[0].options
    taken = torch.stack([tensor.usable for tensor in tensors if tensor.usable is not None]).float()
    counters = [tensor.state["step"] for tensor in tensors]
    steps = torch.stack(counters) + taken
    torch._foreach_copy_(counters, list(steps.unbind()))
    weights = [weight * taken for weight in pair_weights(steps.clamp_min(1), options["betas"])]
    return torch.stack([*weights, steps, taken * options["lr"], taken], 1)


@dataclass(frozen=True)
class Batch:
    """Tensors of one shape, dtype and device that step together, with their common basis."""

    tensors: Sequence[TensorStep]
    basis: Basis
    scalars: Scalars
    device_rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The scalars of each tensor as a row, float32 ``(B, 6)``: what the fused kernels read."""
        if self.device_rows is not None:
            return self.device_rows
        numbers = torch.tensor([float(number) for number in self.scalars[:-1]] + [1.0])
        return numbers.to(self.tensors[0].layout.owner.device).expand(len(self.tensors), -1)

    @property
    def options(self) -> Any:
        """Options of the group."""
        return self.tensors[0].options

    def stack(self, name: str) -> Tensor:
        """A state of all tensors as ``(B, *shape)``: a view for one tensor, else a copy; see ``store``."""
        return stack([tensor.state[name] for tensor in self.tensors])

    def store(self, **stacks: Tensor) -> None:
        """Writes copies of ``stack`` back."""
        if len(self.tensors) > 1:
            states = [tensor.state[name] for name in stacks for tensor in self.tensors]
            torch._foreach_copy_(states, [part for stack in stacks.values() for part in stack.unbind()])

    @cached_property
    def is_exact(self) -> bool:
        """Whether the parameters change by the update itself, up to rounding in their own dtype."""
        first, options = self.tensors[0], self.options
        decays = options["weight_decay"] and options["decoupled_weight_decay"]
        return not decays and first.layout.dtype == first.layout.owner.dtype and not first.is_partial

    @cached_property
    def kind(self) -> tuple[bool, str, float]:
        """What batches that share their operations have in common: how they write, dtype, and numbers of the step."""
        step = -1.0 if isinstance(self.scalars.step, Tensor) else self.scalars.step
        return self.is_exact, str(self.tensors[0].layout.dtype), step

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return len(self.tensors) * self.basis.shape.numel()

    def rotated_gradients(self) -> Tensor:
        """``Q^T g``, ``(B, *shape)``, a new tensor."""
        grads = stack([tensor.gradient(self.basis) for tensor in self.tensors])
        return self.basis.to_rotated(grads) if self.basis.rotations else grads.clone()


def group_alike(tensors: Sequence[TensorStep], backend: Backend) -> list[list[TensorStep]]:
    """Tensors of one group in lists for a batch each: small ones equal in shape, dtype, device and schedule."""
    alike: dict[Any, list[TensorStep]] = defaultdict(list)
    for tensor in tensors:
        layout, owner = tensor.layout, tensor.layout.owner
        key: Any = owner
        if owner.numel() <= backend.max_stacked and len(layout.params) == 1:
            key = (layout.shape, owner.dtype, owner.device, tensor.steps_to_refit, tensor.known_step)
        alike[key].append(tensor)
    return list(alike.values())


def make_batches(
    tensors: Sequence[TensorStep], basis: Callable[[Sequence[TensorStep]], Basis], backend: Backend
) -> list[Batch]:
    """The batches of a group's tensors, all on one device, with the numbers of their step, which this counts.

    Args:
        tensors: of one group and device.
        basis: gives the common basis of a batch.
        backend: of the group.
    """
    lists = group_alike(tensors, backend)
    if tensors[0].usable is None:
        options = tensors[0].options
        steps = [alike[0].known_step + 1 for alike in lists]
        torch._foreach_add_([tensor.state["step"] for tensor in tensors], 1)
        lr = float(options["lr"])
        numbers = {step: Scalars(*pair_weights(step, options["betas"]), step, lr, None) for step in set(steps)}
        return [Batch(alike, basis(alike), numbers[step]) for alike, step in zip(lists, steps, strict=True)]
    rows = device_scalars([tensor for alike in lists for tensor in alike])
    batches: list[Batch] = []
    for alike, part in zip(lists, rows.split([len(alike) for alike in lists]), strict=True):
        columns = part.view(len(alike), len(Scalars._fields), *(1 for _ in alike[0].layout.shape))
        mean, square, pair, step, lr, usable = columns.unbind(1)
        batches.append(Batch(alike, basis(alike), Scalars(mean, square, pair, step, lr, usable > 0), part))
    return batches


def take_steps(batches: Sequence[Batch], backend: Backend) -> None:
    """Steps the batches of a group: gradients, averages, sketches, parameters."""
    for part in _chunks(batches, backend.chunk):
        for batch in part:
            for tensor in batch.tensors:
                tensor.freeze_missing(batch.basis)
        rotated = [batch.rotated_gradients() for batch in part]
        if isinstance(backend, TritonBackend):
            taken = _take_fused_averages(part, rotated, backend)
        else:
            taken = take_averages(part, rotated)
        for batch, (innovation, _) in zip(part, taken, strict=True):
            if batch.tensors[0].sketch_is_due:
                _take_sketches(batch, innovation, backend)
        changes = [batch.basis.from_rotated(update) for batch, (_, update) in zip(part, taken, strict=True)]
        _write(part, changes, backend)


def _chunks(batches: Sequence[Batch], elements: int) -> list[list[Batch]]:
    """The batches in lists, each of one kind and about as many elements: what is in flight at once stays bounded."""
    chunks: list[list[Batch]] = []
    room, kind = -1, None
    for batch in sorted(batches, key=lambda batch: (*batch.kind, batch.numel)):
        if batch.numel > room or batch.kind != kind:
            chunks.append([])
            room, kind = elements, batch.kind
        chunks[-1].append(batch)
        room -= batch.numel
    return chunks


def take_averages(batches: Sequence[Batch], grads: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The averages of batches of one kind, and of each batch the innovations and the rotated update.

    Args:
        batches: their tensors are laid behind one another: views of a single tensor, else copies.
        grads: rotated gradients of each batch; they may be overwritten.
    """
    options, tensors = batches[0].options, [tensor for batch in batches for tensor in batch.tensors]
    names = ["mean_grad", "grad_sq"] + (["disp_sq", "cross", "displacement"] if options["diagonal"] == "secant" else [])
    states = {name: [tensor.state[name].view(-1) for tensor in tensors] for name in names}
    sizes = [state.numel() for state in states["mean_grad"]]
    averages = {name: _join(parts) for name, parts in states.items()}
    scalars = _join_scalars(batches, sizes)
    mean_grad, displacement = averages["mean_grad"], averages.get("displacement")
    delta_grad = _join([grad.reshape(-1) for grad in grads])
    delta_grad.clamp_(-MAX_ROTATED_GRAD, MAX_ROTATED_GRAD).sub_(mean_grad)
    if scalars.usable is not None:
        delta_grad.masked_fill_(~scalars.usable, 0.0)
    average_(mean_grad, delta_grad, scalars.mean)
    update_moments_(averages, delta_grad, displacement, weight=scalars.square, pair_weight=scalars.pair)
    if displacement is not None:
        moments = averages["grad_sq"], averages["disp_sq"], averages["cross"]
        found = regress(*moments, beta2=options["betas"][1], step=scalars.step, sizes=sizes)
        scale = found.noise.addcmul_(found.slope, found.slope).sqrt_()
    else:
        scale = averages["grad_sq"].sqrt()
    scale.add_(max(options["eps"], torch.finfo(scale.dtype).tiny))
    limit = options["max_update"]
    update = torch.div(mean_grad, scale, out=scale).clamp_(-limit, limit).mul_(-scalars.lr)
    if displacement is not None and batches[0].is_exact:
        advance_displacement_(displacement, update, scalars.mean)
    if len(tensors) > 1:
        changed = [part for average in averages.values() for part in average.split(sizes)]
        torch._foreach_copy_([state for parts in states.values() for state in parts], changed)
    split = [whole.split([grad.numel() for grad in grads]) for whole in (delta_grad, update)]
    return [(u.view(grad.shape), d.view(grad.shape)) for u, d, grad in zip(*split, grads, strict=True)]


def _join(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors behind one another; a single one as it is."""
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))


def _join_scalars(batches: Sequence[Batch], sizes: Sequence[int]) -> Scalars:
    """The numbers of batches of one kind for their joined tensors, of these sizes."""
    if batches[0].scalars.usable is None:
        return batches[0].scalars
    rows = torch.cat([batch.rows for batch in batches])
    mean, square, pair, _, lr, usable = spread(rows.T, sizes).unbind()
    return Scalars(mean, square, pair, rows[:, 3], lr, usable > 0)


def _take_fused_averages(
    batches: Sequence[Batch], grads: Sequence[Tensor], backend: TritonBackend
) -> list[tuple[Tensor, Tensor]]:
    """As ``take_averages``; ``grads`` become the innovations."""
    options = batches[0].options
    updates = [torch.empty_like(grad) for grad in grads]
    backend.fused_averages_(
        [tensor.state for batch in batches for tensor in batch.tensors],
        [part for grad in grads for part in grad.unbind()],
        [part for update in updates for part in update.unbind()],
        torch.cat([batch.rows for batch in batches]),
        FusedStep(options["eps"], options["max_update"], options["betas"][1], advance=batches[0].is_exact),
    )
    return list(zip(grads, updates, strict=True))


def _take_sketches(batch: Batch, delta_grad: Tensor, backend: Backend) -> None:
    """Takes the innovations into the sketches that the next refit reads."""
    first, scalars = batch.tensors[0], batch.scalars
    grad_sq = batch.stack("grad_sq")
    for axis, dim in enumerate(first.layout.rotated):
        sketch = batch.stack(f"sketch{axis}")
        update_axis_sketch_(
            sketch,
            delta_grad,
            grad_sq,
            batch.basis.rotations[axis][1],
            dim=dim + 1,
            seed=batch.options["seed"],
            stream=2 * first.stream + axis,
            step=scalars.whole_step(0),
            weight=scalars.sketch,
            backend=backend,
        )
        batch.store(**{f"sketch{axis}": sketch})


class Write(NamedTuple):
    """The write of one parameter: the change to add, its batch and the row of its tensor, its random stream."""

    param: Tensor
    change: Tensor
    batch: Batch
    row: int
    stream: int


def _write(batches: Sequence[Batch], changes: Sequence[Tensor], backend: Backend) -> None:
    """Adds the changes to the parameters; advances the displacements where that is not done yet."""
    options = batches[0].options
    tracked = options["diagonal"] == "secant" and not batches[0].is_exact
    fused: dict[torch.dtype, list[Write]] = defaultdict(list)
    written: dict[Tensor, Tensor] = {}
    for batch, change in zip(batches, changes, strict=True):
        for row, (tensor, own) in enumerate(zip(batch.tensors, change.unbind(), strict=True)):
            for index, (param, part) in enumerate(zip(tensor.layout.params, tensor.layout.scatter(own), strict=True)):
                write = Write(param, part, batch, row, ROUNDING_STREAMS + tensor.stream + index)
                if param.grad is None:
                    written[param] = torch.zeros_like(part)
                elif isinstance(backend, TritonBackend) and param.is_contiguous():
                    fused[param.dtype].append(write)
                elif tracked:
                    before = param.detach().clone()
                    write_one(write, options)
                    written[param] = param.to(part.dtype) - before.to(part.dtype)
                else:
                    write_one(write, options)
    if isinstance(backend, TritonBackend):
        for writes in fused.values():
            written |= _write_fused(writes, options, backend, track=tracked)
    if tracked:
        for batch in batches:
            moved = stack(
                [tensor.layout.gather([written[p] for p in tensor.layout.params]) for tensor in batch.tensors]
            )
            displacement = batch.stack("displacement")
            advance_displacement_(displacement, batch.basis.to_rotated(moved), batch.scalars.mean)
            batch.store(displacement=displacement)


def write_one(write: Write, options: Options) -> None:
    """``theta <- theta (1 - lr weight_decay) + change``, rounded once."""
    param, change, batch, row, stream = write
    keep: Weight = 1.0
    if options["weight_decay"] and options["decoupled_weight_decay"]:
        keep = 1 - batch.scalars.lr * options["weight_decay"]
        keep = keep[row].view(()) if isinstance(keep, Tensor) else keep
    if param.dtype == change.dtype:
        param.mul_(keep).add_(change) if isinstance(keep, Tensor) or keep != 1.0 else param.add_(change)
        return
    value = param.to(change.dtype).mul_(keep).add_(change)
    if options["stochastic_rounding"] and param.dtype == torch.bfloat16:
        step = batch.scalars.whole_step(row)
        value = round_stochastically(value, seed=options["seed"], stream=stream, step=step)
    param.copy_(value)


def _write_fused(
    writes: Sequence[Write], options: Options, backend: TritonBackend, *, track: bool
) -> dict[Tensor, Tensor]:
    """The writes of parameters of one dtype; the changes after rounding with ``track``."""
    params = [write.param.detach() for write in writes]
    changes = [write.change for write in writes]
    written = [torch.empty_like(change) for change in changes] if track else None
    rounds = options["stochastic_rounding"] and params[0].dtype == torch.bfloat16
    how = FusedWrite(
        weight_decay=options["weight_decay"] if options["decoupled_weight_decay"] else 0.0,
        streams=[write.stream for write in writes],
        rounding_seed=options["seed"] if rounds else None,
    )
    rows = torch.stack([write.batch.rows[write.row] for write in writes])
    backend.fused_write_(params, changes, written, rows, how)
    return dict(zip([write.param for write in writes], written, strict=True)) if written else {}


def move_averages_(tensors: Sequence[TensorStep], old: Basis, new: Basis) -> None:
    """Moves the averages of tensors of one shape from an old basis to a new one; not those of skipped steps."""
    for name in ("mean_grad", "displacement"):
        if name in tensors[0].state:
            states = [tensor.state[name] for tensor in tensors]
            moved = new.to_rotated(old.from_rotated(stack(states))).unbind()
            for tensor, state, value in zip(tensors, states, moved, strict=True):
                state.copy_(value if tensor.usable is None else torch.where(tensor.usable, value, state))


def stack(states: Sequence[Tensor]) -> Tensor:
    """``(B, *shape)``: a view of a single tensor, a copy of several."""
    return states[0][None] if len(states) == 1 else torch.stack(list(states))

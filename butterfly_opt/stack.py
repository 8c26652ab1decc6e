"""Tensors of equal shape that step together, and their state.

The state of a tensor lies in ``optimizer.state`` under its (first) parameter, tensors and plain numbers only:

    step         0-d, steps taken                     skipped      0-d, steps skipped as non-finite
    calls        int, gradients seen: the host's clock, which sets the schedule of refits
    exp_avg      gbar, bias corrected, in original coordinates and in the parameter's shape
    exp_avg_sq   A, in rotated coordinates, of the same shape
    param_avg    thetabar, the average of the parameters with the weights of gbar (secant)
    disp_sq, cross   B and C, in rotated coordinates (secant)
    rotation{i}, moment{i}   matrices and second moments of the i-th rotated axis (``rotation.Rotation``), or
    shard_rotation{i}, shard_moment{i}   of an axis that is cut over processes (``sharding``)
    row_shards, column_shards   ints, into how many parts the axes are cut
    prev_param, prev_grad    the last step's, beside the sums of ``secant`` and ``newton`` (newton)
    earlier_steps   number, steps before this state that ``exp_avg`` was taken over from

Small tensors of one shape, and vectors, share one storage: their states are views of it, made when the stack is, so
that a step makes one call for all of them and copies nothing. A state that was replaced (``load_state_dict``) is
noticed by ``is_current``.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from inspect import iscoroutine
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from butterfly_opt.collectives import Sum
from butterfly_opt.dtensor import is_sharded, like, local
from butterfly_opt.layout import TensorLayout
from butterfly_opt.plan import make_plan, share_bounds
from butterfly_opt.rotation import Rotation
from butterfly_opt.rounding import stream_of
from butterfly_opt.sharding import ShardedRotation, basis_names, basis_shape, new_basis, rotation_of

State = dict[str, Any]

COUNTERS = ("step", "skipped")
AVERAGES = {
    "innovation": ("exp_avg", "exp_avg_sq"),
    "secant": ("exp_avg", "exp_avg_sq", "param_avg", "disp_sq", "cross"),
    "newton": ("prev_param", "prev_grad"),
}
"""What each diagonal keeps in the shape of the parameter."""

BASIS = ("rotation", "moment", "shard_rotation", "shard_moment")

MAX_STACKED = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Elements of a stack: on a CPU what stays in its second-level cache over a step, on a GPU what fills it."""

FREED = (1 << 25) - (1 << 16)
"""Bytes, just below the 32 MiB that the dynamic threshold of glibc's malloc follows; see ``keep_freed_pages``."""

REFIT_WARMUP = 100
"""First gradients, in which a basis is refitted every WARMUP_EVERY steps: most of the fit happens there."""

WARMUP_EVERY = 2
"""With half of the stacks in each step (``phase``), early steps take little longer than later ones."""


def new_state(layout: TensorLayout, options: Any) -> State:
    """The state of a tensor before its first gradient."""
    owner, dtype = layout.owner, layout.dtype
    state: State = {"calls": 0, "earlier_steps": 0} | shard_counts(layout)
    state |= {name: torch.zeros((), device=owner.device) for name in COUNTERS}
    for name in AVERAGES[options["diagonal"]]:
        state[name] = (
            torch.zeros_like(owner, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
            if is_sharded(owner)
            else torch.zeros(layout.state_shape, dtype=dtype, device=owner.device)
        )
    if "param_avg" in state:
        # thetabar_0 = theta_1, so that the first displacement is zero.
        start = layout.gather([local(param.detach()) for param in layout.params])
        local(state["param_avg"]).copy_(start.view_as(local(state["param_avg"])))
    for dim, names in zip(layout.rotated, basis_names(layout), strict=True):
        state |= zip(names, new_basis(layout, dim, options), strict=True)
    return state


def shard_counts(layout: TensorLayout) -> dict[str, int]:
    """Into how many parts its axes are cut: of another number the bases are others."""
    parts = {dim: cut.shards for dim, cut in layout.cuts if layout.rotated}
    return {"row_shards": parts.get(-2, 1), "column_shards": parts.get(-1, 1)}


def check_state(state: State, layout: TensorLayout, options: Any) -> bool:
    """Whether a state is one of ``new_state`` for this tensor and these options."""
    expected = dict.fromkeys(AVERAGES[options["diagonal"]], layout.state_shape)
    for dim, names in zip(layout.rotated, basis_names(layout), strict=True):
        expected |= dict.fromkeys(names, basis_shape(layout, dim, options))
    if not shard_counts(layout).items() <= state.items():
        return False
    if options["diagonal"] == "newton":
        # The shapes of its sums (``secant``) follow from block and lead.
        return all(name in state and state[name].shape == shape for name, shape in expected.items()) and (
            (state.get("block"), state.get("lead")) == (options["block"], options["lead"])
        )
    # Nor may it hold what another diagonal or structure keeps: that would go stale unseen.
    others = {*sum(AVERAGES.values(), ()), *(f"{name}{axis}" for name in BASIS for axis in (0, 1))}
    fits = all(name in state and state[name].shape == shape for name, shape in expected.items())
    return fits and not (others - expected.keys()) & state.keys()


def move_state_(state: State, layout: TensorLayout) -> None:
    """Follows a model that was moved to another device or dtype (bfloat16 and float32 share one state)."""
    device, dtype = layout.owner.device, layout.dtype
    first = next(state[name] for names in AVERAGES.values() for name in names if name in state)
    if first.device == device and first.dtype == dtype:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            state[key] = value.to(device, value.dtype if value.dim() == 0 else dtype)


class Gate(NamedTuple):
    """Which tensors may step, ``(tensors,)`` of a cohort, one behind the other.

    Attributes:
        finite: bool, whose gradient is finite; the others are skipped.
        active: bool, which of them count this step: before the first one, those whose gradient is not all zero.
        largest: float32, the largest absolute entry of each gradient.
    """

    finite: Tensor
    active: Tensor
    largest: Tensor


class Numbers(NamedTuple):
    """The numbers of a step: ``(tensors,)`` each, or to broadcast, ``(count, 1, 1)`` (``Stack.per_tensor``).

    Where a step is skipped all weights and the learning rate are 0, which leaves everything as it was.

    Attributes:
        mean: weight ``a`` of this gradient in ``gbar``, and of these parameters in ``thetabar``.
        square: weight ``b`` of this innovation in ``A``.
        pair: its weight in ``B`` and ``C``, which start one step later.
        step: steps so far, including this one.
        lr: learning rate.
        floor: added to the denominator, see ``step.floor``.
        moment: weight of this innovation in the second moments that the bases are fitted to: of a bias-corrected
            average at first, then of an exponential one.
        usable: 1, or 0 where the gradient is not finite.
    """

    mean: Tensor
    square: Tensor
    pair: Tensor
    step: Tensor
    lr: Tensor
    floor: Tensor
    moment: Tensor
    usable: Tensor


class Stack:
    """Tensors of equal dtype, device and schedule that step together.

    Of equal shape they are ``(count, rows, columns)``; vectors of several lengths are one, ``(1, 1, columns)``.

    Attributes:
        layouts: the tensors.
        params: the parameters that they are made of, in order.
        states: their states.
        options: options of their group.
        shape: ``(batch, rows, columns)`` of each tensor, or of the vectors together.
        averages: the averages of all, each ``(count, rows, columns)``.
        counters: the counters, each ``(tensors,)``.
        rotations: the rotated dimensions with their rotations.
        phase: number of the stack in its group among those with a basis; it shifts the schedule, so that not all refit
            in one step.
        streams: random streams for rounding, one a parameter.
        active: bool ``(tensors,)``, see ``Gate``.
        rows: the numbers of this step, ``(len(Numbers), tensors)`` in the dtype of the state.
        is_readable: whether the host may look at numbers without waiting: on a CPU, unless it pretends to be captured
            or its tensors are fake.
        all_usable: whether the host knows that no tensor is skipped this step.
    """

    def __init__(
        self,
        layouts: Sequence[TensorLayout],
        states: Sequence[State],
        options: Any,
        phase: int = 0,
        *,
        places: Sequence[int] | None = None,
        group: int = 0,
    ) -> None:
        places = range(len(layouts)) if places is None else places
        self.layouts, self.states, self.options, self.phase = layouts, states, options, phase
        self.params = [param for layout in layouts for param in layout.params]
        first, device = layouts[0], layouts[0].owner.device
        self._lengths: Tensor | None = None
        if any(layout.state_shape != first.state_shape for layout in layouts):
            self._lengths = torch.tensor([layout.shape[-1] for layout in layouts], device=device)
            first = TensorLayout(tuple(self.params), (1, 1, sum(layout.shape[-1] for layout in layouts)), ())
        self._joint, self.shape = first, first.shape
        # Several parameters make one tensor in ``flat``, and where vectors of several lengths are joined.
        self._count = 1 if len(first.params) > 1 else len(layouts)
        self.streams = [
            stream_of(group, place, i, *(cut.index for _, cut in layout.cuts))
            for place, layout in zip(places, layouts, strict=True)
            for i in range(len(layout.params))
        ]
        self.rows: Tensor
        self.active = torch.ones(len(layouts), dtype=torch.bool, device=device)
        is_on_host = device.type == "cpu" and type(self.active) is Tensor
        self.is_readable = is_on_host and not options["capturable"]
        self.all_usable, self._is_settled = False, True
        batch, rows, columns = self.shape
        total, names, bases = self._count * batch, AVERAGES[options["diagonal"]], basis_names(layouts[0])
        self._names = [*COUNTERS, *names, *(name for names in bases for name in names)]
        self.averages = {name: self._join(name).view(total, rows, columns) for name in names}
        self.rotations: list[tuple[int, Rotation | ShardedRotation]] = []
        for dim, (matrices, moments) in zip(layouts[0].rotated, bases, strict=True):
            basis = [self._join(name) for name in (matrices, moments)]
            flat = [own.view(total, own.shape[2:].numel()) for own in basis]
            self.rotations.append((dim, rotation_of(layouts[0], dim, options, *flat)))
        self._bounds = {dim: _share_bounds(layouts[0], -3 - dim, options) for dim in layouts[0].rotated}
        # Of each column its share: what is captured must be on the device before.
        self._shares = {
            dim: torch.cat([torch.full((high - low,), i, device=device) for i, (low, high) in enumerate(pairwise(own))])
            for dim, own in self._bounds.items() if options["capturable"]
        }  # fmt: skip
        # A counter for each tensor of a batch: they step together.
        self.count_in({name: self._join(name) for name in COUNTERS})

    def _join(self, name: str) -> Tensor:
        """A state of all tensors in one storage, ``(tensors, *shape)``; the states become views of it."""
        own = [local(state[name]) for state in self.states]
        # By itself a tensor stays where it is: large ones are not copied.
        if len(own) == 1:
            return own[0].unsqueeze(0)
        is_ragged = self._lengths is not None and name not in COUNTERS
        joined = self._joint.gather(own) if is_ragged else torch.stack(own)
        views = self._joint.scatter(joined) if is_ragged else joined.unbind()
        for state, view in zip(self.states, views, strict=True):
            state[name] = like(state[name], view)
        return joined

    def count_in(self, counters: dict[str, Tensor]) -> None:
        """Lets these counters, each ``(tensors,)``, be those of the states."""
        self.counters = counters
        for name, own in counters.items():
            for state, view in zip(self.states, own.unbind(), strict=True):
                state[name] = view
        self._views = [(state, name, state[name]) for state in self.states for name in self._names]

    @property
    def calls(self) -> int:
        """Gradients seen, this one included: the host's clock."""
        return max(int(state["calls"]) for state in self.states)

    @property
    def numbers(self) -> Numbers:
        """The numbers of this step."""
        return Numbers(*self.per_tensor(self.rows).unbind())

    def count_calls_(self, finite: Sequence[bool] | None, active: Sequence[bool] | None) -> None:
        """Advances the clock of each tensor; gradients that do not count are not seen where the host can tell.

        Args:
            finite: see ``Gate``; None where the host cannot tell.
            active: the same.
        """
        self.all_usable = finite is not None and all(finite)
        # One that starts, or whose step is skipped, belongs to other tensors from now on.
        self._is_settled = True
        for i, state in enumerate(self.states):
            seen = active is None or active[i]
            self._is_settled &= active is None or bool(state["calls"]) == seen
            state["calls"] += seen

    def refits(self) -> bool:
        """Whether this step refits the bases; a captured one, always the same, does where ``is_due``."""
        return self.options["capturable"] or bool(self.is_due(self.calls))

    def is_due(self, clock: Any) -> Any:
        """Whether a refit is due: of a number of steps, or of each in a tensor."""
        every, shifted = self.options["refit_every"], clock + self.phase
        # ``&`` and ``|``: the clock may be a tensor.
        early = (clock <= REFIT_WARMUP) & (shifted % min(every, WARMUP_EVERY) == 0)
        return early | ((clock > REFIT_WARMUP) & (shifted % every == 0))

    def is_current(self) -> bool:
        """Whether the states are those that the stack was made of."""
        return self._is_settled and all(state.get(name) is view for state, name, view in self._views)

    def release(self) -> None:
        """Gives every state a storage of its own: none keeps those of others alive."""
        # Counters lie in the storage of a cohort also by themselves.
        names = self._names if len(self.states) > 1 else COUNTERS
        for state in self.states:
            for name in names:
                if isinstance(state.get(name), Tensor):
                    state[name] = like(state[name], local(state[name]).clone())

    @property
    def whole_rotations(self) -> list[tuple[int, Rotation]]:
        """The rotated dimensions with their rotations; of a shard, with what it rotates by itself."""
        return [(dim, r if isinstance(r, Rotation) else r.inner) for dim, r in self.rotations]

    async def to_rotated(self, *values: Tensor) -> Sequence[Tensor]:
        """``Q^T x`` for several ``(count, rows, columns)``; the values themselves where no axis is rotated."""
        if not self.rotations:
            return values
        # Row by row one behind the other: both axes then see all values as one matrix, without a copy.
        together = torch.stack(values, dim=2)
        count, rows, number, columns = together.shape
        for dim, rotation in self.rotations:
            shape = (rows, number * columns) if dim == -2 else (rows * number, columns)
            together = await settled(rotation.to_rotated(together.view(count, *shape), dim=dim))
        return together.view(count, rows, number, columns).unbind(2)

    async def from_rotated(self, u: Tensor) -> Tensor:
        """``Q u``, the inverse of ``to_rotated``."""
        # In the same order: rows and columns do not disturb one another.
        for dim, rotation in self.rotations:
            u = await settled(rotation.from_rotated(u, dim=dim))
        return u

    def shares(self, dim: int) -> int:
        """How many shares take turns in the second moments of an axis's leaves; a start sees all of them at once."""
        return len(self._bounds[dim]) - 1

    def share(self, dim: int, values: Tensor) -> Tensor | None:
        """The columns of ``values`` that leaves of an axis see in this step, see ``plan.SHARES``; None for all."""
        bounds, count = self._bounds[dim], self.shares(dim)
        if count == 1:
            return None
        if self.options["capturable"]:
            # All columns, of which those of other shares are 0: a captured step has one shape.
            return torch.where(self._shares[dim] == self.numbers.step % count, values, 0.0)
        turn = self.calls % count
        return values[..., bounds[turn] : bounds[turn + 1]]

    async def means(self, *values: Tensor) -> Sequence[Tensor]:
        """The mean of several ``(count, rows, columns)`` over each tensor, all its shards, ``(count, 1, 1)`` each."""
        layout = self.layouts[0]
        cuts = dict(layout.cuts if layout.cross_shard else ())
        # A cut batch asks for no sum: a mean is that of one matrix.
        batch = cuts.pop(-3).n if -3 in cuts else self.shape[0]
        if self._lengths is not None:
            parts = [self.scatter(value) for value in values]
            return [self.per_tensor(torch.stack([part.mean() for part in own])) for own in parts]
        if not cuts:
            return [value.mean((-2, -1), keepdim=True) for value in values]
        sums = torch.stack([value.sum((-2, -1), keepdim=True) for value in values])
        for cut in cuts.values():
            sums = await Sum(sums, cut.group)
        # ``numel`` of a DTensor counts all shards.
        return (sums / (layout.owner.numel() // batch)).unbind()

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each of ``params`` as ``(count, rows, columns)``, see ``TensorLayout.gather``."""
        return self._joint.gather(tensors)

    def scatter(self, tensor: Tensor) -> Sequence[Tensor]:
        """The inverse of ``gather``."""
        return self._joint.scatter(tensor, self._count)

    def per_tensor(self, values: Tensor) -> Tensor:
        """Numbers of each tensor ``(..., tensors)``, to broadcast: ``(..., count, 1, 1)``; one an entry of vectors."""
        if self._lengths is not None:
            return values.repeat_interleave(self._lengths, -1, output_size=self.shape[-1])[..., None, None, :]
        return (values.repeat_interleave(self.shape[0], -1) if self.shape[0] > 1 else values)[..., None, None]


class Cohort:
    """Stacks of one group, device and dtype: they pass one gate, and their steps are counted in one storage.

    Attributes:
        stacks: in order.
        layouts: of all their tensors, in order.
        options: options of their group.
        counters: the counters of all tensors, each ``(tensors,)``.
        earlier_steps: ``(tensors,)``, or None.
        is_readable: see ``Stack``.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks, self.options, self.is_readable = stacks, stacks[0].options, stacks[0].is_readable
        self.layouts = [layout for stack in stacks for layout in stack.layouts]
        self._sizes = [len(stack.layouts) for stack in stacks]
        self.counters = {name: torch.cat([stack.counters[name] for stack in stacks]) for name in COUNTERS}
        for stack, *own in zip(stacks, *map(self.split, self.counters.values()), strict=True):
            stack.count_in(dict(zip(COUNTERS, own, strict=True)))
        earlier = [state["earlier_steps"] for stack in stacks for state in stack.states]
        self.earlier_steps = torch.tensor(earlier, device=self.layouts[0].owner.device) if any(earlier) else None

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Values of all tensors, ``(..., tensors)``, stack by stack."""
        return values.split_with_sizes(self._sizes, -1)

    def count_calls_(self, gate: Gate) -> list[tuple[Stack, Tensor]]:
        """Advances the clocks: the stacks that step with their ``usable`` tensors, all where the host cannot tell."""
        pairs, first = [], 0
        finite, active = (gate.finite.tolist(), gate.active.tolist()) if self.is_readable else (None, None)
        for stack, usable, own in zip(self.stacks, self.split(gate.finite), self.split(gate.active), strict=True):
            place, stack.active = slice(first, first + len(own)), own
            stack.count_calls_(finite and finite[place], active and active[place])
            if finite is None or any(finite[place]):
                pairs.append((stack, usable))
            first = place.stop
        return pairs


def make_stacks(layouts: Sequence[TensorLayout], states: Sequence[State], options: Any, group: int = 0) -> list[Stack]:
    """The stacks of a group's tensors; ``group`` is its number."""
    alike: dict[Any, list[tuple[TensorLayout, State, int]]] = defaultdict(list)
    elements: dict[Any, int] = defaultdict(int)
    full: list[list[tuple[TensorLayout, State, int]]] = []
    for place, (layout, state) in enumerate(zip(layouts, states, strict=True)):
        device = layout.owner.device
        room = MAX_STACKED.get(device.type, MAX_STACKED["cuda"])
        # On a CPU a tensor starts by itself, at its first gradient that is not zero; others do not wait for it.
        waits = id(layout.owner) if device.type == "cpu" and not state["calls"] else None
        shape: Any = layout.state_shape, layout.shape, layout.rotated, layout.cuts
        # The kernels step vectors of several lengths in one launch as they are.
        if device.type == "cpu" and options["backend"] != "triton" and _is_plain_vector(layout):
            shape = "vectors"
        # By calls too: a stack has one clock, and so one schedule of refits.
        key = shape, layout.owner.dtype, device, state["calls"], waits
        known = alike[key]
        elements[key] += layout.owner.numel()
        # ``newton`` steps one tensor at a time.
        if known and (options["diagonal"] == "newton" or elements[key] > room):
            full.append(known)
            known, elements[key] = [], layout.owner.numel()
            alike[key] = known
        known.append((layout, state, place))
    # Those that wait come last: the phases of the others must not depend on them.
    groups = sorted([*full, *alike.values()], key=lambda members: not members[0][1]["calls"])
    stacks, phases = [], count()
    for members in groups:
        own_layouts, own_states, places = zip(*members, strict=True)
        # Only where there is a basis: vectors are other stacks in torch than for the kernels.
        phase = next(phases) if own_layouts[0].rotated else 0
        stacks.append(Stack(own_layouts, own_states, options, phase, places=places, group=group))
    return stacks


def _share_bounds(layout: TensorLayout, dim: int, options: Any) -> list[int]:
    """``share_bounds`` of an axis; of one that is cut, where those of the whole axis lie in this process's part.

    So that shards step as the whole does; where each holds less than a share, they work one after the other.
    """
    cut = dict(layout.cuts if layout.cross_shard else ()).get(dim)
    # A shard may be empty.
    n = max(1, layout.shape[dim] if cut is None else cut.n)
    plan = make_plan(n, options["block"], options["lead"]) if dim in layout.rotated else None
    bounds = share_bounds(n, plan)
    first = 0 if cut is None else sum(cut.sizes[: cut.index])
    return [min(max(0, bound - first), layout.shape[dim]) for bound in bounds]


def _is_plain_vector(layout: TensorLayout) -> bool:
    return layout.shape[:2] == (1, 1) and len(layout.params) == 1 and not layout.rotated and not layout.cuts


@cache
def keep_freed_pages() -> None:
    """Lets glibc keep what a step on a CPU frees, by a block that is taken and given back, untouched, once a process.

    It then returns to the system only what is beyond twice FREED. Else the megabytes that a step needs are returned in
    every step, to be taken again page by page: 1,300 page faults, a fifth of the optimizer's time, for an MLP on MNIST.
    A model whose activations are as large does the same unasked.
    """
    torch.empty(FREED, dtype=torch.uint8, device="cpu")


def make_cohorts(layouts: Sequence[TensorLayout], states: Sequence[State], options: Any, group: int) -> list[Cohort]:
    """The cohorts of a group's tensors; ``group`` is its number."""
    alike: dict[Any, list[Stack]] = defaultdict(list)
    stacks = make_stacks(layouts, states, options, group)
    if any(stack.is_readable for stack in stacks):  # of a CPU, and not fake
        keep_freed_pages()
    for stack in stacks:
        # By dtype too: the floor under the scale depends on it.
        alike[stack.layouts[0].owner.device, stack.layouts[0].dtype].append(stack)
    return [Cohort(own) for own in alike.values()]


async def settled(result: Any) -> Any:
    """The result of a rotation's method, which of a sharded axis is awaited."""
    return await result if iscoroutine(result) else result

"""What a step costs on paper: `python -m experiments.scale_model [--model NAME] [--ranks 8 64 1024] [--shards N]`.

For a model given by its shapes and a number of FSDP2 ranks, what the rank that holds most (the first) keeps, receives
and computes in one optimizer step, past the first 100. Nothing is trained. Parameters are cut along their rows as
`torch.chunk` does; experts along the experts while there are as many as ranks, else along the rows of each, as
torchtitan does. With `--shards N` the ranks are groups of N shards (HSDP), whose replicas all do the same.

State and gathered numbers are float32, and those of Muon bfloat16. A rank receives `b (R - 1) / R` bytes of an
all-gather whose result has `b`, and twice that of an all-reduce of `b`, as in a ring. Of R ranks, for an m x n matrix:

FSDP itself     for comparison, in bfloat16: two all-gathers of the parameters, one reduce-scatter of the gradients.
AdamW           state 2 m n / R; nothing is received. Loshchilov and Hutter, arXiv:1711.05101.
Butterfly       state, plans and meetings are read off the objects of `butterfly_opt` (`layout`, `sharding`, `stack`);
                which of them are sent when is written out in `butterfly`, and `tests/test_scale_model.py` counts it.
                Rotations of a column take `2 sum size^2` flops over the groups of the plan, for y and m (and s) forth
                and one back; the rotation of the leading rows is done by every rank. `alone`: `cross_shard=False`.
SOAP            two averages; for every axis up to 10,000 a preconditioner and an eigenbasis, n x n each. A step
                projects four times, 2 m n (m + n) flops each (the gradient forth, the step back, the momentum back and
                forth), and sums outer products, as much again; every 10 steps sorts, multiplies and decomposes,
                (4 + 2 + 8/3) n^3. Vyas et al., arXiv:2409.11321, github.com/nikhilvyas/SOAP, with its defaults.
    gathered    the gradient is gathered; every rank keeps and computes everything: `FullyShardLosslessDistributor` of
                github.com/facebookresearch/optimizers.
    owned       a matrix and its state live on one rank; gradients go there and steps come back, m n (R - 1) / R each.
                As Dion does it for Muon, below; we know of no public SOAP that does.
    alone       every shard is a matrix of its own: `FullyShardDistributor` of the same repository.
Muon            one momentum; embeddings, heads and vectors go to AdamW. Five Newton-Schulz steps take
                5 (4 s^2 l + 2 s^3) flops, s and l the shorter and longer side. Jordan et al.,
                kellerjordan.github.io/posts/muon.
    gathered    the momentum is gathered and every rank computes everything: Liu et al., arXiv:2502.16982
                (github.com/MoonshotAI/Moonlight), `muon_reference.py` of github.com/microsoft/dion.
    owned       all-to-all: each rank computes whole matrices of a batch of R equal ones: `muon.py` of the latter.

Owners take whole matrices of each shape in turn, so that the first rank has the most; experts are single matrices for
all. A tensor that is cut along its experts needs no other rank. Elementwise work is counted too, ELEMENTWISE. Numbers
that are gathered for the length of a step are not counted as state.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from butterfly_opt import Butterfly
from butterfly_opt.layout import Cut, TensorLayout, axes_layout
from butterfly_opt.options import Options
from butterfly_opt.plan import Plan
from butterfly_opt.rotation import MAX_DENSE_LENGTH, Rotation
from butterfly_opt.sharding import Meeting, basis_shape, rotation_of
from butterfly_opt.stack import AVERAGES, COUNTERS
from experiments.bench_step import gpt2_shapes
from experiments.config import ConfigError
from experiments.paper_files import write_rows
from experiments.suite import code_digest
from experiments.train import Parser, exit_code

FLOAT = 4
"""Bytes of a number of state."""

SOAP_MAX_AXIS, SOAP_EVERY = 10_000, 10
"""``max_precond_dim`` and ``precondition_frequency`` of SOAP."""

ELEMENTWISE = {"adamw": 14, "innovation": 18, "secant": 57, "soap": 14, "muon": 5}
"""Flops a parameter beside products of matrices: additions, products, quotients, roots and comparisons."""


class Weight(NamedTuple):
    """Parameters of one shape.

    Attributes:
        shape: as in the model.
        copies: number of them.
        batch_dims: leading dimensions that are a batch of matrices (experts).
        is_lookup: whether it is an embedding or a head, which Muon leaves to AdamW.
    """

    shape: tuple[int, ...]
    copies: int = 1
    batch_dims: int = 0
    is_lookup: bool = False

    @property
    def numel(self) -> int:
        """Parameters of all copies."""
        return self.copies * math.prod(self.shape)


def gpt2() -> list[Weight]:
    """GPT-2 124M, its head tied. Source: Radford et al. (2019), huggingface.co/openai-community/gpt2, config.json."""
    shapes = gpt2_shapes(vocabulary=50257)
    lookups = [Weight(shape, is_lookup=True) for shape in shapes[:2]]
    return lookups + [Weight(shape, shapes[2:].count(shape)) for shape in dict.fromkeys(shapes[2:])]


def _llama(width: int, layers: int, keys: int, inner: int, vocabulary: int, *, heads: int) -> list[Weight]:
    """Llama without biases; ``keys``: rows of the key projection, ``heads``: 1 if tied to the embedding, else 2."""
    return [
        Weight((vocabulary, width), heads, is_lookup=True),
        Weight((width, width), 2 * layers),  # query, output
        Weight((keys, width), 2 * layers),  # key, value
        Weight((inner, width), 2 * layers),  # gate, up
        Weight((width, inner), layers),  # down
        Weight((width,), 2 * layers + 1),
    ]


def llama_1b() -> list[Weight]:
    """Llama 3.2 1B. Source: huggingface.co/meta-llama/Llama-3.2-1B, config.json."""
    return _llama(2048, 16, 512, 8192, 128256, heads=1)


def llama_7b() -> list[Weight]:
    """Llama 7B. Source: Touvron et al., arXiv:2302.13971; huggingface.co/huggyllama/llama-7b, config.json."""
    return _llama(4096, 32, 4096, 11008, 32000, heads=2)


def moe_32() -> list[Weight]:
    """gpt-oss-20b: 32 experts in each of 24 layers. Source: huggingface.co/openai/gpt-oss-20b, config.json."""
    width, layers, experts, inner = 2880, 24, 32, 2880
    queries, keys, vocabulary = 64 * 64, 8 * 64, 201088
    vectors = [(queries,), (keys,), (keys,), (width,), (width,), (width,), (64,), (experts,)]
    return [
        Weight((vocabulary, width), 2, is_lookup=True),
        Weight((queries, width), layers),
        Weight((keys, width), 2 * layers),
        Weight((width, queries), layers),
        Weight((experts, width), layers),  # router
        Weight((experts, width, 2 * inner), layers, batch_dims=1),
        Weight((experts, inner, width), layers, batch_dims=1),
        Weight((experts, 2 * inner), layers, batch_dims=1),
        Weight((experts, width), layers, batch_dims=1),
        *(Weight(shape, layers) for shape in vectors),
        Weight((width,)),
    ]


MODELS: dict[str, Callable[[], list[Weight]]] = {
    "gpt2": gpt2,
    "llama-1b": llama_1b,
    "llama-7b": llama_7b,
    "moe-32": moe_32,
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one rank and step.

    Attributes:
        state: bytes of optimizer state.
        beside: bytes kept between steps that are not saved: the rotations of the leading rows, whole.
        plain: bytes received in a step that does not refit.
        mean: bytes received, the mean over all steps.
        flops: the mean over all steps.
    """

    state: float = 0.0
    beside: float = 0.0
    plain: float = 0.0
    mean: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(factor * a for a in dataclasses.astuple(self)))


def shard(weight: Weight, ranks: int, *, cross_shard: bool = True) -> TensorLayout:
    """What the first of so many ranks, which holds most, holds of one copy."""
    whole = axes_layout(torch.empty(weight.shape, device="meta"), weight.batch_dims)
    if ranks == 1:
        return whole
    dim = -3 if weight.batch_dims and whole.shape[0] >= ranks else -2 if whole.rotated else -1
    cut = Cut(whole.shape[dim], 1, ranks, 0, 0, "ranks")
    shape = list(whole.shape)
    shape[dim] = cut.sizes[0]
    groups = (cut.group,) if cross_shard else ()
    own = (shape[0], shape[1], shape[2])
    return TensorLayout(whole.params, own, whole.rotated, ((dim, cut),), groups, cross_shard)


def options_of(diagonal: str) -> Options:
    """The options of a group of ``Butterfly`` as they are by default."""
    return Butterfly([torch.nn.Parameter(torch.zeros(1))], diagonal=diagonal).param_groups[0]


def gathered(numbers: float, ranks: int) -> float:
    """Bytes received where every rank gives so many numbers to an all-gather."""
    return FLOAT * numbers * (ranks - 1)


def summed(numbers: float, ranks: int) -> float:
    """Bytes received where so many numbers are summed over the ranks."""
    return 2 * FLOAT * numbers * (ranks - 1) / ranks


def basis_numbers(layout: TensorLayout, dim: int, options: Options) -> int:
    """Numbers that this rank keeps for the matrices of an axis, of one matrix; for their moments as many."""
    shape = basis_shape(layout, dim, options)
    return shape[2] * layout.shape[dim] if dim in dict(layout.cuts) else shape[1]


def butterfly(weight: Weight, ranks: int, options: Options, *, cross_shard: bool = True) -> Cost:
    """One copy under ``Butterfly``."""
    layout = shard(weight, ranks, cross_shard=cross_shard)
    batch, elements = layout.shape[0], math.prod(layout.shape)
    averages = len(AVERAGES[options["diagonal"]])
    total = Cost(
        state=FLOAT * (averages * elements + len(COUNTERS)),
        flops=ELEMENTWISE[options["diagonal"]] * elements,
    )
    if layout.groups:
        total += _always(summed(1, ranks))  # the largest entry of the gradient, which all must know
        if options["diagonal"] == "secant" and layout.cuts[0][0] != -3:
            total += _always(summed(2 * batch, ranks))  # means over the whole tensor
    for dim in layout.rotated:
        total += _axis(layout, dim, ranks, options) * batch
    return total


def _always(received: float) -> Cost:
    return Cost(plain=received, mean=received)


def _axis(layout: TensorLayout, dim: int, ranks: int, options: Options) -> Cost:
    """An axis of one matrix: its basis, and what rotations, observations and refits of it take."""
    numbers = basis_numbers(layout, dim, options)
    basis = torch.empty(1, numbers, device="meta")
    rotation = rotation_of(layout, dim, options, basis, basis)
    inner, meeting, over = (
        (rotation, None, None) if isinstance(rotation, Rotation) else (rotation.inner, rotation.meeting, rotation.over)
    )
    columns, forth = layout.shape[-3 - dim], 2 if options["diagonal"] == "innovation" else 3
    seldom = 1 / options["refit_every"]
    flops = (forth + 1) * rotation_flops(inner.plan, columns) + moment_flops(inner.plan, columns)
    flops += seldom * refit_flops(inner.plan)
    total = Cost(state=2 * FLOAT * numbers, flops=flops)
    if over is not None:
        total += _always(summed(inner.plan.numel, ranks))  # second moments
    if meeting is None:
        return total
    return total + _meeting(meeting, inner.plan, columns, forth, seldom)


def _meeting(meeting: Meeting, inner: Plan, columns: int, forth: int, seldom: float) -> Cost:
    """The leading rows of all shards: every rank gathers and turns all of them."""
    ranks, heads, plan = meeting.cut.shards, max(meeting.sizes), meeting.plan
    # Forth and back; to observe, values go through the shard's own stages once more, and their heads are gathered.
    received = _always((forth + 2) * gathered(heads * columns, ranks))
    flops = (forth + 1) * rotation_flops(plan, columns) + rotation_flops(inner, columns) + moment_flops(plan, columns)
    refits = Cost(mean=seldom * gathered(heads * heads, ranks), flops=seldom * refit_flops(plan, enters=True))
    return Cost(beside=2 * FLOAT * plan.numel, flops=flops) + received + refits


def rotation_flops(plan: Plan, columns: int) -> float:
    """To rotate so many columns: stage by stage, and of a short axis by one dense product."""
    is_dense = plan.n <= MAX_DENSE_LENGTH and plan.stages
    return 2.0 * columns * (plan.n**2 if is_dense else plan.numel)


def moment_flops(plan: Plan, columns: int) -> float:
    """To sum the second moments of so many columns; all stages but the last make leading outputs for the next."""
    leads = sum(run.groups * run.size * plan.lead for stage in plan.stages[:-1] for run in stage.runs)
    return 2.0 * columns * (plan.numel + leads)


def refit_flops(plan: Plan, *, enters: bool = False) -> float:
    """A QR decomposition with its factor and four products a group; ``enters``: the first stage is transported too."""
    total = 0.0
    for number, stage in enumerate(plan.stages):
        for groups, size in stage.runs:
            inflow = plan.lead if number else size if enters else 0
            own = (8 / 3 + 2) * size**3 + 6 * inflow * size**2 + 2 * plan.lead**2 * size
            total += groups * own
    if plan.n <= MAX_DENSE_LENGTH:
        total += 2.0 * plan.n * plan.numel  # the dense matrix is made anew
    return total


def adamw(weight: Weight, ranks: int) -> Cost:
    """One copy under AdamW."""
    elements = math.prod(shard(weight, ranks).shape)
    return Cost(state=2 * FLOAT * elements, flops=ELEMENTWISE["adamw"] * elements)


def _is_local(weight: Weight, ranks: int) -> bool:
    """Whether every rank holds whole matrices."""
    return ranks == 1 or shard(weight, ranks).cuts[0][0] == -3


def _owned(weight: Weight, ranks: int) -> float:
    """Matrices of the first owner, a copy: in turn over all copies and experts."""
    matrices = weight.copies * math.prod(weight.shape[: weight.batch_dims])
    return math.ceil(matrices / ranks) / weight.copies


def _traffic(numel: float, ranks: int, size: int) -> float:
    return numel * size * (ranks - 1) / ranks


def soap(weight: Weight, ranks: int, how: str) -> Cost:
    """One copy under SOAP: ``gathered``, ``owned`` or ``alone``."""
    layout = shard(weight, ranks)
    if not layout.rotated:
        return adamw(weight, ranks)
    rows, columns = weight.shape[weight.batch_dims :]
    batch = math.prod(weight.shape[: weight.batch_dims])
    if how == "alone" or _is_local(weight, ranks):
        return _soap_matrix(*layout.shape[1:]) * layout.shape[0]
    if how == "owned":
        mine = _owned(weight, ranks)
        return (_soap_matrix(rows, columns) + _always(2 * _traffic(rows * columns, ranks, FLOAT))) * mine
    return (_soap_matrix(rows, columns) + _always(_traffic(rows * columns, ranks, FLOAT))) * batch


def _soap_matrix(rows: int, columns: int) -> Cost:
    """Where a matrix is whole."""
    axes = [n for n in (rows, columns) if n <= SOAP_MAX_AXIS]
    elements = rows * columns
    # Four projections, and the outer products.
    products = 5 * 2.0 * elements * sum(axes)
    bases = sum((4 + 2 + 8 / 3) * n**3 for n in axes) / SOAP_EVERY
    state = FLOAT * (2 * elements + 2 * sum(n * n for n in axes))
    return Cost(state=state, flops=ELEMENTWISE["soap"] * elements + products + bases)


def muon(weight: Weight, ranks: int, how: str) -> Cost:
    """One copy under Muon: ``gathered`` or ``owned``."""
    layout = shard(weight, ranks)
    if weight.is_lookup or not layout.rotated:
        return adamw(weight, ranks)
    elements = math.prod(layout.shape)
    own = Cost(state=FLOAT * elements, flops=ELEMENTWISE["muon"] * elements)
    rows, columns = weight.shape[weight.batch_dims :]
    short, long = sorted((rows, columns))
    orthogonalized = Cost(flops=5.0 * (4 * short**2 * long + 2 * short**3))
    if _is_local(weight, ranks):
        return own + orthogonalized * layout.shape[0]
    received = _traffic(rows * columns, ranks, 2)
    if how == "owned":
        return own + (orthogonalized + _always(2 * received)) * _owned(weight, ranks)
    return own + (orthogonalized + _always(received)) * math.prod(weight.shape[: weight.batch_dims])


def fsdp_traffic(weights: Sequence[Weight], ranks: int) -> float:
    """Bytes that FSDP itself receives a step."""
    return 3 * _traffic(sum(weight.numel for weight in weights), ranks, 2)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model under an optimizer; bytes and flops are those of ``Cost``, ``fsdp`` those of ``fsdp_traffic``."""

    model: str
    ranks: int
    shards: int
    optimizer: str
    state: float
    beside: float
    plain: float
    mean: float
    flops: float
    fsdp: float


def rows_of(model: str, ranks: int, shards: int) -> list[Row]:
    """All optimizers on a model."""
    weights = MODELS[model]()
    innovation, secant = options_of("innovation"), options_of("secant")
    optimizers: dict[str, Callable[[Weight], Cost]] = {
        "AdamW": lambda w: adamw(w, shards),
        "Butterfly": lambda w: butterfly(w, shards, innovation),
        "Butterfly, secant": lambda w: butterfly(w, shards, secant),
        "Butterfly, alone": lambda w: butterfly(w, shards, innovation, cross_shard=False),
        "SOAP, gathered": lambda w: soap(w, shards, "gathered"),
        "SOAP, owned": lambda w: soap(w, shards, "owned"),
        "SOAP, alone": lambda w: soap(w, shards, "alone"),
        "Muon, gathered": lambda w: muon(w, shards, "gathered"),
        "Muon, owned": lambda w: muon(w, shards, "owned"),
    }
    found = []
    for name, cost_of in optimizers.items():
        cost = sum((cost_of(weight) * weight.copies for weight in weights), Cost())
        numbers = {**dataclasses.asdict(cost), "fsdp": fsdp_traffic(weights, shards)}
        found.append(Row(model, ranks, shards, name, **numbers))
    return found


def format_page(rows: Sequence[Row]) -> str:
    """The Markdown page: one table a model."""
    header = ("ranks", "optimizer", "state", "kept beside it", "received, plain step", "received, mean",
              "over FSDP's own", "Gflop, mean")  # fmt: skip
    lines = [
        "# What a step costs on paper",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}; butterfly_opt {code_digest()}. Of one rank "
        "(the fullest) and step, in MB (1e6 bytes) and Gflop (1e9); computed from shapes, nothing was measured. "
        "Formulas, sources and what is left out: the docstring of `experiments/scale_model.py`. Past the first 100 "
        "steps; a plain step does not refit. FSDP's own traffic: two all-gathers of the parameters and "
        "one reduce-scatter of the gradients in bfloat16. Groups of N shards with any number of replicas (HSDP) cost "
        "what N ranks cost.",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        count = sum(weight.numel for weight in MODELS[model]())
        lines += ["", f"## {model}: {count / 1e6:,.0f}M parameters", ""]
        lines += [f"| {' | '.join(header)} |", "|" + " --- |" * 2 + " ---: |" * (len(header) - 2)]
        for row in (row for row in rows if row.model == model):
            ranks = str(row.ranks) if row.ranks == row.shards else f"{row.ranks} ({row.shards} shards)"
            sizes = [row.state, row.beside, row.plain, row.mean]
            share = f"{row.mean / row.fsdp:.1%}" if row.fsdp else ""
            cells = [ranks, row.optimizer, *(f"{size / 1e6:,.1f}" for size in sizes), share, f"{row.flops / 1e9:,.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m experiments.scale_model", description="What a step costs on paper.")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="may be repeated (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024], help="default: 8 64 1024")
    parser.add_argument("--shards", type=int, help="groups of so many shards, replicated (default: all ranks)")
    parser.add_argument("--out", type=Path, default=Path("runs/scale_model"), help="output folder")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if min(arguments.ranks) < 1:
        raise ConfigError(f"--ranks must be at least 1, got {min(arguments.ranks)}")
    if arguments.shards is not None and arguments.shards < 1:
        raise ConfigError(f"--shards must be at least 1, got {arguments.shards}")
    rows = [
        row
        for model in arguments.model or MODELS
        for ranks in arguments.ranks
        for row in rows_of(model, ranks, min(ranks, arguments.shards or ranks))
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.out / "scale_model.csv", rows)
    page = format_page(rows)
    (arguments.out / "scale_model.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())

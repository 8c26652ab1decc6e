"""butterfly_opt.stack: tensors of one shape that share their operations step as each of them by itself.

Oracle: the same optimizer with stacks of one tensor.
"""

import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from contract import made_stacks, make_params, set_grads, values

from butterfly_opt import Butterfly, stack
from butterfly_opt.diagonal import regress
from butterfly_opt.layout import Cut, TensorLayout, axes_layout
from butterfly_opt.stack import Stack

SHAPES = ((6, 5), (4,), (3, 2, 2, 3), (6, 5), (1,), (4,), (1, 7), (7, 1))
STEPS = 14


def run(dtypes: tuple[torch.dtype, ...], **options: Any) -> list[torch.Tensor]:
    """Parameters and states after STEPS steps; one is at first without a gradient, others in some steps."""
    params = [
        torch.nn.Parameter(param.detach().to(dtype))
        for param, dtype in zip(make_params(SHAPES), dtypes * len(SHAPES), strict=False)
    ]
    opt = Butterfly(params, lr=0.03, backend="torch", **options)
    for step in range(STEPS):
        set_grads(params, step)
        if step < 3:
            params[1].grad = None
        if step in (2, 7):
            params[2].grad = None
        if step == 4:
            params[5].grad = torch.zeros_like(params[5])
        if step == 5:
            params[3].grad = torch.full_like(params[3], float("inf"))
        opt.step()
    states = [v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
    return values(params) + states


@pytest.mark.filterwarnings("ignore:.*their step was skipped")
@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float64, torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capturable": True},
        {"diagonal": "secant"},
        {"diagonal": "secant", "capturable": True},
        {"block": 4, "lead": 2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_together_as_one_after_the_other(
    options: dict[str, Any], dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor by itself refits at other steps (``phase``): so all refit in each step here."""
    monkeypatch.setattr(Stack, "refits", lambda self: True)
    monkeypatch.setattr(Stack, "is_due", lambda self, step: step > 0)
    together = run(dtypes, **options)
    monkeypatch.setitem(stack.MAX_STACKED, "cpu", 0)
    alone = run(dtypes, **options)
    for left, right in zip(together, alone, strict=True):
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[left.dtype]
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    for param, start in zip(together, make_params(SHAPES), strict=False):
        assert not torch.equal(param, start.to(param.dtype))


def stacks_of(opt: Butterfly) -> list[int]:
    return sorted(len(stack.layouts) for stack in made_stacks(opt))


def test_tensors_of_one_shape_and_all_vectors_are_one_stack_once_they_have_started() -> None:
    params = make_params(SHAPES)
    opt = Butterfly(params)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    assert stacks_of(opt) == [1, 2, 5]
    made = made_stacks(opt)
    for step in range(3, 6):
        set_grads(params, step)
        opt.step()
    # Nothing has changed, so nothing is made anew.
    assert all(own is old for own, old in zip(made_stacks(opt), made, strict=True))
    params[3].grad = None
    opt.step()
    assert stacks_of(opt) == [1, 1, 5]


def test_stacks_are_made_anew_for_another_backend() -> None:
    """The kernels take vectors of one length."""
    params = make_params(SHAPES)
    opt = Butterfly(params)
    for step, backend in enumerate(("torch", "torch", "triton", "torch")):
        opt.param_groups[0]["backend"] = backend
        set_grads(params, step)
        opt.step()
        assert stacks_of(opt)[-1] == (2 if backend == "triton" else 5) or step == 0


def test_vectors_of_one_length_need_not_be_of_one_shape() -> None:
    """The weight and the bias of ``Linear(1, 1)``, for two."""
    for shapes in (((1, 1), (1,)), ((), (1,)), ((5,), (5, 1), (1, 5)), ((16,), (1, 16), (16,))):
        params = make_params(shapes)
        alone = [torch.nn.Parameter(param.detach().clone()) for param in params]
        runs = [(Butterfly(params), params), *((Butterfly([param]), [param]) for param in alone)]
        for _ in range(4):
            for opt, own in runs:
                for param in own:
                    param.grad = param.detach() + 1
                opt.step()
        assert all(torch.equal(left, right) for left, right in zip(params, alone, strict=True))


def test_the_schedule_of_refits_does_not_depend_on_the_backend() -> None:
    """Nor do random bits: vectors are one stack in torch, and of each length one for the kernels."""
    found = []
    for backend in ("torch", "triton"):
        params = make_params(((5,), (7,), (6, 4), (9,), (5, 8)))
        layouts = [axes_layout(param, 0) for param in params]
        options = Butterfly(params, backend=backend).param_groups[0]
        states = [{**stack.new_state(layout, options), "calls": 3} for layout in layouts]
        made = stack.make_stacks(layouts, states, options)
        phases = {own.layouts[0].shape: own.phase for own in made if own.rotations}
        streams = {id(param): stream for own in made for param, stream in zip(own.params, own.streams, strict=True)}
        found.append((len(made), phases, [streams[id(param)] for param in params]))
    assert (found[0][0], found[1][0]) == (3, 5)
    assert found[0][1:] == found[1][1:]


def test_a_stack_holds_no_more_than_the_cache_does() -> None:
    params = [torch.nn.Parameter(torch.zeros(128, 128)) for _ in range(17)]
    opt = Butterfly(params)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        opt.step()
    assert stacks_of(opt) == [1, 8, 8]


FAULTS = """
import resource, torch
from butterfly_opt import Butterfly
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.randn(256, 784))
optimizer = Butterfly([param], backend="torch")
faults = []
for _ in range(130):
    param.grad = torch.randn(256, 784)
    optimizer.step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[-21]) // 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of its malloc")
def test_a_step_takes_no_fresh_pages() -> None:
    """In a process of its own, where nothing larger was freed: 1,300 page faults a step else."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_regression_of_stacked_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    shape, steps = (4, 5, 3), torch.tensor([10.0, 10.0, 3.0, 10.0]).view(-1, 1, 1)
    w, noise = torch.randn(2, 30, *shape, generator=generator, dtype=torch.float64)
    u = w * torch.linspace(-2, 3, 60).view(shape) + noise
    moments = u.square().mean(0), w.square().mean(0), (u * w).mean(0)
    found = regress(*moments, beta2=0.99, step=steps)
    for i in range(4):
        single = regress(*(moment[i : i + 1] for moment in moments), beta2=0.99, step=steps[i : i + 1])
        for name in ("slope", "noise", "energy", "tau"):
            torch.testing.assert_close(getattr(found, name)[i : i + 1], getattr(single, name))
    assert found.tau[2] == 0 < found.tau[0]


def test_a_steady_step_describes_its_tensors_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts are made anew only where what they were made of has changed."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 4), (5,), (3, 4))]
    opt = Butterfly(params)

    def step() -> None:
        for param in params:
            param.grad = None if param is left_out else torch.randn_like(param)
        opt.step()

    left_out = None
    step()
    step()
    monkeypatch.setattr("butterfly_opt.optimizer._layouts", lambda group: pytest.fail("made anew"))
    step()
    left_out = params[1]
    with pytest.raises(pytest.fail.Exception, match="made anew"):
        step()


@pytest.mark.parametrize("capturable", [False, True])
def test_shares_take_turns(capturable):
    """Leaves of rows see a quarter of the columns at a time, those of columns all 70 rows."""
    param = torch.nn.Parameter(torch.randn(70, 300))
    opt = Butterfly([param], capturable=capturable, backend="torch")
    seen = []
    for step in range(5):
        set_grads([param], step)
        opt.step()
        (own,) = made_stacks(opt)
        assert own.share(-1, torch.ones(1, 300, 70)) is None
        share = own.share(-2, torch.arange(1.0, 301).expand(1, 70, 300))
        seen.append([int(x) for x in share[0, 0] if x])
    assert seen[0] == seen[4]
    assert sorted(x for share in seen[:4] for x in share) == list(range(1, 301))


def test_captured_steps_see_the_same_shares():
    runs = []
    for capturable in (False, True):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(70, 300))
        opt = Butterfly([param], lr=0.01, capturable=capturable, backend="torch")
        for step in range(6):
            set_grads([param], step)
            opt.step()
        runs.append(param.detach())
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_captured_shares_need_no_data(device):
    param = torch.nn.Parameter(torch.zeros(70, 200, device=device))
    opt = Butterfly([param], capturable=True)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        opt.step()
    (made,) = made_stacks(opt)
    assert made.share(-2, torch.empty(1, 70, 200, device=device)).shape == (1, 70, 200)


def test_a_start_counts_as_one_gradient():
    """It sees all columns, later gradients a quarter: the first must not weigh four times as much."""
    param = torch.nn.Parameter(torch.zeros(70, 300))
    opt = Butterfly([param], lr=0.0, backend="torch")
    shares = []
    for step in range(5):
        # Innovations: of rows 0 and 1 in turn, of the same size.
        row = torch.zeros(70, 300)
        row[int(step > 0)] = 1.0
        param.grad = row + (opt.state[param]["exp_avg"] if step else 0.0)
        opt.step()
        (own,) = made_stacks(opt)
        first = own.rotations[0][1]
        (leaves, *_), *_ = first._known_moments()
        diagonal = leaves[0, 0].diagonal()
        shares.append(float(diagonal[0] / diagonal.sum()))
    weights = torch.tensor([0.95**i for i in range(5)])
    assert shares[-1] == pytest.approx(float(weights[4] / weights.sum()), rel=0.02)


@pytest.mark.parametrize("shards", [2, 3])
def test_shares_of_a_cut_axis_are_those_of_the_whole(shards):
    options = {"block": 64, "lead": 16}
    whole = stack._share_bounds(TensorLayout((torch.empty(0),), (1, 70, 300), (-2, -1)), -1, options)
    lengths = torch.zeros(4, dtype=torch.int64)
    for index in range(shards):
        cut = Cut(300, 1, shards, index, 0, None)
        layout = TensorLayout((torch.empty(0),), (1, 70, cut.sizes[index]), (-2, -1), cuts=((-1, cut),))
        lengths += torch.tensor(stack._share_bounds(layout, -1, options)).diff()
    assert torch.equal(lengths, torch.tensor(whole).diff())


def test_an_empty_shard_has_empty_shares():
    cut = Cut(9, 1, 4, 3, 0, None)
    assert cut.sizes[3] == 0
    layout = TensorLayout((torch.empty(0),), (1, 0, 40), (-1,), cuts=((-2, cut),), cross_shard=False)
    assert set(stack._share_bounds(layout, -2, {"block": 64, "lead": 16})) == {0}

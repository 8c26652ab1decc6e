"""Tests of triton_kernels/step.py: averages and direction.

Oracles: the torch functions of the package that the kernels replace, in float32, and the formulas of
``diagonal.regress`` written out in float64. Without a GPU the kernels run in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_opt import diagonal, estimate, update
from butterfly_opt.pairs import advance_displacement_, update_mean_grad_
from butterfly_opt.triton_kernels import step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [1, 2, 3, 5, 31, 64, 100, 127, 1000, 1024, 4097]
# Relative to the torch path: rounding of a few operations, plus on a GPU fused multiply-adds. Against
# float64 the regression subtracts quantities of one size, which costs some digits.
TOLERANCE = {"torch": 1e-6 if DEVICE.type == "cpu" else 2e-5, "float64": 1e-4}
BETA2 = 0.99
WEIGHTS = {"mean_weight": 0.1, "grad_weight": 0.01, "pair_weight": 0.02}
OPTIONS: dict[str, Any] = {"eps": 1e-8, "max_update": 3.0}
SECANT = ("displacement", "disp_sq", "cross")


def scalars(step_count: float = 20, lr: float = 0.01, usable: float = 1, **changes: float) -> Tensor:
    """One row, in the order of ``table.SCALARS``."""
    weights = WEIGHTS | changes
    return torch.tensor([[*weights.values(), step_count, lr, usable]], device=DEVICE)


def make(shape: int | tuple[int, ...], *, secant: bool = True, scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """A gradient and a state as after many steps: A, B, C are averages over 30 noisy pairs."""
    shape = (shape,) if isinstance(shape, int) else shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    w = 1e-2 * torch.randn(30, *shape, generator=generator)
    curvature = torch.rand(shape, generator=generator) * 10
    u = scale * (curvature * w + 0.1 * torch.randn(w.shape, generator=generator))
    state = {"grad": u[0].clone(), "mean_grad": u[:5].mean(0), "grad_sq": u.square().mean(0)}
    if secant:
        state |= {"displacement": w[0].clone(), "disp_sq": w.square().mean(0), "cross": (u * w).mean(0)}
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def lists(states: list[dict[str, Tensor]], *names: str) -> dict[str, Any]:
    """The named tensors of all states, as a table takes them; nothing of what the states do not have."""
    plural = {name: f"{name}es" if name == "cross" else f"{name}s" for name in names if name in states[0]}
    return {label: [state[name] for state in states] for name, label in plural.items()}


def moments(state: dict[str, Tensor], row: Tensor) -> Tensor | None:
    """``moments_`` of one tensor."""
    return step.moments_(step.moments_table(**lists([state], *state)), row)


def torch_moments(state: dict[str, Tensor]) -> None:
    """The torch path; ``state["grad"]`` becomes the innovation, as in the kernel."""
    rotated = state["grad"].clamp(-update.MAX_ROTATED_GRAD, update.MAX_ROTATED_GRAD)
    state["grad"] = update_mean_grad_(state["mean_grad"], rotated, WEIGHTS["mean_weight"])
    estimate.update_moments_(
        state,
        state["grad"],
        state.get("displacement"),
        weight=WEIGHTS["grad_weight"],
        pair_weight=WEIGHTS["pair_weight"],
    )


def torch_direction(state: dict[str, Tensor], *, step_count: float = 20, lr: float = 0.01, **changes: float) -> Tensor:
    """The torch path: ``regress``, then the lines of ``batch.take_averages``."""
    options = OPTIONS | changes
    energy = state["grad_sq"]
    if "cross" in state:
        energy = diagonal.regress(energy, state["disp_sq"], state["cross"], beta2=BETA2, step=step_count).energy
    scale = energy.sqrt().add_(options["eps"]).clamp_min_(torch.finfo(energy.dtype).tiny)
    return (state["mean_grad"] / scale).clamp_(-options["max_update"], options["max_update"]).mul_(-lr)


def direction(state: dict[str, Tensor], *, advance: bool = True, **changes: Any) -> Tensor:
    """``direction_`` of one tensor."""
    numbers = {name: changes.pop(name) for name in ("step_count", "lr", "usable") if name in changes}
    state = state | {"out": torch.full_like(state["mean_grad"], float("nan"))}
    secant: dict[str, Any] = {}
    if "cross" in state:
        sums = torch.stack([state["disp_sq"].sum(), state["cross"].abs().sum()])[None]
        secant = {"beta2": BETA2, "sums": changes.pop("sums", sums)}
    moved = ["displacement"] if advance else []
    table = step.direction_table(**lists([state], "out", "mean_grad", "grad_sq", "disp_sq", "cross", *moved))
    step.direction_(table, scalars(**numbers), **OPTIONS | changes, **secant)
    return state["out"]


def naive_energy(state: dict[str, Tensor]) -> Tensor:
    """V in float64, from the formulas in the docstring of ``diagonal``, nothing made relative to tau."""
    A, B, C = (state[name].double() for name in ("grad_sq", "disp_sq", "cross"))
    tau2, hbar = B.mean(), C.abs().sum() / B.sum()
    ridge = (1 - BETA2) * (A - C**2 / B).clamp(min=0) / hbar**2 + 1e-6 * tau2
    h = (C + ridge * hbar) / (B + ridge)
    return (A - 2 * h * C + h**2 * B).clamp(min=0) + h**2 * tau2


def error(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    difference = (result.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-300)).item()


def test_constants_equal_the_package():
    assert step.MAX_ROTATED_GRAD == update.MAX_ROTATED_GRAD
    assert step.MIN_STEPS == diagonal.MIN_STEPS


@pytest.mark.parametrize("secant", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_moments_equal_torch(size, secant):
    state = make(size, secant=secant)
    expected = copied(state)
    torch_moments(expected)
    total = moments(state, scalars())
    for name, tensor in expected.items():
        assert error(state[name], tensor) < TOLERANCE["torch"], name
    if secant:
        assert total.shape == (1, 2)
        sums = torch.stack([expected["disp_sq"].double().sum(), expected["cross"].abs().double().sum()])
        assert error(total[0], sums) < 1e-6
    else:
        assert total is None


def test_moments_equal_float64():
    state = make((3, 50))
    G, m, A, w, B, C = (tensor.double() for tensor in state.values())
    moments(state, scalars())
    u = G - m
    expected = [u, m + 0.1 * u, 0.99 * A + 0.01 * u**2, w, 0.98 * B + 0.02 * w**2, 0.98 * C + 0.02 * u * w]
    for tensor, value in zip(state.values(), expected, strict=True):
        assert error(tensor, value) < 1e-6


@pytest.mark.parametrize("secant", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_direction_equals_torch(size, secant):
    state = make(size, secant=secant)
    expected = torch_direction(state)
    previous = state.get("displacement", torch.empty(0)).clone()
    result = direction(state)
    assert error(result, expected) < TOLERANCE["torch"]
    if secant:
        advance_displacement_(previous, expected, WEIGHTS["mean_weight"])
        assert error(state["displacement"], previous) < TOLERANCE["torch"]


@pytest.mark.parametrize("size", SIZES[1:])
def test_direction_equals_float64(size):
    state = make(size)
    kept = state["displacement"].clone()
    expected = -0.01 * (state["mean_grad"].double() / (naive_energy(state).sqrt() + 1e-8)).clamp(-3, 3)
    assert error(direction(state, advance=False), expected) < TOLERANCE["float64"]
    assert torch.equal(state["displacement"], kept)


@pytest.mark.parametrize("step_count", [1, 5, 6])
@pytest.mark.parametrize("disp", ["zero", "tiny", "usual"])
def test_regression_is_used_once_the_tensor_has_moved(step_count, disp):
    state = make(200)
    factor = {"zero": 0.0, "tiny": 1e-13, "usual": 1.0}[disp]
    state |= {"disp_sq": state["disp_sq"] * factor**2, "cross": state["cross"] * factor}
    result = direction(copied(state), step_count=step_count)
    assert error(result, torch_direction(state, step_count=step_count)) < TOLERANCE["torch"]
    plain = {name: tensor for name, tensor in state.items() if name not in SECANT}
    believed = step_count > diagonal.MIN_STEPS and disp == "usual"
    assert torch.equal(result, direction(plain)) != believed


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e25, 1e38])
@pytest.mark.parametrize("secant", [False, True])
def test_huge_and_tiny_gradients(scale, secant):
    state = make(127, secant=secant, scale=min(scale, 1e17))
    state["grad"] *= scale / min(scale, 1e17)
    expected = copied(state)
    torch_moments(expected)
    moments(state, scalars())
    for name, tensor in expected.items():
        assert error(state[name], tensor) < TOLERANCE["torch"], name
    result, reference = direction(state, eps=0.0), torch_direction(expected, eps=0.0)
    assert result.isfinite().all()
    # Subnormal squares have few digits: at 1e-20 and below their rounding decides the result.
    assert error(result, reference) < (TOLERANCE["torch"] if scale > 1e-15 else 1e-3)


@pytest.mark.parametrize("secant", [False, True])
def test_zero_gradients_change_nothing(secant):
    state = {name: torch.zeros_like(tensor) for name, tensor in make(50, secant=secant).items()}
    moments(state, scalars())
    assert all(not tensor.any() for tensor in state.values())
    for eps in (0.0, 1e-8):
        assert not direction(state, eps=eps).any()


def test_clip_is_exact():
    state = make(300, secant=False)
    state["grad_sq"] *= 1e-20
    result = direction(state, max_update=0.5, lr=0.25)
    assert torch.equal(result, -0.125 * state["mean_grad"].sign())
    assert error(direction(state, max_update=float("inf")), torch_direction(state, max_update=float("inf"))) < 1e-6


@pytest.mark.parametrize("secant", [False, True])
def test_nan_is_not_clipped_away(secant):
    state = make(40, secant=secant)
    state["grad"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    expected = copied(state)
    torch_moments(expected)
    moments(state, scalars())
    for name, tensor in expected.items():
        assert torch.equal(state[name].isnan(), tensor.isnan()), name
    assert state["mean_grad"][1:3].isfinite().all() and state["mean_grad"][0].isnan()
    result, reference = direction(state), torch_direction(expected)
    assert result[0].isnan() and torch.equal(result.isnan(), reference.isnan())


@pytest.mark.parametrize("secant", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_gradients_change_nothing(secant, bad):
    state = make(5000, secant=secant)
    state["grad"][::7] = bad
    kept = copied(state)
    total = moments(state, scalars(usable=0))
    assert torch.equal(state.pop("grad"), torch.zeros_like(kept.pop("grad")))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    if secant:
        assert error(total[0], torch.stack([kept["disp_sq"].sum(), kept["cross"].abs().sum()])) < 1e-6
    out = direction(state, usable=0)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_unusable_averages_give_no_direction():
    """With the first gradient not finite nothing is known: the averages are zero, and so are their sums."""
    state = {name: torch.zeros_like(tensor) for name, tensor in make(50).items()}
    state["grad_sq"][3] = float("nan")
    out = direction(state, usable=0)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("secant", [False, True])
def test_lists_equal_their_tensors(secant):
    """Tensors of all sizes, the third not usable, each with weights and a step of its own."""
    sizes = [1, 5000, 2, 2048, 127, 0, 4097]
    states = [make(size, secant=secant, seed=i) for i, size in enumerate(sizes)]
    singles = [copied(state) for state in states]
    rows = [scalars(step_count=20 - 3 * i, usable=i != 2, grad_weight=0.01 * (1 + i)) for i in range(len(sizes))]
    total = step.moments_(step.moments_table(**lists(states, *states[0])), torch.cat(rows))
    outs = [state | {"out": torch.empty_like(state["grad"])} for state in states]
    table = step.direction_table(**lists(outs, "out", "mean_grad", "grad_sq", "disp_sq", "cross", "displacement"))
    secant_options = {"beta2": BETA2, "sums": total} if secant else {}
    step.direction_(table, torch.cat(rows), **OPTIONS, **secant_options)
    for i, (single, state) in enumerate(zip(singles, outs, strict=True)):
        alone = moments(single, rows[i])
        extra: dict[str, Any] = {"step_count": 20 - 3 * i, "usable": i != 2}
        if secant:
            assert torch.equal(total[i], alone[0])
            extra["sums"] = alone
        single["out"] = direction(single, **extra)
        for name in state:
            assert torch.equal(state[name], single[name]), name


def test_results_do_not_depend_on_the_run():
    first, second = make(9000), make(9000)
    assert torch.equal(moments(first, scalars()), moments(second, scalars()))
    assert torch.equal(direction(first), direction(second))


def test_empty_tensors():
    state = make(0)
    assert torch.equal(moments(state, scalars()), torch.zeros(1, 2, device=DEVICE))
    assert direction(state).shape == (0,)


def changed(tensor: Tensor, change: Any) -> Tensor | None:
    """The tensor with another dtype, device, shape or layout."""
    if change is None:
        return None
    if change == "transposed":
        return tensor.T.contiguous().T
    return torch.ones(change, device=DEVICE) if isinstance(change, tuple) else tensor.to(change)


@pytest.mark.parametrize("name, change, kind, message", [
    ("grad", torch.bfloat16, TypeError, r"grads\[0\] must be one of torch.float32, got torch.bfloat16; use butterfly"),
    ("grad", "meta", ValueError, r"mean_grads\[0\] must be on meta like grads\[0\], got|grads\[0\] must be on a CUDA"),
    ("mean_grad", (5,), ValueError, r"mean_grads\[0\] must have shape \(4, 6\) like grads\[0\], got \(5,\)"),
    ("mean_grad", torch.float64, TypeError, r"mean_grads\[0\] must be one of torch.float32, got torch.float64"),
    ("grad_sq", "transposed", ValueError, r"grad_sqs\[0\] must be contiguous, got shape \(4, 6\)"),
    ("cross", "meta", ValueError, r"crosses\[0\] must be on .*, got meta"),
])  # fmt: skip
def test_moments_table_refuses(name, change, kind, message):
    state = make((4, 6))
    state[name] = changed(state[name], change)
    with pytest.raises(kind, match=message):
        step.moments_table(**lists([state], *state))


def test_secant_lists_come_together():
    x = [torch.zeros(4, 6, device=DEVICE)]
    with pytest.raises(ValueError, match="displacements, disp_sqs, crosses must be given together, got None for disp"):
        step.moments_table(x, x, x, crosses=x)
    with pytest.raises(ValueError, match="disp_sqs, crosses must be given together, got None for crosses"):
        step.direction_table(x, x, x, disp_sqs=x)
    with pytest.raises(ValueError, match="displacements need disp_sqs and crosses too, got None"):
        step.direction_table(x, x, x, displacements=x)


@pytest.mark.parametrize("changes, kind, message", [
    ({"scalars": (2, 6)}, ValueError, r"scalars must have shape \(1, 6\), mean_weight, .*usable, got \(2, 6\)"),
    ({"scalars": (6,)}, ValueError, r"scalars must have shape \(1, 6\), .* got \(6,\)"),
    ({"scalars": torch.float64}, TypeError, "scalars must be one of torch.float32, got torch.float64"),
    ({"scalars": "meta"}, ValueError, "scalars must be on .*, got meta"),
    ({"sums": (2,)}, ValueError, r"sums must have shape \(1, 2\), the sums of B and \|C\|, got \(2,\)"),
    ({"sums": torch.float64}, TypeError, "sums must be one of torch.float32, got torch.float64"),
    ({"sums": "meta"}, ValueError, "sums must be on .*, got meta"),
    ({"sums": None}, ValueError, "sums must be given exactly for secant tables, got None"),
    ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    ({"eps": float("nan")}, ValueError, "eps must be >= 0, got nan"),
    ({"max_update": 0.0}, ValueError, "max_update must be > 0, got 0.0"),
    ({"beta2": 1.0}, ValueError, r"beta2 must be in \[0, 1\) for secant, got 1.0"),
    ({"beta2": None}, ValueError, r"beta2 must be in \[0, 1\) for secant, got None"),
])  # fmt: skip
def test_direction_refuses(changes, kind, message):
    state = make((4, 6))
    table = step.direction_table(**lists([state | {"out": state["grad"]}], "out", "mean_grad", "grad_sq", *SECANT))
    arguments: dict[str, Any] = OPTIONS | {"beta2": BETA2, "scalars": scalars()}
    arguments["sums"] = torch.ones(1, 2, device=DEVICE)
    for name, change in changes.items():
        tensor = isinstance(arguments[name], Tensor)
        arguments[name] = changed(arguments[name], change) if tensor else change
    with pytest.raises(kind, match=message):
        step.direction_(table, **arguments)


def test_launches_refuse_other_tables():
    x = [torch.zeros(4, 6, device=DEVICE)]
    averages, updates = step.moments_table(x, x, x), step.direction_table(x, x, x)
    with pytest.raises(ValueError, match="table must be made by direction_table, got one made by moments_table"):
        step.direction_(averages, scalars(), **OPTIONS)
    with pytest.raises(ValueError, match="table must be made by moments_table, got one made by direction_table"):
        step.moments_(updates, scalars())
    with pytest.raises(ValueError, match="scalars must be contiguous"):
        step.moments_(averages, scalars().repeat_interleave(2, 1)[:, ::2])
    with pytest.raises(ValueError, match="sums must be given exactly for secant tables, got a tensor"):
        step.direction_(updates, scalars(), **OPTIONS, sums=torch.ones(1, 2, device=DEVICE))

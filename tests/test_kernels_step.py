"""Tests of triton_kernels/step.py.

Oracles: the torch functions of the package that the kernels replace, in float32, and the formulas of
``diagonal.regress`` written out in float64. Without a GPU the kernels run in Triton's interpreter.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_opt import diagonal, estimate, update
from butterfly_opt.optimizer import Butterfly
from butterfly_opt.pairs import advance_displacement_, update_mean_grad_
from butterfly_opt.triton_kernels import launch, step
from butterfly_opt.triton_kernels.rotate import rotate_columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [1, 2, 5, 127, 1000, 4097]
# Relative to the torch path: rounding of a few operations, plus on a GPU fused multiply-adds. Against
# float64 the regression subtracts quantities of one size, which costs some digits.
TOLERANCE = {"torch": 1e-6 if DEVICE.type == "cpu" else 2e-5, "float64": 1e-4}
BETA2 = 0.99
WEIGHTS = {"mean_weight": 0.1, "grad_weight": 0.01, "pair_weight": 0.02}
OPTIONS: dict[str, Any] = {"eps": 1e-8, "max_update": 3.0}
SECANT = ("displacement", "disp_sq", "cross")


def scalars(step_count: float = 20, lr: float | Tensor = 0.01, **changes: float) -> Tensor:
    return step.pack_scalars(**(WEIGHTS | changes), step=step_count, lr=lr, device=DEVICE)


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


def moments(state: dict[str, Tensor], row: Tensor) -> Tensor | None:
    return step.fused_moments_(**state, scalars=row)


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
    """The torch path: ``regress``, then the lines of ``TensorStep.direction`` for scaling "adam"."""
    options = OPTIONS | changes
    energy = state["grad_sq"]
    if "cross" in state:
        energy = diagonal.regress(energy, state["disp_sq"], state["cross"], beta2=BETA2, step=step_count).energy
    scale = energy.sqrt().add_(options["eps"]).clamp_min_(torch.finfo(energy.dtype).tiny)
    return (state["mean_grad"] / scale).clamp_(-options["max_update"], options["max_update"]).mul_(-lr)


def direction(state: dict[str, Tensor], *, advance: bool = True, **changes: float) -> Tensor:
    numbers = {name: changes.pop(name) for name in ("step_count", "lr") if name in changes}
    out = torch.full_like(state["mean_grad"], float("nan"))
    secant: dict[str, Any] = {}
    if "cross" in state:
        secant = {name: state[name] for name in ("disp_sq", "cross")} | {"beta2": BETA2}
        secant["sums"] = torch.stack([state["disp_sq"].sum(), state["cross"].abs().sum()])
        if advance:
            secant["displacement"] = state["displacement"]
    step.fused_direction_(out, state["mean_grad"], state["grad_sq"], scalars(**numbers), **OPTIONS | changes, **secant)
    return out


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
    partial = moments(state, scalars())
    for name, tensor in expected.items():
        assert error(state[name], tensor) < TOLERANCE["torch"], name
    if secant:
        assert partial.shape == (-(-size // step.BLOCK), 2)
        sums = torch.stack([expected["disp_sq"].double().sum(), expected["cross"].abs().double().sum()])
        assert error(partial.sum(0), sums) < 1e-6
    else:
        assert partial is None


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_write_rounds_once(size, dtype):
    param, change = torch.randn(2, size, generator=torch.Generator().manual_seed(size)).to(DEVICE)
    param = param.to(dtype)
    before, version = param.clone(), param._version
    written = torch.empty_like(change)
    step.fused_write_(param, change, scale_decay=0.875, written=written)
    expected = before.double() * 0.875 + change.double()
    assert error(param, expected) < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert torch.equal(written, param.float() - before.float())
    assert param._version > version
    plain = before.clone()
    step.fused_write_(plain, change)
    assert torch.equal(plain, before.add_(change))


def test_write_rounds_to_nearest_even_and_keeps_nonfinite():
    exact = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, torch.inf, torch.nan])
    param = torch.zeros(8, dtype=torch.bfloat16, device=DEVICE)
    step.fused_write_(param, exact.to(DEVICE))
    assert torch.equal(param.nan_to_num(7.0), exact.bfloat16().to(DEVICE).nan_to_num(7.0))
    assert param[-1].isnan()


@pytest.mark.parametrize("secant", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_lists_equal_single_launches(secant, rows):
    sizes = [1, 5000, 2, 2048, 127, 0, 4097]
    states = [make(size, secant=secant, seed=i) for i, size in enumerate(sizes)]
    singles = [copied(state) for state in states]
    each = [scalars(step_count=20 - 5 * i * rows, grad_weight=0.01 * (1 + i * rows)) for i in range(len(sizes))]
    row = torch.stack(each) if rows else each[0]
    column = {name: [state[name] for state in states] for name in states[0]}
    names = {name: f"{name}es" if name == "cross" else f"{name}s" for name in SECANT} if secant else {}
    table = step.moments_table(column["grad"], column["mean_grad"], column["grad_sq"],
                               **{plural: column[name] for name, plural in names.items()})  # fmt: skip
    sums = step.fused_moments_many_(table, row)
    outs = [torch.empty_like(state["grad"]) for state in states]
    table = step.direction_table(outs, column["mean_grad"], column["grad_sq"],
                                 **{plural: column[name] for name, plural in names.items()})  # fmt: skip
    secant_options = {"beta2": BETA2, "sums": sums} if secant else {}
    step.fused_direction_many_(table, row, **OPTIONS, **secant_options)
    for i, (single, state) in enumerate(zip(singles, states, strict=True)):
        partial = moments(single, each[i])
        extra = {name: single[name] for name in SECANT} | {"sums": partial.sum(0), "beta2": BETA2} if secant else {}
        out = torch.empty_like(single["grad"])
        step.fused_direction_(out, single["mean_grad"], single["grad_sq"], each[i], **OPTIONS, **extra)
        if sizes[i] and secant:
            assert error(sums[i], partial.sum(0)) < 1e-6
        if sizes[i]:
            assert error(outs[i], out) < TOLERANCE["torch"]
        for name in state:
            torch.testing.assert_close(state[name], single[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("track", [False, True])
def test_write_lists(dtype, track):
    # The slices start at odd elements: the table must not promise alignment.
    whole = torch.randn(9000, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    params = [whole[:1], whole[1:6], whole[6:4103], torch.nn.Parameter(whole[4103:8200].view(17, 241).clone())]
    updates = [torch.randn_like(param, dtype=torch.float32) for param in params]
    written = [torch.empty_like(update_) for update_ in updates] if track else None
    table = step.write_table(params, updates, written=written)
    assert not table.aligned
    decay = torch.tensor(0.75, device=DEVICE)
    expected = [param.detach().clone() for param in params]
    for single, update_ in zip(expected, updates, strict=True):
        step.fused_write_(single, update_, scale_decay=decay)
    before = [param.detach().clone() for param in params]
    step.fused_write_many_(table, scale_decay=decay)
    for i, param in enumerate(params):
        assert torch.equal(param, expected[i])
        if track:
            assert torch.equal(written[i], param.detach().float() - before[i].float())


def test_table_knows_its_memory():
    params, updates = [torch.nn.Parameter(torch.zeros(3, device=DEVICE))], [torch.ones(3, device=DEVICE)]
    table = step.write_table(params, updates)
    assert table.aligned and table.is_current() and table.is_for(params, updates)
    assert not table.is_for(params) and not table.is_for(params, params) and not table.is_for()
    assert not table.is_for([params[0][:2]], [updates[0][:2]])
    params[0].data = torch.zeros(3, device=DEVICE)
    assert not table.is_current()


def test_empty_tensors():
    state = make(0)
    assert moments(state, scalars()).shape == (0, 2)
    assert direction(state).shape == (0,)
    step.fused_write_(state["grad"], state["mean_grad"])
    step.fused_write_many_(step.write_table([state["grad"]], [state["mean_grad"]]))


def test_pack_scalars_takes_tensors():
    lr = torch.tensor(0.01, device=DEVICE, dtype=torch.float64)
    assert torch.equal(scalars(lr=lr), scalars(lr=0.01))
    assert scalars().tolist() == pytest.approx([0.1, 0.01, 0.02, 20, 0.01])


def fused_step(state: dict[str, Any], param: Tensor, grad: Tensor, *, lr: float, secant: bool) -> None:
    """A step of ``Butterfly`` with kernels alone, for a matrix rotated along both axes."""
    rows, columns = param.shape
    angles = [(state["angles0"], (1, rows, columns)), (state["angles1"], (rows, columns, 1))]
    u = grad.clone()
    for a, shape in angles:
        rotate_columns(u.view(shape), a.cos(), a.sin(), transpose=True, out=u.view(shape))
    state["step"] += 1
    weights = estimate.pair_weights(state["step"].item(), (0.9, BETA2))
    row = step.pack_scalars(
        **dict(zip(("mean_weight", "grad_weight", "pair_weight"), weights, strict=True)),
        step=state["step"], lr=lr, device=DEVICE,
    )  # fmt: skip
    kept = {name: state[name] for name in SECANT} if secant else {}
    partial = step.fused_moments_(u, state["mean_grad"], state["grad_sq"], row, **kept)
    out = torch.empty_like(u)
    if secant:
        kept |= {"sums": partial.sum(0), "beta2": BETA2}
    step.fused_direction_(out, state["mean_grad"], state["grad_sq"], row, **OPTIONS, **kept)
    for a, shape in reversed(angles):
        rotate_columns(out.view(shape), a.cos(), a.sin(), out=out.view(shape))
    step.fused_write_(param, out)


@pytest.mark.parametrize("name", ["innovation", "secant"])
def test_steps_equal_the_optimizer(name, monkeypatch):
    monkeypatch.setattr(launch, "MIN_PROGRAMS", 1)
    generator = torch.Generator().manual_seed(0)
    fused, target = torch.randn(2, 6, 5, generator=generator).to(DEVICE)
    scale = torch.rand(6, 5, generator=generator).to(DEVICE) * 5
    param = torch.nn.Parameter(fused.clone())
    optimizer = Butterfly([param], lr=0.05, diagonal=name, depth=1, refit_steps=0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    # The state is there and, after a zero gradient, says nothing yet: give it a basis of its own.
    saved = optimizer.state_dict()
    for key in ("angles0", "angles1"):
        saved["state"][0][key] = torch.randn(saved["state"][0][key].shape, generator=generator)
    optimizer.load_state_dict(saved)
    expected = optimizer.state[param]
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in expected.items()}
    for _ in range(diagonal.MIN_STEPS + 4):
        noise = 0.1 * torch.randn(6, 5, generator=generator).to(DEVICE)
        param.grad = scale * (param.detach() - target) + noise
        optimizer.step()
        fused_step(state, fused, scale * (fused - target) + noise, lr=0.05, secant=name == "secant")
    assert error(fused, param.detach()) < 1e-5
    for key in ("mean_grad", "grad_sq", *(SECANT if name == "secant" else ())):
        assert error(state[key], expected[key]) < 1e-4, key


def test_can_use_step():
    x = torch.zeros(4, 6, device=DEVICE)
    assert step.can_use_step(x) and step.can_use_step(x.bfloat16(), x, x)
    assert not step.can_use_step(x.double()) and not step.can_use_step(x, x.bfloat16())
    assert not step.can_use_step(x.T) and not step.can_use_step(x, x.T)
    assert not step.can_use_step(x, x.to("meta")) and not step.can_use_step(x.to("meta"), x)


@pytest.mark.parametrize("names, change, kind, message", [
    (("grad",), torch.bfloat16, TypeError, r"grad must be one of torch.float32, got torch.bfloat16; use butterfly_opt"),
    (("mean_grad",), (5,), ValueError, r"mean_grad must have shape \(4, 6\) like grad, got \(5,\)"),
    (("grad_sq",), "transposed", ValueError, r"grad_sq must be contiguous, got shape \(4, 6\)"),
    (("cross",), "meta", ValueError, r"cross must be on .*, got meta"),
    (("scalars",), (3,), ValueError, r"scalars must have shape \(5,\), mean_weight, .* got \(3,\)"),
    (("scalars",), torch.float64, TypeError, r"scalars must be one of torch.float32, got torch.float64"),
    (("cross",), None, ValueError, r"displacement, disp_sq, cross must be given together, got None for cross"),
])  # fmt: skip
def test_moments_refuse(names, change, kind, message):
    arguments: dict[str, Any] = make((4, 6)) | {"scalars": scalars()}
    for name in names:
        arguments[name] = changed(arguments[name], change)
    with pytest.raises(kind, match=message):
        step.fused_moments_(**arguments)


def changed(tensor: Tensor, change: Any) -> Tensor | None:
    """The tensor with another dtype, device, shape or layout."""
    if change is None:
        return None
    if change == "transposed":
        return tensor.T.contiguous().T
    return torch.ones(change, device=DEVICE) if isinstance(change, tuple) else tensor.to(change)


@pytest.mark.parametrize("changes, kind, message", [
    ({"out": torch.float16}, TypeError, "out must be one of torch.float32, got torch.float16"),
    ({"displacement": (2,)}, ValueError, r"displacement must have shape \(4, 6\) like out, got \(2,\)"),
    ({"cross": (2,)}, ValueError, r"cross must have shape \(4, 6\) like out, got \(2,\)"),
    ({"sums": (3,)}, ValueError, r"sums must have shape \(2,\), the sums of B and \|C\|, got \(3,\)"),
    ({"sums": torch.float64}, TypeError, "sums must be one of torch.float32, got torch.float64"),
    ({"sums": "meta"}, ValueError, "sums must be on .*, got meta"),
    ({"sums": None}, ValueError, "disp_sq, cross, sums must be given together, got None for sums"),
    ({"sums": None, "cross": None, "disp_sq": None}, ValueError, "displacement needs disp_sq, cross and sums too"),
    ({"scalars": (2, 5)}, ValueError, r"scalars must have shape \(5,\), .* got \(2, 5\)"),
    ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    ({"eps": float("nan")}, ValueError, "eps must be >= 0, got nan"),
    ({"max_update": 0.0}, ValueError, "max_update must be > 0, got 0.0"),
    ({"beta2": 1.0}, ValueError, r"beta2 must be in \[0, 1\) for secant, got 1.0"),
    ({"beta2": None}, ValueError, r"beta2 must be in \[0, 1\) for secant, got None"),
])  # fmt: skip
def test_direction_refuses(changes, kind, message):
    state = make((4, 6))
    arguments: dict[str, Any] = OPTIONS | {"beta2": BETA2, "scalars": scalars(), "out": state.pop("grad")} | state
    arguments["sums"] = torch.ones(2, device=DEVICE)
    for name, change in changes.items():
        tensor = isinstance(arguments[name], Tensor)
        arguments[name] = changed(arguments[name], change) if tensor else change
    with pytest.raises(kind, match=message):
        step.fused_direction_(**arguments)


@pytest.mark.parametrize("changes, kind, message", [
    ({"param": torch.float64}, TypeError, "param must be one of .*, got torch.float64"),
    ({"update": torch.bfloat16}, TypeError, "update must be one of torch.float32, got torch.bfloat16"),
    ({"update": (24,)}, ValueError, r"update must have shape \(4, 6\) like param, got \(24,\)"),
    ({"written": "transposed"}, ValueError, "written must be contiguous"),
    ({"param": "transposed"}, ValueError, "param must be contiguous"),
    ({"scale_decay": (2,)}, ValueError, r"scale_decay must have one element on .*, got shape \(2,\)"),
    ({"scale_decay": torch.float64}, TypeError, "scale_decay must be one of torch.float32, got torch.float64"),
    ({"scale_decay": "meta"}, ValueError, "scale_decay must be on a CUDA device, got meta"),
])  # fmt: skip
def test_write_refuses(changes, kind, message):
    x = torch.zeros(4, 6, device=DEVICE)
    arguments = {"param": x, "update": x.clone(), "written": x.clone(), "scale_decay": torch.ones(1, device=DEVICE)}
    arguments |= {name: changed(arguments[name], change) for name, change in changes.items()}
    with pytest.raises(kind, match=message):
        step.fused_write_(**arguments)


def test_tables_refuse():
    x = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match="grads must hold at least one tensor, got none"):
        step.moments_table([], [], [])
    with pytest.raises(ValueError, match="grad_sqs must hold 2 tensors like grads, got 1"):
        step.moments_table([x, x], [x, x], [x])
    with pytest.raises(ValueError, match="displacements, disp_sqs, crosses must be given together"):
        step.moments_table([x], [x], [x], crosses=[x])
    with pytest.raises(TypeError, match=r"mean_grads\[1\] must be one of torch.float32, got torch.float64"):
        step.moments_table([x, x], [x, x.double()], [x, x])
    with pytest.raises(ValueError, match=r"outs\[1\] must be on .* like outs\[0\], got meta"):
        step.direction_table([x, x.to("meta")], [x, x], [x, x])
    with pytest.raises(ValueError, match="displacements need disp_sqs and crosses too, got None"):
        step.direction_table([x], [x], [x], displacements=[x])
    with pytest.raises(ValueError, match=r"params\[1\] must be torch.float32 like params\[0\], got torch.bfloat16"):
        step.write_table([x, x.bfloat16()], [x, x])
    with pytest.raises(ValueError, match=r"updates\[0\] must have shape \(4, 6\) like params\[0\], got \(24,\)"):
        step.write_table([x], [x.view(-1)])


def test_tables_are_not_used_on_copies(monkeypatch):
    monkeypatch.setattr(launch, "is_interpreting", lambda: True)
    step._check_addressable(torch.device("cpu"))
    with pytest.raises(ValueError, match="a table cannot be used on cuda:0 under TRITON_INTERPRET=1"):
        step._check_addressable(torch.device("cuda", 0))


def test_list_launches_refuse():
    x = torch.zeros(4, 6, device=DEVICE)
    tables = {"moments": step.moments_table([x], [x], [x]), "direction": step.direction_table([x], [x], [x])}
    secant = step.direction_table([x], [x], [x], disp_sqs=[x], crosses=[x])
    with pytest.raises(ValueError, match="table must be made by direction_table, got one made by moments_table"):
        step.fused_direction_many_(tables["moments"], scalars(), **OPTIONS)
    with pytest.raises(ValueError, match="table must be made by write_table"):
        step.fused_write_many_(tables["moments"])
    with pytest.raises(ValueError, match="table must be made by moments_table"):
        step.fused_moments_many_(tables["direction"], scalars())
    with pytest.raises(ValueError, match=r"scalars must have shape \(5,\) or \(1, 5\), .* got \(2, 5\)"):
        step.fused_moments_many_(tables["moments"], scalars().expand(2, 5).contiguous())
    with pytest.raises(TypeError, match=r"scalars must be one of torch\.float32"):
        step.fused_moments_many_(tables["moments"], scalars().double())
    with pytest.raises(ValueError, match="scalars must be contiguous"):
        step.fused_moments_many_(tables["moments"], scalars().repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="scalars must be on a CUDA device, got meta"):
        step.fused_moments_many_(tables["moments"], scalars().to("meta"))
    with pytest.raises(ValueError, match="sums must be given exactly for secant tables, got None"):
        step.fused_direction_many_(secant, scalars(), **OPTIONS, beta2=BETA2)
    with pytest.raises(ValueError, match="sums must be given exactly for secant tables, got a tensor"):
        step.fused_direction_many_(tables["direction"], scalars(), **OPTIONS, sums=torch.ones(1, 2, device=DEVICE))
    with pytest.raises(ValueError, match=r"sums must have shape \(1, 2\)"):
        step.fused_direction_many_(secant, scalars(), **OPTIONS, beta2=BETA2, sums=torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="beta2 must be in"):
        step.fused_direction_many_(secant, scalars(), **OPTIONS, sums=torch.ones(1, 2, device=DEVICE))
    with pytest.raises(dataclasses.FrozenInstanceError):
        secant.kind = "write"

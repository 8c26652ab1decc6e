"""Tests of triton_kernels/write.py.

Oracles: the formula in float64, torch's own rounding, and for stochastic rounding the same bits from torch
and ``butterfly_opt.sketch``'s hash. Without a GPU the kernel runs in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from butterfly_opt import sketch
from butterfly_opt.triton_kernels.write import write_, write_bytes, write_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [1, 2, 3, 5, 31, 64, 100, 127, 1000, 1024, 4097]
# Half a unit in the last place, relative to the largest entry.
ROUNDING = {torch.float32: 1e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def scalars(count: int = 1, *, step: float = 7, lr: float = 0.5, usable: float = 1) -> Tensor:
    return torch.tensor([[0.1, 0.01, 0.02, step, lr, usable]] * count, device=DEVICE)


def make(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    param, change = torch.randn(2, size, generator=torch.Generator().manual_seed(size)).to(DEVICE)
    return param.to(dtype), change


def stochastic(x: Tensor, *, seed: int, stream: int, step: int) -> Tensor:
    """float32 to bfloat16 with the random bits of the docstring, in 64-bit integers."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    key = sketch._mix(sketch._mix(seed & 0xFFFFFFFF) ^ (stream & 0xFFFFFFFF))
    random = sketch._mix(sketch._mix(index ^ key) ^ (step * 0x9E3779B1 & 0xFFFFFFFF))
    bits = (x.view(torch.int32).long() & 0xFFFFFFFF) + (random & 0xFFFF) & 0xFFFF0000
    rounded = torch.where(bits < 2**31, bits, bits - 2**32).int().view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_write_rounds_once(size, dtype):
    param, change = make(size, dtype)
    before, version, written = param.clone(), param._version, torch.empty_like(change)
    write_(write_table([param], [change], written=[written]), scalars(), weight_decay=0.25)
    expected = before.double() * 0.875 + change.double()
    assert (param.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    assert torch.equal(param, (before.float() * 0.875 + change).to(dtype))
    assert torch.equal(written, param.float() - before.float())
    assert param._version > version
    plain = before.clone()
    write_(write_table([plain], [change]), scalars())
    assert torch.equal(plain, before.add_(change))


def test_write_rounds_to_nearest_even_and_keeps_nonfinite():
    exact = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, torch.inf, torch.nan])
    param = torch.zeros(8, dtype=torch.bfloat16, device=DEVICE)
    write_(write_table([param], [exact.to(DEVICE)]), scalars())
    assert torch.equal(param.nan_to_num(7.0), exact.bfloat16().to(DEVICE).nan_to_num(7.0))
    assert param[-1].isnan()


@pytest.mark.parametrize("seed, stream, step", [(0, 0, 1), (1, 5, 2), (2**32 - 1, 2**31, 1000), (-3, 2**40 + 1, 2**20)])
@pytest.mark.parametrize("size", [1, 100, 4097])
def test_stochastic_rounding_has_the_bits_of_the_formula(size, seed, stream, step):
    param, change = make(size, torch.bfloat16)
    change[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])[:size]
    expected = stochastic(param.float() * 0.875 + change, seed=seed, stream=stream, step=step)
    table = write_table([param], [change], streams=[stream])
    write_(table, scalars(step=step), weight_decay=0.25, rounding_seed=seed)
    assert torch.equal(param.view(torch.int16)[3:], expected.view(torch.int16)[3:])
    assert torch.equal(param[:3].nan_to_num(7.0), expected[:3].nan_to_num(7.0))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@pytest.mark.parametrize("seed", [None, 0])
def test_rounding_keeps_every_nan(seed):
    """Also one of all ones, whose bits would carry over into zero."""
    update = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).to(DEVICE)
    param = torch.zeros(3, dtype=torch.bfloat16, device=DEVICE)
    write_(write_table([param], [update], streams=[0]), scalars(), rounding_seed=seed)
    assert param.isnan().all()


def test_stochastic_rounding_is_unbiased():
    """1 + x / 128 with x in (0, 1): up with probability x, to 5 standard deviations of 20,000 draws."""
    share, size = torch.tensor([0.1, 0.5, 0.9]), 20_000
    param = torch.ones(3, size, dtype=torch.bfloat16, device=DEVICE)
    update = (share[:, None] / 128).expand(3, size).contiguous().to(DEVICE)
    write_(write_table([param], [update], streams=[2]), scalars(), rounding_seed=0)
    mean = ((param.float() - 1) * 128).mean(1).cpu()
    assert set(param.unique().tolist()) == {1.0, 1 + 2**-7}
    assert ((mean - share).abs() < 5 * (share * (1 - share) / size).sqrt()).all()


def test_streams_and_steps_draw_other_bits():
    results = []
    for stream, step in [(0, 1), (1, 1), (0, 2), (0, 1)]:
        param = torch.ones(64, dtype=torch.bfloat16, device=DEVICE)
        table = write_table([param], [torch.full((64,), 2.0**-8, device=DEVICE)], streams=[stream])
        write_(table, scalars(step=step), rounding_seed=5)
        results.append(param)
    assert torch.equal(results[0], results[3])
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_lists(dtype, track, seed):
    """Slices at odd elements, an empty tensor, one that is not usable (its update holds NaN), rates of their own."""
    if seed is not None and dtype != torch.bfloat16:
        pytest.skip("stochastic rounding is for bfloat16")
    whole = torch.randn(9000, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    params = [whole[:1], whole[1:6], whole[6:4103], whole[4103:4103], whole[4103:8200].view(17, 241)]
    updates = [torch.randn_like(param, dtype=torch.float32) for param in params]
    updates[1][2] = torch.nan
    row = scalars(5)
    row[:, 4] = torch.arange(5)
    row[1, 5] = 0
    written = [torch.empty_like(update) for update in updates] if track else None
    before = [param.clone() for param in params]
    table = write_table(params, updates, written=written, streams=range(5) if seed is not None else None)
    assert not table.aligned
    write_(table, row, weight_decay=0.125, rounding_seed=seed)
    for i, param in enumerate(params):
        alone = before[i].clone()
        write_(write_table([alone], [updates[i]], streams=[i]), row[i : i + 1], weight_decay=0.125, rounding_seed=seed)
        assert torch.equal(param, alone if i != 1 else before[1])
        if track:
            assert torch.equal(written[i], param.float() - before[i].float())
    torch.testing.assert_close(params[4].float(), before[4].float() * 0.5 + updates[4], rtol=8e-3, atol=8e-3)


def test_unusable_gradients_leave_the_parameter_alone():
    for value in (torch.nan, torch.inf):
        param, change = make(3000, torch.float32)
        kept = param.clone()
        change[5] = value
        write_(write_table([param], [change]), scalars(usable=0), weight_decay=0.1)
        assert torch.equal(param, kept)


def test_parameters_are_written():
    param = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    write_(write_table([param], [torch.ones(3, device=DEVICE)]), scalars())
    assert torch.equal(param.detach(), torch.ones(3, device=DEVICE))


def test_bytes():
    assert write_bytes(torch.float32) == 12 and write_bytes(torch.bfloat16, track=True) == 12


@pytest.mark.parametrize("changes, kind, message", [
    ({"param": torch.float64}, TypeError, r"params\[0\] must be one of .*, got torch.float64"),
    ({"update": torch.bfloat16}, TypeError, r"updates\[0\] must be one of torch.float32, got torch.bfloat16"),
    ({"update": (24,)}, ValueError, r"updates\[0\] must have shape \(4, 6\) like params\[0\], got \(24,\)"),
    ({"written": "transposed"}, ValueError, r"written\[0\] must be contiguous"),
    ({"param": "transposed"}, ValueError, r"params\[0\] must be contiguous"),
    ({"update": "meta"}, ValueError, r"updates\[0\] must be on .*, got meta"),
    ({"param": "meta", "update": "meta", "written": "meta"}, ValueError, r"params\[0\] must be on a CUDA device"),
])  # fmt: skip
def test_tables_refuse(changes, kind, message):
    tensors: dict[str, Any] = {name: torch.zeros(4, 6, device=DEVICE) for name in ("param", "update", "written")}
    for name, change in changes.items():
        if change == "transposed":
            tensors[name] = tensors[name].T.contiguous().T
        else:
            tensors[name] = tensors[name].new_ones(change) if isinstance(change, tuple) else tensors[name].to(change)
    with pytest.raises(kind, match=message):
        write_table([tensors["param"]], [tensors["update"]], written=[tensors["written"]])


def test_launches_refuse():
    x = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"params\[1\] must be torch.float32 like params\[0\], got torch.bfloat16"):
        write_table([x, x.bfloat16()], [x, x])
    table = write_table([x], [x])
    with pytest.raises(ValueError, match=r"scalars must have shape \(1, 6\), mean_weight.* got \(2, 6\)"):
        write_(table, scalars(2))
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0, got -0\.5"):
        write_(table, scalars(), weight_decay=-0.5)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got nan"):
        write_(table, scalars(), weight_decay=float("nan"))
    with pytest.raises(TypeError, match=r"stochastic rounding needs bfloat16 parameters, got torch\.float32"):
        write_(table, scalars(), rounding_seed=0)
    with pytest.raises(ValueError, match="rounding_seed = 4 needs a table with streams, got None"):
        write_(write_table([x.bfloat16()], [x]), scalars(), rounding_seed=4)

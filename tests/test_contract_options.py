"""butterfly_opt.Butterfly: hyper-parameters, parameters and their error messages.

Oracle: torch's own bookkeeping; the bounds written in the docstring of ``Butterfly``.
"""

import copy
import inspect
import io
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from contract import NAN, SHAPES, assert_same, make_params, train, values
from torch import Tensor, nn

import butterfly_opt
from butterfly_opt import Butterfly, ButterflyW


def test_is_a_torch_optimizer() -> None:
    opt = Butterfly(make_params())
    assert isinstance(opt, torch.optim.Optimizer)
    assert {"Butterfly", "ButterflyW", "__version__"} <= set(butterfly_opt.__all__)
    assert "Butterfly" in repr(opt)
    assert not opt.state


def keywords(kind: type) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(kind).parameters.items() if name != "params"}


def test_defaults_of_the_signature() -> None:
    own = keywords(Butterfly)
    assert {name: own[name].default for name in own} == {
        "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "foreach": None,
        "maximize": False, "capturable": False, "differentiable": False, "fused": None,
        "decoupled_weight_decay": False, "diagonal": "innovation", "structure": "axes", "block": 64, "lead": 16,
        "refit_every": 10, "on_nonfinite": "skip", "stochastic_rounding": False, "backend": "auto",
    }  # fmt: skip
    defaults = {name: p.default for name, p in own.items()}
    (group,) = Butterfly(make_params()).param_groups
    assert {name: value for name, value in group.items() if name != "params"} == {
        **defaults,
        "batch_dims": 0,
        "cross_shard": True,
    }


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Butterfly, torch.optim.Adam), (ButterflyW, torch.optim.AdamW)], ids=["Adam", "AdamW"]
)
def test_the_keywords_are_those_of_torch_and_few_more(ours: type, theirs: type) -> None:
    """Torch's come first, in its order where it counts, with its defaults but for the second beta."""
    own, torchs = keywords(ours), keywords(theirs)
    own.pop("decoupled_weight_decay", None)
    torchs.pop("decoupled_weight_decay", None)
    assert set(list(own)[: len(torchs)]) == set(torchs)
    assert [n for n in own if own[n].kind is not inspect.Parameter.KEYWORD_ONLY] == list(torchs)[:5]
    for name, parameter in torchs.items():
        assert own[name].kind == parameter.kind
        assert own[name].default == (parameter.default if name != "betas" else (0.9, 0.95))
    assert len(own) - len({"fused", "foreach", "amsgrad", "differentiable"}) <= 15


def test_butterflyw_is_butterfly_with_decoupled_decay() -> None:
    """As torch's AdamW is a kind of Adam; 1e-2 of decay unless told otherwise."""
    runs = []
    for kind, options in (
        (ButterflyW, {}),
        (Butterfly, {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
        (ButterflyW, {"weight_decay": 0.1}),
        (Butterfly, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (ButterflyW, {"weight_decay": 0.0}),
        (Butterfly, {}),
    ):
        params = make_params()
        train(kind(params, lr=0.02, **options), params, range(8))
        runs.append(values(params))
    for left, right in zip(runs[::2], runs[1::2], strict=True):
        assert_same(left, right)
    assert not torch.equal(runs[0][0], runs[2][0])
    assert issubclass(ButterflyW, Butterfly)
    opt = ButterflyW(make_params())
    assert repr(opt).startswith("ButterflyW (")
    assert opt.param_groups[0]["decoupled_weight_decay"]


def test_butterflyw_decays_as_adamw() -> None:
    """Nothing but decay acts on a gradient of zero: the same numbers, bit for bit, over a schedule."""
    runs = []
    for kind in (ButterflyW, torch.optim.AdamW):
        params = make_params()
        opt = kind(params, lr=0.5, weight_decay=0.125)
        schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
        for _ in range(4):
            for param in params:
                param.grad = torch.zeros_like(param)
            opt.step()
            schedule.step()
        runs.append(values(params))
    assert_same(*runs)


@pytest.mark.parametrize("name", ["fused", "foreach"])
@pytest.mark.parametrize("value", [None, True, False])
def test_torchs_choices_of_implementation_change_nothing(name: str, value: bool | None) -> None:
    runs = []
    for options in ({}, {name: value}):
        params = make_params()
        train(Butterfly(params, amsgrad=False, differentiable=False, **options), params, range(4))
        runs.append(values(params))
    assert_same(*runs)


def test_positional_arguments_are_adams() -> None:
    adam, ours = (
        kind(make_params(), 0.02, (0.8, 0.9), 1e-6, 0.1, False).param_groups[0]
        for kind in (torch.optim.Adam, Butterfly)
    )
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert ours[name] == adam[name]


@pytest.mark.parametrize("named", [False, True])
def test_as_timm_makes_its_optimizers(named: bool) -> None:
    """``create_optimizer_v2(model, opt, lr, weight_decay, foreach=True)``: groups by decay, and keywords."""
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    decayed, plain = [], []
    for name, param in model.named_parameters():
        (plain if param.ndim <= 1 or name.endswith(".bias") else decayed).append((name, param) if named else param)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    for kind in (Butterfly, ButterflyW):
        opt = kind(groups, **{"lr": 1e-3, "weight_decay": 0.05, "eps": 1e-8, "betas": (0.9, 0.95), "foreach": True})
        losses = []
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
        for _ in range(10):
            opt.zero_grad()
            loss = (model(x) - x[:, :2]).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.05]
        assert len(opt.diagnostics()[1]["tensors"]) == 2


NUMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr, 0-d": ({"lr": torch.tensor(2.0**-5)}, {"lr": 2.0**-5}),
    "lr, one element": ({"lr": torch.tensor([2.0**-5])}, {"lr": 2.0**-5}),
    "lr, 1 x 1": ({"lr": torch.tensor([[2.0**-5]])}, {"lr": 2.0**-5}),
    "lr, float64": ({"lr": torch.tensor(2.0**-5, dtype=torch.float64)}, {"lr": 2.0**-5}),
    "betas": ({"betas": (torch.tensor(0.75), torch.tensor(0.875))}, {"betas": (0.75, 0.875)}),
    "one beta": ({"betas": (0.75, torch.tensor([0.875]))}, {"betas": (0.75, 0.875)}),
    "betas, list": ({"betas": [0.75, 0.875]}, {"betas": (0.75, 0.875)}),
    "weight_decay": ({"weight_decay": torch.tensor(0.125)}, {"weight_decay": 0.125}),
    "eps": ({"eps": torch.tensor(2.0**-20)}, {"eps": 2.0**-20}),
    "numpy": (
        {"lr": np.float32(2.0**-5), "betas": (np.float64(0.75), np.float32(0.875)), "weight_decay": np.float64(0.125)},
        {"lr": 2.0**-5, "betas": (0.75, 0.875), "weight_decay": 0.125},
    ),
    "numpy integers": (
        {"lr": np.int64(1), "refit_every": np.int32(3), "block": np.int64(4), "lead": np.int64(2)},
        {"lr": 1.0, "refit_every": 3, "block": 4, "lead": 2},
    ),
    "fractions": ({"lr": Fraction(1, 32)}, {"lr": 2.0**-5}),
    "maximize": ({"maximize": 1}, {"maximize": True}),
    "numpy bool": ({"maximize": np.bool_(True)}, {"maximize": True}),
}


@pytest.mark.parametrize("kind", [Butterfly, ButterflyW])
@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
@pytest.mark.parametrize(("given", "plain"), NUMBERS.values(), ids=NUMBERS.keys())
def test_every_kind_of_number(given: dict[str, Any], plain: dict[str, Any], diagonal: str, kind: type) -> None:
    """What torch's Adam takes is taken: the trajectory is that of the Python number."""
    runs = []
    for options in (copy.deepcopy(given), plain):
        params = make_params()
        opt = kind(params, diagonal=diagonal, **options)
        train(opt, params, range(8))
        if kind is Butterfly and diagonal == "secant":
            opt.inverse_hessian(damping=0.1), opt.inverse_hessian(corrected=True, damping=0.1), opt.preconditioner()
        runs.append(values(params))
        torch.save(opt.state_dict(), io.BytesIO())
        json.dumps(opt.diagnostics())
    if isinstance(given.get("lr"), Tensor) or "betas" in given or "eps" in given:
        # A tensor keeps its own precision.
        for left, right in zip(*runs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    else:
        assert_same(*runs)


def test_what_numpy_gave_is_saved_as_a_number() -> None:
    params = make_params()
    opt = Butterfly(params, lr=np.float64(0.1), betas=(np.float64(0.9), np.float32(0.5)), refit_every=np.int64(3))
    train(opt, params, range(2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == 0.1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "learning rate: -1.0"),
    ({"lr": NAN}, "learning rate: nan"),
    ({"lr": math.inf}, "learning rate: inf"),
    ({"lr": "fast"}, "learning rate: 'fast'"),
    ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
    ({"lr": torch.tensor(NAN)}, "learning rate: nan"),
    ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, "beta parameter at index 1: -0.1"),
    ({"betas": (NAN, 0.9)}, "beta parameter at index 0: nan"),
    ({"betas": (0.9, NAN)}, "beta parameter at index 1: nan"),
    ({"betas": (0.9,)}, r"betas: \(0.9,\), expected a pair"),
    ({"betas": 0.9}, "betas: 0.9, expected a pair"),
    ({"eps": -1e-8}, "eps value: -1e-08"),
    ({"eps": NAN}, "eps value: nan"),
    ({"eps": math.inf}, "eps value: inf"),
    ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
    ({"weight_decay": NAN}, "weight_decay value: nan"),
    ({"weight_decay": torch.tensor(-0.1)}, "weight_decay value: -0.1"),
    ({"weight_decay": torch.tensor([0.1, 0.2])}, r"Tensor weight_decay must be 1-element, got shape \(2,\)"),
    ({"eps": torch.tensor(NAN)}, "eps value: nan"),
    ({"betas": (torch.tensor(1.0), 0.9)}, "beta parameter at index 0: 1.0"),
    ({"block": 1, "lead": 1}, "block value: 1, expected an integer >= 2"),
    ({"block": 4.0, "lead": 2}, "block value: 4.0"),
    ({"lead": 0}, "lead value: 0, expected an integer >= 1"),
    ({"lead": True}, "lead value: True"),
    ({"lead": 33}, r"lead value: 33, expected at most block // 2 = 32, or block = 64"),
    ({"refit_every": 0}, "refit_every value: 0"),
    ({"refit_every": 1.5}, "refit_every value: 1.5"),
    ({"structure": "kron"}, "structure value: 'kron', expected one of axes, flat"),
    ({"diagonal": "adam"}, "diagonal value: 'adam'"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite value: 'ignore'"),
    ({"backend": "cuda"}, "backend value: 'cuda'"),
    ({"maximize": 2}, "maximize value: 2"),
    ({"decoupled_weight_decay": "yes"}, "decoupled_weight_decay value: 'yes'"),
    ({"amsgrad": True}, "does not support amsgrad=True; leave it out"),
    ({"differentiable": True}, "does not support differentiable=True"),
    ({"fused": False, "backend": "triton"}, "fused=False means the torch path and contradicts backend='triton'"),
    ({"fused": "yes"}, "fused value: 'yes', expected None, True or False"),
    ({"foreach": 2}, "foreach value: 2, expected None, True or False"),
    ({"capturable": True, "diagonal": "newton"}, "diagonal='newton' .* cannot be capturable=True"),
    ({"capturable": True, "on_nonfinite": "raise"}, "on_nonfinite='raise' .* cannot be capturable=True"),
]
bad_options = pytest.mark.parametrize(("options", "match"), BAD, ids=[str(options) for options, _ in BAD])


@bad_options
def test_bad_hyper_parameter_before_anything_is_built(options: dict[str, Any], match: str) -> None:
    params = iter(make_params())
    with pytest.raises(ValueError, match=match):
        Butterfly(params, **options)
    assert len(list(params)) == len(SHAPES)


@bad_options
def test_bad_hyper_parameter_of_a_group(options: dict[str, Any], match: str) -> None:
    opt = Butterfly(make_params())
    with pytest.raises(ValueError, match=match):
        opt.add_param_group({"params": make_params(), **options})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match=match):
        Butterfly([{"params": make_params(), **options}])


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1}, {"betas": [0.0, 0.0]}, {"eps": 0.0}, {"refit_every": 1}])
def test_bounds_are_inclusive(options: dict[str, Any]) -> None:
    params = make_params()
    train(Butterfly(params, **options), params, range(3))
    assert all(torch.isfinite(param).all() for param in params)


@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_frozen_parameters_of_any_dtype_are_left_alone(structure: str) -> None:
    """As Adam does: quantized weights beside trainable ones."""
    frozen = [nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False) for dtype in (torch.uint8, torch.int8)]
    frozen.append(nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False))
    params, others = make_params(), make_params()
    for first, own in ((frozen, params), ([], others)):
        opt = Butterfly([*first[:2], *own, *first[2:]], structure=structure)
        train(opt, own, range(4))
        if first:
            assert_same(values(frozen), [torch.ones(3, dtype=p.dtype) for p in frozen])
            assert len(opt.diagnostics()[0]["tensors"]) == (1 if structure == "flat" else 3)
            assert not any(param in opt.state for param in frozen)
            Butterfly([*first[:2], *own, *first[2:]], structure=structure).load_state_dict(opt.state_dict())
    assert_same(values(params), values(others))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_parameters_must_be_real_floating_point(dtype: torch.dtype) -> None:
    param = torch.ones(3, dtype=dtype, requires_grad=True)
    with pytest.raises(TypeError, match=f"needs real floating point parameters, got {dtype}"):
        Butterfly([param])
    opt = Butterfly(make_params())
    with pytest.raises(TypeError, match="needs real floating point parameters"):
        opt.add_param_group({"params": param})
    assert len(opt.param_groups) == 1


def test_torch_rejects_what_it_rejects_everywhere() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Butterfly([])
    param = make_params()[0]
    opt = Butterfly([param])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [param]})
    with pytest.raises(TypeError):
        Butterfly(param)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [make_params, lambda: iter(make_params()), lambda: [{"params": iter(make_params())}],
                                    lambda: [(str(i), p) for i, p in enumerate(make_params())]])  # fmt: skip
@pytest.mark.parametrize("structure", ["axes", "flat"])
def test_every_form_of_params(params: Callable[[], Any], structure: str) -> None:
    opt = Butterfly(params(), structure=structure)
    assert len(opt.param_groups[0]["params"]) == len(SHAPES)


def test_flat_needs_one_dtype() -> None:
    mixed = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    with pytest.raises(ValueError, match="structure='flat' needs one dtype and device in a group"):
        Butterfly(mixed, structure="flat")
    opt = Butterfly(make_params())
    with pytest.raises(ValueError, match="make one group of each"):
        opt.add_param_group({"params": mixed, "structure": "flat"})
    assert len(opt.param_groups) == 1
    Butterfly([{"params": mixed[:1]}, {"params": mixed[1:]}], structure="flat")


def test_triton_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    params = make_params()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' needs parameters on a CUDA device, .* got cpu"):
        train(Butterfly(params, backend="triton"), params, range(1))


def test_triton_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    params = make_params(dtype=torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"backend='triton' keeps float32 state and does not take torch\.float64"):
        train(Butterfly(params, backend="triton"), params, range(1))

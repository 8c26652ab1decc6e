"""butterfly_opt.Butterfly: hyper-parameters, parameters and their error messages.

Oracle: torch's own bookkeeping; the bounds written in the docstring of ``Butterfly``.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import NAN, SHAPES, make_params, train, values
from torch import nn

import butterfly_opt
from butterfly_opt import Butterfly


def test_is_a_torch_optimizer() -> None:
    opt = Butterfly(make_params())
    assert isinstance(opt, torch.optim.Optimizer)
    assert {"Butterfly", "__version__"} <= set(butterfly_opt.__all__)
    assert "Butterfly" in repr(opt)
    assert not opt.state


def test_defaults_of_the_signature() -> None:
    signature = inspect.signature(Butterfly)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == ["params", "lr", "betas", "eps", "weight_decay"]
    assert all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values() if p not in positional)
    expected = {
        "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "structure": "axes",
        "diagonal": "secant", "pairs": "ema", "scaling": "adam", "block_size": None,
        "decoupled_weight_decay": False, "maximize": False, "on_nonfinite": "skip", "backend": "auto", "seed": 0,
    }  # fmt: skip
    assert {name: signature.parameters[name].default for name in expected} == expected
    defaults = {p.name: p.default for p in signature.parameters.values() if p.name != "params"}
    (group,) = Butterfly(make_params()).param_groups
    assert {name: value for name, value in group.items() if name != "params"} == defaults


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "learning rate: -1.0"),
    ({"lr": NAN}, "learning rate: nan"),
    ({"lr": math.inf}, "learning rate: inf"),
    ({"lr": "fast"}, "learning rate: 'fast'"),
    ({"lr": torch.tensor([0.1])}, r"Tensor lr must be 0-dimensional, got shape \(1,\)"),
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
    ({"refit_lr": -0.1}, "refit_lr value: -0.1"),
    ({"refit_lr": NAN}, "refit_lr value: nan"),
    ({"max_update": 0.0}, "max_update value: 0.0"),
    ({"max_update": NAN}, "max_update value: nan"),
    ({"max_update": None}, "max_update value: None"),
    ({"depth": 0}, "depth value: 0, expected an integer >= 1"),
    ({"depth": 1.0}, "depth value: 1.0"),
    ({"depth": True}, "depth value: True"),
    ({"refit_every": 0}, "refit_every value: 0"),
    ({"refit_steps": -1}, "refit_steps value: -1"),
    ({"seed": -1}, "seed value: -1"),
    ({"seed": 1.5}, "seed value: 1.5"),
    ({"structure": "kron"}, "structure value: 'kron', expected one of axes, flat"),
    ({"diagonal": "adam"}, "diagonal value: 'adam'"),
    ({"pairs": "closure"}, "pairs value: 'closure'"),
    ({"scaling": "sgd"}, "scaling value: 'sgd'"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite value: 'ignore'"),
    ({"backend": "cuda"}, "backend value: 'cuda'"),
    ({"maximize": 1}, "maximize value: 1"),
    ({"decoupled_weight_decay": "yes"}, "decoupled_weight_decay value: 'yes'"),
    ({"block_size": 12, "structure": "flat"}, "block_size value: 12, expected None or a power of two"),
    ({"block_size": 1, "structure": "flat"}, "block_size value: 1"),
    ({"block_size": 8.0, "structure": "flat"}, "block_size value: 8.0"),
    ({"block_size": 8}, "block_size = 8 needs structure='flat', got 'axes'"),
    ({"diagonal": "innovation", "scaling": "newton"}, "scaling='newton' needs diagonal='secant'"),
    ({"diagonal": "innovation", "pairs": "same_batch"}, "pairs='same_batch' needs diagonal='secant'"),
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


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 1}, {"betas": [0.0, 0.0]}, {"eps": 0.0}, {"refit_steps": 0}])
def test_bounds_are_inclusive(options: dict[str, Any]) -> None:
    params = make_params()
    train(Butterfly(params, **options), params, range(3))
    assert all(torch.isfinite(param).all() for param in params)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_must_be_real_floating_point(dtype: torch.dtype) -> None:
    param = torch.ones(3, dtype=dtype)
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


def test_seed_decides_the_sketches() -> None:
    runs = []
    for seed in (0, 0, 1):
        params = make_params()
        train(Butterfly(params, seed=seed), params, range(10))
        runs.append(values(params)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_triton_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    params = make_params()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs parameters on a CUDA device, got cpu"):
        train(Butterfly(params, backend="triton"), params, range(1))


def test_triton_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    params = make_params(dtype=torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"backend='triton' keeps float32 state and does not take torch\.float64"):
        train(Butterfly(params, backend="triton"), params, range(1))

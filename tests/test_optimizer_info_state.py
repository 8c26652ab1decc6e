"""butterfly_opt.Butterfly against what torch's own suite (test/test_optim.py) demands of the state of every optimizer.

Oracle: the run that was not saved and loaded, bit for bit; the tests have torch's names.
"""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_same, values
from torch import nn
from torch.optim import Optimizer

from butterfly_opt import Butterfly

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
from optimizer_info import BUTTERFLY, Problem, basic_input, every_input, every_kind, options, without_names


@basic_input
@pytest.mark.parametrize("is_named", [(False, False), (False, True), (True, False), (True, True)])
def test_state_dict_deterministic(name: str, is_named: tuple[bool, bool]) -> None:
    problem = Problem()
    opt = Butterfly(problem.named(is_named[0]), **options(name))
    problem.train(opt, 5)
    other = problem.copy()
    copied = Butterfly(other.named(is_named[1]), **options(name))
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    copied.load_state_dict(saved)
    assert_same(saved, kept)
    problem.train(opt, 3)
    other.train(copied, 3)
    assert_same(saved, kept)
    assert_same(values(problem.params), values(other.params))
    assert_same(without_names(opt.state_dict()), without_names(copied.state_dict()))
    # Repeated groups have the same representation.
    copied.param_groups.extend(copied.param_groups)
    assert_same(
        without_names(opt.state_dict())["param_groups"][-1], without_names(copied.state_dict())["param_groups"][-1]
    )


def conv_model() -> tuple[nn.Module, Callable[[], None]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
        inputs = torch.rand(1, 4, 16, 16)

    def backward() -> None:
        model.zero_grad()
        model(inputs).square().sum().backward()

    return model, backward


@every_input
def test_can_load_older_state_dict(name: str) -> None:
    """A state dict without the flags that are younger than the first version takes their defaults."""
    model, backward = conv_model()
    kwargs = options(name)
    opt = Butterfly(model.parameters(), **kwargs)
    for _ in range(3):
        backward()
        opt.step()
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        for flag in BUTTERFLY.not_og_supported_flags:
            del group[flag]
    opt.load_state_dict(old)
    for flag in BUTTERFLY.not_og_supported_flags:
        assert opt.param_groups[0][flag] == opt.defaults[flag]
    backward()
    opt.step()


@every_kind
@pytest.mark.parametrize("is_named", [(False, False), (False, True), (True, False), (True, True)])
def test_can_load_from_to_named_state_dict(kwargs: dict[str, Any], is_named: tuple[bool, bool]) -> None:
    model, backward = conv_model()

    def make(named: bool) -> Butterfly:
        return Butterfly(model.named_parameters() if named else model.parameters(), **kwargs)

    opts = [make(named) for named in is_named]
    for _ in range(3):
        backward()
        opts[0].step()
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    backward()
    opts[1].step()
    names = ["0.weight", "0.bias", "1.weight", "1.bias"] if any(is_named) else None
    assert opts[1].state_dict()["param_groups"][0].get("param_names") == names


@basic_input
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_save_load_equality_with_weights_only(name: str, is_named: bool, weights_only: bool) -> None:
    problem = Problem()
    opt = Butterfly(problem.named(is_named), **options(name))
    problem.train(opt, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=weights_only), opt.state_dict())


@every_input
def test_load_nontensor_step(name: str) -> None:
    """``step`` saved as a number, as torch's optimizers once did; the closure returns None."""
    problem = Problem()
    opt = Butterfly(problem.params, **options(name))
    problem.train(opt, 3)
    other = problem.copy()
    state_dict = copy.deepcopy(opt.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    loaded = Butterfly(other.params, **options(name))
    loaded.load_state_dict(state_dict)
    problem.train(opt, 3)

    def closure() -> None:
        other.backward()

    for _ in range(3):
        assert loaded.step(closure) is None
    assert_same(values(problem.params), values(other.params))


def put_string_key(opt: Optimizer) -> None:
    opt.state["test"] = 1


def report_string_key(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "found": "test" in state_dict["state"]}


@every_kind
def test_state_dict_hooks_may_put_string_keys(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    opt = Butterfly(problem.params, **kwargs)
    opt.register_state_dict_post_hook(report_string_key)
    assert not opt.state_dict()["found"]
    opt.register_state_dict_pre_hook(put_string_key)
    problem.train(opt, 2)
    state_dict = opt.state_dict()
    assert state_dict["state"]["test"] == 1
    assert state_dict["found"]
    other = problem.copy()
    loaded = Butterfly(other.params, **kwargs)
    loaded.load_state_dict(copy.deepcopy(state_dict))
    assert loaded.state["test"] == 1
    for run, optimizer in ((problem, opt), (other, loaded), (other.copy(), copy.deepcopy(loaded))):
        run.train(optimizer, 2)
    assert_same(values(problem.params), values(other.params))


def set_lr_in_place(opt: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def set_lr_in_a_copy(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


@every_kind
def test_load_state_dict_hooks(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    opt = Butterfly(problem.params, **kwargs)
    problem.train(opt, 2)
    seen: list[float] = []
    opt.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"]))
    opt.register_load_state_dict_pre_hook(set_lr_in_place)
    opt.load_state_dict(opt.state_dict())
    opt.register_load_state_dict_pre_hook(set_lr_in_a_copy, prepend=True)
    opt.load_state_dict(opt.state_dict())
    opt.register_load_state_dict_pre_hook(set_lr_in_a_copy)
    opt.load_state_dict(opt.state_dict())
    assert seen == [0.002, 0.002, 0.003]
    problem.train(opt, 1)


@basic_input
def test_deepcopy_copies_all_public_attrs(name: str) -> None:
    problem = Problem()
    opt = Butterfly(problem.params, **options(name))
    problem.train(opt, 3)
    copied = copy.deepcopy(opt)
    assert {key for key in vars(opt) if not key.startswith("_")} == {key for key in vars(copied) if key[0] != "_"}
    assert_same(copied.state_dict(), opt.state_dict())


@basic_input
def test_non_empty_state(name: str) -> None:
    problem = Problem()
    opt = Butterfly(problem.params, **options(name))
    problem.train(opt, 1)
    assert opt.state
    assert all(opt.state.values())


def test_repeated_parameters_are_refused_or_warned_about_once() -> None:
    problem = Problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Butterfly([problem.weight, problem.weight])
    assert len(caught) == 1
    opt = Butterfly([problem.weight])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [problem.bias, problem.weight]})
    assert len(opt.param_groups) == 1

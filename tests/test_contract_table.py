"""experiments.contract_table: the probes tell a good optimizer from a bad one.

Oracles: what is known of torch's Adam (its documentation and source), and an optimizer made to break every promise.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from butterfly_opt import Butterfly
from experiments import contract_table
from experiments.contract_probes import PROBES, Maker, answer

ADAM_SAYS_NO = {
    "A NaN gradient leaves parameters and state untouched",
    "One infinite entry does so, too",
    "One entry whose square overflows (1e20) does so, too",
    "bf16 parameters: float32 state while training",
    "... after `load_state_dict`",
    "... after the model is cast from float32 to bf16",
    "Stochastic rounding of bf16 writes",
    "`diagnostics()`: plain numbers on each group",
    "A dummy step of zeros on a new optimizer leaves no trace",
    "A model whose parameters come in another order loads by their names",
}
"""What Butterfly does not keep yet."""


class Careless(Optimizer):
    """Breaks each promise: unseeded noise, lost state, written gradients, unbounded steps uphill, no checks."""

    _step_supports_amp_scaling = True  # claims to handle the scale of the loss, and does not

    def __init__(self, params: Iterable[Tensor], lr: Any = 0.1, weight_decay: Any = 0.0, maximize: Any = False) -> None:
        super().__init__(params, {"lr": float(lr), "weight_decay": weight_decay})
        self.count, self.lr = 0, float(lr) * (1 + isinstance(lr, Tensor))
        self.on_step: Callable[[], None] = lambda: None  # cannot be pickled
        self.sums = {param: torch.zeros_like(param) for param in self.param_groups[0]["params"]}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for param, total in self.sums.items():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            grad.mul_(1 + 1e-3 * torch.rand(()))
            with torch.no_grad():
                param.add_(self.lr * total.add_(grad) * (1 if param.is_contiguous() else 2) + self.lr * self.count)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise KeyError("state")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Careless":
        return self

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self.param_groups:
            super().add_param_group(param_group)


@pytest.mark.parametrize("name", PROBES)
def test_adam_keeps_what_it_is_known_to_keep(name: str) -> None:
    found, reason = answer(PROBES[name], Maker(torch.optim.Adam))
    assert found == (name not in ADAM_SAYS_NO), reason


@pytest.mark.parametrize("name", PROBES)
def test_a_careless_optimizer_gets_no(name: str) -> None:
    found, _ = answer(PROBES[name], Maker(Careless))
    assert not found


@pytest.mark.parametrize("name", PROBES)
def test_butterfly_keeps_the_contract(name: str) -> None:
    found, reason = answer(PROBES[name], Maker(Butterfly))
    assert found, reason


def test_a_probe_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    answer(lambda make: bool(torch.rand(()) >= 0), Maker(torch.optim.Adam))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_probe_that_raises_is_a_no_with_its_reason() -> None:
    assert answer(lambda make: 1 / 0 > 0, Maker(torch.optim.Adam)) == (False, "ZeroDivisionError: division by zero")


def test_only_declared_keywords_count() -> None:
    class Swallows(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1, **kwargs: Any) -> None:
            super().__init__(params, lr)

    found, reason = answer(lambda make: bool(make([torch.ones(2)], capturable=True)), Maker(Swallows))
    assert not found
    assert reason == "TypeError: no keyword capturable"


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(make: Maker) -> bool:
        raise RuntimeError("cannot")

    probes = {"is Adam": lambda make: make.optimizer_class is torch.optim.Adam, "fails": fails}
    monkeypatch.setattr(contract_table, "PROBES", probes)
    makers = {"Butterfly": Maker(Butterfly), "torch Adam": Maker(torch.optim.Adam)}
    monkeypatch.setattr(contract_table, "contenders", lambda: makers)
    contract_table.main(["--why"])
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "| | Butterfly | torch Adam |",
        "|---|---|---|",
        "| is Adam | no | yes |",
        "| fails | no | no |",
        "| **yes** | 0 of 2 | 1 of 2 |",
    ]
    assert err.splitlines() == ["Butterfly: fails: RuntimeError: cannot", "torch Adam: fails: RuntimeError: cannot"]
    contract_table.main([])
    assert capsys.readouterr().err == ""


def test_peers_are_columns_where_they_are_installed() -> None:
    pytest.importorskip("pytorch_optimizer")
    assert list(contract_table.contenders()) == ["Butterfly", "torch Adam", "SOAP", "Kron"]

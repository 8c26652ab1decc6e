"""butterfly_opt.batch: tensors of many shapes that share their operations step as those of one shape by themselves.

Oracle: the same optimizer with its batches taken one after the other.
"""

from typing import Any

import pytest
import torch
from contract import make_params, set_grads, values

from butterfly_opt import Butterfly
from butterfly_opt.backend import Backend
from butterfly_opt.diagonal import regress

SHAPES = ((6, 5), (4,), (3, 2, 2, 3), (6, 5), (1,), (4,), (1, 7))
STEPS = 14


def run(dtypes: tuple[torch.dtype, ...], **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and averages after STEPS steps; the second is at first without a gradient, the third in some steps."""
    params = [
        torch.nn.Parameter(param.detach().to(dtype))
        for param, dtype in zip(make_params(SHAPES), dtypes * len(SHAPES), strict=False)
    ]
    opt = Butterfly(params, lr=0.03, refit_steps=2, backend="torch", **options)
    for step in range(STEPS):
        set_grads(params, step)
        if step < 3:
            params[1].grad = None
        if step in (2, 7):
            params[2].grad = None
        if step == 5:
            params[3].grad = torch.full_like(params[3], float("inf"))
        opt.step()
    averages = "mean_grad", "grad_sq", "displacement", "disp_sq", "cross"
    return values(params), [opt.state[param][name] for param in params for name in averages if name in opt.state[param]]


@pytest.mark.filterwarnings("ignore:1 steps of tensors were skipped")
@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float64, torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capturable": True},
        {"diagonal": "innovation"},
        {"diagonal": "innovation", "capturable": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_together_as_one_after_the_other(
    options: dict[str, Any], dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, averages = run(dtypes, **options)
    monkeypatch.setattr(Backend, "chunk", 0)
    other_params, other_averages = run(dtypes, **options)
    for left, right in zip(params + averages, other_params + other_averages, strict=True):
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[left.dtype]
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    for param, start in zip(params, make_params(SHAPES), strict=True):
        assert not torch.equal(param, start.to(param.dtype))


def test_regression_of_tensors_behind_one_another() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, steps = [3, 1, 40, 7], torch.tensor([10.0, 10.0, 3.0, 10.0])
    w, noise = torch.randn(2, 30, sum(sizes), generator=generator, dtype=torch.float64)
    u = w * torch.linspace(-2, 3, sum(sizes)) + noise
    moments = u.square().mean(0), w.square().mean(0), (u * w).mean(0)
    found = regress(*moments, beta2=0.99, step=steps, sizes=sizes)
    parts = zip(*(moment.split(sizes) for moment in moments), steps, strict=True)
    single = [regress(*part[:3], beta2=0.99, step=part[3]) for part in parts]
    for name in ("slope", "noise", "energy"):
        torch.testing.assert_close(getattr(found, name), torch.cat([getattr(one, name) for one in single]))
    torch.testing.assert_close(found.tau, torch.stack([one.tau for one in single]))
    assert found.tau[2] == 0 < found.tau[0]
